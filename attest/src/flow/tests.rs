//! The whole way of a key inside one process: the flow, over TLS, against a provider that verifies and seals as the real one
//! does, with a TPM service of software keys. Then the same with a provider, or somebody between, that misbehaves.

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
use policy::{AttestationId, KeyId, Nonce, Operation};
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use rustls::pki_types::{CertificateDer, PrivatePkcs8KeyDer};
use secretmem::Secret;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};

const ORIGIN: &str = "keys.example/acme";
const FILE_KEY: KeyName = KeyName::VmFile(KeyId(17));

/// What the provider, or somebody who is it or sits before it, does differently.
#[derive(Clone, Copy)]
struct Twist {
    challenge: fn(&mut Challenge),
    release: fn(&mut Release),
    event: fn(&mut AuditEvent),
    released: fn(&mut Released),
    delay: Duration,
    refusal: Option<&'static str>,
    /// The receipt's place in the log; 0 is the next one.
    sequence: u64,
    /// How much further the TPM's clock is, in milliseconds.
    tpm_ms: u64,
}

const HONEST: Twist = Twist {
    challenge: |_| {},
    release: |_| {},
    event: |_| {},
    released: |_| {},
    delay: Duration::ZERO,
    refusal: None,
    sequence: 0,
    tpm_ms: 0,
};

struct Scene {
    host: SoftHost,
    ek: SoftEk,
    twist: Mutex<Twist>,
    /// The newest event's place in the log.
    logged: Mutex<u64>,
    header: VmHeader,
    vm_file: Digest,
    audit_seed: Secret<32>,
    client_key: Mutex<Option<Digest>>,
    /// How often the TPM service says "again" before it does what it is asked.
    again: Mutex<u32>,
    /// Whether no TPM service can be had.
    away: Mutex<bool>,
    /// The TPM service's end of the newest socket pair.
    service_end: Mutex<Option<UnixStream>>,
    /// How many nonces the provider gave.
    nonces: Mutex<u32>,
}

fn keys() -> Secret<32> {
    Secret::copy_of(&[0x42; 32]).expect("memory")
}

impl Scene {
    /// Starts provider and TPM service; gives the attester of a VM process between them.
    fn start(twist: Twist, again: u32) -> (Arc<Self>, Attester) {
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
    fn started() -> (Arc<Self>, Attester) {
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
    fn end_service(&self) {
        let end = self.service_end.lock().expect("lock").take().expect("a service");
        end.shutdown(std::net::Shutdown::Both).expect("shut down");
    }

    fn nonces(&self) -> u32 {
        *self.nonces.lock().expect("lock")
    }

    fn trust(&self) -> TrustRoots {
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
