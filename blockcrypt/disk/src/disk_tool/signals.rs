//! What an interruption leaves behind: nothing that looks like a volume or an image.
#![allow(unsafe_code)]

use super::place::Temporary;
use super::report;
use std::ffi::c_int;
use std::io::{self, PipeReader, PipeWriter};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// How far the work is: decides what SIGINT, SIGTERM and SIGHUP do. They are taken by a thread of their own, so that they
/// work whatever the others wait for.
#[derive(Clone, Default)]
pub(crate) struct Interrupts(Arc<Mutex<Stage>>);

#[derive(Default)]
enum Stage {
    /// Nothing was changed.
    #[default]
    Nothing,
    /// A temporary file is being written; what is to be said of the rest, once that is gone.
    Draft(Temporary, &'static str),
    /// A device is being written; what is to be said of the rest.
    Device(PathBuf, Option<&'static str>),
    /// A volume is being changed in its place; what is to be said of one that is cut off.
    Changing(&'static str),
    /// It gets its name and its anchor: too late to go back, and soon over. Whether an interruption was asked for.
    Committing(bool),
    /// A volume is lent to others; what hangs up when that is to end.
    Serving(Option<PipeWriter>),
    /// The work is done.
    Done,
}

const UNCHANGED: &str = "nothing was changed";
const WATCHED: [c_int; 3] = [libc::SIGINT, libc::SIGTERM, libc::SIGHUP];

impl Interrupts {
    /// Blocks the signals in this thread, and so in all it makes from now on, and starts the thread that takes them. A signal
    /// that was ignored before (nohup) stays so. Writing beyond a limit becomes an error instead of a signal.
    pub(crate) fn watch() -> io::Result<Self> {
        let signals = take_signals()?;
        let interrupts = Self::default();
        let told = interrupts.clone();
        let wait = move || {
            while let Some(signal) = next(&signals) {
                told.interrupted(signal);
            }
        };
        std::thread::Builder::new().name("signals".into()).spawn(wait)?;
        Ok(interrupts)
    }

    /// Has a temporary file made: an interruption comes before that, or removes it.
    pub(crate) fn drafting<R, E>(&self, make: impl FnOnce() -> Result<(R, Temporary), E>) -> Result<(R, Temporary), E> {
        let mut stage = self.stage();
        let made = make()?;
        *stage = Stage::Draft(made.1.clone(), UNCHANGED);
        Ok(made)
    }

    /// Something else than the file that is made is changed from now on; `rest` says how it is without that file.
    pub(crate) fn changing_besides(&self, rest: &'static str) {
        match &mut *self.stage() {
            Stage::Draft(_, said) => *said = rest,
            Stage::Device(_, said) => *said = Some(rest),
            stage => *stage = Stage::Changing(rest),
        }
    }

    pub(crate) fn overwriting(&self, device: &Path) {
        let mut stage = self.stage();
        let rest = match *stage {
            Stage::Changing(rest) => Some(rest),
            _ => None,
        };
        *stage = Stage::Device(device.to_owned(), rest);
    }

    /// A volume is changed in its place from now on; `cut_off` says how it is when that is interrupted.
    pub(crate) fn changing(&self, cut_off: &'static str) {
        *self.stage() = Stage::Changing(cut_off);
    }

    pub(crate) fn committing(&self) {
        *self.stage() = Stage::Committing(false);
    }

    /// A server is at work. The first interruption only asks it to end: the returned pipe hangs up.
    pub(crate) fn serving(&self) -> io::Result<PipeReader> {
        let (reader, writer) = io::pipe()?;
        *self.stage() = Stage::Serving(Some(writer));
        Ok(reader)
    }

    /// The temporary file is gone: as if nothing had begun.
    pub(crate) fn abandoned(&self) {
        *self.stage() = Stage::Nothing;
    }

    pub(crate) fn done(&self) {
        *self.stage() = Stage::Done;
    }

    fn stage(&self) -> MutexGuard<'_, Stage> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ends the process, whatever its other threads wait for; leaves behind what an interruption would.
    pub(crate) fn cut_off(&self, code: u8, why: &str) -> ! {
        end(self.stage(), code, why)
    }

    fn interrupted(&self, signal: c_int) {
        let mut stage = self.stage();
        match &mut *stage {
            Stage::Committing(asked @ false) => {
                *asked = true;
                report::interruption(
                    "interrupted while the work is being committed: it ends at once; a second time leaves it open",
                );
            }
            Stage::Serving(asked @ Some(_)) => {
                *asked = None;
                report::interruption(
                    "ending: requests in flight are finished, then the volume is closed; a second time ends at once",
                );
            }
            Stage::Done => {}
            _ => end(stage, (128 + signal) as u8, "interrupted"),
        }
    }
}

/// Ends the process at this stage. It is locked until then, so that no other thread goes on to the next one.
fn end(stage: MutexGuard<'_, Stage>, code: u8, why: &str) -> ! {
    report::end(code, &format!("{why}; {}", stage.left()));
    std::process::exit(code.into())
}

impl Stage {
    /// Removes what is not complete, and says what is left if the process ends at this stage.
    fn left(&self) -> String {
        match self {
            Self::Nothing => UNCHANGED.to_owned(),
            Self::Draft(temporary, rest) => match temporary.remove() {
                Ok(()) => (*rest).to_owned(),
                Err(error) => format!("{} is left, remove it: {error}; {rest}", temporary.path().display()),
            },
            Self::Device(device, rest) => {
                let rest = rest.map(|rest| format!("; {rest}")).unwrap_or_default();
                format!("{} may be overwritten in part{rest}", device.display())
            }
            Self::Changing(cut_off) => (*cut_off).to_owned(),
            Self::Committing(_) => "the file is in its place, but whether its anchor is kept is not known".to_owned(),
            Self::Serving(_) => "the volume was not closed in order, which loses nothing that was flushed".to_owned(),
            Self::Done => "the work is done".to_owned(),
        }
    }
}

fn take_signals() -> io::Result<libc::sigset_t> {
    // SAFETY: an all-zero sigset_t may be handed to sigemptyset, which initialises it; sigaction with a null new action only
    // writes the old one, to a live and sufficiently large place, all-zero before; SIG_IGN is a disposition that runs no code.
    unsafe {
        libc::signal(libc::SIGXFSZ, libc::SIG_IGN);
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut set);
        for signal in WATCHED {
            let mut old: libc::sigaction = std::mem::zeroed();
            let known = libc::sigaction(signal, std::ptr::null(), &raw mut old) == 0;
            if !(known && old.sa_sigaction == libc::SIG_IGN) {
                libc::sigaddset(&raw mut set, signal);
            }
        }
        match libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut()) {
            0 => Ok(set),
            error => Err(io::Error::from_raw_os_error(error)),
        }
    }
}

fn next(signals: &libc::sigset_t) -> Option<c_int> {
    let mut signal = 0;
    // SAFETY: both pointers are to live values; the set was initialised by sigemptyset.
    let error = unsafe { libc::sigwait(signals, &raw mut signal) };
    (error == 0).then_some(signal)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_and_what_else_was_changed_are_both_named() {
        let device = Path::new("/dev/some");
        for order in [[true, false], [false, true]] {
            let interrupts = Interrupts::default();
            for first in order {
                match first {
                    true => interrupts.overwriting(device),
                    false => interrupts.changing_besides("the rest"),
                }
            }
            assert_eq!(interrupts.stage().left(), "/dev/some may be overwritten in part; the rest");
        }
        let interrupts = Interrupts::default();
        interrupts.overwriting(device);
        assert_eq!(interrupts.stage().left(), "/dev/some may be overwritten in part");
    }
}
