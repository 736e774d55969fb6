//! Taking over a descriptor that the parent left open.
#![allow(unsafe_code)]

use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketType, sockopt};
use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};

/// Why `--keys-fd` names nothing to talk to.
#[derive(Debug, thiserror::Error)]
pub(crate) enum InheritError {
    #[error("--keys-fd {0} is standard input, output or error; the keys come over a descriptor of their own")]
    Standard(RawFd),
    #[error("--keys-fd {0} is not an open descriptor; let fealty-keys volume exec start this")]
    Closed(RawFd),
    #[error("--keys-fd {0} is not a unix stream socket; let fealty-keys volume exec start this")]
    NoSocket(RawFd),
    #[error("--keys-fd was taken already")]
    Taken,
}

static TAKEN: AtomicBool = AtomicBool::new(false);

/// The unix stream socket that was inherited as `fd`, closed on exec from now on. Once in a process's life.
pub(crate) fn stream(fd: RawFd) -> Result<UnixStream, InheritError> {
    if fd < 3 {
        return Err(InheritError::Standard(fd));
    }
    if TAKEN.swap(true, Ordering::SeqCst) {
        return Err(InheritError::Taken);
    }
    // SAFETY: F_GETFD and F_SETFD take numbers, and change one flag of the descriptor, if there is one at all.
    let flags = unsafe { libc::fcntl(fd, libc::F_GETFD) };
    if flags < 0 {
        return Err(InheritError::Closed(fd));
    }
    if flags & libc::FD_CLOEXEC != 0 {
        // Inherited ones can't have it: this process opened it itself.
        return Err(InheritError::Closed(fd));
    }
    // SAFETY: the descriptor is open, and it came over execve, as it lacks the close-on-exec flag, which everything has that
    // this process opens (std, rustix and secretmem always set it). So nothing here owns it yet; TAKEN keeps a second call from
    // making a second owner.
    let owned = unsafe { OwnedFd::from_raw_fd(fd) };
    rustix::io::fcntl_setfd(&owned, rustix::io::FdFlags::CLOEXEC).map_err(|_| InheritError::Closed(fd))?;
    let kind = || Ok::<_, Errno>((sockopt::socket_domain(&owned)?, sockopt::socket_type(&owned)?));
    match kind() {
        Ok((AddressFamily::UNIX, SocketType::STREAM)) => Ok(owned.into()),
        _ => Err(InheritError::NoSocket(fd)),
    }
}
