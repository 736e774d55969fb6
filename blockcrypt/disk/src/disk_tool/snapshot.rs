//! `snapshot`: taken, listed, gone back to, deleted.

use super::change::{Change, GOES_ON};
use super::cli::{Snapshot, SnapshotCommand};
use super::error::ToolError;
use super::progress::Progress;
use super::size::Bytes;
use super::{Context, open_file, open_volume};
use blockcrypt::SnapshotInfo;
use policy::VolumeId;
use policy::disk::{VolumeOperation, VolumeRequest};
use serde::Serialize;
use std::fmt::Write as _;
use std::path::Path;

#[derive(Serialize)]
struct One {
    volume: VolumeId,
    snapshot: u64,
}

#[derive(Serialize)]
struct All<'a> {
    volume: VolumeId,
    snapshots: &'a [SnapshotInfo],
}

const PERHAPS_TAKEN: &str = "the volume is whole: fealty-disk snapshot list shows whether the snapshot was taken";

pub(super) fn snapshot(context: &Context, words: &Snapshot) -> Result<(), ToolError> {
    let change = |command, path, operation| Change { context, command, path, operation, cut_off: GOES_ON };
    match &words.command {
        SnapshotCommand::Take(words) => {
            let change = Change { cut_off: PERHAPS_TAKEN, ..change("snapshot take", &words.volume, None) };
            let (volume, snapshot) = change.make(|volume, _| volume.take_snapshot(&words.name))?;
            let text = format!("took snapshot {snapshot} of volume {volume}");
            context.report.result(&One { volume, snapshot }, &text)
        }
        SnapshotCommand::List(words) => list(context, &words.volume),
        SnapshotCommand::Revert(words) => {
            let id = words.snapshot;
            let request = VolumeRequest::plain(VolumeOperation::Revert).with("snapshot", id);
            let change = change("snapshot revert", &words.volume, Some(request));
            let (volume, ()) = change.make(|volume, _| volume.revert(id))?;
            let text = format!("volume {volume} holds what snapshot {id} held");
            context.report.result(&One { volume, snapshot: id }, &text)
        }
        SnapshotCommand::Delete(words) => {
            let id = words.snapshot;
            let deleted = change("snapshot delete", &words.volume, None).make(|volume, _| {
                let mut progress = Progress::of("delete", volume.size(), context.report.json);
                volume.delete_snapshot(id, &mut |done, all| progress.share(done, all))
            });
            let (volume, ()) = deleted?;
            context.report.result(&One { volume, snapshot: id }, &format!("deleted snapshot {id} of volume {volume}"))
        }
    }
}

fn list(context: &Context, path: &Path) -> Result<(), ToolError> {
    let file = open_file(path)?;
    let handover = context.handover("snapshot list")?;
    let volume = open_volume(path, file, &handover)?;
    let (id, snapshots) = (volume.id(), volume.snapshots().map_err(|e| ToolError::Volume(path.to_owned(), e))?);
    drop(volume);
    handover.holder.finish()?;
    context.report.result(&All { volume: id, snapshots: &snapshots }, &table(&snapshots))
}

fn table(snapshots: &[SnapshotInfo]) -> String {
    if snapshots.is_empty() {
        return "no snapshots".to_owned();
    }
    let mut out = format!("{:>8}  {:>10}  {:>10}  {:>10}  name", "snapshot", "taken", "size", "data");
    for one in snapshots {
        let state = if one.deleting { " (being deleted)" } else { "" };
        let (size, data) = (Bytes(one.size).to_string(), Bytes(one.mapped).to_string());
        let _ = write!(out, "\n{:>8}  {:>10}  {size:>10}  {data:>10}  {}{state}", one.id, one.time, one.name);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_snapshot_has_a_line() {
        assert_eq!(table(&[]), "no snapshots");
        let one = SnapshotInfo { id: 3, name: "a b".into(), time: 9, size: 4096, mapped: 0, deleting: true };
        let text = table(&[one]);
        assert_eq!(text.lines().count(), 2);
        assert!(text.ends_with("a b (being deleted)"), "{text}");
    }
}
