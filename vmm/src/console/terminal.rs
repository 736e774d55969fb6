//! The terminal in raw mode, and back as it was on every way out: return, panic, fatal signal.
#![allow(unsafe_code)]

use rustix::stdio::stdin;
use rustix::termios::{OptionalActions, Termios, tcgetattr, tcsetattr};
use std::io;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

static BEFORE: OnceLock<Termios> = OnceLock::new();
static RAW: AtomicBool = AtomicBool::new(false);

/// The terminal is raw as long as this lives.
pub struct RawMode(());

impl RawMode {
    /// Makes the terminal on standard input raw; `None` where there is none. Signals that its keys would send come as
    /// bytes from now on.
    pub fn enter() -> io::Result<Option<Self>> {
        // Asking for the settings is also how to ask whether it is a terminal.
        let Ok(before) = tcgetattr(stdin()) else { return Ok(None) };
        let mut raw = BEFORE.get_or_init(|| before).clone();
        raw.make_raw();
        restore_on_fatal_signals();
        // First the mark, so that whoever ends the process between the two restores once too often, not once too seldom.
        RAW.store(true, Ordering::SeqCst);
        tcsetattr(stdin(), OptionalActions::Now, &raw)?;
        Ok(Some(Self(())))
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        restore();
    }
}

/// Whether the terminal is raw, so that lines end with a carriage return too.
pub fn is_raw() -> bool {
    RAW.load(Ordering::Relaxed)
}

/// The terminal as it was. Any number of times, from any thread, also from a signal handler.
pub fn restore() {
    if RAW.swap(false, Ordering::SeqCst)
        && let Some(before) = BEFORE.get()
    {
        // A terminal that is gone needs no restoring.
        let _ = tcsetattr(stdin(), OptionalActions::Now, before);
    }
}

const FATAL: [i32; 5] = [libc::SIGSEGV, libc::SIGBUS, libc::SIGILL, libc::SIGFPE, libc::SIGABRT];

fn restore_on_fatal_signals() {
    for signal in FATAL {
        // SAFETY: an all-zero sigaction is valid; the handler is a plain function that makes system calls alone, takes no lock and
        // allocates nothing. SA_RESETHAND gives the signal back its default, which then ends the process.
        unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = restore_and_die as extern "C" fn(i32) as usize;
            action.sa_flags = libc::SA_RESETHAND | libc::SA_ONSTACK;
            libc::sigaction(signal, &raw const action, std::ptr::null_mut());
        }
    }
}

extern "C" fn restore_and_die(signal: i32) {
    restore();
    // SAFETY: raise may be called in a signal handler. The signal has its default again, and comes once this returns.
    unsafe { libc::raise(signal) };
}
