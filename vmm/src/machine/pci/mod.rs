//! The PCI bus: one segment, one bus, one function a slot, reached by ECAM (PCI Express base 6.0, 7.2.2) or by
//! configuration mechanism 1.

mod bridge;
mod config;
#[cfg(test)]
mod exhaustive;
#[doc(hidden)]
pub mod fuzz;
mod hot;
mod msix;

pub use bridge::HostBridge;
pub use config::{ConfigSpace, Identity, command};
pub use hot::HotSlots;
pub use msix::{MSIX_PBA_SIZE, MsixTable, VECTORS_MAX};

use super::layout::{ECAM, ECAM_SIZE, PCI_CONFIG_PORT, PCI_SLOTS};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

/// A function on the bus, as the bus sees it. Accesses are 1, 2, 4 or 8 bytes; they may straddle registers, and whatever
/// a function does not know reads as zero and ignores writes.
pub trait PciFunction: Send + Sync {
    /// Reads configuration space from `offset` (0 to 255).
    fn config_read(&self, offset: u8, data: &mut [u8]);
    /// Writes configuration space from `offset` (0 to 255).
    fn config_write(&self, offset: u8, data: &[u8]);
    /// The guest addresses that its memory BAR decodes now; empty while it decodes none.
    fn window(&self) -> Range<u64>;
    /// Reads the BAR from `offset`.
    fn bar_read(&self, offset: u64, data: &mut [u8]);
    /// Writes the BAR from `offset`.
    fn bar_write(&self, offset: u64, data: &[u8]);
    /// It leaves the bus for good: it decodes nothing, and holds no doorbell and no interrupt line, whatever is written to it by those
    /// who found it before. It never waits.
    fn withdraw(&self) {}
}

/// All slots, and the address register of configuration mechanism 1.
pub struct PciBus {
    slots: Vec<Arc<dyn PciFunction>>,
    hot: Arc<HotSlots>,
    address: AtomicU32,
}

/// There is no slot left.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("the PCI bus has {} slots and all are taken", PCI_SLOTS)]
pub struct SlotsTaken;

impl PciBus {
    /// The slot that the next function gets.
    pub fn next_slot(&self) -> Result<u8, SlotsTaken> {
        u8::try_from(self.slots.len()).ok().filter(|slot| usize::from(*slot) < PCI_SLOTS).ok_or(SlotsTaken)
    }

    /// Puts a function into the next slot.
    pub fn add(&mut self, function: Arc<dyn PciFunction>) -> Result<(), SlotsTaken> {
        self.next_slot()?;
        self.slots.push(function);
        Ok(())
    }

    /// The slots that may be filled later; those that [`next_slot`](Self::next_slot) has gone past are not among them.
    pub fn hot(&self) -> &Arc<HotSlots> {
        &self.hot
    }

    /// A read of guest memory at `address`; false if nothing here decodes it.
    pub fn memory_read(&self, address: u64, data: &mut [u8]) -> bool {
        if let Some(at) = ecam_offset(address) {
            self.config_read(at, data);
            return true;
        }
        let Some((function, offset)) = self.decode(address, data.len()) else { return false };
        function.bar_read(offset, data);
        true
    }

    /// A write of guest memory at `address`; false if nothing here decodes it.
    pub fn memory_write(&self, address: u64, data: &[u8]) -> bool {
        if let Some(at) = ecam_offset(address) {
            self.config_write(at, data);
            return true;
        }
        let Some((function, offset)) = self.decode(address, data.len()) else { return false };
        function.bar_write(offset, data);
        true
    }

    /// A read of a port of configuration mechanism 1 (PCI local bus 3.0, 3.2.2.3.2).
    pub fn port_read(&self, port: u16, data: &mut [u8]) {
        match (port - PCI_CONFIG_PORT, data.len()) {
            (0, 4) => data.copy_from_slice(&self.address.load(Ordering::Relaxed).to_le_bytes()),
            (offset @ 4..8, 1 | 2 | 4) => match self.mechanism_1(offset) {
                Some(at) => self.config_read(at, data),
                None => data.fill(0xff),
            },
            _ => data.fill(0xff),
        }
    }

    /// A write of a port of configuration mechanism 1.
    pub fn port_write(&self, port: u16, data: &[u8]) {
        match (port - PCI_CONFIG_PORT, data) {
            (0, &[a, b, c, d]) => self.address.store(u32::from_le_bytes([a, b, c, d]) & 0x80ff_fffc, Ordering::Relaxed),
            (offset @ 4..8, [_] | [_, _] | [_, _, _, _]) => {
                if let Some(at) = self.mechanism_1(offset) {
                    self.config_write(at, data);
                }
            }
            _ => {}
        }
    }

    fn decode(&self, address: u64, length: usize) -> Option<(Arc<dyn PciFunction>, u64)> {
        let length = length as u64;
        let fixed = self.slots.iter().find_map(|function| {
            let offset = offset_in(&function.window(), address, length)?;
            Some((function.clone(), offset))
        });
        fixed.or_else(|| self.hot.decode(address, length))
    }

    /// Where in bus 0's ECAM the data register now stands; nothing for other buses, or while disabled.
    fn mechanism_1(&self, offset: u16) -> Option<u32> {
        let address = self.address.load(Ordering::Relaxed);
        let (enabled, bus) = (address >> 31 == 1, address >> 16 & 0xff);
        let (function, register) = (address >> 8 & 0xff, address & 0xfc);
        (enabled && bus == 0).then(|| (function << 12) | (register + u32::from(offset - 4)))
    }

    fn config_read(&self, at: u32, data: &mut [u8]) {
        match self.function(at) {
            None => data.fill(0xff),
            Some(function) => match u8::try_from(at & 0xfff) {
                Ok(register) => function.config_read(register, data),
                Err(_) => data.fill(0),
            },
        }
    }

    fn config_write(&self, at: u32, data: &[u8]) {
        if let (Some(function), Ok(register)) = (self.function(at), u8::try_from(at & 0xfff)) {
            function.config_write(register, data);
        }
    }

    fn function(&self, at: u32) -> Option<Arc<dyn PciFunction>> {
        let (slot, function) = (u8::try_from(at >> 15).ok()?, at >> 12 & 7);
        if function != 0 {
            return None;
        }
        self.slots.get(usize::from(slot)).cloned().or_else(|| self.hot.get(slot))
    }
}

/// A bus with its host bridge in slot 0.
impl Default for PciBus {
    fn default() -> Self {
        Self { slots: vec![Arc::new(HostBridge::default())], hot: Arc::default(), address: AtomicU32::new(0) }
    }
}

/// Where in `window` the access lies, if it lies there as a whole.
fn offset_in(window: &Range<u64>, address: u64, length: u64) -> Option<u64> {
    let end = address.checked_add(length)?;
    (window.contains(&address) && end <= window.end).then(|| address - window.start)
}

fn ecam_offset(address: u64) -> Option<u32> {
    let offset = address.checked_sub(ECAM).filter(|offset| *offset < ECAM_SIZE)?;
    u32::try_from(offset).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn dword(bus: &PciBus, at: u64) -> u32 {
        let mut data = [0; 4];
        assert!(bus.memory_read(ECAM + at, &mut data));
        u32::from_le_bytes(data)
    }

    #[test]
    fn both_ways_lead_to_the_same_registers() {
        let bus = PciBus::default();
        assert_eq!(dword(&bus, 0), 0x0008_1b36);
        bus.port_write(0xcf8, &0x8000_0000_u32.to_le_bytes());
        let mut data = [0; 2];
        bus.port_read(0xcfe, &mut data);
        assert_eq!(data, 0x0008_u16.to_le_bytes());
        let mut data = [0; 4];
        bus.port_read(0xcf8, &mut data);
        assert_eq!(u32::from_le_bytes(data), 0x8000_0000);
    }

    #[test]
    fn what_is_not_there_reads_as_ones() {
        let bus = PciBus::default();
        assert_eq!(dword(&bus, 1 << 15), u32::MAX, "empty slot");
        assert_eq!(dword(&bus, 1 << 12), u32::MAX, "second function");
        assert_eq!(dword(&bus, 0x100), 0, "no extended capabilities");
        let mut data = [0; 4];
        bus.port_write(0xcf8, &0x8001_0000_u32.to_le_bytes());
        bus.port_read(0xcfc, &mut data);
        assert_eq!(data, [0xff; 4], "bus 1");
        assert!(!bus.memory_read(0xc000_0000, &mut data), "no window");
    }

    #[test]
    fn the_bus_has_an_end() {
        let mut bus = PciBus::default();
        for _ in 1..PCI_SLOTS {
            assert_eq!(bus.add(Arc::new(HostBridge::default())), Ok(()));
        }
        assert_eq!(bus.add(Arc::new(HostBridge::default())), Err(SlotsTaken));
    }

    proptest! {
        #[test]
        fn no_access_panics(at in 0..ECAM_SIZE + 16, port in 0xcf8_u16..0xd00, data: u64, width in 0_usize..4) {
            let bus = PciBus::default();
            let mut bytes = data.to_le_bytes();
            let bytes = &mut bytes[..1 << width];
            bus.memory_write(ECAM + at, bytes);
            bus.memory_read(ECAM + at, bytes);
            bus.port_write(port, bytes);
            bus.port_read(port, bytes);
        }
    }
}
