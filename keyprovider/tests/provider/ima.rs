//! IMA logs: each part is read once per customer, boot and set of reference values, and nothing is skipped.

use crate::support::Lab;
use crate::support::vm::SoftVm;
use attest::bundle::BundleKey;
use attest::protocol::ProblemType;
use policy::Operation;
use policy::operation::OperationRequest;

fn lab() -> Lab {
    let mut lab = Lab::new();
    lab.host.start_ima();
    lab.host.measure("/usr/bin/fealty", b"vmm");
    lab.host.measure("/usr/bin/known", b"known");
    lab.set_reference();
    lab.host.start_ima();
    lab.host.measure("/usr/bin/fealty", b"vmm");
    lab
}

fn offset(vm: &mut SoftVm, lab: &Lab) -> Option<u64> {
    vm.post(&vm.request(&lab.host)).expect("a challenge").ima_offset
}

#[test]
fn an_ima_log_is_read_on_from_where_it_ended() {
    let mut lab = lab();
    let mut vm = SoftVm::new(&lab);
    assert_eq!(offset(&mut vm, &lab), Some(0));
    vm.start(&lab.host);
    vm.operation = OperationRequest::plain(Operation::Renew);
    let read = lab.host.ima.len() as u64;
    assert_eq!(offset(&mut vm, &lab), Some(read));
    lab.host.measure("/usr/bin/known", b"known");
    vm.attest(&lab.host).expect("renewed");
    assert_eq!(offset(&mut vm, &lab), Some(lab.host.ima.len() as u64));
    // A power-on sends a short log whole: the host may have been reset since.
    let mut other = SoftVm::new(&lab);
    assert_eq!(offset(&mut other, &lab), Some(0));
    // New reference values judge everything anew.
    lab.keys(&["reference", "set", "acme", &lab.text("values.json")]);
    assert_eq!(offset(&mut vm, &lab), Some(0));
}

#[test]
fn attack_21_what_was_judged_by_older_values_is_not_taken_for_judged_by_newer_ones() {
    let mut lab = lab();
    lab.host.measure("/usr/bin/known", b"known");
    let mut vm = SoftVm::new(&lab);
    vm.start(&lab.host);
    vm.operation = OperationRequest::plain(Operation::Renew);
    // Evidence with the log's end alone is held back while the customer takes a file from the values.
    let challenge = vm.post(&vm.request(&lab.host)).expect("a challenge");
    assert!(challenge.ima_offset > Some(0));
    let evidence = vm.evidence(&lab.host, &challenge, &BundleKey::generate().expect("memory"));
    let mut values: serde_json::Value =
        serde_json::from_slice(&std::fs::read(lab.path("values.json")).expect("values")).expect("json");
    values["pcrs"]["10"].as_array_mut().expect("files").retain(|file| file["layer"] != "/usr/bin/known");
    lab.write("fewer.json", values.to_string().as_bytes());
    lab.keys(&["reference", "set", "acme", &lab.text("fewer.json")]);
    assert_eq!(vm.put(&challenge, &evidence).err().and_then(|e| e.problem()), Some(ProblemType::StaleNonce));
    assert_eq!(vm.refused(&lab.host), ProblemType::UntrustedPlatform);
}

#[test]
fn attack_21_an_unknown_file_anywhere_in_the_log_is_refused() {
    let mut lab = lab();
    let mut vm = SoftVm::new(&lab);
    vm.start(&lab.host);
    lab.host.measure("/tmp/shell", b"shell");
    vm.operation = OperationRequest::plain(Operation::Renew);
    assert_eq!(vm.refused(&lab.host), ProblemType::UntrustedPlatform);
    assert_eq!(vm.refused(&lab.host), ProblemType::UntrustedPlatform, "and what was refused is not skipped next time");
    // Without the boot aggregate in front, or cut, the log is none.
    let whole = std::mem::take(&mut lab.host.ima);
    assert_eq!(SoftVm::new(&lab).refused(&lab.host), ProblemType::BadLog);
    lab.host.ima = whole[..whole.len() / 2].to_vec();
    assert!(matches!(SoftVm::new(&lab).refused(&lab.host), ProblemType::BadLog));
}

#[test]
fn attack_47_what_one_customer_accepted_is_judged_again_for_another() {
    let mut lab = lab();
    // `other` knows only the VMM.
    let mut values: serde_json::Value =
        serde_json::from_slice(&std::fs::read(lab.path("values.json")).expect("values")).expect("json");
    let known = values["pcrs"]["10"].as_array_mut().expect("files");
    known.retain(|file| file["layer"] != "/usr/bin/known");
    lab.write("theirs.json", values.to_string().as_bytes());
    lab.keys(&["customer", "create", "other", "--lab", "--policy-key", &lab.text("other.key")]);
    lab.keys(&["customer", "allow-cloud", "other", "lab"]);
    lab.keys(&["reference", "set", "other", &lab.text("theirs.json")]);
    lab.keys(&["vm", "create", "other", "ledger"]);
    lab.host.measure("/usr/bin/known", b"known");
    SoftVm::new(&lab).start(&lab.host);
    let mut theirs = SoftVm::of(&lab, "other", "ledger", lab.file);
    assert_eq!(offset(&mut theirs, &lab), Some(0));
    assert_eq!(theirs.refused(&lab.host), ProblemType::UntrustedPlatform);
}

#[test]
fn a_host_that_was_reset_is_asked_for_its_whole_log() {
    let mut lab = lab();
    let mut vm = SoftVm::new(&lab);
    let instance = vm.start(&lab.host).release.instance;
    lab.host.reset();
    lab.host.start_ima();
    lab.host.measure("/usr/bin/fealty", b"vmm");
    lab.host.measure("/usr/bin/known", b"known");
    let mut next = SoftVm::new(&lab);
    assert_eq!(next.start(&lab.host).release.instance.get(), instance.get() + 1);
    vm.operation = OperationRequest::plain(Operation::Renew);
    assert_eq!(vm.refused(&lab.host), ProblemType::OldInstance);
}

#[test]
fn a_stranger_can_not_have_a_long_log_asked_for_from_its_start() {
    let mut lab = lab();
    let long = format!("/usr/lib/{}", "n".repeat(4000));
    lab.host.measure(&long, b"long");
    lab.set_reference();
    // More than a firmware log may have: it is still taken whole, once.
    while lab.host.ima.len() < 5 << 19 {
        lab.host.measure(&long, b"long");
    }
    let mut vm = SoftVm::new(&lab);
    vm.start(&lab.host);
    vm.operation = OperationRequest::plain(Operation::Renew);
    let read = Some(lab.host.ima.len() as u64);
    assert_eq!(offset(&mut vm, &lab), read);
    let mut stranger = SoftVm::new(&lab);
    let challenge = stranger.post(&stranger.request(&lab.host)).expect("a challenge");
    assert_eq!(challenge.ima_offset, read);
    let key = attest::bundle::BundleKey::generate().expect("memory");
    let mut evidence = stranger.evidence(&lab.host, &challenge, &key);
    let last = evidence.quote.0.last_mut().expect("a quote");
    *last ^= 1;
    let refused = stranger.put(&challenge, &evidence).err().and_then(|e| e.problem());
    assert_eq!(refused, Some(ProblemType::BadEvidence));
    assert_eq!(offset(&mut vm, &lab), read, "what was read stays read");
    vm.attest(&lab.host).expect("renewed");
    // Where the host itself sent a log that does not fit, all of it is asked for next time.
    let whole = lab.host.ima.clone();
    lab.host.ima.extend_from_slice(b"garbage");
    assert_eq!(vm.refused(&lab.host), ProblemType::BadLog);
    lab.host.ima = whole;
    assert_eq!(offset(&mut vm, &lab), Some(0));
    vm.attest(&lab.host).expect("renewed");
}
