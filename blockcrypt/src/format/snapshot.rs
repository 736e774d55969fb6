//! Snapshots: retained roots of the map, in a chain of pages.

use super::geometry::MAX_SIZE;
use super::page::{Child, Header};
use super::{BLOCK, Block, FormatError, array_at, put, u16_at, u32_at, u64_at, zero, zero_block};

/// A snapshot, 192 bytes.
///
/// ```text
/// 0    id      time    epoch   generation   size, bytes   mapped blocks
///      8       8       8       8            8             8
/// 48   map root, child of 48 bytes
/// 96   map levels   state   name's length   zero   position   name, UTF-8   zero
///      1            1       1               5      8          64            16
/// ```
///
/// It reaches what was born before it: data whose generation is below `generation`, and pages whose epoch is not above
/// `epoch`. Ids rise and are not used again; time is in Unix seconds. State 0: kept.
/// State 1: it is being deleted, and what only it reaches among the blocks below `position` is free already.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct Snapshot {
    pub(crate) id: u64,
    pub(crate) time: u64,
    pub(crate) epoch: u64,
    pub(crate) generation: u64,
    pub(crate) size: u64,
    pub(crate) mapped: u64,
    pub(crate) root: Child,
    pub(crate) levels: u8,
    /// Being deleted, up to this block.
    pub(crate) dying: Option<u64>,
    pub(crate) name: String,
}

impl Snapshot {
    pub(crate) const SIZE: usize = 192;
    /// Bytes of a name at most.
    pub(crate) const NAME: usize = 64;

    pub(crate) fn parse(bytes: &[u8; Self::SIZE]) -> Result<Self, FormatError> {
        let (state, length) = (bytes[97], usize::from(bytes[98]));
        zero(&bytes[99..104])?;
        zero(&bytes[176..])?;
        let position = u64_at(bytes, 104);
        let dying = match (state, position) {
            (0, 0) => None,
            (1, position) => Some(position),
            _ => return Err(FormatError("a snapshot has an impossible state")),
        };
        let name = bytes[112..176].get(..length).filter(|name| is_name(name));
        let name = name.and_then(|name| std::str::from_utf8(name).ok());
        zero(&bytes[(112 + length).min(176)..176])?;
        let (size, levels) = (u64_at(bytes, 32), bytes[96]);
        if size > MAX_SIZE || !(1..=8).contains(&levels) {
            return Err(FormatError("a snapshot has an impossible size"));
        }
        Ok(Self {
            id: u64_at(bytes, 0),
            time: u64_at(bytes, 8),
            epoch: u64_at(bytes, 16),
            generation: u64_at(bytes, 24),
            size,
            mapped: u64_at(bytes, 40),
            root: Child::parse(&array_at(bytes, 48)),
            levels,
            dying,
            name: name.ok_or(FormatError("a snapshot has an impossible name"))?.to_owned(),
        })
    }

    pub(crate) fn to_bytes(&self) -> [u8; Self::SIZE] {
        let mut out = [0; Self::SIZE];
        let numbers = [self.id, self.time, self.epoch, self.generation, self.size, self.mapped];
        for (i, number) in numbers.into_iter().enumerate() {
            put(&mut out, i * 8, &number.to_le_bytes());
        }
        put(&mut out, 48, &self.root.to_bytes());
        let name = &self.name.as_bytes()[..self.name.len().min(Self::NAME)];
        (out[96], out[97], out[98]) = (self.levels, u8::from(self.dying.is_some()), name.len() as u8);
        put(&mut out, 104, &self.dying.unwrap_or(0).to_le_bytes());
        put(&mut out, 112, name);
        out
    }
}

/// Whether these bytes may be a snapshot's name: 1 to 64 bytes without control characters.
pub(crate) fn is_name(name: &[u8]) -> bool {
    (1..=Snapshot::NAME).contains(&name.len()) && name.iter().all(|b| *b >= 0x20 && *b != 0x7f)
}

/// The most pages that a list of snapshots has.
pub(crate) const MAX_PAGES: usize = 32;

/// A page of snapshots.
///
/// ```text
/// 0                64                          112            128
/// page header      next page (child, 48)       count (u16)    snapshots, 192 bytes each
/// ```
pub(crate) struct SnapshotPage {
    pub(crate) next: Child,
    pub(crate) snapshots: Vec<Snapshot>,
}

impl SnapshotPage {
    /// Snapshots in one page: 20.
    pub(crate) const CAPACITY: usize = (BLOCK - 128) / Snapshot::SIZE;

    /// The page behind a header that the caller has checked.
    pub(crate) fn parse(block: &Block) -> Result<Self, FormatError> {
        let next = Child::parse(&array_at(block, Header::SIZE));
        let count = usize::from(u16_at(block, 112));
        if count == 0 || count > Self::CAPACITY || u32_at(block, 114) != 0 {
            return Err(FormatError("a page of snapshots has an impossible count"));
        }
        zero(&block[118..128])?;
        zero(&block[128 + count * Snapshot::SIZE..])?;
        let (snapshots, _) = block[128..128 + count * Snapshot::SIZE].as_chunks::<{ Snapshot::SIZE }>();
        Ok(Self { next, snapshots: snapshots.iter().map(Snapshot::parse).collect::<Result<_, _>>()? })
    }

    /// The page without its header.
    pub(crate) fn to_block(&self) -> Box<Block> {
        let mut out = zero_block();
        put(&mut out[..], Header::SIZE, &self.next.to_bytes());
        put(&mut out[..], 112, &(self.snapshots.len() as u16).to_le_bytes());
        for (i, snapshot) in self.snapshots.iter().take(Self::CAPACITY).enumerate() {
            put(&mut out[..], 128 + i * Snapshot::SIZE, &snapshot.to_bytes());
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn snapshot() -> Snapshot {
        Snapshot {
            id: 1,
            time: 2,
            epoch: 3,
            generation: 4 << 40,
            size: 4096,
            mapped: 1,
            root: Child { physical: 7, birth: 8, mac: [9; 32] },
            levels: 2,
            dying: None,
            name: "before the upgrade".to_owned(),
        }
    }

    #[test]
    fn what_is_written_is_read() {
        let long = Snapshot { dying: Some(0), name: "n".repeat(64), ..snapshot() };
        let page = SnapshotPage { next: snapshot().root, snapshots: vec![snapshot(), long] };
        let read = SnapshotPage::parse(&page.to_block()).expect("good");
        assert!(read.snapshots == page.snapshots && read.next == page.next);
        assert_eq!(SnapshotPage::CAPACITY, 20);
    }

    #[test]
    fn what_is_no_snapshot_is_refused() {
        let good = snapshot().to_bytes();
        for (at, value) in
            [(96, 0), (96, 9), (97, 2), (98, 0), (98, 65), (98, 17), (99, 1), (104, 1), (112, 7), (191, 1)]
        {
            let mut bad = good;
            bad[at] = value;
            assert!(Snapshot::parse(&bad).is_err(), "{at}");
        }
    }
}
