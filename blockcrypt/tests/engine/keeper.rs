//! A volume's own thread that dies, and what neither it nor whoever waits for the provider keeps others from.

use crate::common::{MIB, Provider, Random, SimStore, check_good, lock};
use fealty_blockcrypt::{AnchorRefused, Anchors, OpenOptions, Store, Volume, VolumeError};
use policy::{AnchorMode, VolumeAnchor};
use std::io;
use std::sync::{Arc, Mutex, mpsc};
use std::time::{Duration, Instant};

const SIZE: u64 = 16 * MIB;
const BLOCK: usize = 4096;
/// A checkpoint is due before so many writes: see `background`.
const DUE: u64 = 64 * 62 * 3 / 8 + 62;

/// A store over which the thread named `volume` panics, once, after so many steps from when it is asked to.
struct Deadly {
    inner: Arc<SimStore>,
    steps: Mutex<Option<u32>>,
}

impl Deadly {
    fn over(inner: Arc<SimStore>) -> Arc<Self> {
        Arc::new(Self { inner, steps: Mutex::new(None) })
    }

    fn panic_after(&self, steps: Option<u32>) {
        *lock(&self.steps) = steps;
    }

    /// Whether it has.
    fn panicked(&self) -> bool {
        lock(&self.steps).is_none()
    }

    fn pass(&self) {
        let mut steps = lock(&self.steps);
        if std::thread::current().name() != Some("volume") {
            return;
        }
        if *steps == Some(0) {
            *steps = None;
            drop(steps);
            panic!("a fault of this program, as a test asks for");
        }
        *steps = steps.map(|left| left - 1);
    }
}

impl Store for Deadly {
    fn len(&self) -> io::Result<u64> {
        self.inner.len()
    }
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        self.inner.read_at(buffer, offset)
    }
    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.pass();
        self.inner.write_at(bytes, offset)
    }
    fn sync_data(&self) -> io::Result<()> {
        self.pass();
        self.inner.sync_data()
    }
    fn set_len(&self, bytes: u64) -> io::Result<()> {
        self.inner.set_len(bytes)
    }
}

fn at(number: u64) -> u64 {
    number * 7 % (SIZE / BLOCK as u64) * BLOCK as u64
}

fn content(number: u64) -> Vec<u8> {
    number.to_le_bytes().repeat(BLOCK / 8)
}

#[track_caller]
fn holds(volume: &Volume, numbers: std::ops::Range<u64>) {
    let mut found = vec![0; BLOCK];
    for number in numbers {
        volume.read(at(number), &mut found).expect("read");
        assert!(found == content(number), "{number}");
    }
}

/// What the checkpoint had of the log is in no log any more.
#[test]
fn wherever_it_panics_nothing_is_called_durable_that_is_not_and_nobody_waits_for_it() {
    let failed = |done: Result<(), VolumeError>| match done {
        Err(VolumeError::Failed(why)) => assert!(why.contains("panicked"), "{why}"),
        other => panic!("{other:?}"),
    };
    // A checkpoint of these has eight.
    for (outlive, steps) in (0..20).map(|i| (i % 2 == 1, i / 2)) {
        println!("outlive {outlive}, after {steps} steps");
        let (provider, sim) = (Provider::new(AnchorMode::Close), SimStore::new());
        let store = Deadly::over(sim.clone());
        provider.create(store.clone(), SIZE).expect("a volume").close().expect("closed");
        let options = OpenOptions { outlive, ..OpenOptions::default() };
        let volume = provider.open_with(store.clone(), &provider.grant(), options).expect("opens");
        const DURABLE: u64 = 100;
        (0..DURABLE).for_each(|number| volume.write(at(number), &content(number)).expect("written"));
        volume.flush().expect("durable");
        store.panic_after(Some(steps));
        let mut number = DURABLE;
        while number < DUE && volume.write(at(number), &content(number)).is_ok() {
            number += 1;
        }
        volume.rest();
        let flushed = volume.flush();
        if store.panicked() {
            failed(flushed);
            failed(volume.write(at(0), &content(0)));
            failed(volume.discard(at(0), BLOCK as u64));
            failed(volume.checkpoint());
            failed(volume.take_snapshot("one").map(drop));
            failed(volume.close().map(drop));
            assert!(provider.heard().iter().any(|event| event.contains("panicked")));
            holds(&volume, 0..number);
            number = DURABLE;
        } else {
            flushed.expect("nobody panicked");
        }
        drop(volume);
        sim.crash(&mut Random(steps.into()));
        let volume = provider.open(sim).expect("opens");
        holds(&volume, 0..number);
        check_good(&volume);
    }
}

/// A provider that keeps some anchors and answers to the next when it is told to.
struct Slow {
    left: Mutex<u32>,
    asked: mpsc::SyncSender<()>,
    answer: Mutex<mpsc::Receiver<()>>,
}

impl Anchors for Slow {
    fn keep(&self, _: &VolumeAnchor) -> Result<(), AnchorRefused> {
        let mut left = self.left.lock().expect("no panic");
        if *left == 0 {
            let _ = self.asked.send(());
            let _ = self.answer.lock().expect("no panic").recv();
        }
        *left = left.saturating_sub(1);
        Ok(())
    }
}

impl Slow {
    /// One that answers to so many at once; what hears when it is asked for the next, and what lets it answer when that is dropped.
    fn after(left: u32) -> (Arc<Self>, mpsc::Receiver<()>, mpsc::Sender<()>) {
        let (asked, hears) = mpsc::sync_channel(8);
        let (answers, answer) = mpsc::channel();
        (Arc::new(Self { left: Mutex::new(left), asked, answer: Mutex::new(answer) }), hears, answers)
    }
}

#[test]
fn a_rewrap_that_waits_for_its_last_anchor_holds_up_no_writes() {
    let (provider, sim) = (Provider::new(AnchorMode::Flush), SimStore::new());
    provider.create(sim.clone(), MIB).expect("a volume").close().expect("closed");
    // The opener's, and the one after which the old key may go.
    let (slow, hears, answers) = Slow::after(2);
    let (grant, old) = (provider.grant(), provider.kek());
    let volume = Volume::open(sim, &grant, &old, OpenOptions::default(), slow, provider.clone()).expect("opens");
    provider.set_kek(78, 8);
    let new = provider.kek();
    std::thread::scope(|scope| {
        let rewrap = scope.spawn(|| volume.rewrap(&old, &new));
        hears.recv().expect("asked");
        let writer = scope.spawn(|| volume.write(0, &content(1)));
        let begun = Instant::now();
        while !writer.is_finished() && begun.elapsed() < Duration::from_secs(10) {
            std::thread::sleep(Duration::from_millis(1));
        }
        let waited = !writer.is_finished();
        drop(answers);
        assert!(!waited, "the write waits for the provider");
        writer.join().expect("no panic").expect("written");
        rewrap.join().expect("no panic").expect("rewrapped");
    });
    check_good(&volume);
}

/// The volume's own thread is where the provider hangs, or a FLUSH is.
#[test]
fn writes_and_the_checkpoints_that_they_need_wait_for_no_provider() {
    for mode in [AnchorMode::Interval, AnchorMode::Flush] {
        let (provider, sim) = (Provider::new(mode), SimStore::new());
        provider.create(sim.clone(), SIZE).expect("a volume").close().expect("closed");
        let (slow, hears, answers) = Slow::after(1);
        let (grant, kek) = (provider.grant(), provider.kek());
        let volume = Volume::open(sim, &grant, &kek, OpenOptions::default(), slow, provider.clone()).expect("opens");
        volume.write(at(0), &content(0)).expect("written");
        std::thread::scope(|scope| {
            let flush = scope.spawn(|| volume.flush());
            hears.recv().expect("asked");
            let epoch = volume.info().epoch;
            // Several times what the log holds.
            (0..4 * DUE).for_each(|number| volume.write(at(number), &content(number)).expect("written"));
            assert!(volume.info().epoch > epoch);
            assert!(mode == AnchorMode::Interval || !flush.is_finished(), "it is not anchored yet");
            drop(answers);
            flush.join().expect("no panic").expect("flushed");
        });
        volume.close().expect("closed");
    }
}
