//! The two trees of a volume, page by page: loaded when asked for, verified from the root down, cached within a bound.

use crate::VolumeError;
use crate::backing::Backing;
use crate::format::Block;
use crate::format::page::{CHILDREN, Child, Header, Tree, child};
use std::collections::HashMap;

/// Clean pages kept: 1 MiB of them.
const CLEAN_PAGES: usize = 256;

/// Which page.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub(crate) struct PageId {
    pub(crate) tree: Tree,
    pub(crate) level: u8,
    pub(crate) index: u64,
}

impl PageId {
    /// The page above.
    pub(crate) fn parent(self) -> Self {
        Self { level: self.level + 1, index: self.index / CHILDREN as u64, ..self }
    }

    /// Which child of the page above it is.
    pub(crate) fn place(self) -> usize {
        (self.index % CHILDREN as u64) as usize
    }
}

/// A page in memory.
pub(crate) struct Page {
    pub(crate) bytes: Box<Block>,
    /// The block of the store that holds its durable version; none where it is new.
    pub(crate) home: Option<u64>,
    dirty: bool,
    used: u64,
}

/// Both trees.
pub(crate) struct Forest {
    pages: HashMap<PageId, Page>,
    map: Root,
    free: Root,
    dirty: usize,
    clock: u64,
}

/// Where a tree begins.
#[derive(Clone, Copy)]
pub(crate) struct Root {
    pub(crate) child: Child,
    pub(crate) levels: u8,
}

impl Forest {
    pub(crate) fn new(map: Root, free: Root) -> Self {
        Self { pages: HashMap::new(), map, free, dirty: 0, clock: 0 }
    }

    pub(crate) fn root(&self, tree: Tree) -> Root {
        if tree == Tree::Map { self.map } else { self.free }
    }

    /// Both roots after a checkpoint, whose pages are clean from now on and lie where `homes` says.
    pub(crate) fn settle(&mut self, map: Child, free: Child, homes: &[(PageId, u64)]) {
        self.map.child = map;
        self.free.child = free;
        for (id, home) in homes {
            if let Some(page) = self.pages.get_mut(id) {
                page.home = Some(*home);
                page.dirty = false;
            }
        }
        self.dirty = self.pages.values().filter(|p| p.dirty).count();
    }

    /// How many pages are newer than their durable version.
    pub(crate) fn dirty(&self) -> usize {
        self.dirty
    }

    /// The dirty pages of a level, in order.
    pub(crate) fn dirty_pages(&self, tree: Tree, level: u8) -> Vec<PageId> {
        let mut ids: Vec<_> = self
            .pages
            .iter()
            .filter(|(id, p)| p.dirty && id.tree == tree && id.level == level)
            .map(|(id, _)| *id)
            .collect();
        ids.sort_unstable();
        ids
    }

    /// The page, to be read.
    pub(crate) fn page(&mut self, id: PageId, from: &Backing) -> Result<&Page, VolumeError> {
        self.load(id, from).map(|p| &*p)
    }

    /// The page, to be written: it is dirty from now on.
    pub(crate) fn page_mut(&mut self, id: PageId, from: &Backing) -> Result<&mut Page, VolumeError> {
        self.load(id, from)?;
        let page = self.pages.get_mut(&id).ok_or(VolumeError::System("page just loaded"))?;
        if !page.dirty {
            page.dirty = true;
            self.dirty += 1;
        }
        Ok(page)
    }

    /// The first leaf of `tree` from `index` on that may hold something: what lies between is empty, and was not read.
    pub(crate) fn next_leaf(&mut self, tree: Tree, index: u64, from: &Backing) -> Result<Option<u64>, VolumeError> {
        let levels = self.root(tree).levels;
        let mut at = index;
        loop {
            // From the top down: the first missing subtree says how far to skip.
            let mut skipped = false;
            for level in (0..levels).rev() {
                let leaves = (CHILDREN as u64).pow(u32::from(level));
                let id = PageId { tree, level, index: at / leaves };
                if !self.pages.contains_key(&id) && self.pointer(id, from)?.is_empty() {
                    let beyond = (id.index + 1).checked_mul(leaves);
                    let fresh = self.dirty_leaf(tree, at);
                    let top = level + 1 == levels;
                    match beyond.filter(|_| !top) {
                        Some(beyond) if fresh.is_none_or(|fresh| fresh >= beyond) => at = beyond,
                        _ => return Ok(fresh),
                    }
                    skipped = true;
                    break;
                }
            }
            if !skipped {
                return Ok(Some(at));
            }
            if at >= (CHILDREN as u64).saturating_pow(u32::from(levels) - 1) {
                return Ok(None);
            }
        }
    }

    /// The first leaf from `index` on that only memory has in its present form.
    fn dirty_leaf(&self, tree: Tree, index: u64) -> Option<u64> {
        let leaves = self.pages.iter().filter(|(id, p)| p.dirty && id.tree == tree && id.level == 0);
        leaves.map(|(id, _)| id.index).filter(|i| *i >= index).min()
    }

    fn load(&mut self, id: PageId, from: &Backing) -> Result<&mut Page, VolumeError> {
        self.clock += 1;
        let clock = self.clock;
        if !self.pages.contains_key(&id) {
            let pointer = self.pointer(id, from)?;
            self.make_room();
            let page = fetch(id, pointer, from)?;
            self.pages.insert(id, page);
        }
        let page = self.pages.get_mut(&id).ok_or(VolumeError::System("page just loaded"))?;
        page.used = clock;
        Ok(page)
    }

    /// What points to the page in the durable tree.
    fn pointer(&mut self, id: PageId, from: &Backing) -> Result<Child, VolumeError> {
        let root = self.root(id.tree);
        if id.level + 1 == root.levels {
            return Ok(root.child);
        }
        Ok(child(&self.load(id.parent(), from)?.bytes, id.place()))
    }

    /// Lets go of the clean pages that were not used for longest, a quarter at a time so that the cost is spread.
    fn make_room(&mut self) {
        let clean = self.pages.len() - self.dirty;
        if clean < CLEAN_PAGES {
            return;
        }
        let mut times: Vec<u64> = self.pages.values().filter(|p| !p.dirty).map(|p| p.used).collect();
        let (_, &mut limit, _) = times.select_nth_unstable(CLEAN_PAGES / 4);
        self.pages.retain(|_, p| p.dirty || p.used > limit);
    }
}

/// Reads and verifies a page; an empty one where nothing points.
fn fetch(id: PageId, pointer: Child, from: &Backing) -> Result<Page, VolumeError> {
    if pointer.is_empty() {
        return Ok(Page { bytes: crate::format::zero_block(), home: None, dirty: false, used: 0 });
    }
    let expected = |h: &Header| h.tree == id.tree && h.level == id.level && h.index == id.index;
    let bytes = from.read_page(&pointer, expected)?;
    Ok(Page { bytes, home: Some(pointer.physical), dirty: false, used: 0 })
}
