//! The end of a session, on this side. The provider gives a volume away once a session is over, so whatever still writes by then
//! would write beside its next holder: a command that outlives its session is ended.

use super::CliError;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use rustix::time::{ClockId, clock_gettime};
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::process::Child;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

/// How long before the end the command is asked to stop by itself, in milliseconds.
const NOTICE_MS: u64 = 10_000;

/// How often the clock is read: suspended time counts, and no timer says so.
const LOOK: Duration = Duration::from_millis(200);

/// Milliseconds of the boot-time clock.
pub(super) fn boottime_ms() -> u64 {
    let now = clock_gettime(ClockId::Boottime);
    u64::try_from(now.tv_sec).unwrap_or(0) * 1000 + u64::try_from(now.tv_nsec).unwrap_or(0) / 1_000_000
}

/// Ends the command when its time is over, whatever this process waits for.
pub(super) struct Overtime(Arc<Shared>);

struct Shared {
    command: OwnedFd,
    /// The conversation with the command, or with one that the command started.
    line: UnixStream,
    end_ms: AtomicU64,
    /// Whether the command was ended. Held while it is, so that whoever sees it gone learns why.
    ended: Mutex<bool>,
}

impl Overtime {
    /// Watches `child`, with which `line` is the conversation, until `end_ms` of the boot-time clock.
    pub(super) fn watch(child: &Child, line: UnixStream, end_ms: u64) -> Result<Self, CliError> {
        let failed = |e: rustix::io::Errno| CliError::Start("watching the command".into(), e.into());
        let id = i32::try_from(child.id()).ok().and_then(Pid::from_raw).ok_or(failed(rustix::io::Errno::SRCH))?;
        let command = pidfd_open(id, PidfdFlags::empty()).map_err(failed)?;
        let shared = Arc::new(Shared { command, line, end_ms: end_ms.into(), ended: Mutex::default() });
        let watched = Arc::downgrade(&shared);
        let thread = std::thread::Builder::new().name("overtime".into()).spawn(move || look(&watched));
        thread.map_err(|e| CliError::Start("watching the command".into(), e))?;
        Ok(Self(shared))
    }

    /// The session was renewed.
    pub(super) fn until(&self, end_ms: u64) {
        self.0.end_ms.store(end_ms, Ordering::SeqCst);
    }

    /// The session is lost: the command is ended at once.
    pub(super) fn over(&self) {
        self.0.end();
    }

    /// Whether the command was ended for it.
    pub(super) fn was_ended(&self) -> bool {
        *self.0.ended()
    }
}

impl Shared {
    fn ended(&self) -> MutexGuard<'_, bool> {
        self.ended.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn end(&self) {
        // A command may be a script around `fealty-disk`, which lives on and has the socket: it ends when this hangs up.
        let _ = self.line.shutdown(Shutdown::Both);
        // One that has ended by itself was not in the way.
        let mut ended = self.ended();
        *ended |= pidfd_send_signal(&self.command, Signal::KILL).is_ok();
    }
}

/// Ends with the [`Overtime`], or with the command.
fn look(watched: &Weak<Shared>) {
    let mut noticed = 0;
    while let Some(shared) = watched.upgrade() {
        let (now, end) = (boottime_ms(), shared.end_ms.load(Ordering::SeqCst));
        if now >= end {
            return shared.end();
        }
        if now.saturating_add(NOTICE_MS) >= end && noticed != end {
            noticed = end;
            let _ = pidfd_send_signal(&shared.command, Signal::TERM);
        }
        drop(shared);
        std::thread::sleep(LOOK);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::process::ExitStatusExt;
    use std::process::{Command, ExitStatus};

    /// A command that does not heed SIGTERM, from the moment that this returns.
    fn stubborn() -> Child {
        let folder = tempfile::tempdir().expect("a folder");
        let ready = folder.path().join("ready");
        let script = "trap '' TERM; : >\"$0\"; while :; do sleep 0.1; done";
        let child = Command::new("sh").args(["-c", script]).arg(&ready).spawn().expect("a shell");
        while !ready.exists() {
            std::thread::sleep(Duration::from_millis(5));
        }
        child
    }

    fn line() -> UnixStream {
        UnixStream::pair().expect("a pair").0
    }

    fn killed(status: ExitStatus) -> bool {
        status.signal() == Some(9)
    }

    #[test]
    fn a_command_ends_with_its_session_also_one_that_does_not_stop_by_itself() {
        let mut child = stubborn();
        let (ours, mut theirs) = UnixStream::pair().expect("a pair");
        let overtime = Overtime::watch(&child, ours, boottime_ms() + 500).expect("watched");
        assert!(killed(child.wait().expect("ended")));
        assert!(overtime.was_ended());
        // Whoever has the other end knows.
        assert_eq!(std::io::Read::read(&mut theirs, &mut [0]).expect("hung up"), 0);
    }

    #[test]
    fn a_renewed_session_goes_on_and_a_lost_one_is_over_at_once() {
        let mut child = stubborn();
        let overtime = Overtime::watch(&child, line(), boottime_ms() + 100_000).expect("watched");
        overtime.until(boottime_ms() + 200_000);
        std::thread::sleep(4 * LOOK);
        assert!(child.try_wait().expect("asked").is_none() && !overtime.was_ended());
        overtime.over();
        assert!(killed(child.wait().expect("ended")));
        assert!(overtime.was_ended());
    }

    #[test]
    fn a_command_that_ended_by_itself_was_not_ended() {
        let mut child = Command::new("true").spawn().expect("runs");
        let overtime = Overtime::watch(&child, line(), boottime_ms() + 100_000).expect("watched");
        assert!(child.wait().expect("ended").success());
        overtime.over();
        assert!(!overtime.was_ended());
    }
}
