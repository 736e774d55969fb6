//! New keys for old: the key-encryption key's change, the master's rotation, and the end of all of them.
//!
//! - **Rewrap**: each slot's master is wrapped under another key-encryption key. No block changes. A superblock with the new wrappings
//!   is written and anchored while the one before, with the old ones, still stands: the anchor's key opens the anchored state.
//! - **Rotation**: an opener whose grant names a new key id has a new master for what it writes. [`Shared::rotate`] writes
//!   the rest again under it, block by block and page by page, while requests are served; what is under the new key already is
//!   passed over, so that a crash costs nothing but a look at the map. When nothing needs them any more, the older slots go.
//! - **Erase**: without its slots a volume is noise, whoever has which key.
//!
//! Blocks that held slots are overwritten with zeroes before they are free.

use super::batch::CHUNK;
use super::durable::Occasion;
use super::open::{older_slot_blocks, superblock_places};
use super::shared::Shared;
use super::{Core, leaf};
use crate::format::page::{ENTRIES, Entry, Tree};
use crate::format::slot::Slot;
use crate::format::{BLOCK, Block, zero_block};
use crate::space::bitmap;
use crate::tree::Halt;
use crate::{Kek, Store, VolumeError};
use policy::KeyId;

impl Shared {
    pub(super) fn rewrap(&self, old: &Kek, new: &Kek) -> Result<(), VolumeError> {
        self.check_writable(0, 0)?;
        let _alone = self.alone()?;
        let group = self.flushing();
        let (current, older) = {
            let core = self.core()?;
            core.writable()?;
            (core.superblock.slot.clone(), core.older.clone())
        };
        let rewrapped = |slot: &Slot| old.rewrap(slot, &self.customer, new);
        let new_current = rewrapped(&current)?;
        let new_older = older.iter().map(rewrapped).collect::<Result<Vec<_>, _>>()?;
        // One that never had an anchor has none to tell the provider with.
        self.anchoring.kept().ok_or(VolumeError::NoAnchor)?;
        self.core()?.change_slots(new_current, new_older);
        if let Err(error) = self.write_checkpoint(&group, Occasion::Rewrapping) {
            self.core()?.change_slots(current, older);
            return Err(error);
        }
        if let Err(error) = self.anchoring.keep_now() {
            // Which key the provider goes by is not known: both superblocks must stay as they are.
            return Err(self.core()?.fail(error, &*self.backing.events));
        }
        self.wipe_stale_slots()?;
        self.core()?.space.release_all();
        // Once more, so that neither superblock has the old wrapping.
        self.write_checkpoint(&group, Occasion::Running)?;
        self.wipe_stale_slots()?;
        drop(group);
        self.anchoring.after_flush()
    }

    /// Rewrites what older keys seal; `heard` is told of how many blocks of how many, and may end it by saying `false`. Returns
    /// whether it came to its end.
    pub(super) fn rotate(&self, heard: &mut dyn FnMut(u64, u64) -> bool) -> Result<bool, VolumeError> {
        self.check_writable(0, 0)?;
        let blocks = self.backing.geometry().blocks();
        // Each block, then each leaf of the map once more.
        let all = blocks + blocks.div_ceil(ENTRIES as u64);
        let mut index = 0;
        while let Some(next) = self.with_core(|core| core.forest.next_leaf(Tree::Map, index))? {
            let first = next * ENTRIES as u64;
            if first >= self.backing.geometry().blocks() {
                break;
            }
            if !heard(first.min(blocks), all) {
                return Ok(false);
            }
            self.rotate_leaf(first)?;
            index = next + 1;
        }
        self.rotate_bitmaps()?;
        self.checkpoint()?;
        if !self.drop_older_keys(&mut |leaf| heard(blocks + leaf.min(all - blocks), all))? {
            return Ok(false);
        }
        heard(all, all);
        Ok(true)
    }

    fn rotate_leaf(&self, first: u64) -> Result<(), VolumeError> {
        let end = (first + ENTRIES as u64).min(self.backing.geometry().blocks());
        let mut at = first;
        let mut blocks: Vec<Block> = Vec::new();
        while at < end {
            self.make_room()?;
            let _among_others = self.among_others()?;
            let _locked = self.lock_blocks(std::iter::once(at..end));
            let mut entries = [Entry::UNMAPPED; ENTRIES];
            let entries = &mut entries[..(end - at) as usize];
            let current = self.with_core(|core| {
                core.lookup(at, entries)?;
                Ok(core.superblock.key())
            })?;
            let stale = |entry: &Entry| entry.data().is_some() && entry.key != current;
            let Some(skip) = entries.iter().position(stale) else { break };
            let run = entries[skip..].iter().take_while(|entry| stale(entry)).take(CHUNK as usize).count();
            at += skip as u64;
            blocks.resize(run, [0; BLOCK]);
            let (good, bad) = match self.read_blocks(at, &mut blocks) {
                Ok(()) => (run, 0),
                // A bad block stays what it is, under the key that it had: that one is kept. What lies behind it comes next.
                Err(VolumeError::Integrity { lba }) => ((lba - at) as usize, 1),
                Err(other) => return Err(other),
            };
            if good > 0 {
                self.write_blocks(at, &mut blocks[..good])?;
            }
            at += good as u64 + bad;
        }
        self.with_core(|core| core.touch(leaf(first).0))
    }

    fn rotate_bitmaps(&self) -> Result<(), VolumeError> {
        let mut index = 0;
        while let Some(next) = self.with_core(|core| core.forest.next_leaf(Tree::Free, index))? {
            if next >= self.backing.geometry().bitmaps() {
                break;
            }
            self.make_room()?;
            self.with_core(|core| core.touch(bitmap(next)))?;
            index = next + 1;
        }
        Ok(())
    }

    /// Forgets older keys, if nothing is left that needs them: no snapshot, and no block that could not be read. Returns false where
    /// `heard`, told of the leaves that are looked at, ended it.
    fn drop_older_keys(&self, heard: &mut dyn FnMut(u64) -> bool) -> Result<bool, VolumeError> {
        let (_alone, group) = loop {
            let taken = {
                let core = self.core()?;
                if core.older.is_empty() || !core.snapshots.is_empty() {
                    return Ok(true);
                }
                core.snapshots_taken
            };
            // Nobody waits for a look at the whole map: what is written meanwhile is under the current key.
            match self.find_older_entry(heard)? {
                Search::Ended => return Ok(false),
                Search::Found => return Ok(true),
                Search::Nothing => {}
            }
            let held = (self.alone()?, self.flushing());
            // A revert, which counts as a snapshot too, brings older entries back where it was looked already.
            if self.core()?.snapshots_taken == taken {
                break held;
            }
        };
        self.settle_all(&group)?;
        let (current, older) = {
            let core = self.core()?;
            (core.superblock.slot.clone(), core.older.clone())
        };
        self.core()?.change_slots(current.clone(), Vec::new());
        if let Err(error) = self.write_checkpoint(&group, Occasion::Running) {
            self.core()?.change_slots(current, older);
            return Err(error);
        }
        self.write_checkpoint(&group, Occasion::Running)?;
        self.wipe_stale_slots()?;
        self.backing.change_keys(|ring| ring.keep_current())?;
        self.backing.events.note("no older key is needed any more");
        Ok(true)
    }

    /// Looks for a block or page that is left under an older key; says at which leaf it is.
    fn find_older_entry(&self, heard: &mut dyn FnMut(u64) -> bool) -> Result<Search, VolumeError> {
        let mut index = 0;
        while let Some(next) = self.with_core(|core| core.forest.next_leaf(Tree::Map, index))? {
            if !heard(next) {
                return Ok(Search::Ended);
            }
            if self.with_core(|core| core.is_under_older_key(next * ENTRIES as u64))? {
                return Ok(Search::Found);
            }
            index = next + 1;
        }
        Ok(Search::Nothing)
    }
}

/// How a search came out.
enum Search {
    Found,
    Nothing,
    /// It was told to end.
    Ended,
}

impl Core {
    fn change_slots(&mut self, current: Slot, older: Vec<Slot>) {
        self.superblock.slot = Slot { written: self.superblock.slot.written, ..current };
        self.slots_changed |= !(self.older.is_empty() && older.is_empty());
        self.older = older;
    }

    /// A page that an older key authenticates is written again by the next checkpoint.
    fn touch(&mut self, id: crate::tree::PageId) -> Result<(), Halt> {
        let current: KeyId = self.superblock.key();
        let page = self.forest.page(id)?;
        if page.home.is_some() && page.key != current {
            self.forest.page_mut(id)?;
        }
        Ok(())
    }

    fn is_under_older_key(&mut self, first: u64) -> Result<bool, Halt> {
        let current = self.superblock.key();
        let mut entries = [Entry::UNMAPPED; ENTRIES];
        self.lookup(first, &mut entries)?;
        let page = self.forest.page(leaf(first).0)?;
        let page_is = page.home.is_some() && page.key != current;
        Ok(page_is || entries.iter().any(|entry| entry.physical != 0 && entry.key != current))
    }
}

/// Destroys the key slots of the volume in `store`, and with them everything that it holds: all superblocks, and the pages of older
/// slots. Needs no key; nobody can take it back. Returns how many blocks were overwritten.
pub fn erase(store: &dyn Store) -> Result<usize, VolumeError> {
    let (front, back) = superblock_places(store)?;
    // Superblocks name older slots, and those at the front say where the others lie: what leads to something goes after it, so that
    // an erasure that a crash interrupts can be done again.
    let mut count = 0;
    for mut blocks in [older_slot_blocks(store)?, back, front] {
        blocks.sort_unstable();
        blocks.dedup();
        for block in &blocks {
            let zeroes = zero_block();
            store.write_at(&zeroes[..], block * BLOCK as u64).map_err(VolumeError::store("be erased"))?;
        }
        store.sync_data().map_err(VolumeError::store("make the erasure durable"))?;
        count += blocks.len();
    }
    Ok(count)
}
