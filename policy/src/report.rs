//! What a VM process reports to its provider: numbered per instance and chained, so that a gap shows.

use crate::disk::VolumeSize;
use crate::encoding::Digest;
use crate::id::{AttestationId, CustomerId, InstanceNumber, VmId, VolumeId};
use crate::operation::Operation;
use serde::{Deserialize, Serialize};

/// One report. Its digest is that of its JSON bytes as sent.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Report {
    /// From 1, without gaps.
    pub sequence: u64,
    /// Digest of the report before; [`chain_start`] for the first.
    pub previous: Digest,
    /// Milliseconds of the host's boot-time clock; a claim.
    pub boottime_ms: u64,
    /// What happened.
    pub event: ReportEvent,
}

/// What happened.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "what", deny_unknown_fields)]
pub enum ReportEvent {
    /// vCPUs run.
    Runs,
    /// A free operation was done.
    Operation {
        /// Which.
        operation: Operation,
    },
    /// A restricted operation that was permitted came to its end.
    Outcome {
        /// The attestation that permitted it.
        attestation: AttestationId,
        /// Which.
        operation: Operation,
        /// Whether it was done.
        done: bool,
        /// How it went, at most 512 bytes; for a core dump the sealed stream's final tag in hex.
        detail: String,
        /// For a volume that was to be made larger: what it is now.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        resized: Option<Resized>,
    },
    /// The lease neared its end without a renewal: the VM is paused.
    Quiesced,
    /// The lease ended: keys are wiped.
    KeysWiped,
    /// Keys were put back and the VM goes on.
    KeysBack,
    /// A block or map page failed its tag.
    DiskIntegrity {
        /// The volume.
        volume: VolumeId,
        /// Logical block (4096 bytes), where known.
        lba: Option<u64>,
        /// Physical block (4096 bytes), where known.
        physical: Option<u64>,
        /// Why, at most 512 bytes.
        reason: String,
    },
    /// The instance's last word; the VM may start elsewhere.
    Ended {
        /// Why.
        reason: EndReason,
        /// More, at most 512 bytes.
        detail: String,
    },
}

/// The size of a volume after a resize, whether that was done or not.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Resized {
    /// Which.
    pub volume: VolumeId,
    /// Its size.
    pub size: VolumeSize,
}

/// Why an instance ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum EndReason {
    /// The guest powered off.
    PowerOff,
    /// The guest asked for a reset.
    Reset,
    /// The operator ended it.
    Shutdown,
    /// The lease's end, by policy.
    Lease,
    /// It never started, or failed.
    Failed,
}

/// What stands for "the report before" in an instance's first report.
pub fn chain_start(customer: &CustomerId, vm: &VmId, instance: InstanceNumber) -> Digest {
    Digest::of_fields(
        "fealty reports v1",
        &[customer.as_str().as_bytes(), vm.as_str().as_bytes(), &instance.get().to_be_bytes()],
    )
}
