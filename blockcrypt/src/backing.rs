//! A volume's store and keys together: blocks that verify, or an error.
//!
//! Keys have a lock of their own, held for a computation and never over I/O: they can be wiped whatever the store does.

use crate::crypto::{BATCH, wipe_registers};
use crate::format::geometry::Geometry;
use crate::format::page::{Child, Entry, Header, Tree};
use crate::format::{BLOCK, Block, zero_block};
use crate::keys::{KeyRing, Open, VolumeKey, same};
use crate::room::with_room;
use crate::tree::{Missing, PageId};
use crate::{Events, Store, VolumeError};
use policy::VolumeId;
use secretmem::wiping_stack;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

/// Lots of a large request: few, for each costs a call, and enough that little is computed before the store has work.
const LOTS: usize = 4;

/// Blocks that are brought together to be written at once: 256 KiB.
const GATHERED: usize = 64;

/// Blocks that are read at once to see whether they verify: 1 MiB.
const READ_AT_ONCE: usize = 256;

pub(crate) struct Backing {
    pub(crate) store: Box<dyn Store>,
    geometry: RwLock<Geometry>,
    pub(crate) uuid: VolumeId,
    pub(crate) events: Arc<dyn Events>,
    keys: RwLock<Option<KeyRing>>,
    /// Whether anything was written through this. Until then there is nothing to make durable.
    written: AtomicBool,
}

impl Backing {
    pub(crate) fn new(
        store: Box<dyn Store>,
        geometry: Geometry,
        uuid: VolumeId,
        keys: KeyRing,
        events: Arc<dyn Events>,
    ) -> Self {
        let (geometry, keys) = (RwLock::new(geometry), RwLock::new(Some(keys)));
        Self { store, geometry, uuid, events, keys, written: AtomicBool::new(false) }
    }

    /// Where things lie, now: a volume may grow.
    pub(crate) fn geometry(&self) -> Geometry {
        *self.geometry.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// The volume has another size from now on.
    pub(crate) fn set_geometry(&self, geometry: Geometry) {
        *self.geometry.write().unwrap_or_else(PoisonError::into_inner) = geometry;
    }

    /// Computes something with the keys, and wipes stack and vector registers after it; not to be held over I/O.
    pub(crate) fn with_keys<R>(
        &self,
        f: impl FnOnce(&KeyRing, &VolumeKey) -> Result<R, VolumeError>,
    ) -> Result<R, VolumeError> {
        let held = self.keys.read().unwrap_or_else(PoisonError::into_inner);
        let ring = held.as_ref().ok_or(VolumeError::NoKeys)?;
        let current = ring.current().ok_or(VolumeError::NoKeys)?;
        let result = wiping_stack(|| f(ring, current));
        wipe_registers();
        result
    }

    /// Whether the keys are there.
    pub(crate) fn has_keys(&self) -> Result<(), VolumeError> {
        let held = self.keys.read().unwrap_or_else(PoisonError::into_inner);
        if held.is_some() { Ok(()) } else { Err(VolumeError::NoKeys) }
    }

    /// Replaces the keys; `None` wipes them.
    pub(crate) fn set_keys(&self, keys: Option<KeyRing>) {
        let old = std::mem::replace(&mut *self.keys.write().unwrap_or_else(PoisonError::into_inner), keys);
        drop(old);
    }

    /// Changes the keys.
    pub(crate) fn change_keys(&self, f: impl FnOnce(&mut KeyRing)) -> Result<(), VolumeError> {
        f(self.keys.write().unwrap_or_else(PoisonError::into_inner).as_mut().ok_or(VolumeError::NoKeys)?);
        Ok(())
    }

    /// Whether `block` is one that data and pages may lie in.
    pub(crate) fn in_pool(&self, block: u64) -> bool {
        self.geometry().pool().contains(&block)
    }

    pub(crate) fn read_blocks(&self, first: u64, buffer: &mut [u8]) -> Result<(), VolumeError> {
        self.store.read_at(buffer, first * BLOCK as u64).map_err(VolumeError::store("read"))
    }

    /// Fills several runs of blocks, each from the offset of its first in the store, by lots: `ready` is given each one's runs once they are
    /// filled, while later ones may be under way. A lot ends before the run whose number is in `ends`, the last one with the last run.
    /// After an error of `ready` it is given no more.
    pub(crate) fn read_lots(
        &self,
        runs: &mut [(u64, &mut [u8])],
        ends: &[usize],
        mut ready: impl FnMut(&mut [(u64, &mut [u8])]) -> Result<(), VolumeError>,
    ) -> Result<(), VolumeError> {
        let mut failed = Ok(());
        let done = self.store.read_lots_at(runs, ends, &mut |runs| {
            if failed.is_ok() {
                failed = ready(runs);
            }
        });
        done.map_err(VolumeError::store("read"))?;
        failed
    }

    pub(crate) fn write_blocks(&self, first: u64, bytes: &[u8]) -> Result<(), VolumeError> {
        self.write_runs(&[(first * BLOCK as u64, bytes)])
    }

    /// Writes several runs of blocks, each at the offset of its first in the store.
    pub(crate) fn write_runs(&self, runs: &[(u64, &[u8])]) -> Result<(), VolumeError> {
        // Before the write, so that nobody who knows of it finds this unset.
        self.written.store(true, Ordering::Release);
        self.store.write_many_at(runs).map_err(VolumeError::store("write"))
    }

    /// As [`write_runs`](Self::write_runs), by lots, for which `next` is asked while those before may be under way; until it has none, or an
    /// error.
    pub(crate) fn write_lots<'a>(
        &self,
        mut next: impl FnMut() -> Result<Option<Vec<(u64, &'a [u8])>>, VolumeError>,
    ) -> Result<(), VolumeError> {
        self.written.store(true, Ordering::Release);
        let mut failed = Ok(());
        let done = self.store.write_lots_at(&mut || {
            next().unwrap_or_else(|error| {
                failed = Err(error);
                None
            })
        });
        failed.and(done.map_err(VolumeError::store("write")))
    }

    /// Whether the store works while ciphers do.
    pub(crate) fn overlaps(&self) -> bool {
        self.store.overlaps()
    }

    /// How many of `blocks` blocks go to the store, or come from it, as one lot: all, unless it overlaps.
    pub(crate) fn lot(&self, blocks: usize) -> usize {
        if self.overlaps() { (blocks / LOTS).max(BATCH) } else { blocks.max(1) }
    }

    /// Writes blocks that lie apart in memory, those that are neighbours in the store as one.
    pub(crate) fn write_scattered(&self, blocks: &mut [(u64, &Block)]) -> Result<(), VolumeError> {
        blocks.sort_unstable_by_key(|(physical, _)| *physical);
        for blocks in blocks.chunks(GATHERED) {
            with_room(blocks.len(), |room| {
                room.iter_mut().zip(blocks).for_each(|(place, (_, block))| *place = **block);
                let (mut runs, mut rest) = (Vec::new(), &*room);
                for run in blocks.chunk_by(|(a, _), (b, _)| a + 1 == *b) {
                    let (own, after) = rest.split_at(run.len());
                    runs.push((run[0].0 * BLOCK as u64, own.as_flattened()));
                    rest = after;
                }
                self.write_runs(&runs)
            })?;
        }
        Ok(())
    }

    /// Returns when everything that was written through this is durable.
    pub(crate) fn sync(&self) -> Result<(), VolumeError> {
        if !self.written.load(Ordering::Acquire) {
            return Ok(());
        }
        self.store.sync_data().map_err(VolumeError::store("make writes durable"))
    }

    /// The page that memory misses. Where it does not verify, the caller says whether it is still asked for.
    pub(crate) fn fetch(&self, missing: &Missing) -> Result<Box<Block>, VolumeError> {
        let id = missing.id;
        self.read_page(&missing.pointer, |h| h.tree == id.tree && h.level == id.level && h.index == id.index)
    }

    /// The page that `pointer` names, if it verifies and its header is the `expected` one; read twice before it is given up.
    pub(crate) fn read_page(
        &self,
        pointer: &Child,
        expected: impl Fn(&Header) -> bool,
    ) -> Result<Box<Block>, VolumeError> {
        let mut page = zero_block();
        if self.in_pool(pointer.physical) {
            for _ in 0..2 {
                self.read_blocks(pointer.physical, &mut page[..])?;
                if self.page_verifies(pointer, &page)? {
                    return match Header::parse(&page) {
                        Ok(header) if header.birth == pointer.birth && expected(&header) => Ok(page),
                        _ => Err(VolumeError::Damaged("a page of the map lies in another's place".to_owned())),
                    };
                }
            }
        }
        Err(VolumeError::Damaged(format!("the map page in block {} does not verify", pointer.physical)))
    }

    /// A page is bad for good: the audit log hears of it, and of the first logical block that can't be found without it. A page of a list
    /// has no `id`.
    pub(crate) fn bad_page(&self, id: Option<PageId>, pointer: &Child, error: VolumeError) -> VolumeError {
        if error.is_integrity() {
            let (lba, reason) = match id {
                Some(id) if id.tree == Tree::Map => {
                    let (first, end) = (id.blocks().start, id.blocks().end.min(self.geometry().blocks()));
                    (
                        Some(first),
                        format!("the map page of blocks {first} to {} does not verify", end.saturating_sub(1)),
                    )
                }
                Some(_) => (None, "a page of the free-space map does not verify".to_owned()),
                None => (None, "a page of key slots or snapshots does not verify".to_owned()),
            };
            self.events.integrity(lba, Some(pointer.physical), &reason);
        }
        error
    }

    fn page_verifies(&self, pointer: &Child, page: &Block) -> Result<bool, VolumeError> {
        let Ok(header) = Header::parse(page) else { return Ok(false) };
        self.with_keys(|ring, _| {
            let Some(key) = ring.find(header.key) else { return Ok(false) };
            Ok(key.origin == header.origin && same(&key.page_mac(page), &pointer.mac))
        })
    }

    /// Of each logical block and entry, whether the store holds the data that the entry names. Neighbours in the store are read as one;
    /// what does not verify is read again before it is given up.
    pub(crate) fn held(&self, asked: &[(u64, Entry)]) -> Result<Vec<bool>, VolumeError> {
        let pool = self.geometry().pool();
        let mut held: Vec<bool> = asked.iter().map(|(_, entry)| entry.physical == 0).collect();
        for _ in 0..2 {
            let wanted = |i: &usize| !held[*i] && asked[*i].1.data().is_some_and(|block| pool.contains(&block));
            let mut left: Vec<usize> = (0..asked.len()).filter(wanted).collect();
            left.sort_unstable_by_key(|i| asked[*i].1.physical);
            for some in left.chunks(READ_AT_ONCE) {
                self.read_and_verify(asked, some, &mut held)?;
            }
        }
        Ok(held)
    }

    /// Of those of `asked` whose numbers are `some`, in the order in which they lie in the store, says in `held` which verify.
    fn read_and_verify(&self, asked: &[(u64, Entry)], some: &[usize], held: &mut [bool]) -> Result<(), VolumeError> {
        let mut lots = some.chunks(self.lot(some.len()));
        with_room(some.len(), |mut room| {
            let (mut runs, mut ends) = (Vec::new(), Vec::new());
            for lot in lots.clone() {
                for run in lot.chunk_by(|a, b| asked[*a].1.physical + 1 == asked[*b].1.physical) {
                    let (own, after) = room.split_at_mut(run.len());
                    runs.push((asked[run[0]].1.physical * BLOCK as u64, own.as_flattened_mut()));
                    room = after;
                }
                ends.push(runs.len());
            }
            self.read_lots(&mut runs, &ends, |runs| {
                let numbers = lots.next().unwrap_or_default();
                let blocks = runs.iter_mut().flat_map(|(_, run)| run.as_chunks_mut().0);
                let open = |(i, block): (&usize, _)| Open { lba: asked[*i].0, entry: &asked[*i].1, block, good: false };
                let mut batch: Vec<Open> = numbers.iter().zip(blocks).map(open).collect();
                self.with_keys(|ring, _| Ok(ring.verify_blocks(&mut batch)))?;
                numbers.iter().zip(&batch).for_each(|(i, open)| held[*i] = open.good);
                Ok(())
            })
        })
    }
}
