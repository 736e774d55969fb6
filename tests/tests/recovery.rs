//! Killed in the middle: the VM, the provider, the TPM.

use fealty_tests::lab::{LIMIT, Lab, Plan, lease, stop};
use fealty_tests::process::Background;
use std::time::{Duration, Instant};

#[test]
fn a_vm_killed_while_it_writes_starts_again_with_nothing_lost() {
    let lab = Lab::new(&Plan { words: "hello,write:5:0x55,flush,load:600".into(), ..Plan::default() });
    let mut vm = Background::start(&mut lab.vm(&[]));
    vm.until("load", LIMIT);
    std::thread::sleep(std::time::Duration::from_millis(700));
    vm.signal(9);
    drop(vm);
    lab.seal("hello,verify:5:0x55,poweroff", "interval");
    let again = lab.run_vm(&[]).good();
    assert!(again.out.contains("verify 5 ok"), "{}", again.out);
}

#[test]
fn a_provider_killed_and_restarted_reissues_no_number() {
    let mut lab = Lab::new(&Plan { words: "hello,poweroff".into(), ..Plan::default() });
    lab.run_vm(&[]).good();
    lab.stop_provider(9);
    lab.start_provider();
    lab.run_vm(&[]).good();
    let mut seen: Vec<u64> =
        lab.audit().iter().filter(|e| e["kind"] == "keys-released").filter_map(|e| e["instance"].as_u64()).collect();
    let count = seen.len();
    seen.dedup();
    assert_eq!((count, seen.len()), (2, 2));
}

#[test]
fn a_provider_restored_from_a_backup_asks_before_it_trusts_an_older_anchor() {
    let mut lab = Lab::new(&Plan { words: "hello,write:4:0x44,flush,poweroff".into(), ..Plan::default() });
    lab.keys(&["backup", "--out", &lab.text("backup.db")]).good();
    lab.run_vm(&[]).good();
    lab.stop_provider(15);
    for file in ["keys.db", "keys.db-wal", "keys.db-shm"] {
        let _ = std::fs::remove_file(lab.path("keys").join(file));
    }
    lab.keys_local(&["restore", "--dir", &lab.text("keys"), "--from", &lab.text("backup.db")]).good();
    lab.start_provider();
    let refused = lab.run_vm(&[]).refused();
    assert!(!refused.out.contains("fealty-guest"), "{}", refused.out);
    lab.keys(&["customer", "confirm", "acme", "--policy", "1", "--reference", "1"]).good();
    lab.keys(&["vm", "confirm", "acme", "payroll"]).good();
    // The customer looks at the volume, and says that the state it shows is the one to go on from.
    let info = lab.run_tool("fealty-disk", &["--json", "info", &lab.text("store/root.vol")]).good().out;
    let info: serde_json::Value = serde_json::from_str(info.trim()).expect("JSON about the volume");
    let shown = info["anchor"].as_str().unwrap_or_else(|| panic!("no anchor in {info}"));
    lab.keys(&["volume", "confirm", "acme", "root", "--anchor", shown]).good();
    lab.run_vm(&[]).good();
    assert!(lab.export()[4 * 4096..5 * 4096].iter().all(|b| *b == 0x44));
    let kinds = lab.audit_kinds();
    assert!(kinds.contains(&"provider-restored".into()) && kinds.contains(&"anchor-confirmed".into()), "{kinds:?}");
}

#[test]
fn a_tpm_that_goes_away_stops_renewals_not_the_disk() {
    let mut lab = Lab::new(&Plan { words: "hello,tick".into(), settings: lease(6, 2), ..Plan::default() });
    let mut vm = Background::start(&mut lab.vm(&[]));
    vm.until("tick", LIMIT);
    lab.tpm.power_off();
    vm.until("keys-wiped", LIMIT);
    let stopped = vm.out().matches("tick").count();
    std::thread::sleep(std::time::Duration::from_secs(3));
    assert_eq!(vm.out().matches("tick").count(), stopped, "it ran on without a lease");
    let ended = stop(vm);
    assert!(!ended.err.contains("panicked"), "{}", ended.err);
    let why = ended.err.lines().find(|l| l.contains("lease not renewed")).expect("why it stood still");
    assert!(why.contains("the TPM can't be reached"), "{why}");
    assert!(!ended.err.contains("too many attestations"), "each try took a nonce: {}", ended.err);
}

#[test]
fn a_tpm_service_that_ended_is_started_again_and_the_lease_goes_on() {
    let lab = Lab::new(&Plan { words: "hello,tick".into(), settings: lease(6, 2), ..Plan::default() });
    let mut vm = Background::start(&mut lab.vm(&[]));
    vm.until("tick", LIMIT);
    let releases = || lab.audit_kinds().iter().filter(|k| *k == "keys-released").count();
    // Killed, and told to end.
    for signal in [9, 15] {
        let before = (lab.service(), releases(), vm.out().matches("tick").count());
        assert_eq!(before.0["vms"], 1);
        kill(&before.0, signal);
        let begun = Instant::now();
        while releases() < before.1 + 2 || vm.out().matches("tick").count() < before.2 + 2 {
            assert!(begun.elapsed() < LIMIT, "the lease was not renewed:\n{}", vm.err());
            std::thread::sleep(Duration::from_millis(100));
        }
        let after = lab.service();
        assert_ne!(after["pid"], before.0["pid"]);
        assert_eq!(after["vms"], 1, "it is known, and once");
    }
    // Who is registered is this very process: while it lives, there is no second instance.
    lab.run_vm(&[]).no_guest(&["still run"]);
    assert!(!vm.err().contains("too many attestations"), "{}", vm.err());
    let instances: Vec<_> = lab.audit().iter().filter_map(|e| e["instance"].as_u64()).collect();
    assert!(instances.iter().all(|number| *number == instances[0]), "{instances:?}");
    stop(vm);
    // With the VM, the process that registers it ends, and the service that nobody needs.
    let begun = Instant::now();
    while std::fs::exists(lab.run.path().join("control.sock")).expect("known") {
        assert!(begun.elapsed() < LIMIT, "a service without a VM goes on");
        std::thread::sleep(Duration::from_millis(100));
    }
}

fn kill(service: &serde_json::Value, signal: i32) {
    let pid = service["pid"].as_i64().and_then(|pid| rustix::process::Pid::from_raw(pid as i32)).expect("a pid");
    let signal = rustix::process::Signal::from_named_raw(signal).expect("a signal");
    rustix::process::kill_process(pid, signal).expect("signalled");
}
