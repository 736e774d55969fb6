//! A store that hangs: who need not wait for it does not, and what happens meanwhile is kept.

use crate::common::{MIB, Provider, Random, SimStore, check_good, lock};
use fealty_blockcrypt::{Store, VolumeError};
use policy::AnchorMode;
use std::io;
use std::sync::{Arc, Condvar, Mutex};

/// A store whose syncs, and writes if asked, wait until they are let through.
pub(crate) struct Hanging<S = SimStore> {
    inner: Arc<S>,
    hangs: Mutex<Hangs>,
    /// Requests that wait.
    waiting: Mutex<usize>,
    changed: Condvar,
}

#[derive(Clone, Copy, PartialEq)]
pub(crate) enum Hangs {
    Not,
    Syncs,
    All,
}

impl<S: Store> Hanging<S> {
    pub(crate) fn over(inner: Arc<S>) -> Arc<Self> {
        Arc::new(Self { inner, hangs: Mutex::new(Hangs::Not), waiting: Mutex::new(0), changed: Condvar::new() })
    }

    pub(crate) fn hang(&self, hangs: Hangs) {
        *lock(&self.hangs) = hangs;
        self.changed.notify_all();
    }

    fn wait(&self, here: &[Hangs]) {
        let hangs = lock(&self.hangs);
        if here.contains(&hangs) {
            *lock(&self.waiting) += 1;
            drop(self.changed.wait_while(hangs, |hangs| here.contains(hangs)));
            *lock(&self.waiting) -= 1;
        }
    }

    /// Returns when a request waits here, however long whoever makes it takes to begin.
    pub(crate) fn wait_until_one_hangs(&self) {
        let begun = std::time::Instant::now();
        while *lock(&self.waiting) == 0 {
            assert!(begun.elapsed() < std::time::Duration::from_secs(120), "no request came within 120 s");
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
    }
}

/// Lets all requests through when it goes: a test that fails waits for nobody.
pub(crate) struct LetThrough<'a, S: Store>(pub(crate) &'a Hanging<S>);

impl<S: Store> Drop for LetThrough<'_, S> {
    fn drop(&mut self) {
        self.0.hang(Hangs::Not);
    }
}

impl<S: Store> Store for Hanging<S> {
    fn len(&self) -> io::Result<u64> {
        self.inner.len()
    }
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        self.inner.read_at(buffer, offset)
    }
    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.wait(&[Hangs::All]);
        self.inner.write_at(bytes, offset)
    }
    fn overlaps(&self) -> bool {
        self.inner.overlaps()
    }
    fn sync_data(&self) -> io::Result<()> {
        self.wait(&[Hangs::All, Hangs::Syncs]);
        self.inner.sync_data()
    }
    fn set_len(&self, bytes: u64) -> io::Result<()> {
        self.inner.set_len(bytes)
    }
    fn reserve(&self, offset: u64, bytes: u64) -> io::Result<()> {
        self.inner.reserve(offset, bytes)
    }
}

/// They are promised nearly all of the log, whose other interval is not free before one more checkpoint, of nothing.
#[test]
fn as_many_large_writes_as_the_log_holds_leave_room_for_the_next() {
    let provider = Provider::new(AnchorMode::Close);
    let sim = SimStore::new();
    sim.overlap();
    let store = Hanging::over(sim);
    let volume = provider.create(store.clone(), 16 * MIB).expect("a volume");
    let data = vec![7; MIB as usize];
    for round in 0..3 {
        store.hang(Hangs::All);
        std::thread::scope(|scope| {
            let writers: Vec<_> = (0..16)
                .map(|i| {
                    scope.spawn({
                        let (volume, data) = (&volume, &data);
                        move || volume.write(i * MIB, data)
                    })
                })
                .collect();
            let begun = std::time::Instant::now();
            while *lock(&store.waiting) < 14 && begun.elapsed() < std::time::Duration::from_secs(2) {
                std::thread::sleep(std::time::Duration::from_millis(1));
            }
            store.hang(Hangs::Not);
            for writer in writers {
                writer.join().expect("joined").unwrap_or_else(|error| panic!("round {round}: {error}"));
            }
        });
        volume.flush().expect("flushed");
        for lba in 0..4 {
            volume.write(lba * 4096, &[round; 4096]).unwrap_or_else(|error| panic!("round {round}: {error}"));
        }
        volume.discard(15 * MIB, 4096).expect("discarded");
    }
    check_good(&volume);
}

#[test]
fn keys_are_wiped_while_the_store_hangs_and_nothing_is_lost_when_they_come_back() {
    let provider = Provider::new(AnchorMode::Close);
    let store = Hanging::over(SimStore::new());
    let volume = provider.create(store.clone(), MIB).expect("a volume");
    volume.write(0, &[1; 8192]).expect("written");
    store.hang(Hangs::All);
    std::thread::scope(|scope| {
        let stuck = scope.spawn(|| volume.write(4096, &[2; 4096]));
        let flush = scope.spawn(|| volume.flush());
        std::thread::sleep(std::time::Duration::from_millis(50));
        // This is what must return although both others are stuck.
        volume.wipe_keys();
        let mut block = [9; 4096];
        assert!(matches!(volume.read(0, &mut block), Err(VolumeError::NoKeys)) && block == [0; 4096]);
        assert!(matches!(volume.flush(), Err(VolumeError::NoKeys)));
        store.hang(Hangs::Not);
        // The write had sealed its block before the keys went: it may have been done.
        let (written, flushed) = (stuck.join().expect("joined"), flush.join().expect("joined"));
        assert!(matches!(written, Ok(()) | Err(VolumeError::NoKeys)), "{written:?}");
        assert!(matches!(flushed, Ok(()) | Err(VolumeError::NoKeys)), "{flushed:?}");
    });
    assert!(matches!(volume.checkpoint(), Err(VolumeError::NoKeys)));
    assert!(matches!(volume.close(), Err(VolumeError::NoKeys)));
    volume.put_back_keys(&provider.kek()).expect("the same key again");
    let mut found = [0; 8192];
    volume.read(0, &mut found).expect("read");
    assert!(found[..4096] == [1; 4096] && (found[4096..] == [1; 4096] || found[4096..] == [2; 4096]));
    volume.write(0, &[3; 512]).expect("goes on");
    volume.flush().expect("flushed");
    check_good(&volume);
    volume.close().expect("closed");
}

/// A FLUSH makes durable what was written before it, not what comes while it runs.
#[test]
fn a_flush_frees_nothing_that_was_superseded_while_it_ran() {
    let (provider, sim) = (Provider::new(AnchorMode::Close), SimStore::new());
    let store = Hanging::over(sim.clone());
    provider.create(store.clone(), MIB).expect("a volume").close().expect("closed");
    let volume = provider.open(store.clone()).expect("opens");
    let at = |lba: u64| lba * 4096;
    // Twice, so that they lie where the later blocks go by themselves.
    for _ in 0..2 {
        for lba in 0..100 {
            volume.write(at(lba), &[1; 4096]).expect("written");
        }
    }
    volume.flush().expect("flushed");
    volume.write(at(200), &[2; 4096]).expect("written");
    std::thread::scope(|scope| {
        store.hang(Hangs::Syncs);
        let flush = scope.spawn(|| volume.flush());
        store.wait_until_one_hangs();
        for lba in 0..100 {
            volume.write(at(lba), &[3; 4096]).expect("written while the FLUSH runs");
        }
        store.hang(Hangs::Not);
        flush.join().expect("joined").expect("flushed");
    });
    // If the first versions were free now, these would overwrite them.
    for lba in (101..200).step_by(2) {
        volume.write(at(lba), &[4; 4096]).expect("written");
    }
    // Power fails with only the last writes on the disk: no log block of theirs was ever written.
    drop(volume);
    sim.crash(&mut all_written());
    let volume = provider.open(store).expect("opens");
    for lba in 0..100 {
        let mut found = [0; 4096];
        volume.read(at(lba), &mut found).expect("read");
        assert!(found == [1; 4096] || found == [3; 4096], "{lba}");
    }
}

/// Random numbers that make [`SimStore::crash`] keep every write.
fn all_written() -> Random {
    (0..).map(Random).find(|r| r.clone().below(4) == 1).expect("one of four")
}

/// Neither a FLUSH nor a checkpoint that waits for the store keeps other requests waiting.
#[test]
fn requests_go_on_while_a_checkpoint_waits_for_the_store() {
    let provider = Provider::new(AnchorMode::Close);
    let sim = SimStore::new();
    let store = Hanging::over(sim.clone());
    provider.create(store.clone(), MIB).expect("a volume").close().expect("closed");
    let volume = provider.open(store.clone()).expect("opens");
    volume.write(0, &[1; 40 * 4096]).expect("written");
    store.hang(Hangs::Syncs);
    std::thread::scope(|scope| {
        let checkpoint = scope.spawn(|| volume.checkpoint());
        store.wait_until_one_hangs();
        // Pages that are being written are changed again.
        volume.write(4096, &[2; 20 * 4096]).expect("written meanwhile");
        volume.discard(0, 4096).expect("discarded meanwhile");
        let mut found = [9; 2 * 4096];
        volume.read(0, &mut found).expect("read meanwhile");
        assert!(found[..4096] == [0; 4096] && found[4096..] == [2; 4096]);
        store.hang(Hangs::Not);
        checkpoint.join().expect("joined").expect("made");
    });
    check_good(&volume);
    volume.flush().expect("flushed");
    drop(volume);
    // What was changed during the checkpoint comes from the log.
    sim.crash(&mut Random(1));
    let volume = provider.open(store).expect("opens");
    let mut found = [9; 2 * 4096];
    volume.read(0, &mut found).expect("read");
    assert!(found[..4096] == [0; 4096] && found[4096..] == [2; 4096]);
}
