//! A file for one writer, or for several readers.

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use std::fs::File;
use std::io;
use std::time::{Duration, Instant};

/// How long a file may still be held by a process that was killed: the kernel ends what its io_uring has under way, and closes what that
/// refers to, a moment later. Until then it may still write.
const LINGERS: Duration = Duration::from_secs(2);

/// Locks `file` with flock(2), until all its descriptors are closed: beside others who do with `shared`, alone without.
///
/// # Errors
/// [`io::ErrorKind::WouldBlock`] if another has it and keeps it for two seconds more; the system's.
pub fn lock(file: &File, shared: bool) -> io::Result<()> {
    let how = if shared { FlockOperation::NonBlockingLockShared } else { FlockOperation::NonBlockingLockExclusive };
    let begun = Instant::now();
    loop {
        match flock(file, how) {
            Ok(()) => return Ok(()),
            Err(Errno::INTR) => {}
            Err(Errno::WOULDBLOCK) if begun.elapsed() < LINGERS => std::thread::sleep(Duration::from_millis(1)),
            Err(error) => return Err(error.into()),
        }
    }
}
