//! The way of a key: what a host gets that has proved itself, and what is written down of it.

use crate::support::vm::{SoftVm, check_receipt};
use crate::support::{GO, Lab, anchor_of};
use attest::bundle::BundleKey;
use attest::protocol::{AnchorUpdate, KeyName, ProblemType};
use fealty_keyprovider::api::TrustView;
use policy::Operation;
use policy::operation::OperationRequest;
use policy::report::ReportEvent;

#[test]
fn a_host_that_proves_itself_gets_its_keys_and_a_receipt() {
    let lab = Lab::new();
    let mut vm = SoftVm::new(&lab);
    let challenge = vm.post(&vm.request(&lab.host)).expect("a challenge");
    assert!(challenge.credential.is_some(), "the AK is not known yet");
    let keys = vm.start(&lab.host);
    let release = &keys.release;
    assert_eq!(release.instance.get(), 1);
    assert!(release.lab);
    assert!(matches!(release.keys[..], [KeyName::VmFile(_), KeyName::Volume(0)]));
    assert_eq!(keys.keys.len(), 2);
    let grant = &release.volumes[0];
    assert_eq!(grant.volume, lab.volume);
    assert_eq!(grant.open_number.get(), 2, "the first opening created it");
    assert!(grant.anchor.is_some());
    check_receipt(&lab, &keys);
    let seals: TrustView = lab.admin().get("/v1/customers/acme").expect("trust roots");
    assert_eq!(seals.trust.policy_version, release.policy.version);
    assert_eq!(keys.event.instance, Some(release.instance));
    assert_eq!(keys.event.details["qualified"], release.qualified.to_string());
    // The key opens the VM file, whose trust roots are those that the receipt was checked against.
    let file = attest::vmfile::VmFile::read(&std::fs::read(lab.path("payroll.vm")).expect("the file")).expect("reads");
    let config = file.open(&keys.keys[0]).expect("opens");
    assert_eq!(config.disks[0].volume, lab.volume);
    // The AK is remembered: the next challenge needs no activation.
    vm.end(release.instance).expect("ended");
    let challenge = SoftVm::new(&lab).post(&vm.request(&lab.host)).expect("a challenge");
    assert!(challenge.credential.is_none());
}

#[test]
fn a_renewal_keeps_instance_and_open_numbers() {
    let lab = Lab::new();
    let mut vm = SoftVm::new(&lab);
    let first = vm.start(&lab.host);
    let own = &first.release.volumes[0];
    let newer = anchor_of(lab.volume, own.open_number.get(), 9, own.key_id);
    vm.anchor(first.release.instance, &AnchorUpdate { anchor: newer.clone(), closed: false }).expect("kept");
    // A newer VM file does not end a running instance.
    lab.seal("payroll", &[lab.volume]);
    for operation in [Operation::Renew, Operation::ResumeKeys] {
        vm.operation = OperationRequest::plain(operation);
        let again = vm.attest(&lab.host).expect("renewed");
        assert_eq!(again.release.instance, first.release.instance);
        assert_eq!(again.release.volumes[0].open_number, first.release.volumes[0].open_number);
        assert_eq!(again.release.volumes[0].anchor, Some(newer.clone()));
        assert!(again.keys[1].ct_eq(&first.keys[1]));
        check_receipt(&lab, &again);
    }
}

#[test]
fn a_renewal_is_for_the_same_key_boot_and_file() {
    let mut lab = Lab::new();
    let mut vm = SoftVm::new(&lab);
    let file = vm.file;
    let keys = vm.start(&lab.host);
    let mut other = SoftVm::new(&lab).asking(Operation::Renew);
    assert_eq!(other.refused(&lab.host), ProblemType::OldInstance, "another client key");
    vm.operation = OperationRequest::plain(Operation::Renew);
    vm.file = policy::Digest([9; 32]);
    assert_eq!(vm.refused(&lab.host), ProblemType::NotCurrentFile, "another file");
    vm.file = file;
    lab.host.clock.reset_count += 1;
    assert_eq!(vm.refused(&lab.host), ProblemType::OldInstance, "another boot");
    lab.host.clock.reset_count -= 1;
    assert_eq!(vm.attest(&lab.host).expect("renewed").release.instance, keys.release.instance);
    lab.keys(&["instance", "revoke", "acme", "payroll"]);
    assert_eq!(vm.refused(&lab.host), ProblemType::OldInstance, "revoked");
}

#[test]
fn only_the_current_vm_file_gets_keys() {
    let lab = Lab::new();
    let older = std::fs::read(lab.path("payroll.vm")).expect("the file");
    let newer = lab.seal("payroll", &[lab.volume]);
    let mut vm = SoftVm::new(&lab);
    assert_eq!(vm.refused(&lab.host), ProblemType::NotCurrentFile);
    vm.file = newer;
    let keys = vm.start(&lab.host);
    vm.end(keys.release.instance).expect("ended");
    // Going back is the customer's, and written down.
    lab.write("older.vm", &older);
    lab.keys(&["vm", "back", "older.vm"]);
    assert_eq!(vm.refused(&lab.host), ProblemType::NotCurrentFile);
    SoftVm::new(&lab).start(&lab.host);
    assert_eq!(lab.events("vm-file-back").len(), 1);
}

#[test]
fn one_instance_at_most() {
    use policy::instance::EarlierPeer;
    let mut lab = Lab::with(2, GO);
    let mut first = SoftVm::new(&lab);
    let instance = first.start(&lab.host).release.instance;
    let mut second = SoftVm::new(&lab);
    for earlier in [EarlierPeer::Lives, EarlierPeer::Unknown] {
        second.earlier_peer = earlier;
        assert_eq!(second.refused(&lab.host), ProblemType::StillRuns);
    }
    // The service's word that none lives frees the VM; the older instance is refused from then on.
    second.earlier_peer = EarlierPeer::None;
    let newer = second.start(&lab.host).release.instance;
    assert_eq!(newer.get(), instance.get() + 1);
    let late = first.report(instance, ReportEvent::Runs).expect_err("refused");
    assert_eq!(late.problem(), Some(ProblemType::OldInstance));
    // A higher resetCount frees it too, whatever the service says.
    lab.host.reset();
    let mut third = SoftVm::new(&lab);
    third.earlier_peer = EarlierPeer::Unknown;
    third.start(&lab.host);
    // And so does time: the lease of two seconds and the margin.
    let mut fourth = SoftVm::new(&lab);
    fourth.earlier_peer = EarlierPeer::Lives;
    assert_eq!(fourth.refused(&lab.host), ProblemType::StillRuns);
    let start = std::time::Instant::now();
    while let Err(error) = fourth.attest(&lab.host) {
        assert_eq!(error.problem(), Some(ProblemType::StillRuns));
        assert!(start.elapsed().as_secs() < 60, "the lease never ends");
        std::thread::sleep(std::time::Duration::from_millis(200));
    }
}

#[test]
fn a_quote_that_was_held_back_frees_nothing() {
    let lab = Lab::new();
    // Asked and quoted while no other process lived, then held back by the network.
    let mut held = SoftVm::new(&lab);
    let challenge = held.post(&held.request(&lab.host)).expect("a challenge");
    let evidence = held.evidence(&lab.host, &challenge, &BundleKey::generate().expect("memory"));
    let mut running = SoftVm::new(&lab);
    running.start(&lab.host);
    let late = held.put(&challenge, &evidence).err();
    assert_eq!(late.expect("refused").problem(), Some(ProblemType::StillRuns));
    running.asking(Operation::Renew).attest(&lab.host).expect("the instance is still the newest");
}

#[test]
fn an_instance_that_vanishes_is_told() {
    let lab = Lab::new();
    let instance = SoftVm::new(&lab).start(&lab.host).release.instance;
    assert!(lab.events("report-gap").is_empty());
    let mut next = SoftVm::new(&lab);
    let number = next.start(&lab.host).release.instance;
    let told = lab.events("report-gap");
    assert_eq!(told.len(), 1, "{told:?}");
    assert_eq!(told[0]["instance"], instance.get());
    assert_eq!(told[0]["details"]["missing"], "its end");
    next.end(number).expect("reported");
    SoftVm::new(&lab).start(&lab.host);
    assert_eq!(lab.events("report-gap").len(), 1, "this one said that it ends");
}

#[test]
fn a_lost_answer_is_asked_for_again_with_the_same_bytes() {
    let mut lab = Lab::new();
    let mut vm = SoftVm::new(&lab);
    let challenge = vm.post(&vm.request(&lab.host)).expect("a challenge");
    let bundle_key = BundleKey::generate().expect("memory");
    let evidence = vm.evidence(&lab.host, &challenge, &bundle_key);
    let first = vm.put(&challenge, &evidence).expect("released");
    let again = vm.put(&challenge, &evidence).expect("the stored answer");
    assert!(first == again);
    let other = vm.evidence(&lab.host, &challenge, &bundle_key);
    assert_eq!(vm.put(&challenge, &other).expect_err("stale").problem(), Some(ProblemType::StaleNonce));
    assert_eq!(lab.events("keys-released").len(), 1);
    // Also from a provider that was killed in between.
    lab.restart();
    vm.reconnect(&lab);
    assert!(vm.put(&challenge, &evidence).expect("the stored answer") == first);
    assert_eq!(vm.put(&challenge, &other).expect_err("stale").problem(), Some(ProblemType::StaleNonce));
    let mut stranger = SoftVm::new(&lab);
    assert_eq!(stranger.put(&challenge, &evidence).expect_err("stale").problem(), Some(ProblemType::StaleNonce));
}
