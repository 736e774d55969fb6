//! A split virtqueue (virtio 1.3, 2.7) that hands out fixed triples of descriptors: a request's head, data and status.

use core::sync::atomic::{AtomicU16, AtomicU32, AtomicU64, Ordering, fence};

const SIZE: usize = 32;

/// Descriptor flags.
const NEXT: u64 = 1;
const WRITE: u64 = 2;

/// The three rings. The device reads and writes them at any time, so all fields are atomics.
#[repr(C, align(4096))]
pub struct Queue {
    /// Address, and {length u32, flags u16, next u16} as one number.
    descriptors: [[AtomicU64; 2]; SIZE],
    available_flags: AtomicU16,
    available_index: AtomicU16,
    available: [AtomicU16; SIZE],
    _used_event: AtomicU16,
    _gap: [u8; 62],
    used_flags: AtomicU16,
    used_index: AtomicU16,
    used: [[AtomicU32; 2]; SIZE],
    _available_event: AtomicU16,
    /// Ours: how far the used ring was read.
    seen: AtomicU16,
}

/// A piece of memory for one descriptor: {physical address, length in bytes}.
pub type Piece = (u64, u32);

impl Queue {
    /// Descriptors, and entries in each ring.
    pub const SIZE: u16 = SIZE as u16;
    /// Requests that can be under way at once.
    pub const REQUESTS: usize = SIZE / 3;

    /// An empty queue.
    pub const fn new() -> Self {
        Self {
            descriptors: [const { [const { AtomicU64::new(0) }; 2] }; SIZE],
            available_flags: AtomicU16::new(0),
            available_index: AtomicU16::new(0),
            available: [const { AtomicU16::new(0) }; SIZE],
            _used_event: AtomicU16::new(0),
            _gap: [0; 62],
            used_flags: AtomicU16::new(0),
            used_index: AtomicU16::new(0),
            used: [const { [const { AtomicU32::new(0) }; 2] }; SIZE],
            _available_event: AtomicU16::new(0),
            seen: AtomicU16::new(0),
        }
    }

    /// Physical address of the descriptor table.
    pub fn descriptors(&self) -> u64 {
        &raw const self.descriptors as u64
    }

    /// Physical address of the driver area.
    pub fn available(&self) -> u64 {
        &raw const self.available_flags as u64
    }

    /// Physical address of the device area.
    pub fn used(&self) -> u64 {
        &raw const self.used_flags as u64
    }

    /// Offers request `slot` (below [`Queue::REQUESTS`], not under way): `head` to be read by the device, `data` to be read by it or, with
    /// `device_writes`, written, and `status` to be written.
    pub fn offer(&self, slot: usize, head: Piece, data: Option<Piece>, device_writes: bool, status: Piece) {
        let first = slot * 3;
        let after_head = if data.is_some() { first + 1 } else { first + 2 };
        self.describe(first, head, NEXT, after_head);
        if let Some(data) = data {
            self.describe(first + 1, data, NEXT | if device_writes { WRITE } else { 0 }, first + 2);
        }
        self.describe(first + 2, status, WRITE, 0);

        let index = self.available_index.load(Ordering::Relaxed);
        self.available[usize::from(index) % SIZE].store(first as u16, Ordering::Relaxed);
        self.available_index.store(index.wrapping_add(1), Ordering::Release);
        fence(Ordering::SeqCst);
    }

    /// The slot of a request that the device finished.
    pub fn finished(&self) -> Option<usize> {
        let seen = self.seen.load(Ordering::Relaxed);
        if self.used_index.load(Ordering::Acquire) == seen {
            return None;
        }
        let first = self.used[usize::from(seen) % SIZE][0].load(Ordering::Relaxed);
        self.seen.store(seen.wrapping_add(1), Ordering::Relaxed);
        Some(first as usize / 3)
    }

    fn describe(&self, n: usize, (address, length): Piece, flags: u64, next: usize) {
        self.descriptors[n][0].store(address, Ordering::Relaxed);
        self.descriptors[n][1].store(u64::from(length) | flags << 32 | (next as u64) << 48, Ordering::Relaxed);
    }
}

const _: () = {
    assert!(core::mem::offset_of!(Queue, available_flags) == 16 * SIZE);
    assert!(core::mem::offset_of!(Queue, used_flags).is_multiple_of(4));
    assert!(core::mem::offset_of!(Queue, used) == core::mem::offset_of!(Queue, used_flags) + 4);
};
