//! Frames from the guest.

use super::counters::Tally;
use super::header::{ETHERNET, HEADER, Header, LONGEST};
use super::port::Port;
use super::worker::BATCH;
use crate::machine::rate::RateLimiter;
use crate::machine::virtio::{Chain, RingError, Virtqueue};
use std::io::ErrorKind;
use std::time::Duration;

/// The transmit side of one pair of queues.
pub(super) struct Transmit {
    chain: Chain,
    /// The header and the frame in hand.
    frame: Vec<u8>,
    /// The port took nothing more.
    pub(super) stuck: bool,
    /// How long the limit lets nothing go.
    pub(super) closed: Option<Duration>,
}

enum Sent {
    /// So many bytes of it.
    Gone(u64),
    Never,
    NotNow,
}

impl Default for Transmit {
    fn default() -> Self {
        Self { chain: Chain::default(), frame: vec![0; LONGEST], stuck: false, closed: None }
    }
}

impl Transmit {
    /// Sends a batch of frames as far as `limiter` lets them; true if there may be more.
    pub(super) fn serve(
        &mut self,
        queue: &mut Virtqueue,
        port: &mut dyn Port,
        limiter: &RateLimiter,
        features: u64,
        tally: &Tally,
    ) -> Result<bool, RingError> {
        (self.stuck, self.closed) = (false, None);
        queue.hush()?;
        for _ in 0..BATCH {
            if !queue.next(&mut self.chain)? {
                queue.signal()?;
                return queue.listen();
            }
            self.closed = limiter.admit(self.chain.readable_length().saturating_sub(HEADER as u64)).err();
            if self.closed.is_some() {
                Tally::add(&tally.tx_throttled, 1);
                queue.put_back(&self.chain);
                queue.signal()?;
                return Ok(false);
            }
            match self.send(queue, port, features, tally)? {
                Sent::Gone(bytes) => {
                    Tally::add(&tally.tx_frames, 1);
                    Tally::add(&tally.tx_bytes, bytes);
                    queue.complete(&self.chain, 0)?;
                }
                Sent::Never => queue.complete(&self.chain, 0)?,
                Sent::NotNow => {
                    self.stuck = true;
                    queue.put_back(&self.chain);
                    queue.signal()?;
                    return Ok(false);
                }
            }
        }
        queue.signal()?;
        Ok(true)
    }

    /// Sends the frame in the chain. Something to write on this queue, or less than a header, breaks the device; a frame that
    /// makes no sense is counted and forgotten.
    fn send(
        &mut self,
        queue: &Virtqueue,
        port: &mut dyn Port,
        features: u64,
        tally: &Tally,
    ) -> Result<Sent, RingError> {
        let length = self.chain.readable_length();
        if !self.chain.writable.is_empty() || length < HEADER as u64 {
            return Err(queue.give_up());
        }
        let frame = usize::try_from(length).ok().and_then(|length| self.frame.get_mut(..length));
        let Some(frame) = frame.filter(|frame| frame.len() >= HEADER + ETHERNET) else {
            Tally::add(&tally.tx_malformed, 1);
            return Ok(Sent::Never);
        };
        if !self.chain.copy_in(queue.memory(), 0, frame) {
            return Err(queue.give_up());
        }
        let bytes = (frame.len() - HEADER) as u64;
        let header = frame.first_chunk().and_then(|header| Header::from_guest(header, frame.len() - HEADER, features));
        let Some(header) = header else {
            Tally::add(&tally.tx_malformed, 1);
            return Ok(Sent::Never);
        };
        frame[..HEADER].copy_from_slice(&header.bytes(0));
        match port.send(frame) {
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {
                return Ok(Sent::NotNow);
            }
            Err(_) => {
                Tally::add(&tally.tx_dropped, 1);
                return Ok(Sent::Never);
            }
            Ok(()) => {}
        }
        Ok(Sent::Gone(bytes))
    }
}
