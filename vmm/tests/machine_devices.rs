//! The guest's other devices, on real KVM.

mod machine;

use fealty_vmm::machine::MachineEvent;
use machine::Plan;
use std::collections::BTreeSet;

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

#[test]
fn a_generation_id_is_new_for_each_start_and_each_renewal() {
    let guest = Plan::new("generation,wait-generation,generation,poweroff").boot();
    guest.sees("waiting for a generation");
    assert!(guest.running.renew_generation().is_err(), "it runs");
    guest.running.pause();
    guest.running.renew_generation().expect("another one");
    guest.running.resume();
    assert_eq!(guest.ends(), MachineEvent::PowerOff);
    let other = Plan::new("generation,poweroff").boot();
    assert_eq!(other.ends(), MachineEvent::PowerOff);
    let ids: BTreeSet<_> =
        [guest.screen.lines("generation "), other.screen.lines("generation ")].concat().into_iter().collect();
    assert_eq!(ids.len(), 4, "three ids and the word of a change: {ids:?}");
    assert!(!ids.contains(&format!("generation {}", "0".repeat(32))));
}

#[test]
fn a_kernel_that_panics_ends_the_machine() {
    let guest = Plan::new("say-panic").with(|machine| machine.add_panic()).boot();
    assert_eq!(guest.ends(), MachineEvent::Panicked);
    let guest = Plan::new("say-panic,poweroff").boot();
    assert_eq!(guest.ends(), MachineEvent::PowerOff);
    assert!(guest.screen.text().contains("failed say-panic"), "not there unless it was added: {}", guest.screen.text());
}
