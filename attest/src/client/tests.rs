//! The client against real TLS servers, good and bad ones.

use super::*;
use crate::protocol::ProblemType;
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use rustls::pki_types::{CertificateDer, PrivatePkcs8KeyDer};
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;

/// A CA of the test's own.
struct Authority {
    issuer: Issuer<'static, KeyPair>,
    certificate: CertificateDer<'static>,
}

impl Authority {
    fn new() -> Self {
        let key = KeyPair::generate().expect("a key");
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let certificate = params.self_signed(&key).expect("a certificate").der().clone();
        Self { issuer: Issuer::new(params, key), certificate }
    }

    fn pin(&self) -> Digest {
        tls::spki_digest(&self.certificate).expect("readable")
    }
}

/// What a server of the test does differently.
#[derive(Clone, Copy)]
struct Server<'a> {
    authority: &'a Authority,
    name: &'a str,
    expired: bool,
    sends_authority: bool,
    /// The raw HTTP answer to each request.
    answer: &'static [u8],
    /// Bytes that follow it without end.
    endless: bool,
}

impl Server<'_> {
    fn start(self) -> ProviderUrl {
        let key = KeyPair::generate().expect("a key");
        let mut params = CertificateParams::new(vec![self.name.to_owned()]).expect("a name");
        if self.expired {
            params.not_before = rcgen::date_time_ymd(2001, 1, 1);
            params.not_after = rcgen::date_time_ymd(2002, 1, 1);
        }
        let leaf = params.signed_by(&key, &self.authority.issuer).expect("a certificate").der().clone();
        let mut chain = vec![leaf];
        chain.extend(self.sends_authority.then(|| self.authority.certificate.clone()));
        let config =
            rustls::ServerConfig::builder_with_provider(Arc::new(rustls::crypto::aws_lc_rs::default_provider()))
                .with_protocol_versions(&[&rustls::version::TLS13])
                .expect("TLS 1.3")
                .with_no_client_auth()
                .with_single_cert(chain, PrivatePkcs8KeyDer::from(key.serialize_der()).into())
                .expect("a server");
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let port = listener.local_addr().expect("an address").port();
        let (config, answer, endless) = (Arc::new(config), self.answer, self.endless);
        std::thread::spawn(move || {
            for socket in listener.incoming().flatten() {
                let config = config.clone();
                std::thread::spawn(move || serve(socket, config, answer, endless));
            }
        });
        ProviderUrl::try_from(format!("https://localhost:{port}")).expect("a URL")
    }
}

fn serve(mut socket: TcpStream, config: Arc<rustls::ServerConfig>, answer: &[u8], endless: bool) -> Option<()> {
    let mut connection = rustls::ServerConnection::new(config).ok()?;
    let mut stream = rustls::Stream::new(&mut connection, &mut socket);
    loop {
        let mut seen = Vec::new();
        let mut byte = [0];
        while !seen.ends_with(b"\r\n\r\n") {
            stream.read_exact(&mut byte).ok()?;
            seen.push(byte[0]);
        }
        let text = String::from_utf8_lossy(&seen).to_lowercase();
        let length = text.split("content-length: ").nth(1).and_then(|t| t.split("\r\n").next()?.parse::<usize>().ok());
        stream.read_exact(&mut vec![0; length.unwrap_or(0)]).ok()?;
        stream.write_all(answer).ok()?;
        if endless {
            loop {
                stream.write_all(&[b'x'; 4096]).ok()?;
            }
        }
    }
}

const GOOD: &[u8] = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}";

fn good(authority: &Authority) -> Server<'_> {
    Server { authority, name: "localhost", expired: false, sends_authority: true, answer: GOOD, endless: false }
}

fn ask(urls: Vec<ProviderUrl>, pin: Digest, given: Option<Vec<u8>>) -> Result<Vec<u8>, ClientError> {
    let identity = ClientIdentity::generate()?;
    HttpsClient::new(urls, pin, given, &identity)?.request(Method::Post, "/x", Some(b"{}"), 1000)
}

#[track_caller]
fn wrong(result: Result<Vec<u8>, ClientError>, text: &str) {
    match result {
        Err(error @ ClientError::WrongProvider { .. }) => assert!(error.to_string().contains(text), "{error}"),
        other => panic!("{:?}", other.map_err(|e| e.to_string())),
    }
}

#[test]
fn the_pinned_provider_is_talked_to() {
    let authority = Authority::new();
    let url = good(&authority).start();
    assert_eq!(ask(vec![url], authority.pin(), None).expect("an answer"), b"{}");
}

#[test]
fn one_connection_serves_many_requests() {
    let authority = Authority::new();
    let url = good(&authority).start();
    let identity = ClientIdentity::generate().expect("an identity");
    let mut client = HttpsClient::new(vec![url], authority.pin(), None, &identity).expect("a client");
    for _ in 0..5 {
        assert_eq!(client.request(Method::Get, "/x", None, 10).expect("an answer"), b"{}");
    }
}

#[test]
fn attack_32_another_ca_is_refused() {
    let (ours, theirs) = (Authority::new(), Authority::new());
    wrong(ask(vec![good(&theirs).start()], ours.pin(), None), "CA");
    // Also where the right CA's certificate is at hand, or is sent along by who did not get one from it.
    wrong(ask(vec![good(&theirs).start()], ours.pin(), Some(ours.certificate.to_vec())), "CA");
}

#[test]
fn attack_32_another_name_is_refused() {
    let authority = Authority::new();
    wrong(ask(vec![Server { name: "other.example", ..good(&authority) }.start()], authority.pin(), None), "name");
}

#[test]
fn attack_32_an_expired_certificate_is_refused() {
    let authority = Authority::new();
    wrong(ask(vec![Server { expired: true, ..good(&authority) }.start()], authority.pin(), None), "expired");
}

#[test]
fn attack_32_a_redirect_is_not_followed() {
    let authority = Authority::new();
    let answer = b"HTTP/1.1 307 Elsewhere\r\nlocation: https://localhost:1/\r\ncontent-length: 0\r\n\r\n";
    wrong(ask(vec![Server { answer, ..good(&authority) }.start()], authority.pin(), None), "redirect");
}

#[test]
fn an_omitted_ca_may_be_given_and_must_match_the_pin() {
    let (ours, theirs) = (Authority::new(), Authority::new());
    let url = Server { sends_authority: false, ..good(&ours) }.start();
    wrong(ask(vec![url.clone()], ours.pin(), None), "CA");
    assert!(ask(vec![url.clone()], ours.pin(), Some(ours.certificate.to_vec())).is_ok());
    assert!(matches!(ask(vec![url], ours.pin(), Some(theirs.certificate.to_vec())), Err(ClientError::WrongAuthority)));
}

#[test]
fn endless_and_long_answers_end() {
    let authority = Authority::new();
    let answer = b"HTTP/1.1 200 OK\r\ncontent-length: 999999999\r\n\r\n";
    let url = Server { answer, endless: true, ..good(&authority) }.start();
    assert!(matches!(ask(vec![url], authority.pin(), None), Err(ClientError::BadAnswer { .. })));
    let answer = b"HTTP/1.1 200 OK\r\nx: ";
    let url = Server { answer, endless: true, ..good(&authority) }.start();
    assert!(ask(vec![url], authority.pin(), None).is_err());
}

#[test]
fn a_refusal_keeps_its_type_and_loses_what_a_terminal_would_obey() {
    let authority = Authority::new();
    let body = r#"{"type":"urn:fealty:problem:policy-refuses","title":"no\u001b[2J","status":403,"detail":"d"}"#;
    let kind = "content-type: application/problem+json";
    let answer = format!("HTTP/1.1 403 No\r\n{kind}\r\ncontent-length: {}\r\n\r\n{body}", body.len());
    let answer = Vec::leak(answer.into_bytes());
    let url = Server { answer, ..good(&authority) }.start();
    let error = ask(vec![url], authority.pin(), None).expect_err("refused");
    assert_eq!(error.problem(), Some(ProblemType::PolicyRefuses));
    assert!(!error.to_string().contains('\u{1b}'), "{error}");
}

#[test]
fn the_next_url_is_tried_where_nobody_listens() {
    let authority = Authority::new();
    let dead = ProviderUrl::try_from("https://localhost:1".to_owned()).expect("a URL");
    assert!(ask(vec![dead.clone(), good(&authority).start()], authority.pin(), None).is_ok());
    assert!(matches!(ask(vec![dead], authority.pin(), None), Err(ClientError::Unreachable { .. })));
}

#[test]
fn a_server_without_tls_is_not_the_provider() {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let port = listener.local_addr().expect("an address").port();
    std::thread::spawn(move || {
        for mut socket in listener.incoming().flatten() {
            let _ = socket.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}");
        }
    });
    let url = ProviderUrl::try_from(format!("https://localhost:{port}")).expect("a URL");
    assert!(ask(vec![url], Authority::new().pin(), None).is_err());
}
