//! The slots into which functions are put, and from which they are taken, while vCPUs run. Each has a lock of its own, which an access
//! to configuration space or a BAR takes for as long as it needs to find its function: requests and interrupts of a device don't come by.

use super::PciFunction;
use crate::machine::layout::{HOT_SLOT_FIRST, HOT_SLOTS};
use crate::machine::sync::lock;
use std::sync::{Arc, Mutex};

/// Slots [`HOT_SLOT_FIRST`] and up, as far as nothing was there at the start.
#[derive(Default)]
pub struct HotSlots([Mutex<Option<Arc<dyn PciFunction>>>; HOT_SLOTS]);

impl HotSlots {
    /// What is in `slot`, counted from the bus' first.
    pub fn get(&self, slot: u8) -> Option<Arc<dyn PciFunction>> {
        lock(self.place(slot)?).clone()
    }

    /// Puts `function` into `slot`. Whoever was there leaves the bus.
    pub fn put(&self, slot: u8, function: Arc<dyn PciFunction>) {
        if let Some(place) = self.place(slot)
            && let Some(before) = lock(place).replace(function)
        {
            before.withdraw();
        }
    }

    /// Empties `slot`, and gives what was there: its new owner must [`withdraw`](PciFunction::withdraw) it.
    pub fn take(&self, slot: u8) -> Option<Arc<dyn PciFunction>> {
        lock(self.place(slot)?).take()
    }

    /// What decodes `length` bytes of guest memory at `address`, and the offset in its BAR.
    pub(super) fn decode(&self, address: u64, length: u64) -> Option<(Arc<dyn PciFunction>, u64)> {
        let mut functions = self.0.iter().filter_map(|place| lock(place).clone());
        functions.find_map(|function| {
            let offset = super::offset_in(&function.window(), address, length)?;
            Some((function, offset))
        })
    }

    fn place(&self, slot: u8) -> Option<&Mutex<Option<Arc<dyn PciFunction>>>> {
        self.0.get(usize::from(slot.checked_sub(HOT_SLOT_FIRST)?))
    }
}
