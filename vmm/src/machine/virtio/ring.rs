//! One split virtqueue of a guest that may be hostile (virtio 1.3, 2.7).
//!
//! ```text
//! descriptor table: {address u64, length u32, flags u16, next u16} × size
//! available ring:   flags u16, index u16, head u16 × size, used_event u16          written by the driver
//! used ring:        flags u16, index u16, {head u32, length u32} × size, available_event u16     written by the device
//! ```
//!
//! The guest may change any of it at any time, so each word is read once. A chain is taken apart completely before a device
//! sees it: the device gets either a whole chain of buffers that lie in RAM, readable ones before writable ones, or an error
//! that ends the session. A head that the driver makes available twice is such an error too, so that no more requests are
//! in the device's hands than the queue is long.

use super::chain::{Chain, Segment};
use super::feature;
use crate::machine::memory::GuestRam;
use std::sync::atomic::{Ordering, fence};
use vm_memory::{ByteValued, Bytes, GuestAddress, GuestMemory, Le16, Le32, Le64, Permissions};

/// The longest queue (2.7).
const SIZE_MAX: u16 = 1 << 15;
const DESCRIPTOR: u64 = 16;
const DESC_NEXT: u16 = 1;
const DESC_WRITE: u16 = 2;
const DESC_INDIRECT: u16 = 4;
const AVAILABLE_NO_INTERRUPT: u16 = 1;
const USED_NO_NOTIFY: u16 = 1;

/// A queue that the driver set up.
#[derive(PartialEq, Eq, Debug)]
pub struct Ring {
    size: u16,
    table: u64,
    available: u64,
    used: u64,
    event_index: bool,
    indirect: bool,
    limit: usize,
    /// The next entry of the available ring.
    next: u16,
    /// The next entry of the used ring: what was completed, shown to the driver or not.
    completed: u16,
    /// The used index that the driver sees.
    shown: u16,
    /// The used index at the last decision about an interrupt.
    signalled: u16,
    /// Heads that the device has in hand, one bit each.
    taken: Vec<u64>,
}

/// How a driver broke the rules of its queue. There is no way on but a reset.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum RingError {
    /// Size, alignment or place of the queue.
    #[error("the queue does not lie in RAM")]
    Place,
    /// The available index ran further ahead than the queue is long.
    #[error("the available ring is no ring")]
    Available,
    /// A chain without end, with a bad link, or with a bad or unexpected indirect table.
    #[error("a descriptor chain has no proper end")]
    Chain,
    /// More buffers than the device takes, or more than 4 GiB.
    #[error("a descriptor chain is longer than the device allows")]
    Long,
    /// A buffer outside of RAM.
    #[error("a buffer does not lie in RAM")]
    Buffer,
    /// Something to read behind something to write.
    #[error("a readable buffer follows a writable one")]
    Order,
    /// A request that the device still has in hand.
    #[error("a descriptor chain was made available twice")]
    Twice,
    /// The used ring could not be written.
    #[error("the used ring is no ring")]
    Used,
    /// A device's own rule: a request that no driver sends.
    #[error("a request makes no sense")]
    Request,
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Descriptor {
    address: Le64,
    length: Le32,
    flags: Le16,
    next: Le16,
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Used {
    head: Le32,
    length: Le32,
}

// SAFETY: `repr(C)` without padding (8 + 4 + 2 + 2 bytes), and any bytes are valid in each field.
#[allow(unsafe_code)]
unsafe impl ByteValued for Descriptor {}
// SAFETY: `repr(C)` without padding, and any bytes are valid in each field.
#[allow(unsafe_code)]
unsafe impl ByteValued for Used {}

impl Ring {
    /// A queue of `size` entries (a power of two up to `max`) at three guest addresses: descriptor table, available ring,
    /// used ring, by the rules that were negotiated. No chain may have more than `limit` descriptors.
    pub fn new(max: u16, size: u16, at: [u64; 3], features: u64, limit: usize) -> Result<Self, RingError> {
        let [table, available, used] = at;
        let sized = size.is_power_of_two() && size <= max.min(SIZE_MAX);
        let aligned = table.is_multiple_of(16) && available.is_multiple_of(2) && used.is_multiple_of(4);
        // A driver that enables a queue without saying where it is leaves zeros.
        if !sized || !aligned || available == 0 || used == 0 {
            return Err(RingError::Place);
        }
        Ok(Self {
            size,
            table,
            available,
            used,
            event_index: features & feature::EVENT_INDEX != 0,
            indirect: features & feature::INDIRECT_DESCRIPTORS != 0,
            limit,
            next: 0,
            completed: 0,
            shown: 0,
            signalled: 0,
            taken: vec![0; usize::from(size).div_ceil(64)],
        })
    }

    /// Entries.
    pub fn size(&self) -> u16 {
        self.size
    }

    /// Whether all three parts lie in RAM.
    pub fn check(&self, memory: &GuestRam) -> Result<(), RingError> {
        let inside = |at: u64, length: u64, access| {
            at.checked_add(length).is_some()
                && GuestMemory::check_range(memory, GuestAddress(at), length as usize, access)
        };
        let size = u64::from(self.size);
        let placed = inside(self.table, DESCRIPTOR * size, Permissions::Read)
            && inside(self.available, 6 + 2 * size, Permissions::Read)
            && inside(self.used, 6 + 8 * size, Permissions::Write);
        placed.then_some(()).ok_or(RingError::Place)
    }

    /// Takes the next request apart into `chain`; false if there is none.
    pub fn next(&mut self, memory: &GuestRam, chain: &mut Chain) -> Result<bool, RingError> {
        let index = load(memory, self.available + 2, Ordering::Acquire).ok_or(RingError::Available)?;
        match index.wrapping_sub(self.next) {
            0 => return Ok(false),
            pending if pending > self.size => return Err(RingError::Available),
            _ => {}
        }
        let at = self.available + 4 + 2 * self.slot(self.next);
        let head = load(memory, at, Ordering::Relaxed).ok_or(RingError::Available)?;
        if head >= self.size {
            return Err(RingError::Chain);
        }
        if self.is_taken(head) {
            return Err(RingError::Twice);
        }
        self.walk(memory, head, chain)?;
        self.set_taken(head, true);
        self.next = self.next.wrapping_add(1);
        Ok(true)
    }

    /// Puts the request that the last `next` gave back to the front: it will be the next one again.
    pub fn put_back(&mut self, chain: &Chain) {
        self.set_taken(chain.head, false);
        self.next = self.next.wrapping_sub(1);
    }

    /// Returns `chain` to the driver with `written` bytes written. The driver sees it at the next [`show`](Self::show).
    pub fn complete(&mut self, memory: &GuestRam, chain: &Chain, written: u32) -> Result<(), RingError> {
        let element = Used { head: u32::from(chain.head).into(), length: written.into() };
        let at = self.used + 4 + 8 * self.slot(self.completed);
        memory.write_obj(element, GuestAddress(at)).map_err(|_| RingError::Used)?;
        self.set_taken(chain.head, false);
        self.completed = self.completed.wrapping_add(1);
        Ok(())
    }

    /// Shows the driver all that was completed, at once; true if it wants an interrupt for it (2.7.7).
    pub fn show(&mut self, memory: &GuestRam) -> Result<bool, RingError> {
        if self.shown == self.completed {
            return Ok(false);
        }
        self.shown = self.completed;
        store(memory, self.used + 2, self.shown, Ordering::Release).ok_or(RingError::Used)?;
        // The driver says what it wants and looks at the index then; here it is the other way round. One of the two notices.
        fence(Ordering::SeqCst);
        let before = std::mem::replace(&mut self.signalled, self.shown);
        if !self.event_index {
            let flags = load(memory, self.available, Ordering::Relaxed).ok_or(RingError::Available)?;
            return Ok(flags & AVAILABLE_NO_INTERRUPT == 0);
        }
        let at = self.available + 4 + 2 * u64::from(self.size);
        let event = load(memory, at, Ordering::Relaxed).ok_or(RingError::Available)?;
        Ok(passed(event, before, self.shown))
    }

    /// Asks the driver for no doorbells while the queue is being served. With event indices there is nothing to say: the
    /// driver rings once for each index that [`listen`](Self::listen) names.
    pub fn hush(&mut self, memory: &GuestRam) -> Result<(), RingError> {
        if self.event_index {
            return Ok(());
        }
        store(memory, self.used, USED_NO_NOTIFY, Ordering::Relaxed).ok_or(RingError::Used)
    }

    /// Asks the driver for a doorbell at the next request; true if one came in the meantime.
    pub fn listen(&mut self, memory: &GuestRam) -> Result<bool, RingError> {
        let (at, value) = match self.event_index {
            true => (self.used + 4 + 8 * u64::from(self.size), self.next),
            false => (self.used, 0),
        };
        store(memory, at, value, Ordering::Relaxed).ok_or(RingError::Used)?;
        // As in `show`, with the roles changed.
        fence(Ordering::SeqCst);
        let index = load(memory, self.available + 2, Ordering::Relaxed).ok_or(RingError::Available)?;
        Ok(index != self.next)
    }

    /// Requests that the device has in hand.
    pub fn in_hand(&self) -> u32 {
        self.taken.iter().map(|word| word.count_ones()).sum()
    }

    /// Follows a chain from `head` to its end, through at most one indirect table, which must be its last part (2.7.5.3).
    fn walk(&self, memory: &GuestRam, head: u16, chain: &mut Chain) -> Result<(), RingError> {
        chain.clear(head);
        let (mut table, mut entries, mut at) = (self.table, u32::from(self.size), head);
        let (mut indirect, mut bytes) = (false, 0_u64);
        let mut steps = 0;
        loop {
            if u32::from(at) >= entries {
                return Err(RingError::Chain);
            }
            let place = table.checked_add(DESCRIPTOR * u64::from(at)).ok_or(RingError::Chain)?;
            let descriptor: Descriptor = memory.read_obj(GuestAddress(place)).map_err(|_| RingError::Chain)?;
            let (flags, length) = (u16::from(descriptor.flags), u32::from(descriptor.length));
            if flags & DESC_INDIRECT != 0 {
                let good = self.indirect && !indirect && flags & DESC_NEXT == 0;
                if !good || length == 0 || !length.is_multiple_of(DESCRIPTOR as u32) {
                    return Err(RingError::Chain);
                }
                (table, entries, at, indirect) = (descriptor.address.into(), length / DESCRIPTOR as u32, 0, true);
                continue;
            }
            steps += 1;
            bytes += u64::from(length);
            if steps > self.limit || bytes > u64::from(u32::MAX) {
                return Err(RingError::Long);
            }
            let segment = Segment { address: GuestAddress(descriptor.address.into()), length: length as usize };
            chain.push(segment, flags & DESC_WRITE != 0, memory)?;
            if flags & DESC_NEXT == 0 {
                return Ok(());
            }
            at = descriptor.next.into();
        }
    }

    fn slot(&self, index: u16) -> u64 {
        u64::from(index % self.size)
    }

    fn is_taken(&self, head: u16) -> bool {
        self.taken[usize::from(head / 64)] & 1 << (head % 64) != 0
    }

    fn set_taken(&mut self, head: u16, taken: bool) {
        let (word, bit) = (&mut self.taken[usize::from(head / 64)], 1 << (head % 64));
        *word = if taken { *word | bit } else { *word & !bit };
    }
}

/// Whether an index that went from `before` to `now` passed `event` (2.7.7.2): the arithmetic wraps.
fn passed(event: u16, before: u16, now: u16) -> bool {
    now.wrapping_sub(event).wrapping_sub(1) < now.wrapping_sub(before)
}

fn load(memory: &GuestRam, at: u64, order: Ordering) -> Option<u16> {
    memory.load(GuestAddress(at), order).map(u16::from_le).ok()
}

fn store(memory: &GuestRam, at: u64, value: u16, order: Ordering) -> Option<()> {
    memory.store(value.to_le(), GuestAddress(at), order).ok()
}

#[cfg(test)]
#[path = "ring_tests.rs"]
mod tests;
