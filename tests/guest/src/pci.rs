//! PCI devices on bus 0, found through the enhanced configuration space (PCI Express 6.0, 7.2.2).

use crate::memory::Registers;

const SLOTS: u64 = 32;
const ECAM_SLOT: u64 = 0x8000;

const IDS: u64 = 0x00;
const COMMAND: u64 = 0x04;
const BAR0: u64 = 0x10;
const CAPABILITIES: u64 = 0x34;
const COMMAND_MEMORY: u16 = 1 << 1;
const COMMAND_MASTER: u16 = 1 << 2;

/// Capability ids and the fields of an MSI-X capability and table entry.
const CAPABILITY_MSIX: u8 = 0x11;
const MSIX_CONTROL: u64 = 2;
const MSIX_TABLE: u64 = 4;
const MSIX_ENABLE: u16 = 1 << 15;
const MSIX_MASK_ALL: u16 = 1 << 14;
const MSIX_ENTRY: u64 = 16;

/// One function 0.
#[derive(Clone, Copy)]
pub struct Device {
    configuration: Registers,
}

impl Device {
    /// All functions 0 on bus 0 with this vendor and device id.
    pub fn find(ecam: u64, vendor: u16, device: u16) -> impl Iterator<Item = Self> {
        let space = Registers::map(ecam, SLOTS * ECAM_SLOT);
        let wanted = u32::from(device) << 16 | u32::from(vendor);
        (0..SLOTS)
            .map(move |slot| Self { configuration: space.from(slot * ECAM_SLOT) })
            .filter(move |found| found.configuration.read32(IDS) == wanted)
    }

    /// All functions 0 on bus 0 of this vendor, with their slots.
    pub fn of_vendor(ecam: u64, vendor: u16) -> impl Iterator<Item = (u64, Self)> {
        let space = Registers::map(ecam, SLOTS * ECAM_SLOT);
        (0..SLOTS)
            .map(move |slot| (slot, Self { configuration: space.from(slot * ECAM_SLOT) }))
            .filter(move |(_, found)| found.configuration.read32(IDS) & 0xffff == u32::from(vendor))
    }

    /// Its configuration space.
    pub fn configuration(self) -> Registers {
        self.configuration
    }

    /// Lets it decode its memory and reach ours.
    pub fn enable(self) {
        let command = self.configuration.read16(COMMAND);
        self.configuration.write16(COMMAND, command | COMMAND_MEMORY | COMMAND_MASTER);
    }

    /// Its capabilities as {id, registers}. The chain is followed at most as far as the space reaches.
    pub fn capabilities(self) -> impl Iterator<Item = (u8, Registers)> {
        let mut next = self.configuration.read8(CAPABILITIES) & !3;
        (0..48).map_while(move |_| {
            let at = self.configuration.from(u64::from(next));
            let here = (next >= 0x40).then(|| at.read16(0));
            next = here.unwrap_or(0).to_le_bytes()[1] & !3;
            here.map(|head| (head.to_le_bytes()[0], at))
        })
    }

    /// `length` bytes at `offset` into a memory BAR, mapped; `None` where the loader left it without an address.
    pub fn bar(self, index: u8, offset: u32, length: u64) -> Option<Registers> {
        let low = self.configuration.read32(BAR0 + 4 * u64::from(index));
        let wide = low & 0b111 == 0b100 && index < 5;
        let high = if wide { self.configuration.read32(BAR0 + 4 * u64::from(index) + 4) } else { 0 };
        let address = u64::from(high) << 32 | u64::from(low & !0xf);
        (index < 6 && low & 1 == 0 && address != 0).then(|| Registers::map(address + u64::from(offset), length))
    }

    /// Turns MSI-X on with entry 0 going to `address` with `data`. Whether the device has it.
    pub fn enable_msix(self, address: u64, data: u32) -> bool {
        let Some((_, capability)) = self.capabilities().find(|(id, _)| *id == CAPABILITY_MSIX) else { return false };
        let place = capability.read32(MSIX_TABLE);
        let Some(entry) = self.bar((place & 7) as u8, place & !7, MSIX_ENTRY) else { return false };
        let control = capability.read16(MSIX_CONTROL);
        capability.write16(MSIX_CONTROL, control | MSIX_ENABLE | MSIX_MASK_ALL);
        entry.write64(0, address);
        entry.write32(8, data);
        entry.write32(12, 0);
        capability.write16(MSIX_CONTROL, control & !MSIX_MASK_ALL | MSIX_ENABLE);
        true
    }
}
