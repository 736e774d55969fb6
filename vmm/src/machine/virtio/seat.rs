//! Where a device's thread waits, and is told what to do: by the driver through the transport (begin, let go), and by the
//! machine's owner (pause, go on, end).
//!
//! The thread owns its session, so that serving takes no lock. It asks for its [`Turn`] before each request and whenever it
//! wakes:
//!
//! ```text
//! let mut session = None;
//! loop {
//!     match seat.turn(&mut session, in_hand > 0) {
//!         Turn::Serve(session) => …take a request, or listen and wait…,
//!         Turn::Drain => …finish what is in hand, take nothing new…,
//!         Turn::Rest => seat.wait(None),
//!         Turn::End => return,
//!     }
//! }
//! ```

use crate::machine::event::borrow;
use crate::machine::sync::{lock, wait};
use crate::machine::thread::{Background, Crew, Task, ThreadKind};
use crate::machine::wires::WireError;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;
use vmm_sys_util::eventfd::EventFd;

/// One thread's place. `S` is its part of a [`Session`](super::Session).
pub struct Seat<S> {
    /// Doorbells and every other reason to look. Reading it blocks.
    wake: EventFd,
    /// Whether the desk has something to say: while it has not, the thread does not look there.
    orders: AtomicBool,
    desk: Mutex<Desk<S>>,
    changed: Condvar,
}

struct Desk<S> {
    /// A session that the thread has not begun yet.
    fresh: Option<S>,
    /// The thread has a session.
    working: bool,
    leave: bool,
    pause: bool,
    close: bool,
    /// The thread obeys `pause`.
    quiet: bool,
    /// There is no thread any more.
    gone: bool,
}

/// What the thread is to do.
pub enum Turn<'a, S> {
    /// Serve.
    Serve(&'a mut S),
    /// Finish what is in hand and begin nothing.
    Drain,
    /// Nothing until the next wake.
    Rest,
    /// End.
    End,
}

impl<S: Send + 'static> Seat<S> {
    /// An empty seat.
    pub fn new() -> Result<Self, WireError> {
        EventFd::new(libc::EFD_CLOEXEC).map(Self::with_wake).map_err(WireError::Event)
    }

    /// An empty seat whose thread waits for `wake`, a blocking event that it alone reads.
    pub fn with_wake(wake: EventFd) -> Self {
        let desk =
            Desk { fresh: None, working: false, leave: false, pause: false, close: false, quiet: false, gone: false };
        Self { wake, orders: AtomicBool::new(false), desk: Mutex::new(desk), changed: Condvar::new() }
    }

    /// What wakes the thread: for [`VirtioDevice::doorbell`](super::VirtioDevice::doorbell), also of several queues, and for
    /// polls.
    pub fn doorbell(&self) -> &EventFd {
        &self.wake
    }

    /// Hands the thread a session.
    pub fn start(&self, session: S) {
        self.order(|desk| desk.fresh = Some(session));
    }

    /// Has the thread let go of its session, and says whether it has. It never waits: a vCPU asks, again and again.
    pub fn stop(&self) -> bool {
        let mut desk = lock(&self.desk);
        desk.fresh = None;
        if !desk.working || desk.gone {
            return true;
        }
        if !std::mem::replace(&mut desk.leave, true) {
            self.orders.store(true, Ordering::Release);
            drop(desk);
            self.ring();
        }
        false
    }

    /// Has the thread look at its queues, as a doorbell does.
    pub fn ring(&self) {
        // The counter can't overflow: the thread drains it.
        let _ = self.wake.write(1);
    }

    /// Starts the thread in this seat.
    pub fn hire(
        self: &Arc<Self>,
        crew: &Crew,
        kind: ThreadKind,
        name: String,
        body: impl FnOnce(&Self) + Send + 'static,
    ) -> io::Result<Arc<dyn Background>> {
        let occupied = Occupied(self.clone());
        let task = crew.spawn(kind, name, move || body(&occupied.0))?;
        Ok(Arc::new(Occupant { seat: self.clone(), task }))
    }

    /// What the thread is to do now; `in_hand` says whether it has something that it must finish before it lets go.
    pub fn turn<'a>(&self, session: &'a mut Option<S>, in_hand: bool) -> Turn<'a, S> {
        if self.orders.load(Ordering::Acquire) {
            let mut desk = lock(&self.desk);
            if in_hand && (desk.close || desk.leave || desk.pause) {
                return Turn::Drain;
            }
            if std::mem::take(&mut desk.leave) {
                *session = None;
                desk.working = false;
            }
            if desk.close {
                // What the driver handed over last is there for whoever has something to finish.
                *session = desk.fresh.take().or(session.take());
                return Turn::End;
            }
            if desk.pause {
                desk.quiet = true;
                self.changed.notify_all();
                return Turn::Rest;
            }
            if let Some(fresh) = desk.fresh.take() {
                *session = Some(fresh);
                desk.working = true;
            }
            self.orders.store(false, Ordering::Release);
        }
        session.as_mut().map_or(Turn::Rest, Turn::Serve)
    }

    /// Sleeps until the next wake, or until `limit` is over. It may also return early: looking once too often does no harm.
    pub fn wait(&self, limit: Option<Duration>) {
        if let Some(limit) = limit {
            let wake = borrow(&self.wake);
            let mut fds = [PollFd::new(&wake, PollFlags::IN)];
            let limit = Timespec::try_from(limit).unwrap_or(Timespec { tv_sec: i64::MAX, tv_nsec: 0 });
            if !matches!(poll(&mut fds, Some(&limit)), Ok(1..)) {
                return;
            }
        }
        let _ = self.wake.read();
    }

    fn order(&self, change: impl FnOnce(&mut Desk<S>)) {
        {
            let mut desk = lock(&self.desk);
            change(&mut desk);
            self.orders.store(true, Ordering::Release);
        }
        self.ring();
    }
}

/// Marks the seat as empty when its thread ends, however it ends.
struct Occupied<S>(Arc<Seat<S>>);

impl<S> Drop for Occupied<S> {
    fn drop(&mut self) {
        lock(&self.0.desk).gone = true;
        self.0.changed.notify_all();
    }
}

struct Occupant<S> {
    seat: Arc<Seat<S>>,
    task: Task,
}

impl<S: Send + 'static> Background for Occupant<S> {
    fn pause(&self) {
        self.seat.order(|desk| desk.pause = true);
        let mut desk = lock(&self.seat.desk);
        while desk.pause && !desk.quiet && !desk.gone {
            desk = wait(&self.seat.changed, desk);
        }
    }

    fn resume(&self) {
        self.seat.order(|desk| (desk.pause, desk.quiet) = (false, false));
        self.seat.changed.notify_all();
    }

    fn stop(&self) {
        self.seat.order(|desk| desk.close = true);
        self.task.join();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_session_that_came_just_before_the_end_is_there_to_be_finished() {
        let seat = Seat::new().expect("eventfd");
        let mut session = None;
        seat.start(1);
        seat.order(|desk| desk.close = true);
        assert!(matches!(seat.turn(&mut session, false), Turn::End));
        assert_eq!(session, Some(1));
    }

    #[test]
    fn a_session_that_its_driver_ended_is_not() {
        let seat = Seat::new().expect("eventfd");
        let mut session = None;
        seat.start(1);
        assert!(matches!(seat.turn(&mut session, false), Turn::Serve(1)));
        assert!(!seat.stop());
        seat.order(|desk| desk.close = true);
        assert!(matches!(seat.turn(&mut session, false), Turn::End));
        assert_eq!(session, None);
    }
}
