//! Room beyond a volume's size: what snapshots use up, what is to be done then, and that nothing is lost meanwhile.

use crate::common::{MIB, Provider, Random, SimStore, check_good, filled};
use fealty_blockcrypt::{MemoryStore, OpenOptions, Store, Volume, VolumeError, store_size};
use policy::AnchorMode;
use std::sync::Arc;

const SIZE: u64 = 8 * MIB;
const PIECE: usize = 64 << 10;
const PIECES: u64 = SIZE / PIECE as u64;

/// Writes `value` everywhere, durably, piece by piece; how many found room.
fn write_over(volume: &Volume, value: u8) -> u64 {
    for i in 0..PIECES {
        match volume.write(i * PIECE as u64, &[value; PIECE]).and_then(|()| volume.flush()) {
            Ok(()) => {}
            Err(error) => {
                assert!(matches!(error, VolumeError::Full(None)), "{error}");
                let says = error.to_string();
                assert!(
                    says.contains("snapshots") && says.contains("resize --room") && says.contains("nothing"),
                    "{says}"
                );
                return i;
            }
        }
    }
    PIECES
}

/// The first `new` pieces hold `value`, and those behind the one that found no room another.
#[track_caller]
fn holds(volume: &Volume, new: u64, value: u8, old: u8) {
    let mut found = vec![0; PIECE];
    for i in (0..PIECES).filter(|i| *i != new) {
        volume.read(i * PIECE as u64, &mut found).expect("read");
        let expected = if i < new { value } else { old };
        assert!(found.iter().all(|b| *b == expected), "piece {i} of {new}");
    }
    if new < PIECES {
        // Each block of the one that failed holds the old or the new.
        volume.read(new * PIECE as u64, &mut found).expect("read");
        assert!(found.chunks(4096).all(|b| b == [value; 4096] || b == [old; 4096]));
    }
}

/// A volume that is full, and written over beside a snapshot until that has used up the room.
fn used_up(provider: &Arc<Provider>, store: &Arc<SimStore>) -> (Volume, u64, u64) {
    provider.create(store.clone(), SIZE).expect("a volume").close().expect("closed");
    let volume = provider.open(store.clone()).expect("opens");
    assert_eq!(write_over(&volume, 1), PIECES);
    let snapshot = volume.take_snapshot("before").expect("taken");
    let before = volume.info();
    assert!(
        before.room == 0 && (MIB / 2..2 * MIB).contains(&before.free),
        "what is written anew needs some: {before:?}"
    );
    let written = write_over(&volume, 2);
    assert!((1..PIECES / 2).contains(&written), "a snapshot has little room: {written}");
    let info = volume.info();
    assert!(info.free < PIECE as u64 && info.room == before.room, "{info:?}");
    (volume, snapshot, written)
}

#[test]
fn a_snapshot_that_used_up_the_room_can_be_deleted() {
    let (provider, store) = (Provider::new(AnchorMode::Close), SimStore::new());
    let (volume, snapshot, written) = used_up(&provider, &store);
    holds(&volume, written, 2, 1);
    drop(volume);
    store.crash(&mut Random(7));
    let volume = provider.open(store.clone()).expect("opens");
    holds(&volume, written, 2, 1);
    volume.delete_snapshot(snapshot, &mut |_, _| {}).expect("deleted");
    assert_eq!(write_over(&volume, 3), PIECES);
    holds(&volume, PIECES, 3, 3);
    check_good(&volume);
    volume.close().expect("closed");
}

#[test]
fn more_room_lets_it_go_on_beside_its_snapshot() {
    let (provider, store) = (Provider::new(AnchorMode::Close), SimStore::new());
    let (volume, snapshot, written) = used_up(&provider, &store);
    let length = store.len().expect("known");
    volume.widen(volume.info().room).expect("nothing to do");
    assert_eq!(store.len().expect("known"), length);
    volume.widen(SIZE).expect("has room");
    let info = volume.info();
    assert!(info.size == SIZE && info.room >= SIZE && info.store_size == store.len().expect("known"), "{info:?}");
    holds(&volume, written, 2, 1);
    assert_eq!(write_over(&volume, 2), PIECES);
    check_good(&volume);
    volume.widen(MIB).expect("it does not become less");
    assert_eq!(volume.info().room, info.room);
    assert!(matches!(volume.widen(u64::MAX), Err(VolumeError::Room { .. })));
    volume.close().expect("closed");
    drop(volume);
    let options = OpenOptions { snapshot: Some(snapshot), ..Default::default() };
    let before = provider.open_with(store.clone(), &provider.grant(), options).expect("opens");
    holds(&before, PIECES, 1, 1);
    drop(before);
    let volume = provider.open(store).expect("opens");
    assert_eq!((volume.info().room, volume.info().store_size), (info.room, info.store_size));
    volume.delete_snapshot(snapshot, &mut |_, _| {}).expect("deleted");
    holds(&volume, PIECES, 2, 2);
    check_good(&volume);
}

#[test]
fn a_volume_can_have_room_from_its_beginning() {
    let (provider, store) = (Provider::new(AnchorMode::Close), Arc::new(MemoryStore::default()));
    store.set_len(store_size(SIZE, SIZE).expect("a size")).expect("longer");
    let volume = provider.create(store.clone(), SIZE).expect("a volume");
    assert!(volume.info().room >= SIZE && volume.info().store_size == store.len().expect("known"));
    assert_eq!(write_over(&volume, 1), PIECES);
    let snapshot = volume.take_snapshot("before").expect("taken");
    assert_eq!(write_over(&volume, 2), PIECES);
    assert!(write_over(&volume, 3) == PIECES, "what the snapshot does not hold moves round in what is left");
    volume.delete_snapshot(snapshot, &mut |_, _| {}).expect("deleted");
    holds(&volume, PIECES, 3, 3);
    check_good(&volume);
}

/// It is the store that is full, not the room that the volume has in it: more of that would not help.
#[test]
fn a_store_that_has_no_room_for_pages_is_called_full() {
    let (provider, store) = (Provider::new(AnchorMode::Close), SimStore::new());
    // Each of these writes changes a page of the map.
    let (leaves, stride) = (3000, 72 * 4096);
    provider.create(store.clone(), leaves * stride).expect("a volume").close().expect("closed");
    let volume = provider.open(store.clone()).expect("opens");
    let write_over = || (0..leaves).try_for_each(|leaf| volume.write(leaf * stride, &[1; 4096]));
    for _ in 0..2 {
        write_over().and_then(|()| volume.checkpoint()).expect("there is room");
    }
    store.limit(Some(0));
    let full = (0..20).find_map(|_| write_over().err()).expect("pages find no room");
    assert!(matches!(full, VolumeError::Full(Some(_))) && full.to_string().contains("store is full"), "{full:?}");
    store.limit(None);
    write_over().and_then(|()| volume.flush()).expect("goes on");
    check_good(&volume);
}

/// Wherever the power fails, it has the room that it had or the new one, and all that was acknowledged.
#[test]
fn a_crash_halves_no_room() {
    let mut widened = 0;
    for fuse in 1..200 {
        let (provider, store) = (Provider::new(AnchorMode::Close), SimStore::new());
        provider.create(store.clone(), SIZE).expect("a volume").close().expect("closed");
        let volume = provider.open(store.clone()).expect("opens");
        for i in 0..4 {
            volume.write(i * PIECE as u64, &[1; PIECE]).expect("written");
        }
        volume.flush().expect("flushed");
        let room = volume.info().room;
        store.burn(fuse);
        let done = volume.widen(SIZE).is_ok();
        drop(volume);
        store.crash(&mut Random(fuse));
        let volume = provider.open(store.clone()).expect("opens");
        let found = volume.info().room;
        assert!(found >= SIZE || (!done && found == room), "fuse {fuse}: {found}, done: {done}");
        let mut held = vec![0; 4 * PIECE];
        volume.read(0, &mut held).expect("read");
        assert!(held.iter().all(|b| *b == 1), "fuse {fuse}");
        check_good(&volume);
        volume.close().expect("closed");
        widened += u32::from(done);
        if widened > 2 {
            assert!(fuse > 5, "the power never failed on the way");
            return;
        }
    }
    panic!("it takes more writes than that?");
}

/// What one history changes beside its snapshots: block `round` of each leaf of the map.
fn change_each_leaf(volume: &Volume, round: u64, zeroes: bool, gone: &mut [bool]) -> Result<(), VolumeError> {
    for block in (round..gone.len() as u64).step_by(72) {
        match zeroes {
            true => volume.write_zeroes(block * 4096, 4096, round.is_multiple_of(2))?,
            false => volume.discard(block * 4096, 4096)?,
        }
        gone[block as usize] = true;
    }
    Ok(())
}

#[track_caller]
fn holds_all_but(volume: &Volume, gone: &[bool]) {
    let mut found = [0; 4096];
    for (i, gone) in gone.iter().enumerate() {
        volume.read(i as u64 * 4096, &mut found).expect("read");
        assert!(found == [if *gone { 0 } else { 7 }; 4096], "block {i}");
    }
}

/// Snapshots hold the map's old pages: each discard beside one takes room, and frees none.
fn discards_beside_snapshots(room: u64, zeroes: bool) {
    let (provider, store) = (Provider::new(AnchorMode::Close), SimStore::new());
    store.set_len(store_size(SIZE, room).expect("a size")).expect("longer");
    filled(&provider, &store, SIZE).close().expect("closed");
    let mut volume = provider.open(store.clone()).expect("opens");
    let mut gone = vec![false; (SIZE / 4096) as usize];
    let mut held = std::collections::BTreeMap::new();
    let mut refused = 0;
    for round in 0..72 {
        match volume.take_snapshot("one") {
            Ok(id) => drop(held.insert(id, gone.clone())),
            Err(error) => assert!(matches!(error, VolumeError::Full(None)), "{error}"),
        }
        if let Err(error) = change_each_leaf(&volume, round, zeroes, &mut gone) {
            assert!(matches!(error, VolumeError::Full(None)) && error.to_string().contains("delete one"), "{error}");
            refused += 1;
        }
        volume.flush().expect("flushed");
        match round % 7 {
            2 => volume.checkpoint().expect("nothing acknowledged is lost"),
            4 => {
                drop(volume);
                store.crash(&mut Random(round));
                volume = provider.open(store.clone()).expect("opens");
            }
            6 => {
                volume.close().expect("closed");
                volume = provider.open(store.clone()).expect("opens");
            }
            _ => {}
        }
        if refused == 12 {
            break;
        }
    }
    assert!(refused == 12 && held.len() > 3, "refused {refused}, beside {} snapshots", held.len());
    holds_all_but(&volume, &gone);
    drop(volume);
    store.crash(&mut Random(1));
    let oldest = *held.keys().next().expect("some");
    for id in [oldest, oldest + 2] {
        let options = OpenOptions { snapshot: Some(id), ..Default::default() };
        holds_all_but(&provider.open_with(store.clone(), &provider.grant(), options).expect("opens"), &held[&id]);
    }
    let volume = provider.open(store.clone()).expect("opens");
    check_good(&volume);
    let newest = *held.keys().last().expect("some");
    for id in [newest].into_iter().chain(held.into_keys().filter(|id| *id != newest)) {
        volume.delete_snapshot(id, &mut |_, _| {}).expect("deleted");
    }
    volume.close().expect("closed");
    drop(volume);
    let volume = provider.open(store).expect("opens");
    holds_all_but(&volume, &gone);
    check_good(&volume);
    change_each_leaf(&volume, 71, zeroes, &mut gone).expect("room again");
    assert_eq!(write_over(&volume, 3), PIECES);
}

#[test]
fn discards_beside_snapshots_leave_the_room_to_delete_these() {
    discards_beside_snapshots(0, false);
}

#[test]
fn zeroes_beside_snapshots_leave_the_room_to_delete_these() {
    discards_beside_snapshots(0, true);
}

#[test]
fn discards_beside_snapshots_leave_room_where_there_is_more() {
    discards_beside_snapshots(MIB, false);
}
