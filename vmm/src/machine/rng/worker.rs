//! Random bytes for whoever asks, at a rate that costs the host next to nothing.

use super::counters::Tally;
use crate::machine::rate::{Rate, RateLimiter, RateLimits};
use crate::machine::virtio::{Chain, RingError, Serve, Session, Virtqueue};
use rustix::event::PollFd;
use std::sync::Arc;
use std::time::Duration;
use zeroize::{Zeroize, Zeroizing};

/// The most bytes that one request gets; the guest asks again for more (5.4.6.1 allows less than was asked for).
const PIECE: usize = 4096;
/// A MiB a second, of which a guest at its start may take 256 KiB at once: what a kernel asks for is a fraction of it, and a
/// guest that wants more computes it from what it has.
pub(super) const LIMIT: Rate = Rate { size: 256 << 10, one_time_burst: 0, refill: Duration::from_millis(250) };

/// What serves the queue.
pub(super) struct Source {
    tally: Arc<Tally>,
    limiter: RateLimiter,
    chain: Chain,
    /// No byte that a guest got stays here.
    bytes: Zeroizing<[u8; PIECE]>,
    /// How long the limit lets nothing go.
    closed: Option<Duration>,
}

impl Source {
    pub(super) fn new(tally: Arc<Tally>, limit: Rate) -> Self {
        let limiter = RateLimiter::new(RateLimits { bandwidth: Some(limit), operations: None });
        Self { tally, limiter, chain: Chain::default(), bytes: Zeroizing::new([0; PIECE]), closed: None }
    }

    /// Serves the next request, if there is one.
    pub(super) fn serve_next(&mut self, queue: &mut Virtqueue) -> Result<bool, RingError> {
        queue.hush()?;
        if !queue.next(&mut self.chain)? {
            return queue.listen();
        }
        // 5.4.6: buffers are the device's to write, all of them.
        if !self.chain.readable.is_empty() || self.chain.writable.is_empty() {
            return Err(queue.give_up());
        }
        let length = usize::try_from(self.chain.writable_length()).unwrap_or(PIECE).min(PIECE);
        self.closed = self.limiter.admit(length as u64).err();
        if self.closed.is_some() {
            Tally::add(&self.tally.throttled, 1);
            queue.put_back(&self.chain);
            return Ok(false);
        }
        let piece = &mut self.bytes[..length];
        // The kernel's generator does not fail once it is seeded. If it ever does, the guest gets nothing rather than something
        // that is not random.
        let given = getrandom::fill(piece).is_ok() && self.chain.copy_out(queue.memory(), 0, piece);
        piece.zeroize();
        if !given {
            return Err(queue.give_up());
        }
        Tally::add(&self.tally.requests, 1);
        Tally::add(&self.tally.bytes, length as u64);
        queue.complete(&self.chain, length as u32)?;
        queue.signal()?;
        Ok(true)
    }
}

impl Serve for Source {
    fn serve(&mut self, session: &mut Session) -> Result<bool, RingError> {
        let Some(Some(queue)) = session.queues.first_mut() else { return Ok(false) };
        self.closed = None;
        self.serve_next(queue)
    }

    fn interest<'a>(&'a self, _descriptors: &mut Vec<PollFd<'a>>) -> Option<Duration> {
        self.closed
    }
}

#[cfg(test)]
#[path = "worker_tests.rs"]
mod tests;
