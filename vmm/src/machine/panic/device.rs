//! What the guest sees: a PCI function with one register, a byte. Reading it says which events are taken; writing one tells it.

use crate::machine::control::Control;
use crate::machine::event::MachineEvent;
use crate::machine::layout::{PCI_BAR_STRIDE, PCI_WINDOW};
use crate::machine::pci::{ConfigSpace, Identity, PciFunction, command};
use crate::machine::sync::lock;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

const VENDOR: u16 = 0x1b36;
const DEVICE: u16 = 0x0011;
/// System peripheral, other.
const CLASS: u32 = 0x08_8000;
const BAR_SIZE: u32 = 16;
/// The guest's kernel panicked, and nothing will come after it.
const PANICKED: u8 = 1;
/// It panicked, and a crash kernel that it had loaded goes on: this machine still has something to do.
const CRASH_LOADED: u8 = 1 << 1;

const NOWHERE: u64 = u64::MAX;

/// The device.
pub(in crate::machine) struct PanicDevice {
    control: Arc<Control>,
    config: Mutex<ConfigSpace>,
    /// The guest address that BAR 0 decodes, or `NOWHERE`.
    base: AtomicU64,
}

impl PanicDevice {
    /// The device in slot `slot`; a panic ends the machine through `control`.
    pub(in crate::machine) fn new(control: Arc<Control>, slot: u8) -> Self {
        let identity =
            Identity { vendor: VENDOR, device: DEVICE, class: CLASS, revision: 1, subsystem: (0x1af4, 0x1100) };
        let mut config = ConfigSpace::new(&identity);
        config.set_memory_bar((PCI_WINDOW + u64::from(slot) * PCI_BAR_STRIDE) as u32, BAR_SIZE);
        Self { control, config: Mutex::new(config), base: AtomicU64::new(NOWHERE) }
    }
}

impl PciFunction for PanicDevice {
    fn config_read(&self, offset: u8, data: &mut [u8]) {
        lock(&self.config).read(offset, data);
    }

    fn config_write(&self, offset: u8, data: &[u8]) {
        let mut config = lock(&self.config);
        config.write(offset, data);
        let decode = config.command() & command::MEMORY != 0;
        self.base.store(if decode { u64::from(config.bar()) } else { NOWHERE }, Ordering::SeqCst);
    }

    fn window(&self) -> Range<u64> {
        match self.base.load(Ordering::SeqCst) {
            NOWHERE => 0..0,
            base => base..base + u64::from(BAR_SIZE),
        }
    }

    fn bar_read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if let (0, [first, ..]) = (offset, data) {
            *first = PANICKED | CRASH_LOADED;
        }
    }

    fn bar_write(&self, offset: u64, data: &[u8]) {
        if let (0, [events, ..]) = (offset, data)
            && events & PANICKED != 0
        {
            self.control.end(MachineEvent::Panicked);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::event::Events;
    use proptest::prelude::*;

    fn device() -> (Arc<Events>, PanicDevice) {
        let events = Arc::new(Events::new().expect("eventfd"));
        (events.clone(), PanicDevice::new(Arc::new(Control::new(events)), 3))
    }

    #[test]
    fn only_a_panic_ends_the_machine() {
        let (events, device) = device();
        assert!(device.window().is_empty());
        device.config_write(4, &[2, 0]);
        assert_eq!(device.window(), 0xc003_0000..0xc003_0010);
        let mut byte = [0];
        device.bar_read(0, &mut byte);
        assert_eq!(byte, [3]);
        for (offset, value) in [(0, 0), (0, CRASH_LOADED), (1, PANICKED), (8, 0xff)] {
            device.bar_write(offset, &[value]);
            assert_eq!(events.take(), None);
        }
        device.bar_write(0, &[PANICKED]);
        assert_eq!(events.take(), Some(MachineEvent::Panicked));
    }

    proptest! {
        #[test]
        fn no_access_panics(register: u8, offset in 0_u64..16, value: u64, width in 0_usize..4) {
            let (_, device) = device();
            let mut data = value.to_le_bytes();
            let data = &mut data[..1 << width];
            device.config_write(register, data);
            device.config_read(register, data);
            device.bar_write(offset, data);
            device.bar_read(offset, data);
            let _ = device.window();
        }
    }
}
