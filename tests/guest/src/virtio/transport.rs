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
const NO_VECTOR: u16 = 0xffff;
/// VIRTIO_F_VERSION_1: without it the device speaks another language.
const VERSION_1: u64 = 1 << 32;

/// A device that runs, with one queue.
pub struct Transport {
    /// Device-specific configuration.
    pub configuration: Registers,
    /// What was agreed on.
    pub features: u64,
    notify: Registers,
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
    /// Resets the device, agrees on `wanted` as far as offered, installs `queue` as queue 0, and starts it. Its MSI-X entry 0 calls
    /// `source`.
    pub fn start(device: Device, wanted: u64, source: Source, queue: &Queue) -> Result<Self, TransportError> {
        device.enable();
        let common = structure(device, COMMON).ok_or(TransportError::NoStructure("common configuration"))?.0;
        let (notify, multiplier) = structure(device, NOTIFY).ok_or(TransportError::NoStructure("notifications"))?;
        let configuration = structure(device, DEVICE).ok_or(TransportError::NoStructure("device configuration"))?.0;

        common.write8(STATUS, 0);
        while common.read8(STATUS) != 0 {
            core::hint::spin_loop();
        }
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
        common.write16(CONFIG_VECTOR, NO_VECTOR);
        common.write16(QUEUE_SELECT, 0);
        let most = common.read16(QUEUE_SIZE);
        if most < Queue::SIZE {
            return Err(TransportError::Queue(most));
        }
        common.write16(QUEUE_SIZE, Queue::SIZE);
        common.write16(QUEUE_VECTOR, 0);
        if common.read16(QUEUE_VECTOR) != 0 {
            return Err(TransportError::NoStructure("MSI-X vector for queue 0"));
        }
        common.write64(QUEUE_DESCRIPTORS, queue.descriptors());
        common.write64(QUEUE_DRIVER, queue.available());
        common.write64(QUEUE_DEVICE, queue.used());
        common.write16(QUEUE_ENABLE, 1);
        let offset = u64::from(common.read16(QUEUE_NOTIFY_OFFSET)) * u64::from(multiplier);
        common.write8(STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
        Ok(Self { configuration, features, notify: notify.from(offset) })
    }

    /// Tells the device that queue 0 has news.
    pub fn notify(&self) {
        self.notify.write16(0, 0);
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
