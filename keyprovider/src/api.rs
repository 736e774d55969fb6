//! Bodies of the administrators' HTTP API. JSON; binary parts base64url; keys travel sealed (HPKE, RFC 9180, base mode) to a
//! one-time X25519 key of the tool.
//!
//! ```text
//! GET  /v1/customers                                     POST /v1/customers
//! GET  /v1/customers/{customer}                          PUT  /v1/customers/{customer}/clouds/{cloud}
//! GET  /v1/customers/{customer}/reference                PUT  …/reference
//! GET  /v1/customers/{customer}/policy                   PUT  …/policy
//! GET  /v1/customers/{customer}/audit?from=&limit=
//! GET  /v1/customers/{customer}/vms                      POST …/vms
//! POST /v1/customers/{customer}/vms/{vm}/keys            a fresh key for a sealing
//! PUT  /v1/customers/{customer}/vms/{vm}/file            what was sealed: current from now on
//! POST /v1/customers/{customer}/vms/{vm}/files/{digest}/open   the key of a file, to show or edit it
//! POST /v1/customers/{customer}/vms/{vm}/files/{digest}/back   an older file current again
//! POST /v1/customers/{customer}/vms/{vm}/revoke          the newest instance gets no more leases
//! POST /v1/customers/{customer}/vms/{vm}/confirm         after a restore: nothing of this VM runs
//! GET  /v1/customers/{customer}/volumes                  POST …/volumes
//! POST /v1/customers/{customer}/volumes/{name}/sessions  the volume's key, for a while
//! PUT  …/volumes/{name}/sessions/{session}/anchor        POST …/{session}/events, …/{session}/renew
//! POST …/volumes/{name}/sessions/{session}/operations    is it permitted? POST …/{session}/outcome: how it ended
//! PUT  …/volumes/{name}/sessions/{session}/size          POST …/volumes/{name}/sessions/{session}/end
//! POST /v1/customers/{customer}/volumes/{name}/retire    its keys are destroyed, without its file
//! POST /v1/customers/{customer}/volumes/{name}/confirm   after a restore: this anchor is right
//! GET  /v1/customers/{customer}/streams                  core dumps; POST …/streams/{key}/open: the key of one
//! GET  /v1/clouds                                        POST /v1/clouds
//! GET  /v1/clouds/{cloud}/hosts                          POST …/hosts
//! GET  /v1/admins                                        POST /v1/admins; POST /v1/admins/{name}/revoke
//! POST /v1/backups                                       GET /v1/backups/{id}/{chunk}; DELETE /v1/backups/{id}
//! ```

use crate::store::inventory::CloudKind;
use crate::store::people::Role;
use crate::store::vms::FileDisk;
use policy::config::TrustRoots;
use policy::disk::{VolumeGrant, VolumeRequest};
use policy::{
    Base64Url, CloudId, CustomerId, Digest, HostId, InstanceNumber, KeyId, OpenNumber, ReferenceValues, VmId,
    VolumeAnchor, VolumeId,
};
use serde::{Deserialize, Serialize};

/// What every answer without content holds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Done {
    /// Always true.
    pub done: bool,
}

/// A new customer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NewCustomer {
    /// Its name.
    pub customer: CustomerId,
    /// Whether hosts with software TPMs may serve it.
    #[serde(default)]
    pub lab: bool,
    /// Ed25519 public key that signs its policies, 32 bytes.
    pub policy_key: Base64Url,
}

/// A customer, in a list.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CustomerView {
    /// Its name.
    pub customer: CustomerId,
    /// Whether hosts with software TPMs may serve it.
    pub lab: bool,
}

/// What a customer's VM files seal as trust roots.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TrustView {
    /// The trust roots.
    pub trust: TrustRoots,
    /// The provider's pin.
    pub pin: Digest,
}

/// A new cloud.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NewCloud {
    /// Its name.
    pub cloud: CloudId,
    /// Its kind.
    pub kind: CloudKind,
    /// Certificates of the TPM makers' authorities, PEM.
    pub roots: String,
}

/// A cloud, in a list.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CloudView {
    /// Its name.
    pub cloud: CloudId,
    /// Its kind.
    pub kind: CloudKind,
    /// How many hosts stand in its inventory.
    pub hosts: u64,
}

/// A host to enter into an inventory: by the certificate of its endorsement key, or by the key itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NewHost {
    /// The certificate, DER.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub certificate: Option<Base64Url>,
    /// The key, TPMT_PUBLIC or TPM2B_PUBLIC or SubjectPublicKeyInfo (DER): pinned, for TPMs without a certificate.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ek_public: Option<Base64Url>,
    /// What the cloud calls the host; it stays with this TPM.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
}

/// A host of an inventory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HostView {
    /// SHA-256 of its endorsement key.
    pub host: HostId,
    /// Its inventory.
    pub cloud: CloudId,
    /// What the cloud calls it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// Whether its key is pinned, without a certificate.
    pub pinned: bool,
    /// Whether its TPM is a laboratory's.
    pub lab: bool,
}

/// Reference values in force.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ReferenceView {
    /// Their version.
    pub version: u64,
    /// The values.
    pub values: ReferenceValues,
}

/// A policy: the document and the customer's signature over its [`policy::document::PolicyStatement`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SignedPolicy {
    /// The document.
    pub document: String,
    /// Ed25519 signature, 64 bytes.
    pub signature: Base64Url,
}

/// A version that is in force now.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VersionView {
    /// The version.
    pub version: u64,
}

/// Confirms what a restore brought back.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ConfirmCustomer {
    /// The version of the policy that is in force and should be; 0 for none.
    pub policy: u64,
    /// The same of the reference values.
    pub reference: u64,
}

/// A new VM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NewVm {
    /// Its name.
    pub vm: VmId,
}

/// A VM, in a list.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmView {
    /// Its name.
    pub vm: VmId,
    /// Digest of the current VM file.
    pub current_file: Option<Digest>,
    /// Its newest instance.
    pub instance: Option<InstanceView>,
    /// After a restore: microseconds since 1970 until which an instance unknown to this provider may run.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub unconfirmed_until_us: Option<u64>,
}

/// An instance.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct InstanceView {
    /// Its number.
    pub number: InstanceNumber,
    /// Its host.
    pub host: HostId,
    /// `running`, `ended`, `revoked` or `lease-past`.
    pub state: String,
    /// When its lease ends, in microseconds since 1970.
    pub lease_end_us: u64,
    /// Reports that came.
    pub reports: u64,
}

/// Asks for a key, to be sealed to the tool.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KeyRequest {
    /// The tool's one-time X25519 public key, 32 bytes.
    pub public: Base64Url,
}

/// A key, sealed to the tool.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SealedKey {
    /// Its id.
    pub key_id: KeyId,
    /// HPKE: the encapsulated key, then the ciphertext; `info` is [`key_info`].
    pub sealed: Base64Url,
}

/// A sealed stream, in a list.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StreamView {
    /// Its key's id.
    pub key_id: KeyId,
    /// The VM that wrote it.
    pub vm: VmId,
    /// The instance.
    pub instance: InstanceNumber,
    /// When its key was made, in microseconds since 1970.
    pub created_us: u64,
    /// Its final tag in hex, once reported: the last 16 bytes of the stream.
    pub tag: Option<String>,
}

/// What binds a sealed key to what it is for.
pub fn key_info(customer: &CustomerId, what: &str, id: KeyId) -> Digest {
    Digest::of_fields("fealty key for a tool v1", &[customer.as_str().as_bytes(), what.as_bytes(), &id.0.to_be_bytes()])
}

/// What was sealed with a key.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SealedFile {
    /// The key.
    pub key_id: KeyId,
    /// SHA-256 of the VM file.
    pub digest: Digest,
    /// The volumes that its configuration names.
    pub disks: Vec<FileDisk>,
}

/// A new volume.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NewVolume {
    /// What the customer calls it: a DNS label.
    pub name: String,
}

/// A volume.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VolumeView {
    /// What the customer calls it.
    pub name: String,
    /// Its id, for VM configurations.
    pub volume: VolumeId,
    /// Its newest anchor.
    pub anchor: Option<VolumeAnchor>,
    /// The open number that wrote the anchor.
    pub writer: Option<OpenNumber>,
    /// Who holds it.
    pub held_by: Option<String>,
    /// Whether an administrator has to confirm the anchor first.
    pub unconfirmed: bool,
    /// Its size in bytes, as whoever held it last said: the customer's tool, or an instance under which it grew.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub size: Option<u64>,
    /// Whether its keys are retired: nobody can read it any more.
    #[serde(default)]
    pub retired: bool,
}

/// A session of the tool with a volume.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SessionView {
    /// Its id.
    pub session: Base64Url,
    /// What the engine needs.
    pub grant: VolumeGrant,
    /// The volume's key-encryption key, sealed.
    pub key: SealedKey,
    /// Seconds until the session ends by itself, unless it is renewed.
    pub seconds: u32,
    /// The volume's size in bytes, as whoever held it last said.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub size: Option<u64>,
}

/// Asks whether an operation is permitted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SessionOperation {
    /// The operation.
    pub request: VolumeRequest,
    /// What a key that comes with the permission is sealed to.
    pub key: KeyRequest,
}

/// It is; and what comes with it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum SessionPermit {
    /// Nothing.
    Plain,
    /// For a rekey: the key id for new writes.
    Key(KeyId),
    /// For a rewrap: the next key-encryption key, sealed as the session's was.
    Kek(SealedKey),
    /// For a clone: a session with it.
    Clone {
        /// What the customer calls it.
        name: String,
        /// The session.
        session: Box<SessionView>,
    },
}

/// How a permitted operation ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SessionOutcome {
    /// Whether it was done.
    pub done: bool,
    /// One line, at most 512 bytes.
    pub detail: String,
}

/// A volume's size.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SessionSize {
    /// In bytes.
    pub bytes: u64,
}

/// A newer anchor.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SessionAnchor {
    /// The anchor.
    pub anchor: VolumeAnchor,
}

/// Something that the engine noticed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SessionEvent {
    /// One line, at most 512 bytes.
    pub text: String,
}

/// How a session ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SessionEnd {
    /// One line, at most 512 bytes.
    pub outcome: String,
}

/// Confirms a volume's anchor after a restore.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ConfirmVolume {
    /// A newer anchor, as the volume itself shows it; none means that the kept one is right.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub anchor: Option<VolumeAnchor>,
}

/// A new administrator.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NewAdmin {
    /// Name, as in the audit log: 1 to 64 letters, digits, '.', '_', '-', '@'.
    pub name: String,
    /// Role.
    pub role: Role,
    /// The only customer it may deal with; none means all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub customer: Option<CustomerId>,
    /// SubjectPublicKeyInfo (DER) of its P-256 key.
    pub public: Base64Url,
}

/// An administrator's certificate.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AdminCertificate {
    /// DER.
    pub certificate: Base64Url,
}

/// An administrator, in a list.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AdminView {
    /// Name.
    pub name: String,
    /// Role.
    pub role: Role,
    /// The only customer it may deal with.
    pub customer: Option<CustomerId>,
    /// SHA-256 of its key.
    pub key: Digest,
    /// Whether it is revoked.
    pub revoked: bool,
}

/// A backup that waits to be fetched.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BackupView {
    /// Its id.
    pub id: String,
    /// Its length in bytes.
    pub length: u64,
    /// SHA-256 of it.
    pub digest: Digest,
    /// Bytes in each chunk but the last.
    pub chunk: u64,
}

/// Audit events, as logged.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AuditPage {
    /// JSON bytes of each event, in order.
    pub events: Vec<Base64Url>,
}
