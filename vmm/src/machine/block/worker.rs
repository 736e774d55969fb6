//! What the queues of one disk share, and the thread that serves one of them: for disks without rings. Reads and writes that wait
//! together are served together, and answered with one interrupt.

use super::counters::Tally;
use super::disk::Disk;
use super::request::{Facts, Outcome, PIECE, Request, Server};
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

/// Requests served together, at most: twice as many as a volume hashes at once.
const TOGETHER: usize = 32;

/// Requests that were taken from the queue and are not answered yet. Its memory is used again and again.
#[derive(Default)]
struct Hand {
    taken: Vec<(Chain, Request)>,
    /// Bytes that they move.
    bytes: usize,
    /// Chains for requests to come.
    spare: Vec<Chain>,
    buffer: Vec<u8>,
}

/// Serves one queue until the seat says that it is over.
pub(super) fn work(seat: &Seat<Virtqueue>, desk: &Desk, gate: &LeaseGate) {
    let (mut hand, mut session) = (Hand::default(), None);
    loop {
        let next = match seat.turn(&mut session, false) {
            Turn::End => return,
            Turn::Serve(queue) if !queue.is_broken() => hand.serve_some(queue, desk, gate),
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

impl Hand {
    /// Serves what waits, as far as it goes together; nothing is in hand before and after.
    fn serve_some(&mut self, queue: &mut Virtqueue, desk: &Desk, gate: &LeaseGate) -> Result<Next, RingError> {
        let facts = desk.facts();
        let next = self.take(queue, desk, gate, &facts);
        let served =
            next.and_then(|next| Ok(if self.serve(queue, desk, gate, &facts)? { next } else { Next::Sleep(None) }));
        self.empty();
        served
    }

    /// Takes one request, or several reads and writes that fit the buffer; says what follows when they are answered.
    fn take(&mut self, queue: &mut Virtqueue, desk: &Desk, gate: &LeaseGate, facts: &Facts) -> Result<Next, RingError> {
        queue.hush()?;
        while self.taken.len() < TOGETHER {
            let mut chain = self.spare.pop().unwrap_or_default();
            if !queue.next(&mut chain)? {
                self.spare.push(chain);
                let more = !self.taken.is_empty() || queue.listen()?;
                return Ok(if more { Next::Look } else { Next::Sleep(None) });
            }
            let request = Request::parse(facts, &chain, queue.memory());
            let shared = request.as_ref().and_then(Request::shared);
            if !self.taken.is_empty() && shared.is_none_or(|bytes| self.bytes + bytes > PIECE) {
                // Its turn comes when these are answered.
                queue.put_back(&chain);
                self.spare.push(chain);
                return Ok(Next::Look);
            }
            let Some(request) = request else { return Err(queue.give_up()) };
            if let Some(pace) = desk.hold(&request, gate) {
                queue.put_back(&chain);
                self.spare.push(chain);
                return Ok(match pace {
                    Pace::Keys => Next::Sleep(None),
                    Pace::Rate(wait) => Next::Sleep(Some(wait)),
                });
            }
            self.bytes += shared.unwrap_or(0);
            self.taken.push((chain, request));
            if shared.is_none() {
                break;
            }
        }
        Ok(Next::Look)
    }

    /// Serves and answers what is in hand; false where it can't be done now, and is in the queue again.
    fn serve(
        &mut self,
        queue: &mut Virtqueue,
        desk: &Desk,
        gate: &LeaseGate,
        facts: &Facts,
    ) -> Result<bool, RingError> {
        let Self { taken, buffer, .. } = self;
        let may_submit = || gate.may_submit();
        let write_through = desk.write_through();
        let server = Server { disk: desk.disk.as_ref(), tally: &desk.tally, write_through, may_submit: &may_submit };
        let outcomes = match &taken[..] {
            [] => return Ok(true),
            [(chain, request)] if request.shared().is_none() => {
                match server.serve(request, facts, chain, queue.memory(), buffer) {
                    Outcome::Parked => None,
                    outcome => Some(vec![outcome]),
                }
            }
            several => server.serve_together(several, queue.memory(), buffer),
        };
        let Some(outcomes) = outcomes else {
            Tally::add(&desk.tally.parked, 1);
            taken.iter().rev().for_each(|(chain, _)| queue.put_back(chain));
            return Ok(false);
        };
        for ((chain, _), outcome) in taken.iter().zip(outcomes) {
            match outcome {
                Outcome::Done(written) => queue.complete(chain, written)?,
                Outcome::Malformed | Outcome::Parked => return Err(queue.give_up()),
            }
        }
        queue.signal()?;
        Ok(true)
    }

    fn empty(&mut self) {
        self.spare.extend(self.taken.drain(..).map(|(chain, _)| chain));
        self.bytes = 0;
    }
}

#[cfg(test)]
#[path = "worker_tests.rs"]
mod tests;
