//! Snapshots: retained roots of the map.
//!
//! A snapshot is taken by a checkpoint, whose map it keeps. What it reaches is told by age: of the blocks that the volume stops
//! using, those that were there when a snapshot was taken stay, all others are free. That holds because history is a line: a
//! volume goes back to its newest snapshot only.
//!
//! A snapshot that goes, goes leaf by leaf: what neither its older neighbour (by age) nor its newer one, or the volume (by
//! comparison), has is freed. Each step is a checkpoint, which says how far it came; what was visited does not count as reached any
//! more, and a crash costs nothing but time. Going back to a snapshot makes a dying snapshot of what the volume held.
//!
//! Where a page of the map is damaged, what hangs from it is passed over, and stays in use.
//!
//! All this meets no request that changes something: it waits for those in hand and keeps others waiting, a step at a time.

use super::durable::Occasion;
use super::reserve::Wants;
use super::shared::Shared;
use super::{Core, end_of};
use crate::VolumeError;
use crate::format::page::{BITS, CHILDREN, Child, ENTRIES, Entry, Header, Tree, child, entry};
use crate::format::snapshot::{MAX_PAGES, Snapshot, SnapshotPage, is_name};
use crate::format::{BLOCK, Block};
use crate::space::bitmap;
use crate::tree::Root;
use crate::tree::{Halt, PageId};
use serde::Serialize;
use std::io;
use std::sync::MutexGuard;
use std::time::{Duration, SystemTime};

/// Leaves visited in one step.
const STEP: usize = 256;
/// Between two steps.
const GAP: Duration = Duration::from_millis(2);
/// Snapshots that a volume has room for; one more is what it goes back from.
const MOST: usize = MAX_PAGES * SnapshotPage::CAPACITY - 1;

/// A snapshot, as people see it.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct SnapshotInfo {
    /// Its number, never used again for this volume.
    pub id: u64,
    /// Its name.
    pub name: String,
    /// When it was taken, in Unix seconds, as the host's clock had it.
    pub time: u64,
    /// The volume's size then, in bytes.
    pub size: u64,
    /// Bytes that hold data in it.
    pub mapped: u64,
    /// It is being deleted, and can't be opened any more.
    pub deleting: bool,
}

/// What a step of a deletion found.
struct Walk {
    /// The dying one, its older and newer neighbours.
    dying: Snapshot,
    older: Option<Snapshot>,
    newer: Option<Snapshot>,
    /// Blocks that nobody else has.
    free: Vec<u64>,
    position: u64,
    budget: usize,
    /// Pages whose subtrees were passed over.
    passed_over: usize,
}

impl Shared {
    pub(super) fn take_snapshot(&self, name: &str) -> Result<u64, VolumeError> {
        self.check_writable(0, 0)?;
        if !is_name(name.as_bytes()) {
            return Err(VolumeError::SnapshotName);
        }
        let alone = self.alone()?;
        let group = self.flushing()?;
        // It keeps the map as it is, which takes nothing yet; but where nothing could be changed beside it, none is taken.
        let admit = || self.with_core(|core| core.admit(Wants { data: 0, leaves: 1 }, &self.backing));
        if admit().is_err() {
            self.settle_all(&group)?;
            admit()?;
        }
        let id = self.core()?.add_snapshot(name, self.backing.geometry().size)?;
        if let Err(error) = self.write_checkpoint(&group, Occasion::Running) {
            // Where its superblock may have been written, the volume takes no more writes, and the next opener finds out.
            let mut core = self.core()?;
            core.snapshots.retain(|snapshot| snapshot.id != id);
            return Err(error);
        }
        // Who waits for the key provider holds up nobody's writes.
        drop((group, alone));
        self.anchoring.after_flush()?;
        Ok(id)
    }

    pub(super) fn snapshots(&self) -> Result<Vec<SnapshotInfo>, VolumeError> {
        let info = |s: &Snapshot| SnapshotInfo {
            id: s.id,
            name: s.name.clone(),
            time: s.time,
            size: s.size,
            mapped: s.mapped * BLOCK as u64,
            deleting: s.dying.is_some(),
        };
        let core = self.core()?;
        match &core.unlisted {
            Some((doing, why)) => Err(VolumeError::Store(doing, io::Error::new(why.kind(), why.to_string()))),
            None => Ok(core.snapshots.iter().map(info).collect()),
        }
    }

    pub(super) fn delete_snapshot(&self, id: u64, heard: &mut dyn FnMut(u64, u64)) -> Result<(), VolumeError> {
        self.check_writable(0, 0)?;
        loop {
            self.finish_deletion(heard)?;
            let _alone = self.alone()?;
            let group = self.flushing()?;
            let mut core = self.core()?;
            if core.is_deleting() {
                // Somebody else began one meanwhile.
                continue;
            }
            let snapshot = core.snapshots.iter_mut().find(|s| s.id == id && s.dying.is_none());
            snapshot.ok_or(VolumeError::NoSnapshot(id))?.dying = Some(0);
            core.snapshots_changed = true;
            drop(core);
            self.step(&group, heard)?;
            break;
        }
        self.finish_deletion(heard)?;
        self.anchoring.after_flush()
    }

    /// Goes on with a deletion that was begun, also by an earlier opener, to its end.
    pub(super) fn finish_deletion(&self, heard: &mut dyn FnMut(u64, u64)) -> Result<(), VolumeError> {
        while self.core()?.is_deleting() {
            self.check_writable(0, 0)?;
            self.deletion_step(heard)?;
            // The locks go to those who wait for them only if they are free for a while.
            std::thread::sleep(GAP);
        }
        Ok(())
    }

    /// A step of a deletion, if there is one.
    pub(super) fn deletion_step(&self, heard: &mut dyn FnMut(u64, u64)) -> Result<(), VolumeError> {
        let _alone = self.alone()?;
        let group = self.flushing()?;
        if self.core()?.is_deleting() { self.step(&group, heard) } else { Ok(()) }
    }

    pub(super) fn revert(&self, id: u64) -> Result<(), VolumeError> {
        self.check_writable(0, 0)?;
        loop {
            self.finish_deletion(&mut |_, _| {})?;
            let _alone = self.alone()?;
            let group = self.flushing()?;
            if self.core()?.is_deleting() {
                // Somebody else began one meanwhile, maybe of this very snapshot.
                continue;
            }
            self.settle_all(&group)?;
            self.with_core(|core| core.go_back(id, self.backing.geometry().size))?;
            if let Err(error) = self.write_checkpoint(&group, Occasion::Running) {
                // Memory is the snapshot's already, and the store is not.
                return Err(self.core()?.fail(error, &*self.backing.events));
            }
            break;
        }
        self.anchoring.after_flush()?;
        if let Err(error) = self.finish_deletion(&mut |_, _| {}) {
            self.backing.events.note(&format!("what the volume held before is not freed yet: {error}"));
        }
        Ok(())
    }

    /// Everything in memory is durable, so that pointers are equal where pages are.
    pub(super) fn settle_all(&self, group: &MutexGuard<'_, ()>) -> Result<(), VolumeError> {
        let changed = self.core()?.changed();
        if changed { self.write_checkpoint(group, Occasion::Running) } else { Ok(()) }
    }

    /// Visits some leaves of the dying snapshot and frees what only it has.
    fn step(&self, group: &MutexGuard<'_, ()>, heard: &mut dyn FnMut(u64, u64)) -> Result<(), VolumeError> {
        self.settle_all(group)?;
        let Some(mut walk) = self.core()?.begin_walk() else { return Ok(()) };
        let before = walk.position;
        let top = PageId { tree: Tree::Map, level: walk.dying.levels - 1, index: 0 };
        let (id, root) = (walk.dying.id, walk.dying.root);
        let theirs = walk.newer.as_ref().map(|newer| self.pointer_in(newer, top)).transpose();
        let done = match theirs {
            Ok(theirs) => self.walk(&mut walk, top, root, theirs),
            Err(error) => walk.pass_over(top, error),
        }?;
        self.with_core(|core| core.free_walked(&walk, done))?;
        if let Err(error) = self.write_checkpoint(group, Occasion::Running) {
            self.with_core(|core| core.keep_walked(&walk, before))?;
            return Err(error);
        }
        self.core()?.space.freed(&walk.free);
        self.punch_freed()?;
        let all = walk.dying.size.div_ceil(BLOCK as u64);
        heard(if done { all } else { walk.position.min(all) }, all);
        if walk.passed_over > 0 {
            self.backing.events.note(&format!(
                "snapshot {id}: what hangs from {} damaged pages of the map is not freed, for nobody can tell what it is",
                walk.passed_over
            ));
        }
        if done {
            self.backing.events.note(&format!("snapshot {id} is deleted: {}", walk.dying.name));
        }
        Ok(())
    }

    /// A page of the dying snapshot; `theirs` points to the newer snapshot's, if there is one. Returns false when the step is over.
    fn walk(&self, walk: &mut Walk, id: PageId, mine: Child, theirs: Option<Child>) -> Result<bool, VolumeError> {
        self.walk_page(walk, id, mine, theirs).or_else(|error| walk.pass_over(id, error))
    }

    /// As [`walk`](Self::walk). Frees nothing where it fails, but what it was through with below.
    fn walk_page(&self, walk: &mut Walk, id: PageId, mine: Child, theirs: Option<Child>) -> Result<bool, VolumeError> {
        let end = end_of(id);
        if end <= walk.position {
            return Ok(true);
        }
        let is_old = walk.older.as_ref().is_some_and(|older| mine.birth <= older.epoch);
        if mine.is_empty() || is_old || mine == self.theirs(id, theirs)? {
            walk.position = end;
            return Ok(true);
        }
        if walk.budget == 0 {
            return Ok(false);
        }
        let page = self.snapshot_page(id, &mine)?;
        let other = match theirs.filter(|pointer| !pointer.is_empty()) {
            Some(pointer) => Some(self.snapshot_page(id, &pointer)?),
            None => None,
        };
        if id.level == 0 {
            self.visit_leaf(walk, id, &page, theirs.is_some(), other.as_deref())?;
            walk.budget -= 1;
        } else {
            for i in 0..CHILDREN {
                let below = PageId { level: id.level - 1, index: id.index * CHILDREN as u64 + i as u64, ..id };
                let their_child = theirs.map(|_| other.as_deref().map_or(Child::EMPTY, |page| child(page, i)));
                if !self.walk(walk, below, child(&page, i), their_child)? {
                    return Ok(false);
                }
            }
        }
        walk.free.push(mine.physical);
        walk.position = end;
        Ok(true)
    }

    /// What points to a page in the newer snapshot, or in the volume.
    fn theirs(&self, id: PageId, snapshot: Option<Child>) -> Result<Child, VolumeError> {
        match snapshot {
            Some(pointer) => Ok(pointer),
            None => self.with_core(|core| core.forest.pointer(id)),
        }
    }

    fn visit_leaf(
        &self,
        walk: &mut Walk,
        id: PageId,
        page: &Block,
        in_snapshot: bool,
        other: Option<&Block>,
    ) -> Result<(), VolumeError> {
        let first = id.index * ENTRIES as u64;
        let mut theirs = [Entry::UNMAPPED; ENTRIES];
        match other {
            Some(page) => theirs.iter_mut().enumerate().for_each(|(i, theirs)| *theirs = entry(page, i)),
            None if in_snapshot => {}
            None => self.with_core(|core| core.lookup(first, &mut theirs))?,
        }
        for (i, theirs) in theirs.iter().enumerate() {
            let mine = entry(page, i);
            let Some(block) = mine.data().filter(|block| self.backing.in_pool(*block)) else { continue };
            let is_old = walk.older.as_ref().is_some_and(|older| mine.generation < older.generation);
            if !is_old && theirs.data() != Some(block) {
                walk.free.push(block);
            }
        }
        Ok(())
    }

    fn snapshot_page(&self, id: PageId, pointer: &Child) -> Result<Box<Block>, VolumeError> {
        let expected = |h: &Header| h.tree == id.tree && h.level == id.level && h.index == id.index;
        let page = self.backing.read_page(pointer, expected);
        page.map_err(|error| self.backing.bad_page(Some(id), pointer, error))
    }

    /// What points, in a snapshot, to the leftmost page of a level that it may have or not.
    fn pointer_in(&self, snapshot: &Snapshot, id: PageId) -> Result<Child, VolumeError> {
        let mut at = PageId { level: snapshot.levels - 1, ..id };
        let mut pointer = snapshot.root;
        while at.level > id.level && !pointer.is_empty() {
            pointer = child(&*self.snapshot_page(at, &pointer)?, 0);
            at.level -= 1;
        }
        Ok(pointer)
    }
}

impl Walk {
    /// Goes on behind a page that is damaged, or to be compared with one that is: what hangs from it stays in use, for nobody maybe,
    /// because it can't be told what that is. That costs room, and no later deletion waits for a page that won't come back.
    fn pass_over(&mut self, id: PageId, error: VolumeError) -> Result<bool, VolumeError> {
        if !matches!(error, VolumeError::Damaged(_)) {
            return Err(error);
        }
        self.passed_over += 1;
        self.budget = self.budget.saturating_sub(1);
        self.position = end_of(id);
        Ok(true)
    }
}

/// Unix seconds, as the host's clock has them.
fn now() -> u64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |time| time.as_secs())
}

impl Core {
    pub(super) fn add_snapshot(&mut self, name: &str, size: u64) -> Result<u64, VolumeError> {
        self.writable()?;
        if self.snapshots.len() >= MOST {
            return Err(VolumeError::TooManySnapshots(MOST));
        }
        self.snapshots_taken += 1;
        let snapshot = Snapshot {
            id: self.snapshots_taken,
            time: now(),
            // That of the checkpoint that follows, which fills in its own root.
            epoch: self.epoch + 1,
            generation: self.next_generation(),
            size,
            mapped: self.mapped,
            root: Child::EMPTY,
            levels: self.forest.root(Tree::Map).levels,
            dying: None,
            name: name.to_owned(),
        };
        self.snapshots.push(snapshot);
        self.snapshots_changed = true;
        Ok(self.snapshots_taken)
    }

    /// The volume is what the snapshot holds, and what it held becomes a dying snapshot.
    fn go_back(&mut self, id: u64, size: u64) -> Result<(), Halt> {
        self.writable()?;
        let newest = self.snapshots.last().cloned();
        let known = self.snapshots.iter().any(|snapshot| snapshot.id == id);
        let target = match newest {
            Some(newest) if newest.id == id && newest.dying.is_none() && newest.size > size => {
                return Err(VolumeError::LargerSnapshot { id, size: newest.size }.into());
            }
            Some(newest) if newest.id == id && newest.dying.is_none() => newest,
            Some(newest) if known && newest.id != id => return Err(VolumeError::NewerSnapshot(newest.id).into()),
            _ => return Err(VolumeError::NoSnapshot(id).into()),
        };
        let root = self.forest.root(Tree::Map);
        self.leave_behind(root, size, 0, "what the volume went back from");
        self.mapped = target.mapped;
        self.forest.replace_map(target.root, target.levels)
    }

    /// What the durable map at `root` reached from block `position` on, and the volume does not any more, is to be freed: a dying snapshot
    /// of what the volume held.
    pub(super) fn leave_behind(&mut self, root: Root, size: u64, position: u64, name: &str) {
        self.snapshots_taken += 1;
        self.snapshots.push(Snapshot {
            id: self.snapshots_taken,
            time: now(),
            epoch: self.epoch,
            generation: self.next_generation(),
            size,
            mapped: self.mapped,
            root: root.child,
            levels: root.levels,
            dying: Some(position),
            name: name.to_owned(),
        });
        self.snapshots_changed = true;
    }

    pub(super) fn is_deleting(&self) -> bool {
        self.snapshots.iter().any(|snapshot| snapshot.dying.is_some())
    }

    fn begin_walk(&self) -> Option<Walk> {
        let at = self.snapshots.iter().position(|snapshot| snapshot.dying.is_some())?;
        let dying = self.snapshots[at].clone();
        Some(Walk {
            position: dying.dying.unwrap_or(0),
            dying,
            older: at.checked_sub(1).map(|i| self.snapshots[i].clone()),
            newer: self.snapshots.get(at + 1).cloned(),
            free: Vec::new(),
            budget: STEP,
            passed_over: 0,
        })
    }

    /// Nothing is changed before all that is needed is in memory.
    fn free_walked(&mut self, walk: &Walk, done: bool) -> Result<(), Halt> {
        for block in &walk.free {
            self.forest.page(bitmap(block / BITS as u64))?;
        }
        for block in &walk.free {
            self.space.free_held(*block, &mut self.forest)?;
        }
        self.snapshots_changed = true;
        if done {
            self.snapshots.retain(|snapshot| snapshot.id != walk.dying.id);
        } else if let Some(dying) = self.snapshots.iter_mut().find(|snapshot| snapshot.id == walk.dying.id) {
            dying.dying = Some(walk.position);
        }
        Ok(())
    }

    /// Takes back a [`free_walked`](Self::free_walked) that did not become durable.
    fn keep_walked(&mut self, walk: &Walk, before: u64) -> Result<(), Halt> {
        for block in &walk.free {
            self.forest.page(bitmap(block / BITS as u64))?;
        }
        for block in &walk.free {
            self.space.keep(*block, &mut self.forest)?;
        }
        let back = Snapshot { dying: Some(before), ..walk.dying.clone() };
        match self.snapshots.iter_mut().find(|snapshot| snapshot.id == back.id) {
            Some(dying) => *dying = back,
            None => {
                let at = self.snapshots.partition_point(|snapshot| snapshot.id < back.id);
                self.snapshots.insert(at, back);
            }
        }
        Ok(())
    }
}
