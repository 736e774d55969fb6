//! The superblock: where everything begins.

use super::anchor::AnchorFields;
use super::geometry::Geometry;
use super::page::{CHILDREN, Child, ENTRIES};
use super::slot::Slot;
use super::{BLOCK, Block, FormatError, MAC, VERSION, array_at, key_at, put, u16_at, u32_at, u64_at, zero, zero_block};
use crate::keys::same;
use policy::disk::{CipherSuite, VolumeGrant};
use policy::{KeyId, OpenNumber, VolumeId};

const MAGIC: &[u8; 16] = b"fealty volume\r\n\x1a";
/// Where the MAC stands.
pub(crate) const MAC_AT: usize = BLOCK - MAC;
const CLEAN: u32 = 1;
const SLOT_AT: usize = 384;
const ROTATION_AT: usize = SLOT_AT + Slot::SIZE;

/// A superblock, one block.
///
/// ```text
/// 0     magic, 16 bytes: "fealty volume" CR LF SUB
/// 16    format version, u32
/// 20    features that a reader must know, u32: none so far
/// 24    block size, u32: 4096             28   logical sector size, u32: 512
/// 32    UUID, 16 bytes
/// 48    cipher, u16: 1 is AES-256-XTS     50   MAC, u16: 1 is HMAC-SHA256     52   tag length, u16: 32     54   zero
/// 56    size in bytes, u64                64   blocks of the store, u64
/// 72    log start, block, u64             80   log length, blocks, u64
/// 88    map levels, u8: enough, or more   89   free-space levels, u8
/// 90    entries of a leaf, u16: 72        92   children of a node, u16: 84    94   zero
/// 96    epoch, u64                        104  writer (open number), u32      108  flags, u32: 1 is "closed"
/// 112   map root, child of 48 bytes       160  free-space root, child of 48 bytes
/// 208   log cut: offset in the ring, u64; sequence, u64; MAC of the block before, 32 bytes (zero: the seed)
/// 256   blocks that hold data, u64        264  current key id, u64
/// 272   first page of older key slots, child of 48 bytes
/// 320   first page of snapshots, child of 48 bytes
/// 368   blocks of the pool in use, u64
/// 376   number of snapshots ever taken, u64
/// 384   the current key's slot, 128 bytes
/// 512   rotation: key id under which it began, u64 (0: none so far)   520   1 if it came to its end, u32   524   zero
/// 4064  MAC, under the superblock key of the current key id, over a type byte and bytes 0 to 4064
/// ```
///
/// Epochs rise with each superblock written. The highest epoch that verifies and that the anchor allows is the volume.
#[derive(Clone)]
pub(crate) struct Superblock {
    pub(crate) uuid: VolumeId,
    pub(crate) geometry: Geometry,
    pub(crate) epoch: u64,
    pub(crate) writer: OpenNumber,
    /// Closed in order: no record follows the cut.
    pub(crate) clean: bool,
    pub(crate) map: Child,
    pub(crate) free: Child,
    pub(crate) cut: Cut,
    /// Blocks that hold data.
    pub(crate) mapped: u64,
    /// First page of older key slots.
    pub(crate) older: Child,
    /// First page of snapshots.
    pub(crate) snapshots: Child,
    /// Blocks of the pool in use.
    pub(crate) used: u64,
    /// Snapshots ever taken.
    pub(crate) taken: u64,
    /// The current key's slot; its key id is the current key id.
    pub(crate) slot: Slot,
    pub(crate) rotation: Rotation,
    pub(crate) mac: [u8; MAC],
}

/// The newest rotation. It may take several keys, one after the other: what is under any of them is done.
#[derive(Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Rotation {
    /// The first of them.
    pub(crate) first: Option<KeyId>,
    /// All that can be is under one of them.
    pub(crate) ended: bool,
}

/// Where replay starts.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct Cut {
    /// Block within the ring.
    pub(crate) offset: u64,
    /// Sequence number of the first block to replay.
    pub(crate) sequence: u64,
    /// MAC of the block before it; zero where the chain begins here, with the seed.
    pub(crate) chain: [u8; MAC],
}

impl Superblock {
    /// The superblock in `block`, its MAC not verified.
    pub(crate) fn parse(block: &Block) -> Result<Self, FormatError> {
        check_constants(block)?;
        let geometry = Geometry {
            size: u64_at(block, 56),
            total: u64_at(block, 64),
            log_blocks: u64_at(block, 80),
            map_levels: block[88],
            free_levels: block[89],
        }
        .check()?;
        let flags = u32_at(block, 108);
        let cut = Cut { offset: u64_at(block, 208), sequence: u64_at(block, 216), chain: array_at(block, 224) };
        let slot = Slot::parse(&array_at(block, SLOT_AT))?;
        let first = Some(key_at(block, ROTATION_AT)).filter(|key| key.0 != 0);
        let rotation = Rotation { first, ended: u32_at(block, ROTATION_AT + 8) == 1 };
        if u32_at(block, ROTATION_AT + 8) > 1 || (rotation.ended && first.is_none()) {
            return Err(FormatError("its rotation is impossible"));
        }
        let writer =
            OpenNumber::try_from(u64::from(u32_at(block, 104))).map_err(|_| FormatError("its writer is no number"))?;
        if u64_at(block, 72) != geometry.log_start() || cut.offset >= geometry.log_blocks {
            return Err(FormatError("its log lies outside"));
        }
        if flags & !CLEAN != 0 || key_at(block, 264) != slot.key {
            return Err(FormatError("its flags or key id are impossible"));
        }
        Ok(Self {
            uuid: VolumeId(array_at(block, 32)),
            geometry,
            epoch: u64_at(block, 96),
            writer,
            clean: flags & CLEAN != 0,
            map: Child::parse(&array_at(block, 112)),
            free: Child::parse(&array_at(block, 160)),
            cut,
            mapped: u64_at(block, 256),
            older: Child::parse(&array_at(block, 272)),
            snapshots: Child::parse(&array_at(block, 320)),
            used: u64_at(block, 368),
            taken: u64_at(block, 376),
            slot,
            rotation,
            mac: array_at(block, MAC_AT),
        })
    }

    /// A new volume's, before anything is in it.
    pub(crate) fn first(grant: &VolumeGrant, geometry: Geometry, slot: Slot) -> Self {
        Self {
            uuid: grant.volume,
            geometry,
            epoch: 0,
            writer: grant.open_number,
            clean: false,
            map: Child::EMPTY,
            free: Child::EMPTY,
            cut: Cut { offset: 0, sequence: 0, chain: [0; MAC] },
            mapped: 0,
            older: Child::EMPTY,
            snapshots: Child::EMPTY,
            used: 0,
            taken: 0,
            slot,
            rotation: Rotation::default(),
            mac: [0; MAC],
        }
    }

    /// The block; the MAC's place is zero, to be filled by whoever holds the key.
    pub(crate) fn to_block(&self) -> Box<Block> {
        let mut out = zero_block();
        let b = &mut out[..];
        put(b, 0, MAGIC);
        put(b, 16, &VERSION.to_le_bytes());
        put(b, 24, &(BLOCK as u32).to_le_bytes());
        put(b, 28, &512u32.to_le_bytes());
        put(b, 32, &self.uuid.0);
        put(b, 48, &suite_bytes(CipherSuite::Aes256XtsHmacSha256));
        put(b, 56, &self.geometry.size.to_le_bytes());
        put(b, 64, &self.geometry.total.to_le_bytes());
        put(b, 72, &self.geometry.log_start().to_le_bytes());
        put(b, 80, &self.geometry.log_blocks.to_le_bytes());
        b[88] = self.geometry.map_levels;
        b[89] = self.geometry.free_levels;
        put(b, 90, &(ENTRIES as u16).to_le_bytes());
        put(b, 92, &(CHILDREN as u16).to_le_bytes());
        put(b, 96, &self.epoch.to_le_bytes());
        put(b, 104, &self.writer.get().to_le_bytes());
        put(b, 108, &if self.clean { CLEAN } else { 0 }.to_le_bytes());
        put(b, 112, &self.map.to_bytes());
        put(b, 160, &self.free.to_bytes());
        put(b, 208, &self.cut.offset.to_le_bytes());
        put(b, 216, &self.cut.sequence.to_le_bytes());
        put(b, 224, &self.cut.chain);
        put(b, 256, &self.mapped.to_le_bytes());
        put(b, 264, &self.slot.key.0.to_le_bytes());
        put(b, 272, &self.older.to_bytes());
        put(b, 320, &self.snapshots.to_bytes());
        put(b, 368, &self.used.to_le_bytes());
        put(b, 376, &self.taken.to_le_bytes());
        put(b, SLOT_AT, &self.slot.to_bytes());
        put(b, ROTATION_AT, &self.rotation.first.map_or(0, |key| key.0).to_le_bytes());
        put(b, ROTATION_AT + 8, &u32::from(self.rotation.ended).to_le_bytes());
        out
    }

    /// The key id under which it is authenticated and new blocks are sealed.
    pub(crate) fn key(&self) -> KeyId {
        self.slot.key
    }

    /// Whether the anchor names this very superblock.
    pub(crate) fn is_named_by(&self, anchor: &AnchorFields) -> bool {
        self.epoch == anchor.epoch && same(&self.mac, &anchor.root)
    }
}

/// A cipher suite as it stands at byte 48: cipher, MAC, tag length, zero.
pub(crate) fn suite_bytes(suite: CipherSuite) -> [u8; 8] {
    match suite {
        CipherSuite::Aes256XtsHmacSha256 => [1, 0, 1, 0, 32, 0, 0, 0],
    }
}

/// Whether `block` claims to be a superblock at all.
pub(crate) fn has_magic(block: &Block) -> bool {
    block.starts_with(MAGIC)
}

/// A superblock's length of the store in blocks, before anything else is known of it.
pub(crate) fn claimed_total(block: &Block) -> u64 {
    u64_at(block, 64)
}

/// A superblock's format version, before anything else is known of it.
pub(crate) fn claimed_version(block: &Block) -> u32 {
    u32_at(block, 16)
}

fn check_constants(block: &Block) -> Result<(), FormatError> {
    if !has_magic(block) {
        return Err(FormatError("no superblock"));
    }
    if claimed_version(block) != VERSION {
        return Err(FormatError("another format version"));
    }
    if u32_at(block, 20) != 0 {
        return Err(FormatError("unknown features"));
    }
    if u32_at(block, 24) != BLOCK as u32 || u32_at(block, 28) != 512 {
        return Err(FormatError("another block size"));
    }
    if block[48..56] != suite_bytes(CipherSuite::Aes256XtsHmacSha256) {
        return Err(FormatError("another cipher suite"));
    }
    if u16_at(block, 90) != ENTRIES as u16 || u16_at(block, 92) != CHILDREN as u16 || u16_at(block, 94) != 0 {
        return Err(FormatError("another page geometry"));
    }
    zero(&block[ROTATION_AT + 12..MAC_AT])
}
