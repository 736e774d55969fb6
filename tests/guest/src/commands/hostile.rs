//! `hostile`: a driver that does anything. It writes and reads configuration space, the structures in the BARs, doorbells, MSI-X tables
//! and the configuration ports at random, of all virtio devices but the first, which goes on being a disk.
//!
//! What it lets devices do is bounded so far that the guest itself survives: queues lie where no RAM is or where nothing of the guest
//! is, and interrupts carry vectors that it takes.

use crate::apic::MSI_ADDRESS;
use crate::interrupts::Source;
use crate::memory::Registers;
use crate::pci::Device;
use crate::port;
use crate::serial::line;

const VENDOR: u16 = 0x1af4;
/// Devices that are attacked, at most.
const DEVICES: usize = 16;
const WINDOW: u64 = 0xc000_0000;
const BAR_SIZE: u64 = 0x8000;
/// BARs of this size that are looked at; the loader put one at every second place.
const PLACES: u64 = 48;
/// That of the first device, in slot 1.
const DISK_PLACE: u64 = 2;
/// RAM that the guest does not use: 32 to 48 MiB.
const SAFE: u64 = 32 << 20;
const CONFIG_ADDRESS: u16 = 0xcf8;
const CONFIG_DATA: u16 = 0xcfc;

const BAR0: u64 = 0x10;
const QUEUE_ADDRESSES: core::ops::Range<u64> = 0x20..0x38;
const STATUS: u64 = 0x14;
const DRIVER_OK: u64 = 15;

struct Hostile {
    random: u64,
    slots: [u64; DEVICES],
    spaces: [Registers; DEVICES],
    devices: u64,
    window: Registers,
}

/// Makes `rounds` accesses, the same ones for the same `seed`.
pub fn run(ecam: u64, rounds: u64, seed: u64) {
    let window = Registers::map(WINDOW, PLACES * BAR_SIZE);
    let mut hostile = Hostile { random: seed | 1, slots: [0; DEVICES], spaces: [window; DEVICES], devices: 0, window };
    for (slot, device) in Device::of_vendor(ecam, VENDOR).skip(1).take(DEVICES) {
        let at = hostile.devices as usize;
        (hostile.slots[at], hostile.spaces[at]) = (slot, device.configuration());
        device.enable();
        hostile.devices += 1;
    }
    if hostile.devices == 0 {
        return line(format_args!("hostile to nobody"));
    }
    line(format_args!("hostile to {}", hostile.devices));
    (0..rounds).for_each(|_| hostile.attack());
    line(format_args!("hostile done"));
}

impl Hostile {
    fn attack(&mut self) {
        let device = self.below(self.devices) as usize;
        match self.below(8) {
            0 => {
                let (at, value) = (self.below(0x100), self.value());
                let value = if at & !3 == BAR0 { self.place() } else { value };
                let space = self.spaces[device];
                self.write(space, at, value);
            }
            1 => {
                let at = self.below(0x100);
                self.read(self.spaces[device], at);
            }
            2 => {
                let register = self.below(0x100) & !3;
                let (place, value) = (self.place(), self.value());
                port::write32(CONFIG_ADDRESS, (1 << 31 | self.slots[device] << 11 | register) as u32);
                port::write32(CONFIG_DATA, if register == BAR0 { place } else { value } as u32);
            }
            // Each device's BAR, wherever that is by now; and the loader's places.
            3 => self.bring_up(device),
            4 => {
                let (at, value) = (0x3000 + self.below(0x60), self.value());
                self.at_bar(device, at, value);
            }
            5 => {
                let (at, value) = (0x4000 + self.below(0x140) / 4 * 4, self.message());
                self.at_bar(device, at, value);
            }
            6 => {
                let (page, at) = (self.below(8) << 12, self.below(0x60));
                let base = self.below(PLACES) * BAR_SIZE;
                self.read(self.window.from(base), page + at);
            }
            _ => {
                let (page, at) = (self.below(3) << 12, self.below(0x40));
                let value = if page == 0 && QUEUE_ADDRESSES.contains(&at) { self.queue() } else { self.value() };
                self.at_bar(device, page + at, value);
            }
        }
    }

    /// Half a driver: features, a queue or two, and go.
    fn bring_up(&mut self, device: usize) {
        self.spaces[device].write16(4, 6);
        for (at, value) in [(STATUS, 0), (STATUS, 3), (8, 1), (0xc, 1), (8, 0), (0xc, 0), (STATUS, 11)] {
            self.at_bar_wide(device, at, value);
        }
        for queue in 0..2 {
            let size = 1 << self.below(9);
            self.at_bar_wide(device, 0x16, queue);
            self.at_bar_wide(device, 0x18, size);
            for at in QUEUE_ADDRESSES.step_by(8) {
                let address = self.queue();
                self.at_bar_wide(device, at, address);
                self.at_bar_wide(device, at + 4, 0);
            }
            self.at_bar_wide(device, 0x1c, 1);
        }
        self.at_bar_wide(device, STATUS, DRIVER_OK);
        self.at_bar_wide(device, 0x3000, 0);
    }

    /// The device's BAR, if it is in the window.
    fn bar(&self, device: usize) -> Option<Registers> {
        let base = u64::from(self.spaces[device].read32(BAR0) & !0xf);
        base.checked_sub(WINDOW).filter(|at| *at < PLACES * BAR_SIZE - BAR_SIZE).map(|at| self.window.from(at))
    }

    fn at_bar(&mut self, device: usize, at: u64, value: u64) {
        if let Some(bar) = self.bar(device) {
            self.write(bar, at, value);
        }
    }

    /// A field of the common configuration in its own width.
    fn at_bar_wide(&mut self, device: usize, at: u64, value: u64) {
        let Some(bar) = self.bar(device) else { return };
        match at {
            STATUS => bar.write8(at, value as u8),
            0x16..0x20 | 0x3000.. => bar.write16(at, value as u16),
            _ => bar.write32(at, value as u32),
        }
    }

    fn write(&mut self, to: Registers, at: u64, value: u64) {
        match self.below(4) {
            0 => to.write8(at, value as u8),
            1 => to.write16(at & !1, value as u16),
            _ => to.write32(at & !3, value as u32),
        }
    }

    fn read(&mut self, from: Registers, at: u64) {
        match self.below(4) {
            0 => drop(from.read8(at)),
            1 => drop(from.read16(at & !1)),
            _ => drop(from.read32(at & !3)),
        }
    }

    fn value(&mut self) -> u64 {
        match self.below(6) {
            0 => 0,
            1 => 1,
            2 => u64::MAX,
            3 => 1 << self.below(32),
            4 => self.below(256),
            _ => self.next(),
        }
    }

    /// Where a BAR may go: mostly where the window is looked at, also onto others, RAM, the interrupt controllers and ECAM.
    fn place(&mut self) -> u64 {
        match self.below(8) {
            0 => [0, 0xffff_ffff, 0x20_0000, 0xe000_0000, 0xfec0_0000, 0xfee0_0000, 0xffff_8000, 0x1000_0000]
                [self.below(8) as usize],
            // An access to where two are goes to one of them, and that must not be the disk: its place is left alone.
            _ => WINDOW + (DISK_PLACE + 1 + self.below(PLACES - 1)) % PLACES * BAR_SIZE,
        }
    }

    fn queue(&mut self) -> u64 {
        match self.below(8) {
            0 => u64::MAX,
            1 => 0xf000_0000,
            2 => SAFE + 1,
            _ => SAFE + self.below(16 << 20) / 4096 * 4096,
        }
    }

    /// A word of an MSI-X entry that does no harm as address, data or mask.
    fn message(&mut self) -> u64 {
        match self.below(4) {
            0 => 0,
            1 => MSI_ADDRESS,
            2 => 1,
            _ => u64::from(Source::Device.vector()),
        }
    }

    fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }

    /// By xorshift.
    fn next(&mut self) -> u64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        self.random
    }
}
