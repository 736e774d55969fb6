//! The block driver (virtio 1.3, 5.2): several requests under way at once, so that reading ahead hides the device's latency.

use core::cell::UnsafeCell;
use core::fmt;
use core::mem::MaybeUninit;

use crate::interrupts::{DISKS, Source};
use crate::pci::Device;

use super::queue::Queue;
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

/// Where a disk's buffers lie. The device writes them while a request is under way, so they are touched by address only.
#[repr(C, align(4096))]
struct Buffers {
    chunks: UnsafeCell<[MaybeUninit<[u8; CHUNK]>; DEPTH]>,
    heads: UnsafeCell<[Head; DEPTH]>,
    status: UnsafeCell<[u8; DEPTH]>,
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
}

/// A disk.
pub struct Disk {
    transport: Transport,
    source: Source,
    queue: &'static Queue,
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

static QUEUES: [Queue; DISKS] = [const { Queue::new() }; DISKS];
#[unsafe(link_section = ".noinit")]
static BUFFERS: Buffers = Buffers {
    chunks: UnsafeCell::new([const { MaybeUninit::uninit() }; DEPTH]),
    heads: UnsafeCell::new([Head { kind: 0, reserved: 0, sector: 0 }; DEPTH]),
    status: UnsafeCell::new([0; DEPTH]),
};

impl Disk {
    /// Starts disk `number`, counted in the order of the slots. Each at most once.
    pub fn start(ecam: u64, number: usize) -> Result<Self, DiskError> {
        let device = Device::find(ecam, 0x1af4, 0x1042).take(DISKS).nth(number).ok_or(DiskError::NoDisk(number))?;
        let (source, queue) = (Source::Disk(number as u8), &QUEUES[number]);
        let transport = Transport::start(device, FEATURE_READ_ONLY | FEATURE_FLUSH, source, queue)?;
        let sectors = u64::from(transport.configuration.read32(0)) | u64::from(transport.configuration.read32(4)) << 32;
        Ok(Self { transport, source, queue, length: sectors * SECTOR })
    }

    /// Whole blocks on it.
    pub fn blocks(&self) -> u64 {
        self.length / BLOCK as u64
    }

    /// Reads a block.
    pub fn read(&self, block: u64, into: &mut [u8; BLOCK]) -> Result<(), DiskError> {
        self.check(block)?;
        self.submit(0, Kind::Read, block * BLOCK as u64, BLOCK);
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
        self.submit(0, Kind::Write, block * BLOCK as u64, BLOCK);
        self.wait_for_all(1)
    }

    /// Returns once everything written is durable. A device without the feature writes through.
    pub fn flush(&self) -> Result<(), DiskError> {
        if self.transport.features & FEATURE_FLUSH == 0 {
            return Ok(());
        }
        self.submit(0, Kind::Flush, 0, 0);
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
            self.submit(slot(piece), Kind::Read, piece * CHUNK as u64, length(piece));
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
                self.submit(slot(next), Kind::Read, next * CHUNK as u64, length(next));
            }
        }
        failure.map_or(Ok(()), Err)
    }

    fn check(&self, block: u64) -> Result<(), DiskError> {
        if block < self.blocks() { Ok(()) } else { Err(DiskError::Range) }
    }

    /// Hands a request to the device. `slot` must not be under way, and its chunk belongs to the device until it is finished.
    fn submit(&self, slot: usize, kind: Kind, offset: u64, length: usize) {
        let head = BUFFERS.heads.get().cast::<Head>().wrapping_add(slot);
        let status = BUFFERS.status.get().cast::<u8>().wrapping_add(slot);
        // SAFETY: the slot is not under way, so neither is the device's; both lie within their arrays, as slots are below DEPTH.
        unsafe {
            head.write_volatile(Head { kind: kind as u32, reserved: 0, sector: offset / SECTOR });
            status.write_volatile(0xff);
        }
        let data = (length > 0).then_some((chunk_address(slot), length as u32));
        let head = (head as u64, size_of::<Head>() as u32);
        self.queue.offer(slot, head, data, matches!(kind, Kind::Read), (status as u64, 1));
        self.transport.notify();
    }

    /// Sleeps until some request is finished, and says which slot's.
    fn wait(&self) -> usize {
        loop {
            self.source.take();
            if let Some(slot) = self.queue.finished() {
                return slot;
            }
            self.source.sleep();
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

/// # Safety
/// The slot must be below DEPTH and not under way while the reference lives, and there must be no other reference to it.
unsafe fn chunk(slot: usize) -> &'static mut [u8] {
    // SAFETY: within the array; any bytes are valid; unaliased by the caller's word.
    unsafe { core::slice::from_raw_parts_mut(chunk_address(slot) as *mut u8, CHUNK) }
}
