//! Pausing, looking, going on, and stopping.

mod machine;

use fealty_vmm::lease::LeaseGate;
use fealty_vmm::machine::{
    DiskSettings, InspectError, Machine, MachineError, MachineEvent, Shape, ThreadKind, open_kvm,
};
use machine::{Plan, images};
use std::sync::{Arc, Mutex};
use std::time::Duration;

#[test]
fn a_paused_guest_does_nothing_and_goes_on() {
    let guest = Plan::new("tick").boot();
    guest.sees("tick 1");
    assert!(matches!(guest.running.inspect(|_| ()), Err(InspectError::Runs)));
    guest.running.pause();
    let (ticks, exits) = (guest.screen.lines("tick").len(), guest.running.counters().vcpu_exits);
    std::thread::sleep(Duration::from_millis(2500));
    assert_eq!((guest.screen.lines("tick").len(), guest.running.counters().vcpu_exits), (ticks, exits));
    guest.running.resume();
    guest.sees(&format!("tick {}", ticks + 1));
}

#[test]
fn many_pauses_harm_nothing() {
    let guest = Plan { shape: Shape { vcpus: 2, memory: 64 << 20, hotplug: 0 }, ..Plan::new("tick") }.boot();
    guest.sees("fealty-guest");
    for _ in 0..200 {
        guest.running.pause();
        guest.running.resume();
    }
    guest.sees("tick 2");
}

#[test]
fn memory_and_registers_of_a_paused_guest_can_be_read() {
    let guest = Plan { shape: Shape { vcpus: 2, memory: 64 << 20, hotplug: 0 }, ..Plan::new("spin") }.boot();
    guest.sees("fealty-guest");
    guest.running.pause();
    let seen = guest.running.inspect(|frozen| {
        let mut cmdline = [0; 13];
        frozen.read(0x2_0000, &mut cmdline).expect("RAM");
        assert!(frozen.read(64 << 20, &mut cmdline).is_err());
        (frozen.regions(), cmdline, frozen.vcpus().expect("registers"))
    });
    let (regions, cmdline, vcpus) = seen.expect("it is paused");
    assert_eq!((regions, &cmdline), (vec![(0, 64 << 20)], b"console=ttyS0"));
    assert_eq!(vcpus.len(), 2);
    assert!(vcpus[0].regs.rip >= 0x10_0000 && vcpus[0].sregs.cr0 & 1 == 1, "{:x?}", vcpus[0].regs);
    guest.running.resume();
}

#[test]
fn a_guest_that_spins_can_be_stopped() {
    let guest = Plan::new("spin").boot();
    guest.sees("fealty-guest");
    guest.running.stop();
    assert_eq!(guest.running.events().take(), None);
}

#[test]
fn a_closed_gate_lets_no_byte_of_the_guest_run() {
    let gate = Arc::new(LeaseGate::closed());
    let guest = Plan { gate: gate.clone(), ..Plan::new("hello,poweroff") }.boot();
    std::thread::sleep(Duration::from_millis(200));
    assert_eq!((guest.screen.text().as_str(), guest.running.counters().vcpu_exits[0]), ("", 0));
    gate.open_until(u64::MAX, u64::MAX);
    guest.running.resume();
    assert_eq!(guest.ends(), MachineEvent::PowerOff);
}

#[test]
fn each_thread_begins_with_its_sandbox() {
    let kinds = Arc::new(Mutex::new(vec![]));
    let noted = kinds.clone();
    let file = std::fs::File::open(&images().elf).expect("the guest");
    let mut machine = Machine::prepare(open_kvm().expect("/dev/kvm"), Shape { vcpus: 2, memory: 64 << 20, hotplug: 0 })
        .expect("a machine");
    machine.load_kernel(&file).expect("loaded");
    machine.finish_load("fealty.do=poweroff").expect("finished");
    let disk = fealty_vmm::machine::RawDisk::new(tempfile::tempfile().expect("a file"), "d").expect("a disk");
    let settings = DiskSettings { read_only: true, ..DiskSettings::default() };
    let slot = fealty_vmm::machine::DiskSlot { id: "d".into(), disk: Arc::new(disk), settings };
    machine.add_disk(slot).expect("a slot");
    let hook = move |kind| {
        noted.lock().expect("no panic").push(kind);
        Ok(())
    };
    let running = machine.start(machine::permit(), Arc::new(LeaseGate::unlimited()), Arc::new(hook)).expect("started");
    assert_eq!(running.events().wait(), MachineEvent::PowerOff);
    running.stop();
    let mut kinds = kinds.lock().expect("no panic").clone();
    kinds.sort_by_key(|kind| *kind as u8);
    assert_eq!(kinds, [ThreadKind::Vcpu, ThreadKind::Vcpu, ThreadKind::Disk]);
}

#[test]
fn without_its_sandbox_a_thread_does_nothing() {
    let file = std::fs::File::open(&images().elf).expect("the guest");
    let mut machine = Machine::prepare(open_kvm().expect("/dev/kvm"), Shape { vcpus: 1, memory: 64 << 20, hotplug: 0 })
        .expect("a machine");
    machine.load_kernel(&file).expect("loaded");
    machine.finish_load("fealty.do=hello,poweroff").expect("finished");
    let screen = machine::Screen::default();
    let output = Box::new(screen.clone());
    machine.set_console(fealty_vmm::machine::ConsoleBackend { input: None, output });
    let hook = |_| Err(std::io::Error::other("no seccomp"));
    let running = machine.start(machine::permit(), Arc::new(LeaseGate::unlimited()), Arc::new(hook)).expect("started");
    let MachineEvent::Broken(why) = running.events().wait() else { panic!("it ran") };
    assert!(why.contains("sandbox") && why.contains("no seccomp"), "{why}");
    assert_eq!((screen.text().as_str(), running.counters().vcpu_exits), ("", vec![0]));
    running.pause();
    running.stop();
}

#[test]
fn a_machine_that_can_not_be_is_refused() {
    let prepare = |vcpus, memory| Machine::prepare(open_kvm().expect("/dev/kvm"), Shape { vcpus, memory, hotplug: 0 });
    for (vcpus, memory) in [(0, 64 << 20), (17, 64 << 20), (1, 0), (1, 8 << 20), (1, (64 << 20) + 4096)] {
        assert!(matches!(prepare(vcpus, memory), Err(MachineError::Shape)), "{vcpus} {memory}");
    }
    let no_kvm = std::fs::File::open("/dev/null").expect("/dev/null").into();
    assert!(matches!(Machine::open(no_kvm), Err(MachineError::Lacks(_))));
    let machine = prepare(1, 64 << 20).expect("a machine");
    let started = machine.start(machine::permit(), Arc::new(LeaseGate::unlimited()), Arc::new(|_| Ok(())));
    assert!(matches!(started, Err(MachineError::Nothing)));
}
