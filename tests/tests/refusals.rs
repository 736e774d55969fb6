//! What must not start, and that it does not: each time no vCPU runs, one clear line, a non-zero exit.

use fealty_tests::lab::{LIMIT, Lab, Plan, lease, stop};
use fealty_tests::process::{Background, run};
use policy::{Base64Url, Digest};
use serde_json::{Value, json};

fn lab(words: &str) -> Lab {
    Lab::new(&Plan { words: words.into(), ..Plan::default() })
}

#[test]
fn attack_17_a_host_with_a_changed_layer_gets_no_keys() {
    let mut lab = lab("hello,poweroff");
    lab.power_off();
    lab.tpm.power_on();
    std::fs::write(lab.path("intruder"), b"not what the customer knows").expect("written");
    lab.play_firmware();
    lab.measure(&[&format!("intruder={}@1", lab.text("intruder"))]).good();
    lab.run_vm(&[]).no_guest(&["intruder", "reference"]);
    assert!(lab.audit_kinds().contains(&"attestation-refused".into()));
}

#[test]
fn attack_07_a_tpm_that_is_in_no_inventory_gets_no_keys() {
    let mut lab = lab("hello,poweroff");
    let other = lab.path("tpm2");
    std::fs::create_dir(&other).expect("a folder");
    lab.power_off();
    lab.tpm = fealty_tests::swtpm::Swtpm::start(&other);
    lab.boot_host();
    lab.run_vm(&[]).no_guest(&["tpm", "inventory"]);
}

#[test]
fn a_policy_that_says_no_is_obeyed_and_an_empty_one_says_no() {
    let mut lab = lab("hello,poweroff");
    lab.set_policy(&lease(600, 10), "permit (principal, action == Action::\"vm.renew\", resource);");
    lab.run_vm(&[]).no_guest(&["policy"]);
    lab.set_policy(&lease(600, 10), "");
    lab.run_vm(&[]).no_guest(&["policy"]);
}

#[test]
fn a_host_whose_claims_the_policy_does_not_accept_is_refused() {
    if std::fs::read_to_string("/proc/sys/kernel/yama/ptrace_scope").is_ok_and(|s| s.trim() == "3") {
        return; // This machine does keep what the policy asks for.
    }
    let mut lab = lab("hello,poweroff");
    lab.set_policy(r#""lease": {"seconds": 600, "quiesce_seconds": 10}"#, fealty_tests::lab::POWER_ON_ONLY);
    lab.run_vm(&[]).no_guest(&["ptrace"]);
}

#[test]
fn an_older_vm_file_is_refused_until_the_customer_goes_back() {
    let lab = lab("hello,poweroff");
    std::fs::copy(lab.path("store/payroll.vm"), lab.path("store/older.vm")).expect("copied");
    lab.seal("hello,hash,poweroff", "interval");
    run(&mut lab.vm_file("store/older.vm", &[]), LIMIT).no_guest(&["current", "vm file"]);
    lab.keys(&["vm", "back", &lab.text("store/older.vm")]).good();
    run(&mut lab.vm_file("store/older.vm", &[]), LIMIT).good();
    assert!(lab.audit_kinds().contains(&"vm-file-back".into()));
}

#[test]
fn a_second_start_is_refused_while_the_first_runs() {
    let lab = lab("hello,tick");
    let mut first = Background::start(&mut lab.vm(&[]));
    first.until("fealty-guest", LIMIT);
    lab.run_vm(&[]).no_guest(&["still run", "instance"]);
    stop(first);
}

#[test]
fn without_its_provider_nothing_starts() {
    let mut lab = lab("hello,poweroff");
    lab.stop_provider(9);
    lab.run_vm(&[]).no_guest(&["provider", "reach"]);
    lab.start_provider();
    lab.run_vm(&[]).good();
}

#[test]
fn a_ca_that_the_vm_file_does_not_pin_is_the_wrong_provider() {
    let lab = lab("hello,poweroff");
    let roots = lab.tpm.roots().display().to_string();
    let ended = lab.run_vm(&["--provider-ca", &roots]);
    assert_eq!(ended.code, Some(6), "{}", ended.err);
    ended.no_guest(&["ca certificate"]);
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
    lab.run_vm(&[]).no_guest(&["digest", "sha-256", "sha256"]);
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
        println!("{name}");
        lab.run_vm(&[]).no_guest(&["payroll.vm", "the key provider refuses"]);
    }
    run(&mut lab.vm_file("store/nothing.vm", &[]), LIMIT).no_guest(&["nothing.vm"]);
    std::fs::write(&file, good).expect("written");
    lab.run_vm(&[]).good();
}

#[test]
fn attack_32_a_vm_file_with_another_header_gets_no_keys() {
    let lab = lab("hello,poweroff");
    let path = lab.path("store/payroll.vm");
    let good = std::fs::read(&path).expect("read");
    let file: Value = serde_json::from_slice(&good).expect("JSON");
    let protected = Base64Url::parse(file["protected"].as_str().expect("a header")).expect("base64url");
    let header: Value = serde_json::from_slice(&protected).expect("JSON");
    // The same provider by another name that its certificate has, and an address where nobody is.
    let (alias, nobody) = (lab.url().replace("localhost", "127.0.0.1"), "https://localhost:1");
    for (name, value, code, words) in [
        ("customer", json!("other"), 4, "the key provider refuses"),
        ("vm", json!("web"), 4, "the key provider refuses"),
        ("kid", json!("0123456789abcdef"), 4, "not the current file"),
        ("providers", json!([alias]), 4, "not the current file"),
        ("providers", json!([nobody]), 5, "can't be reached"),
        ("pin", json!(Digest::of(b"another authority")), 6, "is not the vm's key provider"),
    ] {
        println!("{name} is {value}");
        assert!(!header[name].is_null() && header[name] != value);
        let (mut file, mut header) = (file.clone(), header.clone());
        header[name] = value;
        file["protected"] = json!(Base64Url(header.to_string().into_bytes()).to_string());
        std::fs::write(&path, file.to_string()).expect("written");
        assert_eq!(lab.run_vm(&[]).no_guest(&[words]).code, Some(code));
    }
    assert!(!lab.audit_kinds().contains(&"keys-released".into()));
    std::fs::write(&path, good).expect("written");
    lab.run_vm(&[]).good();
}

#[test]
fn another_volume_in_its_place_does_not_open() {
    let lab = lab("hello,hash,poweroff");
    let (volume, other) = (lab.path("store/root.vol"), lab.text("store/other.vol"));
    let disk = fealty_tests::process::program("fealty-disk").display().to_string();
    lab.keys(&["volume", "create", "acme", "other"]).good();
    lab.keys(&["volume", "exec", "acme", "other", "--", &disk, "import", &lab.text("root.img"), &other]).good();
    let good = std::fs::read(&volume).expect("read");
    std::fs::copy(&other, &volume).expect("copied");
    assert_eq!(lab.run_vm(&[]).no_guest(&["volume"]).code, Some(8));
    std::fs::write(&volume, good).expect("written");
    lab.run_vm(&[]).good();
}

#[test]
fn a_flipped_bit_is_an_error_and_never_other_data() {
    let plan = Plan { words: "hello,hash,poweroff".into(), ..Plan::default() };
    let lab = Lab::new(&plan);
    let path = lab.path("store/root.vol");
    let right = format!("sha256 {}", Digest::of(&plan.disk));
    let mut failed = 0;
    // The beginning, which says what it is; then data and its map. Places that hold nothing are nobody's.
    for part in 0..8 {
        let mut bytes = std::fs::read(&path).expect("read");
        let at = bytes.len() / 8 * part + 100;
        bytes[at] ^= 4;
        let flipped = bytes[at];
        std::fs::write(&path, bytes).expect("written");
        let ended = lab.run_vm(&[]);
        let read = ended.out.contains(&right);
        println!("byte {at}: {:?} {}", ended.code, ended.out);
        assert!(read || !ended.out.contains("sha256"), "other data: {}", ended.out);
        if ended.code == Some(0) {
            assert!(read || ended.out.contains("disk error hash"), "{}", ended.out);
            failed += usize::from(!read);
        } else {
            assert_eq!(ended.no_guest(&["volume"]).code, Some(8));
        }
        // What was not written anew meanwhile is put right.
        let mut bytes = std::fs::read(&path).expect("read");
        if bytes[at] == flipped {
            bytes[at] ^= 4;
            std::fs::write(&path, bytes).expect("written");
        }
    }
    assert!(failed > 0, "no bit of the data was flipped");
    let told = |e: &Value| e.to_string().contains("disk-integrity");
    assert!(lab.audit().iter().filter(|e| told(e)).count() >= failed, "{:?}", lab.audit());
    assert!(lab.run_vm(&[]).good().out.contains(&right));
}

#[test]
fn a_volume_that_was_rolled_back_truncated_or_emptied_does_not_open() {
    let lab = lab("hello,write:3:0x33,flush,poweroff");
    let volume = lab.path("store/root.vol");
    let old = std::fs::read(&volume).expect("read");
    lab.run_vm(&[]).good();
    let good = std::fs::read(&volume).expect("read");
    std::fs::write(&volume, &old).expect("written");
    lab.run_vm(&[]).no_guest(&["volume", "anchor", "older"]);
    std::fs::write(&volume, &good[..good.len() / 2]).expect("written");
    lab.run_vm(&[]).no_guest(&["volume"]);
    std::fs::write(&volume, vec![0u8; good.len()]).expect("written");
    lab.run_vm(&[]).no_guest(&["volume"]);
    std::fs::remove_file(&volume).expect("removed");
    lab.run_vm(&[]).no_guest(&["root"]);
    std::fs::write(&volume, &good).expect("written");
    lab.run_vm(&[]).good();
    let exported = lab.export();
    assert!(exported[3 * 4096..4 * 4096].iter().all(|b| *b == 0x33));
}

#[test]
fn attack_01_a_tpm_that_restarted_starts_the_vm_again_only_after_measuring() {
    let mut lab = lab("hello,poweroff");
    lab.run_vm(&[]).good();
    lab.power_off();
    lab.tpm.power_on();
    lab.run_vm(&[]).no_guest(&["tpm"]);
    lab.play_firmware();
    lab.run_vm(&[]).no_guest(&["fealty-host measure"]);
    lab.measure(&[]).good();
    lab.run_vm(&[]).good();
}
