//! Commands that change a volume in its place: `snapshot`, `resize`, `rekey`, `erase`. A volume that is cut off in the middle of one
//! is whole: it is as before, or as after, or somewhere on a way that the next run goes on with.

use super::Context;
use super::cli::{Erase, Rekey, Resize};
use super::error::ToolError;
use super::progress::Progress;
use super::size::Bytes;
use blockcrypt::{FileStore, OpenOptions, Volume, VolumeError, erase as erase_store};
use policy::{KeyId, VolumeId};
use serde::Serialize;
use std::fs::File;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

#[derive(Serialize)]
struct Resized {
    volume: VolumeId,
    size: u64,
}

#[derive(Serialize)]
struct Rekeyed {
    volume: VolumeId,
    key_id: KeyId,
    older_keys: usize,
}

#[derive(Serialize)]
struct Erased<'a> {
    path: &'a Path,
    blocks: usize,
}

pub(super) fn resize(context: &Context, words: &Resize) -> Result<(), ToolError> {
    let size = words.size.bytes();
    let (volume, ()) = change(context, "resize", &words.volume, |volume| volume.grow(size))?;
    context.report.result(&Resized { volume, size }, &format!("volume {volume} has {} now", Bytes(size)))
}

/// Seals everything under the key that the grant names.
pub(super) fn rekey(context: &Context, words: &Rekey) -> Result<(), ToolError> {
    let (volume, (key_id, older_keys)) = change(context, "rekey", &words.volume, |volume| {
        let mut progress = Progress::of("rekey", volume.size(), context.report.json);
        volume.rotate(&mut |done, _| {
            progress.at((done * 4096).min(volume.size()));
            true
        })?;
        let info = volume.info();
        Ok((info.key_id, info.older_keys))
    })?;
    let rest = match older_keys {
        0 => "no older key is needed any more".to_owned(),
        n => format!("{n} older keys stay: snapshots, or blocks that can't be read, need them"),
    };
    let text = format!("volume {volume} is sealed under key {key_id}; {rest}");
    context.report.result(&Rekeyed { volume, key_id, older_keys }, &text)
}

pub(super) fn erase(context: &Context, words: &Erase) -> Result<(), ToolError> {
    if !words.force {
        return Err(ToolError::Unforced(words.volume.clone()));
    }
    let failed = |e| ToolError::Volume(words.volume.clone(), e);
    let store = FileStore::exclusive(open_for_writing(&words.volume)?).map_err(failed)?;
    let blocks = erase_store(&store).map_err(failed)?;
    let path = words.volume.display();
    let text =
        format!("destroyed the key slots in {path}: nobody can read it any more; retire its keys at the provider too");
    context.report.result(&Erased { path: &words.volume, blocks }, &text)
}

/// Opens the volume at `path` for `command`, does `work`, and closes it: its new anchor is kept when this returns.
pub(super) fn change<R>(
    context: &Context,
    command: &'static str,
    path: &Path,
    work: impl FnOnce(&Volume) -> Result<R, VolumeError>,
) -> Result<(VolumeId, R), ToolError> {
    let file = open_for_writing(path)?;
    let handover = context.handover(command)?;
    let failed = |e| ToolError::Volume(path.to_owned(), e);
    let store = FileStore::exclusive(file).map_err(failed)?;
    let (grant, kek, holder) = (&handover.grant, &handover.kek, &handover.holder);
    let volume = Volume::open(store, grant, kek, OpenOptions::default(), holder.clone(), holder.clone());
    let volume = volume.map_err(failed)?;
    let done = work(&volume);
    // Also after a refusal: the volume was opened, and is anchored as it is now.
    let closed = volume.close();
    let id = volume.id();
    drop(volume);
    let done = done.map_err(failed)?;
    closed.map_err(failed)?;
    holder.finish()?;
    Ok((id, done))
}

fn open_for_writing(path: &Path) -> Result<File, ToolError> {
    let mut options = std::fs::OpenOptions::new();
    options.read(true).write(true).custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY);
    options.open(path).map_err(|e| ToolError::Open(path.to_owned(), e))
}
