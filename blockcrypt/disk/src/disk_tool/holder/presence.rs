//! Whether the holder is still there: without it, the right to use the volume ends.

use super::Holder;
use super::error::HolderError;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

/// How often it is looked whether the holder is still there, and how long after it has left work may still end by itself.
const LOOK: Duration = Duration::from_millis(200);
const GRACE: Duration = Duration::from_millis(500);

impl Holder {
    /// Whether the holder is still there.
    pub(crate) fn still_there(&self) -> Result<(), HolderError> {
        let mut line = [PollFd::new(&self.line, PollFlags::RDHUP)];
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        match poll(&mut line, Some(&now)) {
            Ok(0) | Err(rustix::io::Errno::INTR) => Ok(()),
            _ => Err(HolderError::Gone),
        }
    }

    /// Does `work`, which may be long and tell the holder nothing, and has it `cut_off` if the holder leaves meanwhile: the volume
    /// may be another's then, and what he writes would be written over.
    ///
    /// # Errors
    /// The system's, if it has no thread to watch: then nothing is done.
    pub(crate) fn while_there<R>(
        &self,
        work: impl FnOnce() -> R,
        cut_off: impl FnOnce(HolderError) + Send,
    ) -> io::Result<R> {
        let over = AtomicBool::new(false);
        thread::scope(|scope| {
            let watch = || {
                while !over.load(Ordering::Acquire) {
                    thread::park_timeout(LOOK);
                    let Err(gone) = self.still_there() else { continue };
                    // Work that ends by itself says how.
                    thread::park_timeout(GRACE);
                    if !over.load(Ordering::Acquire) {
                        cut_off(gone);
                    }
                    return;
                }
            };
            let watch = thread::Builder::new().name("holder".to_owned()).spawn_scoped(scope, watch)?;
            let _over = Over(&over, watch.thread());
            Ok(work())
        })
    }
}

/// Says when work is over, also where it panics, lest it be watched for ever.
struct Over<'a>(&'a AtomicBool, &'a thread::Thread);

impl Drop for Over<'_> {
    fn drop(&mut self) {
        let Self(over, watch) = self;
        over.store(true, Ordering::Release);
        watch.unpark();
    }
}

impl AsFd for Holder {
    /// What hangs up when the holder leaves. Not to be read.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.line.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixStream;
    use std::panic::{AssertUnwindSafe, catch_unwind};
    use std::sync::mpsc::RecvTimeoutError;

    #[test]
    fn a_holder_that_leaves_is_noticed() {
        let (ours, theirs) = UnixStream::pair().expect("a pair");
        let holder = Holder::new(ours).expect("a holder");
        holder.still_there().expect("there");
        drop(theirs);
        assert!(matches!(holder.still_there(), Err(HolderError::Gone)));
    }

    #[test]
    fn work_is_cut_off_when_the_holder_leaves_and_not_before() {
        let (ours, theirs) = UnixStream::pair().expect("a pair");
        let holder = Holder::new(ours).expect("a holder");
        let (told, heard) = std::sync::mpsc::channel();
        let cut_off = |gone: HolderError| told.send(gone.to_string()).expect("somebody hears");
        let pause = 2 * (LOOK + GRACE);
        let waited = holder.while_there(|| heard.recv_timeout(pause), cut_off).expect("watched");
        assert_eq!(waited, Err(RecvTimeoutError::Timeout));
        drop(theirs);
        let said = holder.while_there(|| heard.recv(), cut_off).expect("watched").expect("cut off");
        assert!(said.contains("the key holder is gone"), "{said}");
    }

    #[test]
    fn work_that_panics_is_watched_no_longer() {
        let (ours, _theirs) = UnixStream::pair().expect("a pair");
        let holder = Holder::new(ours).expect("a holder");
        let panics = || holder.while_there(|| panic!("its own"), |_| ());
        assert!(catch_unwind(AssertUnwindSafe(panics)).is_err());
    }
}
