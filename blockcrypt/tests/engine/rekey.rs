//! Rotations: everything sealed anew under a new key, whatever lies in between, until no older key is needed.

use crate::common::{Provider, Random, SimStore, lock};
use crate::three_keys::{BLOCKS, check, content, holds, made, wrapped};
use fealty_blockcrypt::{Volume, VolumeError};
use policy::KeyId;

#[test]
fn a_rotation_goes_on_after_crashes_and_ends_without_older_keys() {
    let (provider, store) = made();
    *lock(&provider.key_id) = 9;
    let mut random = Random(5);
    let mut volume = provider.open(store.clone()).expect("opens");
    assert_eq!(volume.info().older_keys, 3);
    for _ in 0..6 {
        store.burn(3 + random.below(12));
        let _ = volume.rotate(&mut |_, _| true);
        drop(volume);
        store.repair();
        store.crash(&mut random);
        volume = provider.open(store.clone()).expect("opens");
        check(&volume);
    }
    assert!(volume.rotate(&mut |_, _| true).expect("rotated"));
    assert_eq!((volume.info().older_keys, volume.info().key_id), (0, KeyId(9)));
    check(&volume);
    volume.close().expect("closed");
    drop(volume);
    check(&provider.open(store).expect("opens"));
}

#[test]
fn a_rotation_tells_how_far_it_is_and_stops_when_it_is_told_to() {
    let (provider, store) = made();
    *lock(&provider.key_id) = 9;
    let volume = provider.open(store).expect("opens");
    let mut steps = Vec::new();
    let stopped = volume.rotate(&mut |done, all| {
        steps.push((done, all));
        false
    });
    assert!(!stopped.expect("no error"), "it was told to stop");
    assert!(
        volume
            .rotate(&mut |done, all| {
                steps.push((done, all));
                true
            })
            .expect("rotated")
    );
    // Each block, then each leaf of the map; only the end is all of it.
    assert!(steps[1..].is_sorted() && steps.iter().any(|(done, _)| (256..260).contains(done)), "{steps:?}");
    let (last, before) = steps.split_last().expect("some");
    assert!(*last == (260, 260) && before.iter().all(|(done, all)| *done < 260 && *all == 260), "{steps:?}");
    assert_eq!(volume.info().older_keys, 0);
    check(&volume);
}

#[test]
fn a_rotation_keeps_what_snapshots_need() {
    let (provider, store) = made();
    let before = wrapped(&store.bytes());
    *lock(&provider.key_id) = 9;
    let volume = provider.open(store.clone()).expect("opens");
    let snapshot = volume.take_snapshot("old").expect("taken");
    assert!(volume.rotate(&mut |_, _| true).expect("rotated"));
    assert_eq!(volume.info().older_keys, 3);
    volume.delete_snapshot(snapshot, &mut |_, _| {}).expect("deleted");
    assert!(volume.rotate(&mut |_, _| true).expect("rotated"));
    assert_eq!(volume.info().older_keys, 0);
    check(&volume);
    volume.close().expect("closed");
    assert_eq!(holds(&store.bytes(), &before), 0, "no older key is left in any form");
}

/// Where the store has a block: nothing but what a failed read reports says so.
fn place_of(lba: u64, volume: &Volume, provider: &Provider, store: &SimStore) -> usize {
    let good = store.bytes();
    volume.read(lba * 4096, &mut [0; 4096]).expect("read");
    store.set(good.iter().map(|byte| !byte).collect());
    volume.read(lba * 4096, &mut [0; 4096]).expect_err("all of it is something else");
    store.set(good);
    let heard = provider.heard().pop().expect("an event");
    let place = heard.strip_prefix(&format!("integrity Some({lba}) Some(")).and_then(|rest| rest.split(')').next());
    place.and_then(|place| place.parse::<usize>().ok()).expect("a block of the store") * 4096
}

/// Spoils blocks of the store that begin there, or makes them good again.
fn flip(store: &SimStore, places: &[usize]) {
    let mut bytes = store.bytes();
    places.iter().for_each(|at| bytes[*at] ^= 1);
    store.set(bytes);
}

/// Blocks that can't be read keep their keys; their neighbours don't.
#[test]
fn a_rotation_seals_what_lies_around_bad_blocks() {
    let (provider, store) = made();
    *lock(&provider.key_id) = 9;
    let volume = provider.open(store.clone()).expect("opens");
    let bad = [0, 20, 21, BLOCKS - 1];
    let places = bad.map(|lba| place_of(lba, &volume, &provider, &store));
    flip(&store, &places);
    assert!(volume.rotate(&mut |_, _| true).expect("rotated"));
    let heard = provider.heard();
    assert_eq!((volume.info().blocks_written, volume.info().older_keys), (BLOCKS - bad.len() as u64, 3));
    assert_eq!(volume.info().not_renewed, bad.len() as u64);
    assert_eq!(heard.iter().filter(|event| event.starts_with("integrity")).count(), bad.len(), "{heard:?}");
    for lba in bad {
        let found = volume.read(lba * 4096, &mut [0; 4096]);
        assert!(matches!(found, Err(VolumeError::Integrity { lba: of }) if of == lba), "{lba} {found:?}");
    }
    flip(&store, &places);
    check(&volume);
    assert!(volume.rotate(&mut |_, _| true).expect("rotated"));
    assert_eq!((volume.info().blocks_written, volume.info().older_keys), (BLOCKS, 0));
    check(&volume);
}

/// Where the newest version of a page of the map lies.
fn newest_page(store: &SimStore, level: u8, index: u64) -> usize {
    let bytes = store.bytes();
    let pages = bytes.as_chunks::<4096>().0.iter().enumerate();
    let pages = pages.filter(|(_, page)| {
        page[..4] == [1, level, 0, 0] && page[8..16] == index.to_le_bytes() && page[48..64] == [0; 16]
    });
    let newest = pages.max_by_key(|(_, page)| page[16..24].try_into().map(u64::from_le_bytes).expect("eight bytes"));
    newest.expect("there is one").0 * 4096
}

/// What hangs from a damaged page of the map keeps its keys; all else, before it and behind it, is sealed anew.
#[test]
fn a_rotation_passes_over_damaged_pages_of_the_map() {
    // The second leaf, and the root.
    for (level, index, hidden, renewed) in [(0, 1, 72, BLOCKS - 72), (1, 0, 256, 0)] {
        let (provider, store) = made();
        let place = [newest_page(&store, level, index)];
        flip(&store, &place);
        *lock(&provider.key_id) = 9;
        let volume = provider.open(store.clone()).expect("opens");
        for _ in 0..2 {
            assert!(volume.rotate(&mut |_, _| true).expect("rotated"));
            let info = volume.info();
            assert_eq!((info.not_renewed, info.blocks_written, info.older_keys), (hidden, renewed, 3));
        }
        for done in [volume.write(100 * 4096, &[1; 4096]), volume.write_zeroes(72 * 4096, 72 * 4096, true)] {
            assert!(matches!(done, Err(VolumeError::Damaged(_))), "{done:?}");
        }
        if level == 0 {
            for lba in [71, 144] {
                volume.write(lba * 4096, &content(lba)).expect("its neighbours take writes");
            }
        }
        volume.close().expect("closed");
        drop(volume);
        flip(&store, &place);
        let volume = provider.open(store).expect("opens");
        let before = volume.info().blocks_written;
        assert!(volume.rotate(&mut |_, _| true).expect("rotated"));
        let info = volume.info();
        assert_eq!((info.not_renewed, info.blocks_written - before, info.older_keys), (0, hidden.min(BLOCKS), 0));
        check(&volume);
    }
}

#[test]
fn requests_go_on_while_a_rotation_looks_for_the_last_use_of_older_keys() {
    let (provider, store) = made();
    *lock(&provider.key_id) = 9;
    let volume = provider.open(store).expect("opens");
    let mut looked = 0;
    let ended = volume.rotate(&mut |done, _| {
        if done >= 256 {
            volume.write(0, &content(0)).expect("written");
            volume.flush().expect("flushed");
            looked += 1;
        }
        looked < 2
    });
    assert!(!ended.expect("no error") && looked == 2, "it is told to stop in the midst of its search");
    assert_eq!(volume.info().older_keys, 3);
    assert!(volume.rotate(&mut |_, _| true).expect("rotated"));
    assert_eq!(volume.info().older_keys, 0);
    check(&volume);
}

/// What was looked at already may be what it was again.
#[test]
fn a_rotation_keeps_what_a_revert_during_its_search_needs() {
    let (provider, store) = made();
    *lock(&provider.key_id) = 9;
    let volume = provider.open(store.clone()).expect("opens");
    let places = [place_of(0, &volume, &provider, &store)];
    flip(&store, &places);
    let (mut looked, mut snapshot) = (0, 0);
    let rotated = volume.rotate(&mut |done, _| {
        looked += u32::from(done >= 256);
        match (done >= 256, looked) {
            (true, 1) => {
                snapshot = volume.take_snapshot("with a bad block").expect("taken");
                volume.write(0, &[5; 4096]).expect("written");
            }
            (true, 2) => {
                volume.revert(snapshot).expect("reverted");
                volume.delete_snapshot(snapshot, &mut |_, _| {}).expect("deleted");
            }
            _ => {}
        }
        true
    });
    assert!(rotated.expect("no error") && looked > 2);
    flip(&store, &places);
    assert_eq!(volume.info().older_keys, 3);
    check(&volume);
}
