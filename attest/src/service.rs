//! Messages of the host's TPM service.
//!
//! Each message is a big-endian `u32` length and that many bytes of JSON, over a unix stream socket; one answer for each
//! request, in order. A VM's socket serves the five requests of [`VmRequest`] and nothing else. The control socket, which
//! no VM process has, serves [`ControlRequest`]; `Register` brings two descriptors (SCM_RIGHTS): the service's end of the
//! VM's socket pair, and a pidfd of the VM process.

pub mod client;
pub mod frame;
pub mod start;

pub use client::{Client, ControlClient, Registering, ServiceError};
pub use start::{StartError, spawn_or_join, spawn_or_join_with};

use policy::{AttestationId, Base64Url, CustomerId, Digest, HostId, Nonce, VmId};
use policy::{instance::EarlierPeer, operation::OperationRequest};
use serde::{Deserialize, Serialize};

/// The longest request, in bytes.
pub const REQUEST_LIMIT: usize = 64 * 1024;

/// The longest answer, in bytes: three logs in base64url.
pub const ANSWER_LIMIT: usize = 28 * 1024 * 1024;

/// What a VM process may ask.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "request", deny_unknown_fields)]
pub enum VmRequest {
    /// Who is this host?
    Identity,
    /// Open a credential with EK and AK.
    Activate {
        /// TPM2B_ID_OBJECT, with its size field.
        blob: Base64Url,
        /// TPM2B_ENCRYPTED_SECRET, with its size field.
        secret: Base64Url,
    },
    /// The wrap key of this boot and its certification by the AK.
    CertifyWrapKey,
    /// A quote; customer, VM, file, host, wrap key, earlier peer and logs are the service's own knowledge.
    Quote {
        /// The provider's nonce.
        nonce: Nonce,
        /// The attestation.
        attestation: AttestationId,
        /// What is asked for.
        operation: OperationRequest,
        /// X25519 public key, 32 bytes.
        bundle_key: Base64Url,
        /// SHA-256 of the client key's SubjectPublicKeyInfo.
        client_key: Digest,
        /// The provider's pin.
        pin: Digest,
        /// PCRs, rising; SHA-256 bank.
        pcrs: Vec<u8>,
        /// Where the wanted part of the IMA log begins; absent where none is wanted.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        ima_offset: Option<u64>,
        /// [`policy::document::Claims`] as JSON bytes.
        claims: Base64Url,
    },
    /// TPM2_ECDH_ZGen on the wrap key.
    Ecdh {
        /// Uncompressed P-256 point (SEC 1, 2.3.3), 65 bytes.
        point: Base64Url,
    },
}

/// What `fealty-host measure`, whoever starts VMs, and the support shell may ask.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "request", deny_unknown_fields)]
pub enum ControlRequest {
    /// Serve a VM process: the socket's end and the pidfd come with it.
    Register {
        /// From the VM file's header.
        customer: CustomerId,
        /// From the VM file's header.
        vm: VmId,
        /// SHA-256 of the VM file's bytes as read, once.
        vm_file: Digest,
    },
    /// Measure a layer into PCR 14 and append it to the layer log.
    Extend {
        /// Its name: 1 to 255 bytes.
        layer: String,
        /// Its version: 0 to 255 bytes.
        version: String,
        /// SHA-256 of the file.
        digest: Digest,
    },
    /// Seal the layer log, and make a new wrap key under the new PCR values.
    Reseal,
    /// What the service is and serves, for people.
    Status,
}

/// An answer, on either socket.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "answer", deny_unknown_fields)]
pub enum Answer {
    /// To `Identity`.
    Identity(Identity),
    /// To `Activate`: the credential's secret.
    Activated {
        /// At most 32 bytes.
        secret: Base64Url,
    },
    /// To `CertifyWrapKey`.
    WrapKey(WrapKey),
    /// To `Quote`.
    Quoted(Box<Quoted>),
    /// To `Ecdh`: the shared point.
    Shared {
        /// Uncompressed P-256 point, 65 bytes.
        point: Base64Url,
    },
    /// To `Register`, `Extend`, `Reseal`.
    Done,
    /// To `Status`.
    Status(Status),
    /// Nothing was done.
    Refused {
        /// Why, and what to do, one line.
        reason: String,
        /// Whether the same request may succeed later (a PCR moved, the TPM is busy).
        again: bool,
    },
}

/// A host's identity.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Identity {
    /// SHA-256 of the EK's SubjectPublicKeyInfo.
    pub host: HostId,
    /// The EK's certificate, DER, where the TPM holds one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ek_certificate: Option<Base64Url>,
    /// TPMT_PUBLIC.
    pub ek_public: Base64Url,
    /// TPMT_PUBLIC.
    pub ak_public: Base64Url,
}

/// The wrap key of this boot.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WrapKey {
    /// TPMT_PUBLIC.
    pub public: Base64Url,
    /// TPMS_ATTEST of TPM2_Certify by the AK.
    pub certify: Base64Url,
    /// TPMT_SIGNATURE over it.
    pub signature: Base64Url,
}

/// A quote and what it covers.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Quoted {
    /// TPMS_ATTEST.
    pub quote: Base64Url,
    /// TPMT_SIGNATURE.
    pub signature: Base64Url,
    /// The wrap key that H names; it may have changed since `CertifyWrapKey` was asked.
    pub wrap_key: WrapKey,
    /// Values of the quoted PCRs, in the selection's order, as the service knows them; empty where it does not. The
    /// quote's digest decides; these only let the verifier name the PCR whose log is wrong.
    #[serde(default)]
    pub pcr_values: Vec<Digest>,
    /// As bound.
    pub earlier_peer: EarlierPeer,
    /// As bound.
    pub firmware_log: Base64Url,
    /// As bound.
    pub layer_log: Base64Url,
    /// As bound.
    pub ima_log: Base64Url,
    /// As bound.
    pub ima_offset: u64,
}

/// The service, for people.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Status {
    /// The host.
    pub host: HostId,
    /// Its process.
    pub pid: u32,
    /// VM processes it serves.
    pub vms: u32,
    /// Layers measured since boot, in order.
    pub layers: Vec<String>,
    /// Whether the layer log is sealed: no VM gets keys before.
    pub sealed: bool,
}
