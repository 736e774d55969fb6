//! FLUSH and checkpoint: when is it durable?
//!
//! Both are made by one thread at a time, the one that holds `flushing`, and neither holds the volume's lock while it computes or
//! writes: requests go on. A checkpoint copies the pages that changed (a few MiB at most) under the lock, and what changes from
//! then on is the next one's.
//!
//! Where writes outlive the process, each request hands its records to the store before it returns. It needs `logging` alone for that, so
//! that it waits for no fdatasync.

use super::log::Batch;
use super::plan::Plan;
use super::shared::Shared;
use super::{CHECKPOINT_EVERY, Core, DIRTY_PAGES, MOST_DIRTY};
use crate::VolumeError;
use crate::backing::Backing;
use crate::format::log::RECORDS;
use policy::VolumeAnchor;
use std::sync::atomic::Ordering;
use std::sync::{MutexGuard, PoisonError};
use std::time::Instant;

/// What a checkpoint is for.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Occasion {
    /// The volume goes on.
    Running,
    /// The opener's first: the pages that it read must stay until this one is anchored.
    Opening,
    /// The first under another key-encryption key: the one before must stay whole until this one is anchored, with its slots.
    Rewrapping,
    /// The last.
    Closing,
}

/// When a checkpoint is to be made.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Due {
    NotYet,
    /// Requests may go on until it is made.
    Soon,
    Now,
}

impl Occasion {
    /// Whether nothing that the superblock before leads to may go before the anchor is kept.
    fn waits_for_the_anchor(self) -> bool {
        matches!(self, Self::Opening | Self::Rewrapping)
    }
}

/// Blocks that a checkpoint takes: for as many pages as may be dirty, and those above, of which there are few where they lie side by side.
const PAGES: u64 = MOST_DIRTY as u64 + 48;
/// Spare blocks that are asked for at once, at most: 12.4 MiB, for one checkpoint and the next.
const SPARES: u64 = 2 * PAGES;
/// How often a checkpoint hands the log what others add to it, before it takes the rest itself.
const HAND_OVERS: u32 = 8;

impl Shared {
    pub(super) fn flush(&self) -> Result<(), VolumeError> {
        self.ready()?;
        if self.read_only {
            return Ok(());
        }
        let written = {
            let core = self.core()?;
            core.writable()?;
            core.log.appended
        };
        {
            let group = self.flushing();
            // Somebody else's FLUSH may have covered this one while it waited for its turn.
            if self.core()?.log.durable < written {
                self.commit(&group)?;
            }
        }
        self.punch_freed()?;
        self.anchoring.after_flush()
    }

    /// Makes everything written so far durable.
    pub(super) fn commit(&self, group: &MutexGuard<'_, ()>) -> Result<(), VolumeError> {
        let log = self.logging();
        let (batch, records) = {
            let mut core = self.core()?;
            core.writable()?;
            (core.log.take_all(), core.log.appended)
        };
        let batch = match batch {
            // The ring is full: a checkpoint covers what waits.
            Err(VolumeError::Full(None)) => {
                drop(log);
                return self.write_checkpoint(group, Occasion::Running);
            }
            batch => batch?,
        };
        self.put_batch(batch, &log)?;
        let anchor = {
            let core = self.core()?;
            core.anchor(core.log.sequence, core.log.chain, &self.backing)
        };
        // Other threads may write meanwhile, the log too; what they add is not part of this.
        drop(log);
        let synced = self.backing.sync();
        let mut core = self.core()?;
        if let Err(error) = synced {
            // The kernel may have dropped what it could not write: a second fdatasync would succeed and mean nothing.
            return Err(core.fail(error, &*self.backing.events));
        }
        core.log.durable = core.log.durable.max(records);
        core.space.durable(records);
        self.anchoring.durable(anchor);
        Ok(())
    }

    /// Writes a batch of records; what could not be written waits again.
    fn put_batch(&self, batch: Option<Batch>, _log: &MutexGuard<'_, ()>) -> Result<(), VolumeError> {
        let Some(mut batch) = batch else { return Ok(()) };
        let put = batch.put(&self.backing);
        let mut core = self.core()?;
        match put {
            Ok(()) => core.log.written(&batch),
            Err(_) => core.log.failed(batch),
        }
        put
    }

    /// Returns when the store has everything that requests before have written, where that is to outlive this process; durable it
    /// need not be.
    pub(super) fn hand_over(&self) -> Result<(), VolumeError> {
        if !self.outlive {
            return Ok(());
        }
        let wanted = self.core()?.log.appended;
        if self.has_stored(wanted)? {
            return Ok(());
        }
        // A checkpoint under way may have the records; and a ring that is full now may not be when that is done.
        let group = self.flushing();
        if matches!(self.has_stored(wanted), Ok(true)) {
            return Ok(());
        }
        self.write_checkpoint(&group, Occasion::Running)
    }

    /// Writes what the store does not have of the log; whether it has the first `wanted` records then. An error is the store's, or the
    /// keys'.
    fn has_stored(&self, wanted: u64) -> Result<bool, VolumeError> {
        let log = self.logging();
        let batch = {
            let mut core = self.core()?;
            if core.log.stored >= wanted {
                return Ok(true);
            }
            core.log.take_new()
        };
        match batch {
            Err(VolumeError::Full(None)) | Ok(None) => return Ok(false),
            batch => self.put_batch(batch?, &log)?,
        }
        Ok(true)
    }

    /// Writes full blocks of the log if many records wait: bounds memory. If somebody else is at the log, only when it is urgent.
    pub(super) fn relieve(&self) -> Result<(), VolumeError> {
        let (wanted, urgent) = self.core()?.log.wants_relief();
        if !wanted {
            return Ok(());
        }
        if self.outlive {
            return self.hand_over();
        }
        let group = match self.flushing.try_lock() {
            Ok(group) => group,
            Err(_) if urgent => self.flushing(),
            Err(_) => return Ok(()),
        };
        let log = self.logging();
        let batch = self.core()?.log.take_full();
        match batch {
            Err(VolumeError::Full(None)) => {
                drop(log);
                self.write_checkpoint(&group, Occasion::Running)
            }
            batch => self.put_batch(batch?, &log),
        }
    }

    pub(super) fn checkpoint(&self) -> Result<(), VolumeError> {
        self.open()?;
        if self.read_only {
            return Ok(());
        }
        let group = self.flushing();
        self.checkpoint_if_changed(&group)
    }

    /// A checkpoint, if one is due still: somebody else may have made it meanwhile.
    pub(super) fn checkpoint_if_due(&self) -> Result<(), VolumeError> {
        self.ready()?;
        let group = self.flushing();
        let due = self.core()?.due(&self.backing);
        if due == Due::NotYet { Ok(()) } else { self.checkpoint_if_changed(&group) }
    }

    /// The volume's own thread was asked for one. If that comes to nothing it is not asked again: whoever needs one next, needs it at once
    /// and makes it himself.
    pub(super) fn asked_checkpoint(&self) {
        match self.checkpoint_if_due() {
            Ok(()) | Err(VolumeError::NoKeys | VolumeError::Closed) => {
                if let Ok(mut core) = self.core() {
                    core.asked = false;
                }
            }
            Err(error) => self.fruitless(&error),
        }
    }

    /// A checkpoint that no request waits for came to nothing. That the volume takes no more writes is told where it is found.
    fn fruitless(&self, error: &VolumeError) {
        if self.core().is_ok_and(|core| core.writable().is_ok()) {
            self.backing.events.note(&format!("a checkpoint came to nothing: {error}"));
        }
    }

    fn checkpoint_if_changed(&self, group: &MutexGuard<'_, ()>) -> Result<(), VolumeError> {
        self.not_closing()?;
        {
            let core = self.core()?;
            if !core.changed() && !core.superblock.clean && !core.log.is_held_up() {
                return core.writable();
            }
        }
        self.backing.has_keys()?;
        self.write_checkpoint(group, Occasion::Running)
    }

    /// The housekeeping thread's. One that fails is told of, unless it is tried `again`; returns false then.
    pub(super) fn timed_checkpoint(&self, again: bool) -> bool {
        let due = self.core().is_ok_and(|core| {
            core.last_checkpoint.elapsed() >= CHECKPOINT_EVERY && !core.log.is_empty() && core.writable().is_ok()
        });
        if due
            && let Err(error) = self.checkpoint()
            && !matches!(error, VolumeError::NoKeys | VolumeError::Closed)
        {
            if !again {
                self.fruitless(&error);
            }
            return false;
        }
        true
    }

    /// The housekeeping thread's: one step of a deletion that nobody else goes on with, for the thread has anchors to keep. One that
    /// fails is told of, unless it is tried `again`; returns false then.
    pub(super) fn timed_deletion(&self, again: bool) -> bool {
        let due = self.core().is_ok_and(|core| core.is_deleting() && core.writable().is_ok());
        if due
            && self.check_writable(0, 0).is_ok()
            && let Err(error) = self.deletion_step(&mut |_, _| {})
            && !matches!(error, VolumeError::NoKeys | VolumeError::Closed)
        {
            if !again {
                self.backing.events.note(&format!("a snapshot is not deleted yet: {error}"));
            }
            return false;
        }
        true
    }

    pub(super) fn close(&self) -> Result<VolumeAnchor, VolumeError> {
        let _closer = self.closer.lock().unwrap_or_else(PoisonError::into_inner);
        if self.open().is_err() {
            return self.anchoring.kept().ok_or(VolumeError::Closed);
        }
        if !self.read_only {
            self.backing.has_keys()?;
            self.anchoring.check()?;
            {
                let _alone = self.alone_anyway();
                let group = self.flushing();
                let (closed, good) = {
                    let core = self.core()?;
                    (core.superblock.clean && !core.changed(), core.writable())
                };
                good?;
                if !closed {
                    self.write_checkpoint(&group, Occasion::Closing)?;
                }
                // Nothing changes any more, lest there be a superblock newer than the anchor that this returns.
                self.closing.store(true, Ordering::Release);
            }
            if let Err(error) = self.anchoring.keep_now() {
                self.closing.store(false, Ordering::Release);
                return Err(error);
            }
        }
        self.closed.store(true, Ordering::Release);
        self.anchoring.kept().ok_or(VolumeError::NoAnchor)
    }

    /// Writes changed pages to free blocks, then the superblock to the other slot. If the pages can't be written, nothing has
    /// changed and the log goes on; if the superblock can't, the volume takes no more writes. What fails after that is no error:
    /// whoever called can't take back any more what has become durable.
    pub(super) fn write_checkpoint(&self, group: &MutexGuard<'_, ()>, occasion: Occasion) -> Result<(), VolumeError> {
        let from = &self.backing;
        let mut plan = self.freeze(occasion)?;
        if occasion == Occasion::Running {
            // What keeps it from that is told when this is done, if it still does.
            let _ = self.look_ahead(plan.taken() as u64, group);
        }
        let block = match plan.write(from) {
            Ok(block) => block,
            Err(error) => {
                self.with_core(|core| core.thaw(&mut plan, from))?;
                return Err(error);
            }
        };
        if let Err(error) = put_superblock(&block, plan.place, from) {
            return Err(self.core()?.fail(error, &*from.events));
        }
        {
            let anchor = self.core()?.settle(plan, from, occasion)?;
            self.anchoring.durable(anchor);
        }
        if occasion.waits_for_the_anchor() {
            return Ok(());
        }
        // Whoever is short of room must find what this freed, whatever it was made for.
        let tidied = self.punch_freed().and(self.wipe_stale_slots());
        let tidied = if occasion == Occasion::Running { tidied.and(self.top_up(group)) } else { tidied };
        if let Err(error) = tidied
            && !matches!(error, VolumeError::NoKeys)
        {
            from.events.note(&format!("after a checkpoint: {error}; the next one tries again"));
        }
        Ok(())
    }

    /// Decides what a checkpoint holds. Where each request hands its records to the log, they are handed to it before: with none lent to
    /// the checkpoint, requests go on meanwhile.
    fn freeze(&self, occasion: Occasion) -> Result<Plan, VolumeError> {
        let log = self.logging();
        let mut tries = if self.outlive { HAND_OVERS } else { 0 };
        loop {
            if tries > 0 {
                let batch = self.core()?.log.take_new();
                // What the log can't take, the checkpoint covers.
                if batch.and_then(|batch| self.put_batch(batch, &log)).is_err() {
                    tries = 0;
                }
            }
            let frozen = self.with_core(|core| match tries > 0 && core.log.has_new() {
                true => Ok(None),
                false => core.freeze(&self.backing, occasion).map(Some),
            })?;
            match frozen {
                Some(plan) => return Ok(plan),
                None => tries -= 1,
            }
        }
    }

    /// Whether the next checkpoint finds room for what requests change during this one is known before they do.
    /// It may take as many blocks as this one has `taken`.
    fn look_ahead(&self, taken: u64, group: &MutexGuard<'_, ()>) -> Result<(), VolumeError> {
        let have = self.with_core(|core| Ok(core.space.spare() as u64 + core.space.free_in_zone(&mut core.forest)?))?;
        // Those that this one replaces are spare again when it is done: no others are asked for where these will do, as new room of a
        // file costs each of its first writes dear.
        let target = spares(&self.backing);
        if have < taken.max(PAGES).min(target as u64) { self.reserve_spares(target, group) } else { Ok(()) }
    }

    /// Sees to it that pages find room in a store that runs full.
    pub(super) fn top_up(&self, group: &MutexGuard<'_, ()>) -> Result<(), VolumeError> {
        let target = spares(&self.backing);
        // A store that was full is asked until it has room for all.
        let enough = if self.core()?.tight { target } else { target / 2 + 1 };
        self.reserve_spares(enough, group)
    }

    /// Has the store set room aside until `enough` blocks are spare.
    fn reserve_spares(&self, enough: usize, _group: &MutexGuard<'_, ()>) -> Result<(), VolumeError> {
        let target = spares(&self.backing);
        let tight = self.core()?.tight;
        loop {
            let run = self.with_core(|core| {
                let (spare, near) = (core.space.spare(), self.backing.geometry().zone().end);
                if spare >= enough {
                    core.tight &= spare < target;
                    return Ok(None);
                }
                // Not the last blocks of the pool: these are for data.
                if core.free_for_data(&self.backing) <= 2 * target as u64 {
                    return Ok(None);
                }
                core.space.reserve(near, (target - spare) as u64, &mut core.forest).map(Some)
            })?;
            let Some(run) = run else { return Ok(()) };
            let block = crate::format::BLOCK as u64;
            let found = self.backing.store.reserve(run.start * block, (run.end - run.start) * block);
            let mut core = self.core()?;
            core.tight = found.is_err();
            if let Err(error) = found {
                core.space.unreserve(run);
                if !tight {
                    self.backing.events.note(&format!("the volume's store is full, writes may fail: {error}"));
                }
                return Ok(());
            }
            core.space.add_spare(run);
        }
    }
}

/// Spare blocks that a volume should have.
pub(super) fn spares(from: &Backing) -> usize {
    from.geometry().pages().min(SPARES) as usize
}

impl Core {
    /// Whether a checkpoint is due before more is written.
    pub(super) fn due(&self, from: &Backing) -> Due {
        let (dirty, full) = (self.forest.dirty(), self.log.free() < 2 * super::write::LOG_ROOM);
        // What changes while one is under way is the next one's, which must find room in memory, in the store and in the log as this one did.
        let now = full
            || dirty >= MOST_DIRTY
            || self.written - self.superblock.slot.written >= unlogged_bound(from)
            || !self.checkpointing && self.tight && dirty >= DIRTY_PAGES / 32;
        if now || self.superblock.clean {
            Due::Now
        } else if !self.checkpointing && (self.log.wants_checkpoint() || dirty >= DIRTY_PAGES) {
            Due::Soon
        } else {
            Due::NotYet
        }
    }

    /// Whether there is anything that the newest superblock does not say.
    pub(super) fn changed(&self) -> bool {
        !self.log.is_empty() || self.forest.dirty() > 0 || self.lists_changed()
    }

    /// A checkpoint is durable; its anchor.
    fn settle(&mut self, plan: Plan, from: &Backing, occasion: Occasion) -> Result<VolumeAnchor, VolumeError> {
        self.place = plan.place;
        (self.checkpointing, self.asked) = (false, false);
        let key = plan.next.key();
        plan.settle_pages(&mut self.forest, key);
        // The head may be further on by now, with blocks that are not durable.
        let (sequence, mut chain) = (plan.next.cut.sequence, plan.next.cut.chain);
        if sequence == 0 && occasion == Occasion::Opening {
            chain = from.with_keys(|_, key| Ok(key.log_seed(from.uuid, plan.next.writer.get(), &plan.next.mac)))?;
            self.log.chain = chain;
        }
        self.log.end_cut(plan.records);
        self.chains_settled(&plan);
        let plan_freed = plan.freed;
        self.superblock = plan.next;
        if !occasion.waits_for_the_anchor() {
            self.space.durable(plan.records);
            let stale = &self.stale_slots;
            let freed: Vec<u64> = plan_freed.into_iter().filter(|block| !stale.contains(block)).collect();
            self.space.release(&freed, spares(from));
        }
        self.last_checkpoint = Instant::now();
        Ok(self.anchor(sequence, chain, from))
    }
}

/// Writes between two superblocks, at most: what a crash may leave uncounted under a key.
pub(super) fn unlogged_bound(from: &Backing) -> u64 {
    from.geometry().log_blocks * RECORDS as u64
}

/// Everything before it durable, then both copies of the superblock, then these.
fn put_superblock(block: &crate::format::Block, place: usize, from: &Backing) -> Result<(), VolumeError> {
    from.sync()?;
    for at in from.geometry().superblocks(place) {
        from.write_blocks(at, block)?;
    }
    from.sync()
}

#[cfg(test)]
mod tests {
    use crate::format::BLOCK;
    use crate::{AnchorRefused, Anchors, Events, Kek, MemoryStore, Nobody, Store, Volume, inspect};
    use policy::disk::{CipherSuite, VolumeGrant};
    use policy::{AnchorMode, KeyId, VolumeAnchor, VolumeId};
    use secretmem::Secret;
    use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
    use std::sync::{Arc, Mutex, mpsc};
    use std::time::{Duration, Instant};

    /// Keeps each anchor; its answers are lost.
    struct Unheard(mpsc::Sender<VolumeAnchor>);

    impl Anchors for Unheard {
        fn keep(&self, anchor: &VolumeAnchor) -> Result<(), AnchorRefused> {
            let _ = self.0.send(anchor.clone());
            Err(AnchorRefused::Away("no answer".to_owned()))
        }
    }

    fn grant() -> VolumeGrant {
        VolumeGrant {
            volume: VolumeId::random(),
            customer: "acme".parse().expect("id"),
            cipher: CipherSuite::Aes256XtsHmacSha256,
            kek_id: KeyId(1),
            key_id: KeyId(2),
            open_number: 1.try_into().expect("number"),
            anchor: None,
            anchor_mode: AnchorMode::Close,
        }
    }

    /// A store that one day takes no writes, and counts them from then on.
    #[derive(Default)]
    struct Full {
        inner: MemoryStore,
        full: AtomicBool,
        refused: AtomicUsize,
    }

    impl Store for Full {
        fn len(&self) -> std::io::Result<u64> {
            self.inner.len()
        }
        fn read_at(&self, buffer: &mut [u8], offset: u64) -> std::io::Result<()> {
            self.inner.read_at(buffer, offset)
        }
        fn write_at(&self, bytes: &[u8], offset: u64) -> std::io::Result<()> {
            if self.full.load(Ordering::SeqCst) {
                self.refused.fetch_add(1, Ordering::SeqCst);
                return Err(std::io::ErrorKind::StorageFull.into());
            }
            self.inner.write_at(bytes, offset)
        }
        fn sync_data(&self) -> std::io::Result<()> {
            self.inner.sync_data()
        }
        fn set_len(&self, bytes: u64) -> std::io::Result<()> {
            self.inner.set_len(bytes)
        }
    }

    #[derive(Default)]
    struct Heard(Mutex<Vec<String>>);

    impl Events for Heard {
        fn integrity(&self, _: Option<u64>, _: Option<u64>, _: &str) {}
        fn note(&self, text: &str) {
            self.0.lock().expect("sound").push(text.to_owned());
        }
    }

    #[test]
    fn a_checkpoint_that_time_asks_for_and_that_keeps_failing_is_told_of_once() {
        let (store, heard) = (Arc::new(Full::default()), Arc::new(Heard::default()));
        let kek = Kek::new(KeyId(1), Secret::random().expect("room"));
        let volume = Volume::create(store.clone(), 1 << 20, &grant(), &kek, Arc::new(Nobody), heard.clone());
        let volume = volume.expect("a volume");
        let told = || heard.0.lock().expect("sound").iter().filter(|text| text.contains("came to nothing")).count();
        let until = |what: &str, is: &dyn Fn() -> bool| {
            let begun = Instant::now();
            while !is() {
                assert!(begun.elapsed() < Duration::from_secs(120), "not within 120 s: {what}");
                std::thread::sleep(Duration::from_millis(10));
            }
        };
        for round in 1..=2 {
            volume.write(0, &[7; BLOCK]).expect("written");
            store.full.store(true, Ordering::SeqCst);
            volume.shared.core().expect("sound").last_checkpoint -= super::CHECKPOINT_EVERY;
            until("it is told", &|| told() >= round);
            store.refused.store(0, Ordering::SeqCst);
            until("the checkpoint is tried again and again", &|| store.refused.load(Ordering::SeqCst) >= 3);
            assert_eq!(told(), round);
            store.full.store(false, Ordering::SeqCst);
            until("it is made", &|| !volume.shared.core().expect("sound").changed());
        }
    }

    /// An opener believes what a clean superblock says without making the log durable first.
    #[test]
    fn what_a_request_in_hand_writes_after_a_close_that_failed_does_not_follow_a_clean_superblock() {
        let grant = grant();
        let kek = Kek::new(KeyId(1), Secret::random().expect("room"));
        let (kept, anchors) = mpsc::channel();
        let (store, provider) = (Arc::new(MemoryStore::default()), Arc::new(Unheard(kept)));
        let volume = Volume::create(store.clone(), 1 << 20, &grant, &kek, provider, Arc::new(Nobody));
        let volume = volume.expect("a volume");
        let shared = &volume.shared;
        for discards in [false, true] {
            volume.write(0, &[1; BLOCK]).expect("written");
            // A request comes this far before the close.
            shared.make_room().expect("there is some");
            std::thread::scope(|scope| {
                let close = scope.spawn(|| volume.close());
                anchors.recv().expect("an anchor");
                // It asks no longer.
                volume.wipe_keys();
                close.join().expect("joined").expect_err("it heard no answer");
            });
            volume.put_back_keys(&kek).expect("the same key");
            assert!(inspect(&*store).expect("readable").closed);
            let _among_others = shared.among_others().expect("open again");
            if discards {
                shared.unmap_chunk(0..1, true).expect("discarded");
            } else {
                shared.write_blocks(0, &mut [[2; BLOCK]]).expect("written");
            }
            let core = shared.core().expect("sound");
            assert!(!core.log.is_empty() && !core.superblock.clean);
        }
    }
}
