//! The locks by which QEMU's programs keep each other from an image that one of them writes to (its block/file-posix.c): byte 100 + n of
//! the file is locked by who does n, byte 200 + n by who lets nobody else do it; 0 is reading a consistent state, 1 is writing.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

const READS: i64 = 100;
const WRITES: i64 = 101;
const ALONE_READS: i64 = 200;
const ALONE_WRITES: i64 = 201;

/// Keeps QEMU's programs from writing to `file` as long as it is open; false where one does already.
pub(super) fn keep_writers_away(file: &File) -> io::Result<bool> {
    // As they do: first it is said, then it is looked whether others object, so that of two at least one finds the other.
    for at in [READS, ALONE_WRITES] {
        lock(file, libc::F_OFD_SETLK, byte(libc::F_RDLCK, at))?;
    }
    for at in [ALONE_READS, WRITES] {
        let other = lock(file, libc::F_OFD_GETLK, byte(libc::F_WRLCK, at))?;
        if i32::from(other.l_type) != libc::F_UNLCK {
            return Ok(false);
        }
    }
    Ok(true)
}

fn byte(how: i32, at: i64) -> libc::flock {
    let (l_type, l_whence) = (how as i16, libc::SEEK_SET as i16);
    libc::flock { l_type, l_whence, l_start: at, l_len: 1, l_pid: 0 }
}

fn lock(file: &File, command: i32, mut what: libc::flock) -> io::Result<libc::flock> {
    // SAFETY: the descriptor is open as long as `file` is borrowed, and both commands read and write one flock, which `what` is.
    let done = unsafe { libc::fcntl(file.as_raw_fd(), command, &raw mut what) };
    if done == 0 { Ok(what) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn readers_are_let_in_and_writers_are_not() {
        let file = tempfile::NamedTempFile::new().expect("a file");
        let opened = || file.reopen().expect("opens");
        let (one, two) = (opened(), opened());
        assert!(keep_writers_away(&one).expect("locks") && keep_writers_away(&two).expect("locks"));
        drop((one, two));
        let writer = opened();
        lock(&writer, libc::F_OFD_SETLK, byte(libc::F_RDLCK, WRITES)).expect("locked");
        assert!(!keep_writers_away(&opened()).expect("locks"));
        drop(writer);
        let reader = opened();
        assert!(keep_writers_away(&reader).expect("locks"));
        let objection = lock(&opened(), libc::F_OFD_GETLK, byte(libc::F_WRLCK, ALONE_WRITES)).expect("looked at");
        assert_ne!(i32::from(objection.l_type), libc::F_UNLCK);
    }
}
