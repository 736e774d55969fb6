//! The bay with a mock driver: a disk that comes is there to be driven, one that goes leaves nothing behind.

use super::*;
use crate::lease::LeaseGate;
use crate::machine::block::DiskSettings;
use crate::machine::block::fuzz::Scratch;
use crate::machine::control::Control;
use crate::machine::event::Events;
use crate::machine::layout::ECAM;
use crate::machine::pci::{HostBridge, PciBus};
use crate::machine::power::Power;
use crate::machine::wires::mock::MockWires;
use crate::machine::wires::new_event;
use std::time::Duration;
use vm_memory::GuestAddress;

const EJECT: u16 = 2;
/// Far beyond what it takes.
const LIMIT: Duration = Duration::from_secs(60);

struct Bench {
    bay: Arc<Bay>,
    pci: PciBus,
    wires: Arc<MockWires>,
}

/// A bay behind a bus of which so many slots are taken.
fn bench(fixed: u8) -> Bench {
    let control = Arc::new(Control::new(Arc::new(Events::new().expect("eventfd"))));
    let power = Arc::new(Power::new(control.clone(), new_event().expect("eventfd")));
    let crew = Arc::new(Crew::new(Arc::new(|_| Ok(())), Arc::new(LeaseGate::unlimited()), control));
    let (mut pci, wires) = (PciBus::default(), Arc::new(MockWires::default()));
    (1..fixed).for_each(|_| pci.add(Arc::new(HostBridge::default())).expect("a slot"));
    let memory = GuestRam::from_ranges(&[(GuestAddress(0), 1 << 20)]).expect("1 MiB");
    let ground = Ground { memory, wires: wires.clone(), fixed };
    let slots = pci.hot().clone();
    let bay = Bay::hire(crew, ground, |emptied| Arc::new(Slots::new(power, slots, emptied))).expect("a thread");
    Bench { bay, pci, wires }
}

impl Bench {
    fn plug(&self, name: &str) -> (Result<u8, PlugError>, Receiver<Result<(), DiskError>>) {
        let (tell, told) = channel();
        let gone = Box::new(move |flushed| drop(tell.send(flushed)));
        (self.bay.plug(disk(name), gone), told)
    }

    fn dword(&self, slot: u8, at: u64) -> u32 {
        let mut data = [0; 4];
        assert!(self.pci.memory_read(ECAM + (u64::from(slot) << 15) + at, &mut data));
        u32::from_le_bytes(data)
    }
}

fn disk(name: &str) -> DiskSlot {
    DiskSlot { id: name.into(), disk: Arc::new(Scratch::default()), settings: DiskSettings::default() }
}

/// A driver that turns on memory, bus mastering and MSI-X, all vectors unmasked; the function as the bus knew it.
fn drive(bench: &Bench, slot: u8) -> Arc<dyn PciFunction> {
    let function = bench.pci.hot().get(slot).expect("it is there");
    drive_function(function.as_ref(), bench.dword(slot, 0x10).into());
    function
}

fn drive_function(function: &dyn PciFunction, window: u64) {
    function.config_write(4, &6_u16.to_le_bytes());
    assert!(function.window().is_empty() || function.window().start == window);
    for vector in 0..2 {
        for (field, value) in [(0, 0xfee0_0000_u32), (4, 0), (8, 0x41), (12, 0)] {
            function.bar_write(0x4000 + vector * 16 + field, &value.to_le_bytes());
        }
    }
    let is_msix = |at: &u8| {
        let mut id = [0; 4];
        function.config_read(*at, &mut id);
        id[0] == 0x11
    };
    let msix = (0x40..0xf0).step_by(4).find(is_msix).expect("MSI-X");
    function.config_write(msix, &0x8000_0000_u32.to_le_bytes());
}

#[test]
fn a_disk_comes_and_goes_and_leaves_no_doorbell_and_no_line_behind() {
    let bench = bench(3);
    assert_eq!(bench.dword(24, 0), u32::MAX, "an empty slot");
    let (slot, gone) = bench.plug("late");
    assert_eq!((slot.expect("a slot"), bench.dword(24, 0)), (24, 0x1042_1af4));
    let window = u64::from(bench.dword(24, 0x10));
    let function = drive(&bench, 24);
    assert!(bench.pci.memory_read(window + 0x14, &mut [0]));
    assert_eq!(*lock(&bench.wires.doorbells), [window + 0x3000]);
    assert_eq!(lock(&bench.wires.routes).len(), 2);

    bench.bay.registers().write(EJECT, 1);
    assert_eq!(bench.bay.ask("late"), Ok(()));
    assert!(gone.recv_timeout(Duration::from_millis(50)).is_err(), "the guest has it still");
    assert_eq!(bench.bay.disks().len(), 1);
    bench.bay.registers().write(EJECT, 1);
    assert!(gone.recv_timeout(LIMIT).expect("told").is_ok());
    assert_eq!((bench.dword(24, 0), bench.bay.disks().len()), (u32::MAX, 0));
    assert!(!bench.pci.memory_read(window + 0x14, &mut [0]), "it decodes nothing");
    // A vCPU that found it just before can't bring anything back.
    drive_function(function.as_ref(), window);
    assert!(lock(&bench.wires.doorbells).is_empty() && lock(&bench.wires.routes).is_empty());
    assert_eq!(*lock(&bench.wires.released), [0, 1]);
    assert_eq!(bench.bay.ask("late"), Err(UnplugError::Unknown("late".into())));
    assert_eq!(bench.plug("late").0.expect("room"), 24);
    bench.bay.stop();
}

#[test]
fn there_are_so_many_slots_and_names_are_taken_once() {
    let bench = bench(3);
    for (name, slot) in ["a", "b", "c", "d", "e", "f", "g", "h"].iter().zip(24..) {
        assert_eq!(bench.plug(name).0.expect("a slot"), slot);
    }
    assert!(matches!(bench.plug("a").0, Err(PlugError::Name(name)) if name == "a"));
    assert!(matches!(bench.plug("i").0, Err(PlugError::Full)));
    assert_eq!(bench.bay.ask("c"), Ok(()));
    bench.bay.registers().write(EJECT, 0xff);
    let plugged = loop {
        match bench.plug("i").0 {
            // It is being cleared away.
            Err(PlugError::Full) => std::thread::yield_now(),
            plugged => break plugged,
        }
    };
    assert_eq!(plugged.expect("the one that is free"), 26);
    bench.bay.stop();
}

#[test]
fn slots_that_are_taken_for_good_stay_so() {
    let bench = bench(31);
    assert_eq!(bench.plug("a").0.expect("the last slot"), 31);
    assert!(matches!(bench.plug("b").0, Err(PlugError::Full)));
    assert_eq!(bench.dword(30, 0), 0x0008_1b36, "what was there at the start");
    bench.bay.stop();
}

#[test]
fn a_disk_that_comes_into_a_paused_machine_rests_until_it_goes_on() {
    let bench = bench(3);
    bench.bay.pause();
    let (slot, gone) = bench.plug("late");
    assert_eq!(slot.expect("a slot"), 24);
    bench.bay.resume();
    bench.bay.pause();
    bench.bay.resume();
    bench.bay.stop();
    assert!(gone.recv_timeout(Duration::from_millis(50)).is_err(), "it did not leave: the machine ended");
    assert!(matches!(bench.plug("later").0, Err(PlugError::Ends)));
    assert_eq!(bench.bay.disks().len(), 1, "for a last flush");
}
