//! What a vCPU finds outside of RAM: ports and memory that devices answer for.

pub(super) mod fuzz;

use super::hotplug::Slots;
use super::layout::{
    HOTPLUG_PORT, HOTPLUG_PORTS, PCI_CONFIG_PORT, PCI_CONFIG_PORTS, POWER_PORT, POWER_PORTS, RTC_PORT, RTC_PORTS,
    SERIAL_PORT, SERIAL_PORTS,
};
use super::pci::PciBus;
use super::power::Power;
use super::rtc::Rtc;
use super::serial::SerialPort;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// All devices of a machine, by address.
pub(super) struct Bus {
    serial: Arc<SerialPort>,
    power: Arc<Power>,
    rtc: Rtc,
    pci: PciBus,
    slots: Option<Arc<Slots>>,
    stray: AtomicU64,
}

impl Bus {
    /// The buses of a machine; with `slots` PCI devices may come and go.
    pub(super) fn new(serial: Arc<SerialPort>, power: Arc<Power>, pci: PciBus, slots: Option<Arc<Slots>>) -> Self {
        Self { serial, power, rtc: Rtc::default(), pci, slots, stray: AtomicU64::new(0) }
    }

    /// A read of `data.len()` (1, 2 or 4) bytes from a port.
    pub(super) fn port_in(&self, port: u16, data: &mut [u8]) {
        match (port, &self.slots) {
            (SERIAL_PORT.., _) if port - SERIAL_PORT < SERIAL_PORTS => {
                bytes(port - SERIAL_PORT, data, |at, byte| *byte = self.serial.read(at));
            }
            (POWER_PORT.., _) if port - POWER_PORT < POWER_PORTS => {
                bytes(port - POWER_PORT, data, |at, byte| *byte = self.power.read(at));
            }
            (RTC_PORT.., _) if port - RTC_PORT < RTC_PORTS => {
                bytes(port - RTC_PORT, data, |at, byte| *byte = self.rtc.read(at));
            }
            (HOTPLUG_PORT.., Some(slots)) if port - HOTPLUG_PORT < HOTPLUG_PORTS => {
                bytes(port - HOTPLUG_PORT, data, |at, byte| *byte = slots.read(at));
            }
            (PCI_CONFIG_PORT.., _) if port - PCI_CONFIG_PORT < PCI_CONFIG_PORTS => self.pci.port_read(port, data),
            _ => {
                self.note_stray();
                data.fill(0xff);
            }
        }
    }

    /// A write of `data.len()` (1, 2 or 4) bytes to a port.
    pub(super) fn port_out(&self, port: u16, data: &[u8]) {
        let bytes = |first: u16| (first..).zip(data.iter().copied());
        match (port, &self.slots) {
            (SERIAL_PORT.., _) if port - SERIAL_PORT < SERIAL_PORTS => {
                bytes(port - SERIAL_PORT).for_each(|(at, byte)| self.serial.write(at, byte));
            }
            (POWER_PORT.., _) if port - POWER_PORT < POWER_PORTS => {
                bytes(port - POWER_PORT).for_each(|(at, byte)| self.power.write(at, byte));
            }
            (RTC_PORT.., _) if port - RTC_PORT < RTC_PORTS => {
                bytes(port - RTC_PORT).for_each(|(at, byte)| self.rtc.write(at, byte));
            }
            (HOTPLUG_PORT.., Some(slots)) if port - HOTPLUG_PORT < HOTPLUG_PORTS => {
                bytes(port - HOTPLUG_PORT).for_each(|(at, byte)| slots.write(at, byte));
            }
            (PCI_CONFIG_PORT.., _) if port - PCI_CONFIG_PORT < PCI_CONFIG_PORTS => self.pci.port_write(port, data),
            _ => self.note_stray(),
        }
    }

    /// A read of memory that is no RAM; what nobody answers for reads as ones.
    pub(super) fn memory_read(&self, address: u64, data: &mut [u8]) {
        if !self.pci.memory_read(address, data) {
            self.note_stray();
            data.fill(0xff);
        }
    }

    /// A write of memory that is no RAM; what nobody answers for is lost.
    pub(super) fn memory_write(&self, address: u64, data: &[u8]) {
        if !self.pci.memory_write(address, data) {
            self.note_stray();
        }
    }

    /// Accesses that nobody answered for.
    pub(super) fn stray(&self) -> u64 {
        self.stray.load(Ordering::Relaxed)
    }

    fn note_stray(&self) {
        self.stray.fetch_add(1, Ordering::Relaxed);
    }
}

/// A wide access to byte registers touches one after the other.
fn bytes(first: u16, data: &mut [u8], mut access: impl FnMut(u16, &mut u8)) {
    for (at, byte) in (first..).zip(data) {
        access(at, byte);
    }
}
