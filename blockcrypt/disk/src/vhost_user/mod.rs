//! A vhost-user-blk back end: a virtio block device (virtio 1.3, 5.2) whose queues another virtual machine monitor shares with
//! this process over a unix socket. The monitor shows the guest the device; this serves its queues.
//!
//! Guest memory is mapped here, and the guest may change it at any moment. So whatever is decided on is copied first: headers and
//! ranges are read once, data to be written is encrypted out of private memory, and only what was verified and decrypted there is
//! copied to the guest.
//!
//! Each queue has a thread, which completes its requests in order. That is what makes a restart safe: what is in flight is what the
//! ring has available and not used, and for a front end that comes back, to this process or its successor, that is done (again), wherever it
//! says that its queues stand. The vhost-user protocol ("Inflight I/O tracking") needs its shared region,
//! `VHOST_USER_PROTOCOL_F_INFLIGHT_SHMFD`, only where requests are completed out of order; the vhost-user-backend crate does not support
//! it, and it is not offered.
//!
//! A front end that shrinks the memory that it shared ends this process with SIGBUS; what was acknowledged outlives it.
//!
//! | module | what it holds |
//! | --- | --- |
//! | `backend` | the device, and its queues' threads |
//! | `config` | features and configuration space |
//! | `end` | what ends a queue's thread |
//! | `request` | one request |
//! | `ring` | a queue's ring and its descriptors |
//! | `signal` | how a front end is told of what is done |

mod backend;
mod config;
mod end;
pub(crate) mod request;
mod ring;
mod signal;

use crate::socket::BREATHER;
use crate::{Disk, Socket};
use backend::Backend;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use signal::Signal;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::thread;
use vhost::vhost_user::{Error as ProtocolError, Listener};
use vhost_user_backend::{Error as DaemonError, VhostUserDaemon};
use vm_memory::{GuestMemoryAtomic, GuestMemoryMmap};

/// Queues that a device may have.
pub const QUEUES: std::ops::RangeInclusive<u16> = 1..=16;

/// What a device is besides its disk.
#[derive(Clone, Debug)]
pub struct Device {
    /// Queues, each with a thread: see [`QUEUES`].
    pub queues: u16,
    /// What the guest reads as its serial number: the first 20 bytes.
    pub serial: String,
}

/// Serves `disk` to one front end after the other on `socket`, until one of `until` has hung up. Then the requests under way are
/// finished, and those that wait stay in their queues. The caller flushes. `heard` is told, in a line, of front ends that end in
/// an error and of queues that make no sense.
///
/// # Errors
/// The system's, if it can't wait for front ends or has no descriptors for the calls of the queues.
pub fn serve(
    disk: &Arc<dyn Disk>,
    device: &Device,
    socket: &Socket,
    until: &[BorrowedFd<'_>],
    heard: &(impl Fn(&str) + Clone + Send + Sync + 'static),
) -> io::Result<()> {
    let queues = device.queues.clamp(*QUEUES.start(), *QUEUES.end());
    let signals: Arc<[Arc<Signal>]> = (0..queues).map(|_| Signal::new().map(Arc::new)).collect::<io::Result<_>>()?;
    let mut short = false;
    while socket.wait(until)? {
        let backend = Backend::new(disk.clone(), device, signals.clone(), Box::new(heard.clone()));
        let backend = backend.map(Arc::new).map_err(DaemonError::StartDaemon);
        match backend.and_then(|backend| attend(&backend, socket, until)) {
            Ok(()) => short = false,
            Err(DaemonError::HandleRequest(error)) => heard(&format!("the front end was hung up on: {error}")),
            // No descriptors, memory or threads are left, for now. The front end waits, where it has not been accepted yet.
            Err(error) => {
                if !std::mem::replace(&mut short, true) {
                    heard(&format!("front ends must wait: {error}"));
                }
                thread::sleep(BREATHER);
            }
        }
    }
    Ok(())
}

/// Serves the front end that waits on `socket` until it leaves.
fn attend(backend: &Arc<Backend>, socket: &Socket, until: &[BorrowedFd<'_>]) -> Result<(), DaemonError> {
    let memory = GuestMemoryAtomic::new(GuestMemoryMmap::new());
    let mut daemon = VhostUserDaemon::new("vhost-user".to_owned(), backend.clone(), memory.clone())?;
    backend.mapped(memory);
    let mut listener = Listener::from(socket.listener().map_err(DaemonError::StartDaemon)?);
    daemon.start(&mut listener)?;
    let Some(handle) = daemon.shutdown_handle() else { return Ok(()) };
    let (left, leave) = io::pipe().map_err(DaemonError::StartDaemon)?;
    let served = thread::scope(|scope| {
        let watch = || {
            if asked(until, left.as_fd()) {
                backend.stop();
                handle.shutdown();
            }
        };
        thread::Builder::new().spawn_scoped(scope, watch).map_err(DaemonError::StartDaemon)?;
        let served = daemon.wait();
        drop(leave);
        served
    });
    match served {
        Err(DaemonError::HandleRequest(ProtocolError::Disconnected | ProtocolError::PartialMessage)) => Ok(()),
        // A thread that panicked has taken this front end's connection with it, and nothing else.
        Err(DaemonError::WaitDaemon(_)) => Err(DaemonError::HandleRequest(ProtocolError::BackendInternalError)),
        other => other,
    }
}

/// Waits; whether one of `until` hung up before `left` did.
fn asked(until: &[BorrowedFd<'_>], left: BorrowedFd<'_>) -> bool {
    loop {
        let all = until.iter().chain([&left]);
        let mut fds: Vec<_> = all.map(|fd| PollFd::from_borrowed_fd(*fd, PollFlags::RDHUP)).collect();
        match poll(&mut fds, None) {
            Err(Errno::INTR) => {}
            _ => return fds[..until.len()].iter().any(|fd| !fd.revents().is_empty()),
        }
    }
}
