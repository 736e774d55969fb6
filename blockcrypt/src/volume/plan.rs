//! A checkpoint between the moment when it is decided what it holds, and the moment when it is durable or given up.

use super::Core;
use super::durable::Occasion;
use crate::VolumeError;
use crate::backing::Backing;
use crate::format::log::Record;
use crate::format::page::{BITS, CHILDREN, Child, Header, Tree, child, set_child};
use crate::format::slot::{Slot, SlotPage};
use crate::format::snapshot::{Snapshot, SnapshotPage};
use crate::format::superblock::{MAC_AT, Superblock};
use crate::format::{Block, MAC, put};
use crate::space::bitmap;
use crate::tree::{Forest, Halt, PageId, is_blank};
use policy::KeyId;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::ops::Range;
use std::sync::Arc;

/// What a checkpoint writes, and what it did to memory: taken back if it can't be finished.
pub(super) struct Plan {
    /// Leaves first, each with its new place; none where nothing is left of it.
    pages: Vec<Moved>,
    /// Blocks that were taken for pages; and how many of them, from the first, were spare.
    taken: Vec<u64>,
    spare: usize,
    /// Blocks of pages that are free once this is durable.
    pub(super) freed: Vec<u64>,
    /// Lists that changed, and where they go.
    slots: Option<Vec<u64>>,
    snapshots: Option<Vec<u64>>,
    lists: (Vec<Slot>, Vec<Snapshot>),
    /// Records that the map has, in case the log needs them back.
    pending: Vec<Record>,
    /// How many records were appended before.
    pub(super) records: u64,
    /// The superblock; its roots and MAC come when the pages are written.
    pub(super) next: Superblock,
    /// The slot that it goes to.
    pub(super) place: usize,
}

impl Plan {
    /// Blocks that were taken for its pages.
    pub(super) fn taken(&self) -> usize {
        self.taken.len()
    }
}

struct Moved {
    id: PageId,
    to: Option<u64>,
    /// Memory's own until either side changes it.
    bytes: Arc<Block>,
    pointer: Child,
}

/// Where pages go and come from, before anything is changed.
#[derive(Default)]
struct Places {
    /// The new place of each page; none for one that is blank.
    new: BTreeMap<PageId, Option<u64>>,
    slots: Option<Vec<u64>>,
    snapshots: Option<Vec<u64>>,
    /// All of them.
    reserved: Vec<u64>,
    /// Old places that become free.
    freed: Vec<u64>,
}

impl Core {
    /// Decides what a checkpoint holds. Nothing is changed before all that is needed is in memory.
    pub(super) fn freeze(&mut self, from: &Backing, occasion: Occasion) -> Result<Plan, Halt> {
        self.writable()?;
        let (mut places, spare) = (Places::default(), self.space.spare());
        let found = self.find_places(&mut places);
        let spare = spare - self.space.spare();
        if let Err(halt) = found {
            self.space.give_back(&places.reserved, spare);
            return Err(halt);
        }
        // From here on every page is there.
        for block in &places.reserved {
            self.space.take(*block..*block + 1, &mut self.forest)?;
        }
        for block in &places.freed {
            self.space.free_held(*block, &mut self.forest)?;
        }
        let mut pages = Vec::with_capacity(places.new.len());
        for (id, to) in places.new {
            pages.push(Moved { id, to, bytes: self.forest.freeze(id)?, pointer: Child::EMPTY });
        }
        self.epoch += 1;
        self.checkpointing = true;
        let (cut, pending) = self.log.begin_cut();
        let next = Superblock {
            epoch: self.epoch,
            geometry: from.geometry(),
            clean: occasion == Occasion::Closing,
            map: self.forest.root(Tree::Map).child,
            free: self.forest.root(Tree::Free).child,
            cut,
            mapped: self.mapped,
            used: self.space.used(),
            taken: self.snapshots_taken,
            slot: Slot { written: self.written, ..self.superblock.slot.clone() },
            ..self.superblock.clone()
        };
        Ok(Plan {
            pages,
            taken: places.reserved,
            spare,
            freed: places.freed,
            slots: places.slots,
            snapshots: places.snapshots,
            lists: (self.older.clone(), self.snapshots.clone()),
            pending,
            records: self.log.appended,
            next,
            place: 1 - self.place,
        })
    }

    /// Finds a place for every page that changed, for its ancestors, and for the bitmaps that change by that.
    fn find_places(&mut self, places: &mut Places) -> Result<(), Halt> {
        let mut pages: BTreeSet<PageId> = self.forest.dirty_pages().collect();
        for id in pages.clone() {
            self.add_ancestors(id, &mut pages)?;
        }
        self.find_blank(&pages, places)?;
        if self.slots_changed {
            let count = self.older.len().div_ceil(SlotPage::CAPACITY);
            places.slots = Some(self.reserve_list(count, places)?);
            places.freed.extend(&self.slot_pages);
        }
        if self.snapshots_changed {
            let count = self.snapshots.len().div_ceil(SnapshotPage::CAPACITY);
            places.snapshots = Some(self.reserve_list(count, places)?);
            places.freed.extend(&self.snapshot_pages);
        }
        let mut bitmaps = BTreeSet::new();
        for block in places.reserved.iter().chain(&places.freed) {
            bitmaps.insert(block / BITS as u64);
        }
        loop {
            for index in std::mem::take(&mut bitmaps) {
                if pages.insert(bitmap(index)) {
                    self.forest.page(bitmap(index))?;
                    self.add_ancestors(bitmap(index), &mut pages)?;
                }
            }
            let new: Vec<PageId> = pages.iter().filter(|id| !places.new.contains_key(id)).copied().collect();
            if new.is_empty() {
                return Ok(());
            }
            for id in new {
                let block = self.space.reserve_for_page(&mut self.forest)?;
                places.reserved.push(block);
                places.new.insert(id, Some(block));
                bitmaps.insert(block / BITS as u64);
                bitmaps.extend(self.leave(id, places)?.map(|old| old / BITS as u64));
            }
        }
    }

    fn add_ancestors(&mut self, mut id: PageId, pages: &mut BTreeSet<PageId>) -> Result<(), Halt> {
        while id.level + 1 < self.forest.root(id.tree).levels {
            id = id.parent();
            if !pages.insert(id) {
                // What lies above it is there already, or comes when its turn does.
                return Ok(());
            }
            self.forest.page(id)?;
        }
        Ok(())
    }

    /// Pages of the map that hold nothing any more are not written: all-zero pointers stand for them.
    fn find_blank(&mut self, pages: &BTreeSet<PageId>, places: &mut Places) -> Result<(), Halt> {
        for id in pages.iter().filter(|id| id.tree == Tree::Map) {
            let bytes = &self.forest.page(*id)?.bytes;
            let blank = if id.level == 0 {
                is_blank(bytes)
            } else {
                (0..CHILDREN).all(|i| {
                    let below = PageId { level: id.level - 1, index: id.index * CHILDREN as u64 + i as u64, ..*id };
                    if pages.contains(&below) { places.new.contains_key(&below) } else { child(bytes, i).is_empty() }
                })
            };
            if blank {
                places.new.insert(*id, None);
                self.leave(*id, places)?;
            }
        }
        Ok(())
    }

    /// What becomes of a page's old place; returns it if it becomes free.
    fn leave(&mut self, id: PageId, places: &mut Places) -> Result<Option<u64>, Halt> {
        let page = self.forest.page(id)?;
        let (Some(old), birth) = (page.home, page.birth) else { return Ok(None) };
        if id.tree == Tree::Map && self.page_is_retained(id, birth) {
            return Ok(None);
        }
        places.freed.push(old);
        Ok(Some(old))
    }

    fn reserve_list(&mut self, count: usize, places: &mut Places) -> Result<Vec<u64>, Halt> {
        let mut list = Vec::with_capacity(count);
        for _ in 0..count {
            let block = self.space.reserve_for_page(&mut self.forest)?;
            places.reserved.push(block);
            list.push(block);
        }
        Ok(list)
    }

    /// Takes back what a checkpoint did to memory. Its pages are all there.
    pub(super) fn thaw(&mut self, plan: &mut Plan, from: &Backing) -> Result<(), Halt> {
        let mut undone = Ok(());
        for block in &plan.taken {
            undone = undone.and(self.space.untake(*block, &mut self.forest));
        }
        for block in plan.freed.drain(..) {
            undone = undone.and(self.space.keep(block, &mut self.forest));
        }
        let slots = plan.slots.take().unwrap_or_default();
        let mut spare = std::mem::take(&mut plan.taken);
        spare.truncate(plan.spare);
        spare.retain(|block| !slots.contains(block));
        self.space.spare_again(&spare);
        // These may have been written already.
        for block in slots {
            undone = undone.and(self.space.free_held(block, &mut self.forest));
            self.stale_slots.push(block);
        }
        for page in plan.pages.drain(..) {
            self.forest.thaw(page.id);
        }
        self.checkpointing = false;
        self.log.give_up_cut(std::mem::take(&mut plan.pending));
        undone.map_err(|halt| match halt {
            Halt::Failed(error) => Halt::Failed(self.fail(error, &*from.events)),
            Halt::Missing(_) => Halt::Failed(self.fail(VolumeError::System("page of a checkpoint"), &*from.events)),
        })
    }

    /// Lists that were written are as the superblock says.
    pub(super) fn chains_settled(&mut self, plan: &Plan) {
        if let Some(places) = &plan.slots {
            self.stale_slots.append(&mut self.slot_pages);
            self.slot_pages.clone_from(places);
            self.slots_changed = self.older != plan.lists.0;
        }
        if let Some(places) = &plan.snapshots {
            self.snapshot_pages.clone_from(places);
            for snapshot in self.snapshots.iter_mut().filter(|s| s.epoch == plan.next.epoch) {
                snapshot.root = plan.next.map;
            }
            self.snapshots_changed = self.snapshots != plan.lists.1;
        }
    }

    pub(super) fn lists_changed(&self) -> bool {
        self.slots_changed || self.snapshots_changed
    }
}

impl Plan {
    /// Writes the pages and lists, and MACs the superblock; returns its block. Holds no lock over any of it.
    pub(super) fn write(&mut self, from: &Backing) -> Result<Box<Block>, VolumeError> {
        self.write_trees(from)?;
        if let Some(places) = &self.slots {
            let pages = self.lists.0.chunks(SlotPage::CAPACITY);
            let page = |slots: &[Slot], next| SlotPage { next, slots: slots.to_vec() }.to_block();
            self.next.older = self.write_list(Tree::Slots, places, pages, page, from)?;
        }
        if let Some(places) = &self.snapshots {
            // The root of one that is taken by this very checkpoint is known only now.
            for snapshot in self.lists.1.iter_mut().filter(|s| s.epoch == self.next.epoch) {
                snapshot.root = self.next.map;
            }
            let page = |snapshots: &[Snapshot], next| SnapshotPage { next, snapshots: snapshots.to_vec() }.to_block();
            let pages = self.lists.1.chunks(SnapshotPage::CAPACITY);
            self.next.snapshots = self.write_list(Tree::Snapshots, places, pages, page, from)?;
        }
        let mut block = self.next.to_block();
        self.next.mac = from.with_keys(|_, key| Ok(key.superblock_mac(&block)))?;
        put(&mut block[..], MAC_AT, &self.next.mac);
        Ok(block)
    }

    fn write_trees(&mut self, from: &Backing) -> Result<(), VolumeError> {
        let at: HashMap<PageId, usize> = self.pages.iter().enumerate().map(|(i, page)| (page.id, i)).collect();
        let mut done = 0;
        while let Some(PageId { tree, level, .. }) = self.pages.get(done).map(|page| page.id) {
            let alike = |page: &&Moved| (page.id.tree, page.id.level) == (tree, level);
            let end = done + self.pages[done..].iter().take_while(alike).count();
            self.write_level(done..end, from)?;
            for i in done..end {
                let Moved { id, pointer, .. } = self.pages[i];
                match at.get(&id.parent()) {
                    Some(above) => set_child(Arc::make_mut(&mut self.pages[*above].bytes), id.place(), pointer),
                    None if id.tree == Tree::Map => self.next.map = pointer,
                    None => self.next.free = pointer,
                }
            }
            done = end;
        }
        Ok(())
    }

    /// MACs pages of one level, whose content is final, as one batch, and writes them.
    fn write_level(&mut self, which: Range<usize>, from: &Backing) -> Result<(), VolumeError> {
        let mut headers = Vec::with_capacity(which.len());
        headers.extend(self.pages[which.clone()].iter().map(|page| {
            let PageId { tree, level, index } = page.id;
            self.header(tree, level, index)
        }));
        let pages = &mut self.pages[which];
        from.with_keys(|_, key| {
            for (page, header) in pages.iter_mut().zip(&headers) {
                Header { key: key.id, origin: key.origin, ..*header }.put(Arc::make_mut(&mut page.bytes));
            }
            let bodies: Vec<&Block> = pages.iter().map(|page| &*page.bytes).collect();
            let mut macs = vec![[0; MAC]; bodies.len()];
            key.page_macs(&bodies, &mut macs);
            for ((page, header), mac) in pages.iter_mut().zip(&headers).zip(macs) {
                let place = |physical| Child { physical, birth: header.birth, mac };
                page.pointer = page.to.map_or(Child::EMPTY, place);
            }
            Ok(())
        })?;
        let mut placed: Vec<(u64, &Block)> =
            pages.iter().filter_map(|page| page.to.map(|physical| (physical, &*page.bytes))).collect();
        from.write_scattered(&mut placed)
    }

    /// Writes a list, last page first; returns the pointer to the first.
    fn write_list<'a, T: 'a>(
        &self,
        tree: Tree,
        places: &[u64],
        pages: impl DoubleEndedIterator<Item = &'a [T]> + ExactSizeIterator,
        page: impl Fn(&'a [T], Child) -> Box<Block>,
        from: &Backing,
    ) -> Result<Child, VolumeError> {
        let mut next = Child::EMPTY;
        for (index, (items, place)) in pages.zip(places).enumerate().rev() {
            let header = self.header(tree, 0, index as u64);
            next = write_page(&mut page(items, next), *place, header, from)?;
        }
        Ok(next)
    }

    fn header(&self, tree: Tree, level: u8, index: u64) -> Header {
        let (birth, writer) = (self.next.epoch, self.next.writer.get());
        // Key and origin are the current key's, filled in by whoever has it.
        Header { tree, level, writer, index, birth, key: KeyId(0), origin: self.next.uuid }
    }

    /// Memory learns where its pages lie.
    pub(super) fn settle_pages(&self, forest: &mut Forest, key: KeyId) {
        for page in &self.pages {
            forest.settle(page.id, page.pointer, key);
        }
    }
}

/// MACs a page whose content is final, and writes it.
fn write_page(page: &mut Block, physical: u64, header: Header, from: &Backing) -> Result<Child, VolumeError> {
    let mac = from.with_keys(|_, key| {
        Header { key: key.id, origin: key.origin, ..header }.put(page);
        Ok(key.page_mac(page))
    })?;
    from.write_blocks(physical, &page[..])?;
    Ok(Child { physical, birth: header.birth, mac })
}
