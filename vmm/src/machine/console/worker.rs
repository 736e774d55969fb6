//! What wakes the console: the driver, somebody who types, or who reads again.

use super::counters::Tally;
use super::line::Line;
use crate::machine::virtio::{Chain, RingError, Serve, Session, Virtqueue};
use rustix::event::{PollFd, Timespec, poll};
use std::io::ErrorKind;
use std::sync::Arc;
use std::time::{Duration, Instant};

const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;
/// Bytes that are carried at once.
const PIECE: usize = 4096;
/// How long a machine that ends waits for what its guest had said to be read.
const FAREWELL: Duration = Duration::from_secs(2);

/// The console, on its thread.
pub(super) struct Carrier {
    tally: Arc<Tally>,
    line: Line,
    buffer: Vec<u8>,
    /// A buffer of the driver's, for what is typed next.
    room: Option<Chain>,
    /// What the driver sends, and how much of it is out.
    sending: Option<(Chain, u64)>,
    spare: Vec<Chain>,
    /// Nobody will type any more.
    deaf: bool,
    /// The other end takes nothing more for now.
    stuck: bool,
}

impl Carrier {
    pub(super) fn new(tally: Arc<Tally>, line: Line) -> Self {
        let buffer = vec![0; PIECE];
        Self { tally, line, buffer, room: None, sending: None, spare: vec![], deaf: false, stuck: false }
    }

    /// Carries a piece from the guest.
    fn send(&mut self, queue: &mut Virtqueue) -> Result<bool, RingError> {
        self.stuck = false;
        queue.hush()?;
        if self.sending.is_none() {
            let mut chain = self.spare.pop().unwrap_or_default();
            if !queue.next(&mut chain)? {
                self.spare.push(chain);
                return queue.listen();
            }
            if !chain.writable.is_empty() {
                return Err(queue.give_up());
            }
            self.sending = Some((chain, 0));
        }
        let Some((chain, from)) = &mut self.sending else { return Ok(false) };
        let left = chain.readable_length() - *from;
        let piece = &mut self.buffer[..usize::try_from(left).unwrap_or(PIECE).min(PIECE)];
        if !chain.copy_in(queue.memory(), *from, piece) {
            return Err(queue.give_up());
        }
        // Also an empty one, which is out already.
        let written = if piece.is_empty() { Ok(0) } else { self.line.write(piece) };
        match written {
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                self.stuck = true;
                return Ok(false);
            }
            Ok(length) => {
                Tally::add(&self.tally.output_bytes, length);
                *from += length as u64;
            }
            Err(_) => {
                Tally::add(&self.tally.lost_bytes, piece.len());
                *from += piece.len() as u64;
            }
        }
        if *from == chain.readable_length()
            && let Some((chain, _)) = self.sending.take()
        {
            queue.complete(&chain, 0)?;
            queue.signal()?;
            self.spare.push(chain);
        }
        Ok(true)
    }

    /// Carries a piece to the guest. Nothing is read before the guest has room for it, so that nothing typed is lost.
    fn receive(&mut self, queue: &mut Virtqueue) -> Result<bool, RingError> {
        if self.deaf {
            return Ok(false);
        }
        queue.hush()?;
        if self.room.is_none() {
            let mut chain = self.spare.pop().unwrap_or_default();
            if !queue.next(&mut chain)? {
                self.spare.push(chain);
                return queue.listen();
            }
            if !chain.readable.is_empty() || chain.writable.is_empty() {
                return Err(queue.give_up());
            }
            self.room = Some(chain);
        }
        let Some(chain) = &self.room else { return Ok(false) };
        let length = usize::try_from(chain.writable_length()).unwrap_or(PIECE).min(PIECE);
        let piece = match self.line.read(&mut self.buffer[..length]) {
            Ok(length @ 1..) => &self.buffer[..length],
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => return Ok(false),
            Ok(_) | Err(_) => {
                self.deaf = true;
                return Ok(false);
            }
        };
        if !chain.copy_out(queue.memory(), 0, piece) {
            return Err(queue.give_up());
        }
        queue.complete(chain, piece.len() as u32)?;
        queue.signal()?;
        Tally::add(&self.tally.input_bytes, piece.len());
        self.spare.extend(self.room.take());
        Ok(true)
    }
}

impl Serve for Carrier {
    fn begin(&mut self, _session: &mut Session) {
        self.spare.extend(self.room.take());
        self.spare.extend(self.sending.take().map(|(chain, _)| chain));
    }

    fn serve(&mut self, session: &mut Session) -> Result<bool, RingError> {
        self.line.accept();
        let mut more = false;
        if let Some(Some(queue)) = session.queues.get_mut(TRANSMIT) {
            more |= self.send(queue)?;
        }
        if let Some(Some(queue)) = session.queues.get_mut(RECEIVE) {
            more |= self.receive(queue)?;
        }
        Ok(more)
    }

    /// The last lines of a guest that failed are what its operator needs.
    fn finish(&mut self, session: &mut Session) {
        let Some(Some(queue)) = session.queues.get_mut(TRANSMIT) else { return };
        let until = Instant::now() + FAREWELL;
        loop {
            self.line.accept();
            let sent = self.send(queue);
            let left = until.saturating_duration_since(Instant::now());
            match sent {
                Ok(more) if (more || self.stuck) && !left.is_zero() => {}
                _ => return,
            }
            if self.stuck {
                let mut room = vec![];
                self.line.interest(false, true, &mut room);
                // Interrupted or not: the loop looks again.
                let _ = poll(&mut room, Timespec::try_from(left).ok().as_ref());
            }
        }
    }

    fn interest<'a>(&'a self, descriptors: &mut Vec<PollFd<'a>>) -> Option<Duration> {
        self.line.interest(self.room.is_some() && !self.deaf, self.stuck, descriptors);
        None
    }
}

#[cfg(test)]
#[path = "worker_tests.rs"]
mod tests;
