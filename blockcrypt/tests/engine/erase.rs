//! Erasure: no key slot is left, so that nobody can read the volume again.

use crate::common::{Random, SimStore};
use crate::three_keys::{holds, made, wrapped};
use fealty_blockcrypt::{Store, VolumeError, erase, inspect};
use std::io;
use std::ops::Range;
use std::sync::Arc;

#[test]
fn an_erased_volume_is_noise() {
    let (provider, store) = made();
    let before = wrapped(&store.bytes());
    assert!(erase(&*store).expect("erased") >= 5);
    assert!(matches!(provider.open(store.clone()).err(), Some(VolumeError::NotAVolume)));
    assert!(matches!(inspect(&*store), Err(VolumeError::NotAVolume)));
    assert_eq!(holds(&store.bytes(), &before), 0);
    assert!(matches!(erase(&*store), Err(VolumeError::NotAVolume)));
}

/// Of a store that is longer than its volume: nothing but the superblocks at the front says where that ends.
#[test]
fn an_erasure_that_was_interrupted_can_be_done_again() {
    let (_, store) = made();
    let before = wrapped(&store.bytes());
    let image = [store.bytes(), vec![0; 64 * 4096]].concat();
    let mut whole = false;
    for step in 1..40 {
        store.set(image.clone());
        store.burn(step);
        whole = erase(&*store).is_ok();
        store.repair();
        store.crash(&mut Random(step));
        match erase(&*store) {
            Ok(_) | Err(VolumeError::NotAVolume) => {}
            Err(other) => panic!("{step}: {other}"),
        }
        assert_eq!(holds(&store.bytes(), &before), 0, "a slot is left after {step}");
        if whole {
            break;
        }
    }
    assert!(whole, "it never came to its end");
}

/// A store whose middle can't be read.
struct Unreadable(Arc<SimStore>, Range<u64>);

impl Store for Unreadable {
    fn len(&self) -> io::Result<u64> {
        self.0.len()
    }
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        if self.1.contains(&offset) { Err(io::Error::other("unreadable")) } else { self.0.read_at(buffer, offset) }
    }
    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.0.write_at(bytes, offset)
    }
    fn sync_data(&self) -> io::Result<()> {
        self.0.sync_data()
    }
    fn set_len(&self, bytes: u64) -> io::Result<()> {
        self.0.set_len(bytes)
    }
}

#[test]
fn older_slots_that_cant_be_read_keep_no_superblock_from_being_erased() {
    let (_, store) = made();
    let length = store.bytes().len() as u64;
    let unreadable = Unreadable(store.clone(), 2 * 4096..length - 2 * 4096);
    assert!(erase(&unreadable).expect("erased") >= 4);
    assert!(matches!(inspect(&*store), Err(VolumeError::NotAVolume)));
}
