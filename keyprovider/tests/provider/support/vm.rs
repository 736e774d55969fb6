//! A VM process, as the provider sees one.

use super::Lab;
use super::host::{SoftAk, SoftHost, Statement};
use attest::bundle::{self, BundleKey};
use attest::client::{ClientError, ClientIdentity, HttpsClient, Method};
use attest::note::Receipt;
use attest::protocol::{
    ANSWER_LIMIT, AnchorUpdate, AttestationRequest, Challenge, Evidence, PROTOCOL_VERSION, ProblemType, Release,
    Released,
};
use policy::audit::AuditEvent;
use policy::header::ProviderUrl;
use policy::instance::EarlierPeer;
use policy::operation::OperationRequest;
use policy::report::{EndReason, Report, ReportEvent, chain_start};
use policy::{CustomerId, Digest, InstanceNumber, Operation, VmId};
use secretmem::Secret;

/// A process with its client key.
pub(crate) struct SoftVm {
    pub(crate) client: HttpsClient,
    pub(crate) client_key: Digest,
    pub(crate) customer: CustomerId,
    pub(crate) vm: VmId,
    pub(crate) file: Digest,
    pub(crate) pin: Digest,
    pub(crate) earlier_peer: EarlierPeer,
    pub(crate) operation: OperationRequest,
    chain: Option<(u64, Digest)>,
    identity: ClientIdentity,
    parts: (Vec<Vec<u8>>, Vec<u8>),
}

/// What a release brought.
pub(crate) struct Keys {
    pub(crate) release: Release,
    pub(crate) keys: Vec<Secret<32>>,
    pub(crate) event: AuditEvent,
    pub(crate) event_bytes: Vec<u8>,
    pub(crate) receipt: String,
}

impl SoftVm {
    /// A process of `acme`'s VM `payroll` with its current file.
    pub(crate) fn new(lab: &Lab) -> Self {
        Self::of(lab, "acme", "payroll", lab.file)
    }

    pub(crate) fn of(lab: &Lab, customer: &str, vm: &str, file: Digest) -> Self {
        let key = rcgen::KeyPair::generate().expect("a key");
        let certificate = rcgen::CertificateParams::default().self_signed(&key).expect("signed");
        let parts = (vec![certificate.der().to_vec()], key.serialize_der());
        let identity = ClientIdentity::from_der(parts.0.clone(), parts.1.clone()).expect("an identity");
        let pin = lab.pin();
        Self {
            client: client(&lab.provider.url, pin, &identity),
            client_key: identity.key(),
            customer: customer.parse().expect("label"),
            vm: vm.parse().expect("label"),
            file,
            pin,
            earlier_peer: EarlierPeer::None,
            operation: OperationRequest::plain(Operation::PowerOn),
            chain: None,
            identity,
            parts,
        }
    }

    /// Another connection with the same client key, as a thief or a thread would have it.
    pub(crate) fn twin(&self, lab: &Lab) -> Self {
        let (chain, private) = self.parts.clone();
        let identity = ClientIdentity::from_der(chain, private).expect("the same key");
        Self {
            client: client(&lab.provider.url, self.pin, &identity),
            client_key: self.client_key,
            customer: self.customer.clone(),
            vm: self.vm.clone(),
            file: self.file,
            pin: self.pin,
            earlier_peer: self.earlier_peer,
            operation: self.operation.clone(),
            chain: self.chain,
            identity,
            parts: self.parts.clone(),
        }
    }

    /// The same process after its provider was started anew.
    pub(crate) fn reconnect(&mut self, lab: &Lab) {
        self.client = client(&lab.provider.url, self.pin, &self.identity);
    }

    pub(crate) fn asking(mut self, operation: Operation) -> Self {
        self.operation = OperationRequest::plain(operation);
        self
    }

    pub(crate) fn request(&self, host: &SoftHost) -> AttestationRequest {
        AttestationRequest {
            version: PROTOCOL_VERSION,
            customer: self.customer.clone(),
            vm: self.vm.clone(),
            operation: self.operation.clone(),
            ek_certificate: Some(host.certificate.clone().into()),
            ek_public: host.ek_public.as_bytes().into(),
            ak_public: host.ak.public.as_bytes().into(),
        }
    }

    pub(crate) fn post(&mut self, request: &AttestationRequest) -> Result<Challenge, ClientError> {
        let path = format!("/v1/vms/{}/attestations", self.vm);
        self.client.json(Method::Post, &path, Some(request), ANSWER_LIMIT)
    }

    pub(crate) fn put(&mut self, challenge: &Challenge, evidence: &Evidence) -> Result<Released, ClientError> {
        let path = format!("/v1/vms/{}/attestations/{}/evidence", self.vm, challenge.id);
        self.client.json(Method::Put, &path, Some(evidence), ANSWER_LIMIT)
    }

    pub(crate) fn statement<'a>(&self, challenge: &'a Challenge, bundle_key: &BundleKey) -> Statement<'a> {
        Statement {
            customer: self.customer.clone(),
            vm: self.vm.clone(),
            file: self.file,
            operation: self.operation.clone(),
            client_key: self.client_key,
            bundle_key: *bundle_key.public(),
            pin: self.pin,
            earlier_peer: self.earlier_peer,
            challenge,
        }
    }

    pub(crate) fn evidence(&self, host: &SoftHost, challenge: &Challenge, bundle_key: &BundleKey) -> Evidence {
        let activation = challenge
            .credential
            .as_ref()
            .map(|credential| host.activate(credential, &host.ak.public.name().0).expect("this TPM opens it"));
        host.evidence(&host.ak, &self.statement(challenge, bundle_key), activation)
    }

    /// Evidence signed by a key that the host was not asked with.
    pub(crate) fn evidence_by(
        &self,
        host: &SoftHost,
        ak: &SoftAk,
        challenge: &Challenge,
        bundle_key: &BundleKey,
    ) -> Evidence {
        let activation = challenge.credential.as_ref().and_then(|c| host.activate(c, &ak.public.name().0));
        host.evidence(ak, &self.statement(challenge, bundle_key), activation)
    }

    /// A whole attestation.
    pub(crate) fn attest(&mut self, host: &SoftHost) -> Result<Keys, ClientError> {
        let request = self.request(host);
        let challenge = self.post(&request)?;
        let bundle_key = BundleKey::generate().expect("memory");
        let evidence = self.evidence(host, &challenge, &bundle_key);
        let released = self.put(&challenge, &evidence)?;
        Ok(open(host, &bundle_key, &released))
    }

    /// The same, and it must succeed; the report chain begins.
    #[track_caller]
    pub(crate) fn start(&mut self, host: &SoftHost) -> Keys {
        let keys = self.attest(host).expect("keys are released");
        let release = &keys.release;
        self.chain = Some((0, chain_start(&release.customer, &release.vm, release.instance)));
        keys
    }

    /// The same, and it must be refused.
    #[track_caller]
    pub(crate) fn refused(&mut self, host: &SoftHost) -> ProblemType {
        match self.attest(host) {
            Ok(_) => panic!("keys were released"),
            Err(error) => error.problem().unwrap_or_else(|| panic!("{error}")),
        }
    }

    pub(crate) fn next_report(&self, event: ReportEvent) -> Report {
        let (sequence, previous) = self.chain.expect("started");
        Report { sequence: sequence + 1, previous, boottime_ms: 5, event }
    }

    pub(crate) fn report(&mut self, instance: InstanceNumber, event: ReportEvent) -> Result<(), ClientError> {
        let report = self.next_report(event);
        let bytes = serde_json::to_vec(&report).expect("json");
        self.send_report(instance, &bytes)?;
        self.chain = Some((report.sequence, Digest::of(&bytes)));
        Ok(())
    }

    pub(crate) fn send_report(&mut self, instance: InstanceNumber, bytes: &[u8]) -> Result<(), ClientError> {
        let path = format!("/v1/vms/{}/instances/{instance}/reports", self.vm);
        self.client.request(Method::Post, &path, Some(bytes), ANSWER_LIMIT).map(drop)
    }

    pub(crate) fn end(&mut self, instance: InstanceNumber) -> Result<(), ClientError> {
        self.report(instance, ReportEvent::Ended { reason: EndReason::PowerOff, detail: String::new() })
    }

    pub(crate) fn anchor(&mut self, instance: InstanceNumber, update: &AnchorUpdate) -> Result<(), ClientError> {
        let path = format!("/v1/vms/{}/instances/{instance}/anchors", self.vm);
        let bytes = serde_json::to_vec(update).expect("json");
        self.client.request(Method::Put, &path, Some(&bytes), ANSWER_LIMIT).map(drop)
    }
}

pub(crate) fn client(url: &ProviderUrl, pin: Digest, identity: &ClientIdentity) -> HttpsClient {
    HttpsClient::new(vec![url.clone()], pin, None, identity).expect("a client")
}

/// Opens a bundle with the host's wrap key and the process's bundle key.
#[track_caller]
pub(crate) fn open(host: &SoftHost, bundle_key: &BundleKey, released: &Released) -> Keys {
    let outer = bundle::open(&released.release, &released.sealed, bundle_key, &host.wrap_public()).expect("outer");
    let keys = outer.finish(&mut host.ecdh(outer.point())).expect("inner");
    Keys {
        release: outer.release().clone(),
        keys,
        event: serde_json::from_slice(&released.event).expect("an event"),
        event_bytes: released.event.to_vec(),
        receipt: released.receipt.clone(),
    }
}

/// Checks a receipt as a VM process does.
#[track_caller]
pub(crate) fn check_receipt(lab: &Lab, keys: &Keys) {
    let trust: fealty_keyprovider::api::TrustView = lab.admin().get("/v1/customers/acme").expect("trust roots");
    let receipt = Receipt::verify(&keys.receipt, &trust.trust.audit_origin, &trust.trust.audit_key).expect("signed");
    assert_eq!(receipt.sequence, keys.event.sequence);
    assert_eq!(receipt.event, Digest::of(&keys.event_bytes));
}
