//! `bench disk`: the volume in process, against the same crypto in a loop, plain files and QEMU's LUKS.
//!
//! On the disk all of them go past the page cache: what is compared there is what the disk does.
//!
//! Each round does every piece of work twice with every subject in turn; the second time counts. Writes go to places that were
//! written before, so that no subject pays for new pages of the file system. Rates are shown twice: by the wall's clock, and by the
//! processor time of all this process (`per core`), which a busy machine disturbs less.

mod opening;
mod qemu;
mod sharing;
mod subject;

use super::BenchError;
use super::printer::Printer;
use blockcrypt::FileStore;
use fealty_disk::bench::{Figure, HalfFull, Limit, Plain, Rates, Subject, WORKS, Work, ciphers, fill, interleave};
use qemu::Luks;
use std::path::{Path, PathBuf};
use std::time::Instant;
use subject::Loop;

/// Bytes of each subject's data.
const SIZE: u64 = 256 << 20;
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
    let (limit, figures) = ciphers(rounds)?;
    figures.into_iter().for_each(|figure| printer.add(figure));
    for (name, folder, direct) in [("tmpfs", &places.tmpfs, false), ("disk", &places.disk, true)] {
        let folder = in_folder(folder)?;
        Place::new(name, folder.path(), direct)?.measure(rounds, &limit, printer)?;
    }
    let (tmpfs, disk) = (in_folder(&places.tmpfs)?, in_folder(&places.disk)?);
    sharing::run(rounds, tmpfs.path(), printer)?;
    opening::run(rounds, places.mapped << 20, tmpfs.path(), disk.path(), printer)
}

/// A folder of this run's own.
fn in_folder(place: &Path) -> Result<tempfile::TempDir, BenchError> {
    tempfile::tempdir_in(place).map_err(|error| BenchError::Io(place.to_owned(), error))
}

/// The subjects in one folder.
struct Place<'a> {
    name: &'a str,
    fealty: HalfFull,
    alike: Loop,
    raw: Plain<FileStore>,
    luks: Luks,
}

impl<'a> Place<'a> {
    fn new(name: &'a str, folder: &Path, direct: bool) -> Result<Self, BenchError> {
        let place = Self {
            name,
            fealty: HalfFull::new(subject::store_with(&folder.join("fealty"), direct)?, SIZE, &mut |_| {})?,
            alike: Loop::new(&folder.join("loop"), SIZE, direct)?,
            raw: Plain::new(subject::store_with(&folder.join("raw"), direct)?, SIZE)?,
            luks: Luks::new(&folder.join("luks"), SIZE, direct)?,
        };
        // Twice, so that also the blocks that a copy-on-write volume moves to were written before.
        for _ in 0..2 {
            for subject in [&place.fealty as &dyn Subject, &place.alike, &place.raw] {
                fill(subject, SIZE, &mut |_| {})?;
            }
        }
        Ok(place)
    }

    fn measure(&self, rounds: u32, limit: &Limit, printer: &mut Printer) -> Result<(), BenchError> {
        let all = interleave(
            &WORKS,
            rounds,
            [
                &|work, seed| Ok(work.run(&self.fealty, SIZE, seed)?),
                &|work, seed| Ok(work.run(&self.alike, SIZE, seed)?),
                &|work, seed| Ok(work.run(&self.raw, SIZE, seed)?),
                &|work, seed| self.luks.run(work, SIZE, seed),
            ],
            &mut |_| {},
        )?;
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
        printer.add(figure(true).at_least("the same crypto in a loop", &alike.core, target(sequential, BY_LOOP)));
        printer.add(figure(false).at_least("the same crypto in a loop", &alike.wall, None));
        printer.add(figure(false).at_least("qemu-io's LUKS", &luks.wall, target(sequential, BY_LUKS)));
        let deep = self.name == "disk" && work.threads * work.batch > 1;
        printer.add(figure(false).at_least("the store without crypto", &raw.wall, target(deep, BY_RAW)));
        if sequential {
            if work.write {
                let after = Figure::new(format!("{name}, after other work, per core"), unit, &fealty.first);
                printer.add(after.at_least("the same crypto in a loop", &alike.first, None));
            }
            printer.add(figure(true).at_least("the crypto alone", &limit.of(work), None));
        }
    }
}

/// Milliseconds that something took.
fn ms<R>(what: impl FnOnce() -> R) -> (f64, R) {
    let start = Instant::now();
    let result = what();
    (start.elapsed().as_secs_f64() * 1e3, result)
}
