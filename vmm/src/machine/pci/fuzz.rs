//! Accesses to configuration space and BARs as a function of bytes, for fuzzing: a bus with a disk on it, and a driver that does
//! what the bytes say.

use super::PciBus;
use crate::machine::block::{BlockDevice, DiskSettings, fuzz::Scratch};
use crate::machine::layout::{ECAM, PCI_CONFIG_PORT};
use crate::machine::memory::GuestRam;
use crate::machine::virtio::VirtioPci;
use crate::machine::wires::{Message, WireError, Wires, new_event};
use std::sync::Arc;
use vm_memory::GuestAddress;
use vmm_sys_util::eventfd::EventFd;

/// Bytes of one access: kind, width, where (4), what (8).
const ACCESS: usize = 14;
const BAR_SIZE: u64 = 0x8000;
const SLOT_1: u64 = ECAM + 0x8000;

/// Wires that lead nowhere.
struct Loose;

impl Wires for Loose {
    fn message_line(&self) -> Result<(u32, EventFd), WireError> {
        Ok((0, new_event()?))
    }
    fn route(&self, _line: u32, _event: &EventFd, _message: Message) -> Result<(), WireError> {
        Ok(())
    }
    fn release_line(&self, _line: u32, _event: &EventFd) -> Result<(), WireError> {
        Ok(())
    }
    fn connect_doorbell(&self, _address: u64, _event: &EventFd) -> Result<(), WireError> {
        Ok(())
    }
    fn disconnect_doorbell(&self, _address: u64, _event: &EventFd) -> Result<(), WireError> {
        Ok(())
    }
}

/// Makes the accesses; after each, the function is still who it was, and decodes nothing or one aligned window.
pub fn fuzz_pci(data: &[u8]) {
    let Some((bus, function)) = bus() else { return };
    for access in data.chunks_exact(ACCESS).take(256) {
        let [kind, width, a, b, c, d, value @ ..] = access else { return };
        let at = u32::from_le_bytes([*a, *b, *c, *d]);
        let mut bytes = [0; 8];
        bytes.copy_from_slice(value);
        let bytes = &mut bytes[..1 << (width % 4)];
        perform(&bus, *kind, at, bytes);

        let mut id = [0; 4];
        assert!(bus.memory_read(SLOT_1, &mut id) && id == [0xf4, 0x1a, 0x42, 0x10], "the function is another one");
        let window = super::PciFunction::window(&*function);
        let aligned = window.start.is_multiple_of(BAR_SIZE) && window.end - window.start == BAR_SIZE;
        assert!(window.is_empty() || aligned && window.end <= 1 << 32, "{window:x?}");
    }
}

fn bus() -> Option<(PciBus, Arc<VirtioPci>)> {
    let memory = GuestRam::from_ranges(&[(GuestAddress(0), 64 << 10)]).ok()?;
    let settings = DiskSettings { queues: 2, queue_size: 16, ..DiskSettings::default() };
    let disk = BlockDevice::new("fuzz", Arc::new(Scratch::default()), &settings).ok()?;
    let function = Arc::new(VirtioPci::new(Arc::new(disk), 1, memory, Arc::new(Loose)).ok()?);
    let mut bus = PciBus::default();
    bus.add(function.clone()).ok()?;
    Some((bus, function))
}

fn perform(bus: &PciBus, kind: u8, at: u32, bytes: &mut [u8]) {
    let port = PCI_CONFIG_PORT + (at % 8) as u16;
    // Configuration space of the disk for most, so that not all accesses go nowhere.
    let register = SLOT_1 + u64::from(at % 0x104);
    let in_bar = |bus: &PciBus| {
        let mut base = [0; 4];
        bus.memory_read(SLOT_1 + 0x10, &mut base);
        u64::from(u32::from_le_bytes(base) & !0xf) + u64::from(at) % (BAR_SIZE + 8)
    };
    match kind % 8 {
        0 | 1 => drop(bus.memory_write(register, bytes)),
        2 => drop(bus.memory_read(register, bytes)),
        3 => drop(bus.memory_write(ECAM + u64::from(at), bytes)),
        4 => bus.port_write(port, bytes),
        5 => bus.port_read(port, bytes),
        6 => drop(bus.memory_write(in_bar(bus), bytes)),
        _ => drop(bus.memory_read(in_bar(bus), bytes)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn access(kind: u8, width: u8, at: u32, value: u64) -> Vec<u8> {
        [&[kind, width][..], &at.to_le_bytes(), &value.to_le_bytes()].concat()
    }

    /// A driver that turns memory on, negotiates, sets a queue up and resets; and the window through configuration space.
    fn seed() -> Vec<u8> {
        let mut all = access(0, 1, 4, 6);
        for (at, width, value) in [(0x14, 0, 3), (8, 2, 1), (0xc, 2, 1), (0x14, 0, 11), (0x18, 1, 16)] {
            all.extend(access(6, width, at, value));
        }
        for (at, value) in [(0x20, 0x1000), (0x28, 0x2000), (0x30, 0x3000)] {
            all.extend(access(6, 3, at, value));
        }
        for (at, width, value) in [(0x1c, 1, 1), (0x14, 0, 15), (0x3000, 1, 0), (0x4000, 3, 0xfee0_0000), (0x14, 0, 0)]
        {
            all.extend(access(6, width, at, value));
        }
        for (at, value) in [(0x10, 0xd000_0000), (0x94, 0x14), (0x98, 1), (0x9c, 3), (0x82, 0xc000)] {
            all.extend(access(0, 2, at, value));
        }
        all.extend(access(4, 2, 0, 0x8000_0810));
        all.extend(access(4, 2, 4, u64::MAX));
        all
    }

    #[test]
    fn accesses_and_their_mutations_are_survived() {
        let seed = seed();
        fuzz_pci(&seed);
        let mut random = 0x9e37_79b9_7f4a_7c15_u64;
        let mut next = move || {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            random as usize
        };
        for _ in 0..3_000 {
            let mut data = seed.clone();
            for _ in 0..1 + next() % 16 {
                let (at, from) = (next() % data.len(), next() % seed.len() / ACCESS * ACCESS);
                match next() % 3 {
                    0 => data[at] = next() as u8,
                    1 => data[at] ^= 1 << (next() % 8),
                    _ => data.extend_from_slice(&seed[from..from + ACCESS]),
                }
            }
            fuzz_pci(&data);
        }
    }
}
