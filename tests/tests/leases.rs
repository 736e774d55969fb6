//! Leases: renewed at half time, quiesced before their end, keys wiped at the end and put back later with nothing lost.

use fealty_tests::lab::{LIMIT, Lab, POWER_ON_ONLY, Plan, lease, stop};
use fealty_tests::process::Background;
use policy::Digest;
use serde_json::Value;
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
    stop(vm);
}

#[test]
fn attack_45_without_its_provider_a_vm_pauses_loses_its_keys_and_goes_on_when_they_are_back() {
    // The guest's load compares, after the pause too, all that it wrote.
    let plan = Plan { words: "hello,load:12,hash,poweroff".into(), settings: lease(4, 1), ..Plan::default() };
    let mut lab = Lab::new(&plan);
    let socket = lab.text("api.sock");
    let mut vm = Background::start(&mut lab.vm(&["--api-socket", &socket]));
    vm.until("load started", LIMIT);
    let writes = |counters: &Value| counters["disks"]["root"]["writes"].as_u64().expect("a count");
    wait("a write", || writes(&counters(&lab, &socket)) > 0);
    lab.stop_provider(9);
    vm.until("keys-wiped", LIMIT);
    let before = counters(&lab, &socket);
    std::thread::sleep(Duration::from_secs(3));
    assert_eq!(counters(&lab, &socket), before, "a vCPU or a disk worked after the lease's end");
    assert!(!vm.out().contains("load ok"), "the pause came too late:\n{}", vm.out());
    lab.start_provider();
    vm.until("keys-back", LIMIT);
    wait("another write", || writes(&counters(&lab, &socket)) > writes(&before));
    let ended = vm.end(LIMIT).good();
    assert!(ended.out.contains("load ok"), "{}\n{}", ended.out, ended.err);
    let exported = lab.export();
    assert!(exported != plan.disk, "nothing was written");
    let expected = Digest::of(&exported).to_string();
    assert!(ended.out.contains(&expected), "the guest read something else than {expected}:\n{}", ended.out);
    let told: Vec<_> =
        lab.audit().iter().map(|e| e["details"]["what"].as_str().unwrap_or_default().to_owned()).collect();
    let at = |what: &str| told.iter().position(|w| w == what).unwrap_or_else(|| panic!("no {what} in {told:?}"));
    assert!(at("quiesced") < at("keys-wiped") && at("keys-wiped") < at("keys-back"), "{told:?}");
}

/// What the machine did so far.
#[track_caller]
fn counters(lab: &Lab, socket: &str) -> Value {
    let info = lab.run_tool("fealty", &["ctl", socket, "info", "--json"]).good().out;
    serde_json::from_str::<Value>(&info).expect("JSON")["counters"].clone()
}

#[test]
fn attack_45_a_vm_whose_reports_nobody_takes_stands_still_until_somebody_does() {
    let settings = lease(600, 10) + r#", "unreported_seconds": 4"#;
    let mut lab = Lab::new(&Plan { words: "hello,tick".into(), settings, ..Plan::default() });
    let socket = lab.text("api.sock");
    let mut vm = Background::start(&mut lab.vm(&["--api-socket", &socket]));
    vm.until("tick", LIMIT);
    wait("the first report", || lab.audit_kinds().contains(&"report".into()));
    lab.stop_provider(9);
    let ctl = |word: &str| lab.run_tool("fealty", &["ctl", &socket, word]).good().out;
    // Something to report.
    ctl("pause");
    ctl("resume");
    vm.until("reports could not be delivered; the VM pauses", LIMIT);
    wait("the pause", || ctl("info").contains("paused until its reports are delivered"));
    let stopped = ticks(&vm);
    std::thread::sleep(Duration::from_secs(3));
    assert_eq!(ticks(&vm), stopped, "it ran unwatched");
    assert!(lab.run_tool("fealty", &["ctl", &socket, "resume"]).code == Some(4), "the operator can't let it go on");
    lab.start_provider();
    vm.until("reports are delivered again", LIMIT);
    wait("the guest goes on", || ticks(&vm) > stopped);
    lab.run_tool("fealty", &["ctl", &socket, "shutdown"]).good();
    vm.end(LIMIT).good();
    let reports: Vec<_> = lab.audit().into_iter().filter(|e| e["kind"] == "report").collect();
    let told: Vec<_> = reports.iter().filter_map(|e| e["details"]["operation"].as_str()).collect();
    // Looks at the VM are told once a minute: which of these is, the clock says.
    let told: Vec<_> = told.into_iter().filter(|operation| *operation != "vm.info").collect();
    assert_eq!(told, ["vm.pause", "vm.resume", "vm.shutdown"]);
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
    vm.until("power-button", LIMIT);
    vm.signal(15);
    vm.until("before the volumes were closed", LIMIT);
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
    vm.until("keys-wiped", LIMIT);
    let stopped = ticks(&vm);
    std::thread::sleep(Duration::from_secs(3));
    assert_eq!(ticks(&vm), stopped, "it ran on without a lease");
    lab.set_policy(&lease(4, 1), POWER_ON_ONLY);
    wait("the guest goes on", || ticks(&vm) > stopped);
    stop(vm);
}
