//! The network driver (virtio 1.3, 5.1): one pair of queues, mergeable buffers, and every offload, so that what comes in goes out as
//! it came.

use core::cell::UnsafeCell;
use core::mem::MaybeUninit;

use crate::interrupts::Source;
use crate::pci::Device;

use super::queue::Queue;
use super::transport::{Transport, TransportError};

/// Bytes of the header before each frame (5.1.6).
const HEADER: usize = 12;
/// `num_buffers` in it.
const BUFFERS_AT: usize = 10;
/// Bytes of one receive buffer, and how many there are: together more than the longest frame.
const BUFFER: usize = 8 << 10;
const BUFFERS: usize = 10;
const _: () = assert!(BUFFERS <= Queue::REQUESTS);
/// The longest frame with its header.
const LONGEST: usize = BUFFER * BUFFERS;

/// VIRTIO_NET_F_: CSUM, GUEST_CSUM, MAC, GUEST_TSO4, GUEST_TSO6, HOST_TSO4, HOST_TSO6, MRG_RXBUF.
const FEATURES: u64 = 1 | 1 << 1 | FEATURE_MAC | 1 << 7 | 1 << 8 | 1 << 11 | 1 << 12 | FEATURE_MERGEABLE;
const FEATURE_MAC: u64 = 1 << 5;
const FEATURE_MERGEABLE: u64 = 1 << 15;

#[repr(C, align(4096))]
struct Buffers {
    receive: UnsafeCell<[MaybeUninit<[u8; BUFFER]>; BUFFERS]>,
    transmit: UnsafeCell<MaybeUninit<[u8; LONGEST]>>,
}

// SAFETY: one processor, one thread: the driver below is the only one to touch them, by the rules of `Net`.
unsafe impl Sync for Buffers {}

static RECEIVE: Queue = Queue::new();
static TRANSMIT: Queue = Queue::new();
#[unsafe(link_section = ".noinit")]
static MEMORY: Buffers = Buffers {
    receive: UnsafeCell::new([const { MaybeUninit::uninit() }; BUFFERS]),
    transmit: UnsafeCell::new(MaybeUninit::uninit()),
};

/// The card.
pub struct Net {
    transport: Transport,
}

impl Net {
    /// Starts it with all its receive buffers; nothing where there is none. At most once.
    pub fn start(ecam: u64) -> Option<Result<Self, TransportError>> {
        let device = Device::find(ecam, 0x1af4, 0x1041).next()?;
        let transport = match Transport::start(device, FEATURES, Source::Device, &[&RECEIVE, &TRANSMIT]) {
            Ok(transport) if transport.features & FEATURE_MERGEABLE != 0 => transport,
            Ok(transport) => return Some(Err(TransportError::Features(transport.features))),
            Err(error) => return Some(Err(error)),
        };
        let net = Self { transport };
        (0..BUFFERS).for_each(|slot| net.give(slot));
        Some(Ok(net))
    }

    /// Its MAC address.
    pub fn mac(&self) -> [u8; 6] {
        core::array::from_fn(|at| self.transport.configuration.read8(at as u64))
    }

    /// Waits for a frame and sends it back to where it came from; gives its length.
    pub fn echo(&self) -> usize {
        let length = self.receive();
        // SAFETY: nothing is being transmitted (this waits for its own), so the buffer is ours; `receive` filled so much of it.
        let frame = unsafe { core::slice::from_raw_parts_mut(MEMORY.transmit.get().cast::<u8>(), length) };
        if length < HEADER + 14 {
            return length.saturating_sub(HEADER);
        }
        let (to, from) = frame[HEADER..HEADER + 12].split_at_mut(6);
        to.swap_with_slice(from);
        frame[BUFFERS_AT..HEADER].fill(0);
        TRANSMIT.offer_one(0, (MEMORY.transmit.get() as u64, length as u32), false);
        self.transport.notify(1);
        while TRANSMIT.finished().is_none() {
            Source::Device.sleep();
            Source::Device.take();
        }
        length - HEADER
    }

    /// Waits for a frame and puts it together in the transmit buffer, with its header; gives the length of both.
    fn receive(&self) -> usize {
        let (mut filled, mut buffers) = (0, 1);
        while buffers > 0 {
            let (slot, length) = self.wait();
            let length = (length as usize).min(BUFFER).min(LONGEST - filled);
            let from = MEMORY.receive.get().cast::<u8>().wrapping_add(slot * BUFFER);
            // SAFETY: the device is done with the receive buffer, and nothing is being transmitted, so both are ours; the length
            // keeps within both.
            unsafe { core::ptr::copy_nonoverlapping(from, MEMORY.transmit.get().cast::<u8>().add(filled), length) };
            if filled == 0 && length >= HEADER {
                // SAFETY: within the buffer; written just now.
                let count = unsafe { from.add(BUFFERS_AT).cast::<u16>().read_unaligned() };
                buffers = usize::from(count).clamp(1, BUFFERS);
            }
            filled += length;
            buffers -= 1;
            self.give(slot);
        }
        filled
    }

    fn wait(&self) -> (usize, u32) {
        loop {
            Source::Device.take();
            if let Some(found) = RECEIVE.finished_with_length() {
                return found;
            }
            Source::Device.sleep();
        }
    }

    fn give(&self, slot: usize) {
        let at = MEMORY.receive.get() as u64 + (slot * BUFFER) as u64;
        RECEIVE.offer_one(slot, (at, BUFFER as u32), true);
        self.transport.notify(0);
    }
}
