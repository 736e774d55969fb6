//! Connections: a thread each, which reads a request, has it done, writes the answer.

use super::frames::{self, Descriptors, Frame};
use super::peers::{PeerId, Peers, Registration, is_pidfd};
use super::refusal::Refusal;
use super::worker::{Work, Worker};
use crate::runtime::{RuntimeDir, RuntimeError, State};
use attest::service::{Answer, ControlRequest, VmRequest};
use rustix::net::{AddressFamily, SocketType, sockopt};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

/// What all connections share.
#[derive(Debug)]
pub(super) struct Shared {
    worker: Worker,
    peers: Peers,
    dir: RuntimeDir,
    state: Mutex<State>,
    connections: AtomicUsize,
}

impl Shared {
    pub(super) fn new(worker: Worker, dir: RuntimeDir, state: State) -> Self {
        let peers = Peers::new(state.peers);
        Self { worker, peers, dir, state: Mutex::new(state), connections: AtomicUsize::new(0) }
    }

    pub(super) fn worker(&self) -> &Worker {
        &self.worker
    }

    /// Whether somebody is connected, or a VM process that was served lives.
    pub(super) fn is_busy(&self) -> bool {
        self.connections.load(Ordering::SeqCst) > 0 || self.peers.count() > 0
    }

    /// Writes down whether VM processes may live that the next service will not know.
    pub(super) fn keep_state(&self) -> Result<(), RuntimeError> {
        let mut state = self.state.lock().unwrap_or_else(|e| e.into_inner());
        let peers = self.peers.may_live();
        if state.peers != peers {
            self.dir.keep_state(&State { peers, ..state.clone() })?;
            state.peers = peers;
        }
        Ok(())
    }
}

/// One of the connections; counted while it lives.
struct Counted(Arc<Shared>);

impl Counted {
    fn new(shared: &Arc<Shared>) -> Option<Self> {
        // Counted before it is judged, so that two at once can't both be the last.
        let counted = Self(shared.clone());
        (shared.connections.fetch_add(1, Ordering::SeqCst) < MOST_CONNECTIONS).then_some(counted)
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.connections.fetch_sub(1, Ordering::SeqCst);
    }
}

/// Takes one connection to the control socket, from root or the service's own user.
pub(super) fn accept(listener: &UnixListener, shared: &Arc<Shared>) {
    let Ok((stream, _)) = listener.accept() else { return };
    let me = rustix::process::geteuid();
    let welcome = sockopt::socket_peercred(&stream).is_ok_and(|peer| peer.uid.is_root() || peer.uid == me);
    if !welcome {
        refuse(&stream, Refusal::never("the control socket is root's"));
        return;
    }
    match Counted::new(shared) {
        None => refuse(&stream, Refusal::for_now("the TPM service has too many connections")),
        Some(counted) => {
            // Where no thread can be had, the stream is closed, which says enough.
            let _ = spawn(move || serve_control(&counted.0, &stream));
        }
    }
}

fn refuse(stream: &UnixStream, refusal: Refusal) {
    // The asker may have gone.
    let _ = frames::send(stream.as_fd(), &refusal.answer());
}

fn spawn(serve: impl FnOnce() + Send + 'static) -> io::Result<()> {
    std::thread::Builder::new().name("connection".into()).stack_size(STACK).spawn(serve).map(|_| ())
}

fn serve_control(shared: &Arc<Shared>, stream: &UnixStream) {
    while let Ok(Some(frame)) = frames::receive(stream.as_fd(), Descriptors::Taken) {
        let answer = control(shared, frame).unwrap_or_else(Refusal::answer);
        if frames::send(stream.as_fd(), &answer).is_err() {
            return;
        }
    }
}

fn control(shared: &Arc<Shared>, frame: Frame) -> Result<Answer, Refusal> {
    let request = serde_json::from_slice(&frame.bytes)
        .map_err(|e| Refusal::never(format!("not a request of the control socket: {e}")))?;
    Ok(match request {
        ControlRequest::Register { customer, vm, vm_file } => {
            let registration = Registration { customer, vm, vm_file };
            register(shared, registration, frame.descriptors)?;
            Answer::Done
        }
        ControlRequest::Extend { layer, version, digest } => shared.worker.ask(Work::Extend(layer, version, digest)),
        ControlRequest::Reseal => shared.worker.ask(Work::Reseal),
        ControlRequest::Status => {
            shared.worker.ask(Work::Status(u32::try_from(shared.peers.count()).unwrap_or(u32::MAX)))
        }
    })
}

fn register(shared: &Arc<Shared>, registration: Registration, descriptors: Vec<OwnedFd>) -> Result<(), Refusal> {
    let [socket, pidfd]: [OwnedFd; 2] = descriptors.try_into().map_err(|_| {
        Refusal::never("Register takes two descriptors: the service's end of a socket pair, and a pidfd")
    })?;
    let unix = sockopt::socket_domain(&socket) == Ok(AddressFamily::UNIX);
    if !unix || sockopt::socket_type(&socket) != Ok(SocketType::STREAM) || !is_pidfd(&pidfd) {
        return Err(Refusal::never("Register takes a unix stream socket and a pidfd, in this order"));
    }
    let stream = Arc::new(UnixStream::from(socket));
    let counted = Counted::new(shared).ok_or_else(|| Refusal::for_now("the TPM service has too many connections"))?;
    let id = shared
        .peers
        .add(&registration, pidfd, &stream)
        .ok_or_else(|| Refusal::for_now("the TPM service serves too many VM processes"))?;
    shared.keep_state().map_err(|e| Refusal::never(e.to_string()))?;
    spawn(move || serve_vm(&counted.0, id, &registration, &stream))
        .map_err(|e| Refusal::for_now(format!("no thread for another VM process: {e}")))
}

/// Serves the five requests; what is none of them is refused.
fn serve_vm(shared: &Arc<Shared>, id: PeerId, registration: &Registration, stream: &UnixStream) {
    while let Ok(Some(frame)) = frames::receive(stream.as_fd(), Descriptors::Refused) {
        let answer = match serde_json::from_slice::<VmRequest>(&frame.bytes) {
            Ok(request) => {
                let earlier = shared.peers.earlier(id, registration);
                shared.worker.ask(Work::Vm(Box::new(request), registration.clone(), earlier))
            }
            Err(e) => Refusal::never(format!("not one of a VM's five requests: {e}")).answer(),
        };
        if frames::send(stream.as_fd(), &answer).is_err() {
            return;
        }
    }
}

/// VM processes and clients of the control socket together.
const MOST_CONNECTIONS: usize = 4096;

/// Requests and answers lie on the heap.
const STACK: usize = 256 * 1024;
