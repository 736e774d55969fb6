//! Off, reset, and the power button, as ACPI describes them: hardware-reduced as in fealty, and a PC's fixed registers as in QEMU.

use crate::acpi::{Acpi, AcpiError};
use crate::apic;
use crate::interrupts::{Source, sleep_forever};
use crate::memory::{Registers, number};
use crate::port;
use crate::tables::triple_fault;

// Fields of the FADT (ACPI 6.5, 5.2.9).
const PM1A_EVENT: usize = 56;
const PM1A_CONTROL: usize = 64;
const FLAGS: usize = 112;
const RESET_REGISTER: usize = 116;
const RESET_VALUE: usize = 128;
const SLEEP_CONTROL: usize = 244;
const FLAG_RESET: u64 = 1 << 10;
const FLAG_HARDWARE_REDUCED: u64 = 1 << 20;

/// fealty's event device: bit 0 of the byte is the power button, and reading clears it.
const EVENT_PORT: u16 = 0x603;
const EVENT_LINE: u8 = 16;
const EVENT_BUTTON: u8 = 1;
/// And bit 1 says that the generation id is another one.
const EVENT_GENERATION: u8 = 1 << 1;
/// And bit 2 that PCI slots were filled, or are to be emptied: which, these two say, and forget it; the third is written with those
/// that are done with.
const EVENT_SLOTS: u8 = 1 << 2;
const SLOTS_FILLED: u16 = 0x610;
const SLOTS_ASKED: u16 = 0x611;
const SLOTS_EJECT: u16 = 0x612;
/// The button's bit in a PC's PM1 status, and in the enable register after it.
const PM1_BUTTON: u16 = 1 << 8;
const PM1_ENABLE: u16 = 2;

/// How this machine ends.
pub struct Power {
    off: Off,
    reset: Option<(Register, u8)>,
    button: Button,
}

enum Off {
    /// Hardware-reduced: one byte to one register.
    SleepControl(Register, u8),
    /// 16 bits to the PM1a control port.
    Pm1(u16, u16),
}

enum Button {
    /// fealty's event device.
    EventPort,
    /// PM1a status port.
    Pm1(u16),
}

/// A one-byte register in a generic address structure.
enum Register {
    Memory(u64),
    Port(u16),
}

impl Power {
    /// Reads the FADT.
    pub fn find(acpi: Acpi) -> Result<Self, AcpiError> {
        let fadt = acpi.table("FACP")?;
        let sleep_type = acpi.off_sleep_type()?;
        let flags = number::<4>(fadt, FLAGS);
        let reset = (flags & FLAG_RESET != 0)
            .then(|| (Register::parse(&fadt[RESET_REGISTER..]), number::<1>(fadt, RESET_VALUE) as u8));
        Ok(if flags & FLAG_HARDWARE_REDUCED != 0 {
            let control = Register::parse(fadt.get(SLEEP_CONTROL..).ok_or(AcpiError::Missing("SLEEP_CONTROL_REG"))?);
            Self { off: Off::SleepControl(control, sleep_type << 2 | 1 << 5), reset, button: Button::EventPort }
        } else {
            let control = number::<4>(fadt, PM1A_CONTROL) as u16;
            let status = number::<4>(fadt, PM1A_EVENT) as u16;
            Self { off: Off::Pm1(control, u16::from(sleep_type) << 10 | 1 << 13), reset, button: Button::Pm1(status) }
        })
    }

    /// Powers off.
    pub fn off(&self) -> ! {
        match &self.off {
            Off::SleepControl(register, value) => register.write(*value),
            Off::Pm1(control, value) => port::write16(*control, *value),
        }
        sleep_forever()
    }

    /// Resets, by a triple fault where the FADT names no register.
    pub fn reset(&self) -> ! {
        match &self.reset {
            Some((register, value)) => register.write(*value),
            None => triple_fault(),
        }
        sleep_forever()
    }

    /// Waits for the power button.
    pub fn wait_for_button(&self) {
        match self.button {
            Button::EventPort => {
                wait_for_event(EVENT_BUTTON);
            }
            Button::Pm1(status) => {
                port::write16(status + PM1_ENABLE, PM1_BUTTON);
                apic::start_timer();
                while port::read16(status) & PM1_BUTTON == 0 {
                    apic::ticks();
                    Source::Timer.sleep();
                }
                apic::stop_timer();
                port::write16(status, PM1_BUTTON);
            }
        }
    }

    /// Waits until the generation id is another one.
    pub fn wait_for_generation() {
        wait_for_event(EVENT_GENERATION);
    }

    /// Waits until PCI slots were filled or are to be emptied: which, a bit each.
    pub fn wait_for_slots() -> (u8, u8) {
        wait_for_event(EVENT_SLOTS);
        (port::read8(SLOTS_FILLED), port::read8(SLOTS_ASKED))
    }

    /// Ejects what is in these slots, a bit each.
    pub fn eject(slots: u8) {
        port::write8(SLOTS_EJECT, slots);
    }

    /// Powers off without having read any table, as fealty and QEMU's q35 do it: for a guest that is lost anyway.
    pub fn last_resort() -> ! {
        port::write8(0x600, 5 << 2 | 1 << 5);
        port::write16(0x604, 1 << 13);
        sleep_forever()
    }
}

fn wait_for_event(event: u8) {
    apic::route(EVENT_LINE, Source::Acpi);
    while port::read8(EVENT_PORT) & event == 0 {
        Source::Acpi.sleep();
        Source::Acpi.take();
    }
}

impl Register {
    fn parse(generic_address: &[u8]) -> Self {
        let address = number::<8>(generic_address, 4);
        if generic_address.first() == Some(&1) { Self::Port(address as u16) } else { Self::Memory(address) }
    }

    fn write(&self, value: u8) {
        match *self {
            Self::Port(port) => port::write8(port, value),
            Self::Memory(address) => Registers::map(address, 1).write8(0, value),
        }
    }
}
