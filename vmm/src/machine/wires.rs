//! What connects devices to the guest without an exit: interrupt lines, message-signalled interrupts, and doorbells.

use kvm_bindings::{
    KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQ_ROUTING_MSI, KVM_IRQCHIP_IOAPIC, KvmIrqRouting, kvm_irq_routing_entry,
    kvm_irq_routing_irqchip, kvm_irq_routing_msi,
};
use kvm_ioctls::{IoEventAddress, NoDatamatch, VmFd};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use vmm_sys_util::eventfd::EventFd;

use super::layout::IO_APIC_PINS;
use super::sync::lock;

/// A message-signalled interrupt: where the device writes what (PCI local bus 3.0, 6.8.2).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Message {
    /// Address; the local APIC's window, if the guest means well.
    pub address: u64,
    /// Data.
    pub data: u32,
}

/// KVM said no to a wire.
#[derive(Debug, thiserror::Error)]
pub enum WireError {
    /// No event descriptor.
    #[error("cannot make an event descriptor; raise the limit on open files")]
    Event(#[source] std::io::Error),
    /// An ioctl failed.
    #[error("KVM refused {what}")]
    Kvm {
        /// What was asked of it.
        what: &'static str,
        /// What it said.
        #[source]
        source: kvm_ioctls::Error,
    },
}

/// The machine's side of the wires, as devices see it. Tests put something else in its place.
pub trait Wires: Send + Sync {
    /// A new event whose signal will be the interrupt that [`route`](Self::route) gives it: an opaque number names it.
    fn message_line(&self) -> Result<(u32, EventFd), WireError>;
    /// From now on, signals of `line` raise `message`.
    fn route(&self, line: u32, event: &EventFd, message: Message) -> Result<(), WireError>;
    /// Ends what [`message_line`](Self::message_line) began: the line's number may be another event's from now on.
    fn release_line(&self, line: u32, event: &EventFd) -> Result<(), WireError>;
    /// From now on, a write of any width to `address` signals `event` instead of leaving the guest.
    fn connect_doorbell(&self, address: u64, event: &EventFd) -> Result<(), WireError>;
    /// Ends what [`connect_doorbell`](Self::connect_doorbell) began.
    fn disconnect_doorbell(&self, address: u64, event: &EventFd) -> Result<(), WireError>;
}

/// Wires of KVM: irqfd, GSI routing, ioeventfd. KVM cuts them all when the VM's descriptor closes, so this must live as long as
/// the machine runs.
pub struct KvmWires {
    vm: Arc<VmFd>,
    routes: Mutex<Routes>,
}

struct Routes {
    next: u32,
    /// Below `next`, and nobody's.
    free: Vec<u32>,
    messages: BTreeMap<u32, Message>,
}

impl KvmWires {
    /// Wires of `vm`, which has its interrupt controller.
    pub fn new(vm: Arc<VmFd>) -> Self {
        Self { vm, routes: Mutex::new(Routes { next: IO_APIC_PINS, free: vec![], messages: BTreeMap::new() }) }
    }

    /// An event whose signal is an edge on pin `gsi` of the I/O APIC.
    pub fn pin(&self, gsi: u32) -> Result<EventFd, WireError> {
        let event = new_event()?;
        self.vm.register_irqfd(&event, gsi).map_err(|source| WireError::Kvm { what: "an interrupt line", source })?;
        Ok(event)
    }
}

impl Wires for KvmWires {
    fn message_line(&self) -> Result<(u32, EventFd), WireError> {
        let mut routes = lock(&self.routes);
        let event = new_event()?;
        let line = routes.free.pop().unwrap_or(routes.next);
        routes.next = routes.next.max(line + 1);
        Ok((line, event))
    }

    fn route(&self, line: u32, event: &EventFd, message: Message) -> Result<(), WireError> {
        let mut routes = lock(&self.routes);
        let before = routes.messages.insert(line, message);
        if before == Some(message) {
            return Ok(());
        }
        let done = self.install(&routes.messages).and_then(|()| match before {
            Some(_) => Ok(()),
            None => self.vm.register_irqfd(event, line),
        });
        done.map_err(|source| {
            // KVM has what it had before: a line that raised interrupts goes on with its last message.
            match before {
                Some(before) => routes.messages.insert(line, before),
                None => routes.messages.remove(&line),
            };
            WireError::Kvm { what: "an interrupt route", source }
        })
    }

    fn release_line(&self, line: u32, event: &EventFd) -> Result<(), WireError> {
        let mut routes = lock(&self.routes);
        if routes.messages.remove(&line).is_some() {
            let cut = self.vm.unregister_irqfd(event, line).and_then(|()| self.install(&routes.messages));
            cut.map_err(|source| WireError::Kvm { what: "the end of an interrupt route", source })?;
        }
        routes.free.push(line);
        Ok(())
    }

    fn connect_doorbell(&self, address: u64, event: &EventFd) -> Result<(), WireError> {
        self.vm
            .register_ioevent(event, &IoEventAddress::Mmio(address), NoDatamatch)
            .map_err(|source| WireError::Kvm { what: "a doorbell", source })
    }

    fn disconnect_doorbell(&self, address: u64, event: &EventFd) -> Result<(), WireError> {
        self.vm
            .unregister_ioevent(event, &IoEventAddress::Mmio(address), NoDatamatch)
            .map_err(|source| WireError::Kvm { what: "the end of a doorbell", source })
    }
}

impl KvmWires {
    /// KVM takes the whole table at once: the I/O APIC's pins, and all messages. There is no 8259, because ACPI's
    /// reduced hardware has none.
    fn install(&self, messages: &BTreeMap<u32, Message>) -> Result<(), kvm_ioctls::Error> {
        let pins = (0..IO_APIC_PINS).map(pin_route);
        let entries: Vec<_> = pins.chain(messages.iter().map(|(gsi, message)| message_route(*gsi, message))).collect();
        let table = KvmIrqRouting::from_entries(&entries).map_err(|_| kvm_ioctls::Error::new(libc::ENOMEM))?;
        self.vm.set_gsi_routing(&table)
    }
}

fn pin_route(gsi: u32) -> kvm_irq_routing_entry {
    let mut entry = kvm_irq_routing_entry { gsi, type_: KVM_IRQ_ROUTING_IRQCHIP, ..Default::default() };
    entry.u.irqchip = kvm_irq_routing_irqchip { irqchip: KVM_IRQCHIP_IOAPIC, pin: gsi };
    entry
}

fn message_route(gsi: u32, message: &Message) -> kvm_irq_routing_entry {
    let mut entry = kvm_irq_routing_entry { gsi, type_: KVM_IRQ_ROUTING_MSI, ..Default::default() };
    entry.u.msi = kvm_irq_routing_msi {
        address_lo: message.address as u32,
        address_hi: (message.address >> 32) as u32,
        data: message.data,
        ..Default::default()
    };
    entry
}

/// An event descriptor whose reader never blocks: for signals to KVM and to pollers.
pub fn new_event() -> Result<EventFd, WireError> {
    EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).map_err(WireError::Event)
}

/// Wires that lead nowhere, but remember: for tests without KVM.
#[cfg(test)]
pub mod mock {
    use super::*;

    /// What was connected.
    #[derive(Default)]
    pub struct MockWires {
        /// Lines made.
        pub lines: Mutex<u32>,
        /// Message of each line.
        pub routes: Mutex<BTreeMap<u32, Message>>,
        /// Lines given back.
        pub released: Mutex<Vec<u32>>,
        /// Addresses of doorbells.
        pub doorbells: Mutex<Vec<u64>>,
    }

    impl Wires for MockWires {
        fn message_line(&self) -> Result<(u32, EventFd), WireError> {
            let mut lines = lock(&self.lines);
            *lines += 1;
            Ok((*lines - 1, new_event()?))
        }

        fn route(&self, line: u32, _event: &EventFd, message: Message) -> Result<(), WireError> {
            lock(&self.routes).insert(line, message);
            Ok(())
        }

        fn release_line(&self, line: u32, _event: &EventFd) -> Result<(), WireError> {
            lock(&self.routes).remove(&line);
            lock(&self.released).push(line);
            Ok(())
        }

        fn connect_doorbell(&self, address: u64, _event: &EventFd) -> Result<(), WireError> {
            lock(&self.doorbells).push(address);
            Ok(())
        }

        fn disconnect_doorbell(&self, address: u64, _event: &EventFd) -> Result<(), WireError> {
            lock(&self.doorbells).retain(|a| *a != address);
            Ok(())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kvm_ioctls::Kvm;

    #[test]
    fn a_line_whose_new_message_kvm_refuses_keeps_its_old_one() {
        let vm = Kvm::new().and_then(|kvm| kvm.create_vm()).expect("this test needs /dev/kvm");
        vm.create_irq_chip().expect("an interrupt controller");
        // From now on KVM refuses what no x2APIC could be the address of.
        let format = kvm_bindings::kvm_enable_cap {
            cap: kvm_bindings::KVM_CAP_X2APIC_API,
            args: [kvm_bindings::KVM_X2APIC_API_USE_32BIT_IDS.into(), 0, 0, 0],
            ..Default::default()
        };
        vm.enable_cap(&format).expect("set");
        let wires = KvmWires::new(Arc::new(vm));
        let good = |data| Message { address: 0xfee0_0000, data };
        let bad = Message { address: 1 << 32 | 0xfee0_0000, data: 0x41 };
        let (line, event) = wires.message_line().expect("a line");
        let (other, other_event) = wires.message_line().expect("a line");
        wires.route(other, &other_event, bad).expect_err("it never had one");
        wires.route(line, &event, good(0x41)).expect("routed");
        wires.route(line, &event, bad).expect_err("refused");
        assert_eq!(lock(&wires.routes).messages, BTreeMap::from([(line, good(0x41))]));
        // It can be given another, and back: KVM has it once.
        wires.route(other, &other_event, good(0x42)).expect("routed");
        wires.route(line, &event, good(0x43)).expect("routed anew");
        wires.release_line(line, &event).expect("released");
        wires.release_line(other, &other_event).expect("released");
    }
}
