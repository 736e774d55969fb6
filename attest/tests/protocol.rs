//! The wire types: what is read, what is not, and that errors keep their names.

use fealty_attest::protocol::{AttestationRequest, Challenge, Evidence, Problem, ProblemType, Release, Released};
use fealty_attest::service::{Answer, ControlRequest, VmRequest};
use serde::de::DeserializeOwned;

fn refused<T: DeserializeOwned>(text: &str) -> bool {
    serde_json::from_str::<T>(text).is_err()
}

#[test]
fn problem_types_have_names_that_stay() {
    let names = [
        (ProblemType::BadRequest, "bad-request"),
        (ProblemType::NotFound, "not-found"),
        (ProblemType::Forbidden, "forbidden"),
        (ProblemType::TooMuch, "too-much"),
        (ProblemType::UnknownTpm, "unknown-tpm"),
        (ProblemType::NotActivated, "not-activated"),
        (ProblemType::StaleNonce, "stale-nonce"),
        (ProblemType::BadEvidence, "bad-evidence"),
        (ProblemType::BadLog, "bad-log"),
        (ProblemType::UntrustedPlatform, "untrusted-platform"),
        (ProblemType::NotCurrentFile, "not-current-file"),
        (ProblemType::PolicyRefuses, "policy-refuses"),
        (ProblemType::StillRuns, "still-runs"),
        (ProblemType::VolumeHeld, "volume-held"),
        (ProblemType::AnchorBackward, "anchor-backward"),
        (ProblemType::OldInstance, "old-instance"),
        (ProblemType::ReportGap, "report-gap"),
        (ProblemType::Conflict, "conflict"),
        (ProblemType::Unavailable, "unavailable"),
    ];
    for (kind, name) in names {
        assert_eq!(kind.urn(), format!("urn:fealty:problem:{name}"));
        assert_eq!(ProblemType::from_urn(&kind.urn()), Some(kind));
    }
    for other in ["urn:fealty:problem:", "urn:fealty:problem:x", "about:blank", "bad-request"] {
        assert_eq!(ProblemType::from_urn(other), None, "{other}");
    }
}

#[test]
fn a_problem_may_say_more_than_we_know() {
    // RFC 9457, 3.2: extension members are to be ignored.
    let text = r#"{"type":"urn:fealty:problem:forbidden","title":"no","status":403,"instance":"/x","more":1}"#;
    assert_eq!(serde_json::from_str::<Problem>(text).map(|p| p.status).ok(), Some(403));
}

#[test]
fn attack_39_nesting_unknown_and_repeated_fields_are_refused() {
    let deep = format!("{}1{}", "[".repeat(100_000), "]".repeat(100_000));
    assert!(refused::<Evidence>(&deep) && refused::<Release>(&deep) && refused::<VmRequest>(&deep));
    let in_field = format!(r#"{{"version":{deep}}}"#);
    assert!(refused::<AttestationRequest>(&in_field) && refused::<Challenge>(&in_field));
    let objects = format!("{}1{}", "{\"a\":".repeat(100_000), "}".repeat(100_000));
    assert!(refused::<Answer>(&objects) && refused::<Released>(&objects));

    let good = r#"{"request":"extend","layer":"a","version":"","digest":"DIGEST"}"#.replace("DIGEST", &"00".repeat(32));
    assert!(!refused::<ControlRequest>(&good));
    assert!(refused::<ControlRequest>(&good.replace("\"layer\"", "\"more\":1,\"layer\"")));
    assert!(refused::<ControlRequest>(&good.replace("\"layer\":\"a\"", "\"layer\":\"a\",\"layer\":\"b\"")));
    assert!(refused::<ControlRequest>(&good.replace(&"00".repeat(32), &"00".repeat(31))));
}

#[test]
fn a_vm_socket_does_not_know_the_requests_of_the_control_socket() {
    for request in ["register", "extend", "reseal", "status"] {
        assert!(refused::<VmRequest>(&format!(r#"{{"request":"{request}"}}"#)), "{request}");
    }
    assert!(!refused::<VmRequest>(r#"{"request":"identity"}"#));
}

#[test]
fn attack_52_no_rsa_private_key_is_used_outside_tests() {
    let source = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut folders = vec![source];
    let mut files = 0;
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).expect("a folder") {
            let path = entry.expect("an entry").path();
            if path.is_dir() {
                folders.push(path);
                continue;
            }
            if ["testing.rs", "tests.rs"].iter().any(|name| path.ends_with(name)) {
                continue;
            }
            let text = std::fs::read_to_string(&path).expect("text");
            let code = text.split("#[cfg(test)]\nmod tests {").next().unwrap_or_default();
            for word in ["PrivateDecryptingKey", "RsaKeyPair", "RsaPrivate"] {
                assert!(!code.contains(word), "{} uses {word}", path.display());
            }
            files += 1;
        }
    }
    assert!(files > 20, "the sources are where this test looks");
}
