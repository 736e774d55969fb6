//! The way from a device back to its driver: interrupts, and the notice that the device gave up.

use crate::machine::pci::MsixTable;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU16, AtomicU64, Ordering};

const NO_VECTOR: u16 = 0xffff;
const ISR_QUEUE: u8 = 1;
const ISR_CONFIG: u8 = 2;

/// Interrupts of one device, and whether it needs a reset.
pub struct Link {
    msix: Arc<MsixTable>,
    isr: AtomicU8,
    config_vector: AtomicU16,
    queue_vectors: Vec<AtomicU16>,
    broken: AtomicBool,
    breaks: AtomicU64,
}

impl Link {
    /// A link for a device with `queues` queues.
    pub fn new(msix: Arc<MsixTable>, queues: usize) -> Self {
        Self {
            msix,
            isr: AtomicU8::new(0),
            config_vector: AtomicU16::new(NO_VECTOR),
            queue_vectors: (0..queues).map(|_| AtomicU16::new(NO_VECTOR)).collect(),
            broken: AtomicBool::new(false),
            breaks: AtomicU64::new(0),
        }
    }

    /// The device used buffers of `queue` (2.3).
    pub fn used(&self, queue: usize) {
        self.isr.fetch_or(ISR_QUEUE, Ordering::SeqCst);
        if let Some(vector) = self.queue_vectors.get(queue) {
            self.msix.signal(vector.load(Ordering::SeqCst));
        }
    }

    /// The device's configuration is another one (2.5.1).
    pub fn config_changed(&self) {
        self.isr.fetch_or(ISR_CONFIG, Ordering::SeqCst);
        self.msix.signal(self.config_vector.load(Ordering::SeqCst));
    }

    /// The driver broke the rules: the device does nothing more until it is reset (DEVICE_NEEDS_RESET, 2.1.2).
    pub fn give_up(&self) {
        if !self.broken.swap(true, Ordering::SeqCst) {
            self.breaks.fetch_add(1, Ordering::Relaxed);
            self.config_changed();
        }
    }

    /// Whether the device gave up.
    pub fn broken(&self) -> bool {
        self.broken.load(Ordering::SeqCst)
    }

    /// How often it gave up since power-on.
    pub fn breaks(&self) -> u64 {
        self.breaks.load(Ordering::Relaxed)
    }

    /// The ISR status (4.1.4.5), cleared by reading.
    pub(super) fn take_isr(&self) -> u8 {
        self.isr.swap(0, Ordering::SeqCst)
    }

    pub(super) fn config_vector(&self) -> u16 {
        self.config_vector.load(Ordering::SeqCst)
    }

    pub(super) fn set_config_vector(&self, vector: u16) {
        self.config_vector.store(self.known(vector), Ordering::SeqCst);
    }

    pub(super) fn queue_vector(&self, queue: usize) -> u16 {
        self.queue_vectors.get(queue).map_or(NO_VECTOR, |v| v.load(Ordering::SeqCst))
    }

    pub(super) fn set_queue_vector(&self, queue: usize, vector: u16) {
        if let Some(slot) = self.queue_vectors.get(queue) {
            slot.store(self.known(vector), Ordering::SeqCst);
        }
    }

    /// As after power-on; the counter stays.
    pub(super) fn reset(&self) {
        self.isr.store(0, Ordering::SeqCst);
        self.config_vector.store(NO_VECTOR, Ordering::SeqCst);
        self.queue_vectors.iter().for_each(|v| v.store(NO_VECTOR, Ordering::SeqCst));
        self.broken.store(false, Ordering::SeqCst);
    }

    /// A vector that does not exist is refused by reading back as "none" (4.1.5.1.2).
    fn known(&self, vector: u16) -> u16 {
        if vector < self.msix.vectors() { vector } else { NO_VECTOR }
    }
}
