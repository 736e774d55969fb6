//! The vocabulary of fealty and every decision it takes, as pure functions over data.
//!
//! Nothing here does I/O or reads a clock: times come in as arguments, verdicts go out as values. A type that exists has
//! been checked: [`VmId`] can't hold a slash, [`VolumeAnchor`] can't be short, [`ReferenceValues`] can't leave out PCR 14.
//!
//! | module | what it holds |
//! | --- | --- |
//! | [`id`] | names and numbers: customers, VMs, hosts, volumes, instances, keys |
//! | [`encoding`] | digests and binary fields as they stand in JSON |
//! | [`header`], [`config`] | the two halves of a VM file, and the plain configuration of an unprotected VM |
//! | [`device`] | what a machine may have beside processors, memory and disks |
//! | [`operation`] | what can be done to a VM, and which of it needs the customer |
//! | [`lease`] | how long keys live, and what happens then |
//! | [`reference`] | which software a host may run: reference values and the verdict |
//! | [`instance`] | when a VM may start again: one instance at most |
//! | [`anchor`], [`disk`] | volume anchors and the hand-over of a volume to a tool |
//! | [`document`] | the customer's policy document: settings and rules |
//! | [`calendar`] | dates of days |
//! | [`audit`], [`report`] | events of the audit log, and what a VM process reports |

pub mod anchor;
pub mod audit;
pub mod calendar;
pub mod config;
pub mod device;
pub mod disk;
pub mod document;
pub mod encoding;
pub mod header;
pub mod id;
pub mod instance;
pub mod lease;
pub mod operation;
pub mod reference;
pub mod report;

pub use anchor::{AnchorMode, VolumeAnchor};
pub use encoding::{Base64Url, Digest};
pub use header::VmHeader;
pub use id::{
    AttestationId, CloudId, CustomerId, HostId, InstanceNumber, KeyId, NetworkId, Nonce, OpenNumber, VmId, VolumeId,
};
pub use lease::LeaseTerms;
pub use operation::{Operation, OperationClass};
pub use reference::ReferenceValues;
