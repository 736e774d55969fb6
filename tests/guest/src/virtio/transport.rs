//! A virtio device behind PCI capabilities (virtio 1.3, 4.1), brought up as 3.1.1 says.

use core::fmt;

use crate::apic::MSI_ADDRESS;
use crate::interrupts::Source;
use crate::memory::Registers;
use crate::pci::Device;

use super::queue::Queue;

const VENDOR_CAPABILITY: u8 = 0x09;
/// `cfg_type` of the structures.
const COMMON: u8 = 1;
const NOTIFY: u8 = 2;
const DEVICE: u8 = 4;

// Fields of the common configuration (4.1.4.3).
const DEVICE_FEATURE_SELECT: u64 = 0x00;
const DEVICE_FEATURE: u64 = 0x04;
const DRIVER_FEATURE_SELECT: u64 = 0x08;
const DRIVER_FEATURE: u64 = 0x0c;
const CONFIG_VECTOR: u64 = 0x10;
const QUEUES_OFFERED: u64 = 0x12;
const STATUS: u64 = 0x14;
const QUEUE_SELECT: u64 = 0x16;
const QUEUE_SIZE: u64 = 0x18;
const QUEUE_VECTOR: u64 = 0x1a;
const QUEUE_ENABLE: u64 = 0x1c;
const QUEUE_NOTIFY_OFFSET: u64 = 0x1e;
const QUEUE_DESCRIPTORS: u64 = 0x20;
const QUEUE_DRIVER: u64 = 0x28;
const QUEUE_DEVICE: u64 = 0x30;

const ACKNOWLEDGE: u8 = 1;
const DRIVER: u8 = 2;
const DRIVER_OK: u8 = 4;
const FEATURES_OK: u8 = 8;
/// VIRTIO_F_VERSION_1: without it the device speaks another language.
const VERSION_1: u64 = 1 << 32;

/// Queues that a driver here may use of one device.
const QUEUES: usize = 4;

/// A device that runs.
pub struct Transport {
    /// Device-specific configuration.
    pub configuration: Registers,
    /// What was agreed on.
    pub features: u64,
    /// Queues that run.
    pub queues: usize,
    notify: [Registers; QUEUES],
}

/// Why a device can't be used.
#[derive(Clone, Copy)]
pub enum TransportError {
    /// A capability or the BAR behind it is missing.
    NoStructure(&'static str),
    /// It refused our choice.
    Features(u64),
    /// Its queue is too small or missing.
    Queue(u16),
}

impl Transport {
    /// Resets the device, agrees on `wanted` as far as offered, installs `queues` from queue 0 on, as many as it has, and starts
    /// it. Its MSI-X entry 0 calls `source` for all of them, and when its configuration changes.
    pub fn start(device: Device, wanted: u64, source: Source, queues: &[&Queue]) -> Result<Self, TransportError> {
        device.enable();
        let common = structure(device, COMMON).ok_or(TransportError::NoStructure("common configuration"))?.0;
        let (notify, multiplier) = structure(device, NOTIFY).ok_or(TransportError::NoStructure("notifications"))?;
        // A device without configuration need not have the structure (4.1.4.6).
        let configuration = structure(device, DEVICE).map_or(common, |found| found.0);

        reset(common);
        common.write8(STATUS, ACKNOWLEDGE | DRIVER);

        let features = offered(common) & (wanted | VERSION_1);
        for half in 0..2 {
            common.write32(DRIVER_FEATURE_SELECT, half);
            common.write32(DRIVER_FEATURE, (features >> (32 * half)) as u32);
        }
        common.write8(STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK);
        if features & VERSION_1 == 0 || common.read8(STATUS) & FEATURES_OK == 0 {
            return Err(TransportError::Features(features));
        }

        if !device.enable_msix(MSI_ADDRESS, u32::from(source.vector())) {
            return Err(TransportError::NoStructure("MSI-X"));
        }
        common.write16(CONFIG_VECTOR, 0);
        let queues = &queues[..queues.len().min(usize::from(common.read16(QUEUES_OFFERED)).max(1))];
        let mut doorbells = [notify; QUEUES];
        for ((number, queue), doorbell) in (0..).zip(queues).zip(&mut doorbells) {
            queue.begin(features);
            let offset = install(common, number, queue)?;
            *doorbell = notify.from(u64::from(offset) * u64::from(multiplier));
        }
        common.write8(STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
        Ok(Self { configuration, features, queues: queues.len(), notify: doorbells })
    }

    /// Resets the device.
    pub fn stop(device: Device) -> Result<(), TransportError> {
        reset(structure(device, COMMON).ok_or(TransportError::NoStructure("common configuration"))?.0);
        Ok(())
    }

    /// Tells the device that `queue` has news.
    pub fn notify(&self, queue: u16) {
        self.notify[usize::from(queue)].write16(0, queue);
    }
}

impl fmt::Display for TransportError {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Self::NoStructure(what) => write!(f, "the device has no {what}"),
            Self::Features(features) => write!(f, "the device refuses features {features:#x}"),
            Self::Queue(size) => write!(f, "the device's queue has only {size} entries"),
        }
    }
}

fn reset(common: Registers) {
    common.write8(STATUS, 0);
    while common.read8(STATUS) != 0 {
        core::hint::spin_loop();
    }
}

/// Sets queue `number` up; gives where its doorbell is.
fn install(common: Registers, number: u16, queue: &Queue) -> Result<u16, TransportError> {
    common.write16(QUEUE_SELECT, number);
    let most = common.read16(QUEUE_SIZE);
    if most < Queue::SIZE {
        return Err(TransportError::Queue(most));
    }
    common.write16(QUEUE_SIZE, Queue::SIZE);
    common.write16(QUEUE_VECTOR, 0);
    if common.read16(QUEUE_VECTOR) != 0 {
        return Err(TransportError::NoStructure("MSI-X vector for its queues"));
    }
    common.write64(QUEUE_DESCRIPTORS, queue.descriptors());
    common.write64(QUEUE_DRIVER, queue.available());
    common.write64(QUEUE_DEVICE, queue.used());
    common.write16(QUEUE_ENABLE, 1);
    Ok(common.read16(QUEUE_NOTIFY_OFFSET))
}

fn offered(common: Registers) -> u64 {
    let half = |select| {
        common.write32(DEVICE_FEATURE_SELECT, select);
        u64::from(common.read32(DEVICE_FEATURE))
    };
    half(0) | half(1) << 32
}

/// The structure of this type, and what follows its capability (the multiplier, for notifications).
fn structure(device: Device, kind: u8) -> Option<(Registers, u32)> {
    let mut candidates = device.capabilities().filter(|(id, at)| *id == VENDOR_CAPABILITY && at.read8(3) == kind);
    candidates.find_map(|(_, at)| {
        let registers = device.bar(at.read8(4), at.read32(8), u64::from(at.read32(12)))?;
        Some((registers, if kind == NOTIFY { at.read32(16) } else { 0 }))
    })
}
