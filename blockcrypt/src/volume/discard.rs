//! TRIM and write-zeroes: blocks that read as zeroes and take no room.

use super::Core;
use super::reserve::Wants;
use super::shared::Shared;
use crate::VolumeError;
use crate::format::page::{BITS, ENTRIES, Entry, Tree};
use crate::format::{BLOCK, zero_block};
use crate::space::bitmap;
use crate::tree::Halt;
use std::ops::Range;

/// Blocks unmapped under one lock.
const CHUNK: u64 = 64;
/// These lie in two leaves at most, for a leaf has more entries.
const WANTS: Wants = Wants { data: 0, leaves: 2 };
/// The longest stretch given back to the store with one call, in blocks: 64 MiB.
const STRETCH: u64 = 1 << 14;

impl Shared {
    pub(super) fn discard(&self, offset: u64, length: u64) -> Result<(), VolumeError> {
        self.check_writable(offset, length)?;
        self.unmap(self.whole_blocks(offset, length), true)
    }

    pub(super) fn write_zeroes(&self, offset: u64, length: u64, may_unmap: bool) -> Result<(), VolumeError> {
        self.check_writable(offset, length)?;
        let block = BLOCK as u64;
        let end = offset + length;
        let whole = self.whole_blocks(offset, length);
        if whole.is_empty() {
            // Within one block, or over the border of two.
            let border = (offset / block + 1) * block;
            self.zero_part(offset, border.min(end) - offset)?;
            return self.zero_part(border, end.saturating_sub(border));
        }
        self.zero_part(offset, whole.start * block - offset)?;
        self.unmap(whole.clone(), may_unmap)?;
        self.zero_part(whole.end * block, end.saturating_sub(whole.end * block))
    }

    /// The blocks that lie wholly within a request. A last block that the volume's end cuts short is whole.
    fn whole_blocks(&self, offset: u64, length: u64) -> Range<u64> {
        let (block, end) = (BLOCK as u64, offset + length);
        let last = if end == self.backing.geometry().size { end.div_ceil(block) } else { end / block };
        offset.div_ceil(block)..last
    }

    /// Zeroes less than a block.
    fn zero_part(&self, offset: u64, length: u64) -> Result<(), VolumeError> {
        if length == 0 {
            return Ok(());
        }
        let mut found = [Entry::UNMAPPED];
        self.with_core(|core| core.lookup(offset / BLOCK as u64, &mut found))?;
        if found[0].physical == 0 {
            return Ok(());
        }
        self.write(offset, &zero_block()[..length as usize])
    }

    fn unmap(&self, blocks: Range<u64>, punch: bool) -> Result<(), VolumeError> {
        let mut at = blocks.start;
        while at < blocks.end {
            let next = self.with_core(|core| core.forest.next_leaf(Tree::Map, at / ENTRIES as u64))?;
            at = match next {
                Some(index) => at.max(index * ENTRIES as u64),
                None => break,
            };
            if at >= blocks.end {
                break;
            }
            let end = blocks.end.min(at + CHUNK);
            self.make_room()?;
            let _among_others = self.among_others()?;
            let _locked = self.lock_blocks(std::iter::once(at..end));
            self.unmap_chunk(at..end, punch)?;
            self.relieve()?;
            at = end;
        }
        self.hand_over()
    }

    /// As [`Core::unmap`], once there is room for it; what holds nothing needs none. The caller has locked the blocks.
    pub(super) fn unmap_chunk(&self, blocks: Range<u64>, punch: bool) -> Result<(), VolumeError> {
        if self.with_core(|core| core.holds_nothing(&blocks))? {
            return Ok(());
        }
        self.with_room(WANTS, |core| core.unmap(blocks.clone(), punch))
    }

    /// Gives the room of freed blocks back to the store. A store that can't is asked again next time something is freed; nothing
    /// depends on it.
    pub(super) fn punch_freed(&self) -> Result<(), VolumeError> {
        let mut blocks = self.core()?.space.take_to_punch();
        if blocks.is_empty() {
            return Ok(());
        }
        blocks.sort_unstable();
        let mut rest = &blocks[..];
        while let Some(first) = rest.first() {
            let run = rest.iter().zip(*first..*first + STRETCH).take_while(|(block, next)| **block == *next).count();
            if let Err(error) = self.backing.store.punch(first * BLOCK as u64, run as u64 * BLOCK as u64) {
                self.backing.events.note(&format!("the store keeps the room of discarded blocks: {error}"));
                break;
            }
            rest = &rest[run..];
        }
        self.core()?.space.punched(&blocks);
        Ok(())
    }
}

impl Core {
    fn holds_nothing(&mut self, blocks: &Range<u64>) -> Result<bool, Halt> {
        let mut found = [Entry::UNMAPPED; CHUNK as usize];
        let found = &mut found[..(blocks.end - blocks.start) as usize];
        self.lookup(blocks.start, found)?;
        Ok(found.iter().all(|entry| entry.physical == 0))
    }

    /// Map and log learn that these blocks hold nothing. Nothing is changed before all that is needed is in memory.
    pub(super) fn unmap(&mut self, blocks: Range<u64>, punch: bool) -> Result<(), Halt> {
        self.writable()?;
        self.room_in_log()?;
        let mut old = [Entry::UNMAPPED; CHUNK as usize];
        let old = &mut old[..(blocks.end - blocks.start) as usize];
        self.lookup(blocks.start, old)?;
        for block in old.iter().filter_map(Entry::data).filter(|block| self.space.has(*block)) {
            self.forest.page(bitmap(block / BITS as u64))?;
        }
        for (lba, old) in blocks.zip(old.iter()).filter(|(_, old)| old.physical != 0) {
            self.release_data(lba, old, punch)?;
            self.enter(lba, Entry::UNMAPPED)?;
        }
        Ok(())
    }
}
