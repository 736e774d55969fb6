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
use crate::console::{Console, Keyboard, Target};
use crate::exit::{Exit, Failure};
use crate::lease::{Deadline, boottime_ms};
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

/// When a VM that ends says that it waits for a store: not for the provider's anchors any more. And when one that starts does.
const STORE: Duration = Duration::from_secs(15);

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
            ThreadKind::Slots => Filter::Slots,
        };
        close_thread(filter).map_err(std::io::Error::other)
    })
}

/// Connects the serial line, or the virtio console in its place, and where a terminal is typed on, makes it raw for as long as the returned value lives.
fn connect(
    machine: &mut Machine,
    console: Console,
    devices: Devices<'_>,
) -> Result<(Keyboard, Typing, Option<RawMode>), Failure> {
    let Console { output, input, keyboard } = console;
    let backend = ConsoleBackend { input: Some(input), output };
    match devices.console {
        Some(virtio) if virtio.mode == ConsoleMode::Tty => {
            machine.add_console(Line::Backend(backend)).map_err(|e| machine_failure(&e))?;
        }
        _ => machine.set_console(backend),
    }
    if keyboard.typed.is_none() {
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

/// Tells, unless what this returns is dropped before, that a VM that ends waits for a store: for those of the disks that `which` names then, or
/// whose requests in hand do not end.
fn tell_waiting(
    post: &Post,
    steps: Steps,
    which: impl FnOnce() -> String + Send + 'static,
) -> Result<Deadline, Failure> {
    Deadline::new(boottime_ms().saturating_add(millis(STORE)), post.clone(), move || {
        let (which, seconds) = (which(), STORE.as_secs());
        let which = if which.is_empty() { "a request in hand" } else { &which };
        let what = "SIGKILL ends the VM with what was flushed before";
        steps.step("waiting", &format!("{which}: its store has not answered for {seconds} s; {what}"));
    })
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
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

/// What the end of a VM means: for the exit code, for the line that explains it, and for the provider. Volumes that are not
/// flushed are no good end.
fn outcome(end: End, flushed: Result<(), String>) -> (Result<Exit, Failure>, EndReason, String) {
    let failed = |exit, why: &str| Err(Failure::new(exit, why));
    let (result, reason, detail) = match end {
        End::PowerOff => (Ok(Exit::Done), EndReason::PowerOff, String::new()),
        End::Shutdown => (Ok(Exit::Done), EndReason::Shutdown, String::new()),
        End::Reset => {
            (failed(Exit::Reset, "the guest asked for a reset; start it again"), EndReason::Reset, String::new())
        }
        End::Panicked => {
            let why = "the guest's kernel panicked";
            (failed(Exit::Panic, &format!("{why}; its console says why")), EndReason::Failed, why.into())
        }
        End::Stopped => {
            let detail = "stopped by a signal".into();
            (failed(Exit::Stopped, "stopped before the guest powered off"), EndReason::Shutdown, detail)
        }
        End::Failed(why) => (failed(Exit::Guest, &format!("the guest failed: {why}")), EndReason::Failed, why),
        End::Lease(why) => (failed(Exit::Lease, &why), EndReason::Lease, why),
        End::Broken(why) => (failed(Exit::Internal, &why), EndReason::Failed, why),
    };
    match (result, flushed) {
        (Err(Failure { exit: Exit::Stopped, message }), Ok(())) => {
            (failed(Exit::Stopped, &format!("{message}; its volumes are flushed")), reason, detail)
        }
        (result, Ok(())) => (result, reason, detail),
        (Ok(_), Err(why)) => (failed(Exit::Volume, &why), reason, why),
        (Err(Failure { exit, message }), Err(why)) => {
            let exit = if matches!(exit, Exit::Stopped | Exit::Reset) { Exit::Volume } else { exit };
            let both = format!("{message}; {why}");
            (failed(exit, &both), reason, both)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_end_says_that_volumes_are_flushed_only_where_they_are() {
        let ended = |end: End, flushed: Result<(), &str>| match outcome(end, flushed.map_err(str::to_owned)) {
            (Ok(exit), _, _) => (exit, String::new()),
            (Err(failure), _, _) => (failure.exit, failure.message),
        };
        let (exit, said) = ended(End::Stopped, Ok(()));
        assert!(exit == Exit::Stopped && said.ends_with("its volumes are flushed"), "{said}");
        assert_eq!(ended(End::PowerOff, Ok(())).0, Exit::Done);
        let why = "volume root is not flushed: no room";
        for end in [End::PowerOff, End::Shutdown, End::Reset, End::Stopped] {
            let (exit, said) = ended(end.clone(), Err(why));
            assert!(exit == Exit::Volume && said.ends_with(why), "{end:?}: {said}");
        }
        let failures = [
            (End::Lease("it ended".into()), Exit::Lease),
            (End::Panicked, Exit::Panic),
            (End::Failed("vCPU 0: triple fault".into()), Exit::Guest),
            (End::Broken("thread vcpu-0 panicked".into()), Exit::Internal),
        ];
        for (end, expected) in failures {
            let (exit, said) = ended(end.clone(), Err(why));
            assert!(exit == expected && said.ends_with(why), "{end:?}: {said}");
        }
    }
}
