//! Who may do what: every route, every kind of caller.

use crate::support::Lab;
use crate::support::vm::client;
use attest::client::{ClientError, ClientIdentity, HttpsClient, Method};
use attest::protocol::ProblemType;
use fealty_keyprovider::client::{Profile, from_pem};
use fealty_keyprovider::server::gate::Access;
use fealty_keyprovider::server::routes;
use policy::Digest;

/// Every route with its parameters filled in for `customer`.
fn paths(customer: &str) -> Vec<(Method, String, Access)> {
    let method = |m: &axum::http::Method| match m.as_str() {
        "GET" => Method::Get,
        "POST" => Method::Post,
        "PUT" => Method::Put,
        "DELETE" => Method::Delete,
        other => panic!("a method that no client has: {other}"),
    };
    let fill = |path: &str| {
        path.replace("{customer}", customer)
            .replace("{vm}", "payroll")
            .replace("{id}", "AAAAAAAAAAAAAAAAAAAAAA")
            .replace("{instance}", "1")
            .replace("{cloud}", "lab")
            .replace("{name}", "root")
            .replace("{session}", "AAAAAAAAAAAAAAAAAAAAAA")
            .replace("{digest}", &Digest([0; 32]).to_string())
            .replace("{key}", "0000000000000000")
            .replace("{chunk}", "0")
    };
    routes::table().iter().map(|(m, path, access)| (method(m), fill(path), *access)).collect()
}

fn ask(client: &mut HttpsClient, method: Method, path: &str) -> Option<ProblemType> {
    let body = (method != Method::Get && method != Method::Delete).then_some(&b"{}"[..]);
    match client.request(method, path, body, 1 << 20) {
        Ok(_) => None,
        Err(error @ ClientError::Refused(_)) => error.problem(),
        Err(error) => panic!("{path}: {error}"),
    }
}

fn client_of(lab: &Lab, profile: &str) -> HttpsClient {
    let profile = Profile::read(&lab.path(profile)).expect("a profile");
    let der = |text: &str| from_pem(text).expect("PEM");
    let identity = ClientIdentity::from_der(vec![der(&profile.certificate)], der(&profile.key)).expect("an identity");
    client(&lab.provider.url, profile.pin, &identity)
}

#[test]
fn attack_31_each_route_denies_whoever_may_not_use_it() {
    let lab = Lab::new();
    lab.keys(&["customer", "create", "other", "--lab", "--policy-key", &lab.text("other.key")]);
    lab.keys(&["admin", "add", "auditor", "--role", "auditor", "--out", "auditor.json"]);
    lab.keys(&["admin", "add", "theirs", "--role", "admin", "--customer", "other", "--out", "theirs.json"]);
    let mut stranger = client(&lab.provider.url, lab.pin(), &ClientIdentity::generate().expect("a key"));
    let mut auditor = client_of(&lab, "auditor.json");
    let mut theirs = client_of(&lab, "theirs.json");
    let forbidden = Some(ProblemType::Forbidden);
    for (method, path, access) in paths("acme") {
        let by_stranger = ask(&mut stranger, method, &path);
        assert!(by_stranger.is_some(), "{path}: a stranger got an answer");
        assert!(access == Access::AnyKey || by_stranger == forbidden, "{path}: {by_stranger:?}");
        if access != Access::AnyKey {
            assert_eq!(ask(&mut theirs, method, &path), forbidden, "{path}: another customer's administrator");
        }
        if access == Access::Admin {
            assert_eq!(ask(&mut auditor, method, &path), forbidden, "{path}: an auditor");
        }
        if access == Access::Auditor {
            assert_ne!(ask(&mut auditor, method, &path), forbidden, "{path}: an auditor may read");
        }
    }
    for (method, path, access) in paths("other") {
        if access != Access::AnyKey && path.starts_with("/v1/customers/other") {
            assert_ne!(ask(&mut theirs, method, &path), forbidden, "{path}: the customer's own administrator");
        }
    }
    // The routes that were tried changed nothing for acme.
    assert!(lab.events("instance-revoked").is_empty());
}

#[test]
fn a_certificate_alone_is_nothing() {
    let lab = Lab::new();
    let list = (Method::Get, "/v1/customers");
    lab.keys(&["admin", "add", "ann", "--role", "admin", "--out", "ann.json"]);
    let mut ann = client_of(&lab, "ann.json");
    assert_eq!(ask(&mut ann, list.0, list.1), None);
    lab.keys(&["admin", "revoke", "ann"]);
    assert_eq!(ask(&mut ann, list.0, list.1), Some(ProblemType::Forbidden), "revoked, on an open connection");
    lab.refused(&["admin", "revoke", "admin"]);
    // A certificate that anybody can sign, for a key that is registered nowhere, with the same name.
    let key = rcgen::KeyPair::generate().expect("a key");
    let mut params = rcgen::CertificateParams::default();
    params.distinguished_name.push(rcgen::DnType::CommonName, "admin");
    let certificate = params.self_signed(&key).expect("signed").der().to_vec();
    let identity = ClientIdentity::from_der(vec![certificate], key.serialize_der()).expect("an identity");
    let mut forged = client(&lab.provider.url, lab.pin(), &identity);
    assert_eq!(ask(&mut forged, list.0, list.1), Some(ProblemType::Forbidden));
}

#[test]
fn attack_48_tricks_with_names_lead_nowhere() {
    let lab = Lab::new();
    let mut admin = client_of(&lab, "keys/admin.json");
    for path in [
        "/",
        "/v1",
        "/v1/../v1/customers",
        "/v1/customers/..",
        "/v1/customers/../../etc/passwd",
        "/v1/customers/%2e%2e",
        "/v1/customers/acme%2fvms",
        "/v1/customers/acme%00",
        "/v1/customers/ACME",
        "/v1/customers/acme/vms/%2e%2e/keys",
        "/v1//customers",
        "/v1/customers/",
        "/v1/backups/..%2f..%2fmaster.key/0",
        "/v1/backups/%2e%2e/0",
        "/v1/clouds/lab/hosts/x",
        "/V1/customers",
    ] {
        let problem = ask(&mut admin, Method::Get, path);
        assert!(matches!(problem, Some(ProblemType::NotFound | ProblemType::BadRequest)), "{path}: {problem:?}");
    }
    let long = format!("/v1/customers/{}", "a".repeat(10_000));
    assert!(ask(&mut admin, Method::Get, &long).is_some());
    for name in ["../x", "a b", "", "x\ny", &"x".repeat(65)] {
        let new = serde_json::json!({ "name": name, "role": "admin", "public": "" });
        let made: Result<serde_json::Value, _> = admin.json(Method::Post, "/v1/admins", Some(&new), 1000);
        assert_eq!(made.expect_err("refused").problem(), Some(ProblemType::BadRequest), "{name:?}");
        let new = serde_json::json!({ "name": name });
        let made: Result<serde_json::Value, _> =
            admin.json(Method::Post, "/v1/customers/acme/volumes", Some(&new), 1000);
        assert_eq!(made.expect_err("refused").problem(), Some(ProblemType::BadRequest), "{name:?}");
    }
}

#[test]
fn every_act_of_an_administrator_stands_in_the_logs_of_those_it_concerns() {
    let lab = Lab::new();
    lab.keys(&["customer", "create", "other", "--lab", "--policy-key", &lab.text("other.key")]);
    let before = lab.audit().len();
    lab.keys(&["admin", "add", "ann", "--role", "admin", "--out", "ann.json"]);
    lab.keys(&["admin", "add", "theirs", "--role", "auditor", "--customer", "other", "--out", "theirs.json"]);
    lab.keys(&["admin", "revoke", "ann"]);
    lab.keys(&["admin", "revoke", "theirs"]);
    lab.keys(&["cloud", "create", "north", "--kind", "maker", "--roots", &lab.text("roots.pem")]);
    lab.keys(&["backup", "--out", "backup.db"]);
    lab.seal("payroll", &[lab.volume]);
    let kinds = |events: &[serde_json::Value]| -> Vec<String> {
        events.iter().map(|e| e["kind"].as_str().expect("a kind").to_owned()).collect()
    };
    let ours = lab.audit().split_off(before);
    let all = ["admin-created", "admin-revoked", "cloud-created", "backup-created"];
    assert_eq!(kinds(&ours), [&all[..], &["vm-file-key-created", "vm-file-current"]].concat());
    assert_eq!(ours[0]["details"]["name"], "ann");
    assert_eq!(ours[0]["details"]["scope"], "all customers");
    assert!(ours.iter().all(|e| e["actor"]["admin"] == "admin"), "{ours:?}");
    let theirs = lab.keys(&["audit", "list", "other", "--json"]);
    let theirs: Vec<serde_json::Value> = theirs.lines().map(|l| serde_json::from_str(l).expect("an event")).collect();
    let expected =
        ["admin-created", "admin-created", "admin-revoked", "admin-revoked", "cloud-created", "backup-created"];
    assert_eq!(kinds(&theirs[1..]), expected);
    assert_eq!(theirs[2]["details"]["scope"], "other");
}
