//! What wakes a disk, and the thread that serves it.

use super::counters::{BlockCounters, Tally};
use super::disk::Disk;
use super::request::{Outcome, Server};
use crate::machine::memory::GuestRam;
use crate::machine::sync::lock;
use crate::machine::thread::{Background, Crew, Task, ThreadKind};
use crate::machine::virtio::{Chain, Link, Ring, RingError, Session};
use crate::machine::wires::WireError;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use vmm_sys_util::eventfd::EventFd;

/// What the vCPUs, the disk's thread and the machine's owner share.
///
/// The session's lock is held for one request at a time. Whoever wants the disk to rest raises a flag first and takes the lock
/// then: the thread looks at the flags each time it has got the lock, so the flag holds from the next request on.
pub(super) struct Desk {
    disk: Arc<dyn Disk>,
    read_only: bool,
    /// Read blockingly by the thread: doorbells and every other reason to look.
    wake: EventFd,
    session: Mutex<Option<Session>>,
    leave: AtomicBool,
    paused: AtomicBool,
    closing: AtomicBool,
    tally: Tally,
}

impl Desk {
    pub(super) fn new(disk: Arc<dyn Disk>, read_only: bool) -> Result<Self, WireError> {
        Ok(Self {
            disk,
            read_only,
            wake: EventFd::new(libc::EFD_CLOEXEC).map_err(WireError::Event)?,
            session: Mutex::new(None),
            leave: AtomicBool::new(false),
            paused: AtomicBool::new(false),
            closing: AtomicBool::new(false),
            tally: Tally::default(),
        })
    }

    pub(super) fn doorbell(&self) -> &EventFd {
        &self.wake
    }

    pub(super) fn counters(&self) -> BlockCounters {
        self.tally.snapshot()
    }

    pub(super) fn start(&self, session: Session) {
        *lock(&self.session) = Some(session);
        self.leave.store(false, Ordering::SeqCst);
        self.ring();
    }

    /// Ends the session now if the thread is idle; otherwise the thread ends it after the request in hand. True once it has
    /// ended. It never waits: a vCPU asks.
    pub(super) fn let_go(&self) -> bool {
        self.leave.store(true, Ordering::SeqCst);
        let Ok(mut session) = self.session.try_lock() else { return false };
        *session = None;
        self.leave.store(false, Ordering::SeqCst);
        true
    }

    fn ring(&self) {
        // The counter can't overflow: the thread drains it.
        let _ = self.wake.write(1);
    }

    fn resting(&self) -> bool {
        self.paused.load(Ordering::SeqCst) || self.closing.load(Ordering::SeqCst)
    }
}

/// The thread of one disk.
pub(super) struct Worker {
    desk: Arc<Desk>,
    task: Task,
}

impl Worker {
    /// Starts it.
    pub(super) fn hire(desk: Arc<Desk>, name: &str, crew: &Crew) -> std::io::Result<Self> {
        let (body, gate) = (desk.clone(), crew.gate().clone());
        let task = crew.spawn(ThreadKind::Disk, format!("disk-{name}"), move || {
            let may_submit = || gate.may_submit();
            let server = Server {
                disk: body.disk.as_ref(),
                read_only: body.read_only,
                tally: &body.tally,
                may_submit: &may_submit,
            };
            work(&body, &server);
        })?;
        Ok(Self { desk, task })
    }
}

impl Background for Worker {
    fn pause(&self) {
        self.desk.paused.store(true, Ordering::SeqCst);
        // Waits for the request in hand; the next one sees the flag.
        drop(lock(&self.desk.session));
    }

    fn resume(&self) {
        self.desk.paused.store(false, Ordering::SeqCst);
        self.desk.ring();
    }

    fn stop(&self) {
        self.desk.closing.store(true, Ordering::SeqCst);
        self.desk.ring();
        self.task.join();
    }
}

fn work(desk: &Desk, server: &Server<'_>) {
    let (mut chain, mut buffer) = (Chain::default(), Vec::new());
    while !desk.closing.load(Ordering::SeqCst) {
        // Interrupted or not: looking once too often does no harm.
        let _ = desk.wake.read();
        while serve_one(desk, server, &mut chain, &mut buffer) {}
    }
}

/// Serves the next request, if the disk may and there is one; false when there is nothing to do until the next wake.
fn serve_one(desk: &Desk, server: &Server<'_>, chain: &mut Chain, buffer: &mut Vec<u8>) -> bool {
    let mut guard = lock(&desk.session);
    if desk.leave.swap(false, Ordering::SeqCst) {
        *guard = None;
    }
    if desk.resting() {
        return false;
    }
    let Some(session) = guard.as_mut().filter(|session| !session.link.broken()) else { return false };
    let Session { memory, rings, link, .. } = session;
    let Some(Some(ring)) = rings.first_mut() else { return false };
    match serve_next(ring, memory, link, server, chain, buffer) {
        Ok(more) => more,
        Err(_) => {
            Tally::add(&desk.tally.breaks, 1);
            link.give_up();
            false
        }
    }
}

fn serve_next(
    ring: &mut Ring,
    memory: &GuestRam,
    link: &Link,
    server: &Server<'_>,
    chain: &mut Chain,
    buffer: &mut Vec<u8>,
) -> Result<bool, RingError> {
    ring.hush(memory)?;
    if !ring.next(memory, chain)? {
        return ring.listen(memory);
    }
    match server.serve(chain, memory, buffer) {
        Outcome::Malformed => Err(RingError::Chain),
        Outcome::Parked => {
            Tally::add(&server.tally.parked, 1);
            ring.put_back();
            Ok(false)
        }
        Outcome::Done(written) => {
            if ring.complete(memory, chain, written)? {
                link.used(0);
            }
            Ok(true)
        }
    }
}

#[cfg(test)]
#[path = "worker_tests.rs"]
mod tests;
