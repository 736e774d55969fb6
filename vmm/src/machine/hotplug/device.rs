//! What the guest sees: a register that says which slots were filled, one that says which it is asked to empty, and one into which
//! its _EJ0 methods (ACPI 6.5, 6.3.3) write what they are done with. Bit N is slot [`HOT_SLOT_FIRST`] + N.

use crate::machine::layout::{HOT_SLOT_FIRST, HOT_SLOTS};
use crate::machine::pci::{HotSlots, PciFunction};
use crate::machine::power::Power;
use crate::machine::sync::lock;
use std::sync::{Arc, Mutex};

const FILLED: u16 = 0;
const ASKED: u16 = 1;
const EJECT: u16 = 2;

/// What becomes of a slot's function when the guest has emptied the slot. Called by vCPUs: it must not wait.
pub(in crate::machine) type Emptied = dyn Fn(u8, Arc<dyn PciFunction>) + Send + Sync;

/// The registers.
pub(in crate::machine) struct Slots {
    power: Arc<Power>,
    slots: Arc<HotSlots>,
    state: Mutex<State>,
    /// Told of each slot that the guest emptied, and given what was there.
    emptied: Box<Emptied>,
}

#[derive(Default)]
struct State {
    /// Filled since the guest looked last.
    filled: u8,
    /// To be emptied, and not told to the guest yet.
    asked: u8,
    /// May be ejected: from when the owner asked until the guest does.
    released: u8,
}

impl Slots {
    /// Registers of `slots`, whose events `power` tells.
    pub(in crate::machine) fn new(power: Arc<Power>, slots: Arc<HotSlots>, emptied: Box<Emptied>) -> Self {
        Self { power, slots, state: Mutex::default(), emptied }
    }

    /// Puts `function` into `slot`, which must be empty, and tells the guest.
    pub(in crate::machine) fn fill(&self, slot: u8, function: Arc<dyn PciFunction>) {
        let bit = bit(slot);
        {
            let mut state = lock(&self.state);
            self.slots.put(slot, function);
            state.filled |= bit;
            state.asked &= !bit;
            state.released &= !bit;
        }
        self.power.tell_slots();
    }

    /// Asks the guest to empty `slot`; false where it has done so.
    pub(in crate::machine) fn ask(&self, slot: u8) -> bool {
        {
            let mut state = lock(&self.state);
            if self.slots.get(slot).is_none() {
                return false;
            }
            state.asked |= bit(slot);
            state.released |= bit(slot);
        }
        self.power.tell_slots();
        true
    }

    /// A byte from register `at`.
    pub(in crate::machine) fn read(&self, at: u16) -> u8 {
        let mut state = lock(&self.state);
        match at {
            FILLED => std::mem::take(&mut state.filled),
            ASKED => std::mem::take(&mut state.asked),
            _ => 0,
        }
    }

    /// A byte to register `at`. A slot that nobody asked for stays as it is: which devices the machine has is its owner's to say.
    pub(in crate::machine) fn write(&self, at: u16, value: u8) {
        if at != EJECT {
            return;
        }
        for slot in (0..HOT_SLOTS as u8).map(|index| HOT_SLOT_FIRST + index).filter(|slot| value & bit(*slot) != 0) {
            if let Some(function) = self.empty(slot) {
                function.withdraw();
                (self.emptied)(slot, function);
            }
        }
    }

    fn empty(&self, slot: u8) -> Option<Arc<dyn PciFunction>> {
        let mut state = lock(&self.state);
        if state.released & bit(slot) == 0 {
            return None;
        }
        state.released &= !bit(slot);
        state.asked &= !bit(slot);
        state.filled &= !bit(slot);
        self.slots.take(slot)
    }
}

/// The registers' bit of `slot`; none for a slot that they do not have.
fn bit(slot: u8) -> u8 {
    slot.checked_sub(HOT_SLOT_FIRST).and_then(|index| 1_u8.checked_shl(index.into())).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::control::Control;
    use crate::machine::event::Events;
    use crate::machine::pci::HostBridge;
    use crate::machine::power::EVENT_SLOTS;
    use crate::machine::wires::new_event;
    use proptest::prelude::*;
    use std::sync::mpsc::{Receiver, channel};

    const EVENTS: u16 = 3;

    struct Rig {
        power: Arc<Power>,
        slots: Arc<HotSlots>,
        registers: Slots,
        emptied: Receiver<u8>,
    }

    fn rig() -> Rig {
        let control = Arc::new(Control::new(Arc::new(Events::new().expect("eventfd"))));
        let power = Arc::new(Power::new(control, new_event().expect("eventfd")));
        let (slots, (tell, emptied)) = (Arc::new(HotSlots::default()), channel());
        let registers =
            Slots::new(power.clone(), slots.clone(), Box::new(move |slot, _| tell.send(slot).expect("heard")));
        Rig { power, slots, registers, emptied }
    }

    #[test]
    fn a_slot_is_filled_asked_for_and_emptied_and_each_is_told_once() {
        let Rig { power, slots, registers, emptied } = rig();
        assert_eq!((registers.read(FILLED), registers.read(ASKED), registers.read(EJECT)), (0, 0, 0));
        registers.fill(25, Arc::new(HostBridge::default()));
        assert_eq!(power.read(EVENTS), EVENT_SLOTS);
        assert_eq!((registers.read(FILLED), registers.read(FILLED), registers.read(ASKED)), (2, 0, 0));
        assert!(registers.ask(25) && !registers.ask(24));
        assert_eq!(power.read(EVENTS), EVENT_SLOTS);
        assert_eq!((registers.read(ASKED), registers.read(ASKED)), (2, 0));
        assert!(slots.get(25).is_some() && emptied.try_recv().is_err(), "it is there until the guest ejects it");
        registers.write(EJECT, 2);
        assert!(slots.get(25).is_none());
        assert_eq!((emptied.try_recv(), registers.ask(25)), (Ok(25), false));
    }

    #[test]
    fn what_nobody_asked_for_is_not_ejected() {
        let Rig { slots, registers, emptied, .. } = rig();
        registers.fill(24, Arc::new(HostBridge::default()));
        registers.write(EJECT, 0xff);
        assert!(slots.get(24).is_some());
        assert!(registers.ask(24));
        registers.write(EJECT, 1);
        registers.fill(24, Arc::new(HostBridge::default()));
        registers.write(EJECT, 1);
        assert!(slots.get(24).is_some(), "it was asked for the one before");
        assert_eq!((emptied.try_recv().ok(), emptied.try_recv().ok()), (Some(24), None));
    }

    #[test]
    fn a_slot_that_there_is_not_has_no_bit() {
        let bits: Vec<_> = (0..=255).filter(|slot| bit(*slot) != 0).collect();
        assert_eq!(bits, (24..32).collect::<Vec<_>>());
        assert_eq!((bit(24), bit(31)), (1, 0x80));
    }

    proptest! {
        /// Owner and guest do anything: what is in a slot leaves it by an eject that was asked for, once, and by nothing else.
        #[test]
        fn only_what_was_asked_for_leaves(steps in proptest::collection::vec((0..4_u8, 0..8_u8, any::<u8>(), any::<u16>()), 0..64)) {
            let Rig { slots, registers, emptied, .. } = rig();
            let (mut there, mut asked) = (0_u8, 0_u8);
            for (what, index, value, at) in steps {
                let (slot, bit) = (HOT_SLOT_FIRST + index, 1 << index);
                match what {
                    0 if there & bit == 0 => {
                        registers.fill(slot, Arc::new(HostBridge::default()));
                        there |= bit;
                        asked &= !bit;
                    }
                    1 => {
                        prop_assert_eq!(registers.ask(slot), there & bit != 0);
                        asked |= there & bit;
                    }
                    2 => {
                        let at = at % 4;
                        registers.write(at, value);
                        let gone = if at == EJECT { value & asked & there } else { 0 };
                        let told = emptied.try_iter().fold(0, |told, slot| told | 1_u8 << (slot - HOT_SLOT_FIRST));
                        prop_assert_eq!(told, gone);
                        there &= !gone;
                        asked &= !gone;
                    }
                    _ => {
                        let said = registers.read(at);
                        prop_assert!(said & !there == 0 && (at < 2 || said == 0));
                    }
                }
                let found = (0..8).filter(|index| slots.get(HOT_SLOT_FIRST + index).is_some());
                prop_assert_eq!(found.fold(0, |all, index| all | 1_u8 << index), there);
            }
        }
    }
}
