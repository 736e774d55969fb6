//! Checkpoints that the volume's own thread makes while requests go on.

use crate::common::{MIB, Provider, Random, SimStore, check_good, lock, options};
use crate::hanging::{Hanging, Hangs, LetThrough};
use crate::hooked::{Call, Hooked};
use fealty_blockcrypt::{OpenOptions, Store, Volume};
use policy::AnchorMode;
use std::collections::HashMap;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// The smallest log there is serves this size: 64 blocks of 62 records. It has a block for each record, so that none waits to be freed.
const SIZE: u64 = 16 * MIB;
const BLOCK: usize = 4096;
const LOG: u64 = 64 * 62;
/// A checkpoint is due before so many writes.
const DUE: u64 = LOG * 3 / 8 + 62;

/// The volume of `provider` in `store`, for writing.
fn open(provider: &Arc<Provider>, store: &Arc<impl Store + 'static>, options: OpenOptions) -> Volume {
    provider.create(store.clone(), SIZE).expect("a volume").close().expect("closed");
    provider.open_with(store.clone(), &provider.grant(), options).expect("opens")
}

/// Writes a block; `number` says where and what.
fn write(volume: &Volume, number: u64) {
    let at = number * 7 % (SIZE / BLOCK as u64);
    volume.write(at * BLOCK as u64, &content(number)).expect("written");
}

fn content(number: u64) -> Vec<u8> {
    number.to_le_bytes().repeat(BLOCK / 8)
}

/// The first `count` of them are there.
fn check(volume: &Volume, count: u64) {
    let blocks = SIZE / BLOCK as u64;
    for number in count.saturating_sub(blocks)..count {
        let mut found = vec![0; BLOCK];
        volume.read(number * 7 % blocks * BLOCK as u64, &mut found).expect("read");
        assert!(found == content(number), "{number}");
    }
    check_good(volume);
}

fn eventually(what: &str, is: impl Fn() -> bool) {
    let begun = Instant::now();
    while !is() {
        assert!(begun.elapsed() < Duration::from_secs(120), "not within 120 s: {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Returns when a number has not changed for a while.
fn settled(number: &AtomicU64) -> u64 {
    let (mut last, mut same) = (number.load(Ordering::Relaxed), 0);
    while same < 200 {
        std::thread::sleep(Duration::from_millis(1));
        let now = number.load(Ordering::Relaxed);
        same = if now == last { same + 1 } else { 0 };
        last = now;
    }
    last
}

#[test]
fn writes_wait_for_no_checkpoint_as_long_as_the_log_lasts() {
    const COUNT: u64 = 3 * LOG;
    for outlive in [false, true] {
        let (provider, sim) = (Provider::new(AnchorMode::Close), SimStore::new());
        let store = Hanging::over(sim.clone());
        let volume = open(&provider, &store, OpenOptions { outlive, ..OpenOptions::default() });
        write(&volume, 0);
        store.hang(Hangs::Syncs);
        (1..DUE).for_each(|number| write(&volume, number));
        // The checkpoint waits for the store.
        store.wait_until_one_hangs();
        let written = AtomicU64::new(DUE);
        std::thread::scope(|scope| {
            let hung = LetThrough(&*store);
            let writer = scope.spawn(|| {
                while written.load(Ordering::Relaxed) < COUNT {
                    write(&volume, written.load(Ordering::Relaxed));
                    written.fetch_add(1, Ordering::Relaxed);
                }
            });
            eventually("writes go on", || written.load(Ordering::Relaxed) >= DUE + 500);
            let most = settled(&written);
            assert!(most < LOG, "{most} writes, and the log has room for {LOG}");
            drop(hung);
            writer.join().expect("no panic");
        });
        volume.flush().expect("flushed");
        check(&volume, COUNT);
        drop(volume);
        sim.crash(&mut Random(1));
        check(&provider.open(sim).expect("opens"), COUNT);
    }
}

/// What histories need that are to do the same again.
#[test]
fn without_it_the_request_that_finds_one_due_makes_it() {
    let provider = Provider::new(AnchorMode::Close);
    let store = Hanging::over(SimStore::new());
    let volume = open(&provider, &store, options());
    write(&volume, 0);
    store.hang(Hangs::Syncs);
    let written = AtomicU64::new(1);
    std::thread::scope(|scope| {
        let writer = scope.spawn(|| {
            (1..DUE).for_each(|number| {
                write(&volume, number);
                written.fetch_add(1, Ordering::Relaxed);
            })
        });
        store.wait_until_one_hangs();
        let then = written.load(Ordering::Relaxed);
        assert_eq!(settled(&written), then);
        store.hang(Hangs::Not);
        writer.join().expect("no panic");
    });
}

/// A volume that is gone does nothing more to its store, and has let go of it.
#[test]
fn a_volume_that_is_dropped_leaves_its_store_at_rest() {
    let (provider, sim) = (Provider::new(AnchorMode::Close), SimStore::new());
    let store = Hanging::over(sim.clone());
    let volume = open(&provider, &store, OpenOptions::default());
    write(&volume, 0);
    store.hang(Hangs::Syncs);
    (1..DUE).for_each(|number| write(&volume, number));
    store.wait_until_one_hangs();
    drop_at_work(volume, &store);
    check_good(&provider.open(sim).expect("opens"));
}

/// Drops a volume whose thread waits for the store, which answers then.
fn drop_at_work<S: Store>(volume: Volume, store: &Arc<Hanging<S>>) {
    let gone = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let _hung = LetThrough(&**store);
        scope.spawn(|| {
            drop(volume);
            gone.store(true, Ordering::Release);
        });
        std::thread::sleep(Duration::from_millis(50));
        assert!(!gone.load(Ordering::Acquire), "its thread is at the store");
    });
    assert_eq!(Arc::strong_count(store), 1);
}

#[test]
fn one_whose_thread_is_at_a_deletion_too() {
    let provider = Provider::new(AnchorMode::Close);
    let store = Hanging::over(Arc::new(Thin::default()));
    let size = 256 * MIB;
    provider.create(store.clone(), size).expect("a volume").close().expect("closed");
    let volume = provider.open(store.clone()).expect("opens");
    let write = |number| volume.write(number * LEAF * BLOCK as u64, &content(number)).expect("written");
    // More leaves than one step of it visits.
    let leaves = size / BLOCK as u64 / LEAF;
    (0..leaves).for_each(write);
    let id = volume.take_snapshot("one").expect("taken");
    (0..leaves).for_each(write);
    volume.delete_snapshot(id, &mut |_, _| volume.wipe_keys()).expect_err("its keys are gone after a step");
    store.hang(Hangs::Syncs);
    volume.put_back_keys(&provider.kek()).expect("the same");
    store.wait_until_one_hangs();
    drop_at_work(volume, &store);
    check_good(&provider.open(store).expect("opens"));
}

/// In a store that takes nothing from a volume's own thread.
#[test]
fn one_that_fails_is_told_once_and_made_by_who_needs_it() {
    let (provider, sim) = (Provider::new(AnchorMode::Close), SimStore::new());
    let refuses = Arc::new(AtomicBool::new(true));
    let shy = refuses.clone();
    let store = Hooked::over(sim.clone(), move |call| {
        let own = std::thread::current().name() == Some("volume");
        match matches!(call, Call::Write(_)) && own && shy.load(Ordering::Acquire) {
            true => Err(io::Error::from_raw_os_error(5)),
            false => Ok(()),
        }
    });
    let volume = open(&provider, &store, OpenOptions::default());
    write(&volume, 0);
    let epoch = volume.info().epoch;
    let notes = || lock(&provider.events).iter().filter(|event| event.contains("came to nothing")).count();
    (1..DUE).for_each(|number| write(&volume, number));
    eventually("a note", || notes() == 1);
    assert_eq!(volume.info().epoch, epoch);
    let mut number = DUE;
    while volume.info().epoch == epoch {
        write(&volume, number);
        number += 1;
    }
    assert!(number < LOG && notes() == 1, "{number} writes, {} notes", notes());
    // It is asked again for the next one.
    let epoch = volume.info().epoch;
    refuses.store(false, Ordering::Release);
    let end = number + DUE;
    (number..end).for_each(|number| write(&volume, number));
    eventually("a checkpoint", || volume.info().epoch > epoch);
    volume.flush().expect("flushed");
    drop(volume);
    sim.crash(&mut Random(2));
    check(&provider.open(sim).expect("opens"), end);
}

/// A store as long as it need be, of which only the blocks are there that were written; it runs full.
#[derive(Default)]
struct Thin(Mutex<Blocks>);

#[derive(Default)]
struct Blocks {
    length: u64,
    held: HashMap<u64, Vec<u8>>,
    full: bool,
}

impl Blocks {
    fn block(&mut self, number: u64) -> io::Result<&mut Vec<u8>> {
        if self.full && !self.held.contains_key(&number) {
            return Err(io::ErrorKind::StorageFull.into());
        }
        Ok(self.held.entry(number).or_insert_with(|| vec![0; BLOCK]))
    }
}

impl Store for Thin {
    fn len(&self) -> io::Result<u64> {
        Ok(lock(&self.0).length)
    }
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        for (buffer, number) in buffer.chunks_mut(BLOCK).zip(offset / BLOCK as u64..) {
            match lock(&self.0).held.get(&number) {
                Some(block) => buffer.copy_from_slice(block),
                None => buffer.fill(0),
            }
        }
        Ok(())
    }
    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        let mut blocks = bytes.chunks(BLOCK).zip(offset / BLOCK as u64..);
        blocks.try_for_each(|(bytes, number)| {
            lock(&self.0).block(number)?.copy_from_slice(bytes);
            Ok(())
        })
    }
    fn sync_data(&self) -> io::Result<()> {
        Ok(())
    }
    fn set_len(&self, bytes: u64) -> io::Result<()> {
        lock(&self.0).length = bytes;
        Ok(())
    }
    fn reserve(&self, offset: u64, bytes: u64) -> io::Result<()> {
        let mut blocks = offset / BLOCK as u64..(offset + bytes) / BLOCK as u64;
        blocks.try_for_each(|number| lock(&self.0).block(number).map(drop))
    }
}

/// Blocks that a leaf of the map describes.
const LEAF: u64 = 72;

/// Memory is bounded, however long the store takes.
#[test]
fn no_more_than_so_many_pages_change_during_a_checkpoint() {
    const MOST: u64 = 1536;
    for outlive in [false, true] {
        let (provider, size) = (Provider::new(AnchorMode::Close), 1024 * MIB);
        let store = Hanging::over(Arc::new(Thin::default()));
        provider.create(store.clone(), size).expect("a volume").close().expect("closed");
        let options = OpenOptions { outlive, ..OpenOptions::default() };
        let volume = provider.open_with(store.clone(), &provider.grant(), options).expect("opens");
        let leaves = size / BLOCK as u64 / LEAF;
        let write = |number| volume.write(number * LEAF * BLOCK as u64, &content(number)).expect("written");
        write(0);
        store.hang(Hangs::Syncs);
        let written = AtomicU64::new(1);
        std::thread::scope(|scope| {
            let writer = scope.spawn(|| {
                (1..leaves).for_each(|number| {
                    write(number);
                    written.fetch_add(1, Ordering::Relaxed);
                })
            });
            store.wait_until_one_hangs();
            let most = settled(&written);
            store.hang(Hangs::Not);
            writer.join().expect("no panic");
            assert!(most <= 2 * MOST, "{most} pages changed, {MOST} are being written at most");
        });
        check_good(&volume);
    }
}

/// A volume whose changed pages found no room in its store could not even be opened again.
#[test]
fn what_changes_during_a_checkpoint_finds_room_in_a_store_that_is_full_after_it() {
    let (provider, size) = (Provider::new(AnchorMode::Close), 1 << 40);
    let thin = Arc::new(Thin::default());
    let store = Hanging::over(thin.clone());
    provider.create(store.clone(), size).expect("a volume").close().expect("closed");
    let volume = provider.open_with(store.clone(), &provider.grant(), OpenOptions::default()).expect("opens");
    // So far apart that each has pages of its own on several levels.
    let leaves = size / BLOCK as u64 / LEAF;
    let at = |number| number * 7057 % leaves * LEAF * BLOCK as u64;
    let write = |number| volume.write(at(number), &content(number));
    // As many as leave nearly half of the pages' room that is set aside.
    const BEFORE: u64 = 240;
    (0..BEFORE).for_each(|number| write(number).expect("written"));
    volume.checkpoint().expect("made");
    store.hang(Hangs::Syncs);
    let written = AtomicU64::new(BEFORE);
    std::thread::scope(|scope| {
        let writer = scope.spawn(|| {
            while write(written.load(Ordering::Relaxed)).is_ok() {
                written.fetch_add(1, Ordering::Relaxed);
            }
        });
        store.wait_until_one_hangs();
        settled(&written);
        lock(&thin.0).full = true;
        store.hang(Hangs::Not);
        writer.join().expect("no panic");
    });
    volume.flush().expect("flushed");
    volume.close().expect("closed");
    drop(volume);
    let volume = provider.open_with(store, &provider.grant(), OpenOptions::default()).expect("opens");
    for number in 0..written.load(Ordering::Relaxed) {
        let mut found = vec![0; BLOCK];
        volume.read(at(number), &mut found).expect("read");
        assert!(found == content(number), "{number}");
    }
    check_good(&volume);
}
