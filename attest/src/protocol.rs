//! Bodies of the provider's HTTP API as VM processes use it. JSON over HTTP/1.1 over TLS 1.3; binary parts base64url;
//! refusals are problem documents (RFC 9457).
//!
//! ```text
//! POST /v1/vms/{vm}/attestations                  AttestationRequest  -> 201 Challenge
//! PUT  /v1/vms/{vm}/attestations/{id}/evidence    Evidence            -> 200 Released
//! PUT  /v1/vms/{vm}/attestations/{id}/opinion     Evidence            -> 200 Opinion
//! POST /v1/vms/{vm}/instances/{instance}/reports  policy::report::Report (one a request, in order) -> 204
//! PUT  /v1/vms/{vm}/instances/{instance}/anchors  AnchorUpdate        -> 204
//! ```
//!
//! The client presents one self-signed certificate from its first connection on; its key is the identity that the later
//! requests are judged by.

use policy::disk::VolumeGrant;
use policy::document::PolicyInForce;
use policy::{
    AttestationId, Base64Url, CloudId, CustomerId, Digest, HostId, InstanceNumber, KeyId, LeaseTerms, Nonce, VmId,
    VolumeAnchor, instance::EarlierPeer, operation::OperationRequest,
};
use serde::{Deserialize, Serialize};

/// The longest request body, in bytes: evidence with its logs (base64url adds a third).
pub const REQUEST_LIMIT: usize = 28 * 1024 * 1024;

/// The longest answer, in bytes.
pub const ANSWER_LIMIT: usize = 256 * 1024;

/// The longest firmware or layer log, in bytes.
pub const LOG_LIMIT: usize = 2 * 1024 * 1024;

/// The longest part of an IMA log in one piece of evidence, in bytes: some hundred thousand files.
pub const IMA_LIMIT: usize = 16 * 1024 * 1024;

/// The protocol's version: the only one there is.
pub const PROTOCOL_VERSION: u32 = 1;

/// Asks for a nonce. The TLS client key is the third thing it says.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AttestationRequest {
    /// [`PROTOCOL_VERSION`].
    pub version: u32,
    /// Whose VM.
    pub customer: CustomerId,
    /// Which VM; the same as in the path.
    pub vm: VmId,
    /// What for.
    pub operation: OperationRequest,
    /// Certificate of the TPM's endorsement key, DER; absent where the key itself is pinned in the inventory.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ek_certificate: Option<Base64Url>,
    /// TPMT_PUBLIC of the endorsement key.
    pub ek_public: Base64Url,
    /// TPMT_PUBLIC of the attestation key.
    pub ak_public: Base64Url,
}

/// The provider's challenge.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Challenge {
    /// The attestation's id.
    pub id: AttestationId,
    /// To be bound by the quote; at most 60 s old when the evidence comes.
    pub nonce: Nonce,
    /// The host, as the provider knows this EK.
    pub host: HostId,
    /// PCRs to quote, rising, SHA-256 bank.
    pub pcrs: Vec<u8>,
    /// Whether logs of IMA are wanted, and from which byte of the log on; a host whose log is shorter was reset, and sends
    /// all of it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ima_offset: Option<u64>,
    /// Present until this AK is known to live beside this EK.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub credential: Option<Credential>,
}

/// What TPM2_ActivateCredential takes (TPM 2.0 part 3, section 12.5).
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Credential {
    /// TPM2B_ID_OBJECT, with its size field.
    pub blob: Base64Url,
    /// TPM2B_ENCRYPTED_SECRET, with its size field.
    pub secret: Base64Url,
}

/// Evidence: one JSON document.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Evidence {
    /// [`PROTOCOL_VERSION`].
    pub version: u32,
    /// SHA-256 of the VM file that the process was started with.
    pub vm_file: Digest,
    /// The same operation as was asked for.
    pub operation: OperationRequest,
    /// The secret out of the credential, where one was given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub activation: Option<Base64Url>,
    /// The one-time bundle key: X25519 public key, 32 bytes.
    pub bundle_key: Base64Url,
    /// TPMS_ATTEST of the quote.
    pub quote: Base64Url,
    /// TPMT_SIGNATURE over it.
    pub quote_signature: Base64Url,
    /// TPMT_PUBLIC of the wrap key.
    pub wrap_public: Base64Url,
    /// TPMS_ATTEST of the wrap key's certification.
    pub wrap_certify: Base64Url,
    /// TPMT_SIGNATURE over it.
    pub wrap_signature: Base64Url,
    /// Values of the quoted PCRs, in the selection's order, or none. The quote's digest decides; these only let the
    /// verifier name the PCR whose log is wrong.
    #[serde(default)]
    pub pcr_values: Vec<Digest>,
    /// Whether an earlier process of this VM lives on this host.
    pub earlier_peer: EarlierPeer,
    /// TCG crypto-agile event log of the firmware.
    pub firmware_log: Base64Url,
    /// The host's layer log, same format.
    pub layer_log: Base64Url,
    /// IMA log (binary, ima-ng template) from the asked offset on; empty where none was asked for.
    #[serde(default)]
    pub ima_log: Base64Url,
    /// Where it begins.
    #[serde(default)]
    pub ima_offset: u64,
    /// [`policy::document::Claims`] as JSON bytes.
    pub claims: Base64Url,
}

/// What a good attestation is answered with.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Released {
    /// JSON bytes of the [`Release`]: authenticated as AAD of both layers of the bundle.
    pub release: Base64Url,
    /// The sealed keys: HPKE to the bundle key, around HPKE to the wrap key.
    pub sealed: Base64Url,
    /// The audit log's event of this release ([`policy::audit::AuditEvent`]), JSON bytes as logged.
    pub event: Base64Url,
    /// C2SP signed note by the audit key over origin, sequence and SHA-256 of the event.
    pub receipt: String,
}

/// What the provider would answer to evidence, were it sent for keys. Asking uses the nonce up; nothing else changes, nothing is
/// released, and the audit log is told that somebody asked.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Opinion {
    /// Whether keys would be released.
    pub would_release: bool,
    /// Why not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub problem: Option<Problem>,
}

/// The readable part of a release.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Release {
    /// [`PROTOCOL_VERSION`].
    pub version: u32,
    /// Whose VM.
    pub customer: CustomerId,
    /// Which VM.
    pub vm: VmId,
    /// The instance; for a power-on a new one, otherwise the one that asked.
    pub instance: InstanceNumber,
    /// The attestation it answers.
    pub attestation: AttestationId,
    /// H of that attestation's quote.
    pub qualified: Digest,
    /// The host.
    pub host: HostId,
    /// Whether the host's TPM is a software TPM of a laboratory.
    pub lab: bool,
    /// The inventory that the host stands in.
    pub cloud: CloudId,
    /// What it permits.
    pub operation: OperationRequest,
    /// The lease's terms, from the moment the process asked for the nonce.
    pub lease: LeaseTerms,
    /// Seconds that the VM may run while its reports can't be delivered.
    pub unreported_seconds: u32,
    /// The customer's policy that permitted it, with his signature.
    pub policy: PolicyInForce,
    /// The VM's volumes, with their open numbers and anchors; a renewal repeats the numbers of the power-on.
    #[serde(default)]
    pub volumes: Vec<VolumeGrant>,
    /// What the sealed part holds: 32-byte keys in this order, nothing else.
    pub keys: Vec<KeyName>,
}

/// What a 32-byte key of the sealed part is for.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum KeyName {
    /// Opens the VM file's sealed part (A256GCM content key with this id).
    VmFile(KeyId),
    /// Key-encryption key of the volume at this index of `volumes`.
    Volume(usize),
    /// Seals the stream of a restricted operation (core dump), once.
    Stream(KeyId),
}

/// A newer anchor of a volume that the instance holds.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AnchorUpdate {
    /// It names its volume itself.
    pub anchor: VolumeAnchor,
    /// Whether the volume is closed with it.
    #[serde(default)]
    pub closed: bool,
}

/// A problem document (RFC 9457, `application/problem+json`).
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Problem {
    /// A stable URN, `urn:fealty:problem:NAME`; see [`ProblemType`].
    #[serde(rename = "type")]
    pub kind: String,
    /// What happened, one line.
    pub title: String,
    /// The HTTP status.
    pub status: u16,
    /// What to do, or which part was wrong, one line; never a secret.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub detail: Option<String>,
}

/// Stable problem types: the last part of their URN.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ProblemType {
    /// The request can't be read, or contradicts itself.
    BadRequest,
    /// No such route, customer, VM, instance: told only to those who may know.
    NotFound,
    /// No client key, or not one that may do this.
    Forbidden,
    /// Too large, too many, too fast.
    TooMuch,
    /// The EK is in no inventory of this customer, or its certificate does not chain.
    UnknownTpm,
    /// The AK was not proved to live beside this EK.
    NotActivated,
    /// Nonce unknown, used, or too old.
    StaleNonce,
    /// The quote, certification or a signature is wrong.
    BadEvidence,
    /// The logs don't replay to the quoted PCRs.
    BadLog,
    /// A layer is unknown, revoked or missing.
    UntrustedPlatform,
    /// The VM file is not the current one.
    NotCurrentFile,
    /// The policy says no.
    PolicyRefuses,
    /// Another instance may still run.
    StillRuns,
    /// A volume is held by somebody else, or waits for an administrator.
    VolumeHeld,
    /// The anchor goes backward.
    AnchorBackward,
    /// The request comes from an instance that is not the newest.
    OldInstance,
    /// The report does not continue its chain.
    ReportGap,
    /// Something exists already, or another version of it does.
    Conflict,
    /// The provider can't just now; nothing was done.
    Unavailable,
}

impl ProblemType {
    /// The URN.
    pub fn urn(self) -> String {
        let name = serde_json::to_value(self).ok().and_then(|v| v.as_str().map(str::to_owned));
        format!("urn:fealty:problem:{}", name.unwrap_or_default())
    }

    /// The type behind a URN.
    pub fn from_urn(urn: &str) -> Option<Self> {
        let name = urn.strip_prefix("urn:fealty:problem:")?;
        serde_json::from_value(serde_json::Value::String(name.to_owned())).ok()
    }
}
