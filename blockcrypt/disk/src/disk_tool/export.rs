//! `export`: a volume's content as an image.

use super::blocks::{PIECE, filled};
use super::cli::{Export, Format};
use super::error::ToolError;
use super::holder::{Handover, Holder};
use super::image::ImageError;
use super::place::{Content, Place, same_file};
use super::progress::{Progress, rate};
use super::salvage::Reader;
use super::size::Bytes;
use super::{Context, crew, open_file, open_snapshot, qemu};
use policy::VolumeId;
use serde::Serialize;
use std::io::{self, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Condvar, Mutex, PoisonError};

#[derive(Serialize)]
struct Exported<'a> {
    volume: VolumeId,
    image: &'a Path,
    size: u64,
    data: u64,
    /// Blocks that could not be read.
    lost: u64,
}

/// Where the content goes.
enum Sink {
    /// Standard output: every byte, in order.
    Stream,
    /// A file: zeroes stay holes.
    File(Place),
    /// A device: every byte, over what it held.
    Device(Place),
}

pub(super) fn export(context: &Context, words: &Export) -> Result<(), ToolError> {
    let file = open_file(&words.volume)?;
    if same_file(&file, &words.image) {
        return Err(ToolError::SameFile(words.volume.clone(), words.image.clone()));
    }
    let sink = Sink::begin(context, words)?;
    if words.format == Format::Qcow2 && !matches!(sink, Sink::File(_)) {
        return Err(ToolError::NotAFile(words.image.clone()));
    }
    let handover = context.handover("export")?;
    let volume = open_snapshot(&words.volume, file, &handover, words.snapshot)?;
    let Handover { holder, .. } = handover;
    let reader = match words.salvage {
        true => Reader::salvaging(&volume, context.report),
        false => Reader::strict(&volume),
    };
    if words.format == Format::Raw {
        sink.prepare(&words.image, volume.size())?;
    }
    let (aside, device) = (matches!(sink, Sink::Stream), matches!(sink, Sink::Device(_)));
    let size = volume.size();
    let export = || {
        let mut progress = Progress::of("export", size, context.report.json);
        let data = match (words.format, &sink) {
            (Format::Qcow2, Sink::File(place)) => {
                let exported = qemu::export(&reader, place.draft_path(), &holder, &mut progress);
                holder.still_there()?;
                exported.map_err(|e| ToolError::converting(&words.volume, e))?
            }
            _ => context.while_there(&holder, || copy(&reader, words, &sink, &holder, &mut progress))??,
        };
        let seconds = progress.seconds();
        drop(progress);
        let lost = reader.finish()?;
        holder.finish()?;
        sink.finish(&words.image)?;
        Ok((data, seconds, lost))
    };
    let (data, seconds, lost) = export().map_err(|error| match device {
        true => ToolError::Overwritten(words.image.clone(), Box::new(error)),
        false => error,
    })?;
    drop(volume);
    let id = handover.grant.volume;
    let exported = Exported { volume: id, image: &words.image, size, data, lost };
    let text = format!(
        "exported volume {id} to {}: {}, of it {} data, {} of that",
        named(&words.image).display(),
        Bytes(size),
        Bytes(data),
        rate(data, seconds)
    );
    if aside {
        context.report.aside(&exported, &text);
    } else {
        context.report.result(&exported, &text)?;
    }
    if lost > 0 { Err(ToolError::Salvaged { path: words.volume.clone(), lost }) } else { Ok(()) }
}

/// A copy that several threads make, piece by piece: read as they come, written in order.
struct Copied<'a> {
    progress: &'a mut Progress,
    /// Where the next piece that is read begins, and the next that is written.
    read: u64,
    written: u64,
    /// Bytes that were not zero.
    data: u64,
    /// From here on nothing is written.
    end: u64,
    /// Why it ends there.
    failed: Option<ToolError>,
}

/// Copies everything; how many bytes were not zero. After an error what lies before it is written.
fn copy(
    reader: &Reader<'_>,
    words: &Export,
    sink: &Sink,
    holder: &Holder,
    progress: &mut Progress,
) -> Result<u64, ToolError> {
    let end = reader.volume.size();
    let (copied, turn) =
        (Mutex::new(Copied { progress, read: 0, written: 0, data: 0, end, failed: None }), Condvar::new());
    let lock = || copied.lock().unwrap_or_else(PoisonError::into_inner);
    let next = || {
        let mut copied = lock();
        let (at, end) = (copied.read, copied.end);
        copied.read = end.min(at + PIECE as u64);
        (at < end).then(|| (at, (copied.read - at) as usize))
    };
    let copy = |at: u64, piece: &mut [u8]| {
        holder.still_there()?;
        reader.read(at, piece).map_err(|e| ToolError::Volume(words.volume.clone(), e))?;
        let data: u64 = filled(piece).map(|(_, run)| run.len() as u64).sum();
        let earlier = |copied: &mut Copied| copied.written < at.min(copied.end);
        if turn.wait_while(lock(), earlier).unwrap_or_else(PoisonError::into_inner).end <= at {
            return Ok(());
        }
        sink.write(at, piece).map_err(|e| write_failed(&words.image, e))?;
        let mut copied = lock();
        copied.written = at + piece.len() as u64;
        copied.data += data;
        let written = copied.written;
        copied.progress.at(written);
        Ok(())
    };
    let work = || {
        let mut buffer = vec![0; PIECE];
        while let Some((at, length)) = next() {
            if let Err(error) = copy(at, &mut buffer[..length]) {
                let mut copied = lock();
                if at < copied.end {
                    (copied.end, copied.failed) = (at, Some(error));
                }
            }
            turn.notify_all();
        }
    };
    let give_up = || {
        lock().end = 0;
        turn.notify_all();
    };
    // What salvage can't read is told of in order.
    crew::together(if words.salvage { 1 } else { crew::size() }, work, give_up);
    let Copied { data, failed, .. } = copied.into_inner().unwrap_or_else(PoisonError::into_inner);
    failed.map_or(Ok(data), Err)
}

impl Sink {
    fn begin(context: &Context, words: &Export) -> Result<Self, ToolError> {
        if words.image.as_os_str() == "-" {
            return Ok(Self::Stream);
        }
        let place = Place::begin(&words.image, Content::Image, words.force, &context.interrupts)?;
        Ok(if place.is_device() { Self::Device(place) } else { Self::File(place) })
    }

    /// Makes room for `size` bytes.
    fn prepare(&self, path: &Path, size: u64) -> Result<(), ToolError> {
        match self {
            Self::Stream => Ok(()),
            Self::File(place) => place.file().set_len(size).map_err(|e| write_failed(path, e)),
            Self::Device(place) => {
                let room = rustix::fs::seek(place.file(), rustix::fs::SeekFrom::End(0));
                let room = room.map_err(|e| write_failed(path, e.into()))?;
                if room < size {
                    return Err(ImageError::NoRoom { path: path.to_owned(), room, wanted: size }.into());
                }
                place.overwrite();
                Ok(())
            }
        }
    }

    fn write(&self, at: u64, piece: &[u8]) -> io::Result<()> {
        match self {
            Self::Stream => io::stdout().lock().write_all(piece),
            Self::File(place) => {
                filled(piece).try_for_each(|(offset, run)| place.file().write_all_at(run, at + offset as u64))
            }
            Self::Device(place) => place.file().write_all_at(piece, at),
        }
    }

    fn finish(self, path: &Path) -> Result<(), ToolError> {
        match self {
            Self::Stream => io::stdout().lock().flush().map_err(|e| write_failed(path, e)),
            Self::File(place) | Self::Device(place) => Ok(place.finish()?),
        }
    }
}

fn write_failed(path: &Path, error: io::Error) -> ToolError {
    ImageError::Write(named(path), error).into()
}

/// What people call it.
fn named(path: &Path) -> PathBuf {
    if path.as_os_str() == "-" { PathBuf::from("standard output") } else { path.to_owned() }
}
