//! What the fuzz targets of devices share: a small guest whose memory is the input, with queues at fixed places in it.

use super::{Link, Ring, Session, Virtqueue, feature};
use crate::machine::memory::GuestRam;
use crate::machine::pci::MsixTable;
use crate::machine::wires::{Message, WireError, Wires, new_event};
use std::sync::Arc;
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

const MEMORY: usize = 64 << 10;

/// Where a queue lies.
pub(crate) struct Place {
    /// Entries.
    pub(crate) size: u16,
    /// Descriptor table, available ring, used ring.
    pub(crate) at: [u64; 3],
}

/// The first queue.
pub(crate) const QUEUE: Place = Place { size: 16, at: [0, 0x100, 0x200] };

/// A guest of 64 KiB, and its queues.
pub(crate) struct Hostile {
    pub(crate) queues: Vec<Virtqueue>,
    link: Arc<Link>,
}

impl Hostile {
    /// A guest whose memory begins with `data`, the last byte of which says what its driver knows beside the simplest of rings.
    pub(crate) fn new(data: &[u8], queues: &[Place]) -> Option<Self> {
        let memory = GuestRam::from_ranges(&[(GuestAddress(0), MEMORY)]).ok()?;
        memory.write_slice(&data[..data.len().min(MEMORY)], GuestAddress(0)).ok()?;
        let memory = Arc::new(memory);
        let msix = Arc::new(MsixTable::new(1, Arc::new(NoWires)).ok()?);
        let link = Arc::new(Link::new(msix, queues.len()));
        let features = data.last().map_or(0, |last| rules(*last));
        let queue = |(index, place): (u16, &Place)| {
            let ring = Ring::new(place.size, place.size, place.at, features, 64).ok()?;
            Some(Virtqueue::new(ring, memory.clone(), link.clone(), index))
        };
        let queues = (0..).zip(queues).map(queue).collect::<Option<_>>()?;
        Some(Self { queues, link })
    }

    /// The same as the session of a driver that negotiated `features`.
    pub(crate) fn session(self, features: u64) -> Session {
        Session { queues: self.queues.into_iter().map(Some).collect(), features, link: self.link }
    }
}

/// Bit 0: indirect descriptors; bit 1: event indices.
fn rules(byte: u8) -> u64 {
    let bit = |number: u8, feature: u64| if byte >> number & 1 == 1 { feature } else { 0 };
    bit(0, feature::INDIRECT_DESCRIPTORS) | bit(1, feature::EVENT_INDEX)
}

/// Wires that lead nowhere.
struct NoWires;

impl Wires for NoWires {
    fn message_line(&self) -> Result<(u32, EventFd), WireError> {
        Ok((0, new_event()?))
    }
    fn route(&self, _line: u32, _event: &EventFd, _message: Message) -> Result<(), WireError> {
        Ok(())
    }
    fn release_line(&self, _line: u32, _event: &EventFd) -> Result<(), WireError> {
        Ok(())
    }
    fn connect_doorbell(&self, _address: u64, _event: &EventFd) -> Result<(), WireError> {
        Ok(())
    }
    fn disconnect_doorbell(&self, _address: u64, _event: &EventFd) -> Result<(), WireError> {
        Ok(())
    }
}

/// A guest's memory, to begin with.
#[cfg(test)]
pub(crate) struct Seed {
    pub(crate) memory: Vec<u8>,
    /// Where the next chain's own table goes, of a driver that uses such.
    table: Option<u64>,
}

#[cfg(test)]
impl Seed {
    /// Bytes of a chain's table.
    const TABLE: u64 = 0x40;

    /// Of a driver that knows the simplest of rings, and of one that knows indirect descriptors and event indices.
    pub(crate) fn both() -> [Self; 2] {
        let seed = |rules: u8, table| {
            let mut memory = vec![0; 0x4000];
            memory[0x3fff] = rules;
            Self { memory, table }
        };
        [seed(0, None), seed(3, Some(0xa00))]
    }

    pub(crate) fn put(&mut self, at: u64, bytes: &[u8]) {
        self.memory[at as usize..][..bytes.len()].copy_from_slice(bytes);
    }

    /// Makes a chain available: address, length, flags of each buffer.
    pub(crate) fn chain(&mut self, queue: &Place, buffers: &[(u64, u32, u16)]) {
        let (index, head) = self.next(queue);
        match self.table {
            None => self.describe(queue.at[0], head, buffers),
            Some(table) => {
                self.table = Some(table + Self::TABLE);
                self.describe(table, 0, buffers);
                self.describe(queue.at[0], head, &[(table, 16 * buffers.len() as u32, super::mock::INDIRECT)]);
            }
        }
        self.put(queue.at[1] + 4 + 2 * u64::from(index % queue.size), &head.to_le_bytes());
        self.put(queue.at[1] + 2, &(index + 1).to_le_bytes());
    }

    /// The next index, and its head: each chain has a quarter of the table.
    fn next(&self, queue: &Place) -> (u16, u16) {
        let at = queue.at[1] as usize + 2;
        let index = u16::from_le_bytes([self.memory[at], self.memory[at + 1]]);
        (index, index % 4 * (queue.size / 4))
    }

    fn describe(&mut self, table: u64, head: u16, buffers: &[(u64, u32, u16)]) {
        for (n, (address, length, flags)) in (0..).zip(buffers) {
            let at = table + 16 * u64::from(head + n);
            let more = usize::from(n) + 1 < buffers.len();
            self.put(at, &address.to_le_bytes());
            self.put(at + 8, &length.to_le_bytes());
            self.put(at + 12, &(flags | u16::from(more)).to_le_bytes());
            self.put(at + 14, &(head + n + 1).to_le_bytes());
        }
    }
}

/// Calls `target` with `rounds` mutations of `seed`, by a generator with a fixed seed.
#[cfg(test)]
pub(crate) fn mutate(seed: &[u8], rounds: usize, target: fn(&[u8])) {
    let mut random = 0x9e37_79b9_7f4a_7c15_u64;
    let mut next = move || {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        random as usize
    };
    // Rings, tables and headers are where it matters.
    let end = seed.len().min(0x1000);
    for _ in 0..rounds {
        let mut memory = seed.to_vec();
        for _ in 0..1 + next() % 12 {
            let at = next() % end;
            memory[at] = if next() % 3 == 0 { 0xff } else { next() as u8 };
        }
        // What the driver knows: mostly as in the seed.
        if let Some(last) = memory.last_mut().filter(|_| next() % 4 == 0) {
            *last = next() as u8;
        }
        target(&memory);
    }
}
