//! The tool for volumes. It takes a volume's key from an inherited descriptor, never from an argument, the environment or a
//! file, and gives the new anchors back over it.
//!
//! | module | what it holds |
//! | --- | --- |
//! | `cli`, `size` | the command line |
//! | `holder`, `inherit` | the conversation with whoever holds the volume's session |
//! | `make` | `create`, `import` and `clone`: a volume that appears whole or not at all |
//! | `change`, `snapshot` | commands that change a volume in its place |
//! | `export`, `info`, `check` | the other commands |
//! | `salvage` | going on past what can't be read |
//! | `bench`, `scratch` | what a volume does here, measured where nothing is left of it |
//! | `serve`, `rotation` | a volume as a disk of other programs, and rekeyed meanwhile |
//! | `image`, `blocks` | raw images, and which of their blocks hold something |
//! | `qemu`, `qcow2`, `qemu_lock` | images that are not raw, by `qemu-img`, and what it sees of them |
//! | `place` | files that get their name when they are complete |
//! | `signals` | what an interruption leaves behind: nothing |
//! | `progress`, `report` | what people and scripts see |
//! | `error` | why it failed, and the exit codes |

mod bench;
mod blocks;
mod change;
mod check;
mod cli;
mod control;
mod crew;
mod error;
mod export;
mod holder;
mod image;
mod info;
mod inherit;
mod make;
mod place;
mod progress;
mod qcow2;
mod qemu;
mod qemu_lock;
mod report;
mod rotation;
mod salvage;
mod scratch;
mod serve;
mod signals;
mod size;
mod snapshot;

use blockcrypt::{FileStore, Kek, OpenOptions, Volume, VolumeInfo};
use cli::{Cli, Command};
use error::ToolError;
use holder::{Handover, Holder};
use policy::disk::VolumeGrant;
use report::Reporter;
use signals::Interrupts;
use std::fs::File;
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::process::ExitCode;
use std::sync::{Arc, OnceLock};

/// What every command works with.
struct Context {
    keys_fd: Option<i32>,
    report: Reporter,
    interrupts: Interrupts,
    /// Who handed over the volume, once he has.
    holder: OnceLock<Arc<Holder>>,
}

/// Does what the command line says.
pub(crate) fn main() -> ExitCode {
    let cli = match cli::parse() {
        Ok(cli) => cli,
        Err(code) => return code,
    };
    report::speak(cli.json);
    match perform(cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            report::failure(&error);
            ExitCode::from(error.code())
        }
    }
}

fn perform(cli: Cli) -> Result<(), ToolError> {
    secretmem::harden_process()?;
    let interrupts = Interrupts::watch().map_err(ToolError::Signals)?;
    let context =
        Context { keys_fd: cli.keys_fd, report: Reporter::new(cli.json), interrupts, holder: OnceLock::new() };
    let done = match cli.command {
        Command::Create(words) => make::create(&context, &words),
        Command::Import(words) => make::import(&context, &words),
        Command::Clone(words) => make::clone(&context, &words),
        Command::Export(words) => export::export(&context, &words),
        Command::Info(words) => info::info(&context, &words),
        Command::Check(words) => check::check(&context, &words),
        Command::Snapshot(words) => snapshot::snapshot(&context, &words),
        Command::Resize(words) => change::resize(&context, &words),
        Command::Rekey(words) => change::rekey(&context, &words),
        Command::Rewrap(words) => change::rewrap(&context, &words),
        Command::Erase(words) => change::erase(&context, &words),
        Command::Bench(words) => bench::bench(&context, &words),
        Command::Serve(words) => serve::serve(&context, &words),
    };
    // However it ended: what happened to the volume is told.
    if let Some(holder) = context.holder.get() {
        holder.tell_all();
    }
    done
}

impl Context {
    /// The volume's grant and key from `--keys-fd`, which `command` can't do without.
    fn handover(&self, command: &'static str) -> Result<Handover, ToolError> {
        let fd = self.keys_fd.ok_or(ToolError::NoKeys(command))?;
        let handover = Handover::receive(inherit::stream(fd)?)?;
        // A command takes it once.
        let _ = self.holder.set(handover.holder.clone());
        Ok(handover)
    }

    /// Does `work`, which may be long, or wait for somebody else; the process ends if the key holder leaves meanwhile.
    fn while_there<R>(&self, holder: &Holder, work: impl FnOnce() -> R) -> Result<R, ToolError> {
        let cut_off = |gone| {
            let gone = ToolError::from(gone);
            self.interrupts.cut_off(gone.code(), &gone.to_string())
        };
        holder.while_there(work, cut_off).map_err(|e| ToolError::Thread("watch over the key holder", e))
    }
}

/// The file or device at `path`, for reading; one that is a pipe is not waited for.
fn open_file(path: &Path) -> Result<File, ToolError> {
    open_for_reading(path).map_err(|e| ToolError::Open(path.to_owned(), e))
}

fn open_for_reading(path: &Path) -> io::Result<File> {
    std::fs::OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY).open(path)
}

/// The volume in `file`, for reading: nothing is written, no anchor moves, others may read it too.
fn open_volume(path: &Path, file: File, handover: &Handover) -> Result<Volume, ToolError> {
    open_snapshot(path, file, handover, None)
}

/// The same, or a snapshot of it.
fn open_snapshot(path: &Path, file: File, handover: &Handover, snapshot: Option<u64>) -> Result<Volume, ToolError> {
    let failed = |e| ToolError::Volume(path.to_owned(), e);
    let store = FileStore::shared(file).map_err(failed)?;
    let Handover { grant, kek, holder, .. } = handover;
    let options = OpenOptions { read_only: true, snapshot, ..Default::default() };
    Volume::open(store, grant, kek, options, holder.clone(), holder.clone()).map_err(failed)
}

/// Facts about the volume in `file` at `path`, which this process has locked.
fn look(
    path: &Path,
    file: File,
    grant: &VolumeGrant,
    kek: &Kek,
    holder: &Arc<Holder>,
) -> Result<VolumeInfo, ToolError> {
    let failed = |e| ToolError::Volume(path.to_owned(), e);
    // Of the same opened file, whose lock stays when this is dropped.
    let store = FileStore::exclusive(file).map_err(failed)?;
    let options = OpenOptions { read_only: true, ..Default::default() };
    let volume = Volume::open(store, grant, kek, options, holder.clone(), holder.clone()).map_err(failed)?;
    Ok(volume.info())
}

/// The volume at `path`, for writing.
fn open_writable(path: &Path, handover: &Handover) -> Result<Volume, ToolError> {
    let failed = |e| ToolError::Volume(path.to_owned(), e);
    let store = FileStore::exclusive(open_for_writing(path)?).map_err(failed)?;
    let Handover { grant, kek, holder, .. } = handover;
    Volume::open(store, grant, kek, OpenOptions::default(), holder.clone(), holder.clone()).map_err(failed)
}

/// The file or device at `path`, for writing too.
fn open_for_writing(path: &Path) -> Result<File, ToolError> {
    let mut options = std::fs::OpenOptions::new();
    options.read(true).write(true).custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY);
    options.open(path).map_err(|e| ToolError::Open(path.to_owned(), e))
}
