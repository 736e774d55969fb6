//! The console driver (virtio 1.3, 5.3): one port.

use core::cell::UnsafeCell;

use crate::interrupts::Source;
use crate::pci::Device;

use super::queue::Queue;
use super::transport::{Transport, TransportError};

/// The most bytes that are written or read at once.
pub const LONGEST: usize = 128;

/// Bytes of each buffer of [`Console::pour`].
const POURED: usize = 16384;

#[repr(C, align(64))]
struct Buffer<const LENGTH: usize>(UnsafeCell<[u8; LENGTH]>);

// SAFETY: one processor, one thread: only the driver below touches them, and only while the device does not.
unsafe impl<const LENGTH: usize> Sync for Buffer<LENGTH> {}

static RECEIVE: Queue = Queue::new();
static TRANSMIT: Queue = Queue::new();
static INPUT: Buffer<LONGEST> = Buffer(UnsafeCell::new([0; LONGEST]));
static OUTPUT: Buffer<LONGEST> = Buffer(UnsafeCell::new([0; LONGEST]));
static POOL: Buffer<POURED> = Buffer(UnsafeCell::new([0; POURED]));

/// The console.
pub struct Console {
    transport: Transport,
}

impl Console {
    /// Starts it; nothing where there is none. At most once.
    pub fn start(ecam: u64) -> Option<Result<Self, TransportError>> {
        let device = Device::find(ecam, 0x1af4, 0x1043).next()?;
        let started = Transport::start(device, 0, Source::Device, &[&RECEIVE, &TRANSMIT]);
        Some(started.map(|transport| Self { transport }))
    }

    /// Writes `bytes`, at most [`LONGEST`]; returns once the other end has them.
    pub fn write(&self, bytes: &[u8]) {
        let length = bytes.len().min(LONGEST);
        // SAFETY: nothing is being sent (this waits for its own), so the buffer is ours; the length keeps within both.
        unsafe { core::ptr::copy_nonoverlapping(bytes.as_ptr(), OUTPUT.0.get().cast(), length) };
        TRANSMIT.offer_one(0, (OUTPUT.0.get() as u64, length as u32), false);
        self.transport.notify(1);
        while TRANSMIT.finished().is_none() {
            Source::Device.sleep();
            Source::Device.take();
        }
    }

    /// Gives the other end as many dots as buffers may be under way, and then `last`, at most [`LONGEST`]; waits for nothing.
    pub fn pour(&self, last: &[u8]) {
        let length = last.len().min(LONGEST);
        // SAFETY: nothing is being sent (`write` waits for its own), so both buffers are ours; the lengths keep within them.
        unsafe {
            core::ptr::write_bytes(POOL.0.get().cast::<u8>(), b'.', POURED);
            core::ptr::copy_nonoverlapping(last.as_ptr(), OUTPUT.0.get().cast(), length);
        }
        for slot in 1..Queue::REQUESTS {
            TRANSMIT.offer_one(slot, (POOL.0.get() as u64, POURED as u32), false);
        }
        TRANSMIT.offer_one(0, (OUTPUT.0.get() as u64, length as u32), false);
        self.transport.notify(1);
    }

    /// Waits for some bytes; gives how many.
    pub fn read(&self, into: &mut [u8; LONGEST]) -> usize {
        RECEIVE.offer_one(0, (INPUT.0.get() as u64, LONGEST as u32), true);
        self.transport.notify(0);
        let length = loop {
            Source::Device.take();
            if let Some((_, length)) = RECEIVE.finished_with_length() {
                break length;
            }
            Source::Device.sleep();
        };
        // SAFETY: the device is done with the buffer, and nobody else refers to it.
        *into = unsafe { INPUT.0.get().read_volatile() };
        (length as usize).min(LONGEST)
    }
}
