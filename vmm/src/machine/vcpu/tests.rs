//! A vCPU that comes to what this machine has no answer for. Real exits of a real KVM, from a machine without an interrupt
//! controller, in which the halt of a processor is the program's affair: no machine of ours can come to that.

use super::*;
use crate::machine::event::Events;
use crate::machine::memory::Memory;
use crate::machine::pci::PciBus;
use crate::machine::power::Power;
use crate::machine::serial::SerialPort;
use crate::machine::wires::new_event;
use kvm_ioctls::Kvm;
use vm_memory::{Bytes, GuestAddress};

const CODE: u64 = 0x1000;
const HLT: u8 = 0xf4;

#[test]
fn an_exit_that_nobody_handles_is_told_with_the_vcpus_state() {
    let vm = Kvm::new().expect("/dev/kvm").create_vm().expect("a VM");
    let memory = Arc::new(Memory::new(16 << 20, 0).expect("memory"));
    memory.register(&vm).expect("slots");
    memory.ram().write_obj(HLT, GuestAddress(CODE)).expect("in RAM");
    let fd = vm.create_vcpu(0).expect("a vCPU");
    let mut sregs = fd.get_sregs().expect("registers");
    (sregs.cs.base, sregs.cs.selector) = (0, 0);
    fd.set_sregs(&sregs).expect("set");
    fd.set_regs(&kvm_bindings::kvm_regs { rip: CODE, rflags: 2, ..Default::default() }).expect("set");
    let vcpu = Mutex::new(Vcpu { index: 0, fd, unsettled: false, exits: Arc::default(), _memory: memory });

    let control = Arc::new(Control::new(Arc::new(Events::new().expect("eventfd"))));
    let serial = SerialPort::new(new_event().expect("eventfd"), Box::new(std::io::sink())).expect("eventfd");
    let power = Arc::new(Power::new(control.clone(), new_event().expect("eventfd")));
    let bus = Bus::new(Arc::new(serial), power, PciBus::default(), None);
    let ended = run(&vcpu, &bus, &control, &LeaseGate::unlimited());
    let Err(MachineEvent::Failed(why)) = ended else { panic!("it goes on") };
    assert!(why.starts_with("vCPU 0: unhandled exit, reason 5; rip=0x1001 "), "{why}");
}

#[test]
fn a_vcpu_that_kvm_reset_is_said_to_be_one() {
    let vm = Kvm::new().expect("/dev/kvm").create_vm().expect("a VM");
    let fd = vm.create_vcpu(0).expect("a vCPU");
    let said = state::describe(&fd);
    assert!(
        said.starts_with("rip=0xfff0 ") && said.ends_with("(as after a reset: what it was before is not kept)"),
        "{said}"
    );
    fd.set_regs(&kvm_bindings::kvm_regs { rip: CODE, rflags: 2, ..Default::default() }).expect("set");
    assert!(!state::describe(&fd).contains("reset"));
}
