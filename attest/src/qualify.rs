//! H: what a quote's qualifying data binds. Both ends compute it here, from the same fields in the same order.

use policy::{
    AttestationId, CustomerId, Digest, HostId, Nonce, VmId, instance::EarlierPeer, operation::OperationRequest,
};

/// Everything that a quote vouches for beside the PCRs.
#[derive(Debug, Clone, Copy)]
pub struct Qualified<'a> {
    /// The provider's nonce.
    pub nonce: &'a Nonce,
    /// The attestation.
    pub attestation: &'a AttestationId,
    /// The host, as its TPM service knows itself.
    pub host: &'a HostId,
    /// The customer, as registered with the TPM service.
    pub customer: &'a CustomerId,
    /// The VM, likewise.
    pub vm: &'a VmId,
    /// SHA-256 of the VM file, likewise.
    pub vm_file: &'a Digest,
    /// What is asked for.
    pub operation: &'a OperationRequest,
    /// The VM process's one-time bundle key: X25519 public key, 32 bytes.
    pub bundle_key: &'a [u8; 32],
    /// SHA-256 of the DER SubjectPublicKeyInfo of the VM process's client key.
    pub client_key: &'a Digest,
    /// Name (TPM 2.0 part 1, section 16) of the host's wrap key: 34 bytes for SHA-256.
    pub wrap_key_name: &'a [u8],
    /// Whether an earlier process of this VM lives on this host.
    pub earlier_peer: EarlierPeer,
    /// The firmware log, as sent.
    pub firmware_log: &'a [u8],
    /// The layer log, as sent.
    pub layer_log: &'a [u8],
    /// The IMA log from `ima_offset` on, as sent.
    pub ima_log: &'a [u8],
    /// Where in the IMA log `ima_log` begins, in bytes.
    pub ima_offset: u64,
    /// Pin of the provider's CA, from the VM file's header.
    pub pin: &'a Digest,
    /// The VM process's claims, as the JSON bytes sent.
    pub claims: &'a [u8],
}

impl Qualified<'_> {
    /// SHA-256 over the canonical encoding: the quote's qualifyingData.
    pub fn digest(&self) -> Digest {
        let earlier = match self.earlier_peer {
            EarlierPeer::None => 0,
            EarlierPeer::Lives => 1,
            EarlierPeer::Unknown => 2,
        };
        Digest::of_fields(
            "fealty attestation v1",
            &[
                &self.nonce.0,
                &self.attestation.0,
                self.host.0.as_bytes(),
                self.customer.as_str().as_bytes(),
                self.vm.as_str().as_bytes(),
                self.vm_file.as_bytes(),
                self.operation.digest().as_bytes(),
                self.bundle_key,
                self.client_key.as_bytes(),
                self.wrap_key_name,
                &[earlier],
                Digest::of(self.firmware_log).as_bytes(),
                Digest::of(self.layer_log).as_bytes(),
                Digest::of(self.ima_log).as_bytes(),
                &self.ima_offset.to_be_bytes(),
                self.pin.as_bytes(),
                self.claims,
            ],
        )
    }
}
