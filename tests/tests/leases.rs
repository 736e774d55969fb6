//! Leases: renewed at half time, quiesced before their end, keys wiped at the end and put back later with nothing lost.

use fealty_tests::lab::{LIMIT, Lab, POWER_ON_ONLY, Plan, lease};
use fealty_tests::process::Background;
use std::time::{Duration, Instant};

#[track_caller]
fn wait(what: &str, mut done: impl FnMut() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < LIMIT, "{what} did not happen");
        std::thread::sleep(Duration::from_millis(50));
    }
}

fn ticks(vm: &Background) -> usize {
    vm.out().matches("tick").count()
}

#[test]
fn a_lease_is_renewed_under_the_final_filter() {
    let plan = Plan { words: "hello,tick".into(), settings: lease(4, 1), ..Plan::default() };
    let lab = Lab::new(&plan);
    let mut vm = Background::start(&mut lab.vm(&[]));
    vm.until("fealty-guest", LIMIT);
    let releases = || lab.audit_kinds().iter().filter(|k| *k == "keys-released").count();
    wait("a third release", || releases() >= 3);
    let before = ticks(&vm);
    wait("another tick", || ticks(&vm) > before);
    vm.signal(15);
    vm.signal(15);
    vm.end(LIMIT);
}

#[test]
fn attack_45_without_its_provider_a_vm_pauses_loses_its_keys_and_goes_on_when_they_are_back() {
    let plan = Plan { words: "hello,load:60,hash,poweroff".into(), settings: lease(4, 1), ..Plan::default() };
    let mut lab = Lab::new(&Plan { words: "hello,tick".into(), ..plan });
    let mut vm = Background::start(&mut lab.vm(&[]));
    vm.until("tick", LIMIT);
    lab.stop_provider(9);
    // The lease is past: no tick comes any more.
    std::thread::sleep(Duration::from_secs(5));
    let stopped = ticks(&vm);
    std::thread::sleep(Duration::from_secs(3));
    assert_eq!(ticks(&vm), stopped, "a vCPU ran after the lease's end:\n{}", vm.out());
    lab.start_provider();
    wait("the guest goes on", || ticks(&vm) > stopped);
    let kinds = lab.audit_kinds();
    assert!(kinds.iter().filter(|k| *k == "keys-released").count() >= 2, "{kinds:?}");
    vm.signal(15);
    vm.signal(15);
    vm.end(LIMIT);
}

#[test]
fn attack_28_keys_go_at_the_leases_end_also_while_volumes_are_closed() {
    let plan = Plan { words: "hello,tick".into(), settings: lease(8, 1), ..Plan::default() };
    let lab = Lab::new(&plan);
    let mut vm = Background::start(&mut lab.vm(&[]));
    vm.until("tick", LIMIT);
    // A provider that takes connections and answers nothing: the closed volume's anchor waits for it.
    lab.provider.as_ref().expect("a provider").signal(19);
    vm.signal(15);
    wait("the power button", || vm.err().contains("power-button"));
    vm.signal(15);
    wait("the keys' end", || vm.err().contains("before the volumes were closed"));
    lab.provider.as_ref().expect("a provider").signal(18);
    vm.end(LIMIT);
}

#[test]
fn a_policy_may_power_a_vm_off_at_its_leases_end() {
    let settings =
        lease(3, 1).replace("\"quiesce_seconds\": 1", "\"quiesce_seconds\": 1, \"on_expiry\": \"power-off\"");
    let mut lab = Lab::new(&Plan { words: "hello,tick".into(), settings, ..Plan::default() });
    let mut vm = Background::start(&mut lab.vm(&[]));
    vm.until("tick", LIMIT);
    lab.stop_provider(9);
    let ended = vm.end(LIMIT).refused();
    assert!(ended.err.contains("lease"), "{}", ended.err);
}

#[test]
fn a_revoked_renewal_stops_the_vm_with_its_lease() {
    let mut lab = Lab::new(&Plan { words: "hello,tick".into(), settings: lease(4, 1), ..Plan::default() });
    let mut vm = Background::start(&mut lab.vm(&[]));
    vm.until("tick", LIMIT);
    lab.set_policy(&lease(4, 1), "permit (principal, action == Action::\"vm.power-on\", resource);");
    wait("the pause", || {
        let before = ticks(&vm);
        std::thread::sleep(Duration::from_secs(3));
        ticks(&vm) == before
    });
    lab.set_policy(&lease(4, 1), POWER_ON_ONLY);
    let stopped = ticks(&vm);
    wait("the guest goes on", || ticks(&vm) > stopped);
    vm.signal(15);
    vm.signal(15);
    vm.end(LIMIT);
}
