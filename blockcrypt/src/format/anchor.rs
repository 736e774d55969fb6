//! The 120 bytes of an anchor, which [`policy::VolumeAnchor`] draws: built and read here alone.

use super::{MAC, array_at, put};
use policy::{KeyId, OpenNumber, VolumeAnchor, VolumeId};

/// What an anchor says.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct AnchorFields {
    pub(crate) volume: VolumeId,
    pub(crate) writer: OpenNumber,
    /// The superblock's epoch.
    pub(crate) epoch: u64,
    /// Sequence number that follows the last durable log block.
    pub(crate) sequence: u64,
    /// MAC of that last block: of the block before `sequence` in the chain, or the seed.
    pub(crate) chain: [u8; MAC],
    /// MAC of the superblock, which vouches for all roots.
    pub(crate) root: [u8; MAC],
    /// The current key id.
    pub(crate) key: KeyId,
    /// The key-encryption key that opens the slots.
    pub(crate) kek: KeyId,
}

impl AnchorFields {
    pub(crate) fn read(anchor: &VolumeAnchor) -> Self {
        let bytes = anchor.as_bytes();
        Self {
            volume: anchor.volume(),
            writer: anchor.writer(),
            epoch: u64::from_be_bytes(array_at(bytes, 24)),
            sequence: u64::from_be_bytes(array_at(bytes, 32)),
            chain: array_at(bytes, 40),
            root: array_at(bytes, 72),
            key: anchor.key_id(),
            kek: KeyId(u64::from_be_bytes(array_at(bytes, 112))),
        }
    }

    pub(crate) fn build(&self) -> VolumeAnchor {
        let mut bytes = [0; VolumeAnchor::LENGTH];
        bytes[0] = 1;
        put(&mut bytes, 4, &self.volume.0);
        put(&mut bytes, 20, &self.writer.get().to_be_bytes());
        put(&mut bytes, 24, &self.epoch.to_be_bytes());
        put(&mut bytes, 32, &self.sequence.to_be_bytes());
        put(&mut bytes, 40, &self.chain);
        put(&mut bytes, 72, &self.root);
        put(&mut bytes, 104, &self.key.0.to_be_bytes());
        put(&mut bytes, 112, &self.kek.0.to_be_bytes());
        VolumeAnchor::from_bytes(&bytes).expect("version 1, zero padding, and a writer by its type")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_anchor_says_what_was_put_in() {
        let fields = AnchorFields {
            volume: VolumeId([1; 16]),
            writer: OpenNumber::try_from(70_000).expect("a number"),
            epoch: 1 << 40,
            sequence: 3,
            chain: [4; 32],
            root: [5; 32],
            key: KeyId(6 << 32),
            kek: KeyId(7 << 32),
        };
        assert!(AnchorFields::read(&fields.build()) == fields);
    }
}
