//! `volume exec`: holds a volume's session for a command, hands it key, open number and anchor over an inherited socket, and
//! takes the new anchors back. The protocol is `policy::disk`'s.

use super::{CliError, Session};
use crate::api::{Done, SessionAnchor, SessionEnd, SessionEvent, SessionView};
use crate::client::{AdminClientError, OneTimeKey};
use crate::server::problem::chain;
use attest::client::ClientError;
use policy::CustomerId;
use policy::disk::{DiskSession, HolderAnswer, MESSAGE_LIMIT, ToolMessage};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use rustix::process::{Pid, Signal, kill_process};
use secretmem::Secret;
use std::ffi::OsString;
use std::io::{ErrorKind, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Command, ExitCode, ExitStatus};
use std::time::{Duration, Instant};
use tokio::signal::unix::{SignalKind, signal};

/// How long before the session's end it is renewed: thrice in its length.
const RENEWALS: u32 = 3;

/// How often the provider is asked again while it does not answer.
const RETRY: Duration = Duration::from_secs(2);

/// How long it is waited for: the session would be over soon after.
const PATIENCE: Duration = Duration::from_secs(60);

/// Runs `command` with the volume.
pub(super) fn exec(
    mut s: Session,
    customer: &CustomerId,
    name: &str,
    command: &[OsString],
) -> Result<ExitCode, CliError> {
    let [program, arguments @ ..] = command else {
        return Err(CliError::Input("volume exec needs a command after --".into()));
    };
    let volume = format!("/v1/customers/{customer}/volumes/{name}");
    let one_time = OneTimeKey::generate()?;
    let view: SessionView = s.client.post(&format!("{volume}/sessions"), &one_time.request())?;
    let kek = one_time.open(customer, name, &view.key)?;
    let mut held = Held { path: format!("{volume}/sessions/{}", view.session), s, ended: false };
    let signals = Signals::start()?;
    let (ours, theirs) = sockets()?;
    let mut child = start(program, arguments, theirs.as_raw_fd())?;
    signals.forward_to(&child);
    drop(theirs);
    let period = Duration::from_secs(u64::from(view.seconds)) / RENEWALS;
    let served = serve(&mut held, &ours, &DiskSession { grant: view.grant }, &kek, period);
    drop((kek, ours));
    let status = wait(&mut child, &mut held, period)?;
    if let Err(error) = &served {
        eprintln!("fealty-keys: {}", chain(error));
    }
    held.end(status, served.is_ok());
    Ok(code_of(status))
}

/// A session that ends when this process does, unless it is killed.
struct Held {
    path: String,
    s: Session,
    ended: bool,
}

impl Held {
    fn renew(&mut self) {
        let renewed: Result<Done, _> = self.s.client.post(&format!("{}/renew", self.path), &());
        if let Err(error) = renewed {
            eprintln!("fealty-keys: the session was not renewed: {}", chain(&error));
        }
    }

    /// Passes a message on. A provider that can't be reached is waited for: a volume that is open loses nothing by it.
    fn answer(&mut self, message: &ToolMessage) -> HolderAnswer {
        let started = Instant::now();
        loop {
            match self.tell(message) {
                Ok(_) => return HolderAnswer::Kept,
                Err(AdminClientError::Client(ClientError::Unreachable { .. })) if started.elapsed() < PATIENCE => {
                    std::thread::sleep(RETRY);
                }
                Err(error) => return HolderAnswer::Refused(chain(&error)),
            }
        }
    }

    fn tell(&mut self, message: &ToolMessage) -> Result<Done, AdminClientError> {
        match message {
            ToolMessage::Anchor(anchor) => {
                let update = SessionAnchor { anchor: anchor.clone() };
                self.s.client.put(&format!("{}/anchor", self.path), &update)
            }
            ToolMessage::Event(text) => {
                let event = SessionEvent { text: text.clone() };
                self.s.client.post(&format!("{}/events", self.path), &event)
            }
        }
    }

    fn end(&mut self, status: ExitStatus, served: bool) {
        let how = if served { "" } else { "; its conversation broke off" };
        self.end_with(format!("{status}{how}"));
    }

    fn end_with(&mut self, outcome: String) {
        self.ended = true;
        for last in [false, true] {
            let ended: Result<Done, _> =
                self.s.client.post(&format!("{}/end", self.path), &SessionEnd { outcome: outcome.clone() });
            match ended {
                Ok(_) => return,
                Err(error) if last => {
                    eprintln!("fealty-keys: the session was not ended, it ends by itself: {}", chain(&error));
                }
                Err(_) => std::thread::sleep(RETRY),
            }
        }
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        if !self.ended {
            self.end_with("the command was not started".into());
        }
    }
}

fn sockets() -> Result<(UnixStream, UnixStream), CliError> {
    // Not close-on-exec: the command inherits its end. Ours is closed by it (std sets that flag).
    let failed = |e: rustix::io::Errno| CliError::Start("a socket pair".into(), e.into());
    let (ours, theirs) =
        socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::empty(), None).map_err(failed)?;
    rustix::io::fcntl_setfd(&ours, rustix::io::FdFlags::CLOEXEC).map_err(failed)?;
    Ok((ours.into(), theirs.into()))
}

fn start(program: &OsString, arguments: &[OsString], fd: i32) -> Result<Child, CliError> {
    let mut command = Command::new(program);
    command.args(arguments).arg("--keys-fd").arg(fd.to_string());
    command.spawn().map_err(|e| CliError::Start(program.to_string_lossy().into_owned(), e))
}

/// Hands the volume over, then answers the command's messages until it hangs up.
fn serve(
    held: &mut Held,
    socket: &UnixStream,
    session: &DiskSession,
    kek: &Secret<32>,
    period: Duration,
) -> Result<(), CliError> {
    let broken = |e| CliError::Start("the conversation with the command".into(), e);
    let mut stream = socket;
    let text = serde_json::to_vec(session).map_err(|e| CliError::Input(e.to_string()))?;
    let sent = send(&mut stream, &text).and_then(|()| stream.write_all(kek.expose()));
    match sent {
        // A command that never asked for a key (say, `--help`) has hung up: its exit code says how it went.
        Err(error) if error.kind() == ErrorKind::BrokenPipe => return Ok(()),
        other => other.map_err(broken)?,
    }
    let mut renewal = Instant::now() + period;
    loop {
        if !readable(socket, renewal.saturating_duration_since(Instant::now())).map_err(broken)? {
            held.renew();
            renewal = Instant::now() + period;
            continue;
        }
        let Some(message) = receive(&mut stream).map_err(broken)? else { return Ok(()) };
        let message: ToolMessage = serde_json::from_slice(&message)
            .map_err(|e| CliError::Input(format!("the command sent a message that can't be read: {e}")))?;
        let answer = held.answer(&message);
        let text = serde_json::to_vec(&answer).map_err(|e| CliError::Input(e.to_string()))?;
        send(&mut stream, &text).map_err(broken)?;
    }
}

fn readable(socket: &UnixStream, limit: Duration) -> std::io::Result<bool> {
    let limit = Timespec { tv_sec: limit.as_secs() as i64, tv_nsec: i64::from(limit.subsec_nanos()) };
    loop {
        match poll(&mut [PollFd::new(socket, PollFlags::IN)], Some(&limit)) {
            Ok(n) => return Ok(n > 0),
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

fn send(stream: &mut &UnixStream, text: &[u8]) -> std::io::Result<()> {
    let length = u32::try_from(text.len()).map_err(std::io::Error::other)?;
    stream.write_all(&length.to_be_bytes())?;
    stream.write_all(text)
}

/// One message; `None` where the command hung up between two.
fn receive(stream: &mut &UnixStream) -> std::io::Result<Option<Vec<u8>>> {
    let mut length = [0; 4];
    match stream.read(&mut length) {
        Ok(0) => return Ok(None),
        Err(error) if error.kind() == ErrorKind::ConnectionReset => return Ok(None),
        Ok(n) => stream.read_exact(&mut length[n..])?,
        Err(error) => return Err(error),
    }
    let length = u32::from_be_bytes(length) as usize;
    if length > MESSAGE_LIMIT {
        return Err(std::io::Error::other(format!("a message of {length} bytes; {MESSAGE_LIMIT} is the limit")));
    }
    let mut text = vec![0; length];
    stream.read_exact(&mut text)?;
    Ok(Some(text))
}

/// Waits for the command; it may still be at work after it hung up.
fn wait(child: &mut Child, held: &mut Held, period: Duration) -> Result<ExitStatus, CliError> {
    let mut renewal = Instant::now() + period;
    loop {
        let ended = child.try_wait().map_err(|e| CliError::Start("waiting for the command".into(), e))?;
        if let Some(status) = ended {
            return Ok(status);
        }
        std::thread::sleep(Duration::from_millis(5));
        if Instant::now() >= renewal {
            held.renew();
            renewal = Instant::now() + period;
        }
    }
}

fn code_of(status: ExitStatus) -> ExitCode {
    let code = status.code().or_else(|| status.signal().map(|n| 128 + n)).unwrap_or(1);
    ExitCode::from(u8::try_from(code).unwrap_or(1))
}

/// While the command runs, signals are its business: this process lives to end the session. SIGTERM and SIGHUP are passed
/// on; SIGINT reaches the command through the terminal.
struct Signals(std::sync::Arc<std::sync::atomic::AtomicI32>);

impl Signals {
    fn start() -> Result<Self, CliError> {
        use std::sync::atomic::{AtomicI32, Ordering};
        let failed = |e| CliError::Start("signal handlers".into(), e);
        let child = std::sync::Arc::new(AtomicI32::new(0));
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(failed)?;
        let (mut interrupt, mut terminate, mut hangup) = {
            let _inside = runtime.enter();
            let take = |kind| signal(kind).map_err(failed);
            (take(SignalKind::interrupt())?, take(SignalKind::terminate())?, take(SignalKind::hangup())?)
        };
        let told = child.clone();
        let watch = move || {
            runtime.block_on(async {
                loop {
                    tokio::select! {
                        _ = interrupt.recv() => {}
                        _ = terminate.recv() => pass(told.load(Ordering::SeqCst)),
                        _ = hangup.recv() => pass(told.load(Ordering::SeqCst)),
                    }
                }
            });
        };
        std::thread::Builder::new().name("signals".into()).spawn(watch).map_err(failed)?;
        Ok(Self(child))
    }

    fn forward_to(&self, child: &Child) {
        let id = i32::try_from(child.id()).unwrap_or(0);
        self.0.store(id, std::sync::atomic::Ordering::SeqCst);
    }
}

fn pass(id: i32) {
    if let Some(pid) = Pid::from_raw(id) {
        let _ = kill_process(pid, Signal::TERM);
    }
}
