//! How long opening takes, in order and after a crash, and what the metadata take.

use super::{ms, subject};
use crate::bench::BenchError;
use crate::bench::printer::Printer;
use blockcrypt::Volume;
use fealty_disk::bench::{Figure, Keeper, Samples};
use std::path::Path;
use std::sync::Arc;

/// The volume whose opening is measured.
const THIN: u64 = 1 << 40;
/// The volume whose recovery is measured: it has the longest log.
const LOGGED: u64 = 4 << 30;
/// Where its requests go: few enough pages that the log is full before memory is.
const REGION: u64 = 192 << 20;
/// Its writes from one FLUSH to the next, where there are many.
const FLUSH_EACH: u64 = 1024;
/// The volume whose metadata are counted.
const COUNTED: u64 = 1 << 30;
/// How often the slow things are done.
const ROUNDS: u32 = 5;

/// Targets, from what was asked for the volume.
const OPEN_MS: f64 = 100.0;
const RECOVERY_MS: f64 = 2000.0;
const METADATA_PERCENT: f64 = 2.0;

/// All of it in memory, and recovery also on a disk.
pub(super) fn run(
    rounds: u32,
    mapped: u64,
    tmpfs: &Path,
    disk: &Path,
    printer: &mut Printer,
) -> Result<(), BenchError> {
    open(rounds, mapped, tmpfs, printer)?;
    for place in [("tmpfs", tmpfs), ("disk", disk)] {
        recovery(rounds.min(ROUNDS), place, printer)?;
    }
    metadata(tmpfs, printer)
}

/// A volume of 1 TiB of which `mapped` bytes are written, in pieces of 64 MiB all over it.
fn open(rounds: u32, mapped: u64, folder: &Path, printer: &mut Printer) -> Result<(), BenchError> {
    let (path, keeper) = (folder.join("thin"), keeper()?);
    let volume = keeper.create(subject::store(&path)?, THIN).map_err(BenchError::volume("make a volume"))?;
    let (data, pieces) = (vec![0x5a; 1 << 20], (mapped >> 26).max(1));
    for i in 0..mapped >> 20 {
        let offset = (i / 64) * (THIN / pieces / 4096 * 4096) + ((i % 64) << 20);
        volume.write(offset, &data).map_err(BenchError::volume("write"))?;
    }
    volume.close().map_err(BenchError::volume("close"))?;
    drop(volume);
    let mut times = Samples::default();
    for _ in 0..rounds {
        let store = subject::store(&path)?;
        let (time, volume) = ms(|| keeper.open(store));
        times.add(time);
        volume.and_then(|volume| volume.close()).map_err(BenchError::volume("open"))?;
    }
    let name = format!("open a volume of 1 TiB, {} MiB mapped", mapped >> 20);
    printer.add(Figure::new(name, "ms", &times).limit(OPEN_MS));
    std::fs::remove_file(&path).map_err(|error| BenchError::Io(path, error))
}

/// A process that ends just before a checkpoint would have emptied its log: behind the first FLUSH of all, so that recovery must look at
/// each write's data, or with one every so many writes, so that it takes the log's word for it.
fn recovery(rounds: u32, (name, folder): (&str, &Path), printer: &mut Printer) -> Result<(), BenchError> {
    for (how, flush_each) in [("one FLUSH", u64::MAX), ("many", FLUSH_EACH)] {
        let (path, keeper) = (folder.join("logged"), keeper()?);
        let volume = keeper.create(subject::store(&path)?, LOGGED).map_err(BenchError::volume("make a volume"))?;
        volume.close().map_err(BenchError::volume("close"))?;
        drop(volume);
        let mut volume = keeper.open(subject::store(&path)?).map_err(BenchError::volume("open"))?;
        until_checkpoint(&volume, 0, u64::MAX, flush_each)?;
        // A little less than the whole log, so that no checkpoint empties it.
        let writes = until_checkpoint(&volume, 0, u64::MAX, flush_each)? * 49 / 50;
        let mut times = Samples::default();
        for round in 0..rounds {
            while until_checkpoint(&volume, u64::from(round), writes, flush_each)? < writes {}
            volume.flush().map_err(BenchError::volume("flush"))?;
            drop(volume);
            let store = subject::store(&path)?;
            let (time, opened) = ms(|| keeper.open(store));
            volume = opened.map_err(BenchError::volume("open after a crash"))?;
            times.add(time);
        }
        let name = format!("{name}: open after a crash with a full log, {writes} writes, {how}");
        printer.add(Figure::new(name, "ms", &times).limit(RECOVERY_MS));
        drop(volume);
        std::fs::remove_file(&path).map_err(|error| BenchError::Io(path, error))?;
    }
    Ok(())
}

/// Writes single blocks until a checkpoint was made, `limit` at most, with a FLUSH every `flush_each`; says how many.
fn until_checkpoint(volume: &Volume, seed: u64, limit: u64, flush_each: u64) -> Result<u64, BenchError> {
    let (epoch, blocks, data) = (volume.info().epoch, REGION / 4096, [seed as u8; 4096]);
    let mut written = 0;
    while written < limit && volume.info().epoch == epoch {
        // Neighbours in the map are not neighbours in time.
        let block = (written * 7919 + seed) % blocks;
        volume.write(block * 4096, &data).map_err(BenchError::volume("write"))?;
        written += 1;
        if written.is_multiple_of(flush_each) {
            volume.flush().map_err(BenchError::volume("flush"))?;
        }
    }
    Ok(written)
}

/// A volume that is full: what its trees take of the store, and what is kept free for them.
fn metadata(folder: &Path, printer: &mut Printer) -> Result<(), BenchError> {
    let (path, keeper) = (folder.join("full"), keeper()?);
    let volume = keeper.create(subject::store(&path)?, COUNTED).map_err(BenchError::volume("make a volume"))?;
    let data = vec![0x5a; 1 << 20];
    (0..COUNTED >> 20).try_for_each(|i| volume.write(i << 20, &data)).map_err(BenchError::volume("write"))?;
    volume.checkpoint().map_err(BenchError::volume("make a checkpoint"))?;
    let report = volume.check(&mut |_| {}).map_err(BenchError::volume("check"))?;
    let store = volume.info().store_size;
    let share = |bytes: u64| -> Samples { [bytes as f64 / COUNTED as f64 * 100.0].into_iter().collect() };
    let pages = share(report.pages * 4096);
    printer
        .add(Figure::new("metadata pages of a full volume of 1 GiB", "% of its size", &pages).limit(METADATA_PERCENT));
    let room = share(store - COUNTED);
    printer.add(Figure::new("its store beyond its size: metadata twice, log, slack", "% of its size", &room));
    Ok(())
}

fn keeper() -> Result<Arc<Keeper>, BenchError> {
    Keeper::new().map_err(BenchError::volume("make a key"))
}
