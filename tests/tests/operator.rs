//! What an operator says on the command line, each the whole way: where files lie, who the provider is, what would be released.

use fealty_tests::lab::{Lab, POWER_ON_ONLY, Plan, lease};
use policy::Digest;
use serde_json::{Value, json};

#[test]
fn a_dry_run_shows_the_evidence_and_the_providers_opinion_and_releases_nothing() {
    let mut lab = Lab::new(&Plan { words: "hello,poweroff".into(), ..Plan::default() });
    let attest = |lab: &Lab, more: &[&str]| {
        let (file, tcti, runtime) = (lab.text("store/payroll.vm"), lab.tpm.tcti(), lab.runtime_dir());
        let words = ["attest", &file, "--dry-run", "--tcti", &tcti, "--runtime-dir", &runtime];
        lab.run_tool("fealty", &[&words, more].concat())
    };
    let shown = attest(&lab, &[]).good().out;
    for line in ["PCR 0 ", "PCR 14 ", "layer           fealty-host ", "layers sealed   true", "earlier peer    none"] {
        assert!(shown.lines().any(|l| l.starts_with(line)), "no {line:?} in:\n{shown}");
    }
    assert!(shown.ends_with("provider        accepts: this host would get the VM's keys\n"), "{shown}");
    let said: Value = serde_json::from_str(&attest(&lab, &["--json"]).good().out).expect("one JSON object");
    let file = std::fs::read(lab.path("store/payroll.vm")).expect("read");
    assert_eq!((&said["would_release"], &said["evidence"]["vm_file"]), (&json!(true), &json!(Digest::of(&file))));
    assert_eq!(said["evidence"]["host"], lab.service()["host"]);

    lab.set_policy(&lease(600, 10), "");
    let refused = attest(&lab, &[]);
    assert_eq!(refused.code, Some(4), "{}", refused.err);
    assert!(refused.out.lines().any(|l| l.starts_with("provider        refuses: ")), "{}", refused.out);
    let refused = attest(&lab, &["--json"]);
    let said: Value = serde_json::from_str(&refused.out).expect("one JSON object");
    assert_eq!((refused.code, &said["would_release"]), (Some(4), &json!(false)));
    assert!(said["provider"].as_str().is_some_and(|why| why.contains("policy")), "{said}");

    assert!(!lab.audit_kinds().contains(&"keys-released".into()));
    lab.set_policy(&lease(600, 10), POWER_ON_ONLY);
    lab.run_vm(&[]).good();
}

#[test]
fn files_lie_where_the_operator_says_and_the_first_provider_that_answers_is_asked() {
    let plan = Plan { words: "hello,hash,poweroff".into(), ..Plan::default() };
    let lab = Lab::new(&plan);
    let right = format!("sha256 {}", Digest::of(&plan.disk));

    // The certificate of the authority, which the server sends anyway; that of another; and what is none.
    lab.run_vm(&["--provider-ca", &lab.text("keys/ca.pem")]).good();
    lab.run_vm(&["--provider-ca", &lab.text("tpm/roots.pem")]).no_guest(&["is not the one that the vm file pins"]);
    lab.run_vm(&["--provider-ca", &lab.text("policy.txt")]).no_guest(&["holds no certificate"]);

    std::fs::create_dir(lab.path("elsewhere")).expect("a folder");
    std::fs::rename(lab.path("store/guest"), lab.path("elsewhere/kernel")).expect("moved");
    std::fs::rename(lab.path("store/root.vol"), lab.path("elsewhere/disk")).expect("moved");
    lab.run_vm(&[]).no_guest(&["say --map guest=path"]);
    let (kernel, disk) = (format!("guest={}", lab.text("elsewhere/kernel")), "root=elsewhere/disk");
    lab.run_vm(&["--map", &kernel]).no_guest(&["say --map root"]);
    let ran = lab.run_vm(&["--map", &kernel, "--map", disk]).good();
    assert!(ran.out.contains(&right), "{}", ran.out);
    std::fs::rename(lab.path("elsewhere/disk"), lab.path("store/root.vol")).expect("moved");

    let initrd = b"what the kernel unpacks first";
    std::fs::write(lab.path("store/initrd"), initrd).expect("written");
    let with_initrd = |config: &mut Value| config["payload"]["initramfs"] = json!({ "name": "initrd" });
    lab.seal_with("hello,initrd,poweroff", "interval", with_initrd, &[]);
    let ran = lab.run_vm(&[]).good();
    assert!(ran.out.contains(&format!("initrd sha256 {}", Digest::of(initrd))), "{}", ran.out);
    std::fs::write(lab.path("store/initrd"), b"what the kernel unpacks FIRST").expect("written");
    lab.run_vm(&[]).no_guest(&["digest", "sha-256", "sha256"]);

    let dead = "https://localhost:1";
    lab.seal_with("hello,hash,poweroff", "interval", |_| {}, &["--provider", dead, "--provider", &lab.url()]);
    assert!(lab.run_vm(&[]).good().out.contains(&right));
    lab.seal_with("hello,hash,poweroff", "interval", |_| {}, &["--provider", dead]);
    assert_eq!(lab.run_vm(&[]).no_guest(&["can't be reached"]).code, Some(5));
}
