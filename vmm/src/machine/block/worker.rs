//! The threads that serve a disk, one for each of its queues.

use super::counters::Tally;
use super::disk::Disk;
use super::request::{Outcome, Server};
use crate::lease::LeaseGate;
use crate::machine::virtio::{Chain, RingError, Seat, Turn, Virtqueue};
use std::sync::Arc;

/// What the queues of one disk share.
pub(super) struct Desk {
    pub(super) disk: Arc<dyn Disk>,
    pub(super) read_only: bool,
    pub(super) tally: Tally,
}

/// Serves one queue, a request at a time, until the seat says that it is over.
pub(super) fn work(seat: &Seat<Virtqueue>, desk: &Desk, gate: &LeaseGate) {
    let may_submit = || gate.may_submit();
    let server =
        Server { disk: desk.disk.as_ref(), read_only: desk.read_only, tally: &desk.tally, may_submit: &may_submit };
    let (mut chain, mut buffer, mut session) = (Chain::default(), Vec::new(), None);
    loop {
        let more = match seat.turn(&mut session, false) {
            Turn::End => return,
            Turn::Rest | Turn::Drain => false,
            Turn::Serve(queue) if queue.is_broken() => false,
            // A broken queue has told its driver; there is nothing more to do until the reset.
            Turn::Serve(queue) => serve_next(queue, &server, &mut chain, &mut buffer).unwrap_or(false),
        };
        if !more {
            seat.wait(None);
        }
    }
}

/// Serves the next request; false when there is nothing to do until the next wake.
fn serve_next(
    queue: &mut Virtqueue,
    server: &Server<'_>,
    chain: &mut Chain,
    buffer: &mut Vec<u8>,
) -> Result<bool, RingError> {
    queue.hush()?;
    if !queue.next(chain)? {
        return queue.listen();
    }
    match server.serve(chain, queue.memory(), buffer) {
        Outcome::Malformed => Err(queue.give_up()),
        Outcome::Parked => {
            Tally::add(&server.tally.parked, 1);
            queue.put_back(chain);
            Ok(false)
        }
        Outcome::Done(written) => {
            queue.complete(chain, written)?;
            queue.signal()?;
            Ok(true)
        }
    }
}

#[cfg(test)]
#[path = "worker_tests.rs"]
mod tests;
