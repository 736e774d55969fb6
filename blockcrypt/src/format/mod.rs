//! The volume on disk: what lies where, byte for byte. Integers are little-endian; a block is 4096 bytes; all that is not
//! named is zero, and a reader refuses a page in which it is not.
//!
//! ```text
//! block 0            superblock, slot A        ┐ epochs alternate between the slots; each slot has
//! block 1            superblock, slot B        ┘ a second copy at the other end
//! block 2            log ring                    `log_blocks` blocks
//! block 2+log        pool                        data, map pages, free-space pages, slot pages, anywhere
//! block total-2      superblock, slot A, second copy
//! block total-1      superblock, slot B, second copy
//!
//!                     ┌────────────┐ map root   ┌──────┐   ┌──────┐ entry ┌──────────┐
//!                     │ superblock ├───────────►│ node ├──►│ leaf ├──────►│ data     │ ciphertext, tag in the entry
//!   KEK ─► key slots ─┤            │            └──────┘   └──────┘       └──────────┘
//!                     │            │ free root  ┌──────┐   ┌────────┐
//!                     │            ├───────────►│ node ├──►│ bitmap │ one bit for each block of the store
//!                     │            │            └──────┘   └────────┘
//!                     │            │ slots      ┌──────┐   ┌──────┐
//!                     │            ├───────────►│ keys ├──►│ keys │ older key slots, chained
//!                     │            │            └──────┘   └──────┘
//!                     │            │ snapshots  ┌──────┐   ┌──────┐
//!                     │            ├───────────►│ list ├──►│ list │ retained map roots, chained
//!                     │            │            └──────┘   └──────┘
//!                     │            │ log cut    ┌─────┬─────┬─────┐
//!                     └────────────┴───────────►│ log │ log │ log │ records since this superblock, chained by MAC
//!                                               └─────┴─────┴─────┘
//! ```
//!
//! Every arrow carries a MAC of what it points to, so that the superblock vouches for all of it, and the anchor at the key
//! provider for the superblock and the log's head. Ciphertext alone is secret: metadata shows which blocks are mapped, when
//! each was written, and how often.
//!
//! # What a crash, and what a hostile store, can do
//!
//! - **A crash over an honest store** loses no acknowledged FLUSH. Writes after it are each there whole or not at all.
//! - **A hostile store** can withhold (an error), and can serve a state that is not older than the anchor; nothing else. A
//!   flipped bit, a block moved, swapped or taken from another volume, another time or another key fails a MAC: the request
//!   gets an error and the audit log an event. An older superblock or a shorter log than the anchor names does not open.
//! - **A hostile store and a crash together** (or a store that makes the process crash) can, in anchor modes `close` and
//!   `interval`, drop any subset of the writes since the anchored log head that are not mandatory (those up to the last
//!   commit marker but one, as far as the store shows the log). In mode `flush` it can drop no acknowledged write.
//! - **What the store always sees**: sizes and times of requests, the map, the log, how many keys there were.

pub(crate) mod anchor;
pub(crate) mod geometry;
pub(crate) mod log;
pub(crate) mod page;
pub(crate) mod slot;
pub(crate) mod snapshot;
pub(crate) mod superblock;

use policy::KeyId;

/// Bytes in a block.
pub const BLOCK: usize = 4096;
/// The version of the format that this code writes, and the only one it reads.
pub const VERSION: u32 = 1;
/// Bytes of a MAC or tag.
pub(crate) const MAC: usize = 32;

/// A block's bytes.
pub(crate) type Block = [u8; BLOCK];

/// Bytes that are not what they should be. The text names the field.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct FormatError(pub(crate) &'static str);

pub(crate) fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes(array_at(bytes, at))
}

pub(crate) fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(array_at(bytes, at))
}

pub(crate) fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(array_at(bytes, at))
}

pub(crate) fn key_at(bytes: &[u8], at: usize) -> KeyId {
    KeyId(u64_at(bytes, at))
}

/// `N` bytes at `at`, which the caller knows to lie within.
pub(crate) fn array_at<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    let mut out = [0; N];
    out.copy_from_slice(&bytes[at..at + N]);
    out
}

pub(crate) fn put(bytes: &mut [u8], at: usize, field: &[u8]) {
    bytes[at..at + field.len()].copy_from_slice(field);
}

pub(crate) fn zero(bytes: &[u8]) -> Result<(), FormatError> {
    if bytes.iter().all(|b| *b == 0) { Ok(()) } else { Err(FormatError("reserved bytes are not zero")) }
}

pub(crate) fn zero_block() -> Box<Block> {
    Box::new([0; BLOCK])
}
