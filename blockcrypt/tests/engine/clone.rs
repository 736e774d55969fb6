//! Clones: the same data under keys of their own.

use crate::common::{Provider, Random, SimStore, check_good, lock};
use crate::three_keys::{BLOCKS, check, content, made};
use fealty_blockcrypt::{OpenOptions, Volume, VolumeError};
use policy::{AnchorMode, KeyId};
use std::collections::HashSet;

#[test]
fn a_clone_holds_the_same_and_goes_its_own_way() {
    let (provider, store) = made();
    let source = provider.open(store.clone()).expect("opens");
    let snapshot = source.take_snapshot("base").expect("taken");
    source.write(0, &[9; 4096]).expect("written");
    source.close().expect("closed");
    drop(source);
    let options = OpenOptions { snapshot: Some(snapshot), ..OpenOptions::default() };
    let source = provider.open_with(store.clone(), &provider.grant(), options).expect("opens");
    let (other, copy) = (Provider::new(AnchorMode::Flush), SimStore::new());
    other.set_kek(5, 55);
    *lock(&other.key_id) = 100;
    let (grant, kek) = (other.grant(), other.kek());
    let clone = Volume::create_clone(copy.clone(), &source, &grant, &kek, other.clone(), other.clone(), &mut |_, _| {});
    let clone = clone.expect("cloned");
    assert!(clone.id() == other.volume && clone.info().key_id == KeyId(100));
    check(&clone);
    let before = clone.take_snapshot("as cloned").expect("taken");
    for lba in 0..50 {
        clone.write(lba * 4096, &[7; 4096]).expect("written");
    }
    clone.close().expect("closed");
    drop(clone);
    assert!(matches!(provider.open(copy.clone()).err(), Some(VolumeError::OtherVolume { .. })));
    let clone = other.open(copy.clone()).expect("opens");
    check_good(&clone);
    clone.revert(before).expect("reverted");
    check(&clone);
    clone.delete_snapshot(before, &mut |_, _| {}).expect("deleted");
    check(&clone);
    check(&source);
}

/// Its key-encryption key opens none of the source's keys, neither those that it writes under nor older ones.
#[test]
fn a_clone_has_no_key_of_its_source() {
    let (provider, store) = made();
    let source = provider.open(store.clone()).expect("opens");
    let (other, copy) = (Provider::new(AnchorMode::Flush), SimStore::new());
    other.set_kek(5, 55);
    *lock(&other.key_id) = 100;
    let (grant, kek) = (other.grant(), other.kek());
    let clone = Volume::create_clone(copy.clone(), &source, &grant, &kek, other.clone(), other.clone(), &mut |_, _| {});
    let clone = clone.expect("cloned");
    assert_eq!((source.info().older_keys, clone.info().older_keys), (2, 0));
    clone.close().expect("closed");
    source.close().expect("closed");
    let (ours, theirs) = (store.bytes(), copy.bytes());
    let sealed: HashSet<_> = ours.as_chunks::<4096>().0.iter().filter(|block| **block != [0; 4096]).collect();
    assert!(sealed.len() as u64 > BLOCKS);
    assert!(!theirs.as_chunks::<4096>().0.iter().any(|block| sealed.contains(block)), "something was copied as it lay");
    check(&other.open(copy).expect("opens"));
}

/// Blocks of a clone don't pass for the source's, nor the other way round.
#[test]
fn a_clone_and_its_source_do_not_mix() {
    let (provider, store) = made();
    let source = provider.open(store.clone()).expect("opens");
    let (other, copy) = (Provider::new(AnchorMode::Flush), SimStore::new());
    *lock(&other.key_id) = 100;
    let mut heard = Vec::new();
    let (grant, kek, hear) = (other.grant(), other.kek(), &mut |done, all| heard.push((done, all)));
    let clone =
        Volume::create_clone(copy.clone(), &source, &grant, &kek, other.clone(), other.clone(), hear).expect("cloned");
    assert!(heard.is_sorted() && heard.last() == Some(&(BLOCKS, BLOCKS)), "{heard:?}");
    for volume in [&source, &clone] {
        for lba in 0..BLOCKS {
            volume.write(lba * 4096, &content(lba)).expect("written");
        }
        volume.close().expect("closed");
    }
    drop((source, clone));
    let (ours, theirs) = (store.bytes(), copy.bytes());
    let mut random = Random(4);
    for _ in 0..60 {
        let mut mixed = ours.clone();
        let at = random.below((ours.len() / 4096) as u64) as usize * 4096;
        mixed[at..at + 4096].copy_from_slice(&theirs[at..at + 4096]);
        store.set(mixed);
        let Ok(volume) = provider.open_read_only(store.clone()) else { continue };
        for lba in 0..BLOCKS {
            let mut found = vec![0; 4096];
            match volume.read(lba * 4096, &mut found) {
                Ok(()) => assert!(found == content(lba), "{lba}"),
                Err(error) => assert!(error.is_integrity(), "{error}"),
            }
        }
    }
}
