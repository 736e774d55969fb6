//! A split virtqueue (virtio 1.3, 2.7) whose requests have fixed slots: a head, data and a status each, in three descriptors of the table
//! or, where that was agreed on, in a table of their own.

use core::sync::atomic::{AtomicU16, AtomicU32, AtomicU64, Ordering, fence};

const SIZE: usize = 128;
const REQUESTS: usize = 32;

/// Descriptor flags.
const NEXT: u64 = 1;
const WRITE: u64 = 2;
const INDIRECT: u64 = 4;

/// VIRTIO_F_INDIRECT_DESC.
pub const FEATURE_INDIRECT: u64 = 1 << 28;
/// VIRTIO_F_EVENT_IDX.
pub const FEATURE_EVENT_INDEX: u64 = 1 << 29;
const USED_NO_NOTIFY: u16 = 1;

type Descriptor = [AtomicU64; 2];

/// The three rings. The device reads and writes them at any time, so all fields are atomics.
#[repr(C, align(4096))]
pub struct Queue {
    /// Address, and {length u32, flags u16, next u16} as one number.
    descriptors: [Descriptor; SIZE],
    available_flags: AtomicU16,
    available_index: AtomicU16,
    available: [AtomicU16; SIZE],
    used_event: AtomicU16,
    _gap: [u8; 58],
    used_flags: AtomicU16,
    used_index: AtomicU16,
    used: [[AtomicU32; 2]; SIZE],
    available_event: AtomicU16,
    _second_gap: [u8; 10],
    /// Tables of the requests, where indirect descriptors were agreed on.
    tables: [[Descriptor; 3]; REQUESTS],
    /// Ours: how far the used ring was read, what was agreed on, and the last index of which the device was told.
    seen: AtomicU16,
    told: AtomicU16,
    features: AtomicU64,
}

/// A piece of memory for one descriptor: {physical address, length in bytes}.
pub type Piece = (u64, u32);

impl Queue {
    /// Descriptors, and entries in each ring.
    pub const SIZE: u16 = SIZE as u16;
    /// Requests that can be under way at once.
    pub const REQUESTS: usize = REQUESTS;

    /// An empty queue.
    pub const fn new() -> Self {
        Self {
            descriptors: [const { [const { AtomicU64::new(0) }; 2] }; SIZE],
            available_flags: AtomicU16::new(0),
            available_index: AtomicU16::new(0),
            available: [const { AtomicU16::new(0) }; SIZE],
            used_event: AtomicU16::new(0),
            _gap: [0; 58],
            used_flags: AtomicU16::new(0),
            used_index: AtomicU16::new(0),
            used: [const { [const { AtomicU32::new(0) }; 2] }; SIZE],
            available_event: AtomicU16::new(0),
            _second_gap: [0; 10],
            tables: [const { [const { [const { AtomicU64::new(0) }; 2] }; 3] }; REQUESTS],
            seen: AtomicU16::new(0),
            told: AtomicU16::new(0),
            features: AtomicU64::new(0),
        }
    }

    /// To be used by the rules of `features`, from its beginning; no device uses it yet.
    pub fn begin(&self, features: u64) {
        let ours = [&self.available_flags, &self.available_index, &self.used_event, &self.seen, &self.told];
        let theirs = [&self.used_flags, &self.used_index, &self.available_event];
        ours.into_iter().chain(theirs).for_each(|field| field.store(0, Ordering::Relaxed));
        self.features.store(features, Ordering::Relaxed);
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
        let (table, first) = match self.has(FEATURE_INDIRECT) {
            true => (self.tables[slot].as_slice(), 0),
            false => (self.direct(slot), slot * 3),
        };
        describe(&table[0], head, NEXT, first + if data.is_some() { 1 } else { 2 });
        if let Some(data) = data {
            describe(&table[1], data, NEXT | if device_writes { WRITE } else { 0 }, first + 2);
        }
        describe(&table[2], status, WRITE, 0);
        if self.has(FEATURE_INDIRECT) {
            describe(&self.descriptors[slot * 3], (table.as_ptr() as u64, 48), INDIRECT, 0);
        }
        self.publish(slot * 3);
    }

    /// Offers one buffer as request `slot`, to be read by the device or, with `device_writes`, written.
    pub fn offer_one(&self, slot: usize, data: Piece, device_writes: bool) {
        describe(&self.descriptors[slot * 3], data, if device_writes { WRITE } else { 0 }, 0);
        self.publish(slot * 3);
    }

    /// Whether the device wants a doorbell for what was offered since this was asked last (2.7.10).
    pub fn wants_doorbell(&self) -> bool {
        let now = self.available_index.load(Ordering::Relaxed);
        let before = self.told.swap(now, Ordering::Relaxed);
        if now == before {
            return false;
        }
        if !self.has(FEATURE_EVENT_INDEX) {
            return self.used_flags.load(Ordering::Relaxed) & USED_NO_NOTIFY == 0;
        }
        let event = self.available_event.load(Ordering::Relaxed);
        now.wrapping_sub(event).wrapping_sub(1) < now.wrapping_sub(before)
    }

    /// Asks for an interrupt at the next finished request; to be called before sleeping. False if there is one already.
    pub fn listen(&self) -> bool {
        let seen = self.seen.load(Ordering::Relaxed);
        self.used_event.store(seen, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        self.used_index.load(Ordering::Acquire) == seen
    }

    /// The slot of a request that the device finished.
    pub fn finished(&self) -> Option<usize> {
        self.finished_with_length().map(|(slot, _)| slot)
    }

    /// The same, and how many bytes the device wrote.
    pub fn finished_with_length(&self) -> Option<(usize, u32)> {
        let seen = self.seen.load(Ordering::Relaxed);
        if self.used_index.load(Ordering::Acquire) == seen {
            return None;
        }
        let [first, length] = &self.used[usize::from(seen) % SIZE];
        self.seen.store(seen.wrapping_add(1), Ordering::Relaxed);
        Some((first.load(Ordering::Relaxed) as usize / 3, length.load(Ordering::Relaxed)))
    }

    fn publish(&self, first: usize) {
        let index = self.available_index.load(Ordering::Relaxed);
        self.available[usize::from(index) % SIZE].store(first as u16, Ordering::Relaxed);
        self.available_index.store(index.wrapping_add(1), Ordering::Release);
        fence(Ordering::SeqCst);
    }

    fn direct(&self, slot: usize) -> &[Descriptor] {
        &self.descriptors[slot * 3..slot * 3 + 3]
    }

    fn has(&self, feature: u64) -> bool {
        self.features.load(Ordering::Relaxed) & feature != 0
    }
}

fn describe(to: &Descriptor, (address, length): Piece, flags: u64, next: usize) {
    to[0].store(address, Ordering::Relaxed);
    to[1].store(u64::from(length) | flags << 32 | (next as u64) << 48, Ordering::Relaxed);
}

const _: () = {
    assert!(REQUESTS * 3 <= SIZE);
    assert!(core::mem::offset_of!(Queue, available_flags) == 16 * SIZE);
    assert!(core::mem::offset_of!(Queue, used_event) == core::mem::offset_of!(Queue, available_flags) + 4 + 2 * SIZE);
    assert!(core::mem::offset_of!(Queue, used_flags).is_multiple_of(4));
    assert!(core::mem::offset_of!(Queue, used) == core::mem::offset_of!(Queue, used_flags) + 4);
    assert!(core::mem::offset_of!(Queue, available_event) == core::mem::offset_of!(Queue, used) + 8 * SIZE);
    assert!(core::mem::offset_of!(Queue, tables).is_multiple_of(16));
};
