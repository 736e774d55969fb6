//! A unix socket that only its owner can connect to, and that goes when the server goes.

use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{FileType, Mode, fchmod, lstat, unlink};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, listen, socket_with};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

/// Connections that wait to be accepted.
const BACKLOG: i32 = 16;
/// How long no client is let in when the system has no descriptors or threads left.
pub(crate) const BREATHER: Duration = Duration::from_millis(100);

/// Why there is no socket.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// Something stands there.
    #[error("{0} exists and is no socket; name another path")]
    Exists(PathBuf),
    /// A server is at work there.
    #[error("{0} belongs to a server that runs; stop that one, or name another path")]
    InUse(PathBuf),
    /// Too long for a socket, or empty.
    #[error("{0} can't be the path of a socket, which has 1 to 107 bytes")]
    Path(PathBuf),
    /// The system refused.
    #[error("{0} can't be made a socket")]
    Io(PathBuf, #[source] io::Error),
}

/// A listening socket. Its file has mode 0600 from the first moment on, and is removed on drop.
#[derive(Debug)]
pub struct Socket {
    listener: UnixListener,
    path: PathBuf,
    /// Device and inode of the file: another server's, which has taken the path since, is left alone.
    file: (u64, u64),
}

impl Socket {
    /// Listens at `path`. A socket that a killed server left there is replaced; anything else is not.
    ///
    /// # Errors
    /// What stands there, or the system.
    pub fn listen(path: &Path) -> Result<Self, SocketError> {
        let failed = |e: Errno| SocketError::Io(path.to_owned(), e.into());
        let address = SocketAddrUnix::new(path).map_err(|_| SocketError::Path(path.to_owned()))?;
        if path.as_os_str().is_empty() {
            return Err(SocketError::Path(path.to_owned()));
        }
        clear_away(path)?;
        let socket =
            socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None).map_err(failed)?;
        // Before bind(2) this sets the mode that the file is made with: no moment in which others may connect.
        fchmod(&socket, Mode::RUSR | Mode::WUSR).map_err(failed)?;
        bind(&socket, &address).map_err(|e| match e {
            Errno::ADDRINUSE => SocketError::InUse(path.to_owned()),
            other => failed(other),
        })?;
        let stat = lstat(path).map_err(failed)?;
        let new = Self { listener: socket.into(), path: path.to_owned(), file: (stat.st_dev, stat.st_ino) };
        listen(&new.listener, BACKLOG).map_err(failed)?;
        Ok(new)
    }

    /// The next connection; `None` once any of `until` has hung up. While the system has no descriptors left, clients wait.
    ///
    /// # Errors
    /// The system's.
    pub fn accept(&self, until: &[BorrowedFd<'_>]) -> io::Result<Option<UnixStream>> {
        while self.wait(until)? {
            match self.listener.accept() {
                Ok((stream, _)) => return Ok(Some(stream)),
                // It was gone again.
                Err(error) if matches!(error.kind(), io::ErrorKind::ConnectionAborted | io::ErrorKind::Interrupted) => {
                }
                Err(error) if is_shortage(&error) => thread::sleep(BREATHER),
                Err(error) => return Err(error),
            }
        }
        Ok(None)
    }

    /// Waits for a connection that can be accepted; not so once any of `until` has hung up.
    pub(crate) fn wait(&self, until: &[BorrowedFd<'_>]) -> io::Result<bool> {
        loop {
            let mut fds = vec![PollFd::new(&self.listener, PollFlags::IN)];
            fds.extend(until.iter().map(|fd| PollFd::from_borrowed_fd(*fd, PollFlags::RDHUP)));
            match poll(&mut fds, None) {
                Err(Errno::INTR) => continue,
                other => other?,
            };
            return Ok(fds[1..].iter().all(|fd| fd.revents().is_empty()));
        }
    }

    /// Itself, to accept from.
    pub(crate) fn listener(&self) -> io::Result<UnixListener> {
        self.listener.try_clone()
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.listener.as_fd()
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        if lstat(&self.path).is_ok_and(|stat| (stat.st_dev, stat.st_ino) == self.file) {
            let _ = unlink(&self.path);
        }
    }
}

fn is_shortage(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EMFILE | libc::ENFILE | libc::ENOMEM | libc::ENOBUFS))
}

/// Removes a socket on which nobody listens.
fn clear_away(path: &Path) -> Result<(), SocketError> {
    let failed = |e: Errno| SocketError::Io(path.to_owned(), e.into());
    let stat = match lstat(path) {
        Err(Errno::NOENT) => return Ok(()),
        other => other.map_err(failed)?,
    };
    if FileType::from_raw_mode(stat.st_mode) != FileType::Socket {
        return Err(SocketError::Exists(path.to_owned()));
    }
    match UnixStream::connect(path) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => unlink(path).map_err(failed),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(SocketError::Io(path.to_owned(), error)),
        Ok(_) => Err(SocketError::InUse(path.to_owned())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    fn path() -> (tempfile::TempDir, PathBuf) {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("s");
        (folder, path)
    }

    #[test]
    fn only_its_owner_can_connect_and_it_goes_with_the_server() {
        let (_folder, path) = path();
        let socket = Socket::listen(&path).expect("listens");
        let mode = std::fs::symlink_metadata(&path).expect("there").permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        let client = UnixStream::connect(&path).expect("connects");
        assert!(socket.accept(&[]).expect("accepts").is_some());
        drop((client, socket));
        assert!(!path.exists());
    }

    #[test]
    fn a_running_server_keeps_its_path_and_a_dead_one_does_not() {
        let (_folder, path) = path();
        let _socket = Socket::listen(&path).expect("listens");
        assert!(matches!(Socket::listen(&path), Err(SocketError::InUse(_))));
        // A killed process closes its socket and leaves the file.
        let left = std::os::unix::net::UnixListener::bind(path.with_extension("left")).expect("bound");
        drop(left);
        Socket::listen(&path.with_extension("left")).expect("replaced");
    }

    #[test]
    fn what_is_no_socket_stays() {
        let (_folder, path) = path();
        std::fs::write(&path, b"mine").expect("written");
        assert!(matches!(Socket::listen(&path), Err(SocketError::Exists(_))));
        assert_eq!(std::fs::read(&path).expect("there"), b"mine");
        let long = path.with_file_name("x".repeat(120));
        assert!(matches!(Socket::listen(&long), Err(SocketError::Path(_))));
        assert!(matches!(Socket::listen(&path.join("below")), Err(SocketError::Io(..))));
    }

    #[test]
    fn another_servers_file_is_left_alone() {
        let (_folder, path) = path();
        let socket = Socket::listen(&path).expect("listens");
        std::fs::remove_file(&path).expect("removed");
        let other = Socket::listen(&path).expect("free");
        drop(socket);
        assert!(path.exists());
        drop(other);
        assert!(!path.exists());
    }

    #[test]
    fn waiting_ends_when_it_is_told_to() {
        let (_folder, path) = path();
        let socket = Socket::listen(&path).expect("listens");
        let (stop, teller) = io::pipe().expect("a pipe");
        drop(teller);
        assert!(socket.accept(&[stop.as_fd()]).expect("polls").is_none());
    }
}
