//! Signals an eventfd without ever waiting for somebody.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr::null_mut;

/// What signals eventfds that a front end has too.
///
/// A `write` to one waits as long as it is full. Whoever shares the descriptor can fill it, and take `O_NONBLOCK` from it, at any moment,
/// so that no look at it beforehand helps. The signals of the kernel itself never wait. So one is asked for that comes with the end of an
/// asynchronous read (io_submit(2), `IOCB_FLAG_RESFD`): of nothing, which is over at once.
pub(super) struct Signal {
    /// The system's name for what completions are kept in.
    context: libc::c_ulong,
    nothing: File,
}

impl Signal {
    /// # Errors
    /// The system's, if it has no asynchronous I/O or none left (`fs.aio-max-nr`).
    pub(super) fn new() -> io::Result<Self> {
        let nothing = File::open("/dev/null")?;
        let mut context: libc::c_ulong = 0;
        // SAFETY: io_setup(2) writes one word to `context`, which is zero as it demands.
        check(unsafe { libc::syscall(libc::SYS_io_setup, 1, &raw mut context) })?;
        Ok(Self { context, nothing })
    }

    /// Signals `event`; one that is full stays so.
    ///
    /// # Errors
    /// `InvalidInput` if it is no eventfd; the system's.
    pub(super) fn raise(&self, event: BorrowedFd<'_>) -> io::Result<()> {
        match self.read_nothing(event) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                self.forget()?;
                self.read_nothing(event)
            }
            done => done,
        }
    }

    fn read_nothing(&self, event: BorrowedFd<'_>) -> io::Result<()> {
        const PREAD: u16 = 0;
        const RESFD: u32 = 1;
        // SAFETY: the structure is integers, for which zeroes are values.
        let mut read: libc::iocb = unsafe { std::mem::zeroed() };
        read.aio_lio_opcode = PREAD;
        read.aio_fildes = self.nothing.as_raw_fd() as u32;
        read.aio_flags = RESFD;
        read.aio_resfd = event.as_raw_fd() as u32;
        let mut list = [&raw mut read];
        // SAFETY: the context is this one's. The list has one element, the structure it points at outlives the call, and the kernel keeps
        // neither. The read is of no byte, so that nothing is written to its buffer, which is null.
        check(unsafe { libc::syscall(libc::SYS_io_submit, self.context, 1, list.as_mut_ptr()) })
    }

    /// Makes room for completions: all reads are over, and nobody asks how.
    fn forget(&self) -> io::Result<()> {
        const EVENTS: usize = 128;
        let mut events = [[0_u64; 4]; EVENTS];
        let limit = null_mut::<libc::timespec>();
        // SAFETY: the context is this one's; the kernel writes at most `EVENTS` events of four words each to the array. It need find
        // none (the zero), so that it does not wait.
        check(unsafe { libc::syscall(libc::SYS_io_getevents, self.context, 0, EVENTS, events.as_mut_ptr(), limit) })
    }
}

impl Drop for Signal {
    fn drop(&mut self) {
        // SAFETY: the context is this one's, and nobody uses it any more.
        let _ = unsafe { libc::syscall(libc::SYS_io_destroy, self.context) };
    }
}

fn check(result: libc::c_long) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::event::{EventfdFlags, eventfd};
    use std::os::fd::AsFd;

    #[test]
    fn an_eventfd_counts_its_signals_and_a_full_one_holds_up_nobody() {
        let signal = Signal::new().expect("asynchronous I/O");
        // It blocks whoever writes to it, or reads in vain.
        let event = eventfd(0, EventfdFlags::CLOEXEC).expect("an eventfd");
        let taken = || {
            let mut count = [0; 8];
            rustix::io::read(&event, &mut count).expect("a count");
            u64::from_ne_bytes(count)
        };
        // More than the kernel keeps completions of.
        (0..1000).for_each(|_| signal.raise(event.as_fd()).expect("signalled"));
        assert_eq!(taken(), 1000);
        rustix::io::write(&event, &(u64::MAX - 1).to_ne_bytes()).expect("room");
        (0..1000).for_each(|_| signal.raise(event.as_fd()).expect("signalled"));
        assert_eq!(taken(), u64::MAX);
    }

    #[test]
    fn what_is_no_eventfd_is_refused() {
        let signal = Signal::new().expect("asynchronous I/O");
        let (_reader, writer) = io::pipe().expect("a pipe");
        assert_eq!(signal.raise(writer.as_fd()).expect_err("no eventfd").kind(), io::ErrorKind::InvalidInput);
    }
}
