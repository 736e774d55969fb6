//! The guest's other devices, on real KVM.

mod machine;

use fealty_vmm::machine::MachineEvent;
use machine::Plan;

#[test]
fn the_guest_gets_random_numbers() {
    let guest = Plan::new("rng,rng,poweroff").with(|machine| machine.add_rng().expect("a slot")).boot();
    assert_eq!(guest.ends(), MachineEvent::PowerOff);
    let lines = guest.screen.lines("rng ");
    assert!(lines.len() == 2 && lines[0] != lines[1], "{}", guest.screen.text());
    assert!(lines.iter().all(|line| line.len() == "rng ".len() + 64), "{lines:?}");
    let counters = guest.running.counters().devices.rng.expect("a source");
    assert_eq!((counters.requests, counters.bytes, counters.breaks), (2, 64, 0));
}
