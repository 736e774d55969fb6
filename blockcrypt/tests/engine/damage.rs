//! What goes on beside damage, and what the audit log hears of it.

use crate::common::{MIB, Provider, SimStore, check_good, lock};
use crate::scene::{BLOCK, SIZE, fill, scene};
use fealty_blockcrypt::{Volume, VolumeError, inspect};
use policy::AnchorMode;

#[test]
fn a_block_that_fails_can_be_written_anew_and_the_rest_goes_on() {
    let scene = scene(AnchorMode::Flush);
    let shown = inspect(&*scene.store).expect("readable");
    // Every block of the pool that is not metadata of this superblock: find one of data by trying.
    let pool = 66..(shown.store_size as usize / BLOCK) - 2;
    let mut tried = 0;
    for block in pool {
        let mut bytes = scene.bytes.clone();
        bytes[block * BLOCK + 100] ^= 1;
        scene.store.set(bytes);
        let anchor = scene.provider.anchor();
        let opened = scene.provider.open(scene.store.clone());
        if let Ok(volume) = &opened {
            let bad = (0..SIZE / BLOCK as u64).find(|lba| {
                let mut found = vec![0; BLOCK];
                matches!(volume.read(lba * BLOCK as u64, &mut found), Err(VolumeError::Integrity { .. }))
            });
            if let Some(lba) = bad {
                let mut found = vec![0; BLOCK];
                let partly = volume.write(lba * BLOCK as u64 + 512, &[1; 512]);
                assert!(matches!(partly, Err(VolumeError::Integrity { .. })), "the rest of the block is unknown");
                volume.write(lba * BLOCK as u64, &fill(lba, 77)).expect("written anew");
                volume.read(lba * BLOCK as u64, &mut found).expect("read");
                assert!(found == fill(lba, 77));
                assert!(scene.provider.heard().iter().any(|e| e.starts_with(&format!("integrity Some({lba})"))));
                volume.close().expect("closed");
                tried += 1;
            }
        }
        drop(opened);
        *lock(&scene.provider.anchor) = anchor;
        if tried == 3 {
            return;
        }
    }
    panic!("no block of data was found");
}

/// The block of the store that changed between two looks at it; the log apart.
fn changed(before: &[u8], after: &[u8]) -> usize {
    let differs = |b: &usize| before[b * BLOCK..][..BLOCK] != after[b * BLOCK..][..BLOCK];
    let log_end = 2 + (8 * MIB as usize / BLOCK) / 64;
    let all: Vec<usize> = (log_end..before.len() / BLOCK).filter(differs).collect();
    assert_eq!(all.len(), 1, "{all:?}");
    all[0]
}

/// A store that drops a block which the process had seen durable, and whose predecessor was overwritten since: gone is gone.
#[test]
fn a_block_whose_every_version_is_gone_is_an_error_and_takes_no_other_with_it() {
    let (provider, store) = (Provider::new(AnchorMode::Close), SimStore::new());
    let at = |lba: u64| lba * BLOCK as u64;
    let volume = provider.create(store.clone(), 8 * MIB).expect("a volume");
    // Several times, so that it lies where another block will go by itself.
    for _ in 0..5 {
        volume.write(at(5), &fill(5, 0)).expect("written");
    }
    let before = store.bytes();
    volume.write(at(5), &fill(5, 1)).expect("written");
    let old_place = changed(&before, &store.bytes());
    volume.close().expect("closed");
    drop(volume);

    let volume = provider.open(store.clone()).expect("opens");
    let before = store.bytes();
    volume.write(at(5), &fill(5, 2)).expect("written");
    let new_place = changed(&before, &store.bytes());
    volume.flush().expect("flushed: the old place is free now");
    // Other blocks follow until one takes the old place, and then until the log is written, without a FLUSH.
    let mut thief = None;
    for lba in (8..1600).step_by(2) {
        let before = store.bytes();
        volume.write(at(lba), &fill(lba, 3)).expect("written");
        if thief.is_none() && before[old_place * BLOCK..][..BLOCK] != store.bytes()[old_place * BLOCK..][..BLOCK] {
            thief = Some(lba);
        }
        if thief.is_some() {
            break;
        }
    }
    let thief = thief.expect("one took the old place");
    for i in 0..1100 {
        let lba = 1700 + i % 300;
        volume.write(at(lba), &fill(lba, 4)).expect("written");
    }
    drop(volume);
    let mut bytes = store.bytes();
    bytes[new_place * BLOCK..][..BLOCK].fill(0);
    store.set(bytes);

    let is_gone = |volume: &Volume| {
        let mut found = vec![0; BLOCK];
        matches!(volume.read(at(5), &mut found), Err(VolumeError::Integrity { lba: 5 }))
    };
    let volume = provider.open(store.clone()).expect("opens");
    assert!(is_gone(&volume));
    assert!(provider.heard().iter().any(|e| e.starts_with("integrity Some(5)")));
    volume.close().expect("closed");
    drop(volume);
    let volume = provider.open(store.clone()).expect("opens");
    assert!(is_gone(&volume), "also in the next life");
    let report = volume.check(&mut |_| {}).expect("checked");
    assert_eq!((report.bad_blocks, report.problems, report.leaked_blocks), (1, 0, 0));
    volume.write(at(5), &fill(5, 6)).expect("written anew");
    for lba in 500..700 {
        volume.write(at(lba), &fill(lba, 7)).expect("written");
        volume.flush().expect("flushed");
    }
    let mut found = vec![0; BLOCK];
    volume.read(at(5), &mut found).expect("read");
    assert!(found == fill(5, 6));
    volume.read(at(thief), &mut found).expect("read");
    assert!(found == fill(thief, if (500..700).contains(&thief) { 7 } else { 3 }));
    check_good(&volume);
}

/// The store's blocks that look like the map's first leaf.
fn first_leaves(bytes: &[u8]) -> Vec<usize> {
    let is_leaf =
        |block: &[u8; BLOCK]| block[..4] == [1, 0, 0, 0] && block[8..16] == [0; 8] && block[48..64] == [0; 16];
    bytes.as_chunks().0.iter().enumerate().filter(|(_, block)| is_leaf(block)).map(|(at, _)| at).collect()
}

/// A page of a snapshot's map is gone, the one that goes or the newer one: what hangs from it stays in use, and nothing else suffers.
#[test]
fn a_snapshot_whose_map_is_damaged_is_deleted_all_the_same() {
    const BLOCKS: u64 = 300;
    for damaged in [1, 2] {
        let (provider, store) = (Provider::new(AnchorMode::Interval), SimStore::new());
        let volume = provider.create(store.clone(), 8 * MIB).expect("a volume");
        let mut leaves = Vec::new();
        for round in 1..4 {
            for lba in 0..BLOCKS {
                volume.write(lba * BLOCK as u64, &fill(lba, round)).expect("written");
            }
            let before = store.bytes();
            assert_eq!(volume.take_snapshot("one of three").expect("taken"), u64::from(round));
            let after = store.bytes();
            let new = |at: &usize| before[at * BLOCK..][..BLOCK] != after[at * BLOCK..][..BLOCK];
            leaves.push(first_leaves(&after).into_iter().find(new).expect("a leaf"));
        }
        volume.close().expect("closed");
        drop(volume);
        let mut bytes = store.bytes();
        bytes[leaves[damaged - 1] * BLOCK + 1000] ^= 1;
        store.set(bytes);

        let volume = provider.open(store.clone()).expect("opens");
        provider.heard();
        volume.delete_snapshot(1, &mut |_, _| {}).expect("deleted");
        let heard = provider.heard();
        let told = |what: &str| heard.iter().filter(|event| event.contains(what)).count();
        assert_eq!(
            (
                told("map page of blocks 0 to 71 does not verify"),
                told("1 damaged pages"),
                told("snapshot 1 is deleted")
            ),
            (1, 1, 1),
            "{heard:?}"
        );
        volume.delete_snapshot(2, &mut |_, _| {}).expect("deleted");
        volume.write(0, &fill(0, 9)).expect("written");
        volume.revert(3).expect("reverted");
        volume.delete_snapshot(3, &mut |_, _| {}).expect("deleted");
        let mut found = vec![0; BLOCK];
        for lba in 0..BLOCKS {
            volume.read(lba * BLOCK as u64, &mut found).expect("read");
            assert!(found == fill(lba, 3), "{lba}");
        }
        let mut said = Vec::new();
        let report = volume.check(&mut |step| said.push(format!("{step:?}"))).expect("checked");
        // A leaf and what it names, of each snapshot that had it or was compared with it.
        assert!(report.good(), "{report:?} {said:?}");
        assert_eq!(report.leaked_blocks, 73 * damaged as u64);
    }
}

/// Whatever the store changed of what the volume begins with, the audit log hears of it.
#[test]
fn damage_to_superblocks_is_told_of() {
    let scene = scene(AnchorMode::Flush);
    let end = scene.bytes.len();
    let copies = [0, BLOCK, end - 2 * BLOCK, end - BLOCK];
    let open = |changes: &[usize], at: usize| {
        let mut bytes = scene.bytes.clone();
        changes.iter().for_each(|copy| bytes[copy + at] ^= 8);
        scene.store.set(bytes);
        scene.provider.heard();
        let opened = scene.provider.open_read_only(scene.store.clone());
        let heard = scene.provider.heard();
        let told = heard.iter().filter(|event| event.starts_with("integrity")).count();
        (opened.err(), told)
    };
    assert!(matches!(open(&[], 0), (None, 0)));
    // A key slot in the superblock: key-encryption key, nonce, wrapped master, tag.
    for at in [8, 32, 44 + 5, 76] {
        let (error, told) = open(&copies, 384 + at);
        assert!(matches!(error, Some(VolumeError::Damaged(_))) && told == 1, "{at}: {error:?} {told}");
    }
    let (error, told) = open(&copies, 16);
    assert!(matches!(error, Some(VolumeError::Unsupported(_))) && told == 1, "{error:?} {told}");
    // Of each slot one copy: the one that counts is among them.
    for damaged in [[copies[0], copies[1]], [copies[2], copies[3]]] {
        for at in [0, 100, 384 + 50] {
            let (error, told) = open(&damaged, at);
            assert!(error.is_none() && told == 1, "{at}: {error:?} {told}");
        }
    }
}

/// What a check finds the audit log hears of, once.
#[test]
fn problems_that_a_check_finds_are_told_of() {
    let (provider, store) = (Provider::new(AnchorMode::Close), SimStore::new());
    let volume = provider.create(store.clone(), SIZE).expect("a volume");
    volume.write(0, &fill(0, 1)).expect("written");
    volume.close().expect("closed");
    drop(volume);
    let volume = provider.open_read_only(store.clone()).expect("opens");
    let good = store.bytes();
    let mut told = Vec::new();
    for at in [0, BLOCK] {
        let mut bytes = good.clone();
        bytes[at + 1000] ^= 1;
        store.set(bytes);
        provider.noticed();
        let report = volume.check(&mut |_| {}).expect("checked");
        let noticed = provider.noticed();
        assert_eq!(report.problems, noticed.len() as u64, "{noticed:?}");
        assert!(noticed.iter().all(|n| n.physical == Some((at / BLOCK) as u64)), "{noticed:?}");
        told.push(report.problems);
    }
    told.sort_unstable();
    assert_eq!(told, [0, 1], "one of the two slots counts");
}
