//! Erasure: no key slot is left, so that nobody can read the volume again.

use crate::common::Random;
use crate::hooked::{Call, Hooked};
use crate::three_keys::{holds, made, wrapped};
use fealty_blockcrypt::{VolumeError, erase, inspect};
use std::io;

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

/// Of a store whose middle can't be read.
#[test]
fn older_slots_that_cant_be_read_keep_no_superblock_from_being_erased() {
    let (_, store) = made();
    let length = store.bytes().len() as u64;
    let middle = 2 * 4096..length - 2 * 4096;
    let unreadable = Hooked::over(store.clone(), move |call| match call {
        Call::Read(at) if middle.contains(&at.start) => Err(io::Error::other("unreadable")),
        _ => Ok(()),
    });
    assert!(erase(&unreadable).expect("erased") >= 4);
    assert!(matches!(inspect(&*store), Err(VolumeError::NotAVolume)));
}
