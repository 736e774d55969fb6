//! `volume exec`: holds a volume's session for a command, hands it key, open number and anchor over an inherited socket, and
//! takes the new anchors back; asks the provider for what the command needs permission for. The protocol is `policy::disk`'s.

use super::overtime::{Overtime, boottime_ms};
use super::{CliError, Session};
use crate::api::{
    Done, SessionAnchor, SessionEnd, SessionEvent, SessionOperation, SessionOutcome, SessionPermit, SessionSize,
    SessionView,
};
use crate::client::{AdminClientError, OneTimeKey};
use crate::server::problem::chain;
use attest::client::ClientError;
use attest::protocol::ProblemType;
use policy::disk::{DiskSession, HolderAnswer, MESSAGE_LIMIT, Permit, ToolMessage, VolumeRequest};
use policy::{CustomerId, VolumeId};
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

/// How often the provider is asked again while it does not answer, or refuses.
const RETRY: Duration = Duration::from_secs(2);

/// How long an answer to the command is waited for: the session would be over soon after.
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
    let one_time = OneTimeKey::generate()?;
    let asked_ms = boottime_ms();
    let view: SessionView = s.client.post(&format!("{}/sessions", path_of(customer, name)), &one_time.request())?;
    let kek = one_time.open(customer, name, &view.key)?;
    let first = Part { volume: view.grant.volume, path: session_path(customer, name, &view) };
    let length_ms = u64::from(view.seconds) * 1000;
    let (customer, name, parts) = (customer.clone(), name.to_owned(), vec![first]);
    let mut held = Held { s, customer, name, parts, length_ms, overtime: None, ended: false };
    let signals = Signals::start()?;
    let (ours, theirs) = sockets()?;
    let mut child = start(program, arguments, theirs.as_raw_fd())?;
    signals.forward_to(&child);
    let line = ours.try_clone().map_err(|e| CliError::Start("watching the command".into(), e))?;
    held.overtime = Some(Overtime::watch(&child, line, asked_ms + length_ms)?);
    drop(theirs);
    let mut renewal = Instant::now() + Duration::from_millis(length_ms) / RENEWALS;
    let served = serve(&mut held, &ours, &DiskSession { grant: view.grant, size: view.size }, &kek, &mut renewal);
    drop((kek, ours));
    let status = wait(&mut child, &mut held, renewal)?;
    if held.overtime.as_ref().is_some_and(Overtime::was_ended) {
        eprintln!("fealty-keys: the session was over and the volume may be another's now: the command was ended");
    }
    if let Err(error) = &served {
        eprintln!("fealty-keys: {}", chain(error));
    }
    held.end(status, served.is_ok());
    Ok(code_of(status))
}

fn path_of(customer: &CustomerId, name: &str) -> String {
    format!("/v1/customers/{customer}/volumes/{name}")
}

fn session_path(customer: &CustomerId, name: &str, view: &SessionView) -> String {
    format!("{}/sessions/{}", path_of(customer, name), view.session)
}

/// What is said to the command: an answer, and perhaps a key behind it.
type Said = (HolderAnswer, Option<Secret<32>>);

/// Sessions that end when this process does, unless it is killed.
struct Held {
    s: Session,
    customer: CustomerId,
    /// The volume that the command was started for.
    name: String,
    /// Its session, and that of a clone which the command makes of it.
    parts: Vec<Part>,
    /// How long a session lasts from when it was asked for or renewed.
    length_ms: u64,
    overtime: Option<Overtime>,
    ended: bool,
}

/// One volume that is held.
struct Part {
    volume: VolumeId,
    path: String,
}

impl Held {
    /// Renews every session, and says when to do so again.
    fn renew(&mut self) -> Instant {
        let asked_ms = boottime_ms();
        let mut good = true;
        for part in &self.parts {
            let renewed: Result<Done, AdminClientError> = self.s.client.post(&format!("{}/renew", part.path), &());
            let Err(error) = renewed else { continue };
            good = false;
            eprintln!("fealty-keys: the session was not renewed: {}", chain(&error));
            let AdminClientError::Client(error) = error else { continue };
            if let (Some(ProblemType::VolumeHeld | ProblemType::NotFound), Some(overtime)) =
                (error.problem(), &self.overtime)
            {
                overtime.over();
            }
        }
        if let (true, Some(overtime)) = (good, &self.overtime) {
            overtime.until(asked_ms + self.length_ms);
        }
        Instant::now() + if good { Duration::from_millis(self.length_ms) / RENEWALS } else { RETRY }
    }

    /// Passes a message on. A provider that can't be reached, or whose answer something on the way replaced, is asked again for a
    /// while: a volume that is open loses nothing by it. Only what the provider itself says is a refusal: after anything else it may
    /// have done what it was asked.
    fn answer(&mut self, message: &ToolMessage) -> Said {
        let started = Instant::now();
        loop {
            match self.tell(message) {
                Ok(said) => return said,
                Err(error) if is_refusal(&error) => return (HolderAnswer::Refused(chain(&error)), None),
                Err(CliError::Client(AdminClientError::Client(
                    ClientError::Unreachable { .. } | ClientError::BadAnswer { .. },
                ))) if started.elapsed() < PATIENCE => std::thread::sleep(RETRY),
                Err(error) => return (HolderAnswer::Unknown(chain(&error)), None),
            }
        }
    }

    fn tell(&mut self, message: &ToolMessage) -> Result<Said, CliError> {
        let path = match message {
            ToolMessage::Anchor(anchor) => self.path(anchor.volume())?,
            ToolMessage::Size { volume, .. } => self.path(*volume)?,
            _ => self.parts[0].path.clone(),
        };
        let client = &mut self.s.client;
        let _: Done = match message {
            ToolMessage::Anchor(anchor) => {
                client.put(&format!("{path}/anchor"), &SessionAnchor { anchor: anchor.clone() })?
            }
            ToolMessage::Event(text) => client.post(&format!("{path}/events"), &SessionEvent { text: text.clone() })?,
            ToolMessage::Size { bytes, .. } => client.put(&format!("{path}/size"), &SessionSize { bytes: *bytes })?,
            ToolMessage::Outcome { done, detail } => {
                client.post(&format!("{path}/outcome"), &SessionOutcome { done: *done, detail: detail.clone() })?
            }
            ToolMessage::Operation(request) => return self.begin(&path, request),
        };
        Ok((HolderAnswer::Kept, None))
    }

    /// Asks whether an operation is permitted. A clone's session is held from now on.
    fn begin(&mut self, path: &str, request: &VolumeRequest) -> Result<Said, CliError> {
        let one_time = OneTimeKey::generate()?;
        let asked = SessionOperation { request: request.clone(), key: one_time.request() };
        let (permit, key) = match self.s.client.post(&format!("{path}/operations"), &asked)? {
            SessionPermit::Plain => (Permit::Plain, None),
            SessionPermit::Key(id) => (Permit::Key(id), None),
            SessionPermit::Kek(sealed) => {
                (Permit::Kek(sealed.key_id), Some(one_time.open(&self.customer, &self.name, &sealed)?))
            }
            SessionPermit::Clone { name, session } => {
                let path = session_path(&self.customer, &name, &session);
                self.parts.push(Part { volume: session.grant.volume, path });
                let key = one_time.open(&self.customer, &name, &session.key)?;
                (Permit::Clone(session.grant), Some(key))
            }
        };
        Ok((HolderAnswer::Permitted(permit), key))
    }

    fn path(&self, volume: VolumeId) -> Result<String, CliError> {
        let part = self.parts.iter().rev().find(|part| part.volume == volume);
        let unknown = || CliError::Input(format!("the command speaks of volume {volume}, which it was not given"));
        part.map(|part| part.path.clone()).ok_or_else(unknown)
    }

    fn end(&mut self, status: ExitStatus, served: bool) {
        let how = if served { "" } else { "; its conversation broke off" };
        self.end_with(format!("{status}{how}"));
    }

    fn end_with(&mut self, outcome: String) {
        self.ended = true;
        for part in &self.parts {
            end_session(&mut self.s, &part.path, &outcome);
        }
    }
}

/// Whether nothing was done: the provider says so, or it was not asked.
fn is_refusal(error: &CliError) -> bool {
    match error {
        // What it could not do it may have done, as far as it knows.
        CliError::Client(AdminClientError::Client(ClientError::Refused(problem))) => problem.status < 500,
        CliError::Input(_) => true,
        _ => false,
    }
}

fn end_session(s: &mut Session, path: &str, outcome: &str) {
    for last in [false, true] {
        let ended: Result<Done, _> = s.client.post(&format!("{path}/end"), &SessionEnd { outcome: outcome.to_owned() });
        match ended {
            Ok(_) => return,
            Err(error) if last => {
                eprintln!("fealty-keys: the session was not ended, it ends by itself: {}", chain(&error));
            }
            Err(_) => std::thread::sleep(RETRY),
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
    renewal: &mut Instant,
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
    loop {
        // A command that always has something to say, an anchor for each FLUSH, must not keep the session from being renewed.
        let left = renewal.saturating_duration_since(Instant::now());
        if left.is_zero() || !readable(socket, left).map_err(broken)? {
            *renewal = held.renew();
            continue;
        }
        let Some(message) = receive(&mut stream).map_err(broken)? else { return Ok(()) };
        let message: ToolMessage = serde_json::from_slice(&message)
            .map_err(|e| CliError::Input(format!("the command sent a message that can't be read: {e}")))?;
        let (answer, key) = held.answer(&message);
        let text = serde_json::to_vec(&answer).map_err(|e| CliError::Input(e.to_string()))?;
        send(&mut stream, &text).map_err(broken)?;
        if let Some(key) = key {
            stream.write_all(key.expose()).map_err(broken)?;
        }
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
fn wait(child: &mut Child, held: &mut Held, mut renewal: Instant) -> Result<ExitStatus, CliError> {
    loop {
        let ended = child.try_wait().map_err(|e| CliError::Start("waiting for the command".into(), e))?;
        if let Some(status) = ended {
            return Ok(status);
        }
        std::thread::sleep(Duration::from_millis(5));
        if Instant::now() >= renewal {
            renewal = held.renew();
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

#[cfg(test)]
mod tests {
    use super::*;
    use attest::protocol::Problem;

    #[test]
    fn only_what_the_provider_says_is_a_refusal() {
        let problem = |status| {
            let problem =
                Problem { kind: "urn:fealty:problem:conflict".into(), title: "no".into(), status, detail: None };
            ClientError::Refused(Box::new(problem))
        };
        let (url, reason) = ("https://keys.example:8443".to_owned(), "502".to_owned());
        let lost = [
            problem(500),
            ClientError::Unreachable { url: url.clone(), reason: reason.clone() },
            ClientError::BadAnswer { url: url.clone(), reason: reason.clone() },
            ClientError::WrongProvider { url, reason },
        ];
        let refuses = |error| is_refusal(&CliError::Client(AdminClientError::Client(error)));
        assert!(refuses(problem(403)) && !lost.into_iter().any(refuses));
        assert!(!is_refusal(&CliError::Client(AdminClientError::Sealed)), "it was permitted");
    }
}
