//! Verifying all of a volume: every page, every tag, and that free space is what the map leaves.

use super::Core;
use super::shared::Shared;
use crate::VolumeError;
use crate::backing::Backing;
use crate::format::anchor::AnchorFields;
use crate::format::page::{CHILDREN, Child, ENTRIES, Entry, Header, Tree, child, entry};
use crate::format::snapshot::Snapshot;
use crate::format::superblock::Superblock;
use crate::format::zero_block;
use crate::keys::same;
use crate::tree::PageId;
use serde::Serialize;
use std::collections::HashSet;

/// What a check says on the way.
#[derive(Clone, Debug)]
pub enum CheckStep {
    /// So many blocks of the guest's are done, of so many.
    Progress {
        /// Done.
        done: u64,
        /// All.
        all: u64,
    },
    /// A block that can't be read.
    Bad {
        /// The 4096-byte block, as the guest counts.
        lba: u64,
        /// Where it should lie, in blocks of the store.
        physical: Option<u64>,
        /// Why.
        reason: &'static str,
    },
    /// Something else that is wrong.
    Problem(String),
}

/// How a check ended.
#[derive(Clone, Default, Debug, Serialize)]
pub struct CheckReport {
    /// Blocks that hold data, all looked at.
    pub data_blocks: u64,
    /// Pages of the trees, all verified.
    pub pages: u64,
    /// Blocks of data that can't be read or do not verify.
    pub bad_blocks: u64,
    /// Pages that can't be read or do not verify, and contradictions between map and free space.
    pub problems: u64,
    /// Blocks that free space calls used and nothing uses: harmless. None are told where part of the trees could not be looked at.
    pub leaked_blocks: u64,
}

impl CheckReport {
    /// Whether everything is as it should be.
    pub fn good(&self) -> bool {
        self.bad_blocks == 0 && self.problems == 0
    }
}

struct Check<'a> {
    core: &'a mut Core,
    from: &'a Backing,
    heard: &'a mut dyn FnMut(CheckStep),
    report: CheckReport,
    /// Pages that only memory has, and their ancestors: a replayed log's.
    fresh: HashSet<PageId>,
    /// Where their durable versions lie: snapshots may hold those.
    former: HashSet<u64>,
    /// One bit for each block of the store that something points to.
    used: Vec<u64>,
    /// Part of what points to them, or calls them used, could not be looked at.
    blind: bool,
}

/// Why a block of data is bad.
struct Reasons {
    wrong: &'static str,
    unreadable: &'static str,
}

const OF_THE_VOLUME: Reasons = Reasons { wrong: "its tag does not verify", unreadable: "the store can't read it" };
const OF_A_SNAPSHOT: Reasons =
    Reasons { wrong: "its tag does not verify, in a snapshot", unreadable: "the store can't read it, in a snapshot" };

/// The check holds the volume's lock: no request is served meanwhile.
pub(super) fn check(shared: &Shared, heard: &mut dyn FnMut(CheckStep)) -> Result<CheckReport, VolumeError> {
    let _alone = shared.alone_anyway();
    let _group = shared.flushing()?;
    let mut core = shared.core()?;
    shared.ready()?;
    let from = &shared.backing;
    let words = usize::try_from(from.geometry().total.div_ceil(64)).map_err(|_| VolumeError::System("memory"))?;
    let fresh = fresh_pages(&core);
    let mut check = Check {
        core: &mut core,
        from,
        heard,
        report: CheckReport::default(),
        fresh,
        former: HashSet::new(),
        used: vec![0; words],
        blind: false,
    };
    if check.core.is_snapshot {
        // What else there is belongs to the volume.
        let top = check.core.forest.root(Tree::Map).levels - 1;
        check.walk(PageId { tree: Tree::Map, level: top, index: 0 })?;
        return Ok(check.report);
    }
    for tree in [Tree::Map, Tree::Free] {
        let top = check.core.forest.root(tree).levels - 1;
        check.walk(PageId { tree, level: top, index: 0 })?;
    }
    for page in [check.core.slot_pages.clone(), check.core.snapshot_pages.clone()].concat() {
        check.claim(page, "a page of a list");
    }
    if let Some(why) = check.core.unlisted.as_ref().map(|(_, why)| why.to_string()) {
        check.blind = true;
        check.told_problem(format!("the list of snapshots can't be read: {why}; what they hold was not looked at"));
    }
    check.walk_snapshots()?;
    check.compare_free_space()?;
    // After a crash in the middle of writing one, also a close's, the other copy is what was there before: the next opener writes
    // both. Both were durable before the anchor that names it was sent.
    let anchored =
        shared.anchoring.kept().is_some_and(|anchor| check.core.superblock.is_named_by(&AnchorFields::read(&anchor)));
    if !shared.read_only || anchored {
        check.compare_superblocks()?;
    }
    Ok(check.report)
}

fn fresh_pages(core: &Core) -> HashSet<PageId> {
    let mut fresh = HashSet::new();
    for mut id in core.forest.dirty_pages() {
        let levels = core.forest.root(id.tree).levels;
        fresh.insert(id);
        while id.level + 1 < levels {
            id = id.parent();
            fresh.insert(id);
        }
    }
    fresh
}

impl Check<'_> {
    fn problem(&mut self, text: String) {
        self.from.events.integrity(None, None, &text);
        self.told_problem(text);
    }

    /// As [`problem`](Self::problem), of what the audit log has heard of already.
    fn told_problem(&mut self, text: String) {
        self.report.problems += 1;
        (self.heard)(CheckStep::Problem(text));
    }

    /// Notes that something lies in `block`.
    fn claim(&mut self, block: u64, what: &str) {
        if !self.from.in_pool(block) {
            return self.problem(format!("{what} lies outside the pool, in block {block}"));
        }
        let (word, bit) = ((block / 64) as usize, 1 << (block % 64));
        if self.used[word] & bit != 0 {
            self.problem(format!("{what} lies in block {block}, which something else uses too"));
        }
        self.used[word] |= bit;
    }

    /// Goes on without a page, and says what was not looked at for that. An error that is not the page's is the end.
    fn pass_over(&mut self, page: &str, id: PageId, error: VolumeError) -> Result<(), VolumeError> {
        let why = match error {
            VolumeError::Store(_, why) => format!("can't be read: {why}"),
            VolumeError::Damaged(why) => format!("is damaged: {why}"),
            other => return Err(other),
        };
        self.blind = true;
        let unseen = if id.tree == Tree::Map {
            let blocks = id.blocks();
            let last = blocks.end.min(self.from.geometry().blocks()).saturating_sub(1);
            format!("blocks {} to {last} were not looked at", blocks.start.min(last))
        } else {
            "which blocks of the store it calls free was not looked at".to_owned()
        };
        self.told_problem(format!("{page} {why}; {unseen}"));
        Ok(())
    }

    /// A page and what hangs from it. A page that fails is a problem, not the end.
    fn walk(&mut self, id: PageId) -> Result<(), VolumeError> {
        let (home, bytes) = match self.core.run(self.from, |c| c.forest.page(id).map(|p| (p.home, p.bytes.clone()))) {
            Ok(page) => page,
            Err(error) => {
                let at = self.core.run(self.from, |c| c.forest.pointer(id))?.physical;
                let tree = if id.tree == Tree::Map { "map" } else { "free-space map" };
                self.pass_over(&format!("the page of the {tree} in block {at} of the store"), id, error)?;
                if id.tree == Tree::Map {
                    self.progress(id.blocks().end);
                }
                return Ok(());
            }
        };
        self.report.pages += u64::from(home.is_some());
        if let Some(home) = home {
            self.claim(home, "a page");
            if self.fresh.contains(&id) {
                self.former.insert(home);
            }
        }
        if id.level > 0 {
            for i in 0..CHILDREN {
                let below = PageId { level: id.level - 1, index: id.index * CHILDREN as u64 + i as u64, ..id };
                if !child(&bytes, i).is_empty() || self.fresh.contains(&below) {
                    self.walk(below)?;
                }
            }
        } else if id.tree == Tree::Map {
            self.read_leaf(id.index, &bytes)?;
        }
        Ok(())
    }

    fn read_leaf(&mut self, index: u64, bytes: &crate::format::Block) -> Result<(), VolumeError> {
        let first = index * ENTRIES as u64;
        let named: Vec<(u64, Entry)> =
            (first..).zip((0..ENTRIES).map(|i| entry(bytes, i))).filter(|(_, entry)| entry.physical != 0).collect();
        for ((lba, entry), held) in named.iter().zip(self.look_at(&named)?) {
            self.report.data_blocks += 1;
            if *lba >= self.from.geometry().blocks() {
                self.problem(format!("block {lba} lies behind the volume's end, and holds something"));
            }
            let Some(physical) = entry.data() else {
                self.bad(*lba, None, "a recovery found its data gone");
                continue;
            };
            self.claim(physical, "data");
            self.judge(*lba, physical, held, &OF_THE_VOLUME);
        }
        self.progress(first + ENTRIES as u64);
        Ok(())
    }

    fn progress(&mut self, done: u64) {
        let all = self.from.geometry().blocks();
        (self.heard)(CheckStep::Progress { done: all.min(done), all });
    }

    /// What snapshots hold beside the volume.
    fn walk_snapshots(&mut self) -> Result<(), VolumeError> {
        for snapshot in self.core.snapshots.clone() {
            let top = PageId { tree: Tree::Map, level: snapshot.levels - 1, index: 0 };
            self.walk_snapshot(&snapshot, top, snapshot.root)?;
        }
        Ok(())
    }

    /// A page of a snapshot. One that was seen already is shared, and with it all that hangs from it.
    fn walk_snapshot(&mut self, snapshot: &Snapshot, id: PageId, pointer: Child) -> Result<(), VolumeError> {
        let gone = snapshot.dying.unwrap_or(0);
        let former = self.former.remove(&pointer.physical);
        if pointer.is_empty() || super::end_of(id) <= gone || (self.is_used(pointer.physical) && !former) {
            return Ok(());
        }
        if !former {
            self.claim(pointer.physical, "a page of a snapshot");
        }
        let expected = |h: &Header| h.tree == id.tree && h.level == id.level && h.index == id.index;
        let bytes = match self.from.read_page(&pointer, expected) {
            Ok(bytes) => bytes,
            Err(error) => {
                let error = self.from.bad_page(Some(id), &pointer, error);
                let page =
                    format!("snapshot {}: the page of its map in block {} of the store", snapshot.id, pointer.physical);
                return self.pass_over(&page, id, error);
            }
        };
        self.report.pages += u64::from(!former);
        if id.level > 0 {
            for i in 0..CHILDREN {
                let below = PageId { level: id.level - 1, index: id.index * CHILDREN as u64 + i as u64, ..id };
                self.walk_snapshot(snapshot, below, child(&bytes, i))?;
            }
            return Ok(());
        }
        let first = id.index * ENTRIES as u64;
        let own = |(lba, entry): &(u64, Entry)| *lba >= gone && entry.data().is_some_and(|block| !self.is_used(block));
        let named: Vec<(u64, Entry)> = (first..).zip((0..ENTRIES).map(|i| entry(&bytes, i))).filter(own).collect();
        for ((lba, entry), held) in named.iter().zip(self.look_at(&named)?) {
            self.report.data_blocks += 1;
            self.claim(entry.physical, "data of a snapshot");
            self.judge(*lba, entry.physical, held, &OF_A_SNAPSHOT);
        }
        Ok(())
    }

    fn is_used(&self, block: u64) -> bool {
        self.from.in_pool(block) && self.used[(block / 64) as usize] & (1 << (block % 64)) != 0
    }

    /// Of each block and entry, whether its data is there, or nothing where the store can't read it. Where it can't read one, each is looked
    /// at alone, twice.
    fn look_at(&self, named: &[(u64, Entry)]) -> Result<Vec<Option<bool>>, VolumeError> {
        match self.from.held(named) {
            Ok(held) => return Ok(held.into_iter().map(Some).collect()),
            Err(VolumeError::Store(..)) => {}
            Err(other) => return Err(other),
        }
        let look = |one: &(u64, Entry)| match self.from.held(std::slice::from_ref(one)) {
            Ok(held) => Ok(held.first().copied()),
            Err(VolumeError::Store(..)) => Ok(None),
            Err(other) => Err(other),
        };
        named
            .iter()
            .map(|one| look(one).and_then(|held| held.map_or_else(|| look(one), |held| Ok(Some(held)))))
            .collect()
    }

    fn judge(&mut self, lba: u64, physical: u64, held: Option<bool>, reasons: &Reasons) {
        match held {
            Some(true) => {}
            Some(false) => self.bad(lba, Some(physical), reasons.wrong),
            None => self.told_bad(lba, Some(physical), reasons.unreadable),
        }
    }

    fn bad(&mut self, lba: u64, physical: Option<u64>, reason: &'static str) {
        self.from.events.integrity(Some(lba), physical, reason);
        self.told_bad(lba, physical, reason);
    }

    /// As [`bad`](Self::bad), of what is no matter for the audit log: a disk that can't read is no tamperer.
    fn told_bad(&mut self, lba: u64, physical: Option<u64>, reason: &'static str) {
        self.report.bad_blocks += 1;
        (self.heard)(CheckStep::Bad { lba, physical, reason });
    }

    /// Both copies of the newest superblock must be there.
    fn compare_superblocks(&mut self) -> Result<(), VolumeError> {
        for at in self.from.geometry().superblocks(self.core.place) {
            let looked = match self.is_newest_superblock(at) {
                Ok(true) => continue,
                // Read twice before it is given up.
                _ => self.is_newest_superblock(at),
            };
            match looked {
                Ok(true) => {}
                Ok(false) => {
                    let text = format!("the copy of the superblock in block {at} does not verify");
                    self.from.events.integrity(None, Some(at), &text);
                    self.told_problem(text);
                }
                // A disk that can't read is no tamperer.
                Err(VolumeError::Store(_, why)) => {
                    self.told_problem(format!("the copy of the superblock in block {at} can't be read: {why}"));
                }
                Err(other) => return Err(other),
            }
        }
        Ok(())
    }

    fn is_newest_superblock(&self, at: u64) -> Result<bool, VolumeError> {
        let mut block = zero_block();
        self.from.read_blocks(at, &mut block[..])?;
        let newest = &self.core.superblock;
        let mac = self.from.with_keys(|ring, _| Ok(ring.find(newest.key()).map(|key| key.superblock_mac(&block))))?;
        let found = Superblock::parse(&block).ok().filter(|found| found.epoch == newest.epoch);
        Ok(found.zip(mac).is_some_and(|(found, mac)| same(&found.mac, &mac)))
    }

    /// Every block in use must be called used.
    fn compare_free_space(&mut self) -> Result<(), VolumeError> {
        let bits = crate::format::page::BITS as u64;
        for index in 0..self.from.geometry().bitmaps() {
            let id = crate::space::bitmap(index);
            let page = match self.core.run(self.from, |c| c.forest.page(id).map(|p| p.bytes.clone())) {
                Ok(page) => page,
                // Named by the walk already.
                Err(VolumeError::Damaged(_) | VolumeError::Store(..)) => continue,
                Err(other) => return Err(other),
            };
            let pool = self.from.geometry().pool();
            for block in (index * bits).max(pool.start)..((index + 1) * bits).min(pool.end) {
                let used = self.used[(block / 64) as usize] & (1 << (block % 64)) != 0;
                let called_used = crate::format::page::bit(&page, (block % bits) as usize);
                match (used, called_used) {
                    (true, false) => self.problem(format!("block {block} is in use, but called free")),
                    (false, true) => self.report.leaked_blocks += u64::from(!self.blind),
                    _ => {}
                }
            }
        }
        let in_use: u64 = self.used.iter().map(|word| u64::from(word.count_ones())).sum();
        let (called, counted) = (in_use + self.report.leaked_blocks, self.core.space.used());
        if self.report.good() && called != counted {
            self.problem(format!("{called} blocks are called used, but {counted} are counted"));
        }
        Ok(())
    }
}
