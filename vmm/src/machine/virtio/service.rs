//! A device with one thread whose work never waits for anything but the next event: descriptors, a time, or the driver.

use super::{RingError, Seat, Session, Turn};
use crate::machine::event::borrow;
use crate::machine::thread::{Background, Crew, ThreadKind};
use crate::machine::wires::WireError;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::sync::Arc;
use std::time::Duration;
use vmm_sys_util::eventfd::EventFd;

/// What such a device does on its thread.
pub trait Serve: Send {
    /// A driver is ready: forgets what is left of the session before.
    fn begin(&mut self, _session: &mut Session) {}

    /// Does a bounded piece of what there is to do; true if there may be more. After an error, of which the queue has told the
    /// driver, nothing more is asked until a reset.
    fn serve(&mut self, session: &mut Session) -> Result<bool, RingError>;

    /// The machine ends, and the driver does nothing any more: hands on what it had given before. Not asked where the driver or
    /// the device gave up. It must come back in a time that no driver and nobody else can prolong.
    fn finish(&mut self, _session: &mut Session) {}

    /// What is to wake the thread beside the driver: descriptors, and a time. Asked while there is a session that may be
    /// served, after [`serve`](Self::serve) said that there is no more to do. What was ready is not told: `serve` finds out.
    fn interest<'a>(&'a self, _descriptors: &mut Vec<PollFd<'a>>) -> Option<Duration> {
        None
    }
}

/// The device's seat.
pub struct Service(Arc<Seat<Work>>);

/// A session, and whether the thread has begun it.
struct Work {
    session: Session,
    begun: bool,
}

impl Service {
    /// An empty seat.
    pub fn new() -> Result<Self, WireError> {
        Ok(Self(Arc::new(Seat::new()?)))
    }

    /// What a doorbell of any of the device's queues signals.
    pub fn doorbell(&self) -> &EventFd {
        self.0.doorbell()
    }

    /// For [`VirtioDevice::start`](super::VirtioDevice::start).
    pub fn start(&self, session: Session) {
        self.0.start(Work { session, begun: false });
    }

    /// For [`VirtioDevice::stop`](super::VirtioDevice::stop).
    pub fn stop(&self) -> bool {
        self.0.stop()
    }

    /// Starts the thread, called `name`.
    pub fn hire(
        &self,
        kind: ThreadKind,
        name: String,
        mut server: impl Serve + 'static,
        crew: &Crew,
    ) -> std::io::Result<Arc<dyn Background>> {
        self.0.hire(crew, kind, name, move |seat| work(seat, &mut server))
    }
}

/// Serves until the seat says that it is over.
fn work<S: Serve>(seat: &Seat<Work>, server: &mut S) {
    let mut session = None;
    loop {
        let served = match seat.turn(&mut session, false) {
            Turn::End => return finish(session.as_mut(), server),
            Turn::Serve(work) if !work.session.link.broken() => {
                if !std::mem::replace(&mut work.begun, true) {
                    server.begin(&mut work.session);
                }
                server.serve(&mut work.session)
            }
            Turn::Serve(_) | Turn::Rest | Turn::Drain => {
                seat.wait(None);
                continue;
            }
        };
        match served {
            Ok(true) => {}
            Ok(false) => sleep(seat, server),
            Err(_) => seat.wait(None),
        }
    }
}

fn finish<S: Serve>(work: Option<&mut Work>, server: &mut S) {
    let Some(work) = work.filter(|work| !work.session.link.broken()) else { return };
    if !work.begun {
        server.begin(&mut work.session);
    }
    server.finish(&mut work.session);
}

fn sleep<S: Serve>(seat: &Seat<Work>, server: &S) {
    let mut fds = vec![PollFd::from_borrowed_fd(borrow(seat.doorbell()), PollFlags::IN)];
    let time = server.interest(&mut fds);
    if fds.len() == 1 && time.is_none() {
        return seat.wait(None);
    }
    let time = time.and_then(|time| Timespec::try_from(time).ok());
    // Interrupted or not: looking once too often does no harm.
    let ready = poll(&mut fds, time.as_ref()).is_ok();
    if ready && !fds[0].revents().is_empty() {
        seat.wait(None);
    }
}
