//! Free space: bitmap pages, blocks that are free but may not be reused yet, and blocks that are about to be used.
//!
//! - A block that is superseded is cleared in the bitmap at once, so that the next checkpoint writes the truth, and *held* until
//!   what supersedes it is durable: data until its record is, pages until the superblock is (for an opener's first checkpoint:
//!   until its anchor is kept). A held block is free on disk and never handed out.
//! - A block that was handed out is *reserved*: free on disk until the map, or a checkpoint, names it, so that a crash in between
//!   leaks nothing.
//! - *Spare* blocks are reserved for pages, and the store is known to have room for them: a store that is full takes no data, and
//!   still takes checkpoints.

use crate::VolumeError;
use crate::blockset::{BlockSet, WORDS};
use crate::format::Block;
use crate::format::geometry::Geometry;
use crate::format::page::{BITS, Header, Tree, set_bit};
use crate::tree::{Forest, Halt, PageId};
use std::collections::VecDeque;
use std::ops::Range;

/// Free blocks in a bitmap page that was not loaded yet.
const UNKNOWN: u16 = u16::MAX;

pub(crate) struct Space {
    /// The blocks that may be handed out.
    pool: Range<u64>,
    /// The part of it that no data goes to.
    zone: Range<u64>,
    /// Clear bits of each bitmap page, held and reserved ones included.
    clear: Vec<u16>,
    held: BlockSet,
    reserved: BlockSet,
    /// Reserved blocks outside the zone that pages may take.
    spare: Vec<u64>,
    /// Superseded data that waits for a record to be durable.
    waiting: VecDeque<Waiting>,
    /// Held blocks that are to be given back to the store before they are free.
    to_punch: Vec<u64>,
    /// Held blocks that are being given back right now.
    punching: BlockSet,
    /// Where the last run ended.
    cursor: u64,
    /// Blocks of the pool that the bitmap calls used.
    used: u64,
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
    pub(crate) fn new(geometry: &Geometry, used: u64) -> Self {
        let pages = usize::try_from(geometry.bitmaps()).unwrap_or(usize::MAX);
        Self {
            pool: geometry.pool(),
            zone: geometry.zone(),
            clear: vec![UNKNOWN; pages],
            held: BlockSet::new(pages),
            reserved: BlockSet::new(pages),
            spare: Vec::new(),
            waiting: VecDeque::new(),
            to_punch: Vec::new(),
            punching: BlockSet::new(pages),
            cursor: geometry.zone().end,
            used,
        }
    }

    /// Blocks of the pool in use, as far as the bitmap knows.
    pub(crate) fn used(&self) -> u64 {
        self.used
    }

    /// Blocks that data and pages may still take.
    pub(crate) fn free(&self) -> u64 {
        let spoken_for = self.used + (self.held.len() + self.reserved.len()) as u64;
        (self.pool.end - self.pool.start).saturating_sub(spoken_for)
    }

    /// Reserves up to `want` neighbouring blocks outside the zone, near `near` if that is free.
    pub(crate) fn reserve(&mut self, near: u64, want: u64, forest: &mut Forest) -> Result<Range<u64>, Halt> {
        let (near, all) = (near.max(self.zone.end), self.zone.end..self.pool.end);
        let found = match self.search_page(near / BITS as u64, near, want, &all, forest)? {
            Some(found) => found,
            None => self.search(want, &all, forest)?.ok_or(VolumeError::Full(None))?,
        };
        found.clone().for_each(|block| self.reserved.insert(block));
        self.cursor = found.end;
        Ok(found)
    }

    /// Reserves a block for a page: one for which the store has room, as long as there are any.
    pub(crate) fn reserve_for_page(&mut self, forest: &mut Forest) -> Result<u64, Halt> {
        if let Some(spare) = self.spare.pop() {
            return Ok(spare);
        }
        let zone = self.zone.clone();
        for page in zone.start / BITS as u64..zone.end.div_ceil(BITS as u64) {
            if let Some(found) = self.search_page(page, zone.start.max(page * BITS as u64), 1, &zone, forest)? {
                self.reserved.insert(found.start);
                return Ok(found.start);
            }
        }
        Ok(self.reserve(self.cursor, 1, forest)?.start)
    }

    /// Reserved blocks that were not used after all.
    pub(crate) fn unreserve(&mut self, blocks: impl IntoIterator<Item = u64>) {
        for block in blocks {
            self.reserved.remove(block);
        }
    }

    /// Blocks that were reserved for pages and not used. The first `spare` of them were spare, and are again.
    pub(crate) fn give_back(&mut self, blocks: &[u64], spare: usize) {
        let (spare, others) = blocks.split_at(spare);
        self.add_spare(spare.iter().copied());
        self.unreserve(others.iter().copied());
    }

    /// Reserved blocks become spare.
    pub(crate) fn add_spare(&mut self, blocks: impl IntoIterator<Item = u64>) {
        self.spare.extend(blocks);
    }

    /// Spare blocks.
    pub(crate) fn spare(&self) -> usize {
        self.spare.len()
    }

    /// How many blocks of the zone are free: counted a word at a time, as writes wait for it.
    pub(crate) fn free_in_zone(&mut self, forest: &mut Forest) -> Result<u64, Halt> {
        let (zone, bits) = (self.zone.clone(), BITS as u64);
        let mut free = 0;
        for page in zone.start / bits..zone.end.div_ceil(bits) {
            let base = page * bits;
            let within = zone.start.saturating_sub(base) as usize..((zone.end - base) as usize).min(BITS);
            free += count_set(self.idle(page, &forest.page(bitmap(page))?.bytes), within);
        }
        Ok(free)
    }

    /// Whether `block` is one that data and pages may lie in.
    pub(crate) fn has(&self, block: u64) -> bool {
        self.pool.contains(&block)
    }

    /// Whether nothing lies in the block, and nothing is about to.
    pub(crate) fn is_free(&self, block: u64, forest: &mut Forest) -> Result<bool, Halt> {
        if !self.has(block) || !self.is_idle(block) {
            return Ok(false);
        }
        Ok(is_clear(&forest.page(bitmap(block / BITS as u64))?.bytes, (block % BITS as u64) as usize))
    }

    fn is_idle(&self, block: u64) -> bool {
        !self.held.contains(block) && !self.reserved.contains(block)
    }

    /// From the cursor once round.
    fn search(&mut self, want: u64, within: &Range<u64>, forest: &mut Forest) -> Result<Option<Range<u64>>, Halt> {
        let pages = self.clear.len() as u64;
        let first = (self.cursor / BITS as u64).min(pages - 1);
        for step in 0..=pages {
            let page = (first + step) % pages;
            let start = if step == 0 { self.cursor } else { page * BITS as u64 };
            if let Some(found) = self.search_page(page, start, want, within, forest)? {
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
        within: &Range<u64>,
        forest: &mut Forest,
    ) -> Result<Option<Range<u64>>, Halt> {
        let base = page * BITS as u64;
        let start = start.max(within.start).max(base);
        if start >= within.end.min(base + BITS as u64) || self.clear.get(page as usize).is_none_or(|clear| *clear == 0)
        {
            return Ok(None);
        }
        let bits = &forest.page(bitmap(page))?.bytes;
        if let Some(clear) = self.clear.get_mut(page as usize).filter(|clear| **clear == UNKNOWN) {
            *clear = count_clear(bits);
        }
        let end = ((within.end - base) as usize).min(BITS);
        let want = usize::try_from(want).unwrap_or(usize::MAX);
        let run = first_run(self.idle(page, bits), (start - base) as usize..end, want);
        Ok(run.map(|run| base + run.start as u64..base + run.end as u64))
    }

    /// The words of a bitmap page, with bits set for blocks in which nothing lies, and nothing is about to.
    fn idle<'a>(&'a self, page: u64, bits: &'a Block) -> impl Fn(usize) -> u64 + 'a {
        let bits = words(bits);
        move |i| !(u64::from_le_bytes(bits[i]) | self.held.word(page, i) | self.reserved.word(page, i))
    }

    /// Blocks in use become free, or the other way round. The bitmap page must be in memory before anything is changed.
    pub(crate) fn mark(&mut self, blocks: Range<u64>, used: bool, forest: &mut Forest) -> Result<(), Halt> {
        let mut block = blocks.start;
        while block < blocks.end {
            let page = block / BITS as u64;
            let end = blocks.end.min((page + 1) * BITS as u64);
            let bytes = forest.page_mut(bitmap(page))?;
            let mut changed = 0;
            for i in (block..end).map(|b| (b % BITS as u64) as usize) {
                changed += u16::from(is_clear(bytes, i) == used);
                set_bit(bytes, i, used);
            }
            let all = u64::from(changed);
            self.used = if used { self.used + all } else { self.used.saturating_sub(all) };
            if let Some(clear) = self.clear.get_mut(page as usize).filter(|clear| **clear != UNKNOWN) {
                *clear = if used { clear.saturating_sub(changed) } else { *clear + changed };
            }
            block = end;
        }
        Ok(())
    }

    /// Reserved blocks are in use.
    pub(crate) fn take(&mut self, blocks: Range<u64>, forest: &mut Forest) -> Result<(), Halt> {
        self.mark(blocks.clone(), true, forest)?;
        self.unreserve(blocks);
        Ok(())
    }

    /// Takes back a [`take`](Self::take); the block is free.
    pub(crate) fn untake(&mut self, block: u64, forest: &mut Forest) -> Result<(), Halt> {
        self.mark(block..block + 1, false, forest)
    }

    /// Free blocks for which the store has room are spare.
    pub(crate) fn spare_again(&mut self, blocks: &[u64]) {
        blocks.iter().for_each(|block| self.reserved.insert(*block));
        self.add_spare(blocks.iter().copied());
    }

    /// Marks blocks beyond the volume's end and outside its pool as used: what a new volume begins with.
    pub(crate) fn fence(&mut self, forest: &mut Forest) -> Result<(), Halt> {
        let used = self.used;
        self.mark(0..self.pool.start, true, forest)?;
        self.mark(self.pool.end..self.clear.len() as u64 * BITS as u64, true, forest)?;
        self.used = used;
        Ok(())
    }

    /// The volume has another size from now on. Bitmap pages from the fence on are counted anew; what was spare behind the pool's end is
    /// not there any more.
    pub(crate) fn resize(&mut self, geometry: &Geometry) {
        let fence = self.pool.end.min(geometry.pool().end);
        self.pool = geometry.pool();
        self.zone = geometry.zone();
        let pages = usize::try_from(geometry.bitmaps()).unwrap_or(usize::MAX);
        self.clear.truncate((fence / BITS as u64) as usize);
        self.clear.resize(pages, UNKNOWN);
        for block in self.spare.extract_if(.., |block| !self.pool.contains(block)) {
            self.reserved.remove(block);
        }
        self.held.lengthen(pages);
        self.reserved.lengthen(pages);
        self.punching.lengthen(pages);
    }

    /// Blocks that lay behind the end are free, others are not any more: neither counts as used.
    pub(crate) fn move_fence(
        &mut self,
        freed: Range<u64>,
        fenced: Range<u64>,
        forest: &mut Forest,
    ) -> Result<(), Halt> {
        let used = self.used;
        self.mark(freed, false, forest)?;
        self.mark(fenced, true, forest)?;
        self.used = used;
        Ok(())
    }

    /// Frees a block of data that record number `record` supersedes: reusable once that is durable, and, with `punch`, once its
    /// room was given back to the store.
    pub(crate) fn supersede(&mut self, block: u64, record: u64, punch: bool, forest: &mut Forest) -> Result<(), Halt> {
        self.free_held(block, forest)?;
        self.waiting.push_back(Waiting { block, record, punch });
        Ok(())
    }

    /// Frees a block and holds it.
    pub(crate) fn free_held(&mut self, block: u64, forest: &mut Forest) -> Result<(), Halt> {
        self.mark(block..block + 1, false, forest)?;
        self.held.insert(block);
        Ok(())
    }

    /// Takes back a [`free_held`](Self::free_held).
    pub(crate) fn keep(&mut self, block: u64, forest: &mut Forest) -> Result<(), Halt> {
        self.mark(block..block + 1, true, forest)?;
        self.held.remove(block);
        Ok(())
    }

    /// The first `records` records are durable.
    pub(crate) fn durable(&mut self, records: u64) {
        while self.waiting.front().is_some_and(|w| w.record < records)
            && let Some(waiting) = self.waiting.pop_front()
        {
            if waiting.punch && !self.zone.contains(&waiting.block) {
                self.to_punch.push(waiting.block);
            } else {
                self.held.remove(waiting.block);
            }
        }
    }

    /// Pages that a durable superblock replaced may be reused: by pages, as long as fewer than `spares` are spare, for the store
    /// has room for them.
    pub(crate) fn release(&mut self, pages: &[u64], spares: usize) {
        for block in pages.iter().filter(|block| self.held.remove(**block)) {
            if self.spare.len() < spares && !self.zone.contains(block) {
                self.reserved.insert(*block);
                self.spare.push(*block);
            }
        }
    }

    /// Everything held may be reused, except what is to be given back first, or is being given back.
    pub(crate) fn release_all(&mut self) {
        self.durable(u64::MAX);
        self.held = self.punching.clone();
        self.to_punch.iter().for_each(|block| self.held.insert(*block));
    }

    /// Blocks whose room may be given back now. They stay held until [`punched`](Self::punched).
    pub(crate) fn take_to_punch(&mut self) -> Vec<u64> {
        self.to_punch.iter().for_each(|block| self.punching.insert(*block));
        std::mem::take(&mut self.to_punch)
    }

    /// The room of these blocks was given back, or can't be.
    pub(crate) fn punched(&mut self, blocks: &[u64]) {
        for block in blocks {
            self.punching.remove(*block);
            self.held.remove(*block);
        }
    }

    /// Blocks that were freed and held may be reused, once their room was given back. The zone's stays: pages rely on it.
    pub(crate) fn freed(&mut self, blocks: &[u64]) {
        for block in blocks {
            if self.zone.contains(block) {
                self.held.remove(*block);
            } else {
                self.to_punch.push(*block);
            }
        }
    }

    /// Free blocks are held.
    pub(crate) fn hold(&mut self, blocks: &[u64]) {
        blocks.iter().for_each(|block| self.held.insert(*block));
    }

    /// Held blocks are not held any more.
    pub(crate) fn let_go(&mut self, blocks: Range<u64>) {
        blocks.for_each(|block| _ = self.held.remove(block));
    }

    /// Whether there are blocks that are free once their records are durable, or their room was given back, and nobody is at it.
    pub(crate) fn frees_more(&self) -> bool {
        !self.waiting.is_empty() || !self.to_punch.is_empty()
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

/// How many bits of `within` are set. `word` gives them, 64 at a time.
fn count_set(word: impl Fn(usize) -> u64, within: Range<usize>) -> u64 {
    let inside = |i: usize| {
        let (start, end) = (within.start.saturating_sub(i * 64), within.end - i * 64);
        (u64::MAX << start) & (u64::MAX >> (64 - end.min(64)))
    };
    (within.start / 64..within.end.div_ceil(64)).map(|i| u64::from((word(i) & inside(i)).count_ones())).sum()
}

/// The first set bit of `within`, and those that follow it, `want` at most. `word` gives the bits, 64 at a time.
fn first_run(word: impl Fn(usize) -> u64, within: Range<usize>, want: usize) -> Option<Range<usize>> {
    let mut mask = u64::MAX << (within.start % 64);
    let start = (within.start / 64..WORDS).find_map(|i| {
        let set = word(i) & std::mem::replace(&mut mask, u64::MAX);
        (set != 0).then(|| i * 64 + set.trailing_zeros() as usize)
    })?;
    let most = within.end.min(start.saturating_add(want));
    let mut end = start;
    while end < most {
        let ones = (word(end / 64) >> (end % 64)).trailing_ones() as usize;
        end += ones;
        if ones == 0 || end % 64 != 0 {
            break;
        }
    }
    (start < most).then(|| start..end.min(most))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::BLOCK;
    use proptest::prelude::*;

    #[test]
    fn clear_bits_are_counted() {
        let mut page = [0xff; BLOCK];
        for i in [0, 63, 64, 1000, BITS - 1] {
            set_bit(&mut page, i, false);
        }
        assert_eq!(count_clear(&page), 5);
        assert_eq!(words(&page)[1], [0xfe, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff]);
    }

    proptest! {
        #[test]
        fn words_say_what_a_look_at_each_bit_does(
            edges in prop::collection::vec(0..BITS, 0..40), start in 0..BITS, end in 0..BITS, want in 1_usize..300
        ) {
            // Every edge turns what follows around, so that runs are long and cross words.
            let set = |i: usize| edges.iter().filter(|edge| **edge <= i).count() % 2 == 1;
            let all: Vec<bool> = (0..BITS).map(set).collect();
            let word = |w: usize| (0..64).fold(0, |bits, i| bits | u64::from(all[w * 64 + i]) << i);
            let expected = (start..end).find(|i| all[*i]).map(|first| {
                first..first + (first..end).take(want).take_while(|i| all[*i]).count()
            });
            prop_assert_eq!(first_run(word, start..end, want), expected);
            let end = end.max(start);
            prop_assert_eq!(count_set(word, start..end), all[start..end].iter().filter(|set| **set).count() as u64);
        }
    }
}
