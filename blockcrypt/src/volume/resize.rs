//! A volume that grows while it is used.
//!
//! The pool gets longer, trees get levels above their roots, and the superblock's second copies move to the new end. All of that
//! becomes true with one superblock: before it, the store is only longer than it need be; after it, the blocks that the old
//! copies took are free. A second checkpoint brings the other slot along.

use super::Core;
use super::durable::Occasion;
use super::shared::Shared;
use crate::VolumeError;
use crate::format::BLOCK;
use crate::format::geometry::Geometry;
use crate::format::page::{BITS, Tree};
use crate::space::bitmap;
use crate::tree::Halt;

impl Shared {
    pub(super) fn grow(&self, size: u64) -> Result<(), VolumeError> {
        self.check_writable(0, 0)?;
        let _alone = self.alone()?;
        let group = self.flushing();
        let (from, old) = (&self.backing, self.backing.geometry());
        let found = from.store.len().map_err(VolumeError::store("say its length"))?;
        let new = old.grown(size, found)?;
        if new == old {
            return Ok(());
        }
        self.settle_all(&group)?;
        if found < new.total * BLOCK as u64 {
            from.store.set_len(new.total * BLOCK as u64).map_err(VolumeError::store("be made longer"))?;
        }
        let block = BLOCK as u64;
        let zone = new.zone();
        let reserved = from.store.reserve(zone.start * block, (zone.end - zone.start) * block);
        let reserved =
            reserved.and_then(|()| from.store.reserve(new.pool().end * block, (new.total - new.pool().end) * block));
        reserved.map_err(VolumeError::store("set room aside for pages"))?;
        let grown = self.with_core(|core| core.lengthen(&new)).and_then(|()| {
            from.set_geometry(new);
            self.with_core(|core| core.move_fence(&old, &new))?;
            self.write_checkpoint(&group, Occasion::Running)?;
            self.write_checkpoint(&group, Occasion::Running)
        });
        // Where it fails on its way, memory is the larger volume's already; the next opener finds out what the store is.
        grown.map_err(|error| match self.core() {
            Ok(mut core) => core.fail(error, &*from.events),
            Err(other) => other,
        })?;
        drop(group);
        self.anchoring.after_flush()
    }
}

impl Core {
    fn lengthen(&mut self, new: &Geometry) -> Result<(), Halt> {
        self.writable()?;
        self.space.lengthen(new);
        self.forest.deepen(Tree::Map, new.map_levels)?;
        self.forest.deepen(Tree::Free, new.free_levels)
    }

    /// What lay behind the old end is free, what lies behind the new one is not.
    fn move_fence(&mut self, old: &Geometry, new: &Geometry) -> Result<(), Halt> {
        let bits = BITS as u64;
        let freed = old.pool().end..(old.bitmaps() * bits).min(new.pool().end);
        let fenced = new.pool().end..new.bitmaps() * bits;
        for range in [&freed, &fenced] {
            for index in range.start / bits..range.end.div_ceil(bits) {
                self.forest.page(bitmap(index))?;
            }
        }
        self.space.move_fence(freed, fenced, &mut self.forest)
    }
}
