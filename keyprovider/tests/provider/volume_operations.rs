//! Operations on volumes: permitted by name, begun and ended, and what the provider issues, changes and destroys for them. What
//! `fealty-disk` does with it is tested in the workspace's `tests/`.

use crate::support::vm::SoftVm;
use crate::support::{GO, Lab, anchor_of, text_of};
use attest::protocol::ProblemType;
use fealty_keyprovider::api::{self, SessionPermit};
use fealty_keyprovider::client::{AdminClient, AdminClientError, OneTimeKey};
use policy::disk::{VolumeOperation, VolumeRequest};
use policy::{KeyId, VolumeAnchor};

const ALL: &str = r#"permit (principal, action in [Action::"volume.revert", Action::"volume.rekey",
    Action::"volume.rewrap", Action::"volume.clone", Action::"volume.erase"], resource);"#;

fn lab() -> Lab {
    Lab::with(600, &format!("{GO} {ALL}"))
}

/// A session with the volume `root`.
struct Session {
    admin: AdminClient,
    path: String,
    view: api::SessionView,
}

type Answer<T> = Result<T, Option<ProblemType>>;

fn problem<T>(answer: Result<T, AdminClientError>) -> Answer<T> {
    answer.map_err(|error| match error {
        AdminClientError::Client(error) => error.problem(),
        other => panic!("{other}"),
    })
}

impl Session {
    fn open(lab: &Lab) -> Self {
        let mut admin = lab.admin();
        let path = "/v1/customers/acme/volumes/root/sessions";
        let view: api::SessionView = admin.post(path, &one_time()).expect("a session");
        Self { admin, path: format!("{path}/{}", view.session), view }
    }

    fn begin(&mut self, operation: VolumeOperation) -> Answer<SessionPermit> {
        let request = VolumeRequest::plain(operation).with("name", "copy");
        let asked = api::SessionOperation { request, key: one_time() };
        problem(self.admin.post(&format!("{}/operations", self.path), &asked))
    }

    fn outcome(&mut self, done: bool) {
        let outcome = api::SessionOutcome { done, detail: "so".into() };
        let _: api::Done = self.admin.post(&format!("{}/outcome", self.path), &outcome).expect("taken");
    }

    /// An anchor of this opening that names these keys.
    fn anchor(&mut self, epoch: u8, key: KeyId, kek: KeyId) -> Answer<api::Done> {
        let anchor = naming(&anchor_of(self.view.grant.volume, self.view.grant.open_number.get(), epoch, key), kek);
        problem(self.admin.put(&format!("{}/anchor", self.path), &api::SessionAnchor { anchor }))
    }

    fn end(mut self) {
        let end = api::SessionEnd { outcome: "over".into() };
        let _: api::Done = self.admin.post(&format!("{}/end", self.path), &end).expect("ended");
    }
}

fn one_time() -> api::KeyRequest {
    OneTimeKey::generate().expect("memory").request()
}

fn naming(anchor: &VolumeAnchor, kek: KeyId) -> VolumeAnchor {
    let mut bytes = *anchor.as_bytes();
    bytes[112..].copy_from_slice(&kek.0.to_be_bytes());
    VolumeAnchor::from_bytes(&bytes).expect("an anchor")
}

/// The id of the key-encryption key that a rewrap gets.
fn kek(permit: &SessionPermit) -> KeyId {
    let SessionPermit::Kek(sealed) = permit else { panic!("{permit:?}") };
    sealed.key_id
}

fn key(permit: &SessionPermit) -> KeyId {
    let SessionPermit::Key(id) = permit else { panic!("{permit:?}") };
    *id
}

fn told(lab: &Lab) -> Vec<(String, String)> {
    let text = |e: &serde_json::Value, name: &str| e["details"][name].as_str().unwrap_or_default().to_owned();
    lab.events("operation-ended").iter().map(|e| (text(e, "operation"), text(e, "done"))).collect()
}

#[test]
fn one_operation_at_a_time_and_each_end_is_told() {
    let lab = lab();
    let mut session = Session::open(&lab);
    assert_eq!(session.begin(VolumeOperation::Revert), Ok(SessionPermit::Plain));
    assert_eq!(session.begin(VolumeOperation::Revert), Ok(SessionPermit::Plain), "an answer may be lost");
    assert_eq!(session.begin(VolumeOperation::Rekey), Err(Some(ProblemType::Conflict)));
    session.outcome(true);
    session.outcome(true);
    assert_eq!(told(&lab), [("volume.revert".into(), "true".into())]);
    session.begin(VolumeOperation::Revert).expect("the next");
    session.end();
    assert_eq!(told(&lab)[1], ("volume.revert".into(), "not said".into()));
    // A session that is lost, as after a power cut.
    let mut session = Session::open(&lab);
    session.begin(VolumeOperation::Rekey).expect("permitted");
    lab.sql("UPDATE holders SET until_us = 1");
    Session::open(&lab).end();
    assert_eq!(told(&lab)[2], ("volume.rekey".into(), "not said".into()));
    assert_eq!(
        session.begin(VolumeOperation::Rekey),
        Err(Some(ProblemType::VolumeHeld)),
        "it is not the holder any more"
    );
}

#[test]
fn without_a_rule_that_names_it_nothing_is_permitted() {
    let lab = Lab::with(600, &format!("{GO} permit (principal, action, resource);"));
    let mut session = Session::open(&lab);
    for operation in VolumeOperation::ALL {
        assert_eq!(session.begin(operation), Err(Some(ProblemType::PolicyRefuses)), "{operation}");
    }
    session.end();
    let refused = lab.refused(&["volume", "retire", "acme", "root", "--force"]);
    assert!(refused.contains("names volume.erase, which is permitted by name only"), "{refused}");
    assert_eq!((lab.events("operation-refused").len(), lab.events("operation-permitted").len()), (6, 0));
    assert!(lab.events("volume-retired").is_empty() && told(&lab).is_empty());
    lab.set_policy(600, r#"permit (principal == Administrator::"bob", action == Action::"volume.erase", resource);"#);
    lab.refused(&["volume", "retire", "acme", "root", "--force"]);
    lab.keys(&["admin", "add", "bob", "--role", "admin", "--out", "bob.json"]);
    let bob = lab.try_keys_as(&lab.text("bob.json"), &["volume", "retire", "acme", "root", "--force"]);
    assert!(bob.status.success(), "{}", String::from_utf8_lossy(&bob.stderr));
}

#[test]
fn a_rekey_goes_on_with_its_key_once_an_anchor_names_it() {
    let lab = lab();
    let mut session = Session::open(&lab);
    let (own, before) = (session.view.grant.kek_id, session.view.grant.key_id);
    let first = key(&session.begin(VolumeOperation::Rekey).expect("permitted"));
    session.end();
    // Whoever got it may have made a master of that name: nobody else does. Nor is another opening rekeyed in its place.
    let mut session = Session::open(&lab);
    assert_eq!(session.view.grant.key_id, before);
    let second = key(&session.begin(VolumeOperation::Rekey).expect("permitted"));
    assert_ne!(first, second);
    session.anchor(1, second, own).expect("anchored");
    session.end();
    let mut session = Session::open(&lab);
    assert_eq!(session.view.grant.key_id, second);
    assert_eq!(key(&session.begin(VolumeOperation::Rekey).expect("permitted")), second, "it goes on");
    session.outcome(false);
    assert_eq!(key(&session.begin(VolumeOperation::Rekey).expect("permitted")), second, "and on");
    session.outcome(true);
    let third = key(&session.begin(VolumeOperation::Rekey).expect("permitted"));
    assert!(third != second && third != first, "the next one is another");
}

/// With the volume's key and a tool of his own anybody can make a master; the provider takes no anchor that names it.
#[test]
fn an_anchor_names_no_key_that_the_provider_did_not_issue() {
    let lab = lab();
    let mut session = Session::open(&lab);
    let (kek, id) = (session.view.grant.kek_id, session.view.grant.key_id);
    assert_eq!(session.anchor(1, KeyId(7), kek), Err(Some(ProblemType::AnchorBackward)));
    // The first to say which key-encryption key it is, says it for all that come.
    session.anchor(1, id, KeyId(0)).expect("as older programs do");
    session.anchor(2, id, kek).expect("the same");
    assert_eq!(session.anchor(3, id, KeyId(0)), Err(Some(ProblemType::AnchorBackward)));
    let next = key(&session.begin(VolumeOperation::Rekey).expect("permitted"));
    session.anchor(3, id, kek).expect("still under the key so far");
    session.anchor(4, next, kek).expect("issued");
    assert_eq!(session.anchor(5, id, kek), Err(Some(ProblemType::AnchorBackward)), "it was replaced");
    session.end();
}

#[test]
fn a_clone_whose_permission_was_lost_is_asked_for_again() {
    let lab = lab();
    let mut session = Session::open(&lab);
    let clone = |permit: Answer<SessionPermit>| match permit {
        Ok(SessionPermit::Clone { session, .. }) => session,
        other => panic!("{other:?}"),
    };
    let first = clone(session.begin(VolumeOperation::Clone));
    let second = clone(session.begin(VolumeOperation::Clone));
    assert_eq!(first.grant.volume, second.grant.volume);
    assert!(first.session != second.session && first.grant.open_number < second.grant.open_number);
    let mut renew = |view: &api::SessionView| {
        let path = format!("/v1/customers/acme/volumes/copy/sessions/{}/renew", view.session);
        problem(session.admin.post::<api::Done>(&path, &()))
    };
    assert_eq!((renew(&first), renew(&second).is_ok()), (Err(Some(ProblemType::VolumeHeld)), true));
    session.end();
    // Who asks for the first time takes nothing from whoever has the volume.
    lab.sql("UPDATE holders SET session = randomblob(16)");
    let mut session = Session::open(&lab);
    for _ in 0..2 {
        assert_eq!(session.begin(VolumeOperation::Clone), Err(Some(ProblemType::VolumeHeld)));
    }
}

#[test]
fn both_key_encryption_keys_are_kept_until_an_anchor_names_the_new_one() {
    let lab = lab();
    let mut session = Session::open(&lab);
    let (old, id) = (session.view.grant.kek_id, session.view.grant.key_id);
    let new = kek(&session.begin(VolumeOperation::Rewrap).expect("permitted"));
    assert_ne!(new, old);
    session.anchor(1, id, old).expect("the state before");
    session.end();
    let mut session = Session::open(&lab);
    assert_eq!(session.view.grant.kek_id, old, "it was never rewrapped");
    assert_eq!(kek(&session.begin(VolumeOperation::Rewrap).expect("permitted")), new, "the same key again");
    assert_eq!(session.anchor(1, id, KeyId(7)), Err(Some(ProblemType::AnchorBackward)), "a key of nobody");
    assert!(lab.events("volume-rewrapped").is_empty());
    let log = lab.path("keys/keys.db-wal");
    assert!(std::fs::metadata(&log).expect("there").len() > 0);
    session.anchor(2, id, new).expect("rewrapped");
    assert_eq!(std::fs::metadata(&log).expect("there").len(), 0, "what was destroyed is not there either");
    session.anchor(2, id, new).expect("the same again");
    assert_eq!(session.anchor(3, id, old), Err(Some(ProblemType::AnchorBackward)), "that one is gone");
    session.end();
    assert_eq!(lab.events("volume-rewrapped").len(), 1);
    let session = Session::open(&lab);
    assert_eq!((session.view.grant.kek_id, session.view.key.key_id), (new, new));
    session.end();
    // A VM gets the new one.
    let keys = SoftVm::new(&lab).start(&lab.host);
    assert_eq!(keys.release.volumes[0].kek_id, new);
}

#[test]
fn a_restored_provider_follows_a_rewrap_that_it_had_begun() {
    let mut lab = lab();
    let mut session = Session::open(&lab);
    let (old, id) = (session.view.grant.kek_id, session.view.grant.key_id);
    let new = kek(&session.begin(VolumeOperation::Rewrap).expect("permitted"));
    session.end();
    lab.keys(&["backup", "--out", "backup.db"]);
    // After the backup it comes to its end.
    let mut session = Session::open(&lab);
    session.anchor(1, id, new).expect("rewrapped");
    let volume = session.view.grant.volume;
    let shown = naming(&anchor_of(volume, session.view.grant.open_number.get(), 1, id), new);
    lab.provider.kill();
    std::fs::create_dir(lab.path("again")).expect("a folder");
    std::fs::copy(lab.path("keys/master.key"), lab.path("again/master.key")).expect("copied");
    lab.keys(&["restore", "--dir", "again", "--from", "backup.db"]);
    lab.provider = crate::support::Provider::start(&lab.path("again"));
    let foreign = naming(&shown, KeyId(7));
    let refused = lab.refused(&["volume", "confirm", "acme", "root", "--anchor", &text_of(&foreign)]);
    assert!(refused.contains("which this provider does not have"), "{refused}");
    lab.keys(&["volume", "confirm", "acme", "root", "--anchor", &text_of(&shown)]);
    lab.keys(&["customer", "confirm", "acme", "--policy", "1", "--reference", "1"]);
    let session = Session::open(&lab);
    assert!(session.view.grant.kek_id == new && new != old);
}

/// The backup's policy may be one that the customer has replaced, its administrators ones that he has removed.
#[test]
fn a_restored_provider_decides_and_releases_nothing_before_the_customer_has_confirmed() {
    let mut lab = lab();
    Session::open(&lab).end();
    let sessions = lab.events("volume-session").len();
    lab.keys(&["backup", "--out", "backup.db"]);
    lab.restore("backup.db");
    let retire = |lab: &Lab| lab.refused(&["volume", "retire", "acme", "root", "--force"]);
    assert!(retire(&lab).contains("volume confirm acme root"), "{}", retire(&lab));
    lab.keys(&["volume", "confirm", "acme", "root"]);
    for said in [retire(&lab), lab.refused(&["volume", "exec", "acme", "root", "--", "true"])] {
        assert!(said.contains("customer confirm acme"), "{said}");
    }
    assert!(lab.events("operation-permitted").is_empty());
    assert_eq!(lab.events("volume-session").len(), sessions);
    lab.keys(&["customer", "confirm", "acme", "--policy", "1", "--reference", "1"]);
    Session::open(&lab).end();
    lab.keys(&["volume", "retire", "acme", "root", "--force"]);
}

#[test]
fn nothing_of_a_retired_volume_is_released() {
    let lab = lab();
    let mut vm = SoftVm::new(&lab);
    let keys = vm.start(&lab.host);
    let held = lab.refused(&["volume", "retire", "acme", "root", "--force"]);
    assert!(held.contains("is held by instance 1 of VM payroll"), "{held}");
    vm.end(keys.release.instance).expect("ended");
    lab.refused(&["volume", "retire", "acme", "root"]);
    lab.keys(&["volume", "retire", "acme", "root", "--force"]);
    assert_eq!(SoftVm::new(&lab).refused(&lab.host), ProblemType::NotFound);
    let refused = lab.refused(&["volume", "exec", "acme", "root", "--", "true"]);
    assert!(refused.contains("retired, for good"), "{refused}");
    assert_eq!(lab.events("volume-retired").len(), 1);
    lab.refused(&["volume", "retire", "acme", "root", "--force"]);
    lab.refused(&["volume", "create", "acme", "root"]);
}
