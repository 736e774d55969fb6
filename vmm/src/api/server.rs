//! The thread behind the control socket: one request at a time, so that operations don't overtake each other.

use super::connection::{Connection, Turn};
use super::http;
use super::routes;
use crate::exit::{Exit, Failure};
use crate::operations::Operations;
use crate::post::Post;
use crate::sandbox::{Filter, close_thread};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::Uid;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::{Arc, OnceLock};

/// Clients at the same time; more wait.
const CLIENTS: usize = 8;

/// Seconds between two looks for clients that use up their time.
const LOOK: Timespec = Timespec { tv_sec: 5, tv_nsec: 0 };

/// The socket, bound and not yet served.
pub struct Socket(UnixListener);

impl Socket {
    /// Binds the socket at `path`, as [`listen`] does; who connects is looked at by the peer's credentials later.
    pub fn bind(path: &Path) -> Result<Self, Failure> {
        listen(path).map(Self)
    }

    /// Starts the thread that serves it. Until `api` is told of a VM that runs, it answers that there is none yet.
    pub fn serve(self, post: Post) -> Result<Api, Failure> {
        let api = Api { operations: Arc::new(OnceLock::new()) };
        let operations = api.operations.clone();
        let own = rustix::process::geteuid();
        crate::threads::spawn("api", post.clone(), move || {
            if let Err(error) = close_thread(Filter::Api) {
                post.put(crate::post::Message::Died(error.to_string()));
                return;
            }
            serve(&self.0, own, &operations);
        })?;
        Ok(api)
    }
}

/// A socket that listens at `path`, without blocking, for its owner only. A socket that a dead process left there is replaced;
/// anything else stays, and is an error.
pub(crate) fn listen(path: &Path) -> Result<UnixListener, Failure> {
    let bad = |what: &str| Failure::new(Exit::Host, format!("cannot serve {}: {what}", path.display()));
    if let Ok(there) = std::fs::symlink_metadata(path) {
        if !there.file_type().is_socket() {
            return Err(bad("something that is no socket is there"));
        }
        if UnixStream::connect(path).is_ok() {
            return Err(bad("another process serves it"));
        }
        std::fs::remove_file(path).map_err(|e| bad(&e.to_string()))?;
    }
    // Only the owner may connect.
    let before = rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o177));
    let bound = UnixListener::bind(path);
    rustix::process::umask(before);
    let listener = bound.map_err(|e| bad(&e.to_string()))?;
    listener.set_nonblocking(true).map_err(|e| bad(&e.to_string()))?;
    Ok(listener)
}

/// The served socket.
pub struct Api {
    operations: Arc<OnceLock<Arc<Operations>>>,
}

impl Api {
    /// From now on there is a VM.
    pub fn runs(&self, operations: Arc<Operations>) {
        // A second VM in one process does not exist.
        let _ = self.operations.set(operations);
    }
}

fn serve(listener: &UnixListener, own: Uid, operations: &OnceLock<Arc<Operations>>) {
    let mut connections: Vec<Connection> = Vec::new();
    loop {
        let ready = wait(listener, &connections);
        let mut index = 0;
        connections.retain_mut(|connection| {
            index += 1;
            match ready.get(index) {
                Some(true) => turn(connection, operations),
                _ => !connection.stale(),
            }
        });
        if ready[0]
            && connections.len() < CLIENTS
            && let Ok((stream, _)) = listener.accept()
            && allowed(stream.as_fd(), own)
            && let Ok(connection) = Connection::new(stream)
        {
            connections.push(connection);
        }
    }
}

/// Which of listener and connections are readable, in this order.
fn wait(listener: &UnixListener, connections: &[Connection]) -> Vec<bool> {
    let room = if connections.len() < CLIENTS { PollFlags::IN } else { PollFlags::empty() };
    let mut fds = vec![PollFd::from_borrowed_fd(listener.as_fd(), room)];
    fds.extend(connections.iter().map(|c| PollFd::new(c, PollFlags::IN)));
    // A poll that fails is one that found nothing.
    let _ = poll(&mut fds, Some(&LOOK));
    fds.iter().map(|fd| !fd.revents().is_empty()).collect()
}

/// Whether the peer is root or `own`, the user who runs this process.
fn allowed(peer: BorrowedFd<'_>, own: Uid) -> bool {
    rustix::net::sockopt::socket_peercred(peer).is_ok_and(|peer| peer.uid.is_root() || peer.uid == own)
}

/// Serves what came on one connection; false where it is over.
fn turn(connection: &mut Connection, operations: &OnceLock<Arc<Operations>>) -> bool {
    let mut turn = connection.read();
    loop {
        match turn {
            Turn::Wait => return true,
            Turn::End => return false,
            Turn::Bad(error) => {
                let body = routes::problem(error.status(), &error.to_string());
                connection.answer(&http::answer(error.status(), Some(&body), false));
                return false;
            }
            Turn::Request(request, descriptor) => {
                let (status, body) = routes::route(&request, descriptor, operations.get().map(AsRef::as_ref));
                let answer = http::answer(status, body.as_deref(), request.keep_alive);
                let answered = connection.answer(&answer);
                if let Some(operations) = operations.get() {
                    operations.end_if_asked();
                }
                if !answered || !request.keep_alive {
                    return false;
                }
            }
        }
        turn = connection.next();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dead_socket_is_replaced_and_nothing_else() {
        let folder = tempfile::tempdir().expect("folder");
        let path = folder.path().join("api.sock");
        let first = Socket::bind(&path).expect("bound");
        assert!(Socket::bind(&path).is_err(), "it is served");
        drop(first);
        drop(Socket::bind(&path).expect("the dead one is replaced"));
        let file = folder.path().join("file");
        std::fs::write(&file, b"precious").expect("written");
        assert!(Socket::bind(&file).is_err());
        assert_eq!(std::fs::read(&file).expect("still there"), b"precious");
    }

    #[test]
    fn only_the_owner_may_connect() {
        use std::os::unix::fs::PermissionsExt;
        let folder = tempfile::tempdir().expect("folder");
        let path = folder.path().join("api.sock");
        let _socket = Socket::bind(&path).expect("bound");
        assert_eq!(std::fs::metadata(&path).expect("there").permissions().mode() & 0o777, 0o600);
        let (ours, _theirs) = UnixStream::pair().expect("sockets");
        let own = rustix::process::geteuid();
        assert!(allowed(ours.as_fd(), own), "this very user");
    }

    #[test]
    fn before_the_vm_runs_the_socket_says_so_and_bad_requests_get_one_clear_error() {
        let (client, server) = UnixStream::pair().expect("sockets");
        let mut connection = Connection::new(server).expect("connection");
        let operations = OnceLock::new();
        let mut ask = |text: &[u8]| {
            descriptors_send(&client, text);
            let goes_on = turn(&mut connection, &operations);
            let mut bytes = [0; 4096];
            let (length, _) = crate::sandbox::descriptors::receive(client.as_fd(), &mut bytes).expect("an answer");
            (goes_on, http::parse_answer(&bytes[..length]).expect("HTTP").expect("whole"))
        };
        let (goes_on, (status, body)) = ask(b"GET /api/v1/vm.info HTTP/1.1\r\n\r\n");
        assert!(goes_on && status == 200 && String::from_utf8_lossy(&body).contains("Created"));
        assert_eq!(ask(b"PUT /api/v1/vm.pause HTTP/1.1\r\n\r\n").1.0, 409);
        assert_eq!(ask(b"GET /api/v1/vm.nonsense HTTP/1.1\r\n\r\n").1.0, 404);
        let (goes_on, (status, _)) = ask(b"POST / HTTP/1.1\r\n\r\n");
        assert!(!goes_on && status == 405);
    }

    fn descriptors_send(client: &UnixStream, text: &[u8]) {
        crate::sandbox::descriptors::send(client.as_fd(), text, None).expect("sent");
    }
}
