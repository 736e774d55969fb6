//! The entropy driver (virtio 1.3, 5.4).

use core::cell::UnsafeCell;

use crate::interrupts::Source;
use crate::pci::Device;

use super::queue::Queue;
use super::transport::{Transport, TransportError};

const BYTES: usize = 32;

#[repr(C, align(64))]
struct Buffer(UnsafeCell<[u8; BYTES]>);

// SAFETY: one processor, one thread: only `read` touches it, and only while the device does not.
unsafe impl Sync for Buffer {}

static QUEUE: Queue = Queue::new();
static BUFFER: Buffer = Buffer(UnsafeCell::new([0; BYTES]));

/// The source.
pub struct Rng {
    transport: Transport,
}

impl Rng {
    /// Starts it; nothing where there is none. At most once.
    pub fn start(ecam: u64) -> Option<Result<Self, TransportError>> {
        let device = Device::find(ecam, 0x1af4, 0x1044).next()?;
        Some(Transport::start(device, 0, Source::Device, &[&QUEUE]).map(|transport| Self { transport }))
    }

    /// Random bytes, as many as the device gives.
    pub fn read(&self, into: &mut [u8; BYTES]) -> usize {
        QUEUE.offer_one(0, (BUFFER.0.get() as u64, BYTES as u32), true);
        self.transport.notify(0);
        let length = loop {
            Source::Device.take();
            if let Some((_, length)) = QUEUE.finished_with_length() {
                break length;
            }
            Source::Device.sleep();
        };
        // SAFETY: the device is done with the buffer, and nobody else refers to it.
        *into = unsafe { BUFFER.0.get().read_volatile() };
        (length as usize).min(BYTES)
    }
}
