//! The hand-over of a volume to `fealty-disk` through an inherited descriptor (`--keys-fd`), a stream socket:
//!
//! ```text
//! holder -> tool   u32 BE length, DiskSession as JSON (at most 4096 bytes), then the 32 raw bytes of the KEK
//! tool -> holder   u32 BE length, ToolMessage as JSON (at most 4096 bytes)
//! holder -> tool   u32 BE length, HolderAnswer as JSON, one for each message; behind a Permit with a key, its 32 raw bytes
//! ```
//!
//! Keys travel behind the JSON so that they are read straight into locked memory.

use crate::anchor::{AnchorMode, VolumeAnchor};
use crate::id::{CustomerId, KeyId, OpenNumber, VolumeId};
use crate::operation::{ParameterError, check_parameters};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

/// The longest JSON part of a message, in bytes.
pub const MESSAGE_LIMIT: usize = 4096;

/// The cipher suites a volume may have. One so far; the name comes from the provider, never from the disk.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum CipherSuite {
    /// AES-256-XTS (IEEE 1619) for blocks, HMAC-SHA256 (FIPS 198-1) for blocks and metadata.
    #[serde(rename = "aes-256-xts+hmac-sha256")]
    Aes256XtsHmacSha256,
}

/// A volume's size in bytes: a multiple of 512, from 512 to 2^50.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize, Deserialize)]
#[serde(try_from = "u64", into = "u64")]
pub struct VolumeSize(u64);

/// A number that is no volume's size.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("a volume has a multiple of 512 bytes, from 512 to 2^50, not {0}")]
pub struct SizeError(u64);

impl VolumeSize {
    /// The smallest: one sector.
    pub const MIN: u64 = 512;
    /// The largest.
    pub const MAX: u64 = 1 << 50;

    /// In bytes.
    pub fn bytes(self) -> u64 {
        self.0
    }
}

impl TryFrom<u64> for VolumeSize {
    type Error = SizeError;
    fn try_from(bytes: u64) -> Result<Self, SizeError> {
        let possible = (Self::MIN..=Self::MAX).contains(&bytes) && bytes.is_multiple_of(512);
        if possible { Ok(Self(bytes)) } else { Err(SizeError(bytes)) }
    }
}

impl From<VolumeSize> for u64 {
    fn from(size: VolumeSize) -> u64 {
        size.0
    }
}

/// What a holder of a volume needs beside the key-encryption key.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VolumeGrant {
    /// The volume.
    pub volume: VolumeId,
    /// Whose it is: part of each key slot's AAD.
    pub customer: CustomerId,
    /// Its cipher suite.
    pub cipher: CipherSuite,
    /// The key-encryption key's id.
    pub kek_id: KeyId,
    /// The id under which new writes are sealed: a fresh one in the grant that creates the volume.
    pub key_id: KeyId,
    /// The open number issued for this opening.
    pub open_number: OpenNumber,
    /// The newest anchor; none only in the grant that creates the volume.
    pub anchor: Option<VolumeAnchor>,
    /// How the anchor is to be kept.
    pub anchor_mode: AnchorMode,
}

/// First message from the holder.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskSession {
    /// The volume's grant.
    pub grant: VolumeGrant,
    /// The size that the key provider knows, in bytes; none before the volume was filled.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub size: Option<u64>,
}

/// What may be done to a volume only where the customer's policy permits it by name. The key provider logs each before it is done
/// and after.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
pub enum VolumeOperation {
    /// Go back to a snapshot: what was written since is gone.
    #[serde(rename = "volume.revert")]
    Revert,
    /// A new master for new writes, and all that is there sealed anew under it.
    #[serde(rename = "volume.rekey")]
    Rekey,
    /// A new key-encryption key: the masters wrapped anew under it.
    #[serde(rename = "volume.rewrap")]
    Rewrap,
    /// The same data once more, as another volume.
    #[serde(rename = "volume.clone")]
    Clone,
    /// The end of the volume: its keys are retired, its key slots destroyed.
    #[serde(rename = "volume.erase")]
    Erase,
}

impl VolumeOperation {
    /// Every operation.
    pub const ALL: [Self; 5] = [Self::Revert, Self::Rekey, Self::Rewrap, Self::Clone, Self::Erase];

    /// Its name, as in JSON, in policies and in the audit log.
    pub fn name(self) -> &'static str {
        match self {
            Self::Revert => "volume.revert",
            Self::Rekey => "volume.rekey",
            Self::Rewrap => "volume.rewrap",
            Self::Clone => "volume.clone",
            Self::Erase => "volume.erase",
        }
    }
}

/// A name that no operation on a volume has.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("no operation on a volume has this name")]
pub struct UnknownOperation;

impl FromStr for VolumeOperation {
    type Err = UnknownOperation;

    fn from_str(name: &str) -> Result<Self, UnknownOperation> {
        Self::ALL.into_iter().find(|operation| operation.name() == name).ok_or(UnknownOperation)
    }
}

impl fmt::Display for VolumeOperation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// An operation that is asked for, with its parameters.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VolumeRequest {
    /// What is to be done.
    pub operation: VolumeOperation,
    /// Its parameters, by name: `snapshot` of a revert, `name` of a clone. Bounded as those of an operation on a VM are.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub parameters: BTreeMap<String, String>,
}

impl VolumeRequest {
    /// An operation without parameters.
    pub fn plain(operation: VolumeOperation) -> Self {
        Self { operation, parameters: BTreeMap::new() }
    }

    /// The same with one more.
    pub fn with(mut self, name: &str, value: impl ToString) -> Self {
        self.parameters.insert(name.to_owned(), value.to_string());
        self
    }

    /// Checks the bounds on parameters.
    ///
    /// # Errors
    /// More than 16 parameters, or a name or value of more than 256 bytes.
    pub fn check(&self) -> Result<(), ParameterError> {
        check_parameters(&self.parameters)
    }
}

/// What comes with a permission.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum Permit {
    /// Nothing: go ahead.
    Plain,
    /// For a rekey: the key id for new writes, to be put in the grant's place of one.
    Key(KeyId),
    /// For a rewrap: the id of the next key-encryption key, whose 32 bytes follow. It takes the place of the one so far with the first
    /// anchor that names it.
    Kek(KeyId),
    /// For a clone: its grant. The 32 bytes of its key-encryption key follow.
    Clone(VolumeGrant),
}

/// Messages from the tool.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum ToolMessage {
    /// A newer state is durable: keep its anchor, answer when that is durable too.
    Anchor(VolumeAnchor),
    /// Something for the audit log about the volume, one line of text.
    Event(String),
    /// An operation is to be begun: is it permitted? One at a time; its [`Outcome`](Self::Outcome) comes before the next.
    Operation(VolumeRequest),
    /// How the operation that was permitted ended.
    Outcome {
        /// Whether it was done.
        done: bool,
        /// One line of text.
        detail: String,
    },
    /// The volume, or the clone that is being made of it, has this size.
    Size {
        /// Which of them.
        volume: VolumeId,
        /// Its size in bytes.
        bytes: u64,
    },
}

/// Answers of the holder.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum HolderAnswer {
    /// It is kept.
    Kept,
    /// The operation may be done.
    Permitted(Permit),
    /// It is refused, and why.
    Refused(String),
    /// There was no answer that can be read: whether it was done or not is not known, nor why not.
    Unknown(String),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn json_names_are_the_names() {
        for operation in VolumeOperation::ALL {
            assert_eq!(serde_json::to_value(operation).ok(), Some(operation.name().into()));
            assert_eq!(operation.name().parse(), Ok(operation));
        }
    }

    #[test]
    fn parameters_are_bounded() {
        let request = VolumeRequest::plain(VolumeOperation::Clone).with("name", "x".repeat(256));
        assert_eq!(request.check(), Ok(()));
        assert_eq!(request.with("name", "x".repeat(257)).check(), Err(ParameterError));
    }
}
