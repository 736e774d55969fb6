//! Key slots: each wraps one volume master. The current one stands in the superblock, older ones in a chain of pages.

use super::page::Child;
use super::{BLOCK, Block, FormatError, array_at, key_at, put, u16_at, u32_at, u64_at, zero, zero_block};
use policy::{KeyId, VolumeId};

/// A key slot, 128 bytes.
///
/// ```text
/// 0         8        16            32      44               76     92               100    128
/// key id    KEK id   origin UUID   nonce   wrapped master   tag    blocks written   zero
/// 8         8        16            12      32               16     8                28
/// ```
///
/// The master is 32 random bytes, wrapped with AES-256-GCM under the key-encryption key; [`Slot::aad`] is the additional data. A
/// key id names {origin UUID, master}; the origin is the volume itself. "Blocks written" counts 4096-byte blocks sealed under this key,
/// rounded up after a crash; at 2^28 (2^36 AES blocks) it takes no more.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct Slot {
    pub(crate) key: KeyId,
    pub(crate) kek: KeyId,
    pub(crate) origin: VolumeId,
    pub(crate) nonce: [u8; 12],
    pub(crate) wrapped: [u8; 32],
    pub(crate) tag: [u8; 16],
    pub(crate) written: u64,
}

impl Slot {
    pub(crate) const SIZE: usize = 128;
    /// Blocks that one key seals at most: 2^36 AES blocks of 16 bytes.
    pub(crate) const LIMIT: u64 = 1 << 28;
    /// Blocks after which its end is near: a rotation goes on under another key, and leaves the rest to the guest.
    pub(crate) const NEARLY: u64 = Self::LIMIT / 8 * 7;

    pub(crate) fn parse(bytes: &[u8; Self::SIZE]) -> Result<Self, FormatError> {
        zero(&bytes[100..])?;
        Ok(Self {
            key: key_at(bytes, 0),
            kek: key_at(bytes, 8),
            origin: VolumeId(array_at(bytes, 16)),
            nonce: array_at(bytes, 32),
            wrapped: array_at(bytes, 44),
            tag: array_at(bytes, 76),
            written: u64_at(bytes, 92),
        })
    }

    pub(crate) fn to_bytes(&self) -> [u8; Self::SIZE] {
        let mut out = [0; Self::SIZE];
        put(&mut out, 0, &self.key.0.to_le_bytes());
        put(&mut out, 8, &self.kek.0.to_le_bytes());
        put(&mut out, 16, &self.origin.0);
        put(&mut out, 32, &self.nonce);
        put(&mut out, 44, &self.wrapped);
        put(&mut out, 76, &self.tag);
        put(&mut out, 92, &self.written.to_le_bytes());
        out
    }

    /// What the wrapping binds beside the master, at fixed places: format version, origin UUID, key id, KEK id, cipher suite,
    /// customer (its length, then its name).
    pub(crate) fn aad(&self, suite: &[u8; 8], customer: &str) -> [u8; 108] {
        let mut out = [0; 108];
        put(&mut out, 0, &super::VERSION.to_le_bytes());
        put(&mut out, 4, &self.origin.0);
        put(&mut out, 20, &self.key.0.to_le_bytes());
        put(&mut out, 28, &self.kek.0.to_le_bytes());
        put(&mut out, 36, suite);
        let name = customer.as_bytes();
        let length = name.len().min(63);
        out[44] = length as u8;
        put(&mut out, 45, &name[..length]);
        out
    }
}

/// The most pages that a list of slots has.
pub(crate) const MAX_PAGES: usize = 32;

/// A page of older key slots.
///
/// ```text
/// 0                64                          112            128
/// page header      next page (child, 48)       count (u16)    slots, 128 bytes each
/// ```
pub(crate) struct SlotPage {
    pub(crate) next: Child,
    pub(crate) slots: Vec<Slot>,
}

impl SlotPage {
    /// Slots in one page.
    pub(crate) const CAPACITY: usize = (BLOCK - 128) / Slot::SIZE;

    /// The page behind a header that the caller has checked.
    pub(crate) fn parse(block: &Block) -> Result<Self, FormatError> {
        let next = Child::parse(&array_at(block, 64));
        let count = usize::from(u16_at(block, 112));
        if count == 0 || count > Self::CAPACITY || u32_at(block, 114) != 0 {
            return Err(FormatError("a page of key slots has an impossible count"));
        }
        zero(&block[118..128])?;
        zero(&block[128 + count * Slot::SIZE..])?;
        let (slots, _) = block[128..128 + count * Slot::SIZE].as_chunks::<{ Slot::SIZE }>();
        Ok(Self { next, slots: slots.iter().map(Slot::parse).collect::<Result<_, _>>()? })
    }

    /// The page without its header.
    pub(crate) fn to_block(&self) -> Box<Block> {
        let mut out = zero_block();
        put(&mut out[..], 64, &self.next.to_bytes());
        put(&mut out[..], 112, &(self.slots.len() as u16).to_le_bytes());
        for (i, slot) in self.slots.iter().take(Self::CAPACITY).enumerate() {
            put(&mut out[..], 128 + i * Slot::SIZE, &slot.to_bytes());
        }
        out
    }
}
