//! Events of a customer's audit log.

use crate::encoding::Digest;
use crate::id::{AttestationId, CustomerId, HostId, InstanceNumber, VmId, VolumeId};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// One entry of the log. Its JSON bytes, as stored, are what the receipt's digest covers.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AuditEvent {
    /// Position in the customer's log, from 1, without gaps.
    pub sequence: u64,
    /// Digest of the entry before; of nothing for the first.
    pub previous: Digest,
    /// Microseconds since 1970 UTC by the provider's clock.
    pub time_us: u64,
    /// Whose log.
    pub customer: CustomerId,
    /// Who caused it.
    pub actor: Actor,
    /// What it is.
    pub kind: AuditKind,
    /// Which VM, where one is concerned.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vm: Option<VmId>,
    /// Which instance of it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub instance: Option<InstanceNumber>,
    /// Which host.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host: Option<HostId>,
    /// Which volume.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub volume: Option<VolumeId>,
    /// Which attestation.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub attestation: Option<AttestationId>,
    /// The rest, by name; never a secret.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub details: BTreeMap<String, String>,
}

/// Who caused an event.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Actor {
    /// The provider itself.
    Provider,
    /// An administrator, by name.
    Admin(String),
    /// A VM process.
    Instance,
    /// Somebody who asked without having proved anything.
    Stranger,
}

/// Kinds of events.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum AuditKind {
    /// A customer was created.
    CustomerCreated,
    /// A TPM entered an inventory the customer uses.
    HostEnrolled,
    /// A host was taken out of an inventory.
    HostRemoved,
    /// Reference values were set.
    ReferenceSet,
    /// A policy was set.
    PolicySet,
    /// A VM was created.
    VmCreated,
    /// A VM file was sealed and is current now.
    VmFileCurrent,
    /// The customer went back to an older VM file.
    VmFileBack,
    /// A VM file's key was handed to an administrator, to show or edit it.
    VmFileOpened,
    /// A volume was created.
    VolumeCreated,
    /// A volume's keys were handed to an administrator's tool.
    VolumeSession,
    /// That session ended.
    VolumeSessionEnded,
    /// An anchor went forward at open or close of a volume.
    VolumeAnchored,
    /// An anchor older than the volume was confirmed after a restore.
    AnchorConfirmed,
    /// Something the volume engine noticed.
    VolumeEvent,
    /// A volume has another size, as the customer's tool says.
    VolumeResized,
    /// A volume has another key-encryption key: the one before is destroyed.
    VolumeRewrapped,
    /// A volume's keys are retired: destroyed here, never released again.
    VolumeRetired,
    /// An attestation was refused.
    AttestationRefused,
    /// Somebody asked what would be said to evidence; nothing was released.
    AttestationExamined,
    /// Keys were released: the event that a receipt names.
    KeysReleased,
    /// A restricted operation was permitted: its "before".
    OperationPermitted,
    /// A restricted operation was refused.
    OperationRefused,
    /// How a permitted operation on a volume ended: its "after".
    OperationEnded,
    /// A report of a VM process (its "what" and details).
    Report,
    /// A report that doesn't continue its chain.
    ReportGap,
    /// A core dump's key was handed to an administrator.
    DumpOpened,
    /// The provider was restored from a backup: with these versions, files, administrators and hosts.
    ProviderRestored,
    /// An administrator confirmed what a restore brought back.
    RestoreConfirmed,
    /// An instance was revoked by an administrator.
    InstanceRevoked,
    /// An administrator of this customer, or of all, was registered.
    AdminCreated,
    /// One was revoked.
    AdminRevoked,
    /// A cloud was created.
    CloudCreated,
    /// A VM file's key was made and handed to an administrator, to seal a configuration with.
    VmFileKeyCreated,
    /// A copy of the whole database was made for an administrator.
    BackupCreated,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_read_back_and_unknown_fields_do_not() {
        let event = AuditEvent {
            sequence: 1,
            previous: Digest::of(b""),
            time_us: 1,
            customer: "acme".parse().expect("label"),
            actor: Actor::Admin("ann".into()),
            kind: AuditKind::CustomerCreated,
            vm: None,
            instance: None,
            host: None,
            volume: None,
            attestation: None,
            details: BTreeMap::new(),
        };
        let text = serde_json::to_string(&event).expect("serializes");
        assert_eq!(serde_json::from_str::<AuditEvent>(&text).ok(), Some(event));
        assert!(serde_json::from_str::<AuditEvent>(&text.replacen('{', "{\"x\":1,", 1)).is_err());
    }
}
