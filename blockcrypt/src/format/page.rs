//! Pages of the trees: map leaves, bitmaps, and the nodes above both. All are copy-on-write.

use super::{BLOCK, Block, FormatError, MAC, array_at, key_at, put, u32_at, u64_at, zero};
use policy::{KeyId, VolumeId};

/// Entries of a map leaf: 72.
pub(crate) const ENTRIES: usize = (BLOCK - Header::SIZE) / Entry::SIZE;
/// Children of a node: 84.
pub(crate) const CHILDREN: usize = (BLOCK - Header::SIZE) / Child::SIZE;
/// Bits of a bitmap page: 32,256.
pub(crate) const BITS: usize = (BLOCK - Header::SIZE) * 8;

/// What a page belongs to.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub(crate) enum Tree {
    /// Logical blocks to physical ones.
    Map = 1,
    /// Which physical blocks are used.
    Free = 2,
    /// Older key slots: a chain, not a tree.
    Slots = 3,
}

/// The first 64 bytes of each page.
///
/// ```text
/// 0      1       2      4        8       16            24       32            48     64
/// type   level   zero   writer   index   birth epoch   key id   origin UUID   zero
/// 1      1       2      4        8       8             8        16            16
/// ```
///
/// Index counts the pages of a level from the left. The page's MAC stands in its parent: HMAC-SHA256 under the map key of `key
/// id`, over a type byte and the whole page.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Header {
    pub(crate) tree: Tree,
    pub(crate) level: u8,
    pub(crate) writer: u32,
    pub(crate) index: u64,
    pub(crate) birth: u64,
    pub(crate) key: KeyId,
    pub(crate) origin: VolumeId,
}

impl Header {
    pub(crate) const SIZE: usize = 64;

    pub(crate) fn parse(page: &Block) -> Result<Self, FormatError> {
        let tree = match page[0] {
            1 => Tree::Map,
            2 => Tree::Free,
            3 => Tree::Slots,
            _ => return Err(FormatError("a page of no known type")),
        };
        zero(&page[2..4])?;
        zero(&page[48..64])?;
        Ok(Self {
            tree,
            level: page[1],
            writer: u32_at(page, 4),
            index: u64_at(page, 8),
            birth: u64_at(page, 16),
            key: key_at(page, 24),
            origin: VolumeId(array_at(page, 32)),
        })
    }

    pub(crate) fn put(&self, page: &mut Block) {
        page[..Self::SIZE].fill(0);
        page[0] = self.tree as u8;
        page[1] = self.level;
        put(page, 4, &self.writer.to_le_bytes());
        put(page, 8, &self.index.to_le_bytes());
        put(page, 16, &self.birth.to_le_bytes());
        put(page, 24, &self.key.0.to_le_bytes());
        put(page, 32, &self.origin.0);
    }
}

/// An entry of a map leaf, 56 bytes: where a logical block lies.
///
/// ```text
/// 0                8            16       24    56
/// physical block   generation   key id   tag
/// ```
///
/// Physical block 0: unmapped, read as zeroes; the rest of such an entry is zero. [`Entry::LOST`]: a recovery found that
/// what should lie here is gone; an error until the block is written again.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct Entry {
    pub(crate) physical: u64,
    pub(crate) generation: u64,
    pub(crate) key: KeyId,
    pub(crate) tag: [u8; MAC],
}

impl Entry {
    pub(crate) const SIZE: usize = 56;
    /// The physical block of a lost entry.
    pub(crate) const LOST: u64 = u64::MAX;
    pub(crate) const UNMAPPED: Self = Self { physical: 0, generation: 0, key: KeyId(0), tag: [0; MAC] };

    pub(crate) fn parse(bytes: &[u8; Self::SIZE]) -> Self {
        Self {
            physical: u64_at(bytes, 0),
            generation: u64_at(bytes, 8),
            key: key_at(bytes, 16),
            tag: array_at(bytes, 24),
        }
    }

    pub(crate) fn to_bytes(self) -> [u8; Self::SIZE] {
        let mut out = [0; Self::SIZE];
        put(&mut out, 0, &self.physical.to_le_bytes());
        put(&mut out, 8, &self.generation.to_le_bytes());
        put(&mut out, 16, &self.key.0.to_le_bytes());
        put(&mut out, 24, &self.tag);
        out
    }

    /// The block of the store that holds its data, if any does.
    pub(crate) fn data(&self) -> Option<u64> {
        (self.physical != 0 && self.physical != Self::LOST).then_some(self.physical)
    }
}

/// A pointer to a page, 48 bytes. All zero: an empty subtree.
///
/// ```text
/// 0                8             16    48
/// physical block   birth epoch   MAC
/// ```
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct Child {
    pub(crate) physical: u64,
    pub(crate) birth: u64,
    pub(crate) mac: [u8; MAC],
}

impl Child {
    pub(crate) const SIZE: usize = 48;
    pub(crate) const EMPTY: Self = Self { physical: 0, birth: 0, mac: [0; MAC] };

    pub(crate) fn parse(bytes: &[u8; Self::SIZE]) -> Self {
        Self { physical: u64_at(bytes, 0), birth: u64_at(bytes, 8), mac: array_at(bytes, 16) }
    }

    pub(crate) fn to_bytes(self) -> [u8; Self::SIZE] {
        let mut out = [0; Self::SIZE];
        put(&mut out, 0, &self.physical.to_le_bytes());
        put(&mut out, 8, &self.birth.to_le_bytes());
        put(&mut out, 16, &self.mac);
        out
    }

    pub(crate) fn is_empty(&self) -> bool {
        *self == Self::EMPTY
    }
}

/// Entry `i` of a leaf.
pub(crate) fn entry(page: &Block, i: usize) -> Entry {
    Entry::parse(&array_at(page, Header::SIZE + i * Entry::SIZE))
}

/// Sets entry `i` of a leaf.
pub(crate) fn set_entry(page: &mut Block, i: usize, entry: Entry) {
    put(page, Header::SIZE + i * Entry::SIZE, &entry.to_bytes());
}

/// Child `i` of a node.
pub(crate) fn child(page: &Block, i: usize) -> Child {
    Child::parse(&array_at(page, Header::SIZE + i * Child::SIZE))
}

/// Sets child `i` of a node.
pub(crate) fn set_child(page: &mut Block, i: usize, child: Child) {
    put(page, Header::SIZE + i * Child::SIZE, &child.to_bytes());
}

/// Bit `i` of a bitmap page: whether the block is used.
pub(crate) fn bit(page: &Block, i: usize) -> bool {
    page[Header::SIZE + i / 8] & (1 << (i % 8)) != 0
}

/// Sets bit `i` of a bitmap page.
pub(crate) fn set_bit(page: &mut Block, i: usize, used: bool) {
    let byte = &mut page[Header::SIZE + i / 8];
    if used {
        *byte |= 1 << (i % 8);
    } else {
        *byte &= !(1 << (i % 8));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_numbers_of_the_format() {
        assert_eq!((ENTRIES, CHILDREN, BITS), (72, 84, 32_256));
    }

    #[test]
    fn what_is_written_is_read() {
        let mut page = [0; BLOCK];
        let header = Header {
            tree: Tree::Map,
            level: 1,
            writer: 7,
            index: 1 << 40,
            birth: 9,
            key: KeyId(u64::MAX),
            origin: VolumeId([3; 16]),
        };
        header.put(&mut page);
        assert_eq!(Header::parse(&page), Ok(header));
        let entry_in = Entry { physical: 1, generation: 2, key: KeyId(3), tag: [4; 32] };
        set_entry(&mut page, ENTRIES - 1, entry_in);
        assert!(entry(&page, ENTRIES - 1) == entry_in && entry(&page, 0) == Entry::UNMAPPED);
        let child_in = Child { physical: 5, birth: 6, mac: [7; 32] };
        set_child(&mut page, CHILDREN - 1, child_in);
        assert!(child(&page, CHILDREN - 1) == child_in && child(&page, 0).is_empty());
    }

    #[test]
    fn bits_stand_alone() {
        let mut page = [0; BLOCK];
        set_bit(&mut page, BITS - 1, true);
        set_bit(&mut page, 9, true);
        assert!(bit(&page, 9) && bit(&page, BITS - 1) && !bit(&page, 8) && !bit(&page, 10));
        set_bit(&mut page, 9, false);
        assert!(!bit(&page, 9));
    }
}
