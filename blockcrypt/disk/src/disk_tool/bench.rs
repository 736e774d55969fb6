//! `bench`: what a volume does on this machine, against what its ciphers do alone and against a plain file.

use super::Context;
use super::cli::Bench;
use super::error::ToolError;
use super::place::{Content, Place, is_device};
use super::progress::Progress;
use super::scratch::{self, Part, ScratchError};
use super::size::Bytes;
use blockcrypt::{FileStore, Store, VolumeError, store_size};
use fealty_disk::bench::{
    Figure, HalfFull, Limit, MeasureError, Plain, Rates, Subject, WARM_UP, WORKS, Work, ciphers, fill, interleave,
    machine, table,
};
use serde::Serialize;
use std::path::Path;
use std::sync::Arc;

/// What a size must be a multiple of: the largest request.
const UNIT: u64 = 1 << 20;
/// The smallest: large enough that requests at random seldom meet.
const LEAST: u64 = 16 << 20;
/// The largest.
const MOST: u64 = 1 << 40;

#[derive(Serialize)]
struct Setting<'a> {
    machine: &'a str,
    place: &'a Path,
    size: u64,
    direct: bool,
    rounds: u32,
}

/// Measures and prints.
pub(super) fn bench(context: &Context, words: &Bench) -> Result<(), ToolError> {
    let size = words.size.bytes();
    if !(LEAST..=MOST).contains(&size) || !size.is_multiple_of(UNIT) {
        return Err(ScratchError::Size(size).into());
    }
    // Before the load that this puts on it.
    let machine = machine();
    let path = &words.place;
    let figures = if path.is_dir() {
        let file = || opened(scratch::unnamed(path)?, words.direct).map_err(at(path));
        measure(context, words, file()?, file()?)?
    } else {
        on_device(context, words)?
    };
    let setting = Setting { machine: &machine, place: path, size, direct: words.direct, rounds: words.rounds };
    if context.report.json {
        context.report.result(&setting, "")?;
        return figures.iter().try_for_each(|figure| context.report.result(figure, ""));
    }
    let way = if words.direct { "past the page cache" } else { "through the page cache" };
    let head = format!(
        "{machine}\na volume that is half full and a plain file, {} each, in {}, {way}; medians of {} rounds",
        Bytes(size),
        path.display(),
        words.rounds
    );
    context.report.result(&setting, &format!("{head}\n\n{}", table(&figures)))
}

/// Volume and plain data in one device, whose content is lost.
fn on_device(context: &Context, words: &Bench) -> Result<Vec<Figure>, ToolError> {
    let path = &words.place;
    let size = words.size.bytes();
    if !is_device(path) {
        return Err(ScratchError::Kind(path.clone()).into());
    }
    let place = Place::begin(path, Content::Volume, words.force, &context.interrupts)?;
    let store = Arc::new(opened(place.another()?, words.direct).map_err(at(path))?);
    let volume = store_size(2 * size, 0).map_err(at(path))?;
    let room = store.len().map_err(|error| ScratchError::Io(path.clone(), error))?;
    if room < volume + size {
        return Err(ScratchError::Small { path: path.clone(), room, wanted: volume + size }.into());
    }
    place.overwrite();
    let part = |start, bytes| Part::new(store.clone(), start, bytes);
    let measured = measure(context, words, part(0, volume), part(volume, size));
    // Nobody is to take what is left for a volume.
    let wiped = scratch::wipe(&store, volume).map_err(|error| ScratchError::Io(path.clone(), error));
    let overwritten = |error| ToolError::Overwritten(path.clone(), Box::new(error));
    let figures = measured.map_err(overwritten)?;
    wiped.map_err(|error| overwritten(error.into()))?;
    place.finish()?;
    Ok(figures)
}

fn opened(file: std::fs::File, direct: bool) -> Result<FileStore, VolumeError> {
    let store = FileStore::exclusive(file)?;
    if direct { store.direct() } else { Ok(store) }
}

fn at(path: &Path) -> impl Fn(VolumeError) -> ToolError {
    move |error| ToolError::Volume(path.to_owned(), error)
}

fn measure<S: Store + 'static>(
    context: &Context,
    words: &Bench,
    volume: S,
    plain: S,
) -> Result<Vec<Figure>, ToolError> {
    let (size, rounds) = (words.size.bytes(), words.rounds);
    let failed = |error| ToolError::Bench(words.place.clone(), error);
    // The volume is filled whole, then half; volume and plain data once more, so that also the blocks that a copy-on-write volume moves
    // to were written before.
    let filling = 2 * size + 3 * size;
    let work: u64 = WORKS.iter().map(Work::total).sum();
    // Two subjects, twice.
    let total = filling + 4 * work * u64::from(rounds + WARM_UP);
    let mut progress = Progress::of("bench", total, context.report.json);
    let mut done = 0;
    let mut heard = |bytes| {
        progress.at(done);
        done += bytes;
    };
    let (limit, mut figures) = ciphers(rounds).map_err(failed)?;
    let volume = HalfFull::new(volume, size, &mut heard).map_err(failed)?;
    let plain = Plain::new(plain, size).map_err(failed)?;
    fill(&volume, size, &mut heard).map_err(failed)?;
    for _ in 0..2 {
        fill(&plain, size, &mut heard).map_err(failed)?;
    }
    let run = |subject: &dyn Subject, work: &Work, seed| work.run(subject, size, seed);
    let all = interleave::<MeasureError, 2>(
        &WORKS,
        rounds,
        [&|work, seed| run(&volume, work, seed), &|work, seed| run(&plain, work, seed)],
        &mut |work| heard(work.total()),
    );
    for (work, rates) in WORKS.iter().zip(&all.map_err(failed)?) {
        figures.extend(compared(work, rates, &limit));
    }
    Ok(figures)
}

/// A piece of work by the clock, against the plain file; and by processor time, against the ciphers alone.
fn compared(work: &Work, [volume, plain]: &[Rates; 2], limit: &Limit) -> [Figure; 2] {
    let figure = |how, samples| Figure::new(format!("{}, {how}", work.name), work.unit(), samples);
    [
        figure("wall", &volume.wall).at_least("plain file", &plain.wall, None),
        figure("per core", &volume.core).at_least("ciphers alone", &limit.of(work), None),
    ]
}
