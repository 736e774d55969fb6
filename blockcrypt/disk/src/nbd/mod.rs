//! An NBD server: the fixed newstyle protocol of <https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md> on a unix
//! socket, one export with an empty name.
//!
//! It offers structured replies, block sizes (512, 4096, 32 MiB), FLUSH, FUA, TRIM, WRITE_ZEROES with NO_HOLE, and several
//! connections (MULTI_CONN). Requests of a connection are answered as they are done.
//!
//! A request that can't be is answered with an error of its own: EINVAL for what is misaligned, unknown, empty, too long, or
//! read beyond the end; ENOSPC for what is written beyond the end; EPERM for what a read-only export does not do. What is no
//! request at all ends the connection.
//!
//! | module | what it holds |
//! | --- | --- |
//! | `handshake` | from the first byte to what was agreed on |
//! | `wire` | requests and replies |
//! | `intake` | batches of whole requests out of a stream |
//! | `connection` | performs them |
//! | `answers` | replies that go out together |
//! | `parsing` | the above without a client and a disk |

mod answers;
mod connection;
mod handshake;
mod intake;
pub(crate) mod parsing;
mod wire;

use crate::socket::BREATHER;
use crate::{Disk, Socket};
use connection::Connection;
use std::collections::HashMap;
use std::io;
use std::net::Shutdown;
use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixStream;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

/// Clients at a time. One more is hung up on.
const CLIENTS: usize = 16;
/// How long a client may think about a step of the handshake.
const HANDSHAKE: Duration = Duration::from_secs(30);
/// How long a client may take to take in its last replies when the server ends.
const FAREWELL: Duration = Duration::from_secs(10);

/// What clients are told of the disk.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Export {
    /// Bytes.
    pub(crate) size: u64,
    pub(crate) read_only: bool,
    pub(crate) description: String,
}

impl Export {
    fn of(disk: &dyn Disk, description: &str) -> Self {
        Self { size: disk.size(), read_only: disk.read_only(), description: description.to_owned() }
    }
}

/// Serves `disk` on `socket` until one of `until` has hung up. Then requests that were sent are finished, and
/// clients that don't take in their replies within 10 s are hung up on. The caller flushes.
///
/// # Errors
/// The system's, if it can't wait for clients.
pub fn serve(disk: &dyn Disk, description: &str, socket: Socket, until: &[BorrowedFd<'_>]) -> io::Result<()> {
    let clients = Clients::default();
    thread::scope(|scope| {
        let served = loop {
            match socket.accept(until) {
                Ok(None) => break Ok(()),
                Ok(Some(stream)) => {
                    let Some(guest) = clients.admit(stream) else { continue };
                    let thread = thread::Builder::new().name("nbd".to_owned());
                    // It may have grown since the last one came.
                    let export = Export::of(disk, description);
                    if thread.spawn_scoped(scope, move || guest.attend(disk, &export)).is_err() {
                        thread::sleep(BREATHER);
                    }
                }
                Err(error) => break Err(error),
            }
        };
        drop(socket);
        clients.farewell();
        served
    })
}

/// Serves `disk` to the one client on `stream` until it leaves.
pub fn attend(disk: &dyn Disk, description: &str, stream: UnixStream) {
    let export = Export::of(disk, description);
    if let Some(guest) = Clients::default().admit(stream) {
        guest.attend(disk, &export);
    }
}

/// The streams of all clients, by number.
#[derive(Default)]
struct Clients {
    streams: Mutex<(u64, HashMap<u64, UnixStream>)>,
    left: Condvar,
}

/// A client, until it leaves.
struct Guest<'a> {
    clients: &'a Clients,
    number: u64,
    stream: UnixStream,
}

impl Clients {
    fn admit(&self, stream: UnixStream) -> Option<Guest<'_>> {
        let mut streams = self.streams();
        if streams.1.len() >= CLIENTS {
            return None;
        }
        streams.0 += 1;
        let number = streams.0;
        streams.1.insert(number, stream.try_clone().ok()?);
        Some(Guest { clients: self, number, stream })
    }

    /// Takes no more from any client, and waits until what they sent is done.
    fn farewell(&self) {
        let streams = self.streams();
        // Bytes that came before are still read.
        streams.1.values().for_each(|stream| _ = stream.shutdown(Shutdown::Read));
        let waited = self.left.wait_timeout_while(streams, FAREWELL, |streams| !streams.1.is_empty());
        let (streams, _) = waited.unwrap_or_else(PoisonError::into_inner);
        streams.1.values().for_each(|stream| _ = stream.shutdown(Shutdown::Both));
    }

    fn streams(&self) -> MutexGuard<'_, (u64, HashMap<u64, UnixStream>)> {
        self.streams.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Guest<'_> {
    fn attend(&self, disk: &dyn Disk, export: &Export) {
        let stream = &self.stream;
        let patience = |limit| stream.set_read_timeout(limit).and_then(|()| stream.set_write_timeout(limit));
        if patience(Some(HANDSHAKE)).is_err() {
            return;
        }
        let Ok(agreed) = handshake::negotiate(&mut &*stream, export) else { return };
        if patience(None).is_ok() {
            Connection::new(stream, disk, export, agreed).run();
        }
    }
}

impl Drop for Guest<'_> {
    fn drop(&mut self) {
        // The others' copies of the descriptor keep it open otherwise.
        let _ = self.stream.shutdown(Shutdown::Both);
        self.clients.streams().1.remove(&self.number);
        self.clients.left.notify_all();
    }
}
