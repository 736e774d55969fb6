//! The two trees of a volume, page by page, as memory has them: cached within a bound, changed in place, written by checkpoints.
//!
//! Nothing here reads the store. What an operation needs and memory does not have is named by [`Halt::Missing`]; whoever holds
//! the lock lets go of it, fetches and verifies that page, and tries again. So no lock is held over a read, and an operation
//! must ask for all its pages before it changes the first. Nothing is let go within one try.

use crate::VolumeError;
use crate::format::page::{CHILDREN, Child, ENTRIES, Entry, Header, Tree, child, set_child};
use crate::format::{Block, zero_block};
use policy::KeyId;
use std::collections::{BTreeSet, HashMap, HashSet};
use std::hash::{BuildHasher, Hash, Hasher, RandomState};
use std::ops::Range;
use std::sync::Arc;

/// Fewest clean pages kept, whatever the bound: what one operation needs at once.
const FEWEST: usize = 512;

/// Clean pages that a checkpoint may need for each page that changed: its ancestors, the bitmaps of its old and new place, and
/// theirs.
const NEEDED: usize = 8;

/// Which page.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(crate) struct PageId {
    pub(crate) tree: Tree,
    pub(crate) level: u8,
    pub(crate) index: u64,
}

/// All in one word: pages are looked up several times for each block that is written.
impl Hash for PageId {
    fn hash<H: Hasher>(&self, state: &mut H) {
        state.write_u64(self.index << 8 | u64::from(self.level) << 1 | u64::from(self.tree == Tree::Map));
    }
}

/// A hash of one word that costs a multiplication: pages are looked up so often that SipHash took a twentieth of a write's time. Its
/// seed is a secret, so that no guest can choose blocks whose pages collide.
#[derive(Clone, Copy)]
struct Mixed(u64);

impl Mixed {
    fn seeded() -> Self {
        Self(RandomState::new().hash_one(0))
    }
}

impl BuildHasher for Mixed {
    type Hasher = Self;

    fn build_hasher(&self) -> Self {
        *self
    }
}

impl Hasher for Mixed {
    fn write(&mut self, bytes: &[u8]) {
        bytes.iter().for_each(|byte| self.write_u64(u64::from(*byte)));
    }

    fn write_u64(&mut self, word: u64) {
        // An odd number with no pattern: 2^64 by the golden ratio.
        let product = u128::from(word ^ self.0) * 0x9e37_79b9_7f4a_7c15;
        self.0 = product as u64 ^ (product >> 64) as u64;
    }

    fn finish(&self) -> u64 {
        self.0
    }
}

impl PageId {
    /// The page above.
    pub(crate) fn parent(self) -> Self {
        Self { level: self.level + 1, index: self.index / CHILDREN as u64, ..self }
    }

    /// Of a page of the map: the logical blocks that it describes.
    pub(crate) fn blocks(self) -> Range<u64> {
        let leaves = self.leaves();
        leaves.start.saturating_mul(ENTRIES as u64)..leaves.end.saturating_mul(ENTRIES as u64)
    }

    /// The leaves that hang from it, or itself.
    pub(crate) fn leaves(self) -> Range<u64> {
        let each = (CHILDREN as u64).saturating_pow(u32::from(self.level));
        self.index.saturating_mul(each)..(self.index + 1).saturating_mul(each)
    }

    /// Which child of the page above it is.
    pub(crate) fn place(self) -> usize {
        (self.index % CHILDREN as u64) as usize
    }
}

/// A page in memory.
pub(crate) struct Page {
    /// Shared with the checkpoint that is writing it, until it is changed again.
    pub(crate) bytes: Arc<Block>,
    /// The block of the store that holds its durable version; none where it is new.
    pub(crate) home: Option<u64>,
    /// The epoch of that version.
    pub(crate) birth: u64,
    /// The key that authenticates it.
    pub(crate) key: KeyId,
    /// Newer than its durable version, and than what a checkpoint is writing: one of the forest's dirty pages.
    dirty: bool,
    /// A checkpoint is writing it.
    pinned: bool,
    used: u64,
}

/// Why an operation on memory stopped.
pub(crate) enum Halt {
    /// A page is needed first.
    Missing(Missing),
    /// It can't be done.
    Failed(VolumeError),
}

/// A page that memory does not have.
#[derive(Clone, Copy)]
pub(crate) struct Missing {
    pub(crate) id: PageId,
    /// What points to it.
    pub(crate) pointer: Child,
}

impl From<VolumeError> for Halt {
    fn from(error: VolumeError) -> Self {
        Self::Failed(error)
    }
}

/// Both trees.
pub(crate) struct Forest {
    pages: HashMap<PageId, Page, Mixed>,
    map: Root,
    free: Root,
    dirty: BTreeSet<PageId>,
    pinned: BTreeSet<PageId>,
    clock: u64,
    /// Clean pages kept at most.
    bound: usize,
}

/// Where a tree begins.
#[derive(Clone, Copy)]
pub(crate) struct Root {
    pub(crate) child: Child,
    pub(crate) levels: u8,
}

impl Forest {
    /// Trees of which at most `bound` clean pages are kept.
    pub(crate) fn new(map: Root, free: Root, bound: usize) -> Self {
        let pages = HashMap::with_hasher(Mixed::seeded());
        Self { pages, map, free, dirty: BTreeSet::new(), pinned: BTreeSet::new(), clock: 0, bound: bound.max(FEWEST) }
    }

    /// Clean pages kept at most.
    pub(crate) fn bound(&self) -> usize {
        self.bound
    }

    pub(crate) fn root(&self, tree: Tree) -> Root {
        if tree == Tree::Map { self.map } else { self.free }
    }

    /// Both roots: the map's, and that of free space.
    pub(crate) fn roots(&self) -> [Root; 2] {
        [self.map, self.free]
    }

    fn root_mut(&mut self, tree: Tree) -> &mut Root {
        if tree == Tree::Map { &mut self.map } else { &mut self.free }
    }

    /// How many pages are newer than what is durable or being written.
    pub(crate) fn dirty(&self) -> usize {
        self.dirty.len()
    }

    /// How many pages of the map a checkpoint would write: those that are dirty, and what lies above them.
    pub(crate) fn map_pages_to_write(&self) -> u64 {
        let mut pages = HashSet::new();
        for mut id in self.dirty_pages().filter(|id| id.tree == Tree::Map) {
            while pages.insert(id) && id.level + 1 < self.map.levels {
                id = id.parent();
            }
        }
        pages.len() as u64
    }

    /// These pages, leaves first.
    pub(crate) fn dirty_pages(&self) -> impl Iterator<Item = PageId> {
        self.dirty.iter().copied()
    }

    /// The page, to be read.
    pub(crate) fn page(&mut self, id: PageId) -> Result<&Page, Halt> {
        self.load(id).map(|p| &*p)
    }

    /// The page, to be read, if there is one: nothing is made of what is empty.
    pub(crate) fn peek(&mut self, id: PageId) -> Result<Option<&Page>, Halt> {
        if !self.pages.contains_key(&id) {
            let root = self.root(id.tree);
            let pointer = if id.level + 1 == root.levels {
                // A reader may come with a block of a size that growth has just given up: there is nothing.
                if id.index == 0 { root.child } else { Child::EMPTY }
            } else {
                self.peek(id.parent())?.map_or(Child::EMPTY, |above| child(&above.bytes, id.place()))
            };
            if pointer.is_empty() {
                return Ok(None);
            }
            return Err(Halt::Missing(Missing { id, pointer }));
        }
        self.clock += 1;
        let page = self.pages.get_mut(&id).ok_or(VolumeError::System("page just found"))?;
        page.used = self.clock;
        Ok(Some(page))
    }

    /// The page's bytes, to be changed: it is dirty from now on.
    pub(crate) fn page_mut(&mut self, id: PageId) -> Result<&mut Block, Halt> {
        self.load(id)?;
        let page = self.pages.get_mut(&id).ok_or(VolumeError::System("page just loaded"))?;
        if !page.dirty {
            page.dirty = true;
            self.dirty.insert(id);
        }
        Ok(Arc::make_mut(&mut page.bytes))
    }

    /// What points to the page in the durable tree.
    pub(crate) fn pointer(&mut self, id: PageId) -> Result<Child, Halt> {
        let root = self.root(id.tree);
        if id.level + 1 == root.levels {
            return Ok(root.child);
        }
        Ok(child(&self.load(id.parent())?.bytes, id.place()))
    }

    fn load(&mut self, id: PageId) -> Result<&mut Page, Halt> {
        self.clock += 1;
        let clock = self.clock;
        if !self.pages.contains_key(&id) {
            let pointer = self.pointer(id)?;
            if !pointer.is_empty() {
                return Err(Halt::Missing(Missing { id, pointer }));
            }
            self.pages.insert(id, Page::new(zero_block(), None));
        }
        let page = self.pages.get_mut(&id).ok_or(VolumeError::System("page just loaded"))?;
        page.used = clock;
        Ok(page)
    }

    /// Takes in a page that was fetched, if it is still what is missing.
    pub(crate) fn insert(&mut self, fetched: Missing, bytes: Box<Block>) {
        self.make_room();
        let Missing { id, pointer } = fetched;
        if !self.pages.contains_key(&id) && self.pointer(id).is_ok_and(|now| now == pointer) {
            self.clock += 1;
            let page = Page { used: self.clock, ..Page::new(bytes, Some(pointer.physical)) };
            self.pages.insert(id, page);
        }
    }

    /// Whether the page is missing still, and what points to it the same.
    pub(crate) fn still_misses(&mut self, missing: &Missing) -> bool {
        !self.pages.contains_key(&missing.id) && self.pointer(missing.id).is_ok_and(|now| now == missing.pointer)
    }

    /// Where there are more than the bound, lets go of the clean pages that were not used for longest, a quarter at a time so that the cost is spread.
    pub(crate) fn make_room(&mut self) {
        let changed = self.dirty.len() + self.pinned.len();
        // A checkpoint needs what lies above each page that changed, and the bitmaps, all at once.
        let bound = self.bound.max(NEEDED * changed);
        if self.pages.len() < bound + changed {
            return;
        }
        let mut times: Vec<u64> = self.pages.values().filter(|p| p.can_go()).map(|p| p.used).collect();
        if times.len() < bound {
            return;
        }
        let (_, &mut limit, _) = times.select_nth_unstable(bound / 4);
        self.pages.retain(|_, p| !p.can_go() || p.used > limit);
    }

    /// The first leaf of `tree` from `index` on that may hold something: what lies between is empty, and was not looked at.
    pub(crate) fn next_leaf(&mut self, tree: Tree, index: u64) -> Result<Option<u64>, Halt> {
        let levels = self.root(tree).levels;
        let end = (CHILDREN as u64).saturating_pow(u32::from(levels) - 1);
        let mut at = index;
        while at < end {
            // From the top down: the first missing subtree says how far to skip.
            let empty = (0..levels).rev().find_map(|level| {
                let leaves = (CHILDREN as u64).saturating_pow(u32::from(level));
                let id = PageId { tree, level, index: at / leaves };
                if self.pages.contains_key(&id) {
                    return None;
                }
                match self.pointer(id) {
                    Ok(pointer) if pointer.is_empty() => Some(Ok((id.index + 1).saturating_mul(leaves))),
                    Ok(_) => None,
                    Err(halt) => Some(Err(halt)),
                }
            });
            let Some(beyond) = empty.transpose()? else { return Ok(Some(at)) };
            let first = PageId { tree, level: 0, index: at };
            let fresh = [&self.dirty, &self.pinned].into_iter().filter_map(|set| set.range(first..).next());
            match fresh.filter(|id| id.tree == tree && id.level == 0).map(|id| id.index).min() {
                Some(fresh) if fresh < beyond => return Ok(Some(fresh)),
                _ => at = beyond,
            }
        }
        Ok(None)
    }

    /// The map is another one from now on, with the same number of levels or fewer, which nodes above its root make up for. All pages
    /// of the map so far must be clean.
    pub(crate) fn replace_map(&mut self, root: Child, levels: u8) -> Result<(), Halt> {
        self.pages.retain(|id, _| id.tree != Tree::Map);
        let wanted = self.map.levels;
        self.map = Root { child: root, levels };
        self.deepen(Tree::Map, wanted)
    }

    /// The map ends behind the first `blocks` blocks, one at least: what lies beyond is unmapped. All pages of the map must be clean.
    pub(crate) fn truncate_map(&mut self, blocks: u64) -> Result<(), Halt> {
        let (levels, last) = (self.map.levels, blocks - 1);
        let leaves = |level| (CHILDREN as u64).saturating_pow(u32::from(level));
        let border = |level| PageId { tree: Tree::Map, level, index: last / ENTRIES as u64 / leaves(level) };
        for level in 0..levels {
            self.peek(border(level))?;
        }
        self.pages.retain(|id, _| id.tree != Tree::Map || id.index <= border(id.level).index);
        for level in 0..levels {
            let kept = match level {
                0 => (last % ENTRIES as u64 + 1) as usize * Entry::SIZE,
                _ => (border(level - 1).place() + 1) * Child::SIZE,
            };
            let beyond = Header::SIZE + kept..;
            let full = |page: &Page| page.bytes[beyond.clone()].iter().any(|b| *b != 0);
            if self.pages.get(&border(level)).is_some_and(full) {
                self.page_mut(border(level))?[beyond].fill(0);
            }
        }
        Ok(())
    }

    /// A tree has so many levels from now on: nodes above its root, until then the leftmost.
    pub(crate) fn deepen(&mut self, tree: Tree, levels: u8) -> Result<(), Halt> {
        let Root { child: root, levels: before } = self.root(tree);
        if levels <= before {
            return Ok(());
        }
        let lower = self.dirty.iter().any(|id| id.tree == tree);
        self.root_mut(tree).levels = levels;
        if root.is_empty() && !lower {
            return Ok(());
        }
        self.root_mut(tree).child = Child::EMPTY;
        for level in (before..levels).rev() {
            let page = self.page_mut(PageId { tree, level, index: 0 })?;
            if level == before {
                set_child(page, 0, root);
            }
        }
        Ok(())
    }

    /// The trees have these roots again, from when all pages were clean: what changed since is forgotten.
    pub(crate) fn go_back(&mut self, [map, free]: [Root; 2]) {
        self.pages.retain(|_, page| page.can_go());
        self.dirty.clear();
        self.pinned.clear();
        (self.map, self.free) = (map, free);
    }

    /// What a checkpoint is to write of a page. From now on changes to it are the next one's. It is not copied here, under the lock.
    pub(crate) fn freeze(&mut self, id: PageId) -> Result<Arc<Block>, Halt> {
        self.load(id)?;
        self.dirty.remove(&id);
        self.pinned.insert(id);
        let page = self.pages.get_mut(&id).ok_or(VolumeError::System("page just loaded"))?;
        (page.dirty, page.pinned) = (false, true);
        Ok(page.bytes.clone())
    }

    /// A checkpoint wrote the page, and `pointer` points to it; an empty one where it holds nothing any more.
    pub(crate) fn settle(&mut self, id: PageId, pointer: Child, key: KeyId) {
        self.pinned.remove(&id);
        if let Some(page) = self.pages.get_mut(&id) {
            page.pinned = false;
            page.home = (!pointer.is_empty()).then_some(pointer.physical);
            (page.birth, page.key) = (pointer.birth, key);
        }
        let above = id.parent();
        if id.level + 1 == self.root(id.tree).levels {
            self.root_mut(id.tree).child = pointer;
        } else if let Some(page) = self.pages.get_mut(&above) {
            set_child(Arc::make_mut(&mut page.bytes), id.place(), pointer);
        }
    }

    /// A checkpoint did not come about: the page is to be written by the next one.
    pub(crate) fn thaw(&mut self, id: PageId) {
        self.pinned.remove(&id);
        if let Some(page) = self.pages.get_mut(&id) {
            (page.dirty, page.pinned) = (true, false);
            self.dirty.insert(id);
        }
    }
}

impl Page {
    fn new(bytes: Box<Block>, home: Option<u64>) -> Self {
        // A page that was fetched has a header that was verified; a new one has none.
        let header = home.and_then(|_| Header::parse(&bytes).ok());
        let (birth, key) = header.map_or((0, KeyId(0)), |header| (header.birth, header.key));
        Self { bytes: bytes.into(), home, birth, key, dirty: false, pinned: false, used: 0 }
    }

    fn can_go(&self) -> bool {
        !self.dirty && !self.pinned
    }
}

/// Whether a page holds nothing behind its header.
pub(crate) fn is_blank(bytes: &Block) -> bool {
    bytes[Header::SIZE..].iter().all(|b| *b == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a store without end would hold where `missing` points: a page all of whose children are there.
    fn fetched(missing: &Missing) -> Box<Block> {
        let mut bytes = zero_block();
        for place in 0..CHILDREN * usize::from(missing.id.level > 0) {
            set_child(&mut bytes, place, Child { physical: 9, birth: 1, mac: [1; 32] });
        }
        bytes
    }

    fn read(forest: &mut Forest, id: PageId) {
        while let Err(halt) = forest.page(id).map(|_| ()) {
            let Halt::Missing(missing) = halt else { panic!("a page can always be had") };
            forest.insert(missing, fetched(&missing));
        }
    }

    #[test]
    fn clean_pages_are_kept_up_to_the_bound_and_changed_ones_all() {
        let root = |levels| Root { child: Child { physical: 9, birth: 1, mac: [1; 32] }, levels };
        let leaf = |index| PageId { tree: Tree::Map, level: 0, index };
        for (asked, bound) in [(0, FEWEST), (3 * FEWEST, 3 * FEWEST)] {
            let mut forest = Forest::new(root(4), root(1), asked);
            let changed = 0..40;
            for index in changed.clone() {
                read(&mut forest, leaf(1_000_000 / 3 + index * 100));
                assert!(forest.page_mut(leaf(1_000_000 / 3 + index * 100)).is_ok());
            }
            for index in 0..10 * bound as u64 {
                read(&mut forest, leaf(index));
                let clean = forest.pages.values().filter(|page| page.can_go()).count();
                assert!(clean <= bound, "{clean} clean pages are kept, of {bound} at most");
                assert!(index < bound as u64 || clean > bound / 2, "{clean} clean pages are kept, of {bound}");
            }
            // What was used last is there, what was changed too.
            assert!(forest.pages.contains_key(&leaf(10 * bound as u64 - 1)) && !forest.pages.contains_key(&leaf(0)));
            assert_eq!(forest.dirty_pages().count(), changed.count());
            assert!(forest.dirty_pages().all(|id| forest.pages.contains_key(&id)));
        }
    }
}
