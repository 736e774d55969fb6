//! Virtio over PCI, modern only (virtio 1.3, 4.1).
//!
//! BAR 0 holds every structure, each in pages of its own:
//!
//! ```text
//! 0x0000 common configuration    0x2000 device configuration        0x4000 MSI-X table
//! 0x1000 ISR status              0x3000 notifications, 4 bytes each 0x5000 MSI-X pending bits
//! ```

use super::{Link, Ring, RingError, Session, VirtioDevice, Virtqueue, feature};
use crate::machine::layout::{PCI_BAR_STRIDE, PCI_WINDOW};
use crate::machine::memory::GuestRam;
use crate::machine::pci::{ConfigSpace, Identity, MSIX_PBA_SIZE, MsixTable, PciFunction, VECTORS_MAX, command};
use crate::machine::sync::lock;
use crate::machine::wires::{WireError, Wires};
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

const BAR_SIZE: u32 = 0x8000;
const COMMON: u64 = 0x0000;
const ISR: u64 = 0x1000;
const DEVICE: u64 = 0x2000;
const NOTIFY: u64 = 0x3000;
const MSIX_TABLE: u64 = 0x4000;
const MSIX_PENDING: u64 = 0x5000;
const COMMON_SIZE: u32 = 0x38;
const NOTIFY_STRIDE: u32 = 4;

const VENDOR: u16 = 0x1af4;
const MODERN_DEVICE: u16 = 0x1040;
const CAPABILITY_VENDOR: u8 = 0x09;
const CAPABILITY_MSIX: u8 = 0x11;
const CONFIG_COMMON: u8 = 1;
const CONFIG_NOTIFY: u8 = 2;
const CONFIG_ISR: u8 = 3;
const CONFIG_DEVICE: u8 = 4;
const CONFIG_PCI: u8 = 5;

const STATUS_DRIVER_OK: u8 = 4;
const STATUS_FEATURES_OK: u8 = 8;
const STATUS_NEEDS_RESET: u8 = 64;
/// What a driver may set: ACKNOWLEDGE, DRIVER, DRIVER_OK, FEATURES_OK, FAILED.
const STATUS_DRIVER: u8 = 1 | 2 | STATUS_DRIVER_OK | STATUS_FEATURES_OK | 128;

/// The most descriptors in one chain, whatever a device says: keeps chains bounded for every device.
const CHAIN_LIMIT: usize = 256;

/// A virtio device on the PCI bus.
pub struct VirtioPci {
    device: Arc<dyn VirtioDevice>,
    memory: GuestRam,
    wires: Arc<dyn Wires>,
    msix: Arc<MsixTable>,
    link: Arc<Link>,
    config: Mutex<ConfigSpace>,
    state: Mutex<State>,
    /// The guest address that BAR 0 decodes, or `NOWHERE`.
    base: AtomicU64,
    /// Whether it has left the bus; changed under `config`'s lock.
    withdrawn: AtomicBool,
    /// Offsets of the capabilities that the guest may write.
    msix_capability: u8,
    window_capability: u8,
}

const NOWHERE: u64 = u64::MAX;

/// What the driver wrote into the common configuration.
struct State {
    device_feature_select: u32,
    driver_feature_select: u32,
    driver_features: u64,
    queue_select: u16,
    status: u8,
    resetting: bool,
    queues: Vec<QueueSetup>,
}

#[derive(Clone, Copy)]
struct QueueSetup {
    max: u16,
    size: u16,
    enabled: bool,
    at: [u64; 3],
}

impl VirtioPci {
    /// Puts `device` into slot `slot`.
    pub fn new(
        device: Arc<dyn VirtioDevice>,
        slot: u8,
        memory: GuestRam,
        wires: Arc<dyn Wires>,
    ) -> Result<Self, WireError> {
        let queues = device.queues().len();
        let vectors = u16::try_from(queues + 1).unwrap_or(VECTORS_MAX).min(VECTORS_MAX);
        let msix = Arc::new(MsixTable::new(vectors, wires.clone())?);
        let link = Arc::new(Link::new(msix.clone(), queues));
        device.config().attach(link.clone());
        let identity = Identity {
            vendor: VENDOR,
            device: MODERN_DEVICE + device.device_type(),
            class: device.class(),
            revision: 1,
            subsystem: (VENDOR, MODERN_DEVICE + device.device_type()),
        };
        let mut config = ConfigSpace::new(&identity);
        config.set_memory_bar((PCI_WINDOW + u64::from(slot) * PCI_BAR_STRIDE) as u32, BAR_SIZE);
        let (msix_capability, window_capability) = add_capabilities(&mut config, device.as_ref(), vectors);
        let state = Mutex::new(State::new(device.queues()));
        Ok(Self {
            device,
            memory,
            wires,
            msix,
            link,
            config: Mutex::new(config),
            state,
            base: AtomicU64::new(NOWHERE),
            withdrawn: AtomicBool::new(false),
            msix_capability,
            window_capability,
        })
    }

    /// The device's way back to its driver: for counters.
    pub fn link(&self) -> &Link {
        &self.link
    }

    /// Follows the command register and the BAR: decodes where the guest says, and moves the doorbells along.
    fn settle_window(&self, config: &ConfigSpace) {
        let decode = config.command() & command::MEMORY != 0 && !self.withdrawn.load(Ordering::SeqCst);
        let now = if decode { u64::from(config.bar()) } else { NOWHERE };
        let before = self.base.swap(now, Ordering::SeqCst);
        if before == now {
            return;
        }
        for queue in 0..self.device.queues().len() as u16 {
            let Some(event) = self.device.doorbell(queue) else { continue };
            let at = |base: u64| base + NOTIFY + u64::from(queue) * u64::from(NOTIFY_STRIDE);
            // Without a doorbell in KVM the write leaves the guest and lands in `bar_write`: slower, never wrong.
            if before != NOWHERE {
                let _ = self.wires.disconnect_doorbell(at(before), event);
            }
            if now != NOWHERE {
                let _ = self.wires.connect_doorbell(at(now), event);
            }
        }
    }

    /// VIRTIO_PCI_CAP_PCI_CFG (4.1.4.9): a window into the BAR for those who can't map it. Gives offset and length if the
    /// guest asks for something sensible.
    fn config_window(&self, config: &ConfigSpace) -> Option<(u64, usize)> {
        let at = usize::from(self.window_capability);
        let (bar, offset, length) = (config.dword(at + 4) & 0xff, config.dword(at + 8), config.dword(at + 12));
        let good = bar == 0 && matches!(length, 1 | 2 | 4) && offset < BAR_SIZE && offset.is_multiple_of(length);
        good.then_some((u64::from(offset), length as usize))
    }

    fn common_read(&self, offset: u64, data: &mut [u8]) {
        let all = lock(&self.state).show(&self.link, self.device.as_ref());
        let from = all.iter().skip(usize::try_from(offset).unwrap_or(usize::MAX)).chain(std::iter::repeat(&0));
        data.iter_mut().zip(from).for_each(|(to, from)| *to = *from);
    }

    /// Fields are written whole; a 64-bit field also in halves (4.1.3.1). Anything else is ignored.
    fn common_write(&self, offset: u64, data: &[u8]) {
        let value = data.iter().rev().fold(0, |value: u64, byte| value << 8 | u64::from(*byte));
        let mut state = lock(&self.state);
        match (offset, data.len()) {
            (0x00, 4) => state.device_feature_select = value as u32,
            (0x08, 4) => state.driver_feature_select = value as u32,
            (0x0c, 4) => state.set_driver_features(value as u32),
            (0x10, 2) => self.link.set_config_vector(value as u16),
            (0x14, 1) => self.set_status(&mut state, value as u8),
            (0x16, 2) => state.queue_select = value as u16,
            (0x1a, 2) => self.link.set_queue_vector(usize::from(state.queue_select), value as u16),
            (0x18, 2) => state.set_up(|queue| queue.size = value as u16),
            (0x1c, 2) if value == 1 => state.set_up(|queue| queue.enabled = true),
            (0x20..0x38, 4) if offset.is_multiple_of(4) => {
                let (which, high) = ((offset - 0x20) as usize / 8, offset & 4 != 0);
                state.set_up(|queue| set_half(&mut queue.at[which], high, value as u32));
            }
            (0x20 | 0x28 | 0x30, 8) => state.set_up(|queue| queue.at[(offset - 0x20) as usize / 8] = value),
            _ => {}
        }
    }

    fn set_status(&self, state: &mut State, value: u8) {
        if value == 0 {
            state.resetting = true;
            self.settle_reset(state);
            return;
        }
        if state.resetting {
            return;
        }
        let before = state.status;
        let mut status = before | value & STATUS_DRIVER;
        if !state.features_good(self.device.as_ref()) {
            status &= !STATUS_FEATURES_OK;
        }
        if status & STATUS_FEATURES_OK == 0 {
            status &= !STATUS_DRIVER_OK;
        }
        state.status = status;
        if status & !before & STATUS_DRIVER_OK != 0 {
            self.start(state);
        }
    }

    /// The driver is ready: hands its queues to the device, or gives up at once if one of them lies outside of RAM.
    fn start(&self, state: &State) {
        let memory = Arc::new(self.memory.clone());
        let queue = |(index, ring): (u16, Option<Ring>)| {
            ring.map(|ring| Virtqueue::new(ring, memory.clone(), self.link.clone(), index))
        };
        match state.rings(&self.memory) {
            Err(_) => self.link.give_up(),
            Ok(rings) => self.device.start(Session {
                queues: (0..).zip(rings).map(queue).collect(),
                features: state.driver_features,
                link: self.link.clone(),
            }),
        }
    }

    /// A reset ends when the device has let go of its session; until then the status does not read as zero (4.1.4.3.1).
    fn settle_reset(&self, state: &mut State) {
        if state.resetting && self.device.stop() {
            *state = State::new(self.device.queues());
            self.link.reset();
        }
    }

    fn status(&self) -> u8 {
        let mut state = lock(&self.state);
        self.settle_reset(&mut state);
        state.status_shown(&self.link)
    }
}

impl PciFunction for VirtioPci {
    fn config_read(&self, offset: u8, data: &mut [u8]) {
        let config = lock(&self.config);
        config.read(offset, data);
        let here = offset == self.window_capability + 16;
        if let Some((at, length)) = self.config_window(&config).filter(|_| here) {
            drop(config);
            let mut value = [0; 4];
            self.bar_read(at, &mut value[..length]);
            data.iter_mut().zip(value).for_each(|(to, from)| *to = from);
        }
    }

    fn config_write(&self, offset: u8, data: &[u8]) {
        let mut config = lock(&self.config);
        config.write(offset, data);
        self.settle_window(&config);
        self.msix.set_control((config.dword(usize::from(self.msix_capability)) >> 16) as u16);
        let here = offset == self.window_capability + 16;
        if let Some((at, length)) = self.config_window(&config).filter(|_| here) {
            drop(config);
            if let Some(value) = data.get(..length) {
                self.bar_write(at, value);
            }
        }
    }

    fn window(&self) -> Range<u64> {
        match self.base.load(Ordering::SeqCst) {
            NOWHERE => 0..0,
            base => base..base + u64::from(BAR_SIZE),
        }
    }

    fn bar_read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        match offset {
            0x14 if data.len() == 1 => data[0] = self.status(),
            COMMON..ISR => self.common_read(offset, data),
            ISR => data.iter_mut().take(1).for_each(|isr| *isr = self.link.take_isr()),
            DEVICE..NOTIFY => self.device.config().read(offset - DEVICE, data),
            MSIX_TABLE..MSIX_PENDING => self.msix.table_read(offset - MSIX_TABLE, data),
            MSIX_PENDING.. => self.msix.pending_read(offset - MSIX_PENDING, data),
            _ => {}
        }
    }

    fn bar_write(&self, offset: u64, data: &[u8]) {
        match offset {
            COMMON..ISR => self.common_write(offset, data),
            DEVICE..NOTIFY => self.device.config_written(offset - DEVICE, data),
            NOTIFY..MSIX_TABLE => {
                let queue = u16::try_from((offset - NOTIFY) / u64::from(NOTIFY_STRIDE)).ok();
                if let Some(event) = queue.and_then(|queue| self.device.doorbell(queue)) {
                    // The counter can't overflow: the device drains it.
                    let _ = event.write(1);
                }
            }
            MSIX_TABLE..MSIX_PENDING => self.msix.table_write(offset - MSIX_TABLE, data),
            _ => {}
        }
    }

    fn withdraw(&self) {
        let config = lock(&self.config);
        self.withdrawn.store(true, Ordering::SeqCst);
        self.settle_window(&config);
        drop(config);
        self.msix.withdraw();
    }
}

impl State {
    fn new(queues: &[u16]) -> Self {
        let queue = |max: &u16| QueueSetup { max: *max, size: *max, enabled: false, at: [0; 3] };
        Self {
            device_feature_select: 0,
            driver_feature_select: 0,
            driver_features: 0,
            queue_select: 0,
            status: 0,
            resetting: false,
            queues: queues.iter().map(queue).collect(),
        }
    }

    /// The common configuration as the guest reads it (4.1.4.3).
    fn show(&self, link: &Link, device: &dyn VirtioDevice) -> [u8; COMMON_SIZE as usize] {
        let queue = self.queues.get(usize::from(self.queue_select));
        let at = queue.map_or([0; 3], |q| q.at);
        let mut out = [0; COMMON_SIZE as usize];
        let mut put = |at: usize, bytes: &[u8]| out[at..at + bytes.len()].copy_from_slice(bytes);
        put(0x00, &self.device_feature_select.to_le_bytes());
        put(0x04, &half(offered(device), self.device_feature_select).to_le_bytes());
        put(0x08, &self.driver_feature_select.to_le_bytes());
        put(0x0c, &half(self.driver_features, self.driver_feature_select).to_le_bytes());
        put(0x10, &link.config_vector().to_le_bytes());
        put(0x12, &(self.queues.len() as u16).to_le_bytes());
        put(0x14, &[self.status_shown(link), device.config().generation()]);
        put(0x16, &self.queue_select.to_le_bytes());
        put(0x18, &queue.map_or(0, |q| q.size).to_le_bytes());
        put(0x1a, &link.queue_vector(usize::from(self.queue_select)).to_le_bytes());
        put(0x1c, &u16::from(queue.is_some_and(|q| q.enabled)).to_le_bytes());
        put(0x1e, &queue.map_or(0, |_| self.queue_select).to_le_bytes());
        put(0x20, &at[0].to_le_bytes());
        put(0x28, &at[1].to_le_bytes());
        put(0x30, &at[2].to_le_bytes());
        out
    }

    fn status_shown(&self, link: &Link) -> u8 {
        self.status | if link.broken() { STATUS_NEEDS_RESET } else { 0 }
    }

    fn set_driver_features(&mut self, value: u32) {
        if self.status & STATUS_FEATURES_OK == 0 && self.driver_feature_select < 2 {
            set_half(&mut self.driver_features, self.driver_feature_select == 1, value);
        }
    }

    /// Changes the selected queue, which must not be enabled yet (4.1.4.3.2).
    fn set_up(&mut self, change: impl FnOnce(&mut QueueSetup)) {
        let open = self.status & STATUS_DRIVER_OK == 0;
        let queue = self.queues.get_mut(usize::from(self.queue_select));
        if let Some(queue) = queue.filter(|queue| open && !queue.enabled) {
            change(queue);
        }
    }

    /// Modern, and nothing that was not offered (3.1.1).
    fn features_good(&self, device: &dyn VirtioDevice) -> bool {
        self.driver_features & !offered(device) == 0 && self.driver_features & feature::VERSION_1 != 0
    }

    fn rings(&self, memory: &GuestRam) -> Result<Vec<Option<Ring>>, RingError> {
        let ring = |queue: &QueueSetup| {
            let ring = Ring::new(queue.max, queue.size, queue.at, self.driver_features, CHAIN_LIMIT)?;
            ring.check(memory).map(|()| ring)
        };
        self.queues.iter().map(|queue| queue.enabled.then(|| ring(queue)).transpose()).collect()
    }
}

fn offered(device: &dyn VirtioDevice) -> u64 {
    device.features() | feature::ALL
}

fn half(value: u64, select: u32) -> u32 {
    match select {
        0 => value as u32,
        1 => (value >> 32) as u32,
        _ => 0,
    }
}

fn set_half(whole: &mut u64, high: bool, value: u32) {
    let shift = if high { 32 } else { 0 };
    *whole = *whole & !(0xffff_ffff << shift) | u64::from(value) << shift;
}

/// The capabilities (4.1.4): where each structure lies, MSI-X, and the configuration window. Gives the offsets of the
/// last two.
fn add_capabilities(config: &mut ConfigSpace, device: &dyn VirtioDevice, vectors: u16) -> (u8, u8) {
    let notify_size = NOTIFY_STRIDE * device.queues().len() as u32;
    let structures = [
        (CONFIG_COMMON, COMMON, COMMON_SIZE),
        (CONFIG_ISR, ISR, 1),
        (CONFIG_DEVICE, DEVICE, device.config().length() as u32),
    ];
    // A device without configuration has no such structure (4.1.4.6): Linux refuses one of no length.
    for (kind, at, size) in structures.into_iter().filter(|(_, _, size)| *size > 0) {
        let body = structure(kind, at, size, &[]);
        config.add_capability(CAPABILITY_VENDOR, &body, &vec![0; body.len()]);
    }
    let body = structure(CONFIG_NOTIFY, NOTIFY, notify_size, &NOTIFY_STRIDE.to_le_bytes());
    config.add_capability(CAPABILITY_VENDOR, &body, &vec![0; body.len()]);

    debug_assert!(MSIX_PENDING + MSIX_PBA_SIZE <= u64::from(BAR_SIZE));
    let mut body = (vectors - 1).to_le_bytes().to_vec();
    body.extend((MSIX_TABLE as u32).to_le_bytes());
    body.extend((MSIX_PENDING as u32).to_le_bytes());
    let mut writable = vec![0; body.len()];
    writable[1] = 0xc0;
    let msix = config.add_capability(CAPABILITY_MSIX, &body, &writable);

    let body = structure(CONFIG_PCI, 0, 0, &[0; 4]);
    let mut writable = vec![0; body.len()];
    // bar; then offset, length and data.
    writable[2] = 0xff;
    writable[6..].fill(0xff);
    let window = config.add_capability(CAPABILITY_VENDOR, &body, &writable);
    (msix, window)
}

/// `struct virtio_pci_cap` from its third byte on.
fn structure(kind: u8, at: u64, size: u32, tail: &[u8]) -> Vec<u8> {
    let mut body = vec![(16 + tail.len()) as u8, kind, 0, 0, 0, 0];
    body.extend((at as u32).to_le_bytes());
    body.extend(size.to_le_bytes());
    body.extend(tail);
    body
}

#[cfg(test)]
#[path = "transport_tests.rs"]
mod tests;
