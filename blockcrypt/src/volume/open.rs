//! Making a volume, and finding the state of one that its anchor allows.

use super::anchoring::Anchoring;
use super::durable::{Occasion, unlogged_bound};
use super::log::Log;
use super::recovery::{self, Recovered};
use super::{Condition, Core, Shared, Volume};
use crate::backing::Backing;
use crate::format::anchor::AnchorFields;
use crate::format::geometry::Geometry;
use crate::format::page::{Child, Header, Tree};
use crate::format::slot::{MAX_PAGES, Slot, SlotPage};
use crate::format::superblock::{Cut, Superblock, claimed_total, has_magic};
use crate::format::{BLOCK, Block, MAC, put, zero_block};
use crate::keys::{KeyRing, VolumeKey, same};
use crate::space::Space;
use crate::tree::{Forest, Root};
use crate::{Anchors, Events, Kek, Store, VolumeError};
use policy::disk::VolumeGrant;
use policy::{KeyId, VolumeAnchor, VolumeId};
use secretmem::Secret;
use serde::Serialize;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex};
use std::time::Instant;

/// How a volume is opened.
#[derive(Clone, Copy, Default, Debug)]
pub struct OpenOptions {
    /// Nothing is written, no anchor moves: a log is replayed in memory only.
    pub read_only: bool,
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

/// A superblock as found.
struct Found {
    place: usize,
    superblock: Superblock,
    block: Box<Block>,
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
        let superblock = Superblock {
            uuid: grant.volume,
            geometry,
            epoch: 0,
            writer: grant.open_number,
            clean: false,
            map: Child::EMPTY,
            free: Child::EMPTY,
            cut: Cut { offset: 0, sequence: 0, chain: [0; MAC] },
            mapped: 0,
            older: Child::EMPTY,
            slot,
            mac: [0; MAC],
        };
        let log = Log::new(grant.open_number.get(), &backing, 0, 0);
        let mut core = Core::new(superblock, 1, log, Vec::new(), &backing);
        core.space.fence(&mut core.forest, &backing)?;
        core.checkpoint(&backing, Occasion::Opening)?;
        core.space.release_all();
        let anchoring = Anchoring::new(anchors, events, grant.anchor_mode, None);
        anchoring.durable(core.anchor(&backing));
        Self::new(Shared::new(backing, grant, false, core, anchoring))
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
        if let Err(error) = &opened
            && error.is_integrity()
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
        if !options.read_only {
            // A killed process may have left writes that only the kernel has. What is read from here on is overwritten on the
            // strength of what else is read: none of it may vanish with the power.
            store.sync_data().map_err(VolumeError::store("make writes durable"))?;
        }
        let found_size = store.len().map_err(VolumeError::store("say its length"))?;
        let (verified, damaged) = verify_superblocks(find_superblocks(&*store)?, grant, kek)?;
        let (chosen, epoch) = choose(verified, damaged, &anchor, grant)?;
        let expected = chosen.superblock.geometry.total * BLOCK as u64;
        if found_size < expected {
            return Err(VolumeError::Truncated { found: found_size, expected });
        }
        let ring = KeyRing::open(std::slice::from_ref(&chosen.superblock.slot), kek, &grant.customer)?;
        let backing = Backing::new(store, chosen.superblock.geometry, grant.volume, ring, events.clone());
        let older = read_older_slots(&chosen.superblock, &backing)?;
        for slot in &older.slots {
            let key = kek.open(slot, &grant.customer)?;
            backing.change_keys(|ring| ring.add(key))?;
        }
        let replayed = recovery::replay(&chosen.superblock, &anchor, &backing)?;
        let core = start(chosen, epoch, grant, &replayed, &older, &backing);
        let anchoring = Anchoring::new(anchors, events.clone(), grant.anchor_mode, grant.anchor.clone());
        let shared = Shared::new(backing, grant, options.read_only, core, anchoring);
        shared.take_over(&replayed, &older, grant, kek)?;
        Self::new(shared)
    }
}

/// What a store shows to somebody without a key: nothing of it is authenticated.
pub fn inspect(store: &dyn Store) -> Result<PlainInfo, VolumeError> {
    let found = find_superblocks(store)?;
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
    fn new(backing: Backing, grant: &VolumeGrant, read_only: bool, core: Core, anchoring: Anchoring) -> Self {
        Self {
            backing,
            customer: grant.customer.clone(),
            read_only,
            closed: AtomicBool::new(false),
            flushing: Mutex::new(()),
            core: Mutex::new(core),
            anchoring: Arc::new(anchoring),
        }
    }

    /// Recovers what the log holds; for a writer, makes it durable under its own open number and waits for the anchor.
    fn take_over(
        &self,
        replayed: &Recovered,
        older: &OlderSlots,
        grant: &VolumeGrant,
        kek: &Kek,
    ) -> Result<(), VolumeError> {
        let mut core = self.core()?;
        recovery::apply(&mut core, replayed, &self.backing)?;
        if self.read_only {
            return Ok(());
        }
        core.superblock.writer = grant.open_number;
        if grant.key_id != core.superblock.key() {
            core.new_key(older, grant, kek, &self.backing)?;
        }
        core.checkpoint(&self.backing, Occasion::Opening)?;
        self.anchoring.durable(core.anchor(&self.backing));
        drop(core);
        self.anchoring.keep_now()?;
        self.core()?.space.release_all();
        Ok(())
    }
}

impl Core {
    fn new(superblock: Superblock, place: usize, log: Log, older: Vec<Slot>, from: &Backing) -> Self {
        let map = Root { child: superblock.map, levels: from.geometry.map_levels };
        let free = Root { child: superblock.free, levels: from.geometry.free_levels };
        Self {
            forest: Forest::new(map, free),
            space: Space::new(from),
            log,
            place,
            epoch: superblock.epoch,
            mapped: superblock.mapped,
            older,
            generations: 0,
            written: superblock.slot.written,
            dropped: 0,
            superblock,
            state: Condition::Good,
            scratch: Vec::new(),
            last_checkpoint: Instant::now(),
        }
    }

    /// A new master for new writes, under the key id that the provider issued; the one so far joins the older ones.
    fn new_key(
        &mut self,
        older: &OlderSlots,
        grant: &VolumeGrant,
        kek: &Kek,
        from: &Backing,
    ) -> Result<(), VolumeError> {
        if self.older.iter().any(|slot| slot.key == grant.key_id) {
            return Err(VolumeError::Grant("it names a key that was replaced already"));
        }
        let master = Secret::random()?;
        let slot = kek.wrap(&master, grant.key_id, from.uuid, &grant.customer)?;
        let key = VolumeKey::expand(grant.key_id, from.uuid, &master)?;
        from.change_keys(|ring| ring.renew(key))?;
        let last = Slot { written: self.written, ..std::mem::replace(&mut self.superblock.slot, slot) };
        self.older.insert(0, last);
        self.written = 0;
        for block in &older.pages {
            self.space.free_held(*block, &mut self.forest, from)?;
        }
        self.superblock.older = self.write_older_slots(from)?;
        from.events.note(&format!("new writes are sealed under key {}", grant.key_id));
        Ok(())
    }

    /// Writes the list of older slots to free blocks, last page first; returns the pointer to the first.
    fn write_older_slots(&mut self, from: &Backing) -> Result<Child, VolumeError> {
        let pages: Vec<Vec<Slot>> = self.older.chunks(SlotPage::CAPACITY).map(<[Slot]>::to_vec).collect();
        if pages.len() > MAX_PAGES {
            return Err(VolumeError::Unsupported("more key slots than a volume has room for".to_owned()));
        }
        // The checkpoint that follows carries the next epoch.
        let birth = self.epoch + 1;
        let writer = self.superblock.writer.get();
        let mut next = Child::EMPTY;
        for (index, slots) in pages.into_iter().enumerate().rev() {
            let physical = self.space.allocate(from.geometry.pool().start, 1, &mut self.forest, from)?.start;
            let mut page = SlotPage { next, slots }.to_block();
            let mac = from.with_keys(|_, key| {
                let (index, key_id, origin) = (index as u64, key.id, key.origin);
                let mut header = zero_block();
                Header { tree: Tree::Slots, level: 0, writer, index, birth, key: key_id, origin }.put(&mut header);
                put(&mut page[..], 0, &header[..Header::SIZE]);
                Ok(key.page_mac(&page))
            })?;
            from.write_blocks(physical, &page[..])?;
            next = Child { physical, birth, mac };
        }
        Ok(next)
    }
}

/// Older key slots, and the blocks of the pages that hold them.
struct OlderSlots {
    slots: Vec<Slot>,
    pages: Vec<u64>,
}

fn read_older_slots(superblock: &Superblock, from: &Backing) -> Result<OlderSlots, VolumeError> {
    let mut older = OlderSlots { slots: Vec::new(), pages: Vec::new() };
    let mut next = superblock.older;
    while !next.is_empty() {
        let index = older.pages.len();
        if index == MAX_PAGES {
            return Err(VolumeError::Damaged("its list of keys does not end".to_owned()));
        }
        let page = from.read_page(&next, |h| h.tree == Tree::Slots && h.level == 0 && h.index == index as u64)?;
        let page = SlotPage::parse(&page).map_err(|e| VolumeError::Damaged(e.to_string()))?;
        older.pages.push(next.physical);
        older.slots.extend(page.slots);
        next = page.next;
    }
    Ok(older)
}

/// Blocks of the store that hold the list of older slots.
pub(super) fn older_slot_pages(superblock: &Superblock, from: &Backing) -> Result<Vec<u64>, VolumeError> {
    Ok(read_older_slots(superblock, from)?.pages)
}

/// Sizes the store, and makes sure that nothing in it looks like a superblock.
fn prepare_store(backing: &Backing) -> Result<(), VolumeError> {
    let (store, geometry) = (&backing.store, &backing.geometry);
    store.set_len(geometry.total * BLOCK as u64).map_err(VolumeError::store("be made as long as the volume"))?;
    let front = geometry.pool().start * BLOCK as u64;
    let reserved = store.reserve(0, front);
    let back = geometry.pool().end * BLOCK as u64;
    let reserved = reserved.and_then(|()| store.reserve(back, geometry.total * BLOCK as u64 - back));
    reserved.map_err(VolumeError::store("set room aside for the log"))?;
    for at in [0, 1].into_iter().flat_map(|place| geometry.superblocks(place)) {
        backing.write_blocks(at, &zero_block()[..])?;
    }
    Ok(())
}

/// Every superblock that can be parsed, at both ends.
fn find_superblocks(store: &dyn Store) -> Result<Vec<Found>, VolumeError> {
    let blocks = store.len().map_err(VolumeError::store("say its length"))? / BLOCK as u64;
    let mut places = vec![(0, 0), (1, 1)];
    let mut ends = vec![blocks];
    let mut found = Vec::new();
    let mut problem = VolumeError::NotAVolume;
    let mut next = 0;
    while next < places.len() {
        let (at, place) = places[next];
        next += 1;
        if at >= blocks {
            continue;
        }
        let mut block = zero_block();
        store.read_at(&mut block[..], at * BLOCK as u64).map_err(VolumeError::store("read"))?;
        if has_magic(&block) {
            ends.push(claimed_total(&block));
            match Superblock::parse(&block) {
                Ok(superblock) => found.push(Found { place, superblock, block }),
                Err(e) => problem = VolumeError::Damaged(format!("superblock in block {at}: {e}")),
            }
        }
        if next == 2 {
            // Both at the front are known: the others lie at the end, wherever that may be.
            ends.sort_unstable();
            ends.dedup();
            places.extend(ends.iter().filter(|e| (4..=blocks).contains(*e)).flat_map(|e| [(e - 2, 0), (e - 1, 1)]));
        }
    }
    if found.is_empty() { Err(problem) } else { Ok(found) }
}

/// Those that are of this volume and verify under its keys, and how many are this volume's but don't verify.
fn verify_superblocks(found: Vec<Found>, grant: &VolumeGrant, kek: &Kek) -> Result<(Vec<Found>, usize), VolumeError> {
    let mut problem = VolumeError::NotAVolume;
    let mut damaged = 0;
    let mut verified = Vec::new();
    for candidate in found {
        let superblock = &candidate.superblock;
        if superblock.uuid != grant.volume {
            problem = VolumeError::OtherVolume { found: superblock.uuid, expected: grant.volume };
            continue;
        }
        match kek.open(&superblock.slot, &grant.customer) {
            Err(VolumeError::WrongKey) => {
                problem = VolumeError::WrongKey;
                damaged += 1;
            }
            Err(other) => return Err(other),
            Ok(key) if same(&key.superblock_mac(&candidate.block), &superblock.mac) => verified.push(candidate),
            Ok(_) => {
                problem = VolumeError::Damaged("its superblock does not verify".to_owned());
                damaged += 1;
            }
        }
    }
    if verified.is_empty() { Err(problem) } else { Ok((verified, damaged)) }
}

/// The newest superblock that the anchor allows, and the highest epoch of all.
fn choose(
    verified: Vec<Found>,
    damaged: usize,
    anchor: &AnchorFields,
    grant: &VolumeGrant,
) -> Result<(Found, u64), VolumeError> {
    let writers = verified.iter().map(|f| f.superblock.writer).chain([anchor.writer]);
    let highest = writers.max().unwrap_or(anchor.writer);
    if grant.open_number <= highest {
        return Err(VolumeError::StaleOpenNumber { issued: grant.open_number.get(), highest: highest.get() });
    }
    let epoch = verified.iter().map(|f| f.superblock.epoch).max().unwrap_or(0);
    let newest = verified.iter().map(|f| (f.superblock.writer.get(), f.superblock.epoch)).max();
    let allowed = |f: &Found| {
        let s = &f.superblock;
        s.writer == anchor.writer && (s.epoch > anchor.epoch || (s.epoch == anchor.epoch && same(&s.mac, &anchor.root)))
    };
    let chosen = verified.into_iter().filter(allowed).max_by_key(|f| f.superblock.epoch);
    let missing = || {
        let (writer, found) = newest.unwrap_or_default();
        VolumeError::RolledBack(format!(
            "its newest superblock is epoch {found} of writer {writer}, the anchor names epoch {} of writer {}{}",
            anchor.epoch,
            anchor.writer,
            if damaged > 0 { "; some of its superblocks are damaged" } else { "" },
        ))
    };
    chosen.map(|found| (found, epoch)).ok_or_else(missing)
}

/// The state before recovery.
fn start(
    chosen: Found,
    epoch: u64,
    grant: &VolumeGrant,
    replayed: &Recovered,
    older: &OlderSlots,
    backing: &Backing,
) -> Core {
    let superblock = chosen.superblock;
    let uncounted = if superblock.clean && replayed.blocks == 0 { 0 } else { unlogged_bound(backing) };
    let offset = superblock.cut.offset;
    let log = Log::new(grant.open_number.get(), backing, offset, offset + replayed.blocks);
    let mut core = Core::new(superblock, chosen.place, log, older.slots.clone(), backing);
    core.epoch = epoch;
    core.written = core.written.saturating_add(uncounted).min(Slot::LIMIT);
    core
}
