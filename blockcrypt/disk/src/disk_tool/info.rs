//! `info`: what a volume is.

use super::cli::Info;
use super::error::ToolError;
use super::size::Bytes;
use super::{Context, open_file, open_volume};
use blockcrypt::{PlainInfo, Store, VolumeInfo, inspect};
use serde::Serialize;
use std::fmt::Write;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

#[derive(Serialize)]
struct Facts<'a, I> {
    /// Whether the keys vouch for it.
    authenticated: bool,
    #[serde(flatten)]
    info: &'a I,
}

pub(super) fn info(context: &Context, words: &Info) -> Result<(), ToolError> {
    let file = open_file(&words.volume)?;
    if context.keys_fd.is_none() {
        let failed = |e| ToolError::Volume(words.volume.clone(), e);
        let info = inspect(&Look(file)).map_err(failed)?;
        return context.report.result(&Facts { authenticated: false, info: &info }, &plain(&info));
    }
    let handover = context.handover("info")?;
    let volume = open_volume(&words.volume, file, &handover)?;
    let info = volume.info();
    drop(volume);
    handover.holder.finish()?;
    context.report.result(&Facts { authenticated: true, info: &info }, &authenticated(&info))
}

/// A store that is looked at and not locked: neither does a running VM keep this from working, nor this a VM from starting.
pub(super) struct Look(pub(super) File);

impl Store for Look {
    fn len(&self) -> io::Result<u64> {
        Ok(rustix::fs::seek(&self.0, rustix::fs::SeekFrom::End(0))?)
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        self.0.read_exact_at(buffer, offset)
    }

    fn write_at(&self, _: &[u8], _: u64) -> io::Result<()> {
        Err(io::ErrorKind::ReadOnlyFilesystem.into())
    }

    fn sync_data(&self) -> io::Result<()> {
        Ok(())
    }

    fn set_len(&self, _: u64) -> io::Result<()> {
        Err(io::ErrorKind::ReadOnlyFilesystem.into())
    }
}

fn plain(info: &PlainInfo) -> String {
    let closed = if info.closed { "yes" } else { "no: it is open, or was not closed in order" };
    let missing = if info.found_size < info.store_size { ", which is too few: it is truncated" } else { "" };
    table(&[
        ("volume", info.volume.to_string()),
        ("size", Bytes(info.size).to_string()),
        ("data", Bytes(info.mapped).to_string()),
        ("file", format!("{} of {} bytes{missing}", info.found_size, info.store_size)),
        ("epoch", format!("{}, by writer {}", info.epoch, info.writer)),
        ("closed", closed.to_owned()),
        ("key", format!("{}, opened by {}", info.key_id, info.kek_id)),
        ("superblocks", format!("{} of 4 copies can be read", info.superblocks)),
        ("anchor", policy::Base64Url::from(&info.anchor.as_bytes()[..]).to_string()),
        ("verified", "nothing: whoever can write the file can write all of this".to_owned()),
    ])
}

fn authenticated(info: &VolumeInfo) -> String {
    table(&[
        ("volume", info.volume.to_string()),
        ("size", Bytes(info.size).to_string()),
        ("data", Bytes(info.mapped).to_string()),
        (
            "room",
            format!(
                "for {} beyond its size; {} can be written before it is used up",
                Bytes(info.room),
                Bytes(info.free)
            ),
        ),
        ("snapshots", info.snapshots.to_string()),
        ("file", format!("{} bytes", info.store_size)),
        ("epoch", format!("{}, by writer {}", info.epoch, info.writer)),
        ("key", format!("{} ({} blocks written), and {} older", info.key_id, info.blocks_written, info.older_keys)),
        ("dropped", format!("{} writes, never acknowledged, by the last recovery", info.dropped_writes)),
        ("verified", "superblock, key slots and anchor; check verifies the rest".to_owned()),
    ])
}

fn table(rows: &[(&str, String)]) -> String {
    let mut out = String::new();
    for (name, value) in rows {
        let _ = writeln!(out, "{name:12} {value}");
    }
    out.truncate(out.trim_end().len());
    out
}
