//! Targets for fuzzing: every parser of bytes that a store supplies. None may panic, loop or allocate without bound, whatever the
//! bytes; what parses must come back from its own bytes.

use crate::format::log::LogBlock;
use crate::format::page::{CHILDREN, Child, ENTRIES, Entry, Header, child, entry};
use crate::format::slot::SlotPage;
use crate::format::snapshot::SnapshotPage;
use crate::format::superblock::Superblock;
use crate::format::{BLOCK, Block};
use crate::{MemoryStore, inspect};

fn block(data: &[u8]) -> Block {
    let mut out = [0; BLOCK];
    let length = data.len().min(BLOCK);
    out[..length].copy_from_slice(&data[..length]);
    out
}

/// A superblock.
pub fn fuzz_superblock(data: &[u8]) {
    let bytes = block(data);
    if let Ok(parsed) = Superblock::parse(&bytes) {
        let mut again = parsed.to_block();
        again[crate::format::superblock::MAC_AT..].copy_from_slice(&parsed.mac);
        assert!(*again == bytes);
    }
}

/// A page of a tree, of key slots, or of snapshots.
pub fn fuzz_page(data: &[u8]) {
    let bytes = block(data);
    if let Ok(header) = Header::parse(&bytes) {
        let mut again = bytes;
        header.put(&mut again);
        assert!(again == bytes);
    }
    for i in 0..ENTRIES {
        assert!(Entry::parse(&entry(&bytes, i).to_bytes()) == entry(&bytes, i));
    }
    for i in 0..CHILDREN {
        assert!(Child::parse(&child(&bytes, i).to_bytes()) == child(&bytes, i));
    }
    if let Ok(page) = SnapshotPage::parse(&bytes) {
        assert!(page.to_block()[Header::SIZE..] == bytes[Header::SIZE..]);
    }
    if let Ok(page) = SlotPage::parse(&bytes) {
        assert!(page.to_block()[Header::SIZE..] == bytes[Header::SIZE..]);
    }
}

/// A block of the log.
pub fn fuzz_log_block(data: &[u8]) {
    let bytes = block(data);
    if let Ok(parsed) = LogBlock::parse(&bytes) {
        let mut again = LogBlock::to_block(parsed.commit, parsed.writer, parsed.sequence, parsed.key, &parsed.records);
        again[crate::format::log::MAC_AT..crate::format::log::HEADER].copy_from_slice(&parsed.mac);
        assert!(*again == bytes);
    }
}

/// A whole store, as somebody without its key sees it.
pub fn fuzz_inspect(data: &[u8]) {
    let _ = inspect(&MemoryStore::of(data.to_vec()));
}
