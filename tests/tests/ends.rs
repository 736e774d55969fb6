//! A VM that is asked to end while something else hangs or fails: it ends in order, and nobody has to wait for its lease.

use fealty_tests::lab::{LIMIT, Lab, Plan, lease};
use fealty_tests::process::Background;
use serde_json::json;
use std::time::{Duration, Instant};

/// A moment that lasts milliseconds is met in one of so many tries.
const TRIES: usize = 20;

fn lab(words: &str) -> Lab {
    Lab::new(&Plan { words: words.into(), ..Plan::default() })
}

/// Starts the VM and freezes it with SIGSTOP as soon as it told `step`.
#[track_caller]
fn frozen_at(lab: &Lab, step: &str) -> Background {
    let vm = Background::start(&mut lab.vm(&[]));
    let begun = Instant::now();
    while !told(&vm, step) {
        assert!(begun.elapsed() < LIMIT, "no {step}:\n{}", vm.err());
        std::thread::sleep(Duration::from_millis(1));
    }
    vm.signal(19);
    let state = || std::fs::read_to_string(format!("/proc/{}/stat", vm.pid())).expect("a process");
    // Where it was not met in time, it may have ended.
    while !state().rsplit(')').next().expect("fields").trim_start().starts_with(['T', 'Z']) {
        std::thread::sleep(Duration::from_millis(1));
    }
    vm
}

/// Whether a step was told.
fn told(vm: &Background, step: &str) -> bool {
    vm.err().lines().any(|line| line.contains(&format!("] {step}:")))
}

fn releases(lab: &Lab) -> usize {
    lab.audit_kinds().iter().filter(|kind| *kind == "keys-released").count()
}

#[test]
fn a_vm_that_is_stopped_while_its_evidence_is_judged_leaves_nothing_held() {
    let lab = lab("hello,poweroff");
    for _ in 0..TRIES {
        let before = releases(&lab);
        let vm = frozen_at(&lab, "quote");
        let in_time = !told(&vm, "open");
        vm.signal(15);
        vm.signal(18);
        let ended = vm.end(LIMIT);
        assert!(!ended.err.contains("panicked"), "{}", ended.err);
        lab.export();
        if in_time && releases(&lab) > before {
            assert_eq!(ended.code, Some(14), "{}", ended.err);
            assert!(!ended.out.contains("fealty-guest") && !ended.err.contains("end-not-reported"), "{}", ended.err);
            lab.run_vm(&[]).good();
            return;
        }
    }
    panic!("the moment between evidence and keys was never met");
}

#[test]
fn keys_that_were_released_and_do_not_open_leave_nothing_held() {
    let mut lab = lab("hello,poweroff");
    for _ in 0..TRIES {
        let before = releases(&lab);
        let vm = frozen_at(&lab, "quote");
        if told(&vm, "open") {
            continue;
        }
        lab.tpm.power_off();
        vm.signal(18);
        let ended = vm.end(LIMIT).refused();
        assert_eq!(ended.code, Some(7), "{}", ended.err);
        assert!(!ended.out.contains("fealty-guest") && !ended.err.contains("end-not-reported"), "{}", ended.err);
        assert_eq!(releases(&lab), before + 1, "the provider released keys:\n{}", ended.err);
        lab.export();
        let reports: Vec<_> = lab.audit().into_iter().filter(|e| e["kind"] == "report").collect();
        assert_eq!(reports.last().expect("a report")["details"]["what"], "ended");
        return;
    }
    panic!("the moment between evidence and keys was never met");
}

#[test]
fn a_vm_that_is_stopped_while_its_volumes_open_does_not_start() {
    let lab = lab("hello,tick");
    for _ in 0..TRIES {
        let vm = frozen_at(&lab, "released");
        let in_time = !told(&vm, "volumes");
        let provider = lab.provider.as_ref().expect("a provider");
        // It takes connections and answers nothing.
        provider.signal(19);
        vm.signal(15);
        vm.signal(18);
        std::thread::sleep(Duration::from_secs(3));
        provider.signal(18);
        if !in_time {
            continue;
        }
        let ended = vm.end(LIMIT);
        assert_eq!(ended.code, Some(14), "{}", ended.err);
        assert!(!ended.out.contains("fealty-guest") && !ended.err.contains("end-not-reported"), "{}", ended.err);
        assert_eq!(lab.export().len(), Plan::default().disk.len());
        return;
    }
    panic!("the moment between keys and volumes was never met");
}

#[test]
fn a_vm_whose_provider_hangs_is_stopped_with_all_its_volumes_flushed() {
    let lab = Lab::new(&Plan { settings: lease(20, 2), ..Plan::default() });
    let names = ["root", "data", "more"];
    names[1..].iter().for_each(|name| lab.make_volume(name, &vec![0; 1 << 20]));
    let disk = |name: &&str| json!({"id": name, "volume": lab.volume_id(name), "anchor_mode": "interval"});
    let disks: Vec<_> = names.iter().map(disk).collect();
    // Nothing of it is flushed by the guest.
    lab.seal_disks("hello,write:9:0x11,disk:1,write:9:0x22,disk:2,write:9:0x33,tick", &disks);
    let mut vm = Background::start(&mut lab.vm(&[]));
    vm.until("tick", LIMIT);
    let provider = lab.provider.as_ref().expect("a provider");
    provider.signal(19);
    let begun = Instant::now();
    vm.signal(15);
    vm.until("power-button", LIMIT);
    vm.signal(15);
    vm.until("volume-not-closed: more", LIMIT);
    // One patience for all of them: each alone would take as long.
    assert!(begun.elapsed() < Duration::from_secs(25), "it took {:?}:\n{}", begun.elapsed(), vm.err());
    provider.signal(18);
    let ended = vm.end(LIMIT);
    assert_eq!(ended.code, Some(14), "{}", ended.err);
    assert!(ended.err.contains("its volumes are flushed"), "{}", ended.err);
    lab.seal_disks("verify:9:0x11,disk:1,verify:9:0x22,disk:2,verify:9:0x33,poweroff", &disks);
    let again = lab.run_vm(&[]).good();
    assert_eq!(again.out.matches("verify 9 ok").count(), 3, "{}", again.out);
}
