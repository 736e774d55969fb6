//! Older copies of a volume, or of its log, put back: what the anchor rules out does not open.

use crate::common::{Provider, SimStore, check_good};
use crate::scene::{BLOCK, SIZE, fill, scene};
use fealty_blockcrypt::VolumeError;
use policy::AnchorMode;

#[test]
fn an_older_volume_does_not_open() {
    let (provider, store) = (Provider::new(AnchorMode::Close), SimStore::new());
    provider.create(store.clone(), SIZE).expect("a volume").close().expect("closed");
    let mut copies = vec![store.bytes()];
    for round in 1..4 {
        let volume = provider.open(store.clone()).expect("opens");
        copies.push(store.bytes());
        volume.write(0, &fill(0, round)).expect("written");
        volume.flush().expect("flushed");
        volume.close().expect("closed");
        drop(volume);
        copies.push(store.bytes());
    }
    let newest = copies.pop().expect("some");
    for (i, copy) in copies.into_iter().enumerate() {
        store.set(copy);
        let refused = provider.open(store.clone()).err();
        let Some(VolumeError::RolledBack(_)) = &refused else { panic!("copy {i}: {refused:?}") };
        let text = refused.map(|e| e.to_string()).unwrap_or_default();
        assert!(text.contains("volume") && text.contains("anchor") && text.contains("older"), "{text}");
        // Another life's superblock in one slot does not help it.
        let mut mixed = newest.clone();
        let old = store.bytes();
        let end = old.len();
        mixed[..BLOCK].copy_from_slice(&old[..BLOCK]);
        mixed[end - 2 * BLOCK..end - BLOCK].copy_from_slice(&old[end - 2 * BLOCK..end - BLOCK]);
        store.set(mixed);
        if let Ok(volume) = provider.open_read_only(store.clone()) {
            let mut found = vec![0; BLOCK];
            volume.read(0, &mut found).expect("read");
            assert!(found == fill(0, 3));
        }
    }
    assert!(provider.heard().iter().any(|e| e.starts_with("integrity")));
    store.set(newest);
    provider.open(store).expect("the newest opens");
}

/// A volume that went back to its snapshot is newer than what it held before.
#[test]
fn what_a_revert_left_behind_does_not_open() {
    for mode in [AnchorMode::Flush, AnchorMode::Close] {
        let scene = scene(mode);
        scene.store.set(scene.bytes.clone());
        let volume = scene.provider.open(scene.store.clone()).expect("opens");
        let before = scene.store.bytes();
        volume.revert(scene.snapshot).expect("reverted");
        volume.close().expect("closed");
        drop(volume);
        let after = scene.store.bytes();
        scene.store.set(before);
        assert!(matches!(scene.provider.open(scene.store.clone()).err(), Some(VolumeError::RolledBack(_))));
        scene.store.set(after);
        let volume = scene.provider.open(scene.store.clone()).expect("opens");
        let mut found = vec![0; BLOCK];
        volume.read(0, &mut found).expect("read");
        assert!(found == fill(0, 1));
        check_good(&volume);
    }
}

/// The log between an earlier copy of this life and now: what a store could serve.
#[test]
fn in_mode_flush_a_shorter_log_does_not_open() {
    let (provider, store) = (Provider::new(AnchorMode::Flush), SimStore::new());
    provider.create(store.clone(), SIZE).expect("a volume").close().expect("closed");
    let volume = provider.open(store.clone()).expect("opens");
    let mut copies = Vec::new();
    for round in 1..6 {
        volume.write(0, &fill(0, round)).expect("written");
        volume.flush().expect("flushed");
        copies.push(store.bytes());
    }
    drop(volume);
    let newest = copies.pop().expect("some");
    for copy in copies {
        store.set(copy);
        assert!(matches!(provider.open(store.clone()).err(), Some(VolumeError::RolledBack(_))));
    }
    // The log alone taken back, or its last block damaged.
    store.set(newest);
    let mut found = vec![0; BLOCK];
    provider.open_read_only(store.clone()).expect("opens").read(0, &mut found).expect("read");
    assert!(found == fill(0, 5));
}

#[test]
fn in_mode_close_a_shorter_log_is_a_state_since_the_anchor() {
    let (provider, store) = (Provider::new(AnchorMode::Close), SimStore::new());
    let volume = provider.create(store.clone(), SIZE).expect("a volume");
    volume.write(0, &fill(0, 9)).expect("written");
    volume.close().expect("closed");
    drop(volume);
    let volume = provider.open(store.clone()).expect("opens");
    let mut copies = vec![(9, store.bytes())];
    for round in 1..6 {
        volume.write(0, &fill(0, round)).expect("written");
        volume.flush().expect("flushed");
        copies.push((round, store.bytes()));
    }
    drop(volume);
    let newest = store.bytes();
    for (round, copy) in &copies {
        store.set(copy.clone());
        let volume = provider.open_read_only(store.clone()).expect("allowed in this mode, and said so");
        let mut found = vec![0; BLOCK];
        volume.read(0, &mut found).expect("read");
        assert!(found == fill(0, *round));
    }
    // The newest log over an older copy's data: mandatory records are errors, never older versions; optional ones may go.
    let log = 2 * BLOCK..66 * BLOCK;
    let mut mixed = copies[0].1.clone();
    mixed[log.clone()].copy_from_slice(&newest[log]);
    store.set(mixed);
    let volume = provider.open_read_only(store.clone()).expect("opens");
    let mut found = vec![0; BLOCK];
    let read = volume.read(0, &mut found);
    assert!(matches!(read, Err(VolumeError::Integrity { lba: 0 })), "{read:?} {}", found[BLOCK - 1]);
}
