//! A volume that grows while it is used, or shrinks while nobody does.
//!
//! **Growth.** The pool gets longer, trees get levels above their roots, and the superblock's second copies move to the new end. All of that
//! becomes true with one superblock: before it, the store is only longer than it need be, and what memory knew of the larger volume is
//! taken back where something fails; after it, the old copies, which hold key slots, are overwritten, and their blocks are free. A second
//! checkpoint brings the other slot along: until then that says where the old end was.
//!
//! Room beyond the size grows in the same way, with a size that stays.
//!
//! **Shrinking.** One superblock has the smaller size, a map that ends there, and a dying snapshot of what the volume held, from which the
//! rest is freed leaf by leaf, as after a revert. The store keeps its length, the map its levels: what is left lies anywhere in the one,
//! and snapshots, which keep their size, may need the other.

use super::Core;
use super::durable::Occasion;
use super::open::lengthen;
use super::reserve::Wants;
use super::shared::Shared;
use crate::VolumeError;
use crate::format::geometry::Geometry;
use crate::format::page::{BITS, ENTRIES, Entry, Tree};
use crate::format::{BLOCK, zero_block};
use crate::space::bitmap;
use crate::tree::{Halt, Root};
use std::ops::Range;

impl Shared {
    pub(super) fn grow(&self, size: u64) -> Result<(), VolumeError> {
        self.lengthen(|_, found| Ok((size, found)))
    }

    pub(super) fn widen(&self, room: u64) -> Result<(), VolumeError> {
        self.lengthen(|old, found| Ok((old.size, found.max(old.with_room(room)? * BLOCK as u64))))
    }

    /// The volume has the size that `plan` says from now on, and all of a store that is as long; it is told how long the store is.
    fn lengthen(
        &self,
        plan: impl FnOnce(&Geometry, u64) -> Result<(u64, u64), VolumeError>,
    ) -> Result<(), VolumeError> {
        self.check_writable(0, 0)?;
        let alone = self.alone()?;
        let group = self.flushing()?;
        let (from, old) = (&self.backing, self.backing.geometry());
        let found = from.store.len().map_err(VolumeError::store("say its length"))?;
        let (size, store) = plan(&old, found)?;
        let new = old.grown(size, store)?;
        if new == old {
            return Ok(());
        }
        self.settle_all(&group)?;
        self.lengthen_store(found, &new)?;
        // They may have been wiped while the store made room.
        from.has_keys()?;
        let roots = self.core()?.forest.roots();
        let grown = self.with_core(|core| core.lengthen(&new)).and_then(|()| {
            from.set_geometry(new);
            self.with_core(|core| core.move_fence(&old, &new))?;
            self.write_checkpoint(&group, Occasion::Running)
        });
        if let Err(error) = grown {
            from.set_geometry(old);
            self.core()?.take_back((&old, &new), roots);
            return Err(error);
        }
        self.core()?.stale_slots.extend(old_end(&old, &new));
        // Of the larger volume too: so that no superblock of the smaller one is needed.
        let second = self.wipe_stale_slots().and_then(|()| self.write_checkpoint(&group, Occasion::Running));
        if let Err(error) = second {
            from.events.note(&format!(
                "the volume is larger; its second superblock follows with the next checkpoint: {error}"
            ));
        }
        // Who waits for the key provider holds up nobody's writes.
        drop((group, alone));
        self.anchoring.after_flush()
    }

    /// The store, which has `found` bytes, is as long as a larger volume needs, and has room for its pages.
    pub(super) fn lengthen_store(&self, found: u64, new: &Geometry) -> Result<(), VolumeError> {
        let (store, block) = (&*self.backing.store, BLOCK as u64);
        if found < new.total * block {
            lengthen(store, new.total * block)?;
        }
        let zone = new.zone();
        let reserved = store.reserve(zone.start * block, (zone.end - zone.start) * block);
        let reserved =
            reserved.and_then(|()| store.reserve(new.pool().end * block, (new.total - new.pool().end) * block));
        reserved.map_err(VolumeError::store("set room aside for pages"))
    }

    /// The caller sees to it that no request is in hand.
    pub(super) fn shrink(
        &self,
        size: u64,
        discard_tail: bool,
        heard: &mut dyn FnMut(u64, u64),
    ) -> Result<(), VolumeError> {
        self.check_writable(0, 0)?;
        let old = self.backing.geometry();
        let new = old.shrunk(size)?;
        if new == old {
            return Ok(());
        }
        // There may be room for one dying snapshot.
        self.finish_deletion(&mut |_, _| {})?;
        let beyond = self.look_beyond(&new)?;
        if !beyond.is_empty() && !discard_tail {
            return Err(VolumeError::DataBeyond { size, bytes: beyond.bytes() });
        }
        if beyond.edge > 0 {
            // What follows the end in its block must be zero, in case the volume grows again.
            let rest = old.size.min(new.blocks() * BLOCK as u64) - size;
            self.write_zeroes(size, rest, false)?;
        }
        {
            let _alone = self.alone()?;
            let group = self.flushing()?;
            self.settle_all(&group)?;
            self.with_core(|core| {
                // Snapshots may hold the pages that the new end cuts.
                core.admit(Wants { data: 0, leaves: 1 }, &self.backing)?;
                core.shorten(&old, &new, &beyond)
            })?;
            self.backing.set_geometry(new);
            if let Err(error) = self.write_checkpoint(&group, Occasion::Running) {
                // Memory is the smaller volume's already; the next opener finds out what the store is.
                return Err(self.core()?.fail(error, &*self.backing.events));
            }
        }
        self.anchoring.after_flush()?;
        let kept = new.blocks();
        let freed = self.finish_deletion(&mut |done, all| heard(done.saturating_sub(kept), all.saturating_sub(kept)));
        if let Err(error) = freed {
            self.backing.events.note(&format!("what lay behind the volume's end is not freed yet: {error}"));
        }
        Ok(())
    }

    /// What the volume holds that it would not with the geometry `new`.
    fn look_beyond(&self, new: &Geometry) -> Result<Beyond, VolumeError> {
        let mut beyond = Beyond::default();
        let end = new.blocks();
        let cut = (new.size % BLOCK as u64) as usize;
        if cut > 0 {
            let mut block = zero_block();
            self.read_blocks(end - 1, std::slice::from_mut(&mut *block))?;
            beyond.edge = block[cut..].iter().filter(|b| **b != 0).count() as u64;
        }
        let entries = ENTRIES as u64;
        let mut index = end / entries;
        while let Some(leaf) = self.with_core(|core| core.forest.next_leaf(Tree::Map, index))? {
            let first = end.max(leaf * entries);
            let mut found = [Entry::UNMAPPED; ENTRIES];
            let found = &mut found[..((leaf + 1) * entries - first) as usize];
            self.with_core(|core| core.lookup(first, found))?;
            beyond.data += found.iter().filter(|entry| entry.data().is_some()).count() as u64;
            beyond.lost += found.iter().filter(|entry| entry.physical == Entry::LOST).count() as u64;
            index = leaf + 1;
        }
        Ok(beyond)
    }
}

/// What lies behind an end.
#[derive(Default)]
struct Beyond {
    /// Bytes other than zero in the block that the end cuts.
    edge: u64,
    /// Blocks that hold data.
    data: u64,
    /// Blocks whose data is gone.
    lost: u64,
}

impl Beyond {
    fn is_empty(&self) -> bool {
        self.bytes() == 0
    }

    fn bytes(&self) -> u64 {
        self.edge + (self.data + self.lost) * BLOCK as u64
    }
}

impl Core {
    pub(super) fn lengthen(&mut self, new: &Geometry) -> Result<(), Halt> {
        self.writable()?;
        self.space.resize(new);
        self.forest.deepen(Tree::Map, new.map_levels)?;
        self.forest.deepen(Tree::Free, new.free_levels)
    }

    /// Takes back what growth did to memory, which was all durable before it: the volume has the geometry `old` and these roots again.
    fn take_back(&mut self, (old, new): (&Geometry, &Geometry), roots: [Root; 2]) {
        self.forest.go_back(roots);
        self.space.let_go(old_end(old, new));
        self.space.resize(old);
    }

    /// Map and space are those of a smaller volume. All pages of the map must be clean.
    fn shorten(&mut self, old: &Geometry, new: &Geometry, beyond: &Beyond) -> Result<(), Halt> {
        self.writable()?;
        if beyond.data + beyond.lost > 0 {
            let root = self.forest.root(Tree::Map);
            self.forest.truncate_map(new.blocks())?;
            let border = new.blocks() / ENTRIES as u64 * ENTRIES as u64;
            self.leave_behind(root, old.size, border, "what the volume was shrunk from");
            self.mapped = self.mapped.saturating_sub(beyond.data);
        }
        self.space.resize(new);
        Ok(())
    }

    /// What lay behind the old end is free, what lies behind the new one is not. Where superblocks lay, nothing else does yet.
    pub(super) fn move_fence(&mut self, old: &Geometry, new: &Geometry) -> Result<(), Halt> {
        let bits = BITS as u64;
        let freed = old.pool().end..(old.bitmaps() * bits).min(new.pool().end);
        let fenced = new.pool().end..new.bitmaps() * bits;
        for range in [&freed, &fenced] {
            for index in range.start / bits..range.end.div_ceil(bits) {
                self.forest.page(bitmap(index))?;
            }
        }
        self.space.move_fence(freed, fenced, &mut self.forest)?;
        old_end(old, new).try_for_each(|block| self.space.free_held(block, &mut self.forest))
    }
}

/// The blocks that held the superblocks at the old end, and hold none of the larger volume's.
pub(super) fn old_end(old: &Geometry, new: &Geometry) -> Range<u64> {
    old.pool().end..old.total.min(new.pool().end)
}
