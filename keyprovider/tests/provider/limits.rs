//! Attack 39: what is too large, too many, too slow or no sense at all.

use crate::support::vm::SoftVm;
use crate::support::{Lab, anchor_of};
use attest::client::Method;
use attest::protocol::{AnchorUpdate, ProblemType, REQUEST_LIMIT};
use policy::report::{Report, ReportEvent};
use policy::{Digest, InstanceNumber, KeyId, Operation, VolumeId};
use rustix::process::{Resource, getrlimit, setrlimit};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use rustls::{ClientConfig, ClientConnection, RootCertStore, StreamOwned};
use std::io::{Read, Write};
use std::net::TcpStream;
use std::sync::Arc;
use std::time::Duration;

type Tls = StreamOwned<ClientConnection, TcpStream>;

/// A connection on which anything can be said. `certificate`: whether the client shows one.
fn connect(lab: &Lab, certificate: bool) -> Tls {
    let mut roots = RootCertStore::empty();
    let ca = CertificateDer::from_pem_file(lab.path("keys/ca.pem")).expect("the CA");
    roots.add(ca).expect("added");
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let builder = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .expect("TLS 1.3")
        .with_root_certificates(roots);
    let config = if certificate {
        let key = rcgen::KeyPair::generate().expect("a key");
        let own = rcgen::CertificateParams::default().self_signed(&key).expect("signed");
        let private = PrivateKeyDer::from(PrivatePkcs8KeyDer::from(key.serialize_der()));
        builder.with_client_auth_cert(vec![own.der().clone()], private).expect("a client")
    } else {
        builder.with_no_client_auth()
    };
    let connection = ClientConnection::new(Arc::new(config), "localhost".try_into().expect("a name")).expect("TLS");
    let stream = TcpStream::connect((lab.provider.url.host(), lab.provider.url.port())).expect("connects");
    stream.set_read_timeout(Some(Duration::from_secs(120))).expect("set");
    StreamOwned::new(connection, stream)
}

/// Sends `text` and reads until the provider hangs up or has answered.
fn say(tls: &mut Tls, text: &[u8]) -> String {
    let _ = tls.write_all(text).and_then(|()| tls.flush());
    let mut answer = Vec::new();
    let mut piece = [0; 4096];
    loop {
        match tls.read(&mut piece) {
            Ok(0) | Err(_) => break,
            Ok(n) => answer.extend_from_slice(&piece[..n]),
        }
        if answer.windows(2).any(|w| w == b"}\n") || answer.ends_with(b"}") {
            break;
        }
    }
    String::from_utf8_lossy(&answer).into_owned()
}

#[test]
fn attack_39_a_body_that_is_too_long_is_refused() {
    let lab = Lab::new();
    let mut vm = SoftVm::new(&lab);
    let challenge = vm.post(&vm.request(&lab.host)).expect("a challenge");
    let evidence = format!("/v1/vms/payroll/attestations/{}/evidence", challenge.id);
    let ask = "/v1/vms/payroll/attestations".to_owned();
    let report = "/v1/vms/payroll/instances/1/reports".to_owned();
    for (method, path, limit) in
        [(Method::Put, &evidence, REQUEST_LIMIT), (Method::Post, &ask, 64 * 1024), (Method::Post, &report, 64 * 1024)]
    {
        let body = vec![b' '; limit + 1];
        let refused = vm.client.request(method, path, Some(&body), 1000);
        // A server that stops reading may be gone before the client has sent all of it.
        if let Some(problem) = refused.expect_err("refused").problem() {
            assert_eq!(problem, ProblemType::TooMuch, "{path}");
        }
    }
    // Chunked, without a length: the same bound.
    let mut tls = connect(&lab, true);
    let head = "POST /v1/vms/payroll/attestations HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n";
    let mut text = head.as_bytes().to_vec();
    for _ in 0..20 {
        text.extend_from_slice(b"1000\r\n");
        text.extend_from_slice(&[b' '; 0x1000]);
        text.extend_from_slice(b"\r\n");
    }
    let answer = say(&mut tls, &text);
    assert!(answer.contains("too-much"), "{answer}");
    // The provider is well, and the nonce is not used up.
    let bundle_key = attest::bundle::BundleKey::generate().expect("memory");
    vm.put(&challenge, &vm.evidence(&lab.host, &challenge, &bundle_key)).expect("released");
}

#[test]
fn a_refusal_before_the_body_has_come_leaves_the_connection_as_it_says() {
    let lab = Lab::new();
    let mut tls = connect(&lab, true);
    let forbidden = |length| format!("POST /v1/customers HTTP/1.1\r\nhost: x\r\ncontent-length: {length}\r\n\r\n");
    // A small body that comes late: the connection serves the next request.
    for _ in 0..3 {
        tls.write_all(forbidden(2).as_bytes()).and_then(|()| tls.flush()).expect("sent");
        std::thread::sleep(Duration::from_millis(200));
        let answer = say(&mut tls, b"{}");
        assert!(answer.contains("forbidden") && !answer.contains("connection: close"), "{answer}");
    }
    // One that is large: the client is told that nobody listens any more.
    let answer = say(&mut tls, forbidden(1 << 20).as_bytes());
    assert!(answer.contains("forbidden") && answer.contains("connection: close"), "{answer}");
    assert_eq!(tls.read(&mut [0]).expect("an orderly end"), 0);
}

#[test]
fn attack_39_nonsense_gets_one_problem_document() {
    let lab = Lab::new();
    let mut vm = SoftVm::new(&lab);
    let nested = "[".repeat(60_000);
    let good = serde_json::to_string(&vm.request(&lab.host)).expect("json");
    for body in [
        "",
        "{",
        "null",
        &nested,
        "{\"version\":1}",
        &good.replacen('{', "{\"unknown\":1,", 1),
        &good.replacen('{', "{\"version\":1,", 1),
        &good.replace("\"version\":1", "\"version\":2"),
        &good.replace("acme", "ACME"),
        &good.replace("vm.power-on", "vm.fly"),
        "\u{0}",
    ] {
        let refused = vm.client.request(Method::Post, "/v1/vms/payroll/attestations", Some(body.as_bytes()), 1000);
        let error = refused.expect_err("refused");
        assert_eq!(error.problem(), Some(ProblemType::BadRequest), "{:.80}: {error}", body);
    }
    for (at, what) in [("ek_public", "endorsement"), ("ak_public", "attestation")] {
        let mut request: serde_json::Value = serde_json::from_str(&good).expect("json");
        request[at] = "AAAA".into();
        let text = request.to_string();
        let refused = vm.client.request(Method::Post, "/v1/vms/payroll/attestations", Some(text.as_bytes()), 1000);
        assert!(refused.expect_err("refused").to_string().contains(what));
    }
    // Evidence of every broken kind uses its nonce up, and says why.
    let mut challenge = vm.post(&vm.request(&lab.host)).expect("a challenge");
    let bundle_key = attest::bundle::BundleKey::generate().expect("memory");
    type Break = fn(&mut attest::protocol::Evidence);
    let breaks: [(Break, ProblemType); 8] = [
        (|e| e.quote.0.truncate(20), ProblemType::BadEvidence),
        (|e| e.quote_signature.0[20] ^= 1, ProblemType::BadEvidence),
        (|e| e.bundle_key.0.push(1), ProblemType::BadRequest),
        (|e| e.firmware_log.0.truncate(100), ProblemType::BadEvidence),
        (|e| e.wrap_public.0[30] ^= 1, ProblemType::BadEvidence),
        (|e| e.claims.0[0] = b'x', ProblemType::BadEvidence),
        (|e| e.vm_file = policy::Digest([5; 32]), ProblemType::BadEvidence),
        (|e| e.version = 2, ProblemType::BadRequest),
    ];
    for (n, (broken, problem)) in breaks.into_iter().enumerate() {
        let mut evidence = vm.evidence(&lab.host, &challenge, &bundle_key);
        broken(&mut evidence);
        let error = vm.put(&challenge, &evidence).expect_err("refused");
        assert_eq!(error.problem(), Some(problem), "break {n}: {error}");
        challenge = vm.post(&vm.request(&lab.host)).expect("a challenge");
    }
    assert!(lab.events("keys-released").is_empty());
}

#[test]
fn attack_39_a_client_without_a_certificate_is_told_so() {
    let lab = Lab::new();
    let answer = say(&mut connect(&lab, false), b"GET /v1/customers HTTP/1.1\r\nhost: x\r\n\r\n");
    assert!(answer.starts_with("HTTP/1.1 403") && answer.contains("client certificate"), "{answer}");
    assert!(answer.contains("application/problem+json"), "{answer}");
}

#[test]
fn attack_39_heads_are_bounded() {
    let lab = Lab::new();
    let many: String = (0..200).map(|n| format!("x-{n}: y\r\n")).collect();
    let answer = say(&mut connect(&lab, true), format!("GET /v1 HTTP/1.1\r\nhost: x\r\n{many}\r\n").as_bytes());
    assert!(answer.starts_with("HTTP/1.1 4") || answer.is_empty(), "{answer}");
    let long = format!("GET /v1 HTTP/1.1\r\nhost: x\r\ny: {}\r\n\r\n", "z".repeat(100_000));
    let answer = say(&mut connect(&lab, true), long.as_bytes());
    assert!(answer.starts_with("HTTP/1.1 4") || answer.is_empty(), "{answer}");
    for nonsense in ["GET\r\n\r\n", "\0\0\0\0\r\n\r\n", "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", "get /v1 HTTP/1.1\r\n\r\n"]
    {
        let answer = say(&mut connect(&lab, true), nonsense.as_bytes());
        assert!(!answer.contains(" 200 ") && !answer.contains(" 5"), "{nonsense:?}: {answer}");
    }
    SoftVm::new(&lab).start(&lab.host);
}

#[test]
fn attack_39_a_slow_body_is_cut_off_and_holds_nobody_up() {
    let lab = Lab::new();
    let mut slow: Vec<Tls> = (0..20).map(|_| connect(&lab, true)).collect();
    let head = "POST /v1/vms/payroll/attestations HTTP/1.1\r\nhost: x\r\ncontent-length: 1000\r\n\r\n{";
    for tls in &mut slow {
        tls.write_all(head.as_bytes()).and_then(|()| tls.flush()).expect("sent");
    }
    // Others are served meanwhile.
    SoftVm::new(&lab).start(&lab.host);
    let answer = say(&mut slow[0], b"");
    assert!(answer.contains("too-much"), "{answer}");
}

#[test]
fn attack_39_slow_evidence_of_strangers_holds_no_instance_up() {
    let lab = Lab::new();
    let mut vm = SoftVm::new(&lab);
    vm.start(&lab.host);
    let request = serde_json::to_string(&vm.request(&lab.host)).expect("json");
    // Anybody with a VM on this host knows its keys, and may begin a start.
    let slow: Vec<Tls> = (0..20)
        .map(|_| {
            let mut tls = connect(&lab, true);
            let length = request.len();
            let head =
                format!("POST /v1/vms/payroll/attestations HTTP/1.1\r\nhost: x\r\ncontent-length: {length}\r\n\r\n");
            let answer = say(&mut tls, format!("{head}{request}").as_bytes());
            let id = answer.split_once("\"id\":\"").and_then(|(_, rest)| rest.split_once('"')).expect("a challenge").0;
            let path = format!("/v1/vms/payroll/attestations/{id}/evidence");
            let head = format!("PUT {path} HTTP/1.1\r\nhost: x\r\ncontent-length: 100000\r\n\r\n{{");
            tls.write_all(head.as_bytes()).and_then(|()| tls.flush()).expect("sent");
            tls
        })
        .collect();
    vm.asking(Operation::Renew).attest(&lab.host).expect("renewed");
    // The first of them was not cut off yet: the renewal did not wait for that.
    slow[0].sock.set_nonblocking(true).expect("set");
    let nothing = slow[0].sock.peek(&mut [0]).expect_err("nothing was answered");
    assert_eq!(nothing.kind(), std::io::ErrorKind::WouldBlock);
}

#[test]
fn attack_39_reports_of_strangers_use_up_nobodys_room() {
    let lab = Lab::new();
    let mut stranger = SoftVm::new(&lab);
    let instance = InstanceNumber::try_from(1).expect("in range");
    let report = Report { sequence: 1, previous: Digest([0; 32]), boottime_ms: 5, event: ReportEvent::Runs };
    let report = serde_json::to_vec(&report).expect("json");
    // More than a minute's allowance.
    for _ in 0..3100 {
        let refused = stranger.send_report(instance, &report);
        assert_eq!(refused.expect_err("refused").problem(), Some(ProblemType::Forbidden));
    }
}

#[test]
fn an_instance_whose_guest_uses_up_its_anchors_of_a_minute_reports_all_the_same() {
    let lab = Lab::new();
    let mut vm = SoftVm::new(&lab);
    let instance = vm.start(&lab.host).release.instance;
    // Of a volume that it does not hold: counted, and refused before anything is written.
    let update = AnchorUpdate { anchor: anchor_of(VolumeId::random(), 1, 1, KeyId(0)), closed: false };
    let mut problem = || vm.anchor(instance, &update).expect_err("refused").problem();
    assert_eq!(problem(), Some(ProblemType::VolumeHeld));
    // While it asks, fifty more are allowed it each second.
    assert!((0..20_000).any(|_| problem() == Some(ProblemType::TooMuch)), "anchors are bounded too");
    vm.end(instance).expect("its end is reported");
}

#[test]
fn attack_39_open_attestations_of_one_key_are_bounded() {
    let lab = Lab::new();
    let mut vm = SoftVm::new(&lab);
    let request = vm.request(&lab.host);
    let mut refused = 0;
    for _ in 0..10 {
        refused += usize::from(vm.post(&request).is_err_and(|e| e.problem() == Some(ProblemType::TooMuch)));
    }
    assert!(refused >= 5, "{refused}");
    SoftVm::new(&lab).start(&lab.host);
}

#[test]
fn keys_are_agreed_on_with_a_post_quantum_algorithm() {
    let lab = Lab::new();
    let mut tls = connect(&lab, true);
    let answer = say(&mut tls, b"GET /v1/nothing HTTP/1.1\r\nhost: x\r\n\r\n");
    assert!(answer.starts_with("HTTP/1.1 404"), "{answer}");
    let group = tls.conn.negotiated_key_exchange_group().expect("a group").name();
    assert_eq!(group, rustls::NamedGroup::X25519MLKEM768);
    let chain = tls.conn.peer_certificates().expect("a chain");
    let ca = CertificateDer::from_pem_file(lab.path("keys/ca.pem")).expect("the CA");
    assert_eq!(chain.last(), Some(&ca), "hosts have no other copy of the CA");
}

#[test]
fn attack_35_older_protocols_and_plain_text_are_refused() {
    let lab = Lab::new();
    let mut plain = TcpStream::connect((lab.provider.url.host(), lab.provider.url.port())).expect("connects");
    plain.set_read_timeout(Some(Duration::from_secs(60))).expect("set");
    plain.write_all(b"GET /v1/customers HTTP/1.1\r\nhost: x\r\n\r\n").expect("sent");
    let mut answer = Vec::new();
    let _ = plain.read_to_end(&mut answer);
    assert!(!answer.windows(4).any(|w| w == b"HTTP"), "{answer:?}");
    // TLS 1.2's hello alone: an alert, no handshake.
    let hello = [0x16, 3, 1, 0, 45, 1, 0, 0, 41, 3, 3];
    let mut old = TcpStream::connect((lab.provider.url.host(), lab.provider.url.port())).expect("connects");
    old.set_read_timeout(Some(Duration::from_secs(60))).expect("set");
    let body = [&hello[..], &[7; 32], &[0, 0, 2, 0xc0, 0x2b, 1, 0]].concat();
    old.write_all(&body).expect("sent");
    let mut answer = Vec::new();
    let _ = old.read_to_end(&mut answer);
    assert!(answer.first().is_none_or(|kind| *kind == 0x15), "an alert or nothing: {answer:?}");
}

#[test]
fn attack_39_idle_connections_of_strangers_leave_instances_their_seats() {
    let lab = Lab::new();
    let mut vm = SoftVm::new(&lab);
    vm.start(&lab.host);
    vm.reconnect(&lab);
    let mut descriptors = getrlimit(Resource::Nofile);
    descriptors.current = descriptors.maximum;
    setrlimit(Resource::Nofile, descriptors).expect("as many descriptors as there may be");
    // As many as an address may have.
    let idle: Vec<Tls> = (0..1024)
        .map(|_| {
            let mut tls = connect(&lab, true);
            while tls.conn.is_handshaking() {
                tls.conn.complete_io(&mut tls.sock).expect("a handshake");
            }
            tls
        })
        .collect();
    vm.asking(Operation::Renew).attest(&lab.host).expect("renewed");
    drop(idle);
}

#[test]
fn attack_39_evidence_of_unknown_length_is_refused() {
    let lab = Lab::new();
    let vm = SoftVm::new(&lab);
    let request = serde_json::to_string(&vm.request(&lab.host)).expect("json");
    let mut tls = connect(&lab, true);
    let length = request.len();
    let head = format!("POST /v1/vms/payroll/attestations HTTP/1.1\r\nhost: x\r\ncontent-length: {length}\r\n\r\n");
    let answer = say(&mut tls, format!("{head}{request}").as_bytes());
    let id = answer.split_once("\"id\":\"").and_then(|(_, rest)| rest.split_once('"')).expect("a challenge").0;
    let path = format!("/v1/vms/payroll/attestations/{id}/evidence");
    let head = format!("PUT {path} HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n");
    let answer = say(&mut tls, head.as_bytes());
    assert!(answer.contains("content-length"), "{answer}");
}
