//! Finding the TPM service of a TPM, or starting it: for hosts without a daemon.

use super::client::{ControlClient, ServiceError};
use crate::tcti::Tcti;
use policy::Digest;
use std::ffi::OsString;
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// Name of the control socket in the runtime folder.
pub const CONTROL_SOCKET: &str = "control.sock";

/// Environment variable that names the folder of runtime folders.
pub const RUNTIME_VARIABLE: &str = "FEALTY_RUNTIME_DIR";

/// The exit code of a service whose TPM another one serves.
pub const LOCK_TAKEN: u8 = 3;

/// Why no service could be had.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The program is not there, or does not start.
    #[error("the TPM service {0} could not be started")]
    Spawn(String, #[source] std::io::Error),
    /// It ended before it was ready: what it said, or how it ended where it said nothing.
    #[error("the TPM service did not start: {0}")]
    Ended(String),
    /// It is ready but does not answer.
    #[error(transparent)]
    Service(#[from] ServiceError),
}

/// The runtime folder of the service for the TPM behind `tcti`: `runtime_dir` where it is given, otherwise a folder of its
/// own, named after the TCTI string, in `$FEALTY_RUNTIME_DIR` or `/run/fealty`.
pub fn runtime_dir(tcti: &Tcti, runtime_dir: Option<&Path>) -> PathBuf {
    if let Some(dir) = runtime_dir {
        return dir.to_owned();
    }
    let base = std::env::var_os(RUNTIME_VARIABLE).map_or_else(|| PathBuf::from("/run/fealty"), PathBuf::from);
    base.join(format!("tpm-{}", &Digest::of(tcti.to_string().as_bytes()).to_string()[..16]))
}

/// Joins the service that serves the TPM behind `tcti`, or starts `service_binary` (`fealty-host`, which the caller finds
/// beside its own executable) and waits until it is ready. A started service ends by itself when the last process it
/// serves has ended. One lock per TPM decides between two that start at once: the loser ends, and its caller joins.
pub fn spawn_or_join(tcti: &Tcti, runtime: Option<&Path>, service_binary: &Path) -> Result<ControlClient, StartError> {
    spawn_or_join_with(tcti, runtime, service_binary, &[])
}

/// The same, with further arguments for a service that has to be started.
pub fn spawn_or_join_with(
    tcti: &Tcti,
    runtime: Option<&Path>,
    service_binary: &Path,
    more: &[OsString],
) -> Result<ControlClient, StartError> {
    let dir = runtime_dir(tcti, runtime);
    let socket = dir.join(CONTROL_SOCKET);
    let spawned = |e| StartError::Spawn(service_binary.display().to_string(), e);
    let deadline = Instant::now() + JOIN_TIME;
    loop {
        if let Ok(client) = ControlClient::connect(&socket) {
            return Ok(client);
        }
        let (ready, theirs) =
            rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).map_err(|e| spawned(e.into()))?;
        let mut child = spawn(tcti, &dir, service_binary, more, &theirs).map_err(spawned)?;
        drop(theirs);
        let is_ready = std::fs::File::from(ready).read(&mut [0]).map_err(spawned)? == 1;
        // It lets go of this pipe when it ends, or right after it said that it is ready.
        let mut said = Vec::new();
        if let Some(stderr) = child.stderr.take() {
            stderr.take(SAID_LIMIT).read_to_end(&mut said).map_err(spawned)?;
        }
        if is_ready {
            // What it says of a TPM that serves all the same, and nobody can do anything where it can't be said.
            let _ = std::io::stderr().write_all(&said);
            return Ok(ControlClient::connect(&socket)?);
        }
        let status = child.wait().map_err(spawned)?;
        if status.code() != Some(LOCK_TAKEN.into()) || Instant::now() > deadline {
            return Err(StartError::Ended(reason(&said).unwrap_or_else(|| status.to_string())));
        }
        // Another one holds the lock: it opens its TPM, or is just ending.
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// A discrete TPM may take a minute to make an RSA key.
const JOIN_TIME: Duration = Duration::from_secs(120);

/// The longest message of a service that is kept, in bytes.
const SAID_LIMIT: u64 = 4096;

/// What a service that ended said, as one line.
fn reason(said: &[u8]) -> Option<String> {
    let text = String::from_utf8_lossy(said);
    let lines: Vec<_> = text.lines().map(|line| line.trim().trim_start_matches("fealty-host: ")).collect();
    let line = lines.join(" ");
    (!line.trim().is_empty()).then_some(line)
}

fn spawn(tcti: &Tcti, dir: &Path, binary: &Path, more: &[OsString], ready: &OwnedFd) -> std::io::Result<Child> {
    // The child needs the pipe's end under some number: without close-on-exec it keeps this one.
    rustix::io::fcntl_setfd(ready, rustix::io::FdFlags::empty())?;
    let mut command = Command::new(binary);
    command.arg("tpm").arg("--tcti").arg(tcti.to_string()).arg("--runtime-dir").arg(dir);
    command.arg("--exit-when-idle").arg("--ready-fd").arg(ready.as_raw_fd().to_string()).args(more);
    // A group of its own: a Ctrl-C meant for this VM must not end the service that other VMs use.
    let child = command.process_group(0).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn();
    let restored = rustix::io::fcntl_setfd(ready, rustix::io::FdFlags::CLOEXEC);
    let child = child?;
    restored?;
    Ok(child)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    fn tcti(text: &str) -> Tcti {
        text.parse().expect("a TCTI string")
    }

    #[test]
    fn each_tpm_has_a_runtime_folder_of_its_own() {
        assert_ne!(runtime_dir(&tcti("device:/dev/tpm0"), None), runtime_dir(&tcti("device:/dev/tpm1"), None));
        assert_eq!(runtime_dir(&tcti("device:/dev/tpm0"), Some(Path::new("/a"))), Path::new("/a"));
    }

    #[test]
    fn a_service_that_fails_at_once_is_told() {
        let dir = tempfile::tempdir().expect("tempdir");
        let program = dir.path().join("fealty-host");
        std::fs::write(&program, "#!/bin/sh\nexit 1\n").expect("written");
        let tpm = tcti("device:/nowhere");
        let start = |program: &Path| spawn_or_join(&tpm, Some(dir.path()), program);
        std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755)).expect("executable");
        let started = start(&program);
        assert!(matches!(&started, Err(StartError::Ended(why)) if why == "exit status: 1"), "{started:?}");
        std::fs::write(&program, "#!/bin/sh\necho fealty-host: no TPM >&2\necho >&2\necho here >&2\nexit 1\n")
            .expect("written");
        let started = start(&program);
        assert!(matches!(&started, Err(StartError::Ended(why)) if why == "no TPM  here"), "{started:?}");
        let missing = start(&dir.path().join("none"));
        assert!(matches!(missing, Err(StartError::Spawn(..))), "{missing:?}");
    }
}
