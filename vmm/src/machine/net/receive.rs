//! Frames for the guest.

use super::counters::Tally;
use super::feature;
use super::filter::Filter;
use super::header::{ETHERNET, HEADER, Header, LONGEST};
use super::port::Port;
use super::worker::BATCH;
use crate::machine::rate::RateLimiter;
use crate::machine::virtio::{Chain, RingError, Virtqueue};
use std::collections::VecDeque;
use std::io::ErrorKind;
use std::time::Duration;

/// The receive side of one pair of queues.
pub(super) struct Receive {
    /// The header and the frame in hand: read, and not delivered yet.
    frame: Vec<u8>,
    held: Option<Held>,
    /// Buffers that the driver offered and that hold nothing yet. They stay in hand, so that a frame that needs more of them
    /// waits for the driver and for nothing else.
    buffers: VecDeque<Chain>,
    spare: Vec<Chain>,
    /// How long the limit lets nothing through.
    pub(super) closed: Option<Duration>,
    /// The port is gone for good.
    pub(super) lost: bool,
}

impl Default for Receive {
    fn default() -> Self {
        let frame = vec![0; LONGEST];
        Self { frame, held: None, buffers: VecDeque::new(), spare: vec![], closed: None, lost: false }
    }
}

/// What is known of the frame in hand; its length is the header's too.
struct Held {
    header: Header,
    length: usize,
    /// The limit has let it through.
    admitted: bool,
}

impl Receive {
    /// Forgets what belongs to a session that ended.
    pub(super) fn begin(&mut self) {
        self.held = None;
        self.spare.extend(self.buffers.drain(..));
    }

    /// Whether a frame that comes could be dealt with now.
    pub(super) fn awaits_frames(&self) -> bool {
        self.held.is_none() && !self.lost
    }

    /// Receives a batch of frames as far as `limiter` lets them; true if there may be more.
    pub(super) fn serve(
        &mut self,
        queue: &mut Virtqueue,
        port: &mut dyn Port,
        limiter: &RateLimiter,
        filter: &Filter,
        features: u64,
        tally: &Tally,
    ) -> Result<bool, RingError> {
        self.closed = None;
        queue.hush()?;
        for _ in 0..BATCH {
            if self.held.is_none() && !self.take(port, filter, features, tally) {
                queue.signal()?;
                return Ok(false);
            }
            let Some(held) = &mut self.held else { continue };
            let bytes = held.length - HEADER;
            if !held.admitted {
                self.closed = limiter.admit(bytes as u64).err();
                if self.closed.is_some() {
                    Tally::add(&tally.rx_throttled, 1);
                    queue.signal()?;
                    return Ok(false);
                }
                held.admitted = true;
            }
            let merge = features & feature::MRG_RXBUF != 0;
            match self.deliver(queue, merge)? {
                Delivery::Done => {
                    Tally::add(&tally.rx_frames, 1);
                    Tally::add(&tally.rx_bytes, bytes as u64);
                }
                Delivery::TooSmall => Tally::add(&tally.rx_dropped, 1),
                Delivery::NoBuffers => {
                    queue.signal()?;
                    return queue.listen();
                }
            }
            self.held = None;
        }
        queue.signal()?;
        Ok(true)
    }

    /// Looks for a frame; false if there is none now. One that the guest does not want is taken and not held.
    fn take(&mut self, port: &mut dyn Port, filter: &Filter, features: u64, tally: &Tally) -> bool {
        if self.lost {
            return false;
        }
        let length = match port.receive(&mut self.frame) {
            Ok(length) => length,
            Err(error) => {
                self.lost = !matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted);
                return false;
            }
        };
        let Some(frame) = self.frame.get(..length).filter(|frame| frame.len() >= HEADER + ETHERNET) else {
            Tally::add(&tally.rx_dropped, 1);
            return true;
        };
        let (header, frame) = frame.split_at(HEADER);
        if !frame.first_chunk().is_some_and(|destination| filter.passes(*destination)) {
            Tally::add(&tally.rx_filtered, 1);
            return true;
        }
        let header = header.first_chunk().and_then(|header| Header::from_host(header, features));
        match header {
            Some(header) => self.held = Some(Held { header, length, admitted: false }),
            None => Tally::add(&tally.rx_dropped, 1),
        }
        true
    }

    /// Puts the frame in hand into receive buffers: one, or with `merge` as many as it needs, which the driver sees all at once
    /// (5.1.6.4).
    fn deliver(&mut self, queue: &mut Virtqueue, merge: bool) -> Result<Delivery, RingError> {
        let Some(Held { header, length, .. }) = self.held else { return Ok(Delivery::TooSmall) };
        let Some(count) = self.gather(queue, length, merge)? else { return Ok(Delivery::NoBuffers) };
        if count == 0 {
            return Ok(Delivery::TooSmall);
        }
        let buffers = u16::try_from(count).map_err(|_| RingError::Long)?;
        self.frame[..HEADER].copy_from_slice(&header.bytes(buffers));
        let mut rest = &self.frame[..length];
        for buffer in self.buffers.drain(..count) {
            let room = usize::try_from(buffer.writable_length()).unwrap_or(usize::MAX);
            let (part, more) = rest.split_at(room.min(rest.len()));
            if !buffer.copy_out(queue.memory(), 0, part) {
                return Err(queue.give_up());
            }
            queue.complete(&buffer, part.len() as u32)?;
            self.spare.push(buffer);
            rest = more;
        }
        Ok(Delivery::Done)
    }

    /// How many of the buffers in hand hold `length` bytes, after taking what is missing from the queue. None if the driver
    /// must offer more first; zero if it can't, because it has offered all there are or because one must do.
    fn gather(&mut self, queue: &mut Virtqueue, length: usize, merge: bool) -> Result<Option<usize>, RingError> {
        let (mut room, mut count) = (0, 0);
        let most = if merge { usize::from(queue.size()) } else { 1 };
        while room < length as u64 {
            if count == most {
                return Ok(Some(0));
            }
            if count == self.buffers.len() {
                let mut chain = self.spare.pop().unwrap_or_default();
                if !queue.next(&mut chain)? {
                    self.spare.push(chain);
                    return Ok(None);
                }
                // Buffers here are for the device to write, and the header fits into the first part of each (5.1.6.3.1).
                if !chain.readable.is_empty() || chain.writable_length() < HEADER as u64 {
                    return Err(queue.give_up());
                }
                self.buffers.push_back(chain);
            }
            room += self.buffers[count].writable_length();
            count += 1;
        }
        Ok(Some(count))
    }
}

enum Delivery {
    Done,
    /// It will never fit.
    TooSmall,
    /// It fits once the driver offers more.
    NoBuffers,
}
