//! Snapshots beside other requests, and beside each other, and when the store fails in between.

use crate::common::{MIB, Provider, SimStore, check_good, lock};
use fealty_blockcrypt::{AnchorRefused, Anchors, FileStore, MemoryStore, OpenOptions, Store, Volume, VolumeError};
use policy::{AnchorMode, VolumeAnchor};
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::time::{Duration, Instant};

/// More than one leaf of the map holds: a write each so many bytes changes a page each.
const STRIDE: u64 = 64 * 4096;
/// More leaves than a deletion visits in one step.
const LEAVES: u64 = 300;

/// A file that fails what it is told to.
struct Faulty {
    inner: FileStore,
    /// Writes and syncs fail.
    broken: AtomicBool,
    /// Writes of nothing but zeroes fail: key slots can't be overwritten.
    keeps_slots: AtomicBool,
    /// Reads fail; how many did.
    unreadable: AtomicBool,
    tries: AtomicU64,
    /// The end of the first stretch whose room was set aside.
    front: AtomicU64,
    /// The lowest byte whose room was given back.
    given_back: AtomicU64,
}

impl Faulty {
    fn new() -> Arc<Self> {
        let inner = FileStore::exclusive(tempfile::tempfile().expect("a file")).expect("a store");
        Arc::new(Self {
            inner,
            broken: AtomicBool::new(false),
            keeps_slots: AtomicBool::new(false),
            unreadable: AtomicBool::new(false),
            tries: AtomicU64::new(0),
            front: AtomicU64::new(0),
            given_back: AtomicU64::new(u64::MAX),
        })
    }

    fn fails(&self, this: bool) -> io::Result<()> {
        if this { Err(io::Error::other("told to fail")) } else { Ok(()) }
    }
}

impl Store for Faulty {
    fn len(&self) -> io::Result<u64> {
        self.inner.len()
    }
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        let unreadable = self.unreadable.load(Ordering::SeqCst);
        self.tries.fetch_add(unreadable.into(), Ordering::SeqCst);
        self.fails(unreadable)?;
        self.inner.read_at(buffer, offset)
    }
    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.fails(self.broken.load(Ordering::SeqCst))?;
        self.fails(self.keeps_slots.load(Ordering::SeqCst) && bytes.iter().all(|b| *b == 0))?;
        self.inner.write_at(bytes, offset)
    }
    fn sync_data(&self) -> io::Result<()> {
        self.fails(self.broken.load(Ordering::SeqCst))
    }
    fn set_len(&self, bytes: u64) -> io::Result<()> {
        self.inner.set_len(bytes)
    }
    fn reserve(&self, offset: u64, bytes: u64) -> io::Result<()> {
        if offset == 0 {
            self.front.store(bytes, Ordering::SeqCst);
        }
        Ok(())
    }
    fn punch(&self, offset: u64, bytes: u64) -> io::Result<()> {
        self.given_back.fetch_min(offset, Ordering::SeqCst);
        self.inner.punch(offset, bytes)
    }
}

fn fill(volume: &Volume, leaves: u64, value: u8) {
    for leaf in 0..leaves {
        volume.write(leaf * STRIDE, &[value; 4096]).expect("written");
    }
}

fn holds(volume: &Volume, leaves: u64, value: u8) {
    for leaf in 0..leaves {
        let mut found = [0; 4096];
        volume.read(leaf * STRIDE, &mut found).expect("read");
        assert!(found == [value; 4096], "leaf {leaf} holds {} instead of {value}", found[0]);
    }
}

/// Takers, deleters and writers at once: each writer reads what it wrote, and nothing leaks.
#[test]
fn snapshots_come_and_go_beside_requests_of_several_threads() {
    let provider = Provider::new(AnchorMode::Close);
    let volume = provider.create(MemoryStore::default(), 4 * MIB).expect("a volume");
    let (volume, done) = (&volume, &AtomicBool::new(false));
    std::thread::scope(|scope| {
        for thread in 0..3_u64 {
            scope.spawn(move || {
                let mut round = 0_u64;
                while !done.load(Ordering::SeqCst) || round < 20 {
                    let (at, value) = (thread * MIB + round % 40 * 4096, (1 + round % 250) as u8);
                    volume.write(at, &[value; 3 * 4096]).expect("written");
                    let mut found = [0; 3 * 4096];
                    volume.read(at, &mut found).expect("read");
                    assert!(found == [value; 3 * 4096]);
                    match round % 7 {
                        0 => volume.flush().expect("flushed"),
                        1 => volume.discard(at, 4096).expect("discarded"),
                        _ => {}
                    }
                    round += 1;
                }
            });
        }
        let deleters: Vec<_> = (0..2)
            .map(|_| {
                scope.spawn(move || {
                    for _ in 0..20 {
                        let id = volume.take_snapshot("one of many").expect("taken");
                        volume.delete_snapshot(id, &mut |_, _| {}).expect("deleted");
                    }
                })
            })
            .collect();
        let deleted: Vec<_> = deleters.into_iter().map(std::thread::ScopedJoinHandle::join).collect();
        done.store(true, Ordering::SeqCst);
        deleted.into_iter().for_each(|deleted| deleted.expect("joined"));
    });
    assert!(volume.snapshots().expect("a list").is_empty());
    check_good(volume);
    volume.close().expect("closed");
}

/// Either it is gone, or it is gone back to and then gone; never half of it.
#[test]
fn a_deletion_and_a_return_to_the_same_snapshot_follow_each_other() {
    let provider = Provider::new(AnchorMode::Close);
    let volume = provider.create(Faulty::new(), LEAVES * STRIDE).expect("a volume");
    fill(&volume, LEAVES, 1);
    for round in 2..8 {
        let id = volume.take_snapshot("contended").expect("taken");
        fill(&volume, LEAVES, round);
        let began = AtomicU64::new(0);
        let (deleted, reverted) = std::thread::scope(|scope| {
            let deletion = scope.spawn(|| {
                volume.delete_snapshot(id, &mut |_, _| {
                    began.store(1, Ordering::SeqCst);
                })
            });
            // In half of the rounds it comes when the other is at it.
            while round % 2 == 0 && began.load(Ordering::SeqCst) == 0 && !deletion.is_finished() {
                std::thread::yield_now();
            }
            let reverted = volume.revert(id);
            (deletion.join().expect("joined"), reverted)
        });
        deleted.expect("deleted");
        match reverted {
            Ok(()) => {
                holds(&volume, LEAVES, round - 1);
                fill(&volume, LEAVES, round);
            }
            Err(VolumeError::NoSnapshot(_)) => holds(&volume, LEAVES, round),
            Err(other) => panic!("{other}"),
        }
        assert!(volume.snapshots().expect("a list").is_empty());
        check_good(&volume);
    }
}

/// A checkpoint that is durable is one, whatever fails after it: here blocks that held key slots can't be overwritten.
#[test]
fn a_snapshot_that_became_durable_is_kept_although_something_failed_after_it() {
    let (provider, store) = (Provider::new(AnchorMode::Close), Faulty::new());
    provider.create(store.clone(), MIB).expect("a volume").close().expect("closed");
    *lock(&provider.key_id) = 2;
    let volume = provider.open(store.clone()).expect("opens under a new key");
    assert_eq!(volume.info().older_keys, 1);
    volume.write(0, &[1; 40 * 4096]).expect("written");
    let old = provider.kek();
    provider.set_kek(78, 8);
    store.keeps_slots.store(true, Ordering::SeqCst);
    let refused = volume.rewrap(&old, &provider.kek());
    assert!(matches!(refused, Err(VolumeError::Store(..))), "the old wrapping is still there: {refused:?}");
    let id = volume.take_snapshot("kept").expect("taken, for it is durable");
    for value in 2..6 {
        volume.write(0, &[value; 40 * 4096]).expect("written");
        volume.flush().expect("flushed");
        volume.checkpoint().expect("a checkpoint");
    }
    store.keeps_slots.store(false, Ordering::SeqCst);
    volume.close().expect("closed");
    drop(volume);
    let options = OpenOptions { snapshot: Some(id), ..OpenOptions::default() };
    let seen =
        provider.open_with(store.clone(), &provider.grant(), options).expect("the snapshot, under the new wrapping");
    let mut found = vec![0; 40 * 4096];
    seen.read(0, &mut found).expect("read");
    assert!(found.iter().all(|b| *b == 1));
    drop(seen);
    let volume = provider.open(store).expect("opens");
    check_good(&volume);
}

/// Pages find room in the zone when the store has no other: a deletion that frees some of it gives that room to nobody.
#[test]
fn a_deletion_gives_room_back_but_not_the_zones() {
    let (provider, store) = (Provider::new(AnchorMode::Close), Faulty::new());
    let volume = provider.create(store.clone(), LEAVES * STRIDE).expect("a volume");
    fill(&volume, LEAVES, 1);
    let id = volume.take_snapshot("to go").expect("taken");
    fill(&volume, LEAVES, 2);
    volume.delete_snapshot(id, &mut |_, _| {}).expect("deleted");
    let (front, lowest) = (store.front.load(Ordering::SeqCst), store.given_back.load(Ordering::SeqCst));
    assert!(front > 0 && lowest != u64::MAX, "nothing was given back");
    assert!(lowest >= front, "room at {lowest} was given back, and the zone ends at {front}");
    check_good(&volume);
}

/// What a deletion left is done by the volume's own thread, which keeps the anchors of each step meanwhile.
#[test]
fn anchors_are_kept_while_the_volumes_own_thread_goes_on_with_a_deletion() {
    let (provider, store) = (Provider::new(AnchorMode::Interval), Faulty::new());
    let leaves = 4 * 256;
    let volume = provider.create(store.clone(), leaves * STRIDE).expect("a volume");
    fill(&volume, leaves, 1);
    let id = volume.take_snapshot("to go").expect("taken");
    fill(&volume, leaves, 2);
    volume.close().expect("closed");
    drop(volume);
    let volume = provider.open(store.clone()).expect("opens");
    let broken = volume.delete_snapshot(id, &mut |_, _| store.broken.store(true, Ordering::SeqCst));
    assert!(broken.is_err());
    drop(volume);
    store.broken.store(false, Ordering::SeqCst);
    let volume = provider.open(store.clone()).expect("opens");
    let (begun, before) = (Instant::now(), *lock(&provider.kept));
    while !volume.snapshots().expect("a list").is_empty() {
        assert!(begun.elapsed() < Duration::from_secs(120), "not deleted within 120 s");
        std::thread::sleep(Duration::from_millis(10));
    }
    // Three steps or more, and an anchor between each two.
    let kept = *lock(&provider.kept) - before;
    assert!(kept >= 2, "{kept} anchors were kept");
    holds(&volume, leaves, 2);
    check_good(&volume);
    volume.close().expect("closed");
}

/// What `close` returned is the newest that there is, whoever is at work.
#[test]
fn nothing_becomes_durable_after_the_anchor_that_close_returns() {
    for _ in 0..8 {
        let (provider, store) = (Provider::new(AnchorMode::Close), SimStore::new());
        let volume = provider.create(store.clone(), 2 * MIB).expect("a volume");
        volume.write(0, &[1; 16 * 4096]).expect("written");
        let anchor = std::thread::scope(|scope| {
            for thread in 0..4_u64 {
                let volume = &volume;
                scope.spawn(move || {
                    // Until it is closed.
                    while volume.write(thread * 64 * 4096, &[2; 4096]).is_ok()
                        && (thread > 1 || volume.checkpoint().is_ok())
                        && (thread > 0 || volume.take_snapshot("late").is_ok())
                    {}
                });
            }
            std::thread::sleep(Duration::from_millis(20));
            volume.close().expect("closed")
        });
        let seen = fealty_blockcrypt::inspect(&*store).expect("readable");
        assert!(seen.closed && seen.anchor == anchor);
    }
}

/// A provider who answers when he is told to.
struct Slow {
    provider: Arc<Provider>,
    asked: Mutex<mpsc::Sender<()>>,
    told: Mutex<mpsc::Receiver<()>>,
}

impl Anchors for Slow {
    fn keep(&self, anchor: &VolumeAnchor) -> Result<(), AnchorRefused> {
        let _ = lock(&self.asked).send(());
        let _ = lock(&self.told).recv();
        self.provider.keep(anchor)
    }
}

/// The snapshot is durable by then, and only its anchor is to be kept.
#[test]
fn a_snapshot_that_waits_for_the_provider_keeps_no_writer_waiting() {
    let (provider, store) = (Provider::new(AnchorMode::Flush), Arc::new(MemoryStore::default()));
    provider.create(store.clone(), MIB).expect("a volume").close().expect("closed");
    let ((asked, hear), (tell, told)) = (mpsc::channel(), mpsc::channel());
    let slow = Arc::new(Slow { provider: provider.clone(), asked: Mutex::new(asked), told: Mutex::new(told) });
    tell.send(()).expect("for the opening");
    let options = OpenOptions::default();
    let volume =
        Volume::open(store, &provider.grant(), &provider.kek(), options, slow, provider.clone()).expect("opens");
    hear.recv().expect("the opening's");
    std::thread::scope(|scope| {
        let taken = scope.spawn(|| volume.take_snapshot("waits"));
        hear.recv().expect("the snapshot's anchor");
        let (done, written) = mpsc::channel();
        let volume = &volume;
        scope.spawn(move || done.send(volume.write(0, &[1; 4096]).is_ok()));
        let written = written.recv_timeout(Duration::from_secs(60));
        drop(tell);
        assert_eq!(written, Ok(true), "it waits for the provider");
        taken.join().expect("joined").expect("taken");
    });
}

/// What the volume's own thread can't do it tries again, less and less often, and says so once.
#[test]
fn a_deletion_that_the_store_fails_is_told_of_once() {
    let (provider, store) = (Provider::new(AnchorMode::Close), Faulty::new());
    let volume = provider.create(store.clone(), LEAVES * STRIDE).expect("a volume");
    fill(&volume, LEAVES, 1);
    let id = volume.take_snapshot("to go").expect("taken");
    fill(&volume, LEAVES, 2);
    volume.close().expect("closed");
    drop(volume);
    let volume = provider.open(store.clone()).expect("opens");
    let before = provider.heard().len();
    assert_eq!(before, 0);
    let broken = volume.delete_snapshot(id, &mut |_, _| store.unreadable.store(true, Ordering::SeqCst));
    assert!(broken.is_err());
    std::thread::sleep(Duration::from_secs(5));
    let heard = provider.heard();
    assert_eq!(heard.iter().filter(|event| event.contains("not deleted yet")).count(), 1, "{heard:?}");
    let tries = store.tries.load(Ordering::SeqCst);
    assert!((2..5).contains(&tries), "{tries} tries in five seconds");
    store.unreadable.store(false, Ordering::SeqCst);
    volume.delete_snapshot(id, &mut |_, _| {}).expect_err("it is gone by then");
    holds(&volume, LEAVES, 2);
    check_good(&volume);
}
