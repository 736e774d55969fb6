//! What wakes the balloon: pages that come, go, or are reported free.

use super::counters::Tally;
use crate::machine::memory::discard;
use crate::machine::virtio::{Chain, RingError, Serve, Session, Virtqueue};
use std::sync::Arc;
use vm_memory::{GuestAddress, GuestMemory, Permissions};

/// The unit of the balloon, whatever the guest's pages are (5.5.6).
pub(super) const PAGE: u64 = 4096;
/// The most pages in one request.
const PAGES_MAX: u64 = 4096;
const NUMBER: usize = 4;

/// The first queues; those behind them are for reports.
const INFLATE: usize = 0;
const DEFLATE: usize = 1;

/// The balloon, on its thread.
pub(super) struct Balloon {
    tally: Arc<Tally>,
    chain: Chain,
    pages: Vec<u8>,
}

impl Balloon {
    pub(super) fn new(tally: Arc<Tally>) -> Self {
        Self { tally, chain: Chain::default(), pages: vec![] }
    }

    /// Serves the next request of queue `index`.
    fn serve_next(&mut self, index: usize, queue: &mut Virtqueue) -> Result<bool, RingError> {
        queue.hush()?;
        if !queue.next(&mut self.chain)? {
            return queue.listen();
        }
        match index {
            INFLATE => self.inflate(queue)?,
            DEFLATE => {
                let pages = self.page_numbers(queue)?;
                Tally::add(&self.tally.deflated_pages, pages);
            }
            _ => self.report(queue)?,
        }
        queue.complete(&self.chain, 0)?;
        queue.signal()?;
        Ok(true)
    }

    /// Reads the request's page numbers; gives how many.
    fn page_numbers(&mut self, queue: &Virtqueue) -> Result<u64, RingError> {
        let length = self.chain.readable_length();
        let pages = length / NUMBER as u64;
        if !self.chain.writable.is_empty() || !length.is_multiple_of(NUMBER as u64) || pages > PAGES_MAX {
            return Err(queue.give_up());
        }
        self.pages.resize(length as usize, 0);
        if self.chain.copy_in(queue.memory(), 0, &mut self.pages) { Ok(pages) } else { Err(queue.give_up()) }
    }

    /// Takes pages from the guest. None is touched unless all of them are RAM.
    fn inflate(&mut self, queue: &Virtqueue) -> Result<(), RingError> {
        let pages = self.page_numbers(queue)?;
        let (numbers, _) = self.pages.as_chunks::<NUMBER>();
        let addresses = || numbers.iter().map(|number| u64::from(u32::from_le_bytes(*number)) * PAGE);
        let memory = queue.memory();
        let in_ram =
            |at| GuestMemory::check_range(memory.as_ref(), GuestAddress(at), PAGE as usize, Permissions::Write);
        if !addresses().all(in_ram) {
            return Err(queue.give_up());
        }
        for at in addresses() {
            if discard(memory, GuestAddress(at), PAGE).is_err() {
                Tally::add(&self.tally.kept_bytes, PAGE);
            }
        }
        Tally::add(&self.tally.inflated_pages, pages);
        Ok(())
    }

    /// Takes the memory of the free pages that the driver reports as buffers (5.5.6.7). They lie in RAM, or the queue would not
    /// have given them.
    fn report(&mut self, queue: &Virtqueue) -> Result<(), RingError> {
        if !self.chain.readable.is_empty() {
            return Err(queue.give_up());
        }
        for segment in &self.chain.writable {
            // Whole pages only: what lies beside them is somebody's.
            let first = segment.address.0.next_multiple_of(PAGE);
            let end = (segment.address.0 + segment.length as u64) / PAGE * PAGE;
            let length = end.saturating_sub(first);
            if length > 0 && discard(queue.memory(), GuestAddress(first), length).is_err() {
                Tally::add(&self.tally.kept_bytes, length);
            }
            Tally::add(&self.tally.reported_bytes, length);
        }
        Ok(())
    }
}

impl Serve for Balloon {
    fn serve(&mut self, session: &mut Session) -> Result<bool, RingError> {
        let mut more = false;
        for (index, queue) in session.queues.iter_mut().enumerate() {
            if let Some(queue) = queue {
                more |= self.serve_next(index, queue)?;
            }
        }
        Ok(more)
    }
}

#[cfg(test)]
#[path = "worker_tests.rs"]
mod tests;
