//! Signals as something to poll for: SIGTERM, SIGINT, SIGHUP and SIGQUIT are blocked everywhere and read from a descriptor.
#![allow(unsafe_code)]

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd};

const ASKED_TO_END: [i32; 4] = [libc::SIGTERM, libc::SIGINT, libc::SIGHUP, libc::SIGQUIT];

/// The signals that ask this process to end.
pub struct Signals {
    fd: OwnedFd,
}

impl Signals {
    /// Blocks the signals in this thread, and so in those it makes from now on, and opens their descriptor. A thread made
    /// before would still die of them.
    pub fn take() -> io::Result<Self> {
        // SAFETY: an all-zero sigset_t may be handed to sigemptyset, which initialises it; the calls below only read it. A
        // descriptor that signalfd returns belongs to nobody else.
        unsafe {
            let mut set: libc::sigset_t = std::mem::zeroed();
            libc::sigemptyset(&raw mut set);
            for signal in ASKED_TO_END {
                libc::sigaddset(&raw mut set, signal);
            }
            match libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut()) {
                0 => {}
                error => return Err(io::Error::from_raw_os_error(error)),
            }
            match libc::signalfd(-1, &raw const set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK) {
                -1 => Err(io::Error::last_os_error()),
                fd => Ok(Self { fd: OwnedFd::from_raw_fd(fd) }),
            }
        }
    }

    /// Starts threads with `start` that do not die of these signals, in a process that for the time being still does.
    pub fn kept_from<T>(start: impl FnOnce() -> T) -> T {
        // SAFETY: as in `take`; the second set is filled by the call that blocks and only read by the one that restores.
        unsafe {
            let (mut set, mut before): (libc::sigset_t, libc::sigset_t) = (std::mem::zeroed(), std::mem::zeroed());
            libc::sigemptyset(&raw mut set);
            for signal in ASKED_TO_END {
                libc::sigaddset(&raw mut set, signal);
            }
            libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, &raw mut before);
            let started = start();
            libc::pthread_sigmask(libc::SIG_SETMASK, &raw const before, std::ptr::null_mut());
            started
        }
    }

    /// Whether one waits; it goes on waiting.
    pub fn pending(&self) -> bool {
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        poll(&mut [PollFd::new(self, PollFlags::IN)], Some(&now)).is_ok_and(|ready| ready > 0)
    }

    /// How many of them came since the last call; two of one kind that came together count once.
    pub fn count(&self) -> usize {
        let mut count = 0;
        let mut one = [0; size_of::<libc::signalfd_siginfo>()];
        while rustix::io::read(&self.fd, &mut one).is_ok_and(|n| n == one.len()) {
            count += 1;
        }
        count
    }
}

impl AsFd for Signals {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}
