//! The whole way of a key inside one process: the flow, over TLS, against a provider that verifies and seals as the real one
//! does, with a TPM service of software keys. Then the same with a provider, or somebody between, that misbehaves.

use super::scene::{FILE_KEY, HONEST, ORIGIN, Scene, Twist, keys};
use super::*;
use crate::note::Receipt;
use crate::testing;
use policy::config::TrustRoots;
use policy::{AttestationId, Nonce, Operation};
use secretmem::Secret;
use std::sync::Arc;

fn attest(twist: Twist, again: u32) -> (Arc<Scene>, Result<OpenedRelease, FlowError>, Vec<&'static str>) {
    let (scene, mut attester) = Scene::start(twist, again);
    let mut steps = Vec::new();
    let request = OperationRequest::plain(Operation::PowerOn);
    let result = attester.attest(&request, &mut |step: Step| steps.push(step.name));
    (scene, result, steps)
}

#[track_caller]
fn mismatch(twist: Twist) -> &'static str {
    match attest(twist, 0).1 {
        Err(FlowError::Mismatch(what)) => what,
        Err(other) => panic!("{other}"),
        Ok(_) => panic!("keys were opened"),
    }
}

#[test]
fn a_sound_host_gets_its_keys_and_their_receipt() {
    let (scene, opened, steps) = attest(HONEST, 0);
    let opened = opened.unwrap_or_else(|e| panic!("{e}"));
    assert!(opened.key(FILE_KEY).is_some_and(|key| key.ct_eq(&keys())));
    assert_eq!(opened.keys.len(), 1);
    assert!(opened.establish(&scene.trust()).is_ok());
    assert_eq!(steps, ["identity", "challenge", "activate", "quote", "evidence", "open"]);
}

/// What a later release does differently.
fn later(twist: Twist) -> Result<OpenedRelease, FlowError> {
    let (scene, mut attester) = Scene::started();
    *scene.twist.lock().expect("lock") = twist;
    renew(&mut attester)
}

fn renew(attester: &mut Attester) -> Result<OpenedRelease, FlowError> {
    attester.attest(&OperationRequest::plain(Operation::Renew), &mut |_: Step| {})
}

#[test]
fn the_same_process_attests_again_with_the_same_client_key() {
    let opened = later(HONEST).unwrap_or_else(|e| panic!("{e}"));
    assert_eq!(opened.release.operation.operation, Operation::Renew);
}

#[test]
fn a_power_on_comes_first_and_once() {
    let (scene, mut attester) = Scene::start(HONEST, 0);
    let renewal = attester.attest(&OperationRequest::plain(Operation::Renew), &mut |_: Step| {});
    assert!(matches!(renewal, Err(FlowError::Mismatch("a power-on comes first, and once"))));
    let power_on = OperationRequest::plain(Operation::PowerOn);
    let opened = attester.attest(&power_on, &mut |_: Step| {}).expect("a start");
    attester.establish(opened.establish(&scene.trust()).expect("the customer's"));
    assert!(matches!(attester.attest(&power_on, &mut |_: Step| {}), Err(FlowError::Mismatch(_))));
}

#[test]
fn attack_41_a_later_release_must_stand_in_the_log_too() {
    let refused = |twist: Twist| later(twist).err().unwrap_or_else(|| panic!("keys were opened"));
    let unlogged = Twist { released: |r| r.receipt.insert(0, 'x'), ..HONEST };
    assert!(matches!(refused(unlogged), FlowError::Receipt(_)));
    let replayed = Twist { sequence: 9, ..HONEST };
    assert!(matches!(refused(replayed), FlowError::Mismatch("the receipt is an earlier release's")));
    let elsewhere = Twist { release: |r| r.instance = 5.try_into().expect("number"), ..HONEST };
    assert!(matches!(refused(elsewhere), FlowError::Mismatch("another instance")));
    let reopened = Twist { release: |r| r.volumes = vec![testing::grant(2)], ..HONEST };
    assert!(matches!(refused(reopened), FlowError::Mismatch("a volume that this instance did not start with")));
}

#[test]
fn attack_36_the_process_checks_whose_policy_it_is_and_that_it_does_not_go_back() {
    let with = |release| Twist { release, ..HONEST };
    let unsigned = with(|r: &mut Release| r.policy.version += 1);
    let (scene, opened, _) = attest(unsigned, 0);
    let opened = opened.unwrap_or_else(|e| panic!("{e}"));
    let refused = opened.establish(&scene.trust()).err();
    assert!(matches!(refused, Some(FlowError::Mismatch("the policy is not signed by the customer's policy key"))));
    // One that is rightly signed, but that the customer had replaced when he sealed the VM file.
    let (scene, opened, _) = attest(HONEST, 0);
    let trust = TrustRoots { policy_version: 2, ..scene.trust() };
    let refused = opened.map(|o| o.establish(&trust).err());
    assert!(matches!(refused, Ok(Some(FlowError::Mismatch("the policy is older than the VM file")))));
    let other = later(with(|r| r.policy = testing::policy_in_force("other", 9)));
    assert!(matches!(other, Err(FlowError::Mismatch("the policy is not signed by the customer's policy key"))));
    let older = later(with(|r| r.policy = testing::policy_in_force("acme", 0)));
    assert!(matches!(older, Err(FlowError::Mismatch("an older policy"))));
    assert!(later(with(|r| r.policy = testing::policy_in_force("acme", 2))).is_ok());
}

#[test]
fn what_the_tpm_service_calls_passing_is_tried_again_within_bounds() {
    assert!(attest(HONEST, 3).1.is_ok());
    assert!(matches!(attest(HONEST, 50).1, Err(FlowError::Service(ServiceError::Refused { again: true, .. }))));
}

#[test]
fn a_service_that_ended_is_found_again_and_until_then_costs_no_nonce() {
    let (scene, mut attester) = Scene::started();
    scene.end_service();
    *scene.away.lock().expect("lock") = true;
    for _ in 0..3 {
        let refused = renew(&mut attester).err();
        assert!(matches!(&refused, Some(FlowError::Service(ServiceError::Lost(why))) if why == "it is away"));
    }
    assert_eq!(scene.nonces(), 1, "that of the start");
    *scene.away.lock().expect("lock") = false;
    assert!(renew(&mut attester).is_ok());
    scene.end_service();
    assert!(renew(&mut attester).is_ok(), "found again at the first try");
    assert_eq!(scene.nonces(), 3);
}

#[test]
fn a_service_whose_tpm_fails_costs_one_nonce_and_no_more() {
    let (scene, mut attester) = Scene::started();
    *scene.again.lock().expect("lock") = u32::MAX;
    for _ in 0..3 {
        assert!(matches!(renew(&mut attester).err(), Some(FlowError::Service(ServiceError::Refused { .. }))));
    }
    assert_eq!(scene.nonces(), 2, "that of the start, and that which the TPM failed to quote");
    *scene.again.lock().expect("lock") = 0;
    assert!(renew(&mut attester).is_ok());
}

#[test]
fn a_refusal_keeps_its_type() {
    let refused = attest(Twist { refusal: Some("untrusted-platform"), ..HONEST }, 0).1;
    assert_eq!(refused.err().and_then(|e| e.problem()), Some(ProblemType::UntrustedPlatform));
}

#[test]
fn attack_11_a_challenge_for_another_host_is_not_answered() {
    let twist = Twist { challenge: |c| c.host = policy::HostId(Digest::of(b"another")), ..HONEST };
    assert_eq!(mismatch(twist), "the challenge is for another host");
}

#[test]
fn attack_27_a_release_of_something_else_is_discarded() {
    let twists: [fn(&mut Release); 7] = [
        |r| r.customer = "other".parse().expect("label"),
        |r| r.vm = "other".parse().expect("label"),
        |r| r.attestation = AttestationId([9; 16]),
        |r| r.qualified = Digest::of(b"another quote"),
        |r| r.host = policy::HostId(Digest::of(b"another")),
        |r| r.operation = OperationRequest::plain(Operation::CoreDump),
        |r| r.keys = vec![KeyName::Volume(0)],
    ];
    for (index, release) in twists.into_iter().enumerate() {
        let what = mismatch(Twist { release, ..HONEST });
        assert!(what.contains("another") || what.contains("nothing"), "{index}: {what}");
    }
}

#[test]
fn attack_29_keys_after_the_end_of_their_lease_are_discarded() {
    let late = Twist {
        release: |r| {
            r.lease.seconds = 2;
            r.lease.quiesce_seconds = 1;
        },
        delay: Duration::from_millis(2100),
        ..HONEST
    };
    assert!(matches!(attest(late, 0).1, Err(FlowError::Late)));
    let never = Twist { release: |r| r.lease.quiesce_seconds = r.lease.seconds, ..HONEST };
    assert!(matches!(attest(never, 0).1, Err(FlowError::Lease(_))));
}

#[test]
fn attack_29_a_host_whose_clock_goes_slowly_gets_no_renewal_however_often_it_asks() {
    let (scene, mut attester) = Scene::started();
    let mut renew = |tpm_ms| {
        *scene.twist.lock().expect("lock") = Twist { tpm_ms, ..HONEST };
        renew(&mut attester)
    };
    assert!(renew(0).is_ok());
    for _ in 0..3 {
        assert!(
            matches!(renew(600_000), Err(FlowError::SlowClock)),
            "ten minutes of the TPM's in a moment of the host's"
        );
    }
    assert!(renew(0).is_ok());
}

#[test]
fn keys_that_were_released_and_do_not_open_have_an_instance_all_the_same() {
    let wrong: [(&str, Twist); 4] = [
        ("sealed", Twist { released: |r| r.sealed.0[40] ^= 1, ..HONEST }),
        ("event", Twist { event: |e| e.vm = None, ..HONEST }),
        ("lease", Twist { release: |r| r.lease.quiesce_seconds = r.lease.seconds, ..HONEST }),
        ("keys", Twist { release: |r| r.keys = vec![KeyName::Volume(0)], ..HONEST }),
    ];
    for (what, twist) in wrong {
        let (_scene, mut attester) = Scene::start(twist, 0);
        assert_eq!(attester.released(), None);
        attester.attest(&OperationRequest::plain(Operation::PowerOn), &mut |_: Step| {}).err().expect(what);
        assert_eq!(attester.released(), Some(testing::release().instance), "{what}");
    }
    let (_scene, mut attester) = Scene::start(Twist { refusal: Some("policy-refuses"), ..HONEST }, 0);
    assert!(attester.attest(&OperationRequest::plain(Operation::PowerOn), &mut |_: Step| {}).is_err());
    assert_eq!(attester.released(), None, "nothing was released");
}

#[test]
fn evidence_leaves_only_while_whoever_follows_wants_it_to() {
    struct Unwilling(Vec<&'static str>);
    impl Follow for Unwilling {
        fn done(&mut self, step: Step) {
            self.0.push(step.name);
        }
        fn may_send(&mut self) -> bool {
            false
        }
    }
    let (scene, mut attester) = Scene::start(HONEST, 0);
    let mut follower = Unwilling(Vec::new());
    let ended = attester.attest(&OperationRequest::plain(Operation::PowerOn), &mut follower);
    assert!(matches!(ended, Err(FlowError::GivenUp)));
    assert_eq!(follower.0.last(), Some(&"quote"));
    assert_eq!(*scene.logged.lock().expect("lock"), 8, "the provider released nothing");
}

#[test]
fn attack_12_a_bundle_changed_on_its_way_does_not_open() {
    let changes: [fn(&mut Released); 2] = [
        |r| r.sealed.0[40] ^= 1,
        |r| {
            let longer = String::from_utf8(r.release.0.clone()).expect("text").replace(":60,", ":604800,");
            r.release = longer.into_bytes().into();
        },
    ];
    for released in changes {
        assert!(matches!(attest(Twist { released, ..HONEST }, 0).1, Err(FlowError::Bundle(_))));
    }
}

#[test]
fn attack_41_an_event_or_receipt_of_something_else_is_refused() {
    let events: [fn(&mut AuditEvent); 5] = [
        |e| e.kind = AuditKind::Report,
        |e| e.vm = None,
        |e| e.instance = None,
        |e| drop(e.details.insert("release".into(), Digest::of(b"another").to_string())),
        |e| drop(e.details.insert("qualified".into(), Digest::of(b"another").to_string())),
    ];
    for event in events {
        assert_eq!(mismatch(Twist { event, ..HONEST }), "an audit event of something else");
    }
    let (scene, opened, _) = attest(Twist { released: |r| r.receipt.insert(0, 'x'), ..HONEST }, 0);
    let opened = opened.unwrap_or_else(|e| panic!("{e}"));
    assert!(matches!(opened.establish(&scene.trust()), Err(FlowError::Receipt(_))));
    // A good receipt of the same log for another event.
    let other = Twist {
        released: |r| {
            let seed = Secret::copy_of(&[3; 32]).expect("memory");
            let receipt = Receipt { origin: ORIGIN.into(), sequence: 8, event: Digest::of(b"another") };
            r.receipt = receipt.sign(&seed).expect("signed");
        },
        ..HONEST
    };
    let (scene, opened, _) = attest(other, 0);
    let opened = opened.unwrap_or_else(|e| panic!("{e}"));
    assert!(matches!(opened.establish(&scene.trust()), Err(FlowError::Mismatch(_))));
    // A log that this customer does not trust.
    let (scene, opened, _) = attest(HONEST, 0);
    let trust = TrustRoots { audit_key: vec![9; 32].into(), ..scene.trust() };
    assert!(matches!(opened.map(|o| o.establish(&trust)), Ok(Err(FlowError::Receipt(_)))));
}

#[test]
fn attack_01_a_nonce_of_the_providers_is_what_the_quote_binds() {
    // Somebody between hands on another nonce: the provider that knows its own refuses such evidence (its test server panics
    // instead, and the connection ends).
    let twist = Twist { challenge: |c| c.nonce = Nonce([0; 32]), ..HONEST };
    assert!(matches!(attest(twist, 0).1, Err(FlowError::Provider(ClientError::Unreachable { .. }))));
}
