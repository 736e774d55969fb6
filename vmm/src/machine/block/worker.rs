//! What the queues of one disk share, and the thread that serves one of them a request at a time: for disks without rings.

use super::counters::Tally;
use super::disk::Disk;
use super::request::{Facts, Outcome, Request, Server};
use crate::lease::LeaseGate;
use crate::machine::rate::RateLimiter;
use crate::machine::virtio::{Chain, RingError, Seat, Turn, Virtqueue};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// What the queues of one disk share.
pub(super) struct Desk {
    pub(super) disk: Arc<dyn Disk>,
    pub(super) read_only: bool,
    pub(super) id: [u8; 20],
    pub(super) limiter: RateLimiter,
    pub(super) tally: Tally,
    /// Whether the driver did not take FLUSH: what is answered must then be durable (virtio 1.3, 5.2.6.2).
    pub(super) write_through: AtomicBool,
}

/// Why a request has to wait in its queue.
pub(super) enum Pace {
    /// There are no keys: until the machine is resumed.
    Keys,
    /// The rate limit: until this time is over.
    Rate(Duration),
}

impl Desk {
    /// Whether what is answered must be durable.
    pub(super) fn write_through(&self) -> bool {
        self.write_through.load(Ordering::SeqCst)
    }

    /// Said before a session's queues begin.
    pub(super) fn set_write_through(&self, on: bool) {
        self.write_through.store(on, Ordering::SeqCst);
    }

    /// What requests are judged by now.
    pub(super) fn facts(&self) -> Facts {
        Facts::of(self.disk.as_ref(), self.read_only, self.id)
    }

    /// Whether a request must stay in its queue for now.
    pub(super) fn hold(&self, request: &Request, gate: &LeaseGate) -> Option<Pace> {
        if !gate.may_submit() {
            Tally::add(&self.tally.parked, 1);
            return Some(Pace::Keys);
        }
        self.limiter.admit(request.bytes()).err().map(Pace::Rate)
    }
}

/// What follows a look at the queue.
enum Next {
    /// Another look.
    Look,
    /// Sleep, until this time is over at most.
    Sleep(Option<Duration>),
}

/// Serves one queue, a request at a time, until the seat says that it is over.
pub(super) fn work(seat: &Seat<Virtqueue>, desk: &Desk, gate: &LeaseGate) {
    let (mut chain, mut buffer, mut session) = (Chain::default(), Vec::new(), None);
    loop {
        let next = match seat.turn(&mut session, false) {
            Turn::End => return,
            Turn::Serve(queue) if !queue.is_broken() => serve_next(queue, desk, gate, &mut chain, &mut buffer),
            Turn::Serve(_) | Turn::Rest | Turn::Drain => Ok(Next::Sleep(None)),
        };
        match next {
            Ok(Next::Look) => {}
            Ok(Next::Sleep(limit)) => seat.wait(limit),
            // The queue has told its driver; there is nothing more to do until the reset.
            Err(_) => seat.wait(None),
        }
    }
}

fn serve_next(
    queue: &mut Virtqueue,
    desk: &Desk,
    gate: &LeaseGate,
    chain: &mut Chain,
    buffer: &mut Vec<u8>,
) -> Result<Next, RingError> {
    queue.hush()?;
    if !queue.next(chain)? {
        return Ok(if queue.listen()? { Next::Look } else { Next::Sleep(None) });
    }
    let facts = desk.facts();
    let Some(request) = Request::parse(&facts, chain, queue.memory()) else { return Err(queue.give_up()) };
    if let Some(pace) = desk.hold(&request, gate) {
        queue.put_back(chain);
        return Ok(match pace {
            Pace::Keys => Next::Sleep(None),
            Pace::Rate(wait) => Next::Sleep(Some(wait)),
        });
    }
    let may_submit = || gate.may_submit();
    let write_through = desk.write_through();
    let server = Server { disk: desk.disk.as_ref(), tally: &desk.tally, write_through, may_submit: &may_submit };
    match server.serve(&request, &facts, chain, queue.memory(), buffer) {
        Outcome::Malformed => Err(queue.give_up()),
        Outcome::Parked => {
            Tally::add(&desk.tally.parked, 1);
            queue.put_back(chain);
            Ok(Next::Sleep(None))
        }
        Outcome::Done(written) => {
            queue.complete(chain, written)?;
            queue.signal()?;
            Ok(Next::Look)
        }
    }
}

#[cfg(test)]
#[path = "worker_tests.rs"]
mod tests;
