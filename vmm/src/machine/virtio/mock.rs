//! The driver's side of a queue, for tests: it writes what it is told, right or wrong.

use crate::machine::memory::GuestRam;
use std::cell::Cell;
use vm_memory::{Bytes, GuestAddress};

/// Address, length, flags, next.
pub(crate) type Descriptor = (u64, u32, u16, u16);

/// VIRTQ_DESC_F_NEXT.
pub(crate) const NEXT: u16 = 1;
/// VIRTQ_DESC_F_WRITE.
pub(crate) const WRITE: u16 = 2;
/// VIRTQ_DESC_F_INDIRECT.
pub(crate) const INDIRECT: u16 = 4;

/// A guest of 64 KiB with one queue.
pub(crate) struct MockDriver {
    pub(crate) memory: GuestRam,
    available: Cell<u16>,
}

impl MockDriver {
    pub(crate) const BYTES: u64 = 0x1_0000;
    pub(crate) const SIZE: u16 = 16;
    /// Descriptor table, available ring, used ring.
    pub(crate) const RING: [u64; 3] = [0x1000, 0x2000, 0x3000];

    pub(crate) fn new() -> Self {
        let memory = GuestRam::from_ranges(&[(GuestAddress(0), Self::BYTES as usize)]).expect("64 KiB");
        Self { memory, available: Cell::new(0) }
    }

    /// Writes a chain from descriptor 0 on and makes it available.
    pub(crate) fn offer(&self, descriptors: &[Descriptor]) {
        self.table(Self::RING[0], descriptors);
        let at = Self::RING[1] + 4 + 2 * u64::from(self.available.get() % Self::SIZE);
        self.put(at, 0_u16);
        self.set_available(self.available.get().wrapping_add(1));
    }

    /// Writes descriptor `slot` and makes it available.
    pub(crate) fn offer_at(&self, slot: u16, descriptor: Descriptor) {
        self.table(Self::RING[0] + 16 * u64::from(slot), &[descriptor]);
        let at = Self::RING[1] + 4 + 2 * u64::from(self.available.get() % Self::SIZE);
        self.put(at, slot);
        self.set_available(self.available.get().wrapping_add(1));
    }

    pub(crate) fn table(&self, at: u64, descriptors: &[Descriptor]) {
        for (slot, (address, length, flags, next)) in (0..).zip(descriptors) {
            let at = at + 16 * slot;
            self.put(at, *address);
            self.put(at + 8, *length);
            self.put(at + 12, *flags);
            self.put(at + 14, *next);
        }
    }

    pub(crate) fn set_heads(&self, heads: &[u16]) {
        for (slot, head) in (0..).zip(heads) {
            self.put(Self::RING[1] + 4 + 2 * slot, *head);
        }
    }

    pub(crate) fn set_available(&self, index: u16) {
        self.available.set(index);
        self.put(Self::RING[1] + 2, index);
    }

    /// The used index.
    pub(crate) fn used(&self) -> u16 {
        self.get(Self::RING[2] + 2)
    }

    /// The length that used element `slot` names.
    pub(crate) fn used_length(&self, slot: u16) -> u32 {
        self.get(Self::RING[2] + 4 + 8 * u64::from(slot % Self::SIZE) + 4)
    }

    pub(crate) fn put<T: vm_memory::ByteValued>(&self, at: u64, value: T) {
        self.memory.write_obj(value, GuestAddress(at)).expect("in RAM");
    }

    pub(crate) fn get<T: vm_memory::ByteValued>(&self, at: u64) -> T {
        self.memory.read_obj(GuestAddress(at)).expect("in RAM")
    }
}
