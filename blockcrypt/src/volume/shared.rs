//! What all requests of a volume share.

use super::anchoring::Anchoring;
use super::housekeeping::Housekeeper;
use super::{Core, OpenOptions, VolumeInfo};
use crate::VolumeError;
use crate::backing::Backing;
use crate::tree::{Halt, PageId};
use policy::CustomerId;
use policy::disk::VolumeGrant;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

pub(crate) struct Shared {
    pub(crate) backing: Backing,
    pub(super) customer: CustomerId,
    pub(super) read_only: bool,
    /// What is acknowledged outlives this process: see [`OpenOptions::outlive`].
    pub(super) outlive: bool,
    /// See [`OpenOptions::background`].
    pub(super) background: bool,
    pub(super) closed: AtomicBool,
    /// The last checkpoint is made, and only its anchor is still to be kept. Changed by whoever is alone, or closes.
    pub(super) closing: AtomicBool,
    /// One `close` at a time.
    pub(super) closer: Mutex<()>,
    gate: RwLock<()>,
    ranges: Ranges,
    pub(super) flushing: Mutex<()>,
    logging: Mutex<()>,
    core: Mutex<Core>,
    pub(super) anchoring: Arc<Anchoring>,
    pub(super) housekeeper: Arc<Housekeeper>,
}

impl Shared {
    pub(super) fn new(
        backing: Backing,
        grant: &VolumeGrant,
        options: OpenOptions,
        core: Core,
        anchoring: Anchoring,
    ) -> Self {
        Self {
            backing,
            customer: grant.customer.clone(),
            read_only: !options.writes(),
            outlive: options.outlive,
            background: options.background,
            closed: AtomicBool::new(false),
            closing: AtomicBool::new(false),
            closer: Mutex::new(()),
            gate: RwLock::new(()),
            ranges: Ranges::default(),
            flushing: Mutex::new(()),
            logging: Mutex::new(()),
            core: Mutex::new(core),
            anchoring: Arc::new(anchoring),
            housekeeper: Arc::default(),
        }
    }

    /// The volume's memory; not to be held over a cipher or the store.
    pub(super) fn core(&self) -> Result<MutexGuard<'_, Core>, VolumeError> {
        self.core.lock().map_err(panicked)
    }

    /// Does `f` under the lock, again from its beginning after each page that it misses.
    pub(super) fn with_core<R>(&self, f: impl FnMut(&mut Core) -> Result<R, Halt>) -> Result<R, VolumeError> {
        self.reach(f).map_err(|(error, _)| error)
    }

    /// As [`with_core`](Self::with_core); an error comes with the page that can't be had, where there is one.
    pub(super) fn reach<R>(
        &self,
        mut f: impl FnMut(&mut Core) -> Result<R, Halt>,
    ) -> Result<R, (VolumeError, Option<PageId>)> {
        let lock = || self.core().map_err(|error| (error, None));
        let mut core = lock()?;
        loop {
            core.forest.make_room();
            let missing = match f(&mut core) {
                Ok(done) => return Ok(done),
                Err(Halt::Failed(error)) => return Err((error, None)),
                Err(Halt::Missing(missing)) => missing,
            };
            drop(core);
            let fetched = self.backing.fetch(&missing);
            core = lock()?;
            match fetched {
                Ok(page) => core.forest.insert(missing, page),
                // It may have been replaced meanwhile, and its block reused: then another one is missing now.
                Err(error) if core.forest.still_misses(&missing) => {
                    return Err((self.backing.bad_page(Some(missing.id), &missing.pointer, error), Some(missing.id)));
                }
                Err(_) => {}
            }
        }
    }

    /// For one request that changes something, as long as this lives. An error once the last checkpoint is made.
    pub(super) fn among_others(&self) -> Result<RwLockReadGuard<'_, ()>, VolumeError> {
        let held = self.gate.read().unwrap_or_else(PoisonError::into_inner);
        self.not_closing()?;
        Ok(held)
    }

    /// No request that changes something is in hand as long as this lives. An error once the last checkpoint is made.
    pub(super) fn alone(&self) -> Result<RwLockWriteGuard<'_, ()>, VolumeError> {
        let held = self.alone_anyway();
        self.not_closing()?;
        Ok(held)
    }

    /// As [`alone`](Self::alone), whether the volume is being closed or not: for `close` itself, and for who only looks.
    pub(super) fn alone_anyway(&self) -> RwLockWriteGuard<'_, ()> {
        self.gate.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// An error once the last checkpoint is made: what came after it would not be anchored.
    pub(super) fn not_closing(&self) -> Result<(), VolumeError> {
        if self.closing.load(Ordering::Acquire) { Err(VolumeError::Closed) } else { Ok(()) }
    }

    /// Nobody else changes these blocks as long as this lives.
    pub(super) fn lock_blocks(&self, blocks: impl IntoIterator<Item = Range<u64>>) -> Locked<'_> {
        self.ranges.lock(blocks.into_iter().collect())
    }

    /// The volume's own thread ends.
    pub(super) fn stop(&self) {
        self.anchoring.stop();
        self.housekeeper.stop();
    }

    /// The volume's own thread panicked.
    pub(super) fn thread_panicked(&self) {
        match self.core() {
            Ok(mut core) => core.give_up("its own thread panicked".to_owned(), &*self.backing.events),
            // Where it had that in its hands nothing goes on.
            Err(error) => self.backing.events.note(&error.to_string()),
        }
    }

    /// An error once it is closed.
    pub(super) fn open(&self) -> Result<(), VolumeError> {
        if self.closed.load(Ordering::Acquire) { Err(VolumeError::Closed) } else { Ok(()) }
    }

    /// An error unless it takes requests.
    pub(super) fn ready(&self) -> Result<(), VolumeError> {
        self.open()?;
        self.backing.has_keys()
    }

    /// An error, here and with [`logging`](Self::logging), once somebody who held it panicked: records and pages that were in his hands are
    /// lost to memory, so that nothing can be called durable any more.
    pub(super) fn flushing(&self) -> Result<MutexGuard<'_, ()>, VolumeError> {
        self.flushing.lock().map_err(panicked)
    }

    pub(super) fn logging(&self) -> Result<MutexGuard<'_, ()>, VolumeError> {
        self.logging.lock().map_err(panicked)
    }

    pub(super) fn info(&self) -> VolumeInfo {
        let core = self.core.lock().unwrap_or_else(PoisonError::into_inner);
        let geometry = self.backing.geometry();
        let bytes = |blocks: u64| blocks * crate::format::BLOCK as u64;
        VolumeInfo {
            volume: self.backing.uuid,
            size: geometry.size,
            store_size: bytes(geometry.total),
            mapped: bytes(core.mapped),
            used: bytes(core.space.used()),
            room: bytes(geometry.room()),
            free: bytes(core.free_for_data(&self.backing)),
            snapshots: core.snapshots.len(),
            epoch: core.superblock.epoch,
            writer: core.superblock.writer.get(),
            key_id: core.superblock.key(),
            older_keys: core.older.len() + 1 - core.fresh_keys().len(),
            blocks_written: core.written,
            key_used_up: core.is_used_up(),
            not_renewed: core.not_renewed,
            dropped_writes: core.dropped,
            read_only: self.read_only,
        }
    }
}

impl Core {
    /// Does `f` with a volume that nobody else uses yet, or under its lock; again from its beginning after each page that it misses.
    pub(super) fn run<R>(
        &mut self,
        from: &Backing,
        mut f: impl FnMut(&mut Self) -> Result<R, Halt>,
    ) -> Result<R, VolumeError> {
        loop {
            match f(self) {
                Ok(done) => return Ok(done),
                Err(Halt::Failed(error)) => return Err(error),
                Err(Halt::Missing(missing)) => {
                    let page = from
                        .fetch(&missing)
                        .map_err(|error| from.bad_page(Some(missing.id), &missing.pointer, error))?;
                    self.forest.insert(missing, page);
                }
            }
        }
    }
}

fn panicked<T>(_: PoisonError<T>) -> VolumeError {
    VolumeError::Failed("a thread panicked".to_owned())
}

/// Ranges of blocks that are being changed.
#[derive(Default)]
struct Ranges {
    held: Mutex<Held>,
    unlocked: Condvar,
}

#[derive(Default)]
struct Held {
    locked: Vec<Range<u64>>,
    /// Requests that wait: nobody is woken where nobody sleeps.
    waiting: usize,
}

impl Ranges {
    /// All at once or none, so that no two requests wait for each other.
    fn lock(&self, blocks: Vec<Range<u64>>) -> Locked<'_> {
        let meet = |a: &Range<u64>, b: &Range<u64>| a.start < b.end && b.start < a.end;
        let taken = |held: &Held| held.locked.iter().any(|other| blocks.iter().any(|own| meet(own, other)));
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        while taken(&held) {
            held.waiting += 1;
            held = self.unlocked.wait(held).unwrap_or_else(PoisonError::into_inner);
            held.waiting -= 1;
        }
        held.locked.extend_from_slice(&blocks);
        Locked { ranges: self, blocks }
    }
}

/// Ranges that are locked.
pub(super) struct Locked<'a> {
    ranges: &'a Ranges,
    blocks: Vec<Range<u64>>,
}

impl Drop for Locked<'_> {
    fn drop(&mut self) {
        let mut held = self.ranges.held.lock().unwrap_or_else(PoisonError::into_inner);
        for blocks in &self.blocks {
            if let Some(i) = held.locked.iter().position(|range| range == blocks) {
                held.locked.swap_remove(i);
            }
        }
        if held.waiting > 0 {
            self.ranges.unlocked.notify_all();
        }
    }
}
