//! A provider that verifies and seals as the real one does, over TLS, and a TPM service of software keys; each with ways to misbehave.

use super::*;
use crate::bundle::Sealer;
use crate::eventlog::ImaState;
use crate::note::{self, Receipt};
use crate::protocol::Problem;
use crate::service::{Answer, REQUEST_LIMIT, WrapKey, frame};
use crate::testing::{self, Asked, SoftEk, SoftHost};
use crate::verify::{Expected, verify};
use aws_lc_rs::signature::KeyPair as _;
use policy::audit::Actor;
use policy::config::TrustRoots;
use policy::document::KeyMemory;
use policy::instance::EarlierPeer;
use policy::{KeyId, Operation};
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use rustls::pki_types::{CertificateDer, PrivatePkcs8KeyDer};
use secretmem::Secret;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};

pub(super) const ORIGIN: &str = "keys.example/acme";
pub(super) const FILE_KEY: KeyName = KeyName::VmFile(KeyId(17));

/// What the provider, or somebody who is it or sits before it, does differently.
#[derive(Clone, Copy)]
pub(super) struct Twist {
    pub(super) challenge: fn(&mut Challenge),
    pub(super) release: fn(&mut Release),
    pub(super) event: fn(&mut AuditEvent),
    pub(super) released: fn(&mut Released),
    pub(super) delay: Duration,
    pub(super) refusal: Option<&'static str>,
    /// The receipt's place in the log; 0 is the next one.
    pub(super) sequence: u64,
    /// How much further the TPM's clock is, in milliseconds.
    pub(super) tpm_ms: u64,
}

pub(super) const HONEST: Twist = Twist {
    challenge: |_| {},
    release: |_| {},
    event: |_| {},
    released: |_| {},
    delay: Duration::ZERO,
    refusal: None,
    sequence: 0,
    tpm_ms: 0,
};

pub(super) struct Scene {
    host: SoftHost,
    ek: SoftEk,
    pub(super) twist: Mutex<Twist>,
    /// The newest event's place in the log.
    pub(super) logged: Mutex<u64>,
    header: VmHeader,
    vm_file: Digest,
    audit_seed: Secret<32>,
    client_key: Mutex<Option<Digest>>,
    /// How often the TPM service says "again" before it does what it is asked.
    pub(super) again: Mutex<u32>,
    /// Whether no TPM service can be had.
    pub(super) away: Mutex<bool>,
    /// The TPM service's end of the newest socket pair.
    service_end: Mutex<Option<UnixStream>>,
    /// How many nonces the provider gave.
    nonces: Mutex<u32>,
}

pub(super) fn keys() -> Secret<32> {
    Secret::copy_of(&[0x42; 32]).expect("memory")
}

impl Scene {
    /// Starts provider and TPM service; gives the attester of a VM process between them.
    pub(super) fn start(twist: Twist, again: u32) -> (Arc<Self>, Attester) {
        let (listener, config, pin) = tls_server();
        let port = listener.local_addr().expect("an address").port();
        let header = VmHeader {
            version: 1,
            customer: "acme".parse().expect("label"),
            vm: "payroll".parse().expect("label"),
            providers: vec![format!("https://localhost:{port}").try_into().expect("url")],
            pin,
            key_id: KeyId(17),
        };
        let scene = Arc::new(Self {
            host: SoftHost::new(),
            ek: SoftEk::new(),
            twist: Mutex::new(twist),
            logged: Mutex::new(8),
            header: header.clone(),
            vm_file: Digest::of(b"vm file"),
            audit_seed: Secret::copy_of(&[3; 32]).expect("memory"),
            client_key: Mutex::new(None),
            again: Mutex::new(again),
            away: Mutex::new(false),
            service_end: Mutex::new(None),
            nonces: Mutex::new(0),
        });
        let service = scene.register().expect("a service");
        let registrar = scene.clone();
        let reconnect = Box::new(move || registrar.register());
        let serving = scene.clone();
        std::thread::spawn(move || {
            for socket in listener.incoming().flatten() {
                serving.provider(socket, config.clone());
            }
        });
        let provider = ProviderClient::new(&header, None).expect("a client");
        *scene.client_key.lock().expect("lock") = Some(provider.client_key());
        let claims = Claims { key_memory: KeyMemory::MemfdSecret, ptrace_scope: Some(3) };
        let attester = Attester::new(service, reconnect, provider, header, scene.vm_file, &claims).expect("made");
        (scene, attester)
    }

    /// The attester of a process that has started.
    pub(super) fn started() -> (Arc<Self>, Attester) {
        let (scene, mut attester) = Self::start(HONEST, 0);
        let opened = attester.attest(&OperationRequest::plain(Operation::PowerOn), &mut |_| {}).expect("a start");
        attester.establish(opened.establish(&scene.trust()).expect("the customer's"));
        (scene, attester)
    }

    fn register(self: &Arc<Self>) -> Result<Client, ServiceError> {
        if *self.away.lock().expect("lock") {
            return Err(ServiceError::Lost("it is away".into()));
        }
        let (ours, theirs) = UnixStream::pair().expect("pair");
        *self.service_end.lock().expect("lock") = Some(theirs.try_clone().expect("a copy"));
        let serving = self.clone();
        std::thread::spawn(move || serving.tpm_service(theirs));
        Ok(Client::new(ours))
    }

    /// Ends the TPM service as SIGKILL would.
    pub(super) fn end_service(&self) {
        let end = self.service_end.lock().expect("lock").take().expect("a service");
        end.shutdown(std::net::Shutdown::Both).expect("shut down");
    }

    pub(super) fn nonces(&self) -> u32 {
        *self.nonces.lock().expect("lock")
    }

    pub(super) fn trust(&self) -> TrustRoots {
        TrustRoots {
            policy_key: testing::policy_key().public_key().as_ref().into(),
            policy_version: 0,
            directive_key: vec![2; 32].into(),
            audit_origin: ORIGIN.into(),
            audit_key: note::public_key(&self.audit_seed).expect("a key")[..].into(),
        }
    }

    fn twist(&self) -> Twist {
        *self.twist.lock().expect("lock")
    }

    fn asked(&self) -> Asked {
        Asked {
            host: self.ek.public.host_id(),
            pin: self.header.pin,
            client_key: self.client_key.lock().expect("lock").expect("set"),
            ..Asked::new()
        }
    }

    fn tpm_service(&self, mut socket: UnixStream) {
        while let Ok(request) = frame::read::<VmRequest>(&mut socket, REQUEST_LIMIT) {
            let mut again = self.again.lock().expect("lock");
            let answer = if *again > 0 {
                *again -= 1;
                Answer::Refused { reason: "a PCR moved".into(), again: true }
            } else {
                self.tpm_answer(request)
            };
            if frame::write(&mut socket, &answer).is_err() {
                return;
            }
        }
    }

    fn tpm_answer(&self, request: VmRequest) -> Answer {
        match request {
            VmRequest::Identity => Answer::Identity(Identity {
                host: self.ek.public.host_id(),
                ek_certificate: Some(self.ek.certificate.clone().into()),
                ek_public: self.ek.public.as_bytes().into(),
                ak_public: self.host.ak.public.as_bytes().into(),
            }),
            VmRequest::Activate { .. } => Answer::Activated { secret: vec![7; 32].into() },
            VmRequest::Quote { nonce, attestation, operation, bundle_key, client_key, pin, pcrs, claims, .. } => {
                let host = self.ek.public.host_id();
                let (customer, vm) = (self.header.customer.clone(), self.header.vm.clone());
                let asked = Asked { nonce, attestation, host, customer, vm, operation, client_key, pin, pcrs };
                let mut evidence = self.host.evidence_with(&asked, |e| {
                    e.vm_file = self.vm_file;
                    e.bundle_key = bundle_key;
                    e.claims = claims;
                });
                let mut quote = Attest::parse(&evidence.quote).expect("a quote");
                quote.clock.clock += self.twist().tpm_ms;
                self.host.set_quote(&mut evidence, &quote);
                Answer::Quoted(Box::new(Quoted {
                    quote: evidence.quote,
                    signature: evidence.quote_signature,
                    wrap_key: WrapKey {
                        public: evidence.wrap_public,
                        certify: evidence.wrap_certify,
                        signature: evidence.wrap_signature,
                    },
                    pcr_values: evidence.pcr_values,
                    earlier_peer: EarlierPeer::None,
                    firmware_log: evidence.firmware_log,
                    layer_log: evidence.layer_log,
                    ima_log: evidence.ima_log,
                    ima_offset: evidence.ima_offset,
                }))
            }
            VmRequest::Ecdh { point } => {
                let point: [u8; 65] = point.0.try_into().expect("65 bytes");
                Answer::Shared { point: self.host.wrap.ecdh(&point)[..].into() }
            }
            VmRequest::CertifyWrapKey => Answer::Refused { reason: "not asked here".into(), again: false },
        }
    }

    fn provider(&self, mut socket: TcpStream, config: Arc<rustls::ServerConfig>) -> Option<()> {
        let mut connection = rustls::ServerConnection::new(config).ok()?;
        let mut stream = rustls::Stream::new(&mut connection, &mut socket);
        loop {
            let mut head = Vec::new();
            let mut byte = [0];
            while !head.ends_with(b"\r\n\r\n") {
                stream.read_exact(&mut byte).ok()?;
                head.push(byte[0]);
            }
            let head = String::from_utf8(head).ok()?.to_lowercase();
            let length = head.split("content-length: ").nth(1)?.split("\r\n").next()?.parse().ok()?;
            let mut body = vec![0; length];
            stream.read_exact(&mut body).ok()?;
            let (status, kind, answer) = match self.twist().refusal {
                Some(name) => (403, "application/problem+json", self.refuse(name)),
                None if head.starts_with("post") => (201, "application/json", self.challenge(&body)),
                None => (200, "application/json", self.judge(&body)),
            };
            let length = answer.len();
            let head = format!("HTTP/1.1 {status} X\r\ncontent-type: {kind}\r\ncontent-length: {length}\r\n\r\n");
            stream.write_all(&[head.as_bytes(), &answer].concat()).ok()?;
            stream.flush().ok()?;
        }
    }

    fn refuse(&self, name: &str) -> Vec<u8> {
        let kind = format!("urn:fealty:problem:{name}");
        serde_json::to_vec(&Problem { kind, title: "no".into(), status: 403, detail: None }).expect("json")
    }

    fn challenge(&self, body: &[u8]) -> Vec<u8> {
        *self.nonces.lock().expect("lock") += 1;
        let request: AttestationRequest = serde_json::from_slice(body).expect("a request");
        let ek = Public::parse(&request.ek_public).expect("an EK");
        let certificate = request.ek_certificate.expect("a certificate");
        let roots = std::slice::from_ref(&self.ek.root);
        let host = crate::ek::check(&certificate, &ek, roots, testing::moment()).expect("a known TPM");
        let ak = Public::parse(&request.ak_public).expect("an AK");
        let asked = self.asked();
        let mut challenge = Challenge {
            id: asked.attestation,
            nonce: asked.nonce,
            host,
            pcrs: asked.pcrs,
            ima_offset: None,
            credential: Some(crate::tpm::make_credential(&ek, &ak.name(), &[7; 32]).expect("made")),
        };
        (self.twist().challenge)(&mut challenge);
        serde_json::to_vec(&challenge).expect("json")
    }

    fn judge(&self, body: &[u8]) -> Vec<u8> {
        std::thread::sleep(self.twist().delay);
        let evidence: Evidence = serde_json::from_slice(body).expect("evidence");
        assert_eq!(evidence.activation.as_deref(), Some(&[7; 32][..]));
        let asked = self.asked();
        let verified = verify(
            &evidence,
            &Expected {
                nonce: &asked.nonce,
                attestation: &asked.attestation,
                host: &asked.host,
                customer: &asked.customer,
                vm: &asked.vm,
                operation: &evidence.operation,
                client_key: &asked.client_key,
                pin: &asked.pin,
                pcrs: &asked.pcrs,
                ak_public: self.host.ak.public.as_bytes(),
                ima: None::<ImaState>,
            },
        )
        .expect("good evidence");
        let mut release = Release {
            attestation: asked.attestation,
            qualified: verified.qualified,
            host: asked.host,
            operation: evidence.operation.clone(),
            keys: vec![FILE_KEY],
            ..testing::release()
        };
        (self.twist().release)(&mut release);
        let release_json = serde_json::to_vec(&release).expect("json");
        let keys = keys();
        let sealer = Sealer::new(&verified.bundle_key, &verified.wrap_key).expect("keys");
        let sealed = sealer.seal(&release_json, &[&keys]).expect("sealed");
        let mut event = self.event(&release, &release_json);
        (self.twist().event)(&mut event);
        let event = serde_json::to_vec(&event).expect("json");
        let mut logged = self.logged.lock().expect("lock");
        *logged += 1;
        let sequence = if self.twist().sequence > 0 { self.twist().sequence } else { *logged };
        let receipt = Receipt { origin: ORIGIN.into(), sequence, event: Digest::of(&event) };
        let receipt = receipt.sign(&self.audit_seed).expect("signed");
        let mut released =
            Released { release: release_json.into(), sealed: sealed.into(), event: event.into(), receipt };
        (self.twist().released)(&mut released);
        serde_json::to_vec(&released).expect("json")
    }

    fn event(&self, release: &Release, release_json: &[u8]) -> AuditEvent {
        let details = [
            ("operation", release.operation.operation.name().to_owned()),
            ("qualified", release.qualified.to_string()),
            ("release", Digest::of(release_json).to_string()),
        ];
        AuditEvent {
            sequence: 9,
            previous: Digest::of(b""),
            time_us: 1,
            customer: release.customer.clone(),
            actor: Actor::Instance,
            kind: AuditKind::KeysReleased,
            vm: Some(release.vm.clone()),
            instance: Some(release.instance),
            host: Some(release.host),
            volume: None,
            attestation: Some(release.attestation),
            details: details.map(|(name, value)| (name.to_owned(), value)).into(),
        }
    }
}

fn tls_server() -> (TcpListener, Arc<rustls::ServerConfig>, Digest) {
    let ca_key = KeyPair::generate().expect("a key");
    let mut params = CertificateParams::default();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let ca: CertificateDer<'static> = params.self_signed(&ca_key).expect("a certificate").der().clone();
    let issuer = Issuer::new(params, ca_key);
    let key = KeyPair::generate().expect("a key");
    let params = CertificateParams::new(vec!["localhost".to_owned()]).expect("a name");
    let leaf = params.signed_by(&key, &issuer).expect("a certificate").der().clone();
    let pin = crate::ek::host_id(&ca).expect("a certificate").0;
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let config = rustls::ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .expect("TLS 1.3")
        .with_no_client_auth()
        .with_single_cert(vec![leaf, ca], PrivatePkcs8KeyDer::from(key.serialize_der()).into())
        .expect("a server");
    (TcpListener::bind("127.0.0.1:0").expect("a port"), Arc::new(config), pin)
}
