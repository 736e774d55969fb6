//! Accesses to ports and to memory that is no RAM as a function of bytes, for fuzzing: a machine with the devices that are not
//! virtio's (serial line, power switch, clock chip, panic device, slots of which one is to be emptied), and a guest that does what the bytes say.

use super::Bus;
use crate::machine::control::Control;
use crate::machine::event::Events;
use crate::machine::hotplug::Slots;
use crate::machine::layout::{
    ECAM, HOT_SLOT_FIRST, HOTPLUG_PORT, HOTPLUG_PORTS, PCI_BAR_STRIDE, PCI_WINDOW, POWER_PORT, POWER_PORTS, RTC_PORT,
    RTC_PORTS, SERIAL_PORT, SERIAL_PORTS,
};
use crate::machine::panic::PanicDevice;
use crate::machine::pci::{HostBridge, PciBus, PciFunction};
use crate::machine::power::Power;
use crate::machine::serial::SerialPort;
use crate::machine::wires::new_event;
use std::sync::Arc;

/// Bytes of one access: kind, width, where (2), what (8).
const ACCESS: usize = 12;
const SLOT: u8 = 1;
const SLOT_CONFIG: u64 = ECAM + 0x8000;

/// Makes the accesses. None ends the machine but a write to the power switch or to where the panic device is, and whatever nobody
/// answers for reads as ones.
pub fn fuzz_bus(data: &[u8]) {
    let Some((bus, events, panic)) = machine() else { return };
    for access in data.chunks_exact(ACCESS).take(256) {
        let [kind, width, low, high, value @ ..] = access else { return };
        let at = u16::from_le_bytes([*low, *high]);
        let mut bytes = [0; 8];
        bytes.copy_from_slice(value);
        let (write, stray) = (kind & 1 == 1, bus.stray());
        let may_end = match target(*kind, at) {
            Target::Port(port) => {
                let bytes = &mut bytes[..1 << (width % 3)];
                if write {
                    bus.port_out(port, bytes)
                } else {
                    bus.port_in(port, bytes)
                }
                assert!(write || bus.stray() == stray || bytes.iter().all(|byte| *byte == 0xff), "{port:#x}");
                (POWER_PORT..POWER_PORT + POWER_PORTS).contains(&port)
            }
            Target::Memory(address) => {
                let (bytes, window) = (&mut bytes[..1 << (width % 4)], panic.window());
                if write {
                    bus.memory_write(address, bytes)
                } else {
                    bus.memory_read(address, bytes)
                }
                assert!(write || bus.stray() == stray || bytes.iter().all(|byte| *byte == 0xff), "{address:#x}");
                window.contains(&address)
            }
        };
        assert!(events.take().is_none() || write && may_end, "an access of kind {kind} at {at:#x} ended the machine");
    }
}

enum Target {
    Port(u16),
    Memory(u64),
}

/// Mostly where something answers.
fn target(kind: u8, at: u16) -> Target {
    match kind >> 1 & 7 {
        0 => Target::Port(SERIAL_PORT + at % SERIAL_PORTS),
        1 => Target::Port(HOTPLUG_PORT + at % HOTPLUG_PORTS),
        2 => Target::Port(POWER_PORT + at % POWER_PORTS),
        3 => Target::Port(RTC_PORT + at % RTC_PORTS),
        4 => Target::Port(at),
        5 => Target::Memory(SLOT_CONFIG + u64::from(at % 0x104)),
        6 => Target::Memory(PCI_WINDOW + u64::from(SLOT) * PCI_BAR_STRIDE + u64::from(at % 0x18)),
        _ => Target::Memory(u64::from(at) << 16),
    }
}

fn machine() -> Option<(Bus, Arc<Events>, Arc<PanicDevice>)> {
    let events = Arc::new(Events::new().ok()?);
    let control = Arc::new(Control::new(events.clone()));
    let panic = Arc::new(PanicDevice::new(control.clone(), SLOT));
    let mut pci = PciBus::default();
    pci.add(panic.clone()).ok()?;
    let serial = Arc::new(SerialPort::new(new_event().ok()?, Box::new(std::io::sink())).ok()?);
    let power = Arc::new(Power::new(control, new_event().ok()?));
    let slots = Arc::new(Slots::new(power.clone(), pci.hot().clone(), Box::new(|_, _| ())));
    slots.fill(HOT_SLOT_FIRST, Arc::new(HostBridge::default()));
    slots.ask(HOT_SLOT_FIRST);
    Some((Bus::new(serial, power, pci, Some(slots)), events, panic))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::virtio::fuzzing::mutate;

    fn access(kind: u8, width: u8, at: u16, value: u64) -> Vec<u8> {
        [&[kind, width][..], &at.to_le_bytes(), &value.to_le_bytes()].concat()
    }

    /// The serial line set up and used, the panic device turned on and told, the button's register read, power off, reset, the
    /// clock's year read, a slot emptied.
    #[test]
    fn accesses_and_their_mutations_are_survived() {
        let seed: Vec<u8> = [
            access(1, 0, 3, 0x83),
            access(1, 0, 0, 1),
            access(1, 0, 3, 3),
            access(1, 0, 1, 0xf),
            access(1, 0, 4, 0x1b),
            access(1, 2, 0, 0x6f6c_6c65),
            access(0, 0, 5, 0),
            access(11, 1, 4, 2),
            access(13, 0, 0, 1),
            access(12, 0, 0, 0),
            access(4, 0, 3, 0),
            access(5, 0, 0, 0x34),
            access(5, 0, 2, 1),
            access(7, 0, 0, 9),
            access(6, 0, 1, 0),
            access(8, 2, 0x80, 0),
            access(2, 0, 0, 0),
            access(2, 0, 1, 0),
            access(3, 0, 2, 1),
            access(3, 2, 2, u64::MAX),
            access(14, 3, 0xd000, 0),
        ]
        .concat();
        fuzz_bus(&seed);
        mutate(&seed, 20_000, fuzz_bus);
    }
}
