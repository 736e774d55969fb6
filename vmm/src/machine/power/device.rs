//! What the guest sees of its power switch: ACPI's reduced-hardware sleep and reset registers (ACPI 6.5, 4.8.3.7 and
//! 4.8.3.6), and an event register that its generic event device (5.6.9) reads.

use crate::machine::control::Control;
use crate::machine::event::MachineEvent;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use vmm_sys_util::eventfd::EventFd;

const SLEEP_CONTROL: u16 = 0;
const RESET: u16 = 2;
const EVENTS: u16 = 3;
/// The sleep type that the DSDT's \_S5 names.
pub(in crate::machine) const SLEEP_TYPE_OFF: u8 = 5;
const SLEEP_ENABLE: u8 = 1 << 5;
/// What the FADT says to write into the reset register.
pub(in crate::machine) const RESET_VALUE: u8 = 1;
/// The event register's bit for the power button.
pub(in crate::machine) const EVENT_BUTTON: u8 = 1;

/// The event register's bit for another VM generation id.
pub(in crate::machine) const EVENT_GENERATION: u8 = 1 << 1;

/// The event register's bit for PCI slots that were filled, or are to be emptied.
pub(in crate::machine) const EVENT_SLOTS: u8 = 1 << 2;

/// The power switch.
pub(crate) struct Power {
    control: Arc<Control>,
    interrupt: EventFd,
    events: AtomicU8,
}

impl Power {
    /// A switch that ends the machine through `control` and rings the guest through `interrupt`.
    pub(crate) fn new(control: Arc<Control>, interrupt: EventFd) -> Self {
        Self { control, interrupt, events: AtomicU8::new(0) }
    }

    /// Presses the button.
    pub(crate) fn press(&self) {
        self.tell(EVENT_BUTTON);
    }

    /// Tells the guest that its generation id is another one.
    pub(crate) fn tell_generation(&self) {
        self.tell(EVENT_GENERATION);
    }

    /// Tells the guest to look at the PCI slots' registers.
    pub(crate) fn tell_slots(&self) {
        self.tell(EVENT_SLOTS);
    }

    fn tell(&self, event: u8) {
        self.events.fetch_or(event, Ordering::SeqCst);
        // The counter can't overflow: KVM drains it.
        let _ = self.interrupt.write(1);
    }

    /// A byte from register `at`.
    pub(crate) fn read(&self, at: u16) -> u8 {
        match at {
            EVENTS => self.events.swap(0, Ordering::SeqCst),
            _ => 0,
        }
    }

    /// A byte to register `at`.
    pub(crate) fn write(&self, at: u16, value: u8) {
        match (at, value) {
            (SLEEP_CONTROL, _) if value & SLEEP_ENABLE != 0 && value >> 2 & 7 == SLEEP_TYPE_OFF => {
                self.control.end(MachineEvent::PowerOff);
            }
            (RESET, RESET_VALUE) => self.control.end(MachineEvent::Reset),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::event::Events;
    use crate::machine::wires::new_event;

    fn power() -> (Arc<Events>, Power) {
        let events = Arc::new(Events::new().expect("eventfd"));
        let control = Arc::new(Control::new(events.clone()));
        (events, Power::new(control, new_event().expect("eventfd")))
    }

    #[test]
    fn only_the_right_words_end_the_machine() {
        let (events, power) = power();
        for (at, value) in (0..4).flat_map(|at| (0..=255).map(move |value| (at, value))) {
            power.write(at, value);
            let event = match (at, value) {
                (0, _) if value & 0x3c == 0x34 => Some(MachineEvent::PowerOff),
                (2, 1) => Some(MachineEvent::Reset),
                _ => None,
            };
            assert_eq!(events.take(), event, "{at} {value:#x}");
        }
    }

    #[test]
    fn the_button_is_seen_once() {
        let (_, power) = power();
        assert_eq!(power.read(3), 0);
        power.press();
        assert!(power.interrupt.read().is_ok());
        assert_eq!((power.read(3), power.read(3)), (1, 0));
    }
}
