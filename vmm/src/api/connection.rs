//! One client of the control socket.

use super::http::{self, BODY_LIMIT, HEAD_LIMIT, HttpError, Request};
use crate::sandbox::descriptors;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

/// How long a client may take for one request, and how long it may leave an answer unread.
pub(super) const PATIENCE: Duration = Duration::from_secs(10);

/// What a connection has for its server.
#[derive(Debug)]
pub(super) enum Turn {
    /// A request, and the descriptor that came with it.
    Request(Request, Option<OwnedFd>),
    /// Nothing whole yet.
    Wait,
    /// What came is no request; answer so and end.
    Bad(HttpError),
    /// The client is gone.
    End,
}

/// A connection and what has come of its next request.
pub(super) struct Connection {
    stream: UnixStream,
    bytes: Vec<u8>,
    descriptor: Option<OwnedFd>,
    last: Instant,
}

impl Connection {
    pub(super) fn new(stream: UnixStream) -> io::Result<Self> {
        stream.set_write_timeout(Some(PATIENCE))?;
        Ok(Self { stream, bytes: Vec::new(), descriptor: None, last: Instant::now() })
    }

    /// Reads what is there: to be called when the socket is readable.
    pub(super) fn read(&mut self) -> Turn {
        let mut piece = [0; 4096];
        let (length, descriptor) = match descriptors::receive(self.stream.as_fd(), &mut piece) {
            Ok((0, _)) | Err(_) => return Turn::End,
            Ok(received) => received,
        };
        self.bytes.extend_from_slice(&piece[..length]);
        if descriptor.is_some() {
            self.descriptor = descriptor;
        }
        self.next()
    }

    /// The next request among what was read.
    pub(super) fn next(&mut self) -> Turn {
        match http::parse(&self.bytes) {
            Ok(Some((request, taken))) => {
                self.bytes.drain(..taken);
                self.last = Instant::now();
                Turn::Request(request, self.descriptor.take())
            }
            Ok(None) if self.bytes.len() > HEAD_LIMIT + BODY_LIMIT => Turn::Bad(HttpError::Head),
            Ok(None) => Turn::Wait,
            Err(error) => Turn::Bad(error),
        }
    }

    /// Whether a client that is in the middle of a request, or says nothing, has used up its time.
    pub(super) fn stale(&self) -> bool {
        self.last.elapsed() > if self.bytes.is_empty() { PATIENCE * 30 } else { PATIENCE }
    }

    /// Sends an answer; false where the client does not take it.
    pub(super) fn answer(&mut self, bytes: &[u8]) -> bool {
        self.last = Instant::now();
        io::Write::write_all(&mut self.stream, bytes).is_ok()
    }
}

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn a_request_comes_in_pieces_with_its_descriptor_and_another_follows() {
        let (mut client, server) = UnixStream::pair().expect("sockets");
        let mut connection = Connection::new(server).expect("connection");
        let file = tempfile::tempfile().expect("file");
        descriptors::send(client.as_fd(), b"PUT /x HT", Some(file.as_fd())).expect("sent");
        assert!(matches!(connection.read(), Turn::Wait));
        client.write_all(b"TP/1.1\r\n\r\nGET /y HTTP/1.1\r\n\r\n").expect("sent");
        assert!(matches!(connection.read(), Turn::Request(r, Some(_)) if r.path == "/x"));
        assert!(matches!(connection.next(), Turn::Request(r, None) if r.path == "/y"));
        assert!(matches!(connection.next(), Turn::Wait));
        client.write_all(b"\0\0\0").expect("sent");
        assert!(matches!(connection.read(), Turn::Bad(_)));
        drop(client);
        assert!(matches!(connection.read(), Turn::End));
    }
}
