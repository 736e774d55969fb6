//! What it costs that threads share a volume: the same work by two threads on one volume, and on one for each.
//!
//! The engine's one lock is held over memory only. If it, or anything else that requests share, kept them waiting, two threads on one
//! volume would do less than two threads that have nothing in common.
//!
//! QEMU's LUKS driver encrypts in one thread whoever asks, so that what it does by its own clock, one large request after the other,
//! is all that it does. The target is for one processor's work, and stands beside that of one thread; two threads have none.

use super::qemu::Luks;
use super::subject;
use crate::bench::BenchError;
use crate::bench::printer::Printer;
use fealty_disk::bench::{Figure, HalfFull, MeasureError, Samples, Subject, Work, fill};
use std::cell::Cell;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Bytes of each volume.
const SIZE: u64 = 128 << 20;

const fn small(name: &'static str, write: bool) -> Work {
    Work { name, bytes: 4096, write, threads: 2, batch: 32, requests: 4096, flush_each: None }
}

const fn large(name: &'static str, write: bool) -> Work {
    Work { name, bytes: 1 << 20, write, threads: 2, batch: 1, requests: 64, flush_each: None }
}

const WORKS: [Work; 4] = [
    small("4 KiB random write, depth 32", true),
    small("4 KiB random read, depth 32", false),
    large("1 MiB sequential write", true),
    large("1 MiB sequential read", false),
];

/// In `folder`, which is in memory: a disk would be what they share.
pub(super) fn run(rounds: u32, folder: &Path, printer: &mut Printer) -> Result<(), BenchError> {
    let one = Volumes::new(folder, &["shared"])?;
    let two = Volumes::new(folder, &["first", "second"])?;
    let luks = Luks::new(&folder.join("luks"), SIZE, false)?;
    let mut all: Vec<[Samples; 3]> = WORKS.iter().map(|_| Default::default()).collect();
    for round in 0..rounds {
        let seed = u64::from(round);
        for (work, [for_one, for_two, for_luks]) in WORKS.iter().zip(&mut all) {
            for (volumes, rates) in [(&one, for_one), (&two, for_two)] {
                rates.add(work.rate(work.run(volumes, SIZE, seed)?.wall));
            }
            if work.batch == 1 {
                let work = Work { threads: 1, ..*work };
                for_luks.add(work.rate(luks.run(&work, SIZE, seed)?.wall));
            }
        }
    }
    for (work, [one, two, luks]) in WORKS.iter().zip(&all) {
        let figure = || Figure::new(format!("two threads on one volume: {}, wall", work.name), work.unit(), one);
        printer.add(figure().at_least("a volume for each", two, None));
        if work.batch == 1 {
            printer.add(figure().at_least("qemu-io's LUKS", luks, None));
        }
    }
    Ok(())
}

/// Volumes that threads take in turn.
struct Volumes {
    volumes: Vec<HalfFull>,
    taken: AtomicUsize,
}

thread_local! {
    static OWN: Cell<usize> = const { Cell::new(0) };
}

impl Volumes {
    fn new(folder: &Path, names: &[&str]) -> Result<Self, BenchError> {
        let volume = |name| {
            let volume = HalfFull::new(subject::store(&folder.join(name))?, SIZE, &mut |_| {})?;
            fill(&volume, SIZE, &mut |_| {})?;
            Ok(volume)
        };
        Ok(Self { volumes: names.iter().map(volume).collect::<Result<_, BenchError>>()?, taken: AtomicUsize::new(0) })
    }

    fn own(&self) -> &HalfFull {
        &self.volumes[OWN.get() % self.volumes.len()]
    }
}

impl Subject for Volumes {
    fn read(&self, parts: &mut [(u64, &mut [u8])]) -> Result<(), MeasureError> {
        self.own().read(parts)
    }

    fn write(&self, parts: &[(u64, &[u8])]) -> Result<(), MeasureError> {
        self.own().write(parts)
    }

    fn flush(&self) -> Result<(), MeasureError> {
        self.own().flush()
    }

    fn rest(&self) {
        self.volumes.iter().for_each(Subject::rest);
    }

    fn warm(&self, _bytes: usize) {
        OWN.set(self.taken.fetch_add(1, Ordering::Relaxed));
    }
}
