//! FLUSH and checkpoint: when is it durable?

use super::{CHECKPOINT_EVERY, Core, DIRTY_PAGES, Shared};
use crate::VolumeError;
use crate::backing::Backing;
use crate::format::log::RECORDS;
use crate::format::page::{Child, Header, Tree, set_child};
use crate::format::superblock::{MAC_AT, Superblock};
use crate::format::{BLOCK, put};
use crate::tree::PageId;
use policy::VolumeAnchor;
use std::sync::MutexGuard;
use std::sync::atomic::Ordering;
use std::time::Instant;

/// What a checkpoint is for.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Occasion {
    /// The volume goes on.
    Running,
    /// The opener's first: the pages that it read must stay until this one is anchored.
    Opening,
    /// The last.
    Closing,
}

/// What a checkpoint did to memory so far: undone if it can't be finished.
#[derive(Default)]
struct Plan {
    taken: Vec<u64>,
    freed: Vec<u64>,
    homes: Vec<(PageId, u64)>,
}

impl Shared {
    pub(super) fn flush(&self) -> Result<(), VolumeError> {
        self.ready()?;
        if self.read_only {
            return Ok(());
        }
        let written = {
            let core = self.core()?;
            core.writable()?;
            core.log.appended
        };
        {
            let group = self.flushing();
            // Somebody else's FLUSH may have covered this one while it waited for its turn.
            if self.core()?.log.durable < written {
                self.commit(&group)?;
            }
        }
        self.punch_freed()?;
        self.anchoring.after_flush()
    }

    /// Makes everything written so far durable.
    pub(super) fn commit(&self, _group: &MutexGuard<'_, ()>) -> Result<(), VolumeError> {
        let (records, anchor) = {
            let mut core = self.core()?;
            core.writable()?;
            core.log.commit(&self.backing)?;
            (core.log.appended, core.anchor(&self.backing))
        };
        // Other threads may write meanwhile; what they add is not part of this.
        let synced = self.backing.sync();
        let mut core = self.core()?;
        if let Err(error) = synced {
            // The kernel may have dropped what it could not write: a second fdatasync would succeed and mean nothing.
            return Err(core.fail(error, &*self.backing.events));
        }
        core.log.durable = core.log.durable.max(records);
        core.space.durable(records);
        self.anchoring.durable(anchor);
        Ok(())
    }

    pub(super) fn checkpoint(&self) -> Result<(), VolumeError> {
        self.ready()?;
        if self.read_only {
            return Ok(());
        }
        let _group = self.flushing();
        let mut core = self.core()?;
        if core.log.is_empty() && core.forest.dirty() == 0 {
            return core.writable();
        }
        core.checkpoint(&self.backing, Occasion::Running)?;
        self.anchoring.durable(core.anchor(&self.backing));
        drop(core);
        self.punch_freed()
    }

    /// The housekeeping thread's.
    pub(super) fn timed_checkpoint(&self) {
        let due = self.core().is_ok_and(|core| {
            core.last_checkpoint.elapsed() >= CHECKPOINT_EVERY && !core.log.is_empty() && core.writable().is_ok()
        });
        if due
            && let Err(error) = self.checkpoint()
            && !matches!(error, VolumeError::NoKeys)
        {
            self.backing.events.note(&format!("a checkpoint came to nothing: {error}"));
        }
    }

    pub(super) fn close(&self) -> Result<VolumeAnchor, VolumeError> {
        if self.open().is_err() {
            return self.anchoring.kept().ok_or(VolumeError::Closed);
        }
        if !self.read_only {
            self.backing.has_keys()?;
            self.anchoring.check()?;
            let _group = self.flushing();
            let mut core = self.core()?;
            core.writable()?;
            if !core.superblock.clean || !core.log.is_empty() || core.forest.dirty() > 0 {
                core.checkpoint(&self.backing, Occasion::Closing)?;
                self.anchoring.durable(core.anchor(&self.backing));
            }
            drop(core);
            self.punch_freed()?;
            self.anchoring.keep_now()?;
        }
        self.closed.store(true, Ordering::Release);
        self.anchoring.kept().ok_or(VolumeError::NoAnchor)
    }
}

impl Core {
    /// Whether a checkpoint is due before more is written.
    pub(super) fn wants_checkpoint(&self, from: &Backing) -> bool {
        self.log.wants_checkpoint()
            || self.forest.dirty() >= DIRTY_PAGES
            || self.superblock.clean
            || self.written - self.superblock.slot.written >= unlogged_bound(from)
    }

    /// Writes changed pages to free blocks, then the superblock to the other slot. If the pages can't be written, nothing has
    /// changed and the log goes on; if the superblock can't, the volume takes no more writes.
    pub(super) fn checkpoint(&mut self, from: &Backing, occasion: Occasion) -> Result<(), VolumeError> {
        self.writable()?;
        let mut plan = Plan::default();
        self.epoch += 1;
        let next = match self.write_pages(from, &mut plan) {
            Ok((map, free)) => Superblock {
                epoch: self.epoch,
                clean: occasion == Occasion::Closing,
                map,
                free,
                cut: self.log.head(),
                mapped: self.mapped,
                slot: crate::format::slot::Slot { written: self.written, ..self.superblock.slot.clone() },
                ..self.superblock.clone()
            },
            Err(error) => {
                self.undo(plan, from)?;
                return Err(error);
            }
        };
        let (next, block) = match seal_superblock(next, from) {
            Ok(sealed) => sealed,
            Err(error) => {
                self.undo(plan, from)?;
                return Err(error);
            }
        };
        let place = 1 - self.place;
        if let Err(error) = put_superblock(&block, place, from) {
            return Err(self.fail(error, &*from.events));
        }
        self.place = place;
        self.forest.settle(next.map, next.free, &plan.homes);
        if self.log.sequence == 0 && occasion == Occasion::Opening {
            self.log.chain = from.with_keys(|_, key| Ok(key.log_seed(from.uuid, next.writer.get(), &next.mac)))?;
        }
        self.superblock = next;
        self.log.cut_here();
        if occasion != Occasion::Opening {
            self.space.release_all();
        }
        self.last_checkpoint = Instant::now();
        Ok(())
    }

    /// Writes all dirty pages, leaves first, to new places; returns both roots.
    fn write_pages(&mut self, from: &Backing, plan: &mut Plan) -> Result<(Child, Child), VolumeError> {
        let mut map = self.forest.root(Tree::Map).child;
        for level in 0..self.forest.root(Tree::Map).levels {
            for id in self.forest.dirty_pages(Tree::Map, level) {
                let home = self.move_page(id, from, plan)?;
                self.write_page(id, home, &mut map, from)?;
            }
        }
        // Moving a bitmap page changes bitmaps, so first every page gets its place, and only then are they written.
        while self.move_bitmaps(from, plan)? {}
        let mut free = self.forest.root(Tree::Free).child;
        let homes: std::collections::HashMap<PageId, u64> = plan.homes.iter().copied().collect();
        for level in 0..self.forest.root(Tree::Free).levels {
            for id in self.forest.dirty_pages(Tree::Free, level) {
                let home = *homes.get(&id).ok_or(VolumeError::System("place for a bitmap"))?;
                self.write_page(id, home, &mut free, from)?;
            }
        }
        Ok((map, free))
    }

    /// Gives each dirty page of the free-space tree and its ancestors a new place; whether there was any without one.
    fn move_bitmaps(&mut self, from: &Backing, plan: &mut Plan) -> Result<bool, VolumeError> {
        let moved: std::collections::HashSet<PageId> = plan.homes.iter().map(|(id, _)| *id).collect();
        let levels = self.forest.root(Tree::Free).levels;
        let mut any = false;
        for level in 0..levels {
            for id in self.forest.dirty_pages(Tree::Free, level) {
                if moved.contains(&id) {
                    continue;
                }
                self.move_page(id, from, plan)?;
                if level + 1 < levels {
                    self.forest.page_mut(id.parent(), from)?;
                }
                any = true;
            }
        }
        Ok(any)
    }

    /// Gives a page a new place and frees its old one.
    fn move_page(&mut self, id: PageId, from: &Backing, plan: &mut Plan) -> Result<u64, VolumeError> {
        let old = self.forest.page(id, from)?.home;
        let near = old.or(plan.taken.last().copied()).unwrap_or(from.geometry.pool().start);
        let new = self.space.allocate(near, 1, &mut self.forest, from)?.start;
        plan.taken.push(new);
        plan.homes.push((id, new));
        if let Some(old) = old {
            self.space.free_held(old, &mut self.forest, from)?;
            plan.freed.push(old);
        }
        Ok(new)
    }

    /// Writes a page whose content is final, and points its parent (or the root) at it.
    fn write_page(&mut self, id: PageId, home: u64, root: &mut Child, from: &Backing) -> Result<(), VolumeError> {
        let (birth, writer) = (self.epoch, self.superblock.writer.get());
        let page = self.forest.page_mut(id, from)?;
        let mac = from.with_keys(|_, key| {
            let PageId { tree, level, index } = id;
            Header { tree, level, writer, index, birth, key: key.id, origin: key.origin }.put(&mut page.bytes);
            Ok(key.page_mac(&page.bytes))
        })?;
        from.write_blocks(home, &page.bytes[..])?;
        let pointer = Child { physical: home, birth, mac };
        if id.level + 1 == self.forest.root(id.tree).levels {
            *root = pointer;
        } else {
            set_child(&mut self.forest.page_mut(id.parent(), from)?.bytes, id.place(), pointer);
        }
        Ok(())
    }

    /// Takes back what a checkpoint did to free space. The pages it touched are dirty, hence in memory.
    fn undo(&mut self, plan: Plan, from: &Backing) -> Result<(), VolumeError> {
        let mut undone = Ok(());
        for block in plan.taken {
            undone = undone.and(self.space.mark(block..block + 1, false, &mut self.forest, from));
        }
        for block in plan.freed {
            undone = undone.and(self.space.keep(block, &mut self.forest, from));
        }
        undone.map_err(|error| self.fail(error, &*from.events))
    }
}

/// Writes between two superblocks, at most: what a crash may leave uncounted under a key.
pub(super) fn unlogged_bound(from: &Backing) -> u64 {
    from.geometry.log_blocks * RECORDS as u64
}

/// MACs a superblock.
fn seal_superblock(mut next: Superblock, from: &Backing) -> Result<(Superblock, Box<[u8; BLOCK]>), VolumeError> {
    let mut block = next.to_block();
    next.mac = from.with_keys(|_, key| Ok(key.superblock_mac(&block)))?;
    put(&mut block[..], MAC_AT, &next.mac);
    Ok((next, block))
}

/// Everything before it durable, then both copies of the superblock, then these.
fn put_superblock(block: &[u8; BLOCK], place: usize, from: &Backing) -> Result<(), VolumeError> {
    from.sync()?;
    for at in from.geometry.superblocks(place) {
        from.write_blocks(at, block)?;
    }
    from.sync()
}
