//! The hand-over of a volume to `fealty-disk` through an inherited descriptor (`--keys-fd`), a stream socket:
//!
//! ```text
//! holder -> tool   u32 BE length, DiskSession as JSON (at most 4096 bytes), then the 32 raw bytes of the KEK
//! tool -> holder   u32 BE length, ToolMessage as JSON (at most 4096 bytes)
//! holder -> tool   u32 BE length, HolderAnswer as JSON, one for each message
//! ```
//!
//! The key travels behind the JSON so that it is read straight into locked memory.

use crate::anchor::{AnchorMode, VolumeAnchor};
use crate::id::{CustomerId, KeyId, OpenNumber, VolumeId};
use serde::{Deserialize, Serialize};

/// The longest JSON part of a message, in bytes.
pub const MESSAGE_LIMIT: usize = 4096;

/// The cipher suites a volume may have. One so far; the name comes from the provider, never from the disk.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum CipherSuite {
    /// AES-256-XTS (IEEE 1619) for blocks, HMAC-SHA256 (FIPS 198-1) for blocks and metadata.
    #[serde(rename = "aes-256-xts+hmac-sha256")]
    Aes256XtsHmacSha256,
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
}

/// Messages from the tool.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum ToolMessage {
    /// A newer state is durable: keep its anchor, answer when that is durable too.
    Anchor(VolumeAnchor),
    /// Something for the audit log about the volume, one line of text.
    Event(String),
}

/// Answers of the holder.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum HolderAnswer {
    /// It is kept.
    Kept,
    /// It is refused, and why.
    Refused(String),
}
