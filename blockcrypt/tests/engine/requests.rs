//! Reads, writes and FLUSH on an honest store, and on one that runs full or hangs.

use crate::common::{MIB, Provider, Random, SimStore, check_good, filled, lock};
use fealty_blockcrypt::{FileStore, MemoryStore, OpenOptions, Store, Volume, VolumeError};
use policy::AnchorMode;
use std::io;
use std::sync::{Arc, Condvar, Mutex};

#[test]
fn what_is_written_is_read_also_after_closing() {
    let (provider, store) = (Provider::new(AnchorMode::Close), Arc::new(MemoryStore::default()));
    let size = 3 * MIB + 1536;
    let volume = provider.create(store.clone(), size).expect("a volume");
    assert_eq!((volume.size(), volume.id()), (size, provider.volume));
    let mut model = vec![0; size as usize];
    let mut random = Random(1);
    for (offset, length) in [(0, 4096), (512, 512), (3584, 1024), (4096, 300_000 / 512 * 512), (size - 512, 512)] {
        let part = &mut model[offset as usize..][..length];
        random.fill(part);
        volume.write(offset, part).expect("written");
    }
    let mut found = vec![1; size as usize];
    volume.read(0, &mut found).expect("read");
    assert!(found == model);
    assert_eq!(volume.close().expect("closed"), provider.anchor().expect("kept"));
    assert_eq!(volume.close().expect("closed already"), provider.anchor().expect("kept"));
    assert!(matches!(volume.read(0, &mut found[..512]), Err(VolumeError::Closed)));
    assert!(matches!(volume.write(0, &found[..512]), Err(VolumeError::Closed)));
    drop(volume);

    let volume = provider.open(store.clone()).expect("opens");
    volume.read(0, &mut found).expect("read");
    assert!(found == model);
    let info = volume.info();
    assert_eq!((info.size, info.dropped_writes), (size, 0));
    assert!(info.mapped < size / 2, "what was never written takes no room: {info:?}");
    check_good(&volume);
    let text = store.bytes();
    assert!(!text.windows(32).any(|w| w == &model[8192..8224]), "no plain text in the store");
}

#[test]
fn impossible_requests_change_nothing() {
    let provider = Provider::new(AnchorMode::Close);
    let volume = provider.create(MemoryStore::default(), MIB + 512).expect("a volume");
    let mut buffer = vec![0; 4096];
    for (offset, length) in [(1, 512), (0, 511), (MIB + 512, 512), (MIB, 1024), (u64::MAX - 511, 512), (u64::MAX, 512)]
    {
        let refused = |r| matches!(r, Err(VolumeError::Request { .. }));
        assert!(refused(volume.read(offset, &mut buffer[..length])), "{offset} {length}");
        assert!(refused(volume.write(offset, &buffer[..length])), "{offset} {length}");
    }
    volume.read(MIB + 512, &mut []).expect("nothing at the end");
    volume.write(0, &[]).expect("nothing");
    for size in [0, 513, u64::MAX] {
        let made = Provider::new(AnchorMode::Close).create(MemoryStore::default(), size);
        assert!(matches!(made.err(), Some(VolumeError::Size { .. })));
    }
}

#[test]
fn overwriting_a_full_volume_never_runs_out() {
    let (provider, store) = (Provider::new(AnchorMode::Close), Arc::new(MemoryStore::default()));
    let volume = provider.create(store.clone(), MIB).expect("a volume");
    let mut data = vec![0; MIB as usize];
    for round in 0..8 {
        Random(round).fill(&mut data);
        // No FLUSH at all: the engine finds room by itself.
        volume.write(0, &data).expect("written");
    }
    volume.flush().expect("flushed");
    check_good(&volume);
    let mut found = vec![0; MIB as usize];
    volume.read(0, &mut found).expect("read");
    assert!(found == data);
}

#[test]
fn a_read_only_volume_writes_nothing() {
    let (provider, store) = (Provider::new(AnchorMode::Flush), Arc::new(MemoryStore::default()));
    let volume = provider.create(store.clone(), MIB).expect("a volume");
    volume.close().expect("closed");
    let volume = provider.open(store.clone()).expect("opens");
    volume.write(8192, &[3; 512]).expect("written");
    volume.flush().expect("flushed");
    drop(volume);
    let (before, anchor) = (store.bytes(), provider.anchor());
    let volume = provider.open_read_only(store.clone()).expect("opens with its log replayed");
    let mut sector = [0; 512];
    volume.read(8192, &mut sector).expect("read");
    assert_eq!(sector, [3; 512]);
    assert!(matches!(volume.write(0, &sector), Err(VolumeError::ReadOnly)));
    volume.flush().expect("nothing to do");
    volume.checkpoint().expect("nothing to do");
    check_good(&volume);
    assert_eq!(volume.close().ok(), anchor);
    assert!(store.bytes() == before && provider.anchor() == anchor);
}

#[test]
fn several_threads_share_a_volume() {
    let provider = Provider::new(AnchorMode::Flush);
    let volume = provider.create(MemoryStore::default(), 2 * MIB).expect("a volume");
    std::thread::scope(|scope| {
        for thread in 0..4 {
            let volume = &volume;
            scope.spawn(move || {
                let mut random = Random(thread);
                let base = thread * MIB / 2;
                let mut model = vec![0; (MIB / 2) as usize];
                for _ in 0..40 {
                    let at = random.below(120) * 4096 + random.below(8) * 512;
                    let part = &mut model[at as usize..][..4096];
                    random.fill(part);
                    volume.write(base + at, part).expect("written");
                    if random.chance(20) {
                        volume.flush().expect("flushed");
                    }
                    let at = random.below(128) * 4096;
                    let mut found = [0; 4096];
                    volume.read(base + at, &mut found).expect("read");
                    assert!(found == model[at as usize..][..4096]);
                }
            });
        }
    });
    check_good(&volume);
}

#[test]
fn a_full_store_loses_nothing_acknowledged() {
    let (provider, store) = (Provider::new(AnchorMode::Close), SimStore::new());
    provider.create(store.clone(), 2 * MIB).expect("a volume").close().expect("closed");
    let volume = provider.open(store.clone()).expect("opens");
    let data = vec![5; 64 * 1024];
    volume.write(0, &data).expect("written");
    volume.flush().expect("flushed");
    store.limit(Some(40));
    let mut acknowledged = vec![true];
    for i in 1..32 {
        let written = volume.write(i * 64 * 1024, &data).and_then(|()| volume.flush());
        assert!(written.is_ok() || matches!(written, Err(VolumeError::Full(_))), "{written:?}");
        acknowledged.push(written.is_ok());
    }
    assert!(acknowledged.contains(&true) && acknowledged.contains(&false));
    let check = |volume: &fealty_blockcrypt::Volume| {
        for (i, _) in acknowledged.iter().enumerate().filter(|(_, a)| **a) {
            let mut found = vec![0; data.len()];
            volume.read(i as u64 * 64 * 1024, &mut found).expect("read");
            assert!(found == data, "{i}");
        }
    };
    check(&volume);
    drop(volume);
    store.crash(&mut Random(1));
    // The metadata of recovery may not find room either: then it does not open, and changes nothing.
    if let Err(error) = provider.open(store.clone()) {
        assert!(matches!(error, VolumeError::Full(_)), "{error}");
    }
    store.limit(None);
    let volume = provider.open(store.clone()).expect("opens once there is room");
    check(&volume);
    volume.write(31 * 64 * 1024, &data).expect("goes on");
    volume.close().expect("closed");
}

#[test]
fn after_a_failed_sync_nothing_more_is_acknowledged() {
    let (provider, store) = (Provider::new(AnchorMode::Close), SimStore::new());
    provider.create(store.clone(), MIB).expect("a volume").close().expect("closed");
    let volume = provider.open(store.clone()).expect("opens");
    volume.write(0, &[7; 4096]).expect("written");
    volume.flush().expect("flushed");
    volume.write(4096, &[8; 4096]).expect("written");
    store.burn(2);
    assert!(matches!(volume.flush(), Err(VolumeError::Store(..))));
    store.burn(u64::MAX);
    assert!(matches!(volume.flush(), Err(VolumeError::Failed(_))), "a second fdatasync proves nothing");
    assert!(matches!(volume.write(0, &[9; 4096]), Err(VolumeError::Failed(_))));
    assert!(volume.close().is_err());
    let mut found = [0; 4096];
    volume.read(0, &mut found).expect("reads go on");
    assert!(found == [7; 4096] && provider.heard().iter().any(|e| e.contains("no more writes")));
    drop(volume);
    store.crash(&mut Random(2));
    provider.open(store).expect("opens again").read(0, &mut found).expect("read");
    assert!(found == [7; 4096]);
}

/// A store whose syncs, and writes if asked, wait until they are let through.
pub(crate) struct Hanging {
    inner: Arc<SimStore>,
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

impl Hanging {
    pub(crate) fn over(inner: Arc<SimStore>) -> Arc<Self> {
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

impl Store for Hanging {
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

#[test]
fn a_volume_at_rest_is_durable_without_its_keys() {
    let provider = Provider::new(AnchorMode::Close);
    let volume = provider.create(SimStore::new(), MIB).expect("a volume");
    volume.write(0, &[1; 4096]).expect("written");
    volume.checkpoint().expect("rests");
    volume.wipe_keys();
    volume.checkpoint().expect("nothing to do");
    volume.put_back_keys(&provider.kek()).expect("the same key again");
    volume.write(0, &[2; 4096]).expect("written");
    volume.wipe_keys();
    assert!(matches!(volume.checkpoint(), Err(VolumeError::NoKeys)));
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

/// A store that notes what is asked of it: `r`ead, `w`rite, `s`ync.
struct Noting(Arc<SimStore>, Mutex<String>);

impl Store for Noting {
    fn len(&self) -> io::Result<u64> {
        self.0.len()
    }
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        lock(&self.1).push('r');
        self.0.read_at(buffer, offset)
    }
    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        lock(&self.1).push('w');
        self.0.write_at(bytes, offset)
    }
    fn sync_data(&self) -> io::Result<()> {
        lock(&self.1).push('s');
        self.0.sync_data()
    }
    fn set_len(&self, bytes: u64) -> io::Result<()> {
        self.0.set_len(bytes)
    }
}

/// A killed process's last writes may be the kernel's alone. An opener that believed them, overwrote what they replace, and lost
/// power would have neither.
#[test]
fn an_opener_makes_durable_what_it_is_about_to_believe() {
    let (provider, sim) = (Provider::new(AnchorMode::Close), SimStore::new());
    provider.create(sim.clone(), MIB).expect("a volume").close().expect("closed");
    let volume = provider.open(sim.clone()).expect("opens");
    volume.write(0, &[1; 4096]).expect("written");
    volume.flush().expect("in the log, so that the opener has pages to write");
    drop(volume);
    let noting = Arc::new(Noting(sim, Mutex::default()));
    drop(provider.open_read_only(noting.clone()).expect("opens"));
    let seen = std::mem::take(&mut *lock(&noting.1));
    assert!(seen.chars().all(|c| c == 'r'), "{seen}");
    drop(provider.open(noting.clone()).expect("opens"));
    let seen = std::mem::take(&mut *lock(&noting.1));
    assert!(seen.trim_start_matches('r').starts_with("sr") && seen.contains("ws"), "{seen}");
    // Pages durable before the superblock that names them, and that before the anchor.
    let before = seen.trim_end_matches('r').strip_suffix("wws").map(|before| before.trim_end_matches('r'));
    assert!(before.is_some_and(|before| before.ends_with('s')), "{seen}");
}

/// What an anchor names is durable: where that is all there is, nothing has to be made so again.
#[test]
fn an_opener_of_what_was_closed_and_anchored_makes_only_its_own_superblock_durable() {
    let (provider, sim) = (Provider::new(AnchorMode::Close), SimStore::new());
    provider.create(sim.clone(), MIB).expect("a volume").close().expect("closed");
    let noting = Arc::new(Noting(sim, Mutex::default()));
    let volume = provider.open(noting.clone()).expect("opens");
    let seen = std::mem::take(&mut *lock(&noting.1));
    let (read, written) = seen.split_at(seen.find('w').expect("a superblock"));
    assert!(read.chars().all(|c| c == 'r') && written.trim_end_matches('r') == "wws", "{seen}");
    // The same state again, but it was not closed.
    drop(volume);
    drop(provider.open(noting.clone()).expect("opens"));
    let seen = std::mem::take(&mut *lock(&noting.1));
    assert!(seen.find('s') < seen.find('w'), "{seen}");
}

/// Room that a volume takes in the store, in blocks that hold something.
fn data_blocks(volume: &Volume) -> u64 {
    volume.info().mapped / 4096
}

#[test]
fn discarded_blocks_read_as_zeroes_and_give_their_room_back() {
    let (provider, store) = (Provider::new(AnchorMode::Close), SimStore::new());
    let size = 4 * MIB + 512;
    let volume = provider.create(store.clone(), size).expect("a volume");
    let mut model = vec![0; size as usize];
    Random(3).fill(&mut model);
    volume.write(0, &model).expect("written");
    volume.flush().expect("flushed");
    let before = (data_blocks(&volume), store.blocks_held());
    // Not aligned: the edges stay.
    volume.discard(512, MIB).expect("discarded");
    model[4096..MIB as usize].fill(0);
    volume.write_zeroes(2 * MIB + 512, 4096 + 1024, true).expect("zeroed");
    model[2 * MIB as usize + 512..][..4096 + 1024].fill(0);
    volume.write_zeroes(3 * MIB + 1024, 1024, true).expect("zeroed within a block");
    model[3 * MIB as usize + 1024..][..1024].fill(0);
    // The last block is cut short by the volume's end.
    volume.discard(4 * MIB, 512).expect("discarded");
    model[4 * MIB as usize..].fill(0);
    let read = |volume: &Volume| {
        let mut found = vec![1; size as usize];
        volume.read(0, &mut found).expect("read");
        found
    };
    assert!(read(&volume) == model);
    assert!(store.blocks_held() >= before.1, "nothing is given back before it is durable");
    volume.flush().expect("flushed");
    // 255 blocks, and the last one; the other zeroes lie across two blocks.
    assert_eq!(before.0 - data_blocks(&volume), 256);
    assert!(before.1 - store.blocks_held() >= 250, "{} {}", before.1, store.blocks_held());
    check_good(&volume);
    volume.close().expect("closed");
    drop(volume);
    let volume = provider.open(store.clone()).expect("opens");
    assert!(read(&volume) == model);
    // Told not to: the room stays.
    let held = store.blocks_held();
    volume.write_zeroes(2 * MIB, MIB, false).expect("zeroed");
    volume.flush().expect("flushed");
    model[2 * MIB as usize..][..MIB as usize].fill(0);
    assert!(read(&volume) == model && store.blocks_held() >= held);
    volume.write(0, &model[..MIB as usize]).expect("written again");
    check_good(&volume);
}

#[test]
fn impossible_discards_change_nothing() {
    let provider = Provider::new(AnchorMode::Close);
    let volume = provider.create(MemoryStore::default(), MIB + 512).expect("a volume");
    let refused = |r| matches!(r, Err(VolumeError::Request { .. }));
    for (offset, length) in [(1, 512), (0, 511), (MIB, 1024), (u64::MAX - 511, 512), (512, u64::MAX - 511)] {
        assert!(refused(volume.discard(offset, length)), "{offset} {length}");
        assert!(refused(volume.write_zeroes(offset, length, true)), "{offset} {length}");
    }
    volume.discard(MIB + 512, 0).expect("nothing at the end");
    volume.write_zeroes(0, 0, true).expect("nothing");
}

/// What is not there is not visited: this would take hours block by block.
#[test]
fn discarding_all_of_a_large_empty_volume_is_quick() {
    let provider = Provider::new(AnchorMode::Close);
    let size = 1 << 36;
    let store = FileStore::exclusive(tempfile::tempfile().expect("a file")).expect("a store");
    let volume = provider.create(store, size).expect("a volume");
    for at in [0, size / 3 / 4096 * 4096, size - 4096] {
        volume.write(at, &[7; 4096]).expect("written");
    }
    volume.checkpoint().expect("a checkpoint");
    volume.write(size / 2, &[8; 4096]).expect("written");
    volume.discard(0, size).expect("discarded");
    assert_eq!(volume.info().mapped, 0);
    for at in [0, size / 3 / 4096 * 4096, size / 2, size - 4096] {
        let mut found = [1; 4096];
        volume.read(at, &mut found).expect("read");
        assert!(found == [0; 4096]);
    }
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

/// Not one block more: what is there can be discarded, made durable, opened again, and what that frees can be used.
#[test]
fn a_full_store_takes_discards_and_deletions_and_opens() {
    let (provider, store) = (Provider::new(AnchorMode::Close), SimStore::new());
    let piece = 64 * 1024;
    provider.create(store.clone(), 8 * MIB).expect("a volume").close().expect("closed");
    let volume = provider.open(store.clone()).expect("opens");
    for i in 0..40 {
        volume.write(i * piece, &vec![1; piece as usize]).expect("written");
    }
    let snapshot = volume.take_snapshot("before").expect("taken");
    store.limit(Some(150));
    let mut holds = vec![1; 40];
    for i in 0..100u64 {
        let written = volume.write(i % 128 * piece, &vec![2; piece as usize]).and_then(|()| volume.flush());
        match written {
            Ok(()) if i < 40 => holds[i as usize] = 2,
            Ok(()) => holds.push(2),
            Err(VolumeError::Full(_)) => {
                assert!(i > 0);
                break;
            }
            Err(other) => panic!("{other}"),
        }
    }
    let check = |volume: &Volume, holds: &[u8]| {
        for (i, value) in holds.iter().enumerate() {
            let mut found = vec![9; piece as usize];
            volume.read(i as u64 * piece, &mut found).expect("read");
            assert!(found.iter().all(|b| b == value), "{i}");
        }
    };
    store.limit(Some(0));
    for (i, value) in holds.iter_mut().enumerate().skip(1).step_by(2) {
        volume.discard(i as u64 * piece, piece).expect("discarded");
        volume.flush().expect("flushed");
        volume.checkpoint().expect("a checkpoint");
        *value = 0;
    }
    drop(volume);
    store.crash(&mut Random(8));
    store.limit(Some(0));
    let volume = provider.open(store.clone()).expect("opens on a full store");
    check(&volume, &holds);
    volume.discard(0, piece).expect("discarded");
    holds[0] = 0;
    volume.delete_snapshot(snapshot, &mut |_, _| {}).expect("deleted");
    check(&volume, &holds);
    check_good(&volume);
    // The holes are room again.
    for i in 0..16 {
        volume.write(i * piece, &vec![3; piece as usize]).expect("written");
        volume.flush().expect("flushed");
    }
    volume.close().expect("closed");
}

/// Also where a snapshot's checkpoint is what made the discards durable, and no FLUSH follows.
#[test]
fn what_was_discarded_finds_room_again_without_a_flush() {
    let (provider, blocks) = (Provider::new(AnchorMode::Close), 1024);
    let volume = provider.create(SimStore::new(), blocks * 4096).expect("a volume");
    for round in 0..3 {
        for lba in 0..blocks {
            volume.write(lba * 4096, &[round; 4096]).expect("there is room");
        }
        volume.discard(0, blocks * 4096).expect("discarded");
        volume.take_snapshot("of nothing").expect("taken");
    }
    check_good(&volume);
}

/// Of the two copies of its last superblock one may be there and the other not: whoever looks, and writes nothing, finds no fault with it.
#[test]
fn a_close_that_is_cut_off_leaves_nothing_to_complain_of() {
    let (provider, store) = (Provider::new(AnchorMode::Close), SimStore::new());
    filled(&provider, &store, MIB).close().expect("closed");
    for at in 1.. {
        let volume = provider.open(store.clone()).expect("opens");
        volume.write(0, &[1; 4096]).expect("written");
        store.burn(at);
        let closed = volume.close().is_ok();
        drop(volume);
        store.repair();
        check_good(&provider.open_read_only(store.clone()).expect("opens"));
        if closed {
            break;
        }
    }
}

/// A checkpoint needs more pages at once than the smallest cache keeps: leaves that changed, each under a page of its own.
#[test]
fn a_checkpoint_of_changes_far_apart_ends_with_the_smallest_cache() {
    let (far, count) = (64 * 64 * 4096, 700);
    let provider = Provider::new(AnchorMode::Close);
    let file = tempfile::NamedTempFile::new().expect("a file");
    let store = || FileStore::exclusive(file.reopen().expect("opens")).expect("a store");
    let volume = provider.create(store(), far * count).expect("a volume");
    let fill = move |volume: &Volume, value: u8| {
        let data = [value; 4096];
        let all: Vec<(u64, &[u8])> = (0..count).map(|i| (i * far, &data[..])).collect();
        assert!(volume.write_many(&all).iter().all(Result::is_ok));
    };
    fill(&volume, 1);
    volume.close().expect("closed");
    drop(volume);
    let options = OpenOptions { map_cache: 0, ..OpenOptions::default() };
    let volume = provider.open_with(store(), &provider.grant(), options).expect("opens");
    let (done, ended) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        fill(&volume, 2);
        volume.checkpoint().expect("a checkpoint");
        let _ = done.send(volume);
    });
    let volume = ended.recv_timeout(std::time::Duration::from_secs(120)).expect("a checkpoint within 120 s");
    check_good(&volume);
}
