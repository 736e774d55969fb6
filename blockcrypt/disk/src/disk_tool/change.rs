//! Commands that change a volume in its place: `snapshot`, `resize`, `rekey`, `rewrap`, `erase`. A volume that is cut off in the middle
//! of one is whole: it is as before, or as after, or somewhere on a way that the next run goes on with.

use super::cli::{Erase, Rekey, Resize, Rewrap};
use super::error::ToolError;
use super::holder::{Handover, Holder, HolderError, Leave};
use super::info::Look;
use super::progress::Progress;
use super::report::{self, Reporter};
use super::size::{Bytes, Size};
use super::{Context, control, look, open_file, open_for_writing, rotation};
use blockcrypt::{FileStore, Kek, OpenOptions, Volume, VolumeError, VolumeInfo, erase as erase_store, inspect};
use policy::disk::{VolumeGrant, VolumeOperation, VolumeRequest};
use policy::{KeyId, VolumeId};
use serde::Serialize;
use std::path::Path;
use std::sync::atomic::AtomicBool;

#[derive(Serialize)]
struct Resized {
    volume: VolumeId,
    size: u64,
    room: u64,
}

#[derive(Serialize)]
struct Rekeyed {
    volume: VolumeId,
    key_id: KeyId,
    older_keys: usize,
    not_renewed: u64,
    begun_before: bool,
}

#[derive(Serialize)]
struct Rewrapped {
    volume: VolumeId,
    kek_id: KeyId,
}

#[derive(Serialize)]
struct Erased<'a> {
    path: &'a Path,
    blocks: usize,
    retired: bool,
}

const HALF_ERASED: &str =
    "the volume may be erased in part: fealty-disk erase FILE --force, without the key holder, ends it";

/// A change of the volume at `path` by `command`, and what permission it needs.
pub(super) struct Change<'a> {
    pub(super) context: &'a Context,
    pub(super) command: &'static str,
    pub(super) path: &'a Path,
    pub(super) operation: Option<VolumeRequest>,
    /// What is to be said of it when it is interrupted.
    pub(super) cut_off: &'static str,
}

/// Of a change that is done in steps, or in one that may be done twice.
pub(super) const GOES_ON: &str = "the volume is whole: run this again, and it goes on";

pub(super) fn resize(context: &Context, words: &Resize) -> Result<(), ToolError> {
    if let Some(socket) = &words.served {
        let store = Look(open_file(&words.volume)?);
        let volume = inspect(&store).map_err(|e| ToolError::Volume(words.volume.clone(), e))?.volume;
        // The command line asks for a size, where it does not ask for room.
        let (size, room) = control::resize(socket, volume, words.size.map_or(0, Size::bytes))?;
        return tell_size(context.report, volume, size, room);
    }
    let change = Change { context, command: "resize", path: &words.volume, operation: None, cut_off: GOES_ON };
    let resized = change.make(|volume, _| {
        let size = words.size.map_or(volume.size(), Size::bytes);
        if size >= volume.size() {
            volume.grow(size)?;
        } else {
            let mut progress = Progress::of("resize", volume.size() - size, context.report.json);
            volume.shrink(size, words.discard_tail, &mut |done, all| progress.share(done, all))?;
        }
        words.room.map_or(Ok(()), |room| volume.widen(room.bytes(size)))?;
        Ok(volume.info())
    });
    let (volume, VolumeInfo { size, room, .. }) = resized.map_err(|error| match error {
        ToolError::Volume(path, error @ VolumeError::DataBeyond { .. }) => ToolError::Tail(path, error),
        other => other,
    })?;
    tell_size(context.report, volume, size, room)
}

fn tell_size(report: Reporter, volume: VolumeId, size: u64, room: u64) -> Result<(), ToolError> {
    let text = format!("volume {volume} has {} now, and room for {} beyond that", Bytes(size), Bytes(room));
    report.result(&Resized { volume, size, room }, &text)
}

/// Seals everything under a new key, whose id the provider issues.
pub(super) fn rekey(context: &Context, words: &Rekey) -> Result<(), ToolError> {
    let operation = Some(VolumeRequest::plain(VolumeOperation::Rekey));
    let change = Change { context, command: "rekey", path: &words.volume, operation, cut_off: GOES_ON };
    let (_, (info, goes_on)) = change.make(|volume, keys| {
        rotation::rotate(volume, context.report, &AtomicBool::new(false))?;
        Ok((volume.info(), keys.goes_on))
    })?;
    rekeyed(context.report, &info, goes_on)
}

/// Says that a rekey is done: one that was begun just now, or that `goes_on` since before.
pub(super) fn rekeyed(report: Reporter, info: &VolumeInfo, goes_on: bool) -> Result<(), ToolError> {
    let VolumeInfo { volume, key_id, older_keys, not_renewed, .. } = *info;
    let rest = match older_keys {
        0 => "no older key is needed any more".to_owned(),
        1 => "one older key stays: snapshots, or blocks that can't be read, need it".to_owned(),
        n => format!("{n} older keys stay: snapshots, or blocks that can't be read, need them"),
    };
    let left = match not_renewed {
        0 => String::new(),
        blocks => format!(
            "; up to {blocks} blocks were left as they are, for they, or a page that leads to them or calls them used, are damaged: `check` names \
             what is"
        ),
    };
    let since = match goes_on {
        true => "; this ended a rekey that was begun before, whose key is not new: rekey once more for one that is",
        false => "",
    };
    let text = format!("volume {volume} is sealed under key {key_id}; {rest}{left}{since}");
    report.result(&Rekeyed { volume, key_id, older_keys, not_renewed, begun_before: goes_on }, &text)
}

/// Wraps the volume's masters under another key-encryption key.
pub(super) fn rewrap(context: &Context, words: &Rewrap) -> Result<(), ToolError> {
    let operation = Some(VolumeRequest::plain(VolumeOperation::Rewrap));
    let change = Change { context, command: "rewrap", path: &words.volume, operation, cut_off: GOES_ON };
    let (volume, kek_id) = change.make(|volume, keys| {
        let next = keys.next.ok_or(VolumeError::Grant("it names no next key-encryption key"))?;
        volume.rewrap(keys.kek, next).map(|()| next.id())
    })?;
    let text = format!(
        "the keys of volume {volume} are wrapped under {kek_id}; the key provider has no other any more, and no backup of it from \
         before opens the volume: take a backup of the provider now (fealty-keys backup)"
    );
    context.report.result(&Rewrapped { volume, kek_id }, &text)
}

/// Destroys the key slots; with the key holder's leave, for which the provider retires the keys first: from then on it is done, and
/// what is left of it, anybody can do.
pub(super) fn erase(context: &Context, words: &Erase) -> Result<(), ToolError> {
    if !words.force {
        return Err(ToolError::Unforced(words.volume.clone()));
    }
    let failed = |e| ToolError::Volume(words.volume.clone(), e);
    let store = FileStore::exclusive(open_for_writing(&words.volume)?).map_err(failed)?;
    let retired = context.keys_fd.is_some();
    let blocks = if retired {
        let Handover { grant, holder, .. } = context.handover("erase")?;
        let found = inspect(&store).map_err(failed)?.volume;
        if found != grant.volume {
            return Err(failed(VolumeError::OtherVolume { found, expected: grant.volume }));
        }
        context.interrupts.changing(HALF_ERASED);
        let request = VolumeRequest::plain(VolumeOperation::Erase);
        let erased = permitted(&holder, request, |_| erase_store(&store).map_err(failed));
        erased.map_err(|error| match error {
            ToolError::Volume(path, error) => ToolError::Retired(path, error),
            other => other,
        })?
    } else {
        context.interrupts.changing(HALF_ERASED);
        erase_store(&store).map_err(failed)?
    };
    let rest = match retired {
        true => "its keys are retired at the key provider",
        false => "have its keys retired too, for copies of it: fealty-keys volume retire CUSTOMER NAME",
    };
    let text = format!("destroyed the key slots in {}: nobody can read it any more; {rest}", words.volume.display());
    context.report.result(&Erased { path: &words.volume, blocks, retired }, &text)
}

/// What a change may need: the volume's key-encryption key, and the next one; whether its rekey was begun before.
pub(super) struct Keys<'a> {
    pub(super) kek: &'a Kek,
    pub(super) next: Option<&'a Kek>,
    pub(super) goes_on: bool,
}

impl Change<'_> {
    /// Opens the volume, does `work`, and closes it: its new anchor is kept when this returns.
    pub(super) fn make<R>(
        self,
        work: impl FnOnce(&mut Volume, Keys) -> Result<R, VolumeError>,
    ) -> Result<(VolumeId, R), ToolError> {
        let file = open_for_writing(self.path)?;
        let Handover { mut grant, kek, holder, size } = self.context.handover(self.command)?;
        let failed = |e| ToolError::Volume(self.path.to_owned(), e);
        let again = file.try_clone().map_err(|e| ToolError::Open(self.path.to_owned(), e))?;
        let store = FileStore::exclusive(file).map_err(failed)?;
        self.context.interrupts.changing(self.cut_off);
        let change = |grant: &VolumeGrant, next: Option<Kek>, goes_on: bool| {
            let volume = Volume::open(store, grant, &kek, OpenOptions::default(), holder.clone(), holder.clone());
            let mut volume = volume.map_err(failed)?;
            let keys = Keys { kek: &kek, next: next.as_ref(), goes_on };
            let done = self.context.while_there(&holder, || work(&mut volume, keys));
            // Also after a refusal: the volume was opened, and is anchored as it is now.
            let closed = volume.close();
            let (id, found) = (volume.id(), volume.size());
            drop(volume);
            let done = done?.map_err(failed)?;
            closed.map_err(failed)?;
            if size != Some(found) {
                holder.size(id, found);
            }
            Ok((id, done))
        };
        let done = match self.operation {
            Some(request) if request.operation == VolumeOperation::Rekey => {
                let look = |grant: &VolumeGrant| look(self.path, again, grant, &kek, &holder);
                let goes_on = rotation::permitted(&holder, &mut grant, look)?;
                told(&holder, change(&grant, None, goes_on))?
            }
            Some(request) => permitted(&holder, request, |leave| match leave {
                Leave::Kek(next) => change(&grant, Some(next), false),
                _ => change(&grant, None, false),
            })?,
            None => change(&grant, None, false)?,
        };
        finish(&holder)?;
        self.context.interrupts.done();
        Ok(done)
    }
}

/// Asks for leave, does `work` with it, and says how it ended.
pub(super) fn permitted<R>(
    holder: &Holder,
    request: VolumeRequest,
    work: impl FnOnce(Leave) -> Result<R, ToolError>,
) -> Result<R, ToolError> {
    told(holder, work(holder.ask(request)?))
}

/// Says how what was permitted ended.
fn told<R>(holder: &Holder, done: Result<R, ToolError>) -> Result<R, ToolError> {
    match &done {
        Ok(_) => holder.outcome(true, "done"),
        Err(error) => holder.outcome(false, &report::chain(error)),
    }
    if done.is_ok() {
        finish(holder)?;
    }
    done
}

/// Something was done: whether the audit log has all of it or not.
fn finish(holder: &Holder) -> Result<(), ToolError> {
    holder.finish().map_err(|error| match error {
        HolderError::Unheard(why) => ToolError::Untold(why),
        other => other.into(),
    })
}
