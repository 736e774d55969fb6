//! `bench disk`: the volume in process, against the same crypto in a loop, plain files and QEMU's LUKS.
//!
//! On the disk all of them go past the page cache: what is compared there is what the disk does.
//!
//! Each round does every piece of work with every subject in turn. Writes go to places that were written before, so that no
//! subject pays for new pages of the file system. Rates are shown twice: by the wall's clock, and by the processor time of
//! the threads that ask (`per core`), which a busy machine disturbs less.

mod keeper;
mod opening;
mod qemu;
mod subject;
mod work;

use super::BenchError;
use super::figure::{Figure, Printer};
use super::sample::Samples;
use blockcrypt::bench::Ciphers;
use qemu::Luks;
use std::path::{Path, PathBuf};
use std::time::Instant;
use subject::{Fealty, Loop, Raw, Subject};
use work::{Timing, WORKS, Work};

pub(super) use work::thread_time;

/// Bytes of each subject's data.
const SIZE: u64 = 256 << 20;
/// Rounds before those that count.
const WARM_UP: u32 = 1;
/// Bytes on which the ciphers alone are measured: they stay in the second-level cache.
const CACHED: usize = 64 << 10;

/// Targets (DESIGN.md, section 11, and what was asked for the volume).
const BY_LUKS: f64 = 5.0;
const BY_LOOP: f64 = 0.8;
const BY_RAW: f64 = 0.9;

/// Where volumes are put.
#[derive(Debug, Clone, clap::Args)]
pub(super) struct Places {
    /// A folder in memory.
    #[arg(long, default_value = "/dev/shm")]
    tmpfs: PathBuf,
    /// A folder on a disk.
    #[arg(long, default_value = "/var/tmp")]
    disk: PathBuf,
    /// MiB that are mapped in the volume of 1 TiB whose opening is measured.
    #[arg(long, default_value_t = 2048)]
    mapped: u64,
}

/// Measures and prints.
pub(super) fn run(rounds: u32, places: &Places, printer: &mut Printer) -> Result<(), BenchError> {
    let limit = ciphers(rounds, printer)?;
    for (name, folder, direct) in [("tmpfs", &places.tmpfs, false), ("disk", &places.disk, true)] {
        let folder = tempfile::tempdir_in(folder).map_err(|error| BenchError::Io(folder.clone(), error))?;
        Place::new(name, folder.path(), direct)?.measure(rounds, &limit, printer)?;
    }
    let folder = tempfile::tempdir_in(&places.tmpfs).map_err(|error| BenchError::Io(places.tmpfs.clone(), error))?;
    opening::run(rounds, places.mapped << 20, folder.path(), printer)
}

/// What the ciphers do alone, GB/s, on cached buffers.
struct Limit {
    seal: Samples,
    open: Samples,
}

/// Every path of the ciphers, each compared with the crates that do one thing at a time.
fn ciphers(rounds: u32, printer: &mut Printer) -> Result<Limit, BenchError> {
    let all = Ciphers::all().map_err(BenchError::volume("expand a key"))?;
    let mut rates: Vec<[Samples; 4]> = vec![Default::default(); all.len()];
    let mut limit = Limit { seal: Samples::default(), open: Samples::default() };
    let mut data = vec![0x5a; CACHED];
    for _ in 0..rounds {
        for (n, (ciphers, [xts, mac, seal, one])) in all.iter().zip(&mut rates).enumerate() {
            xts.add(rate(CACHED, || ciphers.part(true, &mut data)));
            mac.add(rate(CACHED, || ciphers.part(false, &mut data)));
            let mut sealed = Vec::new();
            seal.add(rate(CACHED, || sealed = ciphers.seal(None, &mut data).unwrap_or_default()));
            one.add(rate(4096, || drop(ciphers.seal(None, &mut data[..4096]))));
            if n == 0 {
                limit.seal.add(rate(CACHED, || sealed = ciphers.seal(None, &mut data).unwrap_or_default()));
                let stored = data.clone();
                limit.open.add(rate(CACHED, || {
                    data.copy_from_slice(&stored);
                    assert!(ciphers.open(&sealed, &mut data), "what was sealed opens");
                }));
            }
        }
    }
    let portable = rates.last().cloned().unwrap_or_default();
    for (ciphers, rates) in all.iter().zip(&rates) {
        let parts = ["XTS alone", "HMAC alone", "seal", "seal, 4 KiB alone"];
        for ((part, samples), portable) in parts.iter().zip(rates).zip(&portable) {
            let name = format!("ciphers: {part}, {}", ciphers.name());
            printer.add(&Figure::new(name, "GB/s", samples).at_least("with the sha2 crate", portable, None));
        }
    }
    Ok(limit)
}

/// GB/s by this thread's processor time.
fn rate(bytes: usize, mut what: impl FnMut()) -> f64 {
    let times = (2 << 20) / bytes;
    let start = work::thread_time();
    (0..times).for_each(|_| what());
    (times * bytes) as f64 / (work::thread_time() - start) / 1e9
}

/// The subjects in one folder.
struct Place<'a> {
    name: &'a str,
    fealty: Fealty,
    alike: Loop,
    raw: Raw,
    luks: Luks,
}

/// What one piece of work gave.
#[derive(Default)]
struct Rates {
    wall: Samples,
    core: Samples,
}

impl Rates {
    fn add(&mut self, work: &Work, timing: &Timing) {
        self.wall.add(work.rate(timing.wall));
        self.core.add(work.rate(timing.core));
    }
}

impl<'a> Place<'a> {
    fn new(name: &'a str, folder: &Path, direct: bool) -> Result<Self, BenchError> {
        let place = Self {
            name,
            fealty: Fealty::new(&folder.join("fealty"), SIZE, direct)?,
            alike: Loop::new(&folder.join("loop"), SIZE, direct)?,
            raw: Raw::new(&folder.join("raw"), SIZE, direct)?,
            luks: Luks::new(&folder.join("luks"), SIZE, direct)?,
        };
        // Twice, so that also the blocks that a copy-on-write volume moves to were written before.
        for _ in 0..2 {
            for subject in [&place.fealty as &dyn Subject, &place.alike, &place.raw] {
                subject::fill(subject, SIZE)?;
            }
        }
        Ok(place)
    }

    fn measure(&self, rounds: u32, limit: &Limit, printer: &mut Printer) -> Result<(), BenchError> {
        let mut all: Vec<[Rates; 4]> = WORKS.iter().map(|_| Default::default()).collect();
        for round in 0..rounds + WARM_UP {
            for (work, [fealty, alike, raw, luks]) in WORKS.iter().zip(&mut all) {
                let seed = u64::from(round);
                let timings = [
                    work.run(&self.fealty, SIZE, seed)?,
                    work.run(&self.alike, SIZE, seed)?,
                    work.run(&self.raw, SIZE, seed)?,
                    self.luks.run(work, SIZE, seed)?,
                ];
                if round >= WARM_UP {
                    for (rates, timing) in [fealty, alike, raw, luks].into_iter().zip(timings) {
                        rates.add(work, &timing);
                    }
                }
            }
        }
        for (work, rates) in WORKS.iter().zip(&all) {
            self.print(work, rates, limit, printer);
        }
        Ok(())
    }

    fn print(&self, work: &Work, [fealty, alike, raw, luks]: &[Rates; 4], limit: &Limit, printer: &mut Printer) {
        let (name, unit) = (format!("{}: {}", self.name, work.name), work.unit());
        let sequential = work.bytes > 4096 && work.flush_each.is_none();
        let figure = |core| {
            let (how, samples) = if core { ("per core", &fealty.core) } else { ("wall", &fealty.wall) };
            Figure::new(format!("{name}, {how}"), unit, samples)
        };
        let target = |applies: bool, target| if applies { Some(target) } else { None };
        printer.add(&figure(true).at_least("the same crypto in a loop", &alike.core, target(sequential, BY_LOOP)));
        printer.add(&figure(false).at_least("the same crypto in a loop", &alike.wall, None));
        printer.add(&figure(false).at_least("qemu-io's LUKS", &luks.wall, target(sequential, BY_LUKS)));
        let deep = self.name == "disk" && work.threads > 1;
        printer.add(&figure(false).at_least("the store without crypto", &raw.wall, target(deep, BY_RAW)));
        if sequential {
            let limit = if work.write { &limit.seal } else { &limit.open };
            printer.add(&figure(true).at_least("the crypto alone", limit, None));
        }
    }
}

/// Milliseconds that something took.
fn ms<R>(what: impl FnOnce() -> R) -> (f64, R) {
    let start = Instant::now();
    let result = what();
    (start.elapsed().as_secs_f64() * 1e3, result)
}
