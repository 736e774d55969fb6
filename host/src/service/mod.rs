//! The TPM service: one process a host that alone opens the TPM and the logs.
//!
//! One thread owns the TPM ([`engine`]); one thread a connection reads requests, hands them over and writes answers; the
//! first thread accepts connections on the control socket, waits for signals, and ends the service when nobody needs it.
//!
//! ```text
//! control.sock  root or the service's own user: Register, Extend, Reseal, Status
//! VM sockets    come with Register: Identity, Activate, CertifyWrapKey, Quote, Ecdh, nothing else
//! ```

mod connection;
mod engine;
mod frames;
mod ima;
mod layers;
mod os;
mod peers;
mod quoting;
mod refusal;
mod worker;

pub use engine::{EngineError, LogPaths};

use crate::runtime::{RuntimeDir, RuntimeError};
use attest::tcti::Tcti;
use attest_tpm::EkChoice;
use connection::Shared;
use rustix::event::{PollFd, PollFlags, Timespec};
use std::fs;
use std::io::{self, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::time::{Duration, Instant};
use worker::Worker;

/// How to serve.
#[derive(Debug)]
pub struct Options {
    /// The TPM.
    pub tcti: Tcti,
    /// The endorsement key to be known by.
    pub ek: EkChoice,
    /// Where lock, socket, layer log and state are.
    pub dir: RuntimeDir,
    /// Where logs are.
    pub logs: LogPaths,
    /// Whether to end once nobody needs the service any more.
    pub exit_when_idle: bool,
    /// Gets one byte when the service is ready; then the service lets go of its starter's standard error and session.
    pub ready: Option<OwnedFd>,
}

/// Why the service ended, or never began.
#[derive(Debug, thiserror::Error)]
pub enum ServiceError {
    /// Its folder, or another service has this TPM.
    #[error(transparent)]
    Runtime(#[from] RuntimeError),
    /// TPM or logs.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// The TPM does not answer at all.
    #[error("the TPM does not answer within {0} s: is another program connected to it?")]
    Silent(u64),
    /// Something of the operating system.
    #[error("{0}: {1}")]
    Os(&'static str, #[source] io::Error),
}

/// Serves until a signal, or until nobody needs the service where that was asked for.
pub fn serve(options: Options) -> Result<(), ServiceError> {
    let signals = os::end_signals().map_err(|e| ServiceError::Os("signals", e))?;
    options.dir.create()?;
    let _lock = options.dir.lock()?;
    let (worker, state) = Worker::start(&options)?;
    let listener = listen(&options.dir).map_err(|e| ServiceError::Os("the control socket", e))?;
    let shared = Arc::new(Shared::new(worker, options.dir.clone(), state));
    if let Some(ready) = &options.ready {
        detach(ready, &options.dir).map_err(|e| ServiceError::Os("--ready-fd", e))?;
    }
    let outcome = accept_all(&options, &signals, listener, &shared);
    // First nobody new, then the last word to the TPM, then what the next service must know, then the lock.
    let _ = fs::remove_file(options.dir.control_socket());
    shared.worker().stop();
    shared.keep_state()?;
    outcome.map_err(|e| ServiceError::Os("the service", e))
}

/// See [`crate::fuzz::frames`].
pub(crate) fn fuzz_frames(data: &[u8]) {
    frames::fuzz(data);
}

/// A line for whoever runs the host.
fn note(line: &str) {
    let _ = writeln!(io::stderr(), "fealty-host: {line}");
}

fn listen(dir: &RuntimeDir) -> io::Result<UnixListener> {
    let path = dir.control_socket();
    // The lock is ours, so a socket that is there is a dead service's.
    match fs::remove_file(&path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
        _ => {}
    }
    let new = path.with_extension("new");
    let _ = fs::remove_file(&new);
    let listener = UnixListener::bind(&new)?;
    fs::set_permissions(&new, fs::Permissions::from_mode(0o600))?;
    fs::rename(&new, &path)?;
    listener.set_nonblocking(true)?;
    Ok(listener)
}

/// Says that the service is ready, then lets go of its starter, who may end before it.
fn detach(ready: &OwnedFd, dir: &RuntimeDir) -> io::Result<()> {
    let _ = rustix::process::setsid();
    let log = fs::OpenOptions::new().create(true).append(true).open(dir.path().join("service.log"))?;
    rustix::io::write(ready, b"\n")?;
    os::replace_stderr(&log)
}

fn accept_all(
    options: &Options,
    signals: &OwnedFd,
    mut listener: UnixListener,
    shared: &Arc<Shared>,
) -> io::Result<()> {
    let mut busy = Instant::now() + FIRST_IDLE;
    loop {
        let mut polled = [
            PollFd::from_borrowed_fd(signals.as_fd(), PollFlags::IN),
            PollFd::from_borrowed_fd(listener.as_fd(), PollFlags::IN),
            PollFd::from_borrowed_fd(shared.worker().ended(), PollFlags::IN),
        ];
        let tick = Timespec { tv_sec: 0, tv_nsec: IDLE_TICK.subsec_nanos().into() };
        let timeout = options.exit_when_idle.then_some(&tick);
        match rustix::event::poll(&mut polled, timeout) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(e) => return Err(e.into()),
        }
        if !polled[0].revents().is_empty() {
            return Ok(());
        }
        if !polled[2].revents().is_empty() {
            return Err(io::Error::other("the thread that owns the TPM ended"));
        }
        if !polled[1].revents().is_empty() {
            connection::accept(&listener, shared);
        }
        if shared.is_busy() {
            busy = Instant::now() + IDLE;
        } else if options.exit_when_idle && Instant::now() > busy {
            // Nobody finds the socket from now on; who found it before is served yet.
            fs::remove_file(options.dir.control_socket())?;
            if !is_readable(&listener)? {
                return Ok(());
            }
            connection::accept(&listener, shared);
            listener = listen(&options.dir)?;
        }
    }
}

fn is_readable(fd: &impl AsFd) -> io::Result<bool> {
    let mut polled = [PollFd::from_borrowed_fd(fd.as_fd(), PollFlags::IN)];
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    Ok(rustix::event::poll(&mut polled, Some(&now))? > 0)
}

/// How long a service that ends when idle waits for its first client.
const FIRST_IDLE: Duration = Duration::from_secs(10);

/// How long it waits after its last one.
const IDLE: Duration = Duration::from_millis(1500);

/// How often it looks.
const IDLE_TICK: Duration = Duration::from_millis(250);
