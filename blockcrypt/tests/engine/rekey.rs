//! Other keys for the same data, and none.

use crate::common::{MIB, Provider, Random, SimStore, check_good, lock};
use fealty_blockcrypt::{AnchorRefused, Kek, OpenOptions, Store, Volume, VolumeError, erase, inspect};
use policy::{AnchorMode, KeyId};
use secretmem::Secret;
use std::collections::HashSet;
use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex, mpsc};

pub(crate) const BLOCKS: u64 = 200;

pub(crate) fn content(lba: u64) -> Vec<u8> {
    let mut block = vec![0; 4096];
    Random(lba).fill(&mut block);
    block
}

/// A volume with data under three keys.
pub(crate) fn made() -> (Arc<Provider>, Arc<SimStore>) {
    made_with(AnchorMode::Close)
}

pub(crate) fn made_with(mode: AnchorMode) -> (Arc<Provider>, Arc<SimStore>) {
    let (provider, store) = (Provider::new(mode), SimStore::new());
    provider.create(store.clone(), MIB).expect("a volume").close().expect("closed");
    for key in 1..4 {
        *lock(&provider.key_id) = key;
        let volume = provider.open(store.clone()).expect("opens");
        for lba in (0..BLOCKS).filter(|lba| lba % 3 == key - 1) {
            volume.write(lba * 4096, &content(lba)).expect("written");
        }
        volume.close().expect("closed");
    }
    (provider, store)
}

#[track_caller]
pub(crate) fn check(volume: &Volume) {
    for lba in 0..BLOCKS {
        let mut found = vec![0; 4096];
        volume.read(lba * 4096, &mut found).expect("read");
        assert!(found == content(lba), "{lba}");
    }
    check_good(volume);
}

/// The wrapped masters that the superblocks and slot pages of a store hold.
pub(crate) fn wrapped(bytes: &[u8]) -> Vec<Vec<u8>> {
    let mut all = Vec::new();
    for block in bytes.as_chunks::<4096>().0 {
        if block.starts_with(b"fealty volume") {
            all.push(block[384 + 44..][..32].to_vec());
        } else if block[..4] == [3, 0, 0, 0] && block[48..64] == [0; 16] {
            let count = usize::from(block[112]);
            all.extend((0..count).map(|i| block[128 + i * 128 + 44..][..32].to_vec()));
        }
    }
    all
}

pub(crate) fn holds(bytes: &[u8], wrapped: &[Vec<u8>]) -> usize {
    wrapped.iter().filter(|w| bytes.windows(32).any(|b| b == &w[..])).count()
}

#[test]
fn after_a_rewrap_only_the_new_key_opens() {
    let (provider, store) = made();
    let before = wrapped(&store.bytes());
    assert!(before.len() >= 4);
    let volume = provider.open(store.clone()).expect("opens");
    let old = provider.kek();
    provider.set_kek(78, 10);
    volume.rewrap(&old, &provider.kek()).expect("rewrapped");
    check(&volume);
    volume.wipe_keys();
    assert!(volume.put_back_keys(&old).is_err());
    volume.put_back_keys(&provider.kek()).expect("the new key");
    volume.close().expect("closed");
    drop(volume);
    assert_eq!(inspect(&*store).expect("readable").kek_id, KeyId(78));
    assert_eq!(holds(&store.bytes(), &before), 0, "nothing is left that the old key opens");
    check(&provider.open(store.clone()).expect("opens"));
    provider.set_kek(77, 9);
    assert!(matches!(provider.open(store).err(), Some(VolumeError::WrongKey)));
}

#[test]
fn a_rewrap_that_a_crash_interrupts_leaves_a_volume_that_the_anchors_key_opens() {
    let mut news = 0;
    for n in 1..24 {
        let (provider, store) = made();
        let volume = provider.open(store.clone()).expect("opens");
        // Of these only the log knows.
        for lba in 0..BLOCKS {
            volume.write(lba * 4096, &content(lba)).expect("written");
        }
        volume.flush().expect("durable");
        let old = provider.kek();
        provider.set_kek(78, 10);
        let new = provider.kek();
        store.burn(n);
        let done = volume.rewrap(&old, &new);
        drop(volume);
        store.crash(&mut Random(n));
        let id = provider.anchor().expect("an anchor").kek_id().expect("it names a key");
        assert!(done.is_err() || id == KeyId(78));
        if id == KeyId(77) {
            provider.set_kek(77, 9);
        } else {
            news += 1;
        }
        check(&provider.open(store).expect("opens"));
    }
    assert!(news > 0 && news < 23, "{news}");
}

#[test]
fn a_rewrap_whose_anchor_is_refused_changes_nothing_more() {
    let (provider, store) = made();
    let volume = provider.open(store.clone()).expect("opens");
    let old = provider.kek();
    let new = Kek::new(KeyId(78), Secret::copy_of(&[10; 32]).expect("room"));
    *lock(&provider.refuse) = Some(AnchorRefused::Refused("another holder has it".into()));
    assert!(matches!(volume.rewrap(&old, &new), Err(VolumeError::Anchor(_))));
    *lock(&provider.refuse) = None;
    assert!(volume.write(0, &[1; 4096]).is_err() && volume.close().is_err());
    drop(volume);
    // The provider heard of no anchor under the new key: it gives the old one.
    check(&provider.open(store).expect("opens"));
}

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

/// A store that says when it is to give room back, and does so when it is told.
struct SlowPunch {
    store: Arc<SimStore>,
    asked: Mutex<mpsc::Sender<()>>,
    told: Mutex<mpsc::Receiver<()>>,
}

impl Store for SlowPunch {
    fn len(&self) -> io::Result<u64> {
        self.store.len()
    }
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        self.store.read_at(buffer, offset)
    }
    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.store.write_at(bytes, offset)
    }
    fn sync_data(&self) -> io::Result<()> {
        self.store.sync_data()
    }
    fn set_len(&self, bytes: u64) -> io::Result<()> {
        self.store.set_len(bytes)
    }
    fn reserve(&self, offset: u64, bytes: u64) -> io::Result<()> {
        self.store.reserve(offset, bytes)
    }
    fn punch(&self, offset: u64, bytes: u64) -> io::Result<()> {
        let _ = lock(&self.asked).send(());
        let _ = lock(&self.told).recv();
        self.store.punch(offset, bytes)
    }
}

#[test]
fn a_rewrap_leaves_alone_what_is_being_given_back() {
    let (provider, store) = made();
    let ((asked, hear), (tell, told)) = (mpsc::channel(), mpsc::channel());
    let slow = SlowPunch { store, asked: Mutex::new(asked), told: Mutex::new(told) };
    let volume = provider.open(slow).expect("opens");
    volume.discard(0, 100 * 4096).expect("discarded");
    std::thread::scope(|scope| {
        let flush = scope.spawn(|| volume.flush());
        hear.recv().expect("it gives room back");
        let old = provider.kek();
        provider.set_kek(78, 10);
        volume.rewrap(&old, &provider.kek()).expect("rewrapped");
        // This would go where it was before.
        for lba in 0..50 {
            volume.write(lba * 4096, &content(lba)).expect("written");
        }
        volume.checkpoint().expect("durable");
        drop(tell);
        flush.join().expect("joined").expect("flushed");
    });
    for lba in 50..100 {
        volume.write(lba * 4096, &content(lba)).expect("written");
    }
    check(&volume);
}
