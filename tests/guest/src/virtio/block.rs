//! The block driver (virtio 1.3, 5.2): several requests under way at once, in up to four queues, so that reading ahead hides the
//! device's latency.

use core::cell::UnsafeCell;
use core::fmt;
use core::mem::MaybeUninit;

use crate::interrupts::{DISKS, Source};
use crate::pci::Device;

use super::queue::{FEATURE_EVENT_INDEX, FEATURE_INDIRECT, Queue};
use super::transport::{Transport, TransportError};

/// Bytes of a block: the unit in which the guest's commands count.
pub const BLOCK: usize = 4096;
/// Bytes that one request moves at most.
pub const CHUNK: usize = 256 << 10;
const SECTOR: u64 = 512;
/// Requests under way while reading in sequence.
const DEPTH: usize = 4;
const _: () = assert!(DEPTH <= Queue::REQUESTS);

const FEATURE_READ_ONLY: u64 = 1 << 5;
const FEATURE_FLUSH: u64 = 1 << 9;
const FEATURE_MQ: u64 = 1 << 12;
const FEATURE_DISCARD: u64 = 1 << 13;
const FEATURE_WRITE_ZEROES: u64 = 1 << 14;
/// Queues that are used of one disk.
const QUEUES: usize = 4;

/// Where a disk's buffers lie. The device writes them while a request is under way, so they are touched by address only.
#[repr(C, align(4096))]
struct Buffers {
    chunks: UnsafeCell<[MaybeUninit<[u8; CHUNK]>; DEPTH]>,
    blocks: UnsafeCell<[MaybeUninit<[u8; BLOCK]>; Queue::REQUESTS]>,
    heads: UnsafeCell<[Head; Queue::REQUESTS]>,
    status: UnsafeCell<[u8; Queue::REQUESTS]>,
}

// SAFETY: one processor, one thread: the driver below is the only one to touch them, by the rules of `Disk`.
unsafe impl Sync for Buffers {}

#[repr(C)]
#[derive(Clone, Copy)]
struct Head {
    kind: u32,
    reserved: u32,
    sector: u64,
}

#[derive(Clone, Copy)]
#[repr(u32)]
enum Kind {
    Read = 0,
    Write = 1,
    Flush = 4,
    GetId = 8,
    Discard = 11,
    WriteZeroes = 13,
}

/// How a disk's rings are used.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Rings {
    /// With all that the device offers.
    Full,
    /// One queue, without indirect descriptors and event indices.
    Simple,
}

/// A disk.
pub struct Disk {
    transport: Transport,
    source: Source,
    queues: &'static [Queue],
    /// Length in bytes.
    pub length: u64,
}

/// Why a request failed.
#[derive(Clone, Copy)]
pub enum DiskError {
    /// There is no disk with this number.
    NoDisk(usize),
    /// It would not start.
    Transport(TransportError),
    /// The device said so: 1 is an I/O error, 2 an unsupported request.
    Status(u8),
    /// Beyond the end.
    Range,
    /// For a disk that must not be written.
    ReadOnly,
}

static RINGS: [[Queue; QUEUES]; DISKS] = [const { [const { Queue::new() }; QUEUES] }; DISKS];
#[unsafe(link_section = ".noinit")]
static BUFFERS: Buffers = Buffers {
    chunks: UnsafeCell::new([const { MaybeUninit::uninit() }; DEPTH]),
    blocks: UnsafeCell::new([const { MaybeUninit::uninit() }; Queue::REQUESTS]),
    heads: UnsafeCell::new([Head { kind: 0, reserved: 0, sector: 0 }; Queue::REQUESTS]),
    status: UnsafeCell::new([0; Queue::REQUESTS]),
};

impl Disk {
    /// Starts disk `number`, counted in the order of the slots. Each at most once, or again after [`stop`](Self::stop).
    pub fn start(ecam: u64, number: usize, rings: Rings) -> Result<Self, DiskError> {
        let device = Device::find(ecam, 0x1af4, 0x1042).take(DISKS).nth(number).ok_or(DiskError::NoDisk(number))?;
        let (source, all) = (Source::Disk(number as u8), &RINGS[number]);
        let wanted = FEATURE_READ_ONLY | FEATURE_FLUSH | FEATURE_DISCARD | FEATURE_WRITE_ZEROES;
        let transport = match rings {
            Rings::Simple => Transport::start(device, wanted, source, &[&all[0]])?,
            Rings::Full => {
                let wanted = wanted | FEATURE_MQ | FEATURE_INDIRECT | FEATURE_EVENT_INDEX;
                Transport::start(device, wanted, source, &all.each_ref())?
            }
        };
        let mut disk = Self { queues: &all[..transport.queues], transport, source, length: 0 };
        disk.measure();
        Ok(disk)
    }

    /// How many there are.
    pub fn count(ecam: u64) -> usize {
        Device::find(ecam, 0x1af4, 0x1042).count()
    }

    /// Resets disk `number`: from then on it touches no memory.
    pub fn stop(ecam: u64, number: usize) -> Result<(), DiskError> {
        let device = Device::find(ecam, 0x1af4, 0x1042).nth(number).ok_or(DiskError::NoDisk(number))?;
        Ok(Transport::stop(device)?)
    }

    /// Looks how large it is now.
    pub fn measure(&mut self) -> u64 {
        let low = u64::from(self.transport.configuration.read32(0));
        let high = u64::from(self.transport.configuration.read32(4));
        self.length = (low | high << 32) * SECTOR;
        self.length
    }

    /// Sleeps until the device says something: of a request, or of its configuration. Not if it did so since the last time: whoever
    /// sleeps has looked before it, and may have looked too early.
    pub fn sleep(&self) {
        self.source.sleep();
        self.source.take();
    }

    /// Queues in use.
    pub fn queues(&self) -> usize {
        self.queues.len()
    }

    /// Whole blocks on it.
    pub fn blocks(&self) -> u64 {
        self.length / BLOCK as u64
    }

    /// Reads a block.
    pub fn read(&self, block: u64, into: &mut [u8; BLOCK]) -> Result<(), DiskError> {
        self.check(block)?;
        self.submit(0, Kind::Read, block * BLOCK as u64, Some((chunk_address(0), BLOCK as u32)));
        self.kick();
        self.wait_for_all(1)?;
        // SAFETY: the request in slot 0 is finished, so the device is done with the chunk; nobody else refers to it.
        into.copy_from_slice(unsafe { &chunk(0)[..BLOCK] });
        Ok(())
    }

    /// Writes a block.
    pub fn write(&self, block: u64, from: &[u8; BLOCK]) -> Result<(), DiskError> {
        self.check(block)?;
        if self.transport.features & FEATURE_READ_ONLY != 0 {
            return Err(DiskError::ReadOnly);
        }
        // SAFETY: no request is under way (each method waits for its own), so the chunk is ours.
        unsafe { chunk(0)[..BLOCK].copy_from_slice(from) };
        self.submit(0, Kind::Write, block * BLOCK as u64, Some((chunk_address(0), BLOCK as u32)));
        self.kick();
        self.wait_for_all(1)
    }

    /// The device's serial number: 20 bytes, padded with zeros.
    pub fn serial(&self) -> Result<[u8; 20], DiskError> {
        self.submit(0, Kind::GetId, 0, Some((chunk_address(0), 20)));
        self.kick();
        self.wait_for_all(1)?;
        let mut serial = [0; 20];
        // SAFETY: the request in slot 0 is finished; nobody else refers to the chunk.
        serial.copy_from_slice(unsafe { &chunk(0)[..20] });
        Ok(serial)
    }

    /// Has the device forget `count` blocks from `block` on.
    pub fn discard(&self, block: u64, count: u64) -> Result<(), DiskError> {
        self.unmap(Kind::Discard, FEATURE_DISCARD, block, count, 0)
    }

    /// Makes `count` blocks from `block` on zeroes, or a hole that reads so.
    pub fn zero(&self, block: u64, count: u64, may_unmap: bool) -> Result<(), DiskError> {
        self.unmap(Kind::WriteZeroes, FEATURE_WRITE_ZEROES, block, count, u32::from(may_unmap))
    }

    fn unmap(&self, kind: Kind, feature: u64, block: u64, count: u64, flags: u32) -> Result<(), DiskError> {
        if self.transport.features & feature == 0 {
            return Err(DiskError::Status(2));
        }
        let per_block = BLOCK as u64 / SECTOR;
        // SAFETY: no request is under way, so the chunk is ours.
        let range = unsafe { &mut chunk(0)[..16] };
        range[..8].copy_from_slice(&(block * per_block).to_le_bytes());
        range[8..12].copy_from_slice(&((count * per_block) as u32).to_le_bytes());
        range[12..].copy_from_slice(&flags.to_le_bytes());
        self.submit(0, kind, 0, Some((chunk_address(0), 16)));
        self.kick();
        self.wait_for_all(1)
    }

    /// Begins to read or write a block through the buffer of `slot`, which is not under way, without telling the device: that is
    /// [`Disk::kick`].
    pub fn begin(&self, slot: usize, write: bool, block: u64) -> Result<(), DiskError> {
        self.check(block)?;
        let kind = if write { Kind::Write } else { Kind::Read };
        self.submit(slot, kind, block * BLOCK as u64, Some((block_address(slot), BLOCK as u32)));
        Ok(())
    }

    /// Tells the device of all that was begun, as far as it wants to be told.
    pub fn kick(&self) {
        for (number, queue) in (0..).zip(self.queues) {
            if queue.wants_doorbell() {
                self.transport.notify(number);
            }
        }
    }

    /// Sleeps until a request that was begun is finished: its slot, free again.
    pub fn finish(&self) -> Result<usize, DiskError> {
        let slot = self.wait();
        status(slot).map(|()| slot)
    }

    /// A slot whose request is finished already.
    pub fn finished(&self) -> Option<Result<usize, DiskError>> {
        let slot = self.queues.iter().find_map(Queue::finished)?;
        Some(status(slot).map(|()| slot))
    }

    /// Returns once everything written is durable. A device without the feature writes through.
    pub fn flush(&self) -> Result<(), DiskError> {
        if self.transport.features & FEATURE_FLUSH == 0 {
            return Ok(());
        }
        self.submit(0, Kind::Flush, 0, None);
        self.kick();
        self.wait_for_all(1)
    }

    /// Calls `consume` with the whole disk's bytes in order, in pieces, reading ahead.
    pub fn read_all(&self, mut consume: impl FnMut(&[u8])) -> Result<(), DiskError> {
        let pieces = self.length.div_ceil(CHUNK as u64);
        let length = |piece: u64| (self.length - piece * CHUNK as u64).min(CHUNK as u64) as usize;
        let slot = |piece: u64| (piece % DEPTH as u64) as usize;
        let mut finished = [false; DEPTH];
        let mut failure = None;
        for piece in 0..pieces.min(DEPTH as u64) {
            self.submit_piece(slot(piece), piece, length(piece));
        }
        for piece in 0..pieces {
            while !finished[slot(piece)] {
                finished[self.wait()] = true;
            }
            finished[slot(piece)] = false;
            failure = failure.or(status(slot(piece)).err());
            // SAFETY: this piece's request is finished, and its slot is not submitted again before `consume` returned.
            consume(unsafe { &chunk(slot(piece))[..length(piece)] });
            let next = piece + DEPTH as u64;
            if next < pieces {
                self.submit_piece(slot(next), next, length(next));
            }
        }
        failure.map_or(Ok(()), Err)
    }

    fn submit_piece(&self, slot: usize, piece: u64, length: usize) {
        self.submit(slot, Kind::Read, piece * CHUNK as u64, Some((chunk_address(slot), length as u32)));
        self.kick();
    }

    fn check(&self, block: u64) -> Result<(), DiskError> {
        if block < self.blocks() { Ok(()) } else { Err(DiskError::Range) }
    }

    /// Puts a request into a queue. `slot` must not be under way, and its buffer belongs to the device until it is finished.
    fn submit(&self, slot: usize, kind: Kind, offset: u64, data: Option<(u64, u32)>) {
        let head = BUFFERS.heads.get().cast::<Head>().wrapping_add(slot);
        let status = BUFFERS.status.get().cast::<u8>().wrapping_add(slot);
        // SAFETY: the slot is not under way, so neither is the device's; both lie within their arrays, as slots are below REQUESTS.
        unsafe {
            head.write_volatile(Head { kind: kind as u32, reserved: 0, sector: offset / SECTOR });
            status.write_volatile(0xff);
        }
        let head = (head as u64, size_of::<Head>() as u32);
        let queue = &self.queues[slot % self.queues.len()];
        queue.offer(slot, head, data, matches!(kind, Kind::Read | Kind::GetId), (status as u64, 1));
    }

    /// Sleeps until some request is finished, and says which slot's.
    fn wait(&self) -> usize {
        loop {
            self.source.take();
            if let Some(slot) = self.queues.iter().find_map(Queue::finished) {
                return slot;
            }
            if self.queues.iter().all(Queue::listen) {
                self.source.sleep();
            }
        }
    }

    fn wait_for_all(&self, requests: usize) -> Result<(), DiskError> {
        let mut result = Ok(());
        for _ in 0..requests {
            result = result.and(status(self.wait()));
        }
        result
    }
}

impl From<TransportError> for DiskError {
    fn from(error: TransportError) -> Self {
        Self::Transport(error)
    }
}

impl fmt::Display for DiskError {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Self::NoDisk(number) => write!(f, "there is no disk {number}"),
            Self::Transport(error) => error.fmt(f),
            Self::Status(status) => write!(f, "the disk answered {status}"),
            Self::Range => write!(f, "beyond the end of the disk"),
            Self::ReadOnly => write!(f, "the disk is read-only"),
        }
    }
}

fn status(slot: usize) -> Result<(), DiskError> {
    let at = BUFFERS.status.get().cast::<u8>().wrapping_add(slot);
    // SAFETY: within the array, as slots are below DEPTH; volatile, because the device wrote it.
    match unsafe { at.read_volatile() } {
        0 => Ok(()),
        other => Err(DiskError::Status(other)),
    }
}

fn chunk_address(slot: usize) -> u64 {
    BUFFERS.chunks.get().cast::<[u8; CHUNK]>().wrapping_add(slot) as u64
}

/// The buffer of a slot for [`Disk::begin`]: one block.
fn block_address(slot: usize) -> u64 {
    BUFFERS.blocks.get().cast::<[u8; BLOCK]>().wrapping_add(slot) as u64
}

/// Fills the buffer of `slot`, which must not be under way.
pub fn fill(slot: usize, bytes: &[u8; BLOCK]) {
    // SAFETY: within the array, and nobody else refers to it: the device does not, by the caller's word, and this program only here.
    unsafe { core::ptr::copy_nonoverlapping(bytes.as_ptr(), block_address(slot) as *mut u8, BLOCK) };
}

/// # Safety
/// The slot must be below DEPTH and not under way while the reference lives, and there must be no other reference to it.
unsafe fn chunk(slot: usize) -> &'static mut [u8] {
    // SAFETY: within the array; any bytes are valid; unaliased by the caller's word.
    unsafe { core::slice::from_raw_parts_mut(chunk_address(slot) as *mut u8, CHUNK) }
}
