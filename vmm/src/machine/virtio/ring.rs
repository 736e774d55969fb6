//! One split virtqueue of a guest that may be hostile (virtio 1.3, 2.7).
//!
//! `virtio-queue` keeps the indices. Here a chain is taken apart completely before a device sees it, so that a device gets
//! either a whole chain of buffers that lie in RAM, readable ones before writable ones, or an error that ends the session.

use super::feature;
use crate::machine::memory::GuestRam;
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemory, Permissions};

/// A queue that the driver set up, and which one it is.
pub struct Ring {
    queue: Queue,
    limit: usize,
}

/// One buffer of a chain, inside RAM.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Segment {
    /// Where.
    pub address: GuestAddress,
    /// Bytes.
    pub length: usize,
}

/// One request's buffers, in order. Kept by the device and filled anew for each request, so that none allocates.
#[derive(Default, Debug)]
pub struct Chain {
    head: u16,
    /// What the driver wrote for the device.
    pub readable: Vec<Segment>,
    /// Where the device writes.
    pub writable: Vec<Segment>,
}

/// How a driver broke the rules of its queue. There is no way on but a reset.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum RingError {
    /// Size, alignment or place of the queue.
    #[error("the queue does not lie in RAM")]
    Place,
    /// The available index ran further ahead than the queue is long, or lies outside of RAM.
    #[error("the available ring is no ring")]
    Available,
    /// A chain without end, with a bad link, or with a bad indirect table.
    #[error("a descriptor chain has no proper end")]
    Chain,
    /// More buffers than the device takes.
    #[error("a descriptor chain is longer than the device allows")]
    Long,
    /// A buffer outside of RAM.
    #[error("a buffer does not lie in RAM")]
    Buffer,
    /// Something to read behind something to write.
    #[error("a readable buffer follows a writable one")]
    Order,
    /// The used ring could not be written.
    #[error("the used ring is no ring")]
    Used,
}

impl Ring {
    /// A queue of `size` entries (a power of two up to `max`) at three guest addresses: descriptor table, available ring,
    /// used ring. No chain may have more than `limit` buffers.
    pub fn new(max: u16, size: u16, at: [u64; 3], features: u64, limit: usize) -> Result<Self, RingError> {
        let mut queue = Queue::new(max).map_err(|_| RingError::Place)?;
        queue.try_set_size(size).map_err(|_| RingError::Place)?;
        queue.try_set_desc_table_address(GuestAddress(at[0])).map_err(|_| RingError::Place)?;
        queue.try_set_avail_ring_address(GuestAddress(at[1])).map_err(|_| RingError::Place)?;
        queue.try_set_used_ring_address(GuestAddress(at[2])).map_err(|_| RingError::Place)?;
        queue.set_event_idx(features & feature::EVENT_INDEX != 0);
        queue.set_ready(true);
        Ok(Self { queue, limit })
    }

    /// Whether all three parts lie in RAM.
    pub fn check(&self, memory: &GuestRam) -> Result<(), RingError> {
        // The queue takes address 0 for "not set".
        let placed = self.queue.avail_ring() != 0 && self.queue.is_valid(memory);
        placed.then_some(()).ok_or(RingError::Place)
    }

    /// Takes the next request apart into `chain`; false if there is none.
    pub fn next(&mut self, memory: &GuestRam, chain: &mut Chain) -> Result<bool, RingError> {
        let pending = self.pending(memory)?;
        let next = self.queue.iter(memory).map_err(|_| RingError::Available)?.next();
        let Some(descriptors) = next else {
            return if pending { Err(RingError::Available) } else { Ok(false) };
        };
        chain.head = descriptors.head_index();
        chain.readable.clear();
        chain.writable.clear();
        let mut complete = false;
        for descriptor in descriptors {
            if chain.readable.len() + chain.writable.len() == self.limit {
                return Err(RingError::Long);
            }
            complete = !descriptor.has_next();
            let segment = Segment { address: descriptor.addr(), length: descriptor.len() as usize };
            chain.push(segment, descriptor.is_write_only(), memory)?;
        }
        // The iterator ends silently at a bad link, a loop, a bad indirect table or 4 GiB.
        complete.then_some(true).ok_or(RingError::Chain)
    }

    /// Puts the request that `next` gave back to the front: it will be the next one again.
    pub fn put_back(&mut self) {
        self.queue.go_to_previous_position();
    }

    /// Returns `chain` to the driver with `written` bytes written; true if the driver wants an interrupt.
    pub fn complete(&mut self, memory: &GuestRam, chain: &Chain, written: u32) -> Result<bool, RingError> {
        self.queue.add_used(memory, chain.head, written).map_err(|_| RingError::Used)?;
        self.queue.needs_notification(memory).map_err(|_| RingError::Used)
    }

    /// Asks the driver for no doorbells while the queue is being served.
    pub fn hush(&mut self, memory: &GuestRam) -> Result<(), RingError> {
        self.queue.disable_notification(memory).map_err(|_| RingError::Used)
    }

    /// Asks the driver for a doorbell at the next request; true if one came in the meantime.
    pub fn listen(&mut self, memory: &GuestRam) -> Result<bool, RingError> {
        self.queue.enable_notification(memory).map_err(|_| RingError::Used)
    }

    fn pending(&self, memory: &GuestRam) -> Result<bool, RingError> {
        let index = self.queue.avail_idx(memory, std::sync::atomic::Ordering::Acquire);
        index.map(|index| index.0 != self.queue.next_avail()).map_err(|_| RingError::Available)
    }
}

impl Chain {
    fn push(&mut self, segment: Segment, writable: bool, memory: &GuestRam) -> Result<(), RingError> {
        let access = if writable { Permissions::Write } else { Permissions::Read };
        if segment.length == 0 {
            return Ok(());
        }
        if !GuestMemory::check_range(memory, segment.address, segment.length, access) {
            return Err(RingError::Buffer);
        }
        match (writable, self.writable.is_empty()) {
            (true, _) => self.writable.push(segment),
            (false, true) => self.readable.push(segment),
            (false, false) => return Err(RingError::Order),
        }
        Ok(())
    }

    /// Bytes that the driver wrote.
    pub fn readable_length(&self) -> u64 {
        length(&self.readable)
    }

    /// Bytes that the device may write.
    pub fn writable_length(&self) -> u64 {
        length(&self.writable)
    }

    /// Copies what the driver wrote, from byte `from` on, into all of `data`; false if there is less.
    #[must_use]
    pub fn copy_in(&self, memory: &GuestRam, from: u64, data: &mut [u8]) -> bool {
        pieces(&self.readable, from, data.len()).all(|(address, at, length)| match data.get_mut(at..at + length) {
            Some(part) => memory.read_slice(part, address).is_ok(),
            None => false,
        }) && from + data.len() as u64 <= self.readable_length()
    }

    /// Copies all of `data` to where the device may write, from byte `from` on; false if there is less room.
    #[must_use]
    pub fn copy_out(&self, memory: &GuestRam, from: u64, data: &[u8]) -> bool {
        pieces(&self.writable, from, data.len()).all(|(address, at, length)| match data.get(at..at + length) {
            Some(part) => memory.write_slice(part, address).is_ok(),
            None => false,
        }) && from + data.len() as u64 <= self.writable_length()
    }
}

fn length(segments: &[Segment]) -> u64 {
    segments.iter().map(|s| s.length as u64).sum()
}

/// The parts of `segments` that bytes `from` to `from + count` fall into: (address, offset from `from`, length).
fn pieces(segments: &[Segment], from: u64, count: usize) -> impl Iterator<Item = (GuestAddress, usize, usize)> {
    let (mut skip, mut done) = (from, 0);
    segments.iter().filter_map(move |segment| {
        let inside = usize::try_from(skip).unwrap_or(usize::MAX).min(segment.length);
        skip -= inside as u64;
        let length = (segment.length - inside).min(count - done);
        let piece = (GuestAddress(segment.address.0 + inside as u64), done, length);
        done += length;
        (length > 0).then_some(piece)
    })
}

#[cfg(test)]
mod tests {
    use super::super::mock::{Descriptor, MockDriver, NEXT, WRITE};
    use super::*;
    use proptest::prelude::*;

    fn ring(driver: &MockDriver) -> Ring {
        let ring = Ring::new(64, MockDriver::SIZE, MockDriver::RING, feature::ALL, 16).expect("a good ring");
        ring.check(&driver.memory).expect("in RAM");
        ring
    }

    fn take(driver: &MockDriver, descriptors: &[Descriptor]) -> Result<Chain, RingError> {
        driver.offer(descriptors);
        let mut chain = Chain::default();
        ring(driver).next(&driver.memory, &mut chain).map(|_| chain)
    }

    #[test]
    fn a_chain_is_taken_apart_in_order() {
        let driver = MockDriver::new();
        let chain = take(
            &driver,
            &[(0x4000, 16, NEXT, 1), (0x5000, 0, NEXT, 2), (0x6000, 512, NEXT | WRITE, 3), (0x7000, 1, WRITE, 0)],
        );
        let chain = chain.expect("a good chain");
        assert_eq!((chain.readable.len(), chain.readable_length(), chain.writable_length()), (1, 16, 513));
        assert!(chain.copy_out(&driver.memory, 510, &[1, 2, 3]));
        assert_eq!(driver.memory.read_obj::<u16>(GuestAddress(0x61fe)).ok(), Some(0x0201));
        assert_eq!(driver.memory.read_obj::<u8>(GuestAddress(0x7000)).ok(), Some(3));
        assert!(!chain.copy_out(&driver.memory, 511, &[1, 2, 3]));
        assert!(!chain.copy_in(&driver.memory, 1, &mut [0; 16]));
    }

    #[test]
    fn an_indirect_table_is_followed_once() {
        let driver = MockDriver::new();
        driver.table(0x8000, &[(0x4000, 16, NEXT, 1), (0x6000, 1, WRITE, 0)]);
        let chain = take(&driver, &[(0x8000, 32, 4, 0)]).expect("a good table");
        assert_eq!((chain.readable.len(), chain.writable.len()), (1, 1));
        driver.table(0x8000, &[(0x9000, 32, 4, 0)]);
        assert_eq!(take(&driver, &[(0x8000, 16, 4, 0)]).err(), Some(RingError::Chain), "a table in a table");
        assert_eq!(take(&driver, &[(0x8000, 17, 4, 0)]).err(), Some(RingError::Chain), "half a descriptor");
        assert_eq!(take(&driver, &[(0x8000, 0, 4, 0)]).err(), Some(RingError::Chain), "an empty table");
    }

    #[test]
    fn a_driver_that_breaks_the_rules_is_told_which() {
        let end = MockDriver::BYTES;
        let cases: [(&[Descriptor], RingError); 8] = [
            (&[(0x4000, 16, NEXT, 0)], RingError::Chain),
            (&[(0x4000, 16, NEXT, 1), (0x5000, 16, NEXT, 0)], RingError::Chain),
            (&[(0x4000, 16, NEXT, MockDriver::SIZE)], RingError::Chain),
            (&[(end, 1, 0, 0)], RingError::Buffer),
            (&[(end - 1, 2, 0, 0)], RingError::Buffer),
            (&[(u64::MAX, 2, 0, 0)], RingError::Buffer),
            (&[(0x4000, u32::MAX, 0, 0)], RingError::Buffer),
            (&[(0x4000, 16, NEXT | WRITE, 1), (0x5000, 16, 0, 0)], RingError::Order),
        ];
        for (descriptors, error) in cases {
            let answer = take(&MockDriver::new(), descriptors).err();
            assert!(
                answer == Some(error) || answer == Some(RingError::Long) && error == RingError::Chain,
                "{answer:?}"
            );
        }
    }

    #[test]
    fn an_index_that_runs_ahead_is_refused() {
        let driver = MockDriver::new();
        driver.set_available(MockDriver::SIZE + 1);
        assert_eq!(ring(&driver).next(&driver.memory, &mut Chain::default()), Err(RingError::Available));
    }

    #[test]
    fn a_request_that_was_put_back_comes_again() {
        let driver = MockDriver::new();
        driver.offer(&[(0x4000, 16, 0, 0)]);
        let (mut ring, mut chain) = (ring(&driver), Chain::default());
        assert_eq!(ring.next(&driver.memory, &mut chain), Ok(true));
        ring.put_back();
        assert_eq!(ring.next(&driver.memory, &mut chain), Ok(true));
        assert_eq!(ring.complete(&driver.memory, &chain, 0), Ok(true));
        assert_eq!(ring.next(&driver.memory, &mut chain), Ok(false));
        assert_eq!(driver.used(), 1);
    }

    #[test]
    fn indices_wrap() {
        let driver = MockDriver::new();
        let (mut ring, mut chain) = (ring(&driver), Chain::default());
        for round in 0..0x1_0010_u32 {
            driver.offer(&[(0x4000, 16, 0, 0)]);
            assert_eq!(ring.next(&driver.memory, &mut chain), Ok(true), "{round}");
            ring.complete(&driver.memory, &chain, round).expect("used");
        }
        assert_eq!(driver.used(), 0x10);
    }

    #[test]
    fn a_queue_outside_of_ram_is_refused() {
        let driver = MockDriver::new();
        for part in 0..3 {
            for address in [MockDriver::BYTES, MockDriver::BYTES - 16, !0xf, 1] {
                let mut at = MockDriver::RING;
                at[part] = address;
                let ring = Ring::new(64, 16, at, 0, 16).and_then(|ring| ring.check(&driver.memory));
                assert_eq!(ring, Err(RingError::Place), "{part} {address:#x}");
            }
        }
        assert!(Ring::new(64, 3, MockDriver::RING, 0, 16).is_err());
        assert!(Ring::new(64, 128, MockDriver::RING, 0, 16).is_err());
        assert!(Ring::new(64, 0, MockDriver::RING, 0, 16).is_err());
    }

    proptest! {
        /// Whatever stands in the rings and tables: no panic, no endless loop, and a chain that is taken lies in RAM.
        #[test]
        fn any_memory_is_survived(
            descriptors in prop::collection::vec((0_u64..0x1_1000, 0_u32..0x2000, 0_u16..8, 0_u16..20), 16),
            heads in prop::collection::vec(0_u16..20, 16),
            index in 0_u16..20,
        ) {
            let driver = MockDriver::new();
            driver.table(MockDriver::RING[0], &descriptors);
            driver.set_heads(&heads);
            driver.set_available(index);
            let (mut ring, mut chain) = (ring(&driver), Chain::default());
            for _ in 0..64 {
                match ring.next(&driver.memory, &mut chain) {
                    Err(_) | Ok(false) => break,
                    Ok(true) => {
                        for s in chain.readable.iter().chain(&chain.writable) {
                            prop_assert!(s.address.0 + s.length as u64 <= MockDriver::BYTES);
                        }
                        prop_assert!(chain.readable.len() + chain.writable.len() <= 16);
                        let _ = ring.complete(&driver.memory, &chain, 0);
                    }
                }
            }
        }
    }
}
