//! The balloon driver (virtio 1.3, 5.5): gives one page away and looks at it.

use core::cell::UnsafeCell;
use core::sync::atomic::{AtomicU32, Ordering};

use crate::interrupts::Source;
use crate::pci::Device;

use super::queue::Queue;
use super::transport::{Transport, TransportError};

const PAGE: usize = 4096;
const REPORTING: u64 = 1 << 5;
const REPORTING_QUEUE: u16 = 2;

#[repr(C, align(4096))]
struct Page(UnsafeCell<[u8; PAGE]>);

// SAFETY: one processor, one thread: only the driver below touches it, byte by byte and volatilely.
unsafe impl Sync for Page {}

static INFLATE: Queue = Queue::new();
static DEFLATE: Queue = Queue::new();
static REPORT: Queue = Queue::new();
static PAGE_GIVEN: Page = Page(UnsafeCell::new([0; PAGE]));
static NUMBER: AtomicU32 = AtomicU32::new(0);

/// The balloon.
pub struct Balloon {
    transport: Transport,
}

impl Balloon {
    /// Starts it; nothing where there is none. At most once.
    pub fn start(ecam: u64) -> Option<Result<Self, TransportError>> {
        let device = Device::find(ecam, 0x1af4, 0x1045).next()?;
        let started = Transport::start(device, REPORTING, Source::Device, &[&INFLATE, &DEFLATE, &REPORT]);
        Some(started.map(|transport| Self { transport }))
    }

    /// Pages that the host wants in it.
    pub fn target(&self) -> u32 {
        self.transport.configuration.read32(0)
    }

    /// Writes to a page and puts it into the balloon; gives how many of its bytes are still there.
    pub fn inflate(&self) -> usize {
        fill();
        NUMBER.store((PAGE_GIVEN.0.get() as usize / PAGE) as u32, Ordering::Relaxed);
        self.hand_over(&INFLATE, 0, (NUMBER.as_ptr() as u64, 4), false)
    }

    /// Writes to a page and reports it as free; gives how many of its bytes are still there.
    pub fn report(&self) -> usize {
        fill();
        self.hand_over(&REPORT, REPORTING_QUEUE, (PAGE_GIVEN.0.get() as u64, PAGE as u32), true)
    }

    fn hand_over(&self, queue: &Queue, number: u16, piece: (u64, u32), device_writes: bool) -> usize {
        queue.offer_one(0, piece, device_writes);
        self.transport.notify(number);
        while queue.finished().is_none() {
            Source::Device.sleep();
            Source::Device.take();
        }
        (0..PAGE).filter(|at| byte(*at) != 0).count()
    }
}

fn fill() {
    for at in 0..PAGE {
        // SAFETY: within the page, and nothing is under way.
        unsafe { PAGE_GIVEN.0.get().cast::<u8>().add(at).write_volatile(0xa5) };
    }
}

fn byte(at: usize) -> u8 {
    // SAFETY: callers keep within the page; volatile, because the host changed it.
    unsafe { PAGE_GIVEN.0.get().cast::<u8>().add(at).read_volatile() }
}
