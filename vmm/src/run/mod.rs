//! `fealty run`: from a file to a guest that runs, and to its end.
//!
//! ```text
//! protected    file, opener child, TPM service, provider thread ─ sandbox closes ─ attest ─ StartPermit ─ load, volumes ─ run
//! unprotected  file, kernel, disks, machine                     ─ sandbox closes ─          StartPermit ─ load          ─ run
//! ```

pub(crate) mod disks;
pub mod plain;
mod protected;
mod unprotected;

pub use protected::{ProtectedRun, read_vm_file, run as protected};
pub use unprotected::run as unprotected;

use crate::api::{Api, Socket};
use crate::console::terminal::RawMode;
use crate::console::{Console, Target};
use crate::exit::{Exit, Failure};
use crate::machine::console::Line;
use crate::machine::{ConsoleBackend, Machine, MachineError, ThreadHook, ThreadKind};
use crate::post::Post;
use crate::sandbox::{Filter, close_thread};
use crate::steps::Steps;
use crate::watch::{End, Typing};
use policy::device::{ConsoleMode, Devices};
use policy::report::EndReason;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

/// What both kinds of runs are told.
pub struct Settings {
    /// The serial line's other end.
    pub console: Target,
    /// The control socket.
    pub api_socket: Option<PathBuf>,
    /// How long a guest may take to power off.
    pub grace: Duration,
    /// Tells what happens.
    pub steps: Steps,
}

/// Where the host's TPM is, and what helps to find the provider.
pub struct Host {
    /// The TPM.
    pub tcti: attest::tcti::Tcti,
    /// The TPM service's folder.
    pub runtime_dir: Option<PathBuf>,
    /// The provider's CA certificate.
    pub provider_ca: Option<PathBuf>,
}

/// Reads `path`, at most `limit` bytes of it, once.
pub(crate) fn read_file(path: &Path, limit: u64) -> Result<Vec<u8>, Failure> {
    let bad = |why: String| Failure::new(Exit::File, format!("{}: {why}", path.display()));
    // Opened without blocking, so that a FIFO hangs nobody; looked at through the descriptor.
    let flags = rustix::fs::OFlags::RDONLY | rustix::fs::OFlags::CLOEXEC | rustix::fs::OFlags::NONBLOCK;
    let file: File = rustix::fs::open(path, flags, rustix::fs::Mode::empty())
        .map_err(|e| bad(format!("cannot be opened: {}", std::io::Error::from(e))))?
        .into();
    let facts = file.metadata().map_err(|e| bad(e.to_string()))?;
    if !facts.is_file() {
        return Err(bad("is no regular file".into()));
    }
    let mut bytes = Vec::new();
    let length = std::io::Read::read_to_end(&mut std::io::Read::take(file, limit + 1), &mut bytes)
        .map_err(|e| bad(format!("cannot be read: {e}")))?;
    if length as u64 > limit { Err(bad(format!("is longer than {limit} bytes"))) } else { Ok(bytes) }
}

/// The folder that names beside `file` are in.
fn folder_of(file: &Path) -> PathBuf {
    match file.parent() {
        Some(folder) if folder.as_os_str().is_empty() => PathBuf::from("."),
        Some(folder) => folder.to_owned(),
        None => PathBuf::from("/"),
    }
}

/// Serves the control socket, where one is wanted.
fn serve_api(settings: &Settings, post: &Post) -> Result<Option<Api>, Failure> {
    let Some(path) = &settings.api_socket else { return Ok(None) };
    Socket::bind(path)?.serve(post.clone()).map(Some)
}

/// Filters of the machine's threads.
fn hook() -> ThreadHook {
    Arc::new(|kind| {
        let filter = match kind {
            ThreadKind::Vcpu => Filter::Vcpu,
            ThreadKind::Disk => Filter::Disk,
            ThreadKind::Rng => Filter::Rng,
            ThreadKind::Net => Filter::Net,
            ThreadKind::Balloon => Filter::Balloon,
            ThreadKind::Vsock => Filter::Vsock,
            ThreadKind::VirtioConsole => Filter::VirtioConsole,
            ThreadKind::Console => Filter::Console,
        };
        close_thread(filter).map_err(std::io::Error::other)
    })
}

/// Connects the serial line, or the virtio console in its place, and where a terminal is typed on, makes it raw for as long as the returned value lives.
fn connect(
    machine: &mut Machine,
    console: Console,
    devices: Devices<'_>,
) -> Result<(File, Typing, Option<RawMode>), Failure> {
    let Console { output, input, keyboard, typed } = console;
    let backend = ConsoleBackend { input: Some(input), output };
    match devices.console {
        Some(virtio) if virtio.mode == ConsoleMode::Tty => {
            machine.add_console(Line::Backend(backend)).map_err(|e| machine_failure(&e))?;
        }
        _ => machine.set_console(backend),
    }
    if !typed {
        return Ok((keyboard, Typing::No, None));
    }
    let raw = RawMode::enter().map_err(|e| Failure::new(Exit::Host, format!("cannot make the terminal raw: {e}")))?;
    let typing = if raw.is_some() { Typing::Terminal } else { Typing::Plain };
    Ok((keyboard, typing, raw))
}

/// Tells that the guest runs: once it does and can be operated; on a terminal, which the guest writes to as well, a moment
/// before, so that the line does not fall into the guest's first one.
fn tell_start(steps: Steps, typing: Typing, before: bool) {
    if before == (typing == Typing::Terminal && !steps.json()) {
        steps.step("runs", "");
    }
}

/// What a machine's failure means for the exit code.
fn machine_failure(error: &MachineError) -> Failure {
    let exit = match error {
        MachineError::NoKvm(_) | MachineError::Lacks(_) => Exit::Kvm,
        MachineError::Boot(_) | MachineError::Nothing => Exit::File,
        _ => Exit::Host,
    };
    Failure::of(exit, error)
}

/// What the end of a VM means: for the exit code, for the line that explains it, and for the provider.
fn outcome(end: End) -> (Result<Exit, Failure>, EndReason, String) {
    match end {
        End::PowerOff => (Ok(Exit::Done), EndReason::PowerOff, String::new()),
        End::Shutdown => (Ok(Exit::Done), EndReason::Shutdown, String::new()),
        End::Reset => {
            let failure = Failure::new(Exit::Reset, "the guest asked for a reset; start it again");
            (Err(failure), EndReason::Reset, String::new())
        }
        End::Panicked => {
            let why = "the guest's kernel panicked";
            (Err(Failure::new(Exit::Panic, format!("{why}; its console says why"))), EndReason::Failed, why.into())
        }
        End::Stopped => {
            let failure = Failure::new(Exit::Stopped, "stopped before the guest powered off; its volumes are flushed");
            (Err(failure), EndReason::Shutdown, "stopped by a signal".into())
        }
        End::Failed(why) => {
            (Err(Failure::new(Exit::Guest, format!("the guest failed: {why}"))), EndReason::Failed, why)
        }
        End::Lease(why) => (Err(Failure::new(Exit::Lease, &why)), EndReason::Lease, why),
        End::Broken(why) => (Err(Failure::new(Exit::Internal, &why)), EndReason::Failed, why),
    }
}
