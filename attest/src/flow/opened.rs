//! What a release brings once it is open, and what later releases to the same instance must fit.

use super::FlowError;
use crate::note::Receipt;
use crate::protocol::{KeyName, Release};
use aws_lc_rs::signature::{ED25519, UnparsedPublicKey};
use policy::config::TrustRoots;
use policy::{Digest, InstanceNumber, OpenNumber, VolumeId};
use secretmem::Secret;

/// Keys that were released to this process, open, in locked memory.
pub struct OpenedRelease {
    /// The readable part, held against the question.
    pub release: Release,
    /// The keys, in the order of `release.keys`, as many.
    pub keys: Vec<Secret<32>>,
    /// When the nonce was asked for: milliseconds of the boot-time clock. The lease counts from here.
    pub asked_ms: u64,
    pub(super) event: Vec<u8>,
    pub(super) receipt: String,
}

/// An instance that was started in the customer's name: his trust roots, and what every later release must fit.
///
/// A provider whose TLS key was stolen, but not its audit key or the customer's policy key, can get nothing past it.
#[derive(Debug)]
pub struct Established {
    trust: TrustRoots,
    instance: InstanceNumber,
    volumes: Vec<(VolumeId, OpenNumber)>,
    /// The place of its newest release in the audit log.
    sequence: u64,
    policy_version: u64,
}

impl OpenedRelease {
    /// The key of this name, where the release has one.
    pub fn key(&self, name: KeyName) -> Option<&Secret<32>> {
        let at = self.release.keys.iter().position(|n| *n == name)?;
        self.keys.get(at)
    }

    /// Checks against the trust roots, which the VM file's key opens, that the customer's audit log holds this very release and
    /// that the policy which permitted it is his, and not older than the file.
    ///
    /// # Errors
    /// `Receipt`, `Mismatch`.
    pub fn establish(&self, trust: &TrustRoots) -> Result<Established, FlowError> {
        Ok(Established {
            sequence: self.check_receipt(trust)?,
            policy_version: self.check_policy(trust)?,
            instance: self.release.instance,
            volumes: self.release.volumes.iter().map(|v| (v.volume, v.open_number)).collect(),
            trust: trust.clone(),
        })
    }

    /// The event's place in the log.
    fn check_receipt(&self, trust: &TrustRoots) -> Result<u64, FlowError> {
        let receipt = Receipt::verify(&self.receipt, &trust.audit_origin, &trust.audit_key)?;
        if receipt.event != Digest::of(&self.event) {
            return Err(FlowError::Mismatch("the receipt is for another event"));
        }
        Ok(receipt.sequence)
    }

    /// The policy's version.
    fn check_policy(&self, trust: &TrustRoots) -> Result<u64, FlowError> {
        let policy = &self.release.policy;
        let said = policy.statement(&self.release.customer).signed_bytes();
        UnparsedPublicKey::new(&ED25519, &*trust.policy_key)
            .verify(&said, &policy.signature)
            .map_err(|_| FlowError::Mismatch("the policy is not signed by the customer's policy key"))?;
        if policy.version < trust.policy_version {
            return Err(FlowError::Mismatch("the policy is older than the VM file"));
        }
        Ok(policy.version)
    }
}

impl Established {
    /// Takes note of a later release to the same instance.
    ///
    /// # Errors
    /// `Receipt`, `Mismatch`: it stands not, or not later, in the log; it is for another instance; it grants a volume that the
    /// instance did not start with, or under another open number; its policy is older, or not the customer's.
    pub(super) fn accept(&mut self, later: &OpenedRelease) -> Result<(), FlowError> {
        let sequence = later.check_receipt(&self.trust)?;
        let version = later.check_policy(&self.trust)?;
        let granted = |v: &policy::disk::VolumeGrant| self.volumes.contains(&(v.volume, v.open_number));
        let checks = [
            (sequence > self.sequence, "the receipt is an earlier release's"),
            (version >= self.policy_version, "an older policy"),
            (later.release.instance == self.instance, "another instance"),
            (later.release.volumes.iter().all(granted), "a volume that this instance did not start with"),
        ];
        if let Some((_, what)) = checks.iter().find(|(good, _)| !good) {
            return Err(FlowError::Mismatch(what));
        }
        (self.sequence, self.policy_version) = (sequence, version);
        Ok(())
    }
}
