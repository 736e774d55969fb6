//! Making a volume, and opening one in the state that its anchor allows.

use super::anchoring::Anchoring;
use super::durable::{Occasion, unlogged_bound};
use super::log::Log;
use super::recovery::{self, Recovered};
use super::shared::Shared;
use super::superblocks::{Found, State, Superblocks, find_state, find_superblocks};
use super::{Asked, Condition, Core, Volume};
use crate::backing::Backing;
use crate::format::anchor::AnchorFields;
use crate::format::geometry::{Geometry, store_size};
use crate::format::page::{Child, Tree};
use crate::format::slot::{MAX_PAGES, Slot, SlotPage};
use crate::format::snapshot::{MAX_PAGES as SNAPSHOT_PAGES, Snapshot, SnapshotPage};
use crate::format::superblock::{Rotation, Superblock};
use crate::format::{BLOCK, Block, FormatError, zero_block};
use crate::keys::{KeyRing, VolumeKey};
use crate::space::Space;
use crate::tree::{Forest, Root};
use crate::{Anchors, Events, Kek, Store, VolumeError};
use policy::disk::VolumeGrant;
use policy::{KeyId, VolumeAnchor, VolumeId};
use secretmem::Secret;
use serde::Serialize;
use std::io::{self, ErrorKind};
use std::sync::Arc;
use std::time::Instant;

/// How a volume is opened.
#[derive(Clone, Copy, Debug)]
pub struct OpenOptions {
    /// Nothing is written, no anchor moves: a log is replayed in memory only.
    pub read_only: bool,
    /// Bytes of verified map kept in memory, at most; 2 MiB are in any case, and eight pages for each changed one. A page of 4 KiB describes 288 KiB, so that the default
    /// of 64 MiB serves a working set of 4.5 GiB; all of 1 TiB has 14.4 GiB of map, of which 173 MiB are nodes above the leaves. A
    /// miss costs one read of 4 KiB for each level that is not there, mostly the leaf alone. Changed pages, 6 MiB and their ancestors
    /// at most, and twice that during a checkpoint, come on top.
    pub map_cache: usize,
    /// Opens the snapshot with this number instead, for reading only: nothing is written, no anchor moves.
    pub snapshot: Option<u64>,
    /// What is written or discarded outlives this process: its record is in the store, though not durable, before the request
    /// returns, so that nothing that was acknowledged is gone where the process is killed and the machine goes on. For who serves a disk
    /// to others, who come back to the next process and know of no crash. Costs a write of a log block, 4 KiB, for each request or
    /// call of [`write_many`](Volume::write_many), less where several wait for it. Without it, what no FLUSH has acknowledged dies
    /// with the process.
    pub outlive: bool,
    /// A checkpoint that is due is made by the volume's own thread, and requests go on meanwhile, as far as log and memory last. Without it,
    /// by the request that finds it due, so that the same requests do the same things to the store.
    pub background: bool,
}

impl OpenOptions {
    pub(super) fn writes(&self) -> bool {
        !self.read_only && self.snapshot.is_none()
    }
}

impl Default for OpenOptions {
    fn default() -> Self {
        Self { read_only: false, map_cache: 64 << 20, snapshot: None, outlive: false, background: true }
    }
}

/// What a volume says about itself to somebody without its key. Nothing of it is authenticated.
#[derive(Clone, Debug, Serialize)]
pub struct PlainInfo {
    /// Its UUID.
    pub volume: VolumeId,
    /// What the guest sees, in bytes.
    pub size: u64,
    /// What the store should hold, in bytes.
    pub store_size: u64,
    /// What the store does hold, in bytes.
    pub found_size: u64,
    /// Bytes that hold data, as of the newest superblock.
    pub mapped: u64,
    /// The newest superblock's epoch.
    pub epoch: u64,
    /// Who wrote it: an open number.
    pub writer: u32,
    /// The key for new writes.
    pub key_id: KeyId,
    /// The key-encryption key that opens it.
    pub kek_id: KeyId,
    /// Whether it was closed in order.
    pub closed: bool,
    /// How many of the four copies of the superblock can be read.
    pub superblocks: usize,
    /// The anchor of the newest superblock: what a provider that was restored from an older backup may be told.
    pub anchor: VolumeAnchor,
}

impl Volume {
    /// Makes an empty volume of `size` bytes (a multiple of 512, to 2^50) in `store`, whose content is lost. It has no anchor,
    /// and can't be opened, before [`close`](Self::close) has set the first one.
    pub fn create(
        store: impl Store + 'static,
        size: u64,
        grant: &VolumeGrant,
        kek: &Kek,
        anchors: Arc<dyn Anchors>,
        events: Arc<dyn Events>,
    ) -> Result<Self, VolumeError> {
        if grant.anchor.is_some() {
            return Err(VolumeError::Exists);
        }
        kek.check(grant)?;
        let found = store.len().map_err(VolumeError::store("say its length"))?;
        let geometry = Geometry::plan(size, found)?;
        let master = Secret::random()?;
        let slot = kek.wrap(&master, grant.key_id, grant.volume, &grant.customer)?;
        let keys = KeyRing::of(VolumeKey::expand(grant.key_id, grant.volume, &master)?);
        let backing = Backing::new(Box::new(store), geometry, grant.volume, keys, events.clone());
        prepare_store(&backing)?;
        let options = OpenOptions::default();
        let superblock = Superblock::first(grant, geometry, slot);
        let log = Log::new(grant.open_number.get(), &backing, 0, 0);
        let lists = Lists::default();
        let mut core = Core::new(superblock, 1, log, lists, &backing, options);
        core.run(&backing, |core| core.space.fence(&mut core.forest))?;
        let anchoring = Anchoring::new(anchors, events, grant.anchor_mode, None);
        let shared = Shared::new(backing, grant, options, core, anchoring);
        shared.finish_creation()?;
        Self::new(shared)
    }

    /// Opens the volume in `store`. Serves its first request only after the opener's own state is durable and its anchor is
    /// kept; with `read_only`, nothing is written and no anchor moves.
    pub fn open(
        store: impl Store + 'static,
        grant: &VolumeGrant,
        kek: &Kek,
        options: OpenOptions,
        anchors: Arc<dyn Anchors>,
        events: Arc<dyn Events>,
    ) -> Result<Self, VolumeError> {
        let opened = Self::open_inner(Box::new(store), grant, kek, options, anchors, &events);
        // What claims to be newer than this program may be, or may have been made to.
        if let Err(error) = &opened
            && (error.is_integrity() || matches!(error, VolumeError::Unsupported(_)))
        {
            events.integrity(None, None, &error.to_string());
        }
        opened
    }

    fn open_inner(
        store: Box<dyn Store>,
        grant: &VolumeGrant,
        kek: &Kek,
        options: OpenOptions,
        anchors: Arc<dyn Anchors>,
        events: &Arc<dyn Events>,
    ) -> Result<Self, VolumeError> {
        kek.check(grant)?;
        let anchor = AnchorFields::read(grant.anchor.as_ref().ok_or(VolumeError::NoAnchor)?);
        if anchor.volume != grant.volume {
            return Err(VolumeError::Grant("its anchor is another volume's"));
        }
        let found_size = store.len().map_err(VolumeError::store("say its length"))?;
        let mut state = find_state(&*store, &anchor, grant, kek)?;
        if options.writes() && !is_anchored_close(&state.chosen.superblock, &anchor) {
            // A killed process may have left writes that only the kernel has. What was and is read here is overwritten on the
            // strength of what else is read: none of it may vanish with the power.
            store.sync_data().map_err(VolumeError::store("make writes durable"))?;
            // One whose sync failed may have left what no sync makes durable any more.
            store.drop_cached().map_err(VolumeError::store("be read past what the kernel keeps of it"))?;
            state = find_state(&*store, &anchor, grant, kek)?;
        }
        let State { chosen, epoch, good, unreadable } = state;
        let expected = chosen.superblock.geometry.total * BLOCK as u64;
        if found_size < expected {
            return Err(VolumeError::Truncated { found: found_size, expected });
        }
        if chosen.superblock.is_named_by(&anchor) {
            // Both copies were durable before the anchor that names them was sent. Others a crash may have cut off.
            let copies = chosen.superblock.geometry.superblocks(chosen.place);
            for at in copies.into_iter().filter(|at| !good.contains(&(*at, chosen.superblock.epoch))) {
                if unreadable.contains(&at) {
                    events.note(&format!("the superblock's copy in block {at} can't be read; the other one can"));
                } else {
                    events.integrity(None, Some(at), "a copy of the superblock does not verify; the other one does");
                }
            }
        }
        let ring = KeyRing::open(std::slice::from_ref(&chosen.superblock.slot), kek, &grant.customer)?;
        let backing = Backing::new(store, chosen.superblock.geometry, grant.volume, ring, events.clone());
        let lists = read_lists(&chosen.superblock, kek, grant, &backing, !options.writes())?;
        let replayed = recovery::replay(&chosen.superblock, &anchor, &backing)?;
        let mut core = start(chosen, epoch, grant, &replayed, lists, &backing, options);
        let anchoring = Anchoring::new(anchors, events.clone(), grant.anchor_mode, grant.anchor.clone());
        if let Some(id) = options.snapshot {
            core.show_snapshot(id, &backing)?;
        }
        let shared = Shared::new(backing, grant, options, core, anchoring);
        if options.snapshot.is_none() {
            shared.take_over(&replayed, grant, kek)?;
        }
        Self::new(shared)
    }
}

/// What a store shows to somebody without a key: nothing of it is authenticated.
pub fn inspect(store: &dyn Store) -> Result<PlainInfo, VolumeError> {
    let Superblocks { found, .. } = find_superblocks(store)?;
    let count = found.len();
    let newest = found.into_iter().max_by_key(|f| (f.superblock.epoch, f.superblock.writer));
    let superblock = newest.ok_or(VolumeError::NotAVolume)?.superblock;
    let bytes = |blocks: u64| blocks.saturating_mul(BLOCK as u64);
    let anchor = AnchorFields {
        volume: superblock.uuid,
        writer: superblock.writer,
        epoch: superblock.epoch,
        sequence: superblock.cut.sequence,
        chain: superblock.cut.chain,
        root: superblock.mac,
        key: superblock.key(),
        kek: superblock.slot.kek,
    };
    Ok(PlainInfo {
        volume: superblock.uuid,
        size: superblock.geometry.size,
        store_size: bytes(superblock.geometry.total),
        found_size: store.len().map_err(VolumeError::store("say its length"))?,
        mapped: bytes(superblock.mapped),
        epoch: superblock.epoch,
        writer: superblock.writer.get(),
        key_id: superblock.key(),
        kek_id: superblock.slot.kek,
        closed: superblock.clean,
        superblocks: count,
        anchor: anchor.build(),
    })
}

impl Shared {
    /// Recovers what the log holds; for a writer, makes it durable under its own open number and waits for the anchor.
    fn take_over(&self, replayed: &Recovered, grant: &VolumeGrant, kek: &Kek) -> Result<(), VolumeError> {
        {
            let mut core = self.core()?;
            recovery::apply(&mut core, replayed, &self.backing)?;
            if self.read_only {
                return Ok(());
            }
            core.superblock.writer = grant.open_number;
            if grant.key_id != core.superblock.key() {
                core.new_key(grant, kek, &self.backing)?;
            }
            core.warn_of_limit(&self.backing);
        }
        self.wipe_left_slots()?;
        let no_more = self.make_room_to_open()?;
        self.first_checkpoint().map_err(|error| match error {
            VolumeError::Full(None) => no_more.unwrap_or(error),
            error => error,
        })?;
        self.anchoring.keep_now()?;
        self.try_to_wipe_stale_slots()?;
        {
            let mut core = self.core()?;
            core.space.release_all();
            // What is still to be wiped must not be anything else meanwhile.
            let Core { space, stale_slots, .. } = &mut *core;
            space.hold(stale_slots);
        }
        let group = self.flushing()?;
        self.top_up(&group)
    }

    /// A new volume's first superblock.
    fn finish_creation(&self) -> Result<(), VolumeError> {
        self.first_checkpoint()?;
        self.core()?.space.release_all();
        let group = self.flushing()?;
        self.top_up(&group)
    }

    fn first_checkpoint(&self) -> Result<(), VolumeError> {
        let group = self.flushing()?;
        self.write_checkpoint(&group, Occasion::Opening)
    }
}

impl Core {
    pub(super) fn new(
        superblock: Superblock,
        place: usize,
        log: Log,
        lists: Lists,
        from: &Backing,
        options: OpenOptions,
    ) -> Self {
        let geometry = from.geometry();
        let map = Root { child: superblock.map, levels: geometry.map_levels };
        let free = Root { child: superblock.free, levels: geometry.free_levels };
        Self {
            forest: Forest::new(map, free, options.map_cache / BLOCK),
            space: Space::new(&geometry, superblock.used),
            log,
            place,
            epoch: superblock.epoch,
            mapped: superblock.mapped,
            older: lists.slots,
            slots_changed: false,
            slot_pages: lists.slot_pages,
            stale_slots: Vec::new(),
            snapshots: lists.snapshots,
            snapshots_changed: false,
            snapshot_pages: lists.snapshot_pages,
            snapshots_taken: superblock.taken,
            unlisted: lists.unlisted,
            generations: 0,
            written: superblock.slot.written,
            warned: false,
            not_renewed: 0,
            dropped: 0,
            tight: false,
            checkpointing: false,
            asked: Asked::Not,
            is_snapshot: false,
            superblock,
            state: Condition::Good,
            last_checkpoint: Instant::now(),
        }
    }

    /// The map, and the size, are a snapshot's.
    fn show_snapshot(&mut self, id: u64, from: &Backing) -> Result<(), VolumeError> {
        let found = self.snapshots.iter().find(|snapshot| snapshot.id == id && snapshot.dying.is_none());
        let Some(snapshot) = found else {
            let unlisted = self.unlisted.take();
            return Err(unlisted.map_or(VolumeError::NoSnapshot(id), |(doing, why)| VolumeError::Store(doing, why)));
        };
        let map = Root { child: snapshot.root, levels: snapshot.levels };
        let geometry = Geometry { size: snapshot.size, map_levels: snapshot.levels, ..from.geometry() };
        let free = self.forest.root(Tree::Free);
        self.mapped = snapshot.mapped;
        self.forest = Forest::new(map, free, self.forest.bound());
        self.is_snapshot = true;
        from.set_geometry(geometry);
        Ok(())
    }

    /// A new master for new writes, under the key id that the provider issued; the one so far joins the older ones.
    fn new_key(&mut self, grant: &VolumeGrant, kek: &Kek, from: &Backing) -> Result<(), VolumeError> {
        if self.older.iter().any(|slot| slot.key == grant.key_id) {
            return Err(VolumeError::Grant("it names a key that was replaced already"));
        }
        if self.older.len() >= MAX_PAGES * SlotPage::CAPACITY {
            return Err(VolumeError::Unsupported("more key slots than a volume has room for".to_owned()));
        }
        let master = Secret::random()?;
        let slot = kek.wrap(&master, grant.key_id, from.uuid, &grant.customer)?;
        let key = VolumeKey::expand(grant.key_id, from.uuid, &master)?;
        from.change_keys(|ring| ring.renew(key))?;
        if !self.is_used_up() || self.superblock.rotation.ended {
            // Otherwise a rotation under way goes on under this key.
            self.superblock.rotation = Rotation::default();
        }
        let last = Slot { written: self.written, ..std::mem::replace(&mut self.superblock.slot, slot) };
        self.older.insert(0, last);
        self.slots_changed = true;
        self.written = 0;
        from.events.note(&format!("new writes are sealed under key {}", grant.key_id));
        Ok(())
    }
}

/// Lists that a superblock points to, and the blocks that hold them.
#[derive(Default)]
pub(super) struct Lists {
    slots: Vec<Slot>,
    slot_pages: Vec<u64>,
    snapshots: Vec<Snapshot>,
    snapshot_pages: Vec<u64>,
    /// Why there may be more snapshots.
    unlisted: Option<(&'static str, io::Error)>,
}

/// Reads both lists; the older keys join the ring before anything needs them. Who only `looks` gets to see the volume although a page of
/// its snapshots can't be read.
fn read_lists(
    superblock: &Superblock,
    kek: &Kek,
    grant: &VolumeGrant,
    from: &Backing,
    looks: bool,
) -> Result<Lists, VolumeError> {
    let mut lists = Lists::default();
    lists.slot_pages = read_chain(Tree::Slots, superblock.older, MAX_PAGES, from, |page| {
        let page = SlotPage::parse(page)?;
        lists.slots.extend(page.slots);
        Ok(page.next)
    })?;
    for slot in &lists.slots {
        let key = kek.open(slot, &grant.customer)?;
        from.change_keys(|ring| ring.add(key))?;
    }
    let pages = read_chain(Tree::Snapshots, superblock.snapshots, SNAPSHOT_PAGES, from, |page| {
        let page = SnapshotPage::parse(page)?;
        lists.snapshots.extend(page.snapshots);
        Ok(page.next)
    });
    match pages {
        Ok(pages) => lists.snapshot_pages = pages,
        // One that was tampered with is no volume to look at.
        Err(VolumeError::Store(doing, why)) if looks => {
            from.events
                .note("the list of the volume's snapshots can't be read; the volume itself is shown all the same");
            lists.unlisted = Some((doing, why));
        }
        Err(other) => return Err(other),
    }
    Ok(lists)
}

/// Reads a chain of pages; returns the blocks that hold them.
fn read_chain(
    tree: Tree,
    first: Child,
    most: usize,
    from: &Backing,
    mut parse: impl FnMut(&Block) -> Result<Child, FormatError>,
) -> Result<Vec<u64>, VolumeError> {
    let mut blocks = Vec::new();
    let mut next = first;
    while !next.is_empty() {
        let index = blocks.len();
        if index == most {
            return Err(VolumeError::Damaged("one of its lists does not end".to_owned()));
        }
        let page = from.read_page(&next, |h| h.tree == tree && h.level == 0 && h.index == index as u64);
        let page = page.map_err(|error| match error {
            VolumeError::Store(doing, why) => {
                VolumeError::Store(doing, io::Error::new(why.kind(), format!("block {}: {why}", next.physical)))
            }
            other => from.bad_page(None, &next, other),
        })?;
        blocks.push(next.physical);
        next = parse(&page).map_err(|e| VolumeError::Damaged(e.to_string()))?;
    }
    Ok(blocks)
}

/// Sizes the store, and makes sure that nothing in it looks like a superblock.
fn prepare_store(backing: &Backing) -> Result<(), VolumeError> {
    let (store, geometry) = (&backing.store, backing.geometry());
    lengthen(&**store, geometry.total * BLOCK as u64)?;
    let front = geometry.zone().end * BLOCK as u64;
    let reserved = store.reserve(0, front);
    let back = geometry.pool().end * BLOCK as u64;
    let reserved = reserved.and_then(|()| store.reserve(back, geometry.total * BLOCK as u64 - back));
    reserved.map_err(VolumeError::store("set room aside for log and pages"))?;
    for at in [0, 1].into_iter().flat_map(|place| geometry.superblocks(place)) {
        backing.write_blocks(at, &zero_block()[..])?;
    }
    Ok(())
}

/// Makes an empty store as long as it must be so that a volume of `size` bytes that is made in it has `room` for as many bytes beyond its
/// size, as [`store_size`] says. One that is longer stays so.
///
/// # Errors
/// [`VolumeError::TooShort`]: a device that is too short. [`VolumeError::Size`] or [`VolumeError::Room`]: there is no such volume.
pub fn make_room(store: &dyn Store, size: u64, room: u64) -> Result<(), VolumeError> {
    let needed = store_size(size, room)?;
    let found = store.len().map_err(VolumeError::store("say its length"))?;
    if found < needed { lengthen(store, needed) } else { Ok(()) }
}

/// Makes a store `needed` bytes long, which is longer than it is; a device has the length that it has.
pub(super) fn lengthen(store: &dyn Store, needed: u64) -> Result<(), VolumeError> {
    store.set_len(needed).map_err(|error| match (error.kind(), store.len()) {
        (ErrorKind::StorageFull, Ok(found)) if found < needed => VolumeError::TooShort { found, needed },
        _ => VolumeError::store("be made longer")(error),
    })
}

/// Whether this is the very state that the last holder closed with and the provider keeps. All of it was durable before its
/// superblock was written, and that before the anchor was sent; and no record follows it.
fn is_anchored_close(superblock: &Superblock, anchor: &AnchorFields) -> bool {
    superblock.clean && superblock.is_named_by(anchor)
}

/// The state before recovery.
fn start(
    chosen: Found,
    epoch: u64,
    grant: &VolumeGrant,
    replayed: &Recovered,
    lists: Lists,
    backing: &Backing,
    options: OpenOptions,
) -> Core {
    let superblock = chosen.superblock;
    let uncounted = if superblock.clean && replayed.blocks == 0 { 0 } else { 2 * unlogged_bound(backing) };
    let offset = superblock.cut.offset;
    let log = Log::new(grant.open_number.get(), backing, offset, offset + replayed.blocks);
    let mut core = Core::new(superblock, chosen.place, log, lists, backing, options);
    core.epoch = epoch;
    core.written = core.written.saturating_add(uncounted).min(Slot::LIMIT);
    core
}
