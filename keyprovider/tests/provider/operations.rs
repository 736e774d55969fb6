//! Reports, restricted operations, and what is missing of them.

use crate::support::vm::{SoftVm, check_receipt};
use crate::support::{GO, Lab};
use attest::protocol::{KeyName, ProblemType};
use attest::stream::{Direction, Sealer, StreamInfo};
use fealty_keyprovider::api;
use policy::operation::{Operation, OperationRequest};
use policy::report::{EndReason, ReportEvent, Resized};
use policy::{AttestationId, VolumeId};
use std::io::Write;

const DUMPS: &str = r#"permit (principal, action == Action::"vm.coredump", resource)
when { context.parameters.hasTag("reason") && context.operations_last_hour < 10 };"#;

#[test]
fn reports_continue_their_chain() {
    let lab = Lab::new();
    let mut vm = SoftVm::new(&lab);
    let instance = vm.start(&lab.host).release.instance;
    vm.report(instance, ReportEvent::Runs).expect("taken");
    let again = vm.next_report(ReportEvent::Quiesced);
    vm.report(instance, ReportEvent::Quiesced).expect("taken");
    vm.send_report(instance, &serde_json::to_vec(&again).expect("json")).expect("the same again is no harm");
    vm.report(instance, ReportEvent::KeysBack).expect("taken");
    let told: Vec<_> = lab.events("report").iter().map(|e| e["details"]["what"].clone()).collect();
    assert_eq!(told, ["runs", "quiesced", "keys-back"]);
    let text = ReportEvent::Ended { reason: EndReason::Failed, detail: "x".repeat(513) };
    assert_eq!(vm.report(instance, text).expect_err("too long").problem(), Some(ProblemType::BadRequest));
    vm.end(instance).expect("ended");
    assert_eq!(vm.report(instance, ReportEvent::Runs).expect_err("over").problem(), Some(ProblemType::OldInstance));
}

#[test]
fn attack_41_a_gap_in_the_reports_is_refused_and_told_once() {
    let lab = Lab::new();
    let mut vm = SoftVm::new(&lab);
    let instance = vm.start(&lab.host).release.instance;
    vm.report(instance, ReportEvent::Runs).expect("taken");
    let mut dropped = vm.next_report(ReportEvent::Runs);
    dropped.sequence += 1;
    let mut changed = vm.next_report(ReportEvent::Runs);
    changed.previous = policy::Digest([1; 32]);
    for bad in [&dropped, &changed, &dropped] {
        let bytes = serde_json::to_vec(bad).expect("json");
        assert_eq!(vm.send_report(instance, &bytes).expect_err("refused").problem(), Some(ProblemType::ReportGap));
    }
    assert_eq!(lab.events("report-gap").len(), 1);
    vm.report(instance, ReportEvent::Runs).expect("the true one is taken");
}

#[test]
fn attack_41_a_log_that_was_cut_or_changed_is_noticed() {
    let lab = Lab::new();
    lab.audit();
    let tampered: [&'static str; 3] = [
        "DELETE FROM audit WHERE sequence = 2",
        "UPDATE audit SET event = CAST(replace(CAST(event AS TEXT), 'admin', 'ghost') AS BLOB) WHERE sequence = 3",
        "DROP TRIGGER audit_is_never_cut",
    ];
    // The database itself refuses to change or cut its log …
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    runtime.block_on(async {
        let path = lab.path("keys/keys.db");
        let db = fealty_keyprovider::store::Database::open(&path, false).await.expect("opens");
        for statement in &tampered[..2] {
            let mut tx = db.write().await.expect("begins");
            let refused = sqlx::query(*statement).execute(&mut *tx).await.expect_err("refused");
            assert!(refused.to_string().contains("append-only"), "{refused}");
        }
    });
    // … and where somebody took that away first, the customer's tool sees it.
    lab.sql(tampered[2]);
    lab.sql(tampered[0]);
    let refused = lab.refused(&["audit", "list", "acme", "--from", "9999"]);
    assert!(refused.contains("broken at event 2"), "{refused}");
}

#[test]
fn what_an_older_instance_sends_is_refused() {
    use attest::protocol::AnchorUpdate;
    let lab = Lab::new();
    let mut old = SoftVm::new(&lab);
    let keys = old.start(&lab.host);
    let (instance, open) = (keys.release.instance, keys.release.volumes[0].open_number.get());
    SoftVm::new(&lab).start(&lab.host);
    let late = |problem: Option<ProblemType>| assert_eq!(problem, Some(ProblemType::OldInstance));
    late(old.report(instance, ReportEvent::Runs).expect_err("refused").problem());
    let update = AnchorUpdate { anchor: crate::support::anchor(lab.volume, open, 9), closed: false };
    late(old.anchor(instance, &update).expect_err("refused").problem());
    for operation in [Operation::Renew, Operation::ResumeKeys, Operation::CoreDump] {
        old.operation = OperationRequest::plain(operation);
        late(Some(old.refused(&lab.host)));
    }
}

#[test]
fn free_operations_need_no_attestation() {
    let lab = Lab::new();
    let mut vm = SoftVm::new(&lab).asking(Operation::Pause);
    assert_eq!(vm.refused(&lab.host), ProblemType::BadRequest);
}

#[test]
fn restricted_operations_are_refused_by_default_and_written_down() {
    let lab = Lab::with(600, "permit (principal, action, resource);");
    let mut vm = SoftVm::new(&lab);
    vm.start(&lab.host);
    for (count, operation) in [(1, Operation::CoreDump), (2, Operation::ResizeDisk)] {
        vm.operation = OperationRequest::plain(operation);
        assert_eq!(vm.refused(&lab.host), ProblemType::PolicyRefuses, "permitted by name only");
        assert_eq!(lab.events("operation-refused").len(), count);
    }
    assert!(lab.events("operation-permitted").is_empty());
}

#[test]
fn a_permitted_resize_brings_no_key_that_was_not_there_and_owes_an_outcome() {
    let by_name = r#"permit (principal, action == Action::"vm.resize-disk", resource);"#;
    let lab = Lab::with(600, &format!("{GO}\n{by_name}"));
    let mut vm = SoftVm::new(&lab);
    let started = vm.start(&lab.host);
    vm.operation = OperationRequest::plain(Operation::ResizeDisk);
    vm.operation.parameters.insert("size".into(), "8388608".into());
    let permitted = vm.attest(&lab.host).expect("permitted");
    check_receipt(&lab, &permitted);
    // Nothing that the instance had not got before.
    assert_eq!(permitted.release.keys, started.release.keys);
    let before = &lab.events("operation-permitted")[0];
    assert_eq!(
        (&before["details"]["operation"], &before["details"]["parameter.size"]),
        (&"vm.resize-disk".into(), &"8388608".into())
    );
    vm.end(started.release.instance).expect("ended");
    assert_eq!(lab.events("report-gap")[0]["details"]["missing"], "the outcome of vm.resize-disk");
}

/// The provider learns it from who holds the volume and was permitted, once for each permission, and believes no less than it knows.
#[test]
fn the_outcome_of_a_resize_says_how_large_the_volume_is() {
    let by_name = r#"permit (principal, action == Action::"vm.resize-disk", resource);"#;
    let lab = Lab::with(600, &format!("{GO}\n{by_name}"));
    let mut vm = SoftVm::new(&lab);
    let number = vm.start(&lab.host).release.instance;
    let known = || {
        let views: Vec<api::VolumeView> = lab.admin().get("/v1/customers/acme/volumes").expect("listed");
        views.into_iter().find(|view| view.volume == lab.volume).expect("listed").size
    };
    let outcome = |attestation, volume, bytes: u64| ReportEvent::Outcome {
        attestation,
        operation: Operation::ResizeDisk,
        done: true,
        detail: String::new(),
        resized: Some(Resized { volume, size: bytes.try_into().expect("a size") }),
    };
    vm.operation = OperationRequest::plain(Operation::ResizeDisk);
    let permit = |vm: &mut SoftVm| vm.attest(&lab.host).expect("permitted").release.attestation;
    let first = permit(&mut vm);
    vm.report(number, outcome(AttestationId([9; 16]), lab.volume, 4 << 20)).expect("taken");
    assert_eq!(known(), None, "nobody permitted that");
    vm.report(number, outcome(first, lab.volume, 8 << 20)).expect("taken");
    assert_eq!(known(), Some(8 << 20));
    vm.report(number, outcome(first, lab.volume, 16 << 20)).expect("taken");
    assert_eq!(known(), Some(8 << 20), "a permission is for one resize");
    for (volume, bytes) in [(lab.volume, 4 << 20), (VolumeId([1; 16]), 16 << 20)] {
        let next = permit(&mut vm);
        vm.report(number, outcome(next, volume, bytes)).expect("taken");
        assert_eq!(known(), Some(8 << 20));
    }
    let last = permit(&mut vm);
    let nonsense = serde_json::to_string(&vm.next_report(outcome(last, lab.volume, 1 << 30))).expect("JSON");
    for size in ["0", "513", "1125899906843136", "-512"] {
        let bad = nonsense.replace(&(1_u64 << 30).to_string(), size);
        assert_eq!(
            vm.send_report(number, bad.as_bytes()).expect_err("no size").problem(),
            Some(ProblemType::BadRequest)
        );
    }
    let resized = lab.events("volume-resized");
    assert_eq!(resized.len(), 1, "{resized:#?}");
    assert_eq!(
        (&resized[0]["details"]["before"], &resized[0]["details"]["size"]),
        (&"unknown".into(), &"8388608".into())
    );
}

#[test]
fn a_permitted_dump_is_opened_by_the_customer_alone() {
    let lab = Lab::with(600, &format!("{GO}\n{DUMPS}"));
    let mut vm = SoftVm::new(&lab);
    let started = vm.start(&lab.host);
    let instance = started.release.instance;
    vm.operation = OperationRequest::plain(Operation::CoreDump);
    assert_eq!(vm.refused(&lab.host), ProblemType::PolicyRefuses, "the rule asks for a reason");
    vm.operation.parameters.insert("reason".into(), "ticket 7".into());
    let keys = vm.attest(&lab.host).expect("permitted");
    check_receipt(&lab, &keys);
    let [KeyName::Stream(key_id)] = keys.release.keys[..] else { panic!("one key: {:?}", keys.release.keys) };
    assert_eq!(keys.release.instance, instance);
    let before = &lab.events("operation-permitted")[0];
    assert_eq!(before["details"]["parameter.reason"], "ticket 7");
    // The process seals its dump and reports the outcome.
    let info = StreamInfo {
        customer: &keys.release.customer,
        vm: &keys.release.vm,
        key_id,
        direction: Direction::CoreDump,
        connection: 0,
    };
    let mut sealer = Sealer::new(Vec::new(), &keys.keys[0], &info).expect("sealer");
    sealer.write_all(&b"core ".repeat(40_000)).expect("sealed");
    let (sealed, tag) = sealer.finish().expect("sealed");
    lab.write("dump.sealed", &sealed);
    lab.refused(&["dump", "open", "acme", "--in", "dump.sealed", "--out", "core"]);
    let attestation = keys.release.attestation;
    let outcome = |detail: String| ReportEvent::Outcome {
        attestation,
        operation: Operation::CoreDump,
        done: true,
        detail,
        resized: None,
    };
    vm.report(instance, outcome(hex::encode(tag))).expect("taken");
    lab.keys(&["dump", "open", "acme", "--in", "dump.sealed", "--out", "core"]);
    assert_eq!(std::fs::read(lab.path("core")).expect("the dump"), b"core ".repeat(40_000));
    assert_eq!(lab.events("dump-opened").len(), 1);
    // Cut or changed, it does not open, and leaves no file.
    lab.write("cut.sealed", &sealed[..sealed.len() - 1]);
    let key = key_id.to_string();
    lab.refused(&["dump", "open", "acme", "--in", "cut.sealed", "--key", &key, "--out", "cut"]);
    assert!(!lab.path("cut").exists());
    // A second outcome for one permission is told as one that nobody permitted.
    vm.report(instance, outcome("again".into())).expect("taken");
    let told: Vec<_> = lab.events("report").iter().map(|e| e["details"]["permitted"].clone()).collect();
    assert_eq!(told, ["true", "false"]);
    vm.end(instance).expect("ended");
    assert!(lab.events("report-gap").is_empty(), "nothing is missing");
}

#[test]
fn attack_47_only_the_instance_that_dumped_says_which_dump_it_was() {
    let lab = Lab::with(600, &format!("{GO}\n{DUMPS}"));
    let mut vm = SoftVm::new(&lab);
    let first = vm.start(&lab.host).release.instance;
    vm.operation = OperationRequest::plain(Operation::CoreDump);
    vm.operation.parameters.insert("reason".into(), "ticket 7".into());
    let keys = vm.attest(&lab.host).expect("permitted");
    let [KeyName::Stream(key_id)] = keys.release.keys[..] else { panic!("one key: {:?}", keys.release.keys) };
    let (customer, vm_id) = (&keys.release.customer, &keys.release.vm);
    let info = StreamInfo { customer, vm: vm_id, key_id, direction: Direction::CoreDump, connection: 0 };
    let mut sealer = Sealer::new(Vec::new(), &keys.keys[0], &info).expect("sealer");
    sealer.write_all(b"core").expect("sealed");
    let (sealed, tag) = sealer.finish().expect("sealed");
    lab.write("dump.sealed", &sealed);
    vm.end(first).expect("ended");
    let mut other = SoftVm::new(&lab);
    let second = other.start(&lab.host).release.instance;
    let (attestation, detail) = (keys.release.attestation, hex::encode(tag));
    let outcome =
        ReportEvent::Outcome { attestation, operation: Operation::CoreDump, done: true, detail, resized: None };
    other.report(second, outcome).expect("taken, and told as permitted by nobody");
    lab.refused(&["dump", "open", "acme", "--in", "dump.sealed", "--out", "core"]);
}

#[test]
fn a_before_without_its_after_is_told() {
    let lab = Lab::with(600, &format!("{GO}\n{DUMPS}"));
    let mut vm = SoftVm::new(&lab);
    let instance = vm.start(&lab.host).release.instance;
    vm.operation = OperationRequest::plain(Operation::CoreDump);
    vm.operation.parameters.insert("reason".into(), "ticket 7".into());
    let keys = vm.attest(&lab.host).expect("permitted");
    vm.end(instance).expect("ended");
    let gaps = lab.events("report-gap");
    assert_eq!(gaps.len(), 1);
    assert_eq!(gaps[0]["attestation"], keys.release.attestation.to_string());
    assert_eq!(gaps[0]["details"]["missing"], "the outcome of vm.coredump");
}
