//! Random histories over an honest store that fails for a while and then works again: reads, writes that get half of the way, room,
//! syncs after which the kernel has given up what it could not write. The holder goes on as long as it can. No acknowledged FLUSH
//! is lost, nothing is ever wrong, and nobody cries tampering.

use crate::common::{Provider, Random, Replay, SimStore, check_good, lock, options, seeds, write_out_of_order};
use crate::hostile::BLOCK;
use crate::known::{Known, content};
use fealty_blockcrypt::{Next, OpenOptions, Store, Volume, VolumeError};
use policy::AnchorMode;
use std::io;
use std::sync::{Arc, Mutex};

const BLOCKS: u64 = 200;
const SECTOR: usize = 512;

/// A store that fails now and then.
pub(crate) struct Faulty {
    inner: Arc<SimStore>,
    faults: Mutex<Faults>,
}

struct Faults {
    random: Random,
    /// How many calls of a hundred fail, and how many more calls it goes on.
    percent: u64,
    left: u64,
    /// Which calls.
    reads: bool,
    writes: bool,
    syncs: bool,
    /// There is no room, rather than no device.
    full: bool,
    /// What is said to have failed was done.
    done: bool,
}

impl Faulty {
    pub(crate) fn over(inner: Arc<SimStore>, seed: u64) -> Arc<Self> {
        let random = Random(seed ^ 0xfa17);
        let faults =
            Faults { random, percent: 0, left: 0, reads: false, writes: false, syncs: false, full: false, done: false };
        Arc::new(Self { inner, faults: Mutex::new(faults) })
    }

    /// Something begins to fail; says what.
    pub(crate) fn begin(&self, random: &mut Random) -> String {
        let mut faults = lock(&self.faults);
        faults.percent = [5, 30, 100][random.below(3) as usize];
        faults.left = 1 + random.below(40);
        let kind = random.below(6);
        faults.reads = [0, 4].contains(&kind);
        faults.writes = [1, 2, 4, 5].contains(&kind);
        faults.syncs = [3, 5].contains(&kind);
        faults.full = kind == 2;
        faults.done = random.chance(25);
        let Faults { percent, left, reads, writes, syncs, full, done, .. } = *faults;
        format!(
            "{percent} % of {left} calls fail: reads {reads}, writes {writes}, syncs {syncs}, room {full}; done all the same: {done}"
        )
    }

    pub(crate) fn end(&self) {
        lock(&self.faults).left = 0;
    }

    /// Whether this call fails, and if so how far a transfer of so many sectors gets.
    fn fails(&self, which: fn(&Faults) -> bool, sectors: usize) -> Option<(usize, io::Error)> {
        let mut faults = lock(&self.faults);
        if !which(&faults) || faults.left == 0 {
            return None;
        }
        faults.left -= 1;
        let percent = faults.percent;
        if !faults.random.chance(percent) {
            return None;
        }
        let error = if faults.full { io::ErrorKind::StorageFull.into() } else { io::Error::other("no device") };
        let some = faults.random.below(sectors as u64 + 1) as usize;
        Some((if faults.done { sectors } else { some }, error))
    }
}

impl Store for Faulty {
    fn len(&self) -> io::Result<u64> {
        self.inner.len()
    }
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        match self.fails(|faults| faults.reads, buffer.len() / SECTOR) {
            None => self.inner.read_at(buffer, offset),
            Some((sectors, error)) => {
                self.inner.read_at(&mut buffer[..sectors * SECTOR], offset)?;
                Err(error)
            }
        }
    }
    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        match self.fails(|faults| faults.writes, bytes.len() / SECTOR) {
            None => self.inner.write_at(bytes, offset),
            Some((sectors, error)) => {
                self.inner.write_at(&bytes[..sectors * SECTOR], offset)?;
                Err(error)
            }
        }
    }
    fn overlaps(&self) -> bool {
        self.inner.overlaps()
    }
    fn write_lots_at<'a>(&self, next: &mut Next<'a, '_>) -> io::Result<()> {
        write_out_of_order(self, next)
    }
    fn sync_data(&self) -> io::Result<()> {
        match self.fails(|faults| faults.syncs, 0) {
            None => self.inner.sync_data(),
            Some((_, error)) => {
                let mut random = lock(&self.faults).random.clone();
                self.inner.fail_sync(&mut random);
                Err(error)
            }
        }
    }
    fn drop_cached(&self) -> io::Result<()> {
        self.inner.drop_cached()
    }
    fn set_len(&self, bytes: u64) -> io::Result<()> {
        self.inner.set_len(bytes)
    }
    fn reserve(&self, offset: u64, bytes: u64) -> io::Result<()> {
        match self.fails(|faults| faults.full, 0) {
            None => self.inner.reserve(offset, bytes),
            Some((_, error)) => Err(error),
        }
    }
    fn punch(&self, offset: u64, bytes: u64) -> io::Result<()> {
        match self.fails(|faults| faults.writes && !faults.full, 0) {
            None => self.inner.punch(offset, bytes),
            Some((_, error)) => Err(error),
        }
    }
}

#[derive(Default, Debug)]
struct Tally {
    failed: u64,
    succeeded: u64,
    /// Volumes that took no more writes, and openings that came to nothing.
    dead: u64,
    unopened: u64,
}

struct History {
    provider: Arc<Provider>,
    options: OpenOptions,
    disk: Arc<SimStore>,
    store: Arc<Faulty>,
    known: Vec<Known>,
    random: Random,
    context: String,
    tally: Tally,
}

impl History {
    fn tell(&self, what: &dyn std::fmt::Display) {
        if std::env::var_os("FEALTY_SEED").is_some() {
            println!("{}: {what}", self.context);
        }
    }

    /// What a request came to: the store's fault, if anything; never the owner's.
    fn heard(&mut self, done: &Result<(), VolumeError>) {
        match done {
            Ok(()) => self.tally.succeeded += 1,
            Err(error) => {
                self.tell(error);
                let fault = matches!(error, VolumeError::Store(..) | VolumeError::Full(_) | VolumeError::Failed(_));
                assert!(fault, "{}: {error}", self.context);
                self.tally.failed += 1;
            }
        }
    }

    fn read(&mut self, volume: &Volume, first: u64, count: u64) {
        for lba in first..first + count {
            let mut found = vec![0xee; BLOCK];
            let done = volume.read(lba * BLOCK as u64, &mut found);
            let known = &mut self.known[lba as usize];
            if done.is_ok() {
                let what = u64::from_le_bytes(found[8..16].try_into().expect("8 bytes"));
                assert!(known.may_be(&found, false), "{}: block {lba} holds {what}", self.context);
                known.now = [Arc::new(found)].into();
            }
            self.heard(&done);
        }
    }

    fn flush(&mut self, volume: &Volume) {
        let done = volume.flush();
        if done.is_ok() {
            self.known.iter_mut().for_each(|known| known.since.clear());
        }
        self.heard(&done);
    }

    fn step(&mut self, volume: &Volume) {
        let first = self.random.below(BLOCKS);
        let most = [1, 8, 70][self.random.below(3) as usize];
        let count = (1 + self.random.below(most)).min(BLOCKS - first);
        let kind = self.random.below(100);
        self.tell(&format_args!("kind {kind}, {count} blocks from {first}"));
        let blocks = first as usize..(first + count) as usize;
        match kind {
            0..30 => self.read(volume, first, count),
            30..60 => {
                let number = self.random.number() >> 1;
                let data: Vec<Vec<u8>> = (first..first + count).map(|lba| content(lba, number)).collect();
                let asked: Vec<(u64, &[u8])> =
                    (first..).zip(&data).map(|(lba, data)| (lba * BLOCK as u64, &data[..])).collect();
                self.tell(&format_args!("number {number}"));
                let done = volume.write_many(&asked);
                for ((known, data), done) in self.known[blocks].iter_mut().zip(&data).zip(&done) {
                    known.write(0, data, done.is_err());
                }
                done.iter().for_each(|done| self.heard(done));
            }
            60..66 => {
                self.tell(&"a part");
                let mut data = vec![0; 1536];
                self.random.fill(&mut data);
                let done = volume.write(first * BLOCK as u64 + 512, &data);
                self.known[first as usize].write(512, &data, done.is_err());
                self.heard(&done);
            }
            66..76 => {
                let (at, length) = (first * BLOCK as u64, count * BLOCK as u64);
                let done = if self.random.chance(50) {
                    volume.discard(at, length)
                } else {
                    volume.write_zeroes(at, length, self.random.chance(50))
                };
                self.known[blocks].iter_mut().for_each(|known| known.write(0, &[0; BLOCK], done.is_err()));
                self.heard(&done);
            }
            76..93 => self.flush(volume),
            _ => {
                let done = volume.checkpoint();
                if done.is_ok() {
                    self.known.iter_mut().for_each(|known| known.since.clear());
                }
                self.heard(&done);
            }
        }
    }

    /// The store works again: so does the volume, unless it does not know what is durable.
    fn mend(&mut self, volume: &Volume) {
        self.store.end();
        self.tell(&"the store works again");
        self.read(volume, 0, BLOCKS);
        let data = content(7, self.random.number() >> 1);
        let done = volume.write(7 * BLOCK as u64, &data);
        self.known[7].write(0, &data, done.is_err());
        match done {
            Ok(()) => {
                self.flush(volume);
                assert!(self.known[7].since.is_empty(), "{}: a FLUSH of a store that works", self.context);
            }
            Err(error) => {
                assert!(matches!(error, VolumeError::Failed(_)), "{}: {error}", self.context);
                self.tally.dead += 1;
            }
        }
    }

    fn open(&mut self) -> Volume {
        if self.random.chance(40) {
            let what = self.store.begin(&mut self.random);
            self.tell(&what);
            let opened = self.try_open();
            let done = opened.as_ref().map(|_| ());
            match done {
                Ok(()) => return opened.expect("just seen"),
                Err(_) => self.heard(&opened.map(|_| ())),
            }
            self.tally.unopened += 1;
            self.store.end();
            if self.random.chance(50) {
                self.tell(&"the power fails");
                self.disk.crash(&mut self.random);
            }
        }
        self.try_open().unwrap_or_else(|e| panic!("{}: {e}", self.context))
    }

    fn try_open(&self) -> Result<Volume, VolumeError> {
        self.provider.open_with(self.store.clone(), &self.provider.grant(), self.options)
    }

    fn run(&mut self, lives: u64) {
        let context = self.context.clone();
        for life in 0..lives {
            self.context = format!("{context} life {life}");
            let volume = self.open();
            self.store.end();
            self.known.iter_mut().for_each(Known::opened);
            self.read(&volume, 0, BLOCKS);
            if self.random.chance(40) {
                check_good(&volume);
            }
            for _ in 0..1 + self.random.below(80) {
                if self.random.chance(8) {
                    let what = self.store.begin(&mut self.random);
                    self.tell(&what);
                }
                if self.random.chance(6) {
                    self.mend(&volume);
                }
                self.step(&volume);
            }
            if self.random.chance(30) && volume.close().is_ok() {
                self.tell(&"closed");
                self.known.iter_mut().for_each(|known| known.since.clear());
            }
            drop(volume);
            self.store.end();
            if self.random.chance(60) {
                self.tell(&"the power fails");
                self.disk.crash(&mut self.random);
            }
        }
        assert_eq!(self.provider.noticed(), [], "{context}: nobody tampered with it");
    }
}

/// Those with checkpoints in the background don't do the same again with the same seed.
fn histories(mode: AnchorMode, background: bool, first: u64, count: u64) {
    let mut all = Tally::default();
    for seed in seeds(first, count) {
        let name = if background { "in_background".to_owned() } else { format!("{mode:?}").to_lowercase() };
        let _replay = Replay { test: format!("faults::a_store_that_fails_{name}"), seed };
        let (provider, disk) = (Provider::new(mode), SimStore::new());
        let options = OpenOptions { outlive: seed % 2 == 1, background, ..options() };
        if seed % 4 >= 2 {
            disk.overlap();
        }
        let store = Faulty::over(disk.clone(), seed);
        provider.create(store.clone(), BLOCKS * BLOCK as u64).expect("a volume").close().expect("closed");
        let known = vec![Known::zero(); BLOCKS as usize];
        let (random, context) = (Random(seed), format!("{mode:?} seed {seed}"));
        let mut history = History { provider, options, disk, store, known, random, context, tally: Tally::default() };
        history.run(3 + seed % 7);
        let Tally { failed, succeeded, dead, unopened } = history.tally;
        all.failed += failed;
        all.succeeded += succeeded;
        all.dead += dead;
        all.unopened += unopened;
    }
    println!("{all:?}");
    if std::env::var_os("FEALTY_SEED").is_none() {
        assert!(all.failed > 100 && all.dead > 3 && all.unopened > 3, "the store did not fail: {all:?}");
    }
}

/// The block of the log arrives and is said to have failed; then a checkpoint has newer things to say. Nobody may replay that block.
#[test]
fn a_block_of_the_log_that_was_given_up_is_not_replayed_over_a_newer_map() {
    for close in [false, true] {
        let (provider, disk) = (Provider::new(AnchorMode::Close), SimStore::new());
        let store = Faulty::over(disk.clone(), 0);
        provider.create(store.clone(), BLOCKS * BLOCK as u64).expect("a volume").close().expect("closed");
        let volume = provider.open(store.clone()).expect("opens");
        for lba in 0..100 {
            volume.write(lba * BLOCK as u64, &content(lba, 1)).expect("written");
        }
        (lock(&store.faults).percent, lock(&store.faults).left) = (100, 1);
        (lock(&store.faults).writes, lock(&store.faults).done) = (true, true);
        assert!(matches!(volume.flush(), Err(VolumeError::Store(..))));
        volume.discard(0, BLOCK as u64).expect("discarded");
        volume.write(BLOCK as u64, &content(1, 2)).expect("written");
        if close {
            volume.close().expect("closed");
        } else {
            volume.checkpoint().expect("written");
            volume.write(2 * BLOCK as u64, &content(2, 3)).expect("written");
            volume.flush().expect("flushed");
        }
        drop(volume);
        disk.crash(&mut Random(1));
        let volume = provider.open(store.clone()).expect("opens");
        for (lba, number) in [(1, 2), (2, if close { 1 } else { 3 }), (99, 1)] {
            let mut found = vec![0; BLOCK];
            volume.read(lba * BLOCK as u64, &mut found).expect("read");
            assert!(found == content(lba, number), "{lba}, close: {close}");
        }
        let mut found = vec![1; BLOCK];
        volume.read(0, &mut found).expect("read");
        assert!(found == [0; BLOCK], "what was discarded is back, close: {close}");
        check_good(&volume);
    }
}

#[test]
fn a_store_that_fails_close() {
    histories(AnchorMode::Close, false, 600_000, 40);
}

#[test]
fn a_store_that_fails_interval() {
    histories(AnchorMode::Interval, false, 700_000, 40);
}

#[test]
fn a_store_that_fails_flush() {
    histories(AnchorMode::Flush, false, 800_000, 40);
}

#[test]
fn a_store_that_fails_in_background() {
    histories(AnchorMode::Close, true, 1_200_000, 40);
}
