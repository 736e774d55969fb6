//! Attacks on attestation and release that need no more than messages.

use crate::support::host::{Maker, SoftAk, SoftHost};
use crate::support::vm::SoftVm;
use crate::support::{GO, Lab, keys_command};
use attest::bundle::{self, BundleKey};
use attest::protocol::ProblemType;
use fealty_keyprovider::store::{Database, people};
use policy::{Digest, Operation};
use std::collections::HashSet;

#[test]
fn attack_01_nonces_are_unique_and_a_replayed_quote_is_refused() {
    let lab = Lab::new();
    let mut vm = SoftVm::new(&lab);
    let request = vm.request(&lab.host);
    let first = vm.post(&request).expect("a challenge");
    let second = vm.post(&request).expect("a challenge");
    let all: HashSet<_> = [first.nonce, second.nonce].into();
    assert_eq!(all.len(), 2);
    let bundle_key = BundleKey::generate().expect("memory");
    let evidence = vm.evidence(&lab.host, &first, &bundle_key);
    // The quote for the first nonce, sent for the second one, with the second one's activation.
    let mut replayed = evidence.clone();
    replayed.activation = vm.evidence(&lab.host, &second, &bundle_key).activation;
    assert_eq!(vm.put(&second, &replayed).expect_err("refused").problem(), Some(ProblemType::BadEvidence));
    vm.put(&first, &evidence).expect("released");
    // A nonce that was used serves nobody else: neither other bytes, nor another key, nor another VM's path.
    let mut thief = SoftVm::new(&lab);
    assert_eq!(thief.put(&first, &evidence).expect_err("refused").problem(), Some(ProblemType::StaleNonce));
}

#[test]
fn attack_01_of_two_answers_at_once_one_wins() {
    let lab = Lab::new();
    let mut vm = SoftVm::new(&lab);
    let challenge = vm.post(&vm.request(&lab.host)).expect("a challenge");
    let keys: Vec<_> = (0..8).map(|_| BundleKey::generate().expect("memory")).collect();
    let all: Vec<_> = keys.iter().map(|k| vm.evidence(&lab.host, &challenge, k)).collect();
    let mut clients: Vec<_> = all.iter().map(|_| vm.twin(&lab)).collect();
    let won: usize = std::thread::scope(|scope| {
        let tasks: Vec<_> = clients
            .iter_mut()
            .zip(&all)
            .map(|(client, evidence)| scope.spawn(|| usize::from(client.put(&challenge, evidence).is_ok())))
            .collect();
        tasks.into_iter().map(|t| t.join().expect("joined")).sum()
    });
    assert_eq!(won, 1);
    assert_eq!(lab.events("keys-released").len(), 1);
}

#[test]
fn attack_04_a_quote_of_another_good_tpm_is_refused() {
    let lab = Lab::new();
    let other = SoftHost::new(&lab.root);
    let mut vm = SoftVm::new(&lab);
    let keys = vm.start(&lab.host);
    vm.end(keys.release.instance).expect("ended");
    // The enrolled host is asked for, and its AK is known; the quote comes from another TPM in the same state.
    let mut vm = SoftVm::new(&lab);
    let challenge = vm.post(&vm.request(&lab.host)).expect("a challenge");
    let bundle_key = BundleKey::generate().expect("memory");
    let evidence = vm.evidence_by(&lab.host, &other.ak, &challenge, &bundle_key);
    assert_eq!(vm.put(&challenge, &evidence).expect_err("refused").problem(), Some(ProblemType::BadEvidence));
}

#[test]
fn attack_05_an_ak_that_does_not_live_beside_the_ek_is_refused() {
    let mut lab = Lab::new();
    let good = SoftVm::new(&lab).start(&lab.host);
    assert_eq!(good.release.host, lab.host.id());
    // The attacker's own AK under the good host's EK: no "already activated" shortcut, and no way to open the credential.
    let stolen = std::mem::replace(&mut lab.host.ak, SoftAk::new());
    let mut vm = SoftVm::new(&lab);
    for activation in [None, Some(vec![0; 32]), Some(vec![])] {
        let challenge = vm.post(&vm.request(&lab.host)).expect("a challenge");
        assert!(challenge.credential.is_some());
        let bundle_key = BundleKey::generate().expect("memory");
        let mut evidence = vm.evidence(&lab.host, &challenge, &bundle_key);
        evidence.activation = activation.map(Into::into);
        assert_eq!(vm.put(&challenge, &evidence).expect_err("refused").problem(), Some(ProblemType::NotActivated));
    }
    // Host A's activated AK under host B's EK is not activated either.
    let mut second = SoftHost::new(&lab.root);
    lab.write("second.der", &second.certificate);
    lab.keys(&["cloud", "enroll", "lab", "--certificate", &lab.text("second.der")]);
    second.ak = stolen;
    let challenge = vm.post(&vm.request(&second)).expect("a challenge");
    assert!(challenge.credential.is_some());
}

#[test]
fn attack_06_an_unrestricted_ak_is_refused_before_anything_is_made_for_it() {
    use attest::tpm::public::attribute as a;
    let mut lab = Lab::new();
    lab.host.ak = SoftAk::with(a::FIXED_TPM | a::FIXED_PARENT | a::SENSITIVE_DATA_ORIGIN | a::SIGN);
    assert_eq!(SoftVm::new(&lab).refused(&lab.host), ProblemType::BadEvidence);
}

#[test]
fn attack_07_a_tpm_in_no_inventory_of_the_customer_is_refused_and_named() {
    let lab = Lab::new();
    let stranger = SoftHost::new(&lab.root);
    assert_eq!(SoftVm::new(&lab).refused(&stranger), ProblemType::UnknownTpm);
    let refused = lab.events("attestation-refused");
    assert_eq!(refused[0]["details"]["endorsement_key"], stranger.id().to_string());
    assert_eq!(refused[0]["details"]["problem"], "unknown-tpm");
    // Enrolled in another cloud, which the customer does not use: the same.
    lab.write("stranger.der", &stranger.certificate);
    lab.keys(&["cloud", "create", "other", "--kind", "lab", "--roots", &lab.text("roots.pem")]);
    lab.keys(&["cloud", "enroll", "other", "--certificate", &lab.text("stranger.der")]);
    assert_eq!(SoftVm::new(&lab).refused(&stranger), ProblemType::UnknownTpm);
    lab.keys(&["customer", "allow-cloud", "acme", "other"]);
    SoftVm::new(&lab).start(&stranger);
}

#[test]
fn attack_07_a_host_taken_out_of_the_inventory_gets_nothing_more() {
    let lab = Lab::new();
    let mut vm = SoftVm::new(&lab);
    vm.start(&lab.host);
    let host = lab.host.id().to_string();
    lab.refused(&["cloud", "remove", "other", &host]);
    lab.keys(&["cloud", "remove", "lab", &host]);
    assert_eq!(lab.events("host-removed")[0]["host"], host);
    let mut vm = vm.asking(Operation::Renew);
    assert_eq!(vm.refused(&lab.host), ProblemType::UnknownTpm);
    lab.refused(&["cloud", "remove", "lab", &host]);
    // Entered again it proves its attestation key anew.
    lab.write("host.der", &lab.host.certificate);
    lab.keys(&["cloud", "enroll", "lab", "--certificate", &lab.text("host.der")]);
    vm.attest(&lab.host).expect("renewed");
}

#[test]
fn attack_24_a_tpm_with_denied_firmware_is_refused() {
    let lab = Lab::new();
    let mut values: serde_json::Value =
        serde_json::from_slice(&std::fs::read(lab.path("values.json")).expect("values")).expect("json");
    // The version that the software host's quotes give.
    let range = serde_json::json!([{"from": "0000000020200312", "to": "0000000020200312", "why": "an advisory"}]);
    values["denied_tpm_firmware"] = range;
    lab.write("denied.json", values.to_string().as_bytes());
    lab.keys(&["reference", "set", "acme", &lab.text("denied.json")]);
    assert_eq!(SoftVm::new(&lab).refused(&lab.host), ProblemType::UntrustedPlatform);
    lab.keys(&["reference", "set", "acme", &lab.text("values.json")]);
    SoftVm::new(&lab).start(&lab.host);
}

#[test]
fn attack_08_certificates_of_wrong_or_expired_authorities_are_refused() {
    let lab = Lab::new();
    let foreign = SoftHost::new(&Maker::new());
    lab.write("foreign.der", &foreign.certificate);
    lab.refused(&["cloud", "enroll", "lab", "--certificate", &lab.text("foreign.der")]);
    let expired = Maker::until(2020);
    let host = SoftHost::new(&expired);
    lab.write("expired.pem", expired.pem().as_bytes());
    lab.write("old.der", &host.certificate);
    lab.keys(&["cloud", "create", "old", "--kind", "maker", "--roots", &lab.text("expired.pem")]);
    lab.refused(&["cloud", "enroll", "old", "--certificate", &lab.text("old.der")]);
    assert_eq!(lab.keys(&["cloud", "hosts", "old"]), "");
}

#[test]
fn attack_08_a_laboratorys_tpms_serve_no_real_customer() {
    let lab = Lab::new();
    lab.keys(&["customer", "create", "bank", "--policy-key", &lab.text("bank.key")]);
    lab.keys(&["vm", "create", "bank", "ledger"]);
    let refused = lab.refused(&["customer", "allow-cloud", "bank", "lab"]);
    assert!(refused.contains("laboratory"), "{refused}");
    // Even where the database says that the cloud may be used.
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    runtime.block_on(async {
        let db = Database::open(&lab.path("keys/keys.db"), false).await.expect("opens");
        let mut tx = db.write().await.expect("begins");
        let (bank, cloud) = ("bank".parse().expect("label"), "lab".parse().expect("label"));
        people::allow_cloud(&mut tx, &bank, &cloud).await.expect("inserted");
        tx.commit().await.expect("committed");
    });
    let mut vm = SoftVm::of(&lab, "bank", "ledger", Digest([1; 32]));
    assert_eq!(vm.refused(&lab.host), ProblemType::UnknownTpm);
}

#[test]
fn attack_09_a_hosts_identity_never_changes() {
    let lab = Lab::new();
    let (first, second) = (SoftHost::new(&lab.root), SoftHost::new(&lab.root));
    lab.write("first.der", &first.certificate);
    lab.write("second.der", &second.certificate);
    let enroll = |cloud: &str, file: &str| {
        let path = lab.text(file);
        lab.try_keys(&["cloud", "enroll", cloud, "--certificate", &path, "--name", "rack-7"]).status.success()
    };
    assert!(enroll("lab", "first.der"));
    assert!(enroll("lab", "first.der"), "the same again changes nothing");
    assert!(!enroll("lab", "second.der"), "the name stays with its TPM");
    lab.keys(&["cloud", "create", "other", "--kind", "lab", "--roots", &lab.text("roots.pem")]);
    assert!(!enroll("other", "first.der"), "a host stands in one inventory");
    let listed = lab.keys(&["cloud", "hosts", "lab"]);
    assert!(listed.contains(&format!("{} rack-7", first.id())), "{listed}");
    assert!(!listed.contains(&second.id().to_string()));
}

#[test]
fn attack_17_a_host_with_an_unknown_layer_is_refused() {
    let mut lab = Lab::new();
    lab.host.boot(&[("fealty-host", b"host"), ("fealty", b"another vmm")]);
    assert_eq!(SoftVm::new(&lab).refused(&lab.host), ProblemType::UntrustedPlatform);
    lab.host.boot(&[("fealty-host", b"host")]);
    assert_eq!(SoftVm::new(&lab).refused(&lab.host), ProblemType::UntrustedPlatform);
    lab.host.boot(&[("fealty-host", b"host"), ("fealty", b"vmm")]);
    SoftVm::new(&lab).start(&lab.host);
}

#[test]
fn attack_27_a_bundle_opens_on_its_host_and_in_its_process_alone() {
    let lab = Lab::new();
    let mut vm = SoftVm::new(&lab);
    let challenge = vm.post(&vm.request(&lab.host)).expect("a challenge");
    let bundle_key = BundleKey::generate().expect("memory");
    let released = vm.put(&challenge, &vm.evidence(&lab.host, &challenge, &bundle_key)).expect("released");
    let other = SoftHost::new(&lab.root);
    let wrap = lab.host.wrap_public();
    let outer = bundle::open(&released.release, &released.sealed, &bundle_key, &wrap).expect("outer");
    assert!(outer.finish(&mut other.ecdh(outer.point())).is_err(), "another host's wrap key");
    assert!(outer.finish(&mut lab.host.ecdh(outer.point())).is_ok());
    let stranger = BundleKey::generate().expect("memory");
    assert!(bundle::open(&released.release, &released.sealed, &stranger, &wrap).is_err(), "another process");
    // Another lease, instance or host in the readable part: it does not open either.
    let text = String::from_utf8(released.release.to_vec()).expect("json");
    let longer = text.replace("\"seconds\":600", "\"seconds\":700");
    assert_ne!(longer, text);
    assert!(bundle::open(longer.as_bytes(), &released.sealed, &bundle_key, &wrap).is_err(), "a stretched lease");
}

#[test]
fn attack_29_a_lease_that_is_over_here_is_not_renewed() {
    let lab = Lab::with(2, GO);
    let mut vm = SoftVm::new(&lab);
    vm.start(&lab.host);
    // Asked for in time, and held back.
    let mut vm = vm.asking(Operation::Renew);
    let challenge = vm.post(&vm.request(&lab.host)).expect("a challenge");
    let evidence = vm.evidence(&lab.host, &challenge, &BundleKey::generate().expect("memory"));
    let start = std::time::Instant::now();
    while !lab.keys(&["vm", "list", "acme", "--json"]).contains("lease-past") {
        assert!(start.elapsed().as_secs() < 60, "the lease does not end");
        std::thread::sleep(std::time::Duration::from_millis(200));
    }
    assert_eq!(vm.put(&challenge, &evidence).err().and_then(|e| e.problem()), Some(ProblemType::PolicyRefuses));
    // Whoever still holds the keys counts time slower than the provider does.
    assert_eq!(vm.refused(&lab.host), ProblemType::PolicyRefuses);
    let told = lab.events("attestation-refused");
    assert!(told.iter().any(|e| e.to_string().contains("does not know it")), "{told:?}");
    // Whoever wiped them gets them back.
    vm.asking(Operation::ResumeKeys).attest(&lab.host).expect("keys");
}

#[test]
fn attack_31_a_stolen_client_key_gets_no_keys() {
    let lab = Lab::new();
    let mut vm = SoftVm::new(&lab);
    let keys = vm.start(&lab.host);
    // The thief has the process's client key and everything that crossed the network, but no TPM.
    let mut thief = vm.twin(&lab);
    thief.operation = policy::operation::OperationRequest::plain(policy::Operation::Renew);
    let challenge = thief.post(&thief.request(&lab.host)).expect("a challenge");
    let bundle_key = BundleKey::generate().expect("memory");
    let evidence = thief.evidence_by(&lab.host, &SoftAk::new(), &challenge, &bundle_key);
    assert_eq!(thief.put(&challenge, &evidence).expect_err("refused").problem(), Some(ProblemType::BadEvidence));
    assert_eq!(keys.keys.len(), 2);
}

#[test]
fn attack_36_policies_are_signed_and_never_go_back() {
    let lab = Lab::new();
    lab.set_policy(600, GO);
    let set = |key: &str| {
        let (file, key) = (lab.text("policy.txt"), lab.text(key));
        lab.refused(&["policy", "set", "acme", &file, "--policy-key", &key])
    };
    assert!(set("policy.key").contains("not above"), "the same version again");
    let older = "{\"version\":1,\"customer\":\"acme\",\"lease\":{\"seconds\":60,\"quiesce_seconds\":5}}\n---\n";
    lab.write("policy.txt", older.as_bytes());
    assert!(set("policy.key").contains("not above"), "an older one, rightly signed");
    lab.keys(&["customer", "create", "other", "--policy-key", &lab.text("other.key")]);
    lab.write("policy.txt", older.replace(":1,", ":9,").as_bytes());
    assert!(set("other.key").contains("signed"), "signed by somebody else");
    lab.write("policy.txt", older.replace(":1,", ":9,").replace("acme", "other").as_bytes());
    assert!(set("policy.key").contains("other's"), "another customer's");
    lab.write(
        "policy.txt",
        format!("{}permit (principal, action == Action::\"fly\", resource);", older.replace(":1,", ":9,")).as_bytes(),
    );
    assert!(set("policy.key").contains("schema"), "against the schema");
    SoftVm::new(&lab).start(&lab.host);
}

#[test]
fn attack_36_a_policy_that_was_changed_in_the_database_is_none() {
    let lab = Lab::new();
    let mut vm = SoftVm::new(&lab);
    let keys = vm.start(&lab.host);
    vm.end(keys.release.instance).expect("ended");
    let released = || lab.events("keys-released").len();
    // Whoever can write to the database makes the rules his own; the signature he can't make.
    lab.sql("DROP TRIGGER policies_do_not_change");
    lab.sql(
        "UPDATE policies SET document = document || 'permit (principal, action == Action::\"vm.coredump\", resource);'",
    );
    assert_eq!(SoftVm::new(&lab).refused(&lab.host), ProblemType::PolicyRefuses);
    assert_eq!(released(), 1, "nothing was issued");
    // One that is rightly signed, under another number, so that it stays in force.
    lab.set_policy(600, GO);
    lab.sql("UPDATE policies SET version = version + 100 WHERE version = (SELECT max(version) FROM policies)");
    assert_eq!(SoftVm::new(&lab).refused(&lab.host), ProblemType::PolicyRefuses);
    assert_eq!(released(), 1);
}

#[test]
fn attack_36_no_version_of_what_the_customer_said_is_changed_or_taken_away() {
    let lab = Lab::new();
    let refuses = |statement, why: &str| {
        let said = lab.try_sql(statement).expect_err(statement);
        assert!(said.contains(why), "{statement}: {said}");
    };
    refuses("DELETE FROM policies", "is kept");
    refuses("DELETE FROM reference_values", "is kept");
    refuses("UPDATE policies SET document = ''", "never changed");
    refuses("UPDATE reference_values SET document = ''", "never changed");
}

#[test]
fn attack_38_without_a_verdict_there_are_no_keys() {
    let lab = Lab::with(600, "permit (principal, action == Action::\"vm.renew\", resource);");
    assert_eq!(SoftVm::new(&lab).refused(&lab.host), ProblemType::PolicyRefuses);
    lab.set_policy(600, "");
    assert_eq!(SoftVm::new(&lab).refused(&lab.host), ProblemType::PolicyRefuses, "no rules");
    // What is stored can no longer be read: the verdict is no, not the last one that was good.
    lab.set_policy(600, GO);
    let mut vm = SoftVm::new(&lab);
    let keys = vm.start(&lab.host);
    vm.end(keys.release.instance).expect("ended");
    lab.sql("INSERT INTO policies SELECT customer, max(version) + 1, 'nonsense', signature, set_us FROM policies");
    assert_eq!(SoftVm::new(&lab).refused(&lab.host), ProblemType::PolicyRefuses);
    lab.sql("INSERT INTO reference_values SELECT customer, max(version) + 1, 'nonsense', set_us FROM reference_values");
    assert_eq!(SoftVm::new(&lab).refused(&lab.host), ProblemType::Unavailable);
}

#[test]
fn attack_38_a_verdict_ends_by_itself() {
    let lab = Lab::with(2, GO);
    SoftVm::new(&lab).start(&lab.host);
    let state = || lab.keys(&["vm", "list", "acme", "--json"]);
    let start = std::time::Instant::now();
    while !state().contains("lease-past") {
        assert!(start.elapsed().as_secs() < 60, "{}", state());
        std::thread::sleep(std::time::Duration::from_millis(200));
    }
}

#[test]
fn attack_44_no_secret_is_logged_or_stored_in_the_clear() {
    use base64::Engine;
    let lab = Lab::new();
    let mut vm = SoftVm::new(&lab);
    let keys = vm.start(&lab.host);
    lab.keys(&["vm", "show", "payroll.vm"]);
    vm.end(keys.release.instance).expect("ended");
    let master = std::fs::read(lab.path("keys/master.key")).expect("the master key");
    let mut canaries: Vec<Vec<u8>> = vec![master];
    canaries.extend(keys.keys.iter().map(|k| k.expose().to_vec()));
    let log = lab.provider.log();
    assert!(log.contains("TRACE") || log.contains("DEBUG"), "the log was as chatty as it gets");
    let audit = lab.keys(&["audit", "list", "acme", "--json"]);
    let database = [
        std::fs::read(lab.path("keys/keys.db")).expect("the database"),
        std::fs::read(lab.path("keys/keys.db-wal")).unwrap_or_default(),
    ]
    .concat();
    for canary in canaries {
        let texts = [
            hex::encode(&canary),
            hex::encode_upper(&canary),
            base64::engine::general_purpose::STANDARD_NO_PAD.encode(&canary),
            base64::engine::general_purpose::URL_SAFE_NO_PAD.encode(&canary),
            format!("{canary:?}"),
        ];
        for text in &texts {
            assert!(!log.contains(text) && !audit.contains(text), "a key was logged");
            assert!(!database.windows(text.len()).any(|w| w == text.as_bytes()), "a key is in the database as text");
        }
        assert!(!database.windows(canary.len()).any(|w| w == canary), "a key is in the database");
    }
}

#[test]
fn attack_47_one_tenants_host_gets_nothing_of_another_tenants() {
    let lab = Lab::new();
    // The customer `other` has a cloud of its own, with a host of its own, and a VM of the same name.
    let host = SoftHost::new(&lab.root);
    lab.write("other.der", &host.certificate);
    lab.keys(&["customer", "create", "other", "--lab", "--policy-key", &lab.text("other.key")]);
    lab.keys(&["cloud", "create", "theirs", "--kind", "lab", "--roots", &lab.text("roots.pem")]);
    lab.keys(&["cloud", "enroll", "theirs", "--certificate", &lab.text("other.der")]);
    lab.keys(&["customer", "allow-cloud", "other", "theirs"]);
    lab.keys(&["reference", "set", "other", &lab.text("values.json")]);
    let policy = std::fs::read_to_string(lab.path("policy.txt")).expect("the policy").replace("acme", "other");
    lab.write("other.txt", policy.as_bytes());
    lab.keys(&["policy", "set", "other", &lab.text("other.txt"), "--policy-key", &lab.text("other.key")]);
    lab.keys(&["vm", "create", "other", "payroll"]);
    for customer in ["acme", "other"] {
        for file in [lab.file, Digest([3; 32])] {
            for (owner, host) in [("acme", &lab.host), ("other", &host)] {
                let got = SoftVm::of(&lab, customer, "payroll", file).attest(host);
                let rightful = customer == "acme" && owner == "acme" && file == lab.file;
                assert_eq!(got.is_ok(), rightful, "{customer}'s VM on {owner}'s host with {file}");
            }
        }
    }
    // What is said in the body counts nowhere against what was proved: a quote for one customer, sent for the other.
    let mut vm = SoftVm::of(&lab, "other", "payroll", lab.file);
    let challenge = vm.post(&vm.request(&host)).expect("a challenge");
    vm.customer = "acme".parse().expect("label");
    let bundle_key = BundleKey::generate().expect("memory");
    let evidence = vm.evidence(&host, &challenge, &bundle_key);
    assert_eq!(vm.put(&challenge, &evidence).expect_err("refused").problem(), Some(ProblemType::BadEvidence));
}

#[test]
fn what_is_asked_for_an_opinion_changes_nothing() {
    use attest::client::Method;
    let lab = Lab::new();
    let mut vm = SoftVm::new(&lab);
    let opinion = |vm: &mut SoftVm, host: &SoftHost| -> attest::protocol::Opinion {
        let challenge = vm.post(&vm.request(host)).expect("a challenge");
        let bundle_key = BundleKey::generate().expect("memory");
        let evidence = vm.evidence(host, &challenge, &bundle_key);
        let path = format!("/v1/vms/payroll/attestations/{}/opinion", challenge.id);
        let opinion = vm.client.json(Method::Put, &path, Some(&evidence), 100_000).expect("an opinion");
        assert_eq!(vm.put(&challenge, &evidence).expect_err("used").problem(), Some(ProblemType::StaleNonce));
        opinion
    };
    let yes = opinion(&mut vm, &lab.host);
    assert!(yes.would_release && yes.problem.is_none());
    assert!(lab.events("keys-released").is_empty());
    assert_eq!(lab.events("attestation-examined").len(), 1);
    let bad = SoftHost::running(&lab.root, &[("fealty", b"changed")]);
    lab.write("bad.der", &bad.certificate);
    lab.keys(&["cloud", "enroll", "lab", "--certificate", &lab.text("bad.der")]);
    let no = opinion(&mut vm, &bad);
    assert!(!no.would_release);
    assert_eq!(no.problem.expect("why").kind, ProblemType::UntrustedPlatform.urn());
    let keys = vm.start(&lab.host);
    assert_eq!((keys.release.instance.get(), keys.release.volumes[0].open_number.get()), (1, 2), "nothing was spent");
}

#[test]
fn nothing_is_printed_of_a_profile_or_key_in_errors() {
    let output = keys_command().args(["customer", "list"]).output().expect("runs");
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1));
    assert!(text.contains("FEALTY_KEYS_PROFILE") && text.lines().count() == 1, "{text}");
}
