//! Free space: bitmap pages, and blocks that are free but may not be reused yet.
//!
//! A block that is superseded is cleared in the bitmap at once, so that the next checkpoint writes the truth, and *held* until
//! what supersedes it is durable: data until its record is, pages until the superblock is (for an opener's first checkpoint: until
//! its anchor is kept). A held block is free on disk and never handed out.

use crate::VolumeError;
use crate::backing::Backing;
use crate::format::Block;
use crate::format::page::{BITS, Header, Tree, set_bit};
use crate::tree::{Forest, PageId};
use std::collections::{HashSet, VecDeque};
use std::ops::Range;

/// Free blocks in a bitmap page that was not loaded yet.
const UNKNOWN: u16 = u16::MAX;

pub(crate) struct Space {
    /// Clear bits of each bitmap page, held ones included.
    clear: Vec<u16>,
    held: HashSet<u64>,
    /// Superseded data that waits for a record to be durable.
    waiting: VecDeque<Waiting>,
    /// Held blocks that are to be given back to the store before they are free.
    to_punch: Vec<u64>,
    /// Where the last run ended.
    cursor: u64,
}

/// A block of superseded data.
struct Waiting {
    block: u64,
    /// The number of the record that superseded it.
    record: u64,
    /// Its room is to be given back.
    punch: bool,
}

impl Space {
    pub(crate) fn new(from: &Backing) -> Self {
        let pages = usize::try_from(from.geometry.bitmaps()).unwrap_or(usize::MAX);
        Self {
            clear: vec![UNKNOWN; pages],
            held: HashSet::new(),
            waiting: VecDeque::new(),
            to_punch: Vec::new(),
            cursor: from.geometry.pool().start,
        }
    }

    /// Takes up to `want` neighbouring blocks, near `near` if that is free.
    pub(crate) fn allocate(
        &mut self,
        near: u64,
        want: u64,
        forest: &mut Forest,
        from: &Backing,
    ) -> Result<Range<u64>, VolumeError> {
        let found = match self.search_page(near / BITS as u64, near, want, forest, from)? {
            Some(found) => found,
            None => self.search(want, forest, from)?.ok_or(VolumeError::Full(None))?,
        };
        self.mark(found.clone(), true, forest, from)?;
        self.cursor = found.end;
        Ok(found)
    }

    /// From the cursor once round.
    fn search(&mut self, want: u64, forest: &mut Forest, from: &Backing) -> Result<Option<Range<u64>>, VolumeError> {
        let pages = self.clear.len() as u64;
        let first = (self.cursor / BITS as u64).min(pages - 1);
        for step in 0..=pages {
            let page = (first + step) % pages;
            let start = if step == 0 { self.cursor } else { page * BITS as u64 };
            if let Some(found) = self.search_page(page, start, want, forest, from)? {
                return Ok(Some(found));
            }
        }
        Ok(None)
    }

    fn search_page(
        &mut self,
        page: u64,
        start: u64,
        want: u64,
        forest: &mut Forest,
        from: &Backing,
    ) -> Result<Option<Range<u64>>, VolumeError> {
        let Some(clear) = self.clear.get_mut(page as usize) else { return Ok(None) };
        if *clear == 0 {
            return Ok(None);
        }
        let base = page * BITS as u64;
        let bits = &forest.page(bitmap(page), from)?.bytes;
        if *clear == UNKNOWN {
            *clear = count_clear(bits);
        }
        let mut at = (start - base) as usize;
        while let Some(i) = next_clear(bits, at) {
            let run = (i..BITS).take_while(|i| is_clear(bits, *i) && !self.held.contains(&(base + *i as u64)));
            let length = run.take(want as usize).count() as u64;
            if length > 0 {
                let first = base + i as u64;
                return Ok(Some(first..first + length));
            }
            at = i + 1;
        }
        Ok(None)
    }

    /// Marks blocks as used or free.
    pub(crate) fn mark(
        &mut self,
        blocks: Range<u64>,
        used: bool,
        forest: &mut Forest,
        from: &Backing,
    ) -> Result<(), VolumeError> {
        let mut block = blocks.start;
        while block < blocks.end {
            let page = block / BITS as u64;
            let end = blocks.end.min((page + 1) * BITS as u64);
            let bytes = &mut forest.page_mut(bitmap(page), from)?.bytes;
            let mut changed = 0;
            for i in (block..end).map(|b| (b % BITS as u64) as usize) {
                changed += u16::from(is_clear(bytes, i) == used);
                set_bit(bytes, i, used);
            }
            if let Some(clear) = self.clear.get_mut(page as usize).filter(|clear| **clear != UNKNOWN) {
                *clear = if used { clear.saturating_sub(changed) } else { *clear + changed };
            }
            block = end;
        }
        Ok(())
    }

    /// Marks blocks beyond the volume's end and outside its pool as used: what a new volume begins with.
    pub(crate) fn fence(&mut self, forest: &mut Forest, from: &Backing) -> Result<(), VolumeError> {
        let pool = from.geometry.pool();
        self.mark(0..pool.start, true, forest, from)?;
        self.mark(pool.end..from.geometry.bitmaps() * BITS as u64, true, forest, from)
    }

    /// Frees a block of data that record number `record` supersedes: reusable once that is durable, and, with `punch`, once its
    /// room was given back to the store.
    pub(crate) fn supersede(
        &mut self,
        block: u64,
        record: u64,
        punch: bool,
        forest: &mut Forest,
        from: &Backing,
    ) -> Result<(), VolumeError> {
        self.free_held(block, forest, from)?;
        self.waiting.push_back(Waiting { block, record, punch });
        Ok(())
    }

    /// Frees a block and holds it.
    pub(crate) fn free_held(&mut self, block: u64, forest: &mut Forest, from: &Backing) -> Result<(), VolumeError> {
        self.held.insert(block);
        self.mark(block..block + 1, false, forest, from)
    }

    /// Takes back a [`free_held`](Self::free_held).
    pub(crate) fn keep(&mut self, block: u64, forest: &mut Forest, from: &Backing) -> Result<(), VolumeError> {
        self.held.remove(&block);
        self.mark(block..block + 1, true, forest, from)
    }

    /// The first `records` records are durable.
    pub(crate) fn durable(&mut self, records: u64) {
        while self.waiting.front().is_some_and(|w| w.record < records)
            && let Some(waiting) = self.waiting.pop_front()
        {
            if waiting.punch {
                self.to_punch.push(waiting.block);
            } else {
                self.held.remove(&waiting.block);
            }
        }
    }

    /// Everything held may be reused, except what is to be given back first.
    pub(crate) fn release_all(&mut self) {
        self.durable(u64::MAX);
        self.held.clear();
        self.held.extend(&self.to_punch);
    }

    /// Blocks whose room may be given back now. They stay held until [`punched`](Self::punched).
    pub(crate) fn take_to_punch(&mut self) -> Vec<u64> {
        std::mem::take(&mut self.to_punch)
    }

    /// The room of these blocks was given back, or can't be.
    pub(crate) fn punched(&mut self, blocks: &[u64]) {
        for block in blocks {
            self.held.remove(block);
        }
    }

    /// Superseded blocks of data that still wait.
    pub(crate) fn waiting(&self) -> u64 {
        self.waiting.len() as u64
    }
}

/// The bitmap page with that index.
pub(crate) fn bitmap(index: u64) -> PageId {
    PageId { tree: Tree::Free, level: 0, index }
}

fn words(page: &Block) -> &[[u8; 8]] {
    page[Header::SIZE..].as_chunks().0
}

fn count_clear(page: &Block) -> u16 {
    words(page).iter().map(|w| u64::from_le_bytes(*w).count_zeros() as u16).sum()
}

fn is_clear(page: &Block, i: usize) -> bool {
    !crate::format::page::bit(page, i)
}

/// The first clear bit from `start` on.
fn next_clear(page: &Block, start: usize) -> Option<usize> {
    let words = words(page);
    let mut mask = u64::MAX << (start % 64);
    for (i, word) in words.iter().enumerate().skip(start / 64) {
        let clear = !u64::from_le_bytes(*word) & mask;
        if clear != 0 {
            return Some(i * 64 + clear.trailing_zeros() as usize);
        }
        mask = u64::MAX;
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::BLOCK;

    #[test]
    fn clear_bits_are_found_in_order() {
        let mut page = [0xff; BLOCK];
        assert_eq!(next_clear(&page, 0), None);
        for i in [0, 63, 64, 1000, BITS - 1] {
            set_bit(&mut page, i, false);
        }
        let mut found = Vec::new();
        let mut at = 0;
        while let Some(i) = next_clear(&page, at) {
            found.push(i);
            at = i + 1;
        }
        assert_eq!(found, [0, 63, 64, 1000, BITS - 1]);
        assert_eq!(count_clear(&page), 5);
    }
}
