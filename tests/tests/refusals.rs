//! What must not start, and that it does not: each time no vCPU runs, one clear line, a non-zero exit.

use fealty_tests::lab::{LIMIT, Lab, Plan, lease};
use fealty_tests::process::{Background, Ended};

fn lab(words: &str) -> Lab {
    Lab::new(&Plan { words: words.into(), ..Plan::default() })
}

/// No vCPU ran, and one line says why; it holds one of `words`.
#[track_caller]
fn no_guest(ended: Ended, words: &[&str]) {
    let ended = ended.refused();
    assert!(!ended.out.contains("fealty-guest"), "the guest ran:\n{}", ended.out);
    let line =
        ended.err.lines().rfind(|l| l.starts_with("fealty: ")).unwrap_or_else(|| panic!("no line:\n{}", ended.err));
    let lower = line.to_lowercase();
    assert!(words.iter().any(|w| lower.contains(w)), "{line:?} says none of {words:?}");
}

#[test]
fn attack_17_a_host_with_a_changed_layer_gets_no_keys() {
    let mut lab = lab("hello,poweroff");
    lab.tpm.reset();
    std::fs::remove_dir_all(lab.run.path()).expect("the boot's folder is gone with the boot");
    std::fs::write(lab.path("intruder"), b"not what the customer knows").expect("written");
    lab.play_firmware();
    lab.measure(&[&format!("intruder={}@1", lab.text("intruder"))]).good();
    no_guest(lab.run_vm(&[]), &["intruder", "reference"]);
    assert!(lab.audit_kinds().contains(&"attestation-refused".into()));
}

#[test]
fn attack_07_a_tpm_that_is_in_no_inventory_gets_no_keys() {
    let mut lab = lab("hello,poweroff");
    let other = lab.path("tpm2");
    std::fs::create_dir(&other).expect("a folder");
    lab.tpm = fealty_tests::swtpm::Swtpm::start(&other);
    std::fs::remove_dir_all(lab.run.path()).expect("another machine");
    lab.boot_host();
    no_guest(lab.run_vm(&[]), &["tpm", "inventory"]);
}

#[test]
fn a_policy_that_says_no_is_obeyed_and_an_empty_one_says_no() {
    let mut lab = lab("hello,poweroff");
    lab.set_policy(&lease(600, 10), "permit (principal, action == Action::\"vm.renew\", resource);");
    no_guest(lab.run_vm(&[]), &["policy"]);
    lab.set_policy(&lease(600, 10), "");
    no_guest(lab.run_vm(&[]), &["policy"]);
}

#[test]
fn a_host_whose_claims_the_policy_does_not_accept_is_refused() {
    if std::fs::read_to_string("/proc/sys/kernel/yama/ptrace_scope").is_ok_and(|s| s.trim() == "3") {
        return; // This machine does keep what the policy asks for.
    }
    let mut lab = lab("hello,poweroff");
    lab.set_policy(r#""lease": {"seconds": 600, "quiesce_seconds": 10}"#, fealty_tests::lab::POWER_ON_ONLY);
    no_guest(lab.run_vm(&[]), &["ptrace"]);
}

#[test]
fn an_older_vm_file_is_refused_until_the_customer_goes_back() {
    let lab = lab("hello,poweroff");
    std::fs::copy(lab.path("store/payroll.vm"), lab.path("store/older.vm")).expect("copied");
    lab.seal("hello,hash,poweroff", "interval");
    no_guest(fealty_tests::process::run(&mut lab.vm_file("store/older.vm", &[]), LIMIT), &["current", "vm file"]);
    lab.keys(&["vm", "back", &lab.text("store/older.vm")]).good();
    fealty_tests::process::run(&mut lab.vm_file("store/older.vm", &[]), LIMIT).good();
    assert!(lab.audit_kinds().contains(&"vm-file-back".into()));
}

#[test]
fn a_second_start_is_refused_while_the_first_runs() {
    let lab = lab("hello,tick");
    let mut first = Background::start(&mut lab.vm(&[]));
    first.until("fealty-guest", LIMIT);
    no_guest(lab.run_vm(&[]), &["still run", "instance"]);
    first.signal(15);
    first.signal(15);
    first.end(LIMIT);
}

#[test]
fn without_its_provider_nothing_starts() {
    let mut lab = lab("hello,poweroff");
    lab.stop_provider(9);
    no_guest(lab.run_vm(&[]), &["provider", "reach"]);
    lab.start_provider();
    lab.run_vm(&[]).good();
}

#[test]
fn a_ca_that_the_vm_file_does_not_pin_is_the_wrong_provider() {
    let lab = lab("hello,poweroff");
    let roots = lab.tpm.roots().display().to_string();
    let ended = lab.run_vm(&["--provider-ca", &roots]);
    assert_eq!(ended.code, Some(6), "{}", ended.err);
    no_guest(ended, &["ca certificate"]);
}

#[test]
fn a_kernel_with_another_digest_is_not_booted_and_the_instance_ends() {
    let lab = lab("hello,poweroff");
    let kernel = lab.path("store/guest");
    let good = std::fs::read(&kernel).expect("read");
    let mut bad = good.clone();
    let last = bad.len() - 1;
    bad[last] ^= 1;
    std::fs::write(&kernel, &bad).expect("written");
    no_guest(lab.run_vm(&[]), &["digest", "sha-256", "sha256"]);
    std::fs::write(&kernel, &good).expect("written");
    lab.run_vm(&[]).good();
}

#[test]
fn a_vm_file_that_was_changed_anywhere_is_refused() {
    let lab = lab("hello,poweroff");
    let file = lab.path("store/payroll.vm");
    let good = std::fs::read(&file).expect("read");
    for (name, bad) in [
        ("empty", Vec::new()),
        ("truncated", good[..good.len() / 2].to_vec()),
        ("garbage", b"{\"protected\": 7}".to_vec()),
        ("one letter", {
            let mut bad = good.clone();
            let at = bad.len() / 2;
            bad[at] = if bad[at] == b'A' { b'B' } else { b'A' };
            bad
        }),
    ] {
        std::fs::write(&file, bad).expect("written");
        let ended = lab.run_vm(&[]).refused();
        assert!(!ended.out.contains("fealty-guest"), "{name}");
        assert!(ended.err.lines().any(|l| l.starts_with("fealty: ")), "{name}: {}", ended.err);
    }
    let missing = fealty_tests::process::run(&mut lab.vm_file("store/nothing.vm", &[]), LIMIT);
    no_guest(missing, &["nothing.vm"]);
    std::fs::write(&file, good).expect("written");
    lab.run_vm(&[]).good();
}

#[test]
fn a_volume_that_was_rolled_back_truncated_swapped_or_touched_does_not_open() {
    let lab = lab("hello,write:3:0x33,flush,poweroff");
    let volume = lab.path("store/root.vol");
    let old = std::fs::read(&volume).expect("read");
    lab.run_vm(&[]).good();
    let good = std::fs::read(&volume).expect("read");
    std::fs::write(&volume, &old).expect("written");
    no_guest(lab.run_vm(&[]), &["volume", "anchor", "older"]);
    std::fs::write(&volume, &good[..good.len() / 2]).expect("written");
    no_guest(lab.run_vm(&[]), &["volume"]);
    std::fs::write(&volume, vec![0u8; good.len()]).expect("written");
    no_guest(lab.run_vm(&[]), &["volume"]);
    std::fs::remove_file(&volume).expect("removed");
    no_guest(lab.run_vm(&[]), &["root"]);
    std::fs::write(&volume, &good).expect("written");
    lab.run_vm(&[]).good();
    let exported = lab.export();
    assert!(exported[3 * 4096..4 * 4096].iter().all(|b| *b == 0x33));
}

#[test]
fn attack_01_a_tpm_that_restarted_starts_the_vm_again_only_after_measuring() {
    let mut lab = lab("hello,poweroff");
    lab.run_vm(&[]).good();
    lab.tpm.reset();
    std::fs::remove_dir_all(lab.run.path()).expect("the boot's folder is gone with the boot");
    no_guest(lab.run_vm(&[]), &["tpm"]);
    lab.play_firmware();
    no_guest(lab.run_vm(&[]), &["fealty-host measure"]);
    lab.measure(&[]).good();
    lab.run_vm(&[]).good();
}
