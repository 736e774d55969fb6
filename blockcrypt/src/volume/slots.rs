//! Where key slots lie, and how they go.
//!
//! A superblock holds the current slot, and leads to the pages of older ones. A block that held slots which are not needed any more is
//! overwritten with zeroes before it is free, and that is durable before the superblock that says where it lies goes: so, whatever a crash
//! leaves, the next writer finds and overwrites it, and [`erase`] finds it too.

use super::shared::Shared;
use super::superblocks::{Superblocks, find_superblocks};
use crate::format::page::{Header, Tree};
use crate::format::slot::{MAX_PAGES, SlotPage};
use crate::format::superblock::has_magic;
use crate::format::{BLOCK, zero_block};
use crate::{Store, VolumeError};

impl Shared {
    /// Overwrites what held key slots, and only then frees it. Checkpoints do so too, and only note where they can't: who promises
    /// that slots are gone calls this.
    pub(super) fn wipe_stale_slots(&self) -> Result<(), VolumeError> {
        let mut stale = self.core()?.stale_slots.clone();
        let Refused { blocks, why } = self.wipe(&stale)?;
        stale.retain(|block| !blocks.contains(block));
        let mut core = self.core()?;
        core.stale_slots.retain(|block| !stale.contains(block));
        core.space.punched(&stale);
        why.map_or(Ok(()), Err)
    }

    /// As [`wipe_stale_slots`](Self::wipe_stale_slots), for an opener: a volume opens although the store does not take some of that.
    pub(super) fn try_to_wipe_stale_slots(&self) -> Result<(), VolumeError> {
        match self.wipe_stale_slots() {
            Err(error @ VolumeError::Store(..)) if self.core()?.writable().is_ok() => self.note_refused(&error),
            other => return other,
        }
        Ok(())
    }

    fn note_refused(&self, why: &VolumeError) {
        self.backing.events.note(&format!("old key slots are not overwritten yet: {why}; each checkpoint tries again"));
    }

    /// Overwrites what a crash left of slots that are not this volume's any more: in pages that another superblock leads to, and at the
    /// end that it had before it grew. To be called before the first checkpoint, which goes where that superblock lies.
    pub(super) fn wipe_left_slots(&self) -> Result<(), VolumeError> {
        let store = &*self.backing.store;
        let mut left: Vec<u64> =
            superblock_places(store)?.1.into_iter().filter(|at| is_superblock(store, *at)).collect();
        left.extend(older_slot_blocks(store)?);
        // Whoever wrote what names them: in a block that is free nothing is lost. One of which nobody can tell is left alone.
        left.retain(|block| {
            let free = self.with_core(|core| core.space.is_free(*block, &mut core.forest));
            *block >= self.backing.geometry().total || free.unwrap_or(false)
        });
        let Refused { mut blocks, why } = self.wipe(&left)?;
        if let Some(why) = why {
            self.note_refused(&why);
        }
        let mut core = self.core()?;
        blocks.retain(|block| core.space.has(*block));
        core.space.hold(&blocks);
        core.stale_slots.append(&mut blocks);
        Ok(())
    }

    /// Overwrites blocks, durably: each before those in front of it, which may lead to it. Passes over those that the store does not take.
    fn wipe(&self, blocks: &[u64]) -> Result<Refused, VolumeError> {
        let mut refused = Refused::default();
        for block in blocks.iter().rev() {
            if let Err(why) = self.backing.write_blocks(*block, &zero_block()[..]) {
                refused.blocks.push(*block);
                refused.why = Some(why);
                continue;
            }
            if let Err(error) = self.backing.sync() {
                // Nor may what else was written meanwhile ever be durable.
                return Err(self.core()?.fail(error, &*self.backing.events));
            }
        }
        Ok(refused)
    }
}

/// Blocks that could not be overwritten, and why the last of them.
#[derive(Default)]
struct Refused {
    blocks: Vec<u64>,
    why: Option<VolumeError>,
}

/// Destroys the key slots of the volume in `store`, and with them everything that it holds: all superblocks, those at an end that it had
/// before, and the pages of older slots. Needs no key; nobody can take it back. Returns how many blocks were overwritten.
pub fn erase(store: &dyn Store) -> Result<usize, VolumeError> {
    let (front, back) = superblock_places(store)?;
    let older = older_slot_blocks(store)?;
    // Superblocks lead to older slots, a page of them to the next, and superblocks at the front say where the others lie: what leads to
    // something goes after it, so that an erasure that a crash interrupts can be done again.
    let mut count = 0;
    for blocks in older.chunks(1).rev().chain([&back[..], &front]) {
        for block in blocks {
            let zeroes = zero_block();
            store.write_at(&zeroes[..], block * BLOCK as u64).map_err(VolumeError::store("be erased"))?;
        }
        store.sync_data().map_err(VolumeError::store("make the erasure durable"))?;
        count += blocks.len();
    }
    Ok(count)
}

/// Every block that may hold a superblock: those at the front, and those at the end, wherever the former say that it is.
fn superblock_places(store: &dyn Store) -> Result<(Vec<u64>, Vec<u64>), VolumeError> {
    let blocks = store.len().map_err(VolumeError::store("say its length"))? / BLOCK as u64;
    let Superblocks { found, .. } = find_superblocks(store)?;
    let ends = found.iter().map(|f| f.superblock.geometry.total).chain([blocks]);
    let mut back: Vec<u64> = ends.filter(|end| (4..=blocks).contains(end)).flat_map(|end| [end - 2, end - 1]).collect();
    back.sort_unstable();
    back.dedup();
    Ok((vec![0, 1], back))
}

fn is_superblock(store: &dyn Store, at: u64) -> bool {
    let mut block = zero_block();
    store.read_at(&mut block[..], at * BLOCK as u64).is_ok() && has_magic(&block)
}

/// Blocks that hold older key slots, as far as superblocks say without a key; one that leads to another stands before it.
fn older_slot_blocks(store: &dyn Store) -> Result<Vec<u64>, VolumeError> {
    let mut blocks = Vec::new();
    for found in find_superblocks(store)?.found {
        let pool = found.superblock.geometry.pool();
        let mut next = found.superblock.older;
        for _ in 0..MAX_PAGES {
            if next.is_empty() || !pool.contains(&next.physical) {
                break;
            }
            let mut page = zero_block();
            // Nothing vouches for where this leads: what can't be read is no reason to leave the rest.
            if store.read_at(&mut page[..], next.physical * BLOCK as u64).is_err() {
                break;
            }
            // A block that is something else by now is not for this to overwrite.
            let is_slots = Header::parse(&page).is_ok_and(|header| header.tree == Tree::Slots);
            let Some(parsed) = SlotPage::parse(&page).ok().filter(|_| is_slots) else { break };
            if !blocks.contains(&next.physical) {
                blocks.push(next.physical);
            }
            next = parsed.next;
        }
    }
    Ok(blocks)
}
