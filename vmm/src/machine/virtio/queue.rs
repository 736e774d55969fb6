//! A queue as a device sees it: its [`Ring`] with the memory it lies in and the way back to its driver.

use super::chain::Chain;
use super::link::Link;
use super::ring::{Ring, RingError};
use crate::machine::memory::GuestRam;
use std::sync::Arc;

/// A queue that the driver enabled. Whatever goes wrong with it breaks the whole device, which the driver is told
/// ([`Link::give_up`]) before the error is returned: all that is left for the caller is to serve nothing more.
pub struct Virtqueue {
    ring: Ring,
    memory: Arc<GuestRam>,
    link: Arc<Link>,
    index: u16,
}

impl Virtqueue {
    /// Queue `index` of the device behind `link`.
    pub(super) fn new(ring: Ring, memory: Arc<GuestRam>, link: Arc<Link>, index: u16) -> Self {
        Self { ring, memory, link, index }
    }

    /// Which of the device's queues it is.
    pub fn index(&self) -> u16 {
        self.index
    }

    /// Entries: no more requests than these are ever in hand.
    pub fn size(&self) -> u16 {
        self.ring.size()
    }

    /// The guest's RAM: to be held on to by whatever refers to it while it works.
    pub fn memory(&self) -> &Arc<GuestRam> {
        &self.memory
    }

    /// Whether the device gave up, over this queue or another.
    pub fn is_broken(&self) -> bool {
        self.link.broken()
    }

    /// Takes the next request apart into `chain`; false if there is none. The caller owes a [`complete`](Self::complete) or a
    /// [`put_back`](Self::put_back) for each; several may be in hand, and be completed in any order.
    pub fn next(&mut self, chain: &mut Chain) -> Result<bool, RingError> {
        let answer = self.ring.next(&self.memory, chain);
        self.judge(answer)
    }

    /// Puts the request that the last `next` gave back to the front: it will be the next one again.
    pub fn put_back(&mut self, chain: &Chain) {
        self.ring.put_back(chain);
    }

    /// Returns `chain` with `written` bytes written. The driver sees it at the next [`signal`](Self::signal), with all others
    /// since the last one.
    pub fn complete(&mut self, chain: &Chain, written: u32) -> Result<(), RingError> {
        let answer = self.ring.complete(&self.memory, chain, written);
        self.judge(answer)
    }

    /// Shows the driver what was completed, and interrupts it if it wants that.
    pub fn signal(&mut self) -> Result<(), RingError> {
        let answer = self.ring.show(&self.memory);
        if self.judge(answer)? {
            self.link.used(usize::from(self.index));
        }
        Ok(())
    }

    /// Asks the driver for no doorbells while the queue is being served.
    pub fn hush(&mut self) -> Result<(), RingError> {
        let answer = self.ring.hush(&self.memory);
        self.judge(answer)
    }

    /// Asks the driver for a doorbell at the next request, to be called before sleeping; true if one came in the meantime.
    pub fn listen(&mut self) -> Result<bool, RingError> {
        let answer = self.ring.listen(&self.memory);
        self.judge(answer)
    }

    /// The device's own judgement: this driver sent what no driver sends. Nothing more is served until a reset.
    pub fn give_up(&self) -> RingError {
        self.link.give_up();
        RingError::Request
    }

    fn judge<T>(&self, answer: Result<T, RingError>) -> Result<T, RingError> {
        if answer.is_err() {
            self.link.give_up();
        }
        answer
    }
}
