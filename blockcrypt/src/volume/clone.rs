//! Clones: the same data under another UUID, with a master of its own for what is written to it.
//!
//! Blocks and pages of the map are copied as they are, to the same places, after each was verified: they keep the origin and the
//! key ids under which they were sealed, whose slots the clone has as its older ones, wrapped under its own key-encryption key.
//! Free space, log and lists begin anew. Snapshots are not copied.

use super::anchoring::Anchoring;
use super::log::Log;
use super::open::{Lists, OpenOptions, prepare_store};
use super::shared::Shared;
use super::{Core, Volume};
use crate::backing::Backing;
use crate::format::page::{CHILDREN, Child, ENTRIES, Header, Tree, child, entry};
use crate::format::slot::Slot;
use crate::format::superblock::Superblock;
use crate::format::zero_block;
use crate::keys::{KeyRing, VolumeKey};
use crate::tree::PageId;
use crate::{Anchors, Events, Kek, Store, VolumeError};
use policy::disk::VolumeGrant;
use secretmem::Secret;
use std::sync::Arc;

/// Whose clone, and what opens it.
pub struct CloneOf<'a> {
    /// The volume, or a snapshot of it: writable, or closed in order.
    pub source: &'a Volume,
    /// Its key-encryption key.
    pub kek: &'a Kek,
}

impl Volume {
    /// Makes a clone in `store`, whose content is lost, for `grant`, which has no anchor yet: like a volume that was created, it can't be
    /// opened before [`close`](Self::close) has set the first one. Requests that change the source wait meanwhile. `heard` is told of how
    /// many blocks of data of how many are copied.
    pub fn create_clone(
        store: impl Store + 'static,
        of: CloneOf,
        grant: &VolumeGrant,
        kek: &Kek,
        anchors: Arc<dyn Anchors>,
        events: Arc<dyn Events>,
        heard: &mut dyn FnMut(u64, u64),
    ) -> Result<Self, VolumeError> {
        if grant.anchor.is_some() {
            return Err(VolumeError::Exists);
        }
        kek.check(grant)?;
        let source = &of.source.shared;
        source.ready()?;
        let _alone = source.alone_anyway();
        let group = source.flushing();
        if !source.read_only {
            source.settle_all(&group)?;
        }
        let Inheritance { slots: inherited, epoch, mapped, root } = source.core()?.inheritance()?;
        if grant.volume == source.backing.uuid || inherited.iter().any(|slot| slot.key == grant.key_id) {
            return Err(VolumeError::Grant("a clone has a UUID and a key id of its own"));
        }
        let rewrap = |slot: &Slot| of.kek.rewrap(slot, &source.customer, kek, &grant.customer);
        let slots = inherited.iter().map(rewrap).collect::<Result<Vec<_>, _>>()?;
        let master = Secret::random()?;
        let slot = kek.wrap(&master, grant.key_id, grant.volume, &grant.customer)?;
        let mut ring = KeyRing::of(VolumeKey::expand(grant.key_id, grant.volume, &master)?);
        for slot in &slots {
            ring.add(kek.open(slot, &grant.customer)?);
        }
        let geometry = source.backing.geometry();
        let backing = Backing::new(Box::new(store), geometry, grant.volume, ring, events.clone());
        prepare_store(&backing)?;
        let superblock = Superblock { epoch, map: root, mapped, ..Superblock::first(grant, geometry, slot) };
        let log = Log::new(grant.open_number.get(), &backing, 0, 0);
        let lists = Lists::of(slots);
        let mut core = Core::new(superblock, 1, log, lists, &backing, OpenOptions::default());
        core.slots_changed = true;
        core.run(&backing, |core| core.space.fence(&mut core.forest))?;
        let top = PageId { tree: Tree::Map, level: geometry.map_levels - 1, index: 0 };
        source.copy_page(top, root, &mut core, &backing, &mut Copied { done: 0, all: mapped, heard })?;
        let anchoring = Anchoring::new(anchors, events, grant.anchor_mode, None);
        let shared = Shared::new(backing, grant, false, core, anchoring);
        shared.finish_creation()?;
        Self::new(shared)
    }
}

/// What a clone begins with.
struct Inheritance {
    slots: Vec<Slot>,
    /// The highest epoch at which a page of it was born.
    epoch: u64,
    mapped: u64,
    /// The map's root.
    root: Child,
}

/// How far a clone has come, in blocks of data.
struct Copied<'a> {
    done: u64,
    all: u64,
    heard: &'a mut dyn FnMut(u64, u64),
}

impl Core {
    fn inheritance(&self) -> Result<Inheritance, VolumeError> {
        if self.forest.dirty() > 0 {
            return Err(VolumeError::NotClosed);
        }
        let slots = [std::slice::from_ref(&self.superblock.slot), &self.older].concat();
        Ok(Inheritance { slots, epoch: self.epoch, mapped: self.mapped, root: self.forest.root(Tree::Map).child })
    }
}

impl Shared {
    /// Copies a page and what hangs from it, all verified, to the same places in `to`, which `core` is to describe.
    fn copy_page(
        &self,
        id: PageId,
        pointer: Child,
        core: &mut Core,
        to: &Backing,
        copied: &mut Copied,
    ) -> Result<(), VolumeError> {
        if pointer.is_empty() {
            return Ok(());
        }
        let expected = |h: &Header| h.tree == id.tree && h.level == id.level && h.index == id.index;
        let page = self.backing.read_page(&pointer, expected);
        let page = page.map_err(|error| self.backing.bad_page(&pointer, error))?;
        self.copied(pointer.physical, &page[..], core, to)?;
        if id.level > 0 {
            for i in 0..CHILDREN {
                let below = PageId { level: id.level - 1, index: id.index * CHILDREN as u64 + i as u64, ..id };
                self.copy_page(below, child(&page, i), core, to, copied)?;
            }
            return Ok(());
        }
        for i in 0..ENTRIES {
            let (lba, entry) = (id.index * ENTRIES as u64 + i as u64, entry(&page, i));
            let Some(physical) = entry.data() else { continue };
            let mut block = zero_block();
            if self.backing.in_pool(physical) {
                self.backing.read_blocks(physical, &mut block[..])?;
            }
            if !self.backing.with_keys(|ring, _| Ok(ring.verifies(lba, &entry, &block)))? {
                self.backing.events.integrity(Some(lba), Some(physical), "its tag does not verify");
                return Err(VolumeError::Integrity { lba });
            }
            self.copied(physical, &block[..], core, to)?;
            copied.done += 1;
            (copied.heard)(copied.done, copied.all);
        }
        Ok(())
    }

    fn copied(&self, block: u64, bytes: &[u8], core: &mut Core, to: &Backing) -> Result<(), VolumeError> {
        to.write_blocks(block, bytes)?;
        core.run(to, |core| core.space.take(block, &mut core.forest))
    }
}
