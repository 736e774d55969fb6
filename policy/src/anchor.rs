//! Volume anchors: what the key provider keeps to tell the newest state of a volume from an older one. To everything but
//! the volume engine an anchor is ordered bytes.

use crate::encoding::Base64Url;
use crate::id::{KeyId, OpenNumber, VolumeId};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// How fresh a volume's anchor is kept at the provider.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum AnchorMode {
    /// Anchored at open and close only.
    Close,
    /// Anchored each second while written; FLUSH waits after 30 s without an answer.
    #[default]
    Interval,
    /// Each FLUSH waits for its anchor.
    Flush,
}

/// An anchor: 120 bytes that name one durable state of one volume. Within a volume, byte order is the order of states.
///
/// ```text
/// offset 0        1      4     20        24     32             40             72         104     112       120
///        version  zero   UUID  writer    epoch  log sequence   log chain MAC  root MAC   key id  KEK id
///        1 byte   3      16    u32 BE    u64   u64 BE          32             32         u64 BE  u64 BE, 0: not said
/// ```
///
/// The KEK is the key-encryption key that opens the key slots of this state: the first anchor that names another one than the one
/// before is what tells the provider that the slots are rewrapped.
#[derive(Clone, PartialEq, Eq)]
pub struct VolumeAnchor([u8; VolumeAnchor::LENGTH]);

/// Bytes that are no anchor.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("a volume anchor is {} bytes of version 1 with a writer", VolumeAnchor::LENGTH)]
pub struct AnchorError;

/// How two anchors of one volume stand to each other.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum AnchorStep {
    /// The same state.
    Same,
    /// A later state.
    Forward,
    /// An earlier state, or another state at the same point.
    Backward,
    /// Another volume.
    Foreign,
}

impl VolumeAnchor {
    /// Its length in bytes.
    pub const LENGTH: usize = 120;

    /// The anchor in `bytes`.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, AnchorError> {
        let bytes: [u8; Self::LENGTH] = bytes.try_into().map_err(|_| AnchorError)?;
        let anchor = Self(bytes);
        let padding = bytes[1..4].iter().all(|b| *b == 0);
        if bytes[0] != 1 || !padding || anchor.writer_raw().is_none() {
            return Err(AnchorError);
        }
        Ok(anchor)
    }

    /// All of it.
    pub fn as_bytes(&self) -> &[u8; Self::LENGTH] {
        &self.0
    }

    /// The volume.
    pub fn volume(&self) -> VolumeId {
        VolumeId(self.field(4))
    }

    /// The open number under which the state was written.
    pub fn writer(&self) -> OpenNumber {
        self.writer_raw().expect("checked when the anchor was made")
    }

    /// The key id under which new blocks of the state are sealed.
    pub fn key_id(&self) -> KeyId {
        KeyId(u64::from_be_bytes(self.field(104)))
    }

    /// The key-encryption key that opens the state's key slots, where the anchor says so.
    pub fn kek_id(&self) -> Option<KeyId> {
        Some(KeyId(u64::from_be_bytes(self.field(112)))).filter(|id| id.0 != 0)
    }

    fn writer_raw(&self) -> Option<OpenNumber> {
        OpenNumber::try_from(u64::from(u32::from_be_bytes(self.field(20)))).ok()
    }

    fn field<const N: usize>(&self, at: usize) -> [u8; N] {
        let mut out = [0; N];
        out.copy_from_slice(&self.0[at..at + N]);
        out
    }

    /// How `next` stands to this one: writer, then epoch, then log sequence decide.
    pub fn step(&self, next: &Self) -> AnchorStep {
        if self.volume() != next.volume() {
            return AnchorStep::Foreign;
        }
        match next.0[20..40].cmp(&self.0[20..40]) {
            std::cmp::Ordering::Greater => AnchorStep::Forward,
            std::cmp::Ordering::Equal if self == next => AnchorStep::Same,
            _ => AnchorStep::Backward,
        }
    }
}

impl std::fmt::Debug for VolumeAnchor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "anchor of {} by writer {}", self.volume(), self.writer())
    }
}

impl Serialize for VolumeAnchor {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.collect_str(&Base64Url::from(&self.0[..]))
    }
}

impl<'de> Deserialize<'de> for VolumeAnchor {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        Self::from_bytes(&Base64Url::deserialize(d)?).map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn anchor(writer: u8, epoch: u8, sequence: u8, mac: u8) -> VolumeAnchor {
        let mut bytes = [0; VolumeAnchor::LENGTH];
        bytes[0] = 1;
        bytes[23] = writer;
        bytes[31] = epoch;
        bytes[39] = sequence;
        bytes[40] = mac;
        VolumeAnchor::from_bytes(&bytes).expect("good")
    }

    #[test]
    fn anchors_go_forward_only() {
        let now = anchor(2, 5, 7, 0);
        assert_eq!(now.step(&anchor(2, 5, 8, 0)), AnchorStep::Forward);
        assert_eq!(now.step(&anchor(2, 6, 0, 0)), AnchorStep::Forward);
        assert_eq!(now.step(&anchor(3, 0, 0, 0)), AnchorStep::Forward);
        assert_eq!(now.step(&now), AnchorStep::Same);
        assert_eq!(now.step(&anchor(2, 5, 7, 1)), AnchorStep::Backward);
        assert_eq!(now.step(&anchor(1, 9, 9, 0)), AnchorStep::Backward);
    }

    #[test]
    fn an_anchor_names_its_keys() {
        let mut bytes = *anchor(1, 0, 0, 0).as_bytes();
        bytes[111] = 7;
        let read = |bytes: &[u8]| VolumeAnchor::from_bytes(bytes).map(|a| (a.key_id(), a.kek_id()));
        assert_eq!(read(&bytes), Ok((KeyId(7), None)));
        bytes[112] = 1;
        assert_eq!(read(&bytes), Ok((KeyId(7), Some(KeyId(1 << 56)))));
    }

    #[test]
    fn what_is_no_anchor_is_refused() {
        let good = *anchor(1, 0, 0, 0).as_bytes();
        assert!(VolumeAnchor::from_bytes(&good[1..]).is_err());
        for at in [0, 1, 23] {
            let mut bad = good;
            bad[at] ^= 1;
            assert!(VolumeAnchor::from_bytes(&bad).is_err(), "{at}");
        }
    }
}
