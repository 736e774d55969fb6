//! Volumes that grow while they are used, and that shrink.

use crate::common::{MIB, Provider, Random, SimStore, check_good, filled, lock};
use fealty_blockcrypt::{FileStore, OpenOptions, Store, VolumeError};
use policy::AnchorMode;

#[test]
fn a_volume_grows_while_it_is_used() {
    let provider = Provider::new(AnchorMode::Flush);
    let file = tempfile::NamedTempFile::new().expect("a file");
    let store = || FileStore::exclusive(file.reopen().expect("opens")).expect("a store");
    let volume = provider.create(store(), MIB + 512).expect("a volume");
    volume.write(MIB, &[1; 512]).expect("written");
    let sizes = [MIB + 1024, 2 * MIB, 300 * MIB, 40 << 30];
    for (i, size) in sizes.into_iter().enumerate() {
        assert!(matches!(volume.write(size - 512, &[1; 512]), Err(VolumeError::Request { .. })));
        volume.grow(size).expect("grown");
        assert_eq!((volume.size(), volume.info().size), (size, size));
        let mut found = [9; 4096];
        volume.read(size - 512, &mut found[..512]).expect("read");
        assert!(found[..512] == [0; 512], "what is new is zero");
        volume.write(size - 512, &[2 + i as u8; 512]).expect("written");
        volume.flush().expect("flushed");
    }
    assert!(matches!(volume.grow(MIB), Err(VolumeError::Size { .. })));
    assert!(matches!(volume.grow((40 << 30) + 1), Err(VolumeError::Size { .. })));
    volume.grow(40 << 30).expect("nothing to do");
    volume.close().expect("closed");
    drop(volume);
    let volume = provider.open(store()).expect("opens");
    for (at, value) in sizes.into_iter().zip(2..).chain([(MIB + 512, 1)]) {
        let mut found = [9; 512];
        volume.read(at - 512, &mut found).expect("read");
        assert!(found == [value; 512], "{at}");
    }
    let snapshot = volume.take_snapshot("large").expect("taken");
    volume.grow(41 << 30).expect("grown");
    volume.revert(snapshot).expect("reverted");
    assert_eq!(volume.size(), 41 << 30);
    check_good(&volume);
}

#[test]
fn a_volume_shrinks_where_nothing_is_lost_or_that_is_allowed() {
    let (provider, store) = (Provider::new(AnchorMode::Flush), SimStore::new());
    let size = 8 * MIB + 512;
    let mut volume = filled(&provider, &store, size);
    let heard = &mut |_: u64, _: u64| panic!("nothing is to be freed");
    for wrong in [0, 511, size + 512] {
        assert!(matches!(volume.shrink(wrong, true, heard), Err(VolumeError::Size { .. })), "{wrong}");
    }
    volume.shrink(size, false, heard).expect("nothing to do");
    // One sector of a block that goes; some of one that stays; blocks whose data is all zero, but there.
    for (end, bytes) in [(8 * MIB, 4096), (MIB + 512, 3584 + 7 * MIB), (5 * MIB, 3 * MIB + 4096)] {
        let refused = volume.shrink(end, false, heard).expect_err("data lies there");
        assert!(matches!(refused, VolumeError::DataBeyond { bytes: found, .. } if found == bytes), "{refused}");
    }
    assert_eq!(volume.size(), size);
    volume.discard(8 * MIB, 512).expect("discarded");
    volume.shrink(8 * MIB, false, heard).expect("nothing lies there");
    let (held, file) = (store.blocks_held(), store.len().expect("a length"));
    let mut steps = Vec::new();
    volume.shrink(MIB + 512, true, &mut |done, all| steps.push((done, all))).expect("shrunk");
    assert!(steps.is_sorted() && steps.last().is_some_and(|(done, all)| done == all), "{steps:?}");
    assert!(store.blocks_held() + 6 * 256 < held, "the room of the rest was given back");
    assert_eq!((volume.size(), volume.info().mapped), (MIB + 512, MIB + 4096));
    assert_eq!(store.len().expect("a length"), file);
    assert!(matches!(volume.write(MIB + 512, &[1; 512]), Err(VolumeError::Request { .. })));
    check_good(&volume);
    // What comes back is zero, also in the block that the end cut.
    volume.grow(2 * MIB).expect("grown");
    let mut found = vec![9; 2 * MIB as usize];
    volume.read(0, &mut found).expect("read");
    let (kept, new) = found.split_at(MIB as usize + 512);
    assert!(kept.iter().all(|b| *b == 7) && new.iter().all(|b| *b == 0));
    volume.write(MIB + 4096, &[8; 4096]).expect("written");
    volume.close().expect("closed");
    drop(volume);
    let volume = provider.open(store).expect("opens");
    assert_eq!(volume.size(), 2 * MIB);
    volume.read(0, &mut found[..8192 + MIB as usize]).expect("read");
    assert!(found[MIB as usize + 4096..][..4096] == [8; 4096]);
    check_good(&volume);
}

#[test]
fn snapshots_keep_what_a_smaller_volume_does_not() {
    let (provider, store) = (Provider::new(AnchorMode::Close), SimStore::new());
    let size = 40 * MIB;
    let mut volume = filled(&provider, &store, size);
    let large = volume.take_snapshot("large").expect("taken");
    let held = store.blocks_held();
    volume.shrink(4096, true, &mut |_, _| {}).expect("shrunk");
    assert!(store.blocks_held() + 100 > held, "the snapshot has it");
    let small = volume.take_snapshot("small").expect("taken");
    assert!(matches!(volume.revert(large), Err(VolumeError::NewerSnapshot(_))));
    volume.grow(20 * MIB).expect("grown");
    volume.write(8 * MIB, &[5; 4096]).expect("written");
    check_good(&volume);
    volume.delete_snapshot(small, &mut |_, _| {}).expect("deleted");
    let refused = volume.revert(large).expect_err("it is larger");
    assert!(matches!(refused, VolumeError::LargerSnapshot { size: found, .. } if found == size), "{refused}");
    volume.close().expect("closed");
    drop(volume);

    let options = OpenOptions { snapshot: Some(large), ..OpenOptions::default() };
    let seen = provider.open_with(store.clone(), &provider.grant(), options).expect("opens");
    assert_eq!(seen.size(), size);
    check_good(&seen);
    drop(seen);

    let volume = provider.open(store.clone()).expect("opens");
    volume.grow(size).expect("grown");
    volume.revert(large).expect("reverted");
    let mut found = vec![0; size as usize];
    volume.read(0, &mut found).expect("read");
    assert!(found.iter().all(|b| *b == 7));
    check_good(&volume);
    volume.delete_snapshot(large, &mut |_, _| {}).expect("deleted");
    check_good(&volume);
    volume.close().expect("closed");
}

/// Whatever operation the power fails at, the volume is as large as before, with all that it held, or as small as it was to be; and
/// what is not needed any more is room again in the end.
#[test]
fn a_volume_that_shrinks_when_the_power_fails_has_one_of_both_sizes() {
    let (provider, store) = (Provider::new(AnchorMode::Close), SimStore::new());
    let (size, end) = (6 * MIB, 2 * MIB + 512);
    filled(&provider, &store, size).close().expect("closed");
    let (before, anchor) = (store.bytes(), provider.anchor());
    let (mut random, mut sizes) = (Random(1), [0, 0]);
    for at in 1.. {
        store.set(before.clone());
        *lock(&provider.anchor) = anchor.clone();
        let mut volume = provider.open(store.clone()).expect("opens");
        store.burn(at);
        let done = volume.shrink(end, true, &mut |_, _| {});
        let unharmed = done.is_ok() && volume.close().is_ok();
        drop(volume);
        store.repair();
        store.crash(&mut random);
        let volume = provider.open(store.clone()).unwrap_or_else(|e| panic!("operation {at}: {e}"));
        assert!(volume.size() == end || (volume.size() == size && done.is_err()), "operation {at}");
        sizes[usize::from(volume.size() == end)] += 1;
        let mut found = vec![0; volume.size() as usize];
        volume.read(0, &mut found).expect("read");
        let zero = found.iter().position(|b| *b != 7).unwrap_or(found.len());
        // The rest of the block that the end cuts may be zero.
        let cut = zero == end as usize && found[zero..].iter().take_while(|b| **b == 0).count() == 3584;
        assert!(zero == found.len() || (cut && found[zero + 3584..].iter().all(|b| *b == 7)), "operation {at}");
        let begun = std::time::Instant::now();
        while !volume.snapshots().expect("a list").is_empty() {
            assert!(begun.elapsed().as_secs() < 60, "not freed within 60 s");
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
        check_good(&volume);
        if unharmed {
            break;
        }
    }
    assert!(sizes[0] > 3 && sizes[1] > 3, "{sizes:?}");
}
