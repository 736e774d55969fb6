//! What a console is connected to.

use crate::machine::ConsoleBackend;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{RecvFlags, SendFlags, SocketFlags, accept_with, recv, send};
use std::io::{self, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixListener;

/// Bytes that are written at once to what may block.
const BACKEND_PIECE: usize = 256;

/// The other end of a console.
pub enum Line {
    /// What the serial port would have.
    Backend(ConsoleBackend),
    /// A socket that listens, without blocking; one client at a time.
    Socket(Server),
}

/// A listening socket and its client.
pub struct Server {
    listener: UnixListener,
    client: Option<OwnedFd>,
}

impl Line {
    /// A line to whoever connects to `listener`, which must not block.
    pub fn socket(listener: UnixListener) -> Self {
        Self::Socket(Server { listener, client: None })
    }

    /// Lets the next client in, where there is none or the last one hung up; any other is turned away.
    pub(super) fn accept(&mut self) {
        let Self::Socket(server) = self else { return };
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        while let Ok(client) = accept_with(&server.listener, flags) {
            let gone = |old: &OwnedFd| matches!(recv(old, &mut [0][..], RecvFlags::PEEK), Ok((0, _)));
            if server.client.as_ref().is_none_or(gone) {
                server.client = Some(client);
            }
        }
    }

    /// Reads what somebody typed; [`io::ErrorKind::WouldBlock`] where there is nothing now, zero where there never will be.
    pub(super) fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Backend(ConsoleBackend { input: None, .. }) => Ok(0),
            Self::Backend(ConsoleBackend { input: Some(input), .. }) => {
                // It may be one that blocks.
                let mut fds = [PollFd::new(input, PollFlags::IN)];
                match poll(&mut fds, Some(&Timespec::default())) {
                    Ok(0) => Err(io::ErrorKind::WouldBlock.into()),
                    _ => Ok(rustix::io::read(&*input, buffer)?),
                }
            }
            Self::Socket(server) => {
                let Some(client) = &server.client else { return Err(io::ErrorKind::WouldBlock.into()) };
                match recv(client, buffer, RecvFlags::empty()) {
                    Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => Err(io::ErrorKind::WouldBlock.into()),
                    Ok((length @ 1.., _)) => Ok(length),
                    // Gone: the next one may come.
                    Ok(_) | Err(_) => {
                        server.client = None;
                        Err(io::ErrorKind::WouldBlock.into())
                    }
                }
            }
        }
    }

    /// Writes some of `bytes`, at least one; [`io::ErrorKind::WouldBlock`] where the other end takes nothing now, any other error
    /// where nobody takes them.
    pub(super) fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            // It waits for its reader, but not for ever; and a terminal that takes a little may not take more.
            Self::Backend(backend) => match backend.output.write(&bytes[..bytes.len().min(BACKEND_PIECE)]) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => Err(io::ErrorKind::TimedOut.into()),
                answer => answer,
            },
            Self::Socket(server) => {
                let client = server.client.as_ref().ok_or(io::ErrorKind::NotConnected)?;
                match send(client, bytes, SendFlags::NOSIGNAL) {
                    Ok(length) => Ok(length),
                    Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => Err(io::ErrorKind::WouldBlock.into()),
                    Err(error) => {
                        server.client = None;
                        Err(error.into())
                    }
                }
            }
        }
    }

    /// What to wait for: a client, input where `read` says so, and room for output where `write` does.
    pub(super) fn interest<'a>(&'a self, read: bool, write: bool, descriptors: &mut Vec<PollFd<'a>>) {
        let mut flags = PollFlags::empty();
        flags.set(PollFlags::IN, read);
        match self {
            Self::Backend(ConsoleBackend { input: Some(input), .. }) if read => {
                descriptors.push(PollFd::from_borrowed_fd(input.as_fd(), flags));
            }
            Self::Backend(_) => {}
            Self::Socket(server) => {
                descriptors.push(PollFd::new(&server.listener, PollFlags::IN));
                flags.set(PollFlags::OUT, write);
                if let Some(client) = server.client.as_ref().filter(|_| !flags.is_empty()) {
                    descriptors.push(PollFd::from_borrowed_fd(client.as_fd(), flags));
                }
            }
        }
    }
}
