//! What the guest sees of its generation: the bytes, whose address the ACPI device's ADDR says, and an event when they change.

use crate::machine::layout::GENERATION_ID;
use crate::machine::memory::GuestRam;
use crate::machine::power::Power;
use std::sync::Arc;
use vm_memory::{Bytes, GuestAddress};

/// The ACPI device's compatible ids: the document's, and the shorter one that other hypervisors use for it.
pub(in crate::machine) const COMPATIBLE: [&str; 2] = ["VM_Gen_Counter", "VMGENCTR"];
/// The object that says where the bytes are: a package of the address' low and high 32 bits.
pub(in crate::machine) const ADDRESS_NAME: &str = "ADDR";

/// The generation of a machine.
pub(in crate::machine) struct Generation {
    power: Arc<Power>,
}

impl Generation {
    /// Writes the first id, before the guest starts.
    pub(in crate::machine) fn write(ram: &GuestRam) -> std::io::Result<()> {
        let mut id = [0; 16];
        getrandom::fill(&mut id).map_err(|_| std::io::Error::other("the kernel gives no random numbers"))?;
        ram.write_slice(&id, GuestAddress(GENERATION_ID)).map_err(std::io::Error::other)
    }

    /// The generation of a machine whose events `power` tells.
    pub(in crate::machine) fn new(power: Arc<Power>) -> Self {
        Self { power }
    }

    /// Begins another one: before the vCPUs of a restored machine run.
    pub(in crate::machine) fn renew(&self, ram: &GuestRam) -> std::io::Result<()> {
        Self::write(ram)?;
        self.power.tell_generation();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::control::Control;
    use crate::machine::event::Events;
    use crate::machine::power::EVENT_GENERATION;
    use crate::machine::wires::new_event;

    #[test]
    fn another_generation_is_another_id_and_an_event() {
        let ram = GuestRam::from_ranges(&[(GuestAddress(0), 1 << 20)]).expect("1 MiB");
        let control = Arc::new(Control::new(Arc::new(Events::new().expect("eventfd"))));
        let power = Arc::new(Power::new(control, new_event().expect("eventfd")));
        let generation = Generation::new(power.clone());
        let id = || ram.read_obj::<[u8; 16]>(GuestAddress(GENERATION_ID)).expect("in RAM");
        Generation::write(&ram).expect("written");
        let first = id();
        assert!(first != [0; 16] && power.read(3) == 0);
        generation.renew(&ram).expect("written");
        assert_ne!(id(), first);
        assert_eq!((power.read(3), power.read(3)), (EVENT_GENERATION, 0));
    }
}
