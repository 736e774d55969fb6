//! An open volume: reads, writes, FLUSH, and what keeps them true.
//!
//! | module | what it does |
//! | --- | --- |
//! | `shared` | what all requests share: the locks, and memory that misses a page |
//! | `open` | opens a volume, makes a new one |
//! | `superblocks` | finds the superblock that the anchor allows |
//! | `recovery` | replays the log |
//! | `batch`, `read`, `write` | reads and writes blocks, those of several requests together |
//! | `discard` | TRIM and write-zeroes |
//! | `rekey` | other keys: rewrap, rotation |
//! | `slots` | where key slots lie, and how they go: erasure |
//! | `resize` | a volume that grows or shrinks |
//! | `reserve` | room that is kept for pages, and who is admitted for that |
//! | `snapshots` | snapshots: taken, gone back to, deleted |
//! | `durable`, `plan` | FLUSH and checkpoint |
//! | `log` | the ring of records |
//! | `anchoring` | anchors, kept at the provider |
//! | `housekeeping` | the volume's own thread |
//! | `clone` | the same data under another UUID |
//! | `check` | verifies all of it |
//!
//! Locks, in the order in which they are taken: `closer` (one `close` at a time), `gate` (held by each request that changes something, shared; and alone by what
//! must not meet one: a snapshot, a resize, `close`), `ranges` (two requests that change the same blocks follow each other),
//! `flushing` (one FLUSH or checkpoint at a time), `logging` (one writer of the log), `core` (map, free space, log), then either the keys' (over a computation, never
//! over I/O) or the anchors'. The volume's own thread holds one more while it has the volume, before all others. [`Volume::wipe_keys`] takes only the last two, so that no store and no provider can delay it.
//!
//! Requests share `core` alone, and hold it over look-ups in memory: neither a cipher nor the store is used under it. Where
//! memory misses a page of the map, the lock is let go, the page fetched and verified, and the request tries again.

mod anchoring;
mod batch;
mod check;
mod clone;
mod discard;
mod durable;
mod housekeeping;
mod log;
mod open;
mod plan;
mod read;
mod recovery;
mod rekey;
mod reserve;
mod resize;
mod shared;
mod slots;
mod snapshots;
mod superblocks;
mod write;

use crate::backing::Backing;
use crate::format::MAC;
use crate::format::anchor::AnchorFields;
use crate::format::page::{Entry, Tree, entry};
use crate::format::slot::Slot;
use crate::format::snapshot::Snapshot;
use crate::format::superblock::Superblock;
use crate::keys::KeyRing;
use crate::space::Space;
use crate::tree::{Forest, Halt, PageId};
use crate::{Kek, VolumeError};
use log::Log;
use policy::{KeyId, VolumeAnchor, VolumeId};
use serde::Serialize;
use shared::Shared;
use std::sync::Arc;
use std::time::{Duration, Instant};

pub use check::{CheckReport, CheckStep};
pub use open::{OpenOptions, PlainInfo, inspect, make_room};
pub use slots::erase;
pub use snapshots::SnapshotInfo;

/// Dirty pages at which a checkpoint is due, 4 MiB of them; and how many there are at most, also while one is under way.
const DIRTY_PAGES: usize = 1024;
const MOST_DIRTY: usize = DIRTY_PAGES * 3 / 2;
/// Time after which a checkpoint is due.
const CHECKPOINT_EVERY: Duration = Duration::from_secs(60);

/// An open volume. Everything takes `&self`; requests may come from several threads.
///
/// In a writable volume a thread of its own keeps anchors (mode `interval`) and makes the checkpoints that are due
/// ([`OpenOptions::background`]), one each minute at least. It runs under the seccomp filter of the thread that opened the volume, and opens no files.
///
/// Buffers must be private memory, not memory of a guest: a block is read, verified and decrypted in place.
pub struct Volume {
    shared: Arc<Shared>,
}

/// What `core` guards.
pub(crate) struct Core {
    pub(crate) forest: Forest,
    pub(crate) space: Space,
    pub(crate) log: Log,
    /// The newest durable superblock.
    pub(crate) superblock: Superblock,
    /// The slot in which it lies.
    pub(crate) place: usize,
    /// The highest epoch that was ever tried.
    pub(crate) epoch: u64,
    /// Blocks that hold data.
    pub(crate) mapped: u64,
    /// Older key slots, newest first; whether they changed; the blocks that hold them.
    pub(crate) older: Vec<Slot>,
    slots_changed: bool,
    slot_pages: Vec<u64>,
    /// Blocks that held slots and are held until they are overwritten.
    stale_slots: Vec<u64>,
    /// Snapshots, oldest first; whether they changed; the blocks that hold them.
    snapshots: Vec<Snapshot>,
    snapshots_changed: bool,
    snapshot_pages: Vec<u64>,
    snapshots_taken: u64,
    /// Why there may be more snapshots; only where nothing is written.
    unlisted: Option<(&'static str, std::io::Error)>,
    /// Generations given out under this open number.
    pub(crate) generations: u64,
    /// Blocks sealed under the current key.
    pub(crate) written: u64,
    /// It was told that this is nearly as many as it may be.
    warned: bool,
    /// Blocks that the last rotation passed over.
    not_renewed: u64,
    pub(crate) dropped: u64,
    /// The store had no room for more spare blocks.
    tight: bool,
    /// A checkpoint is under way.
    checkpointing: bool,
    asked: Asked,
    /// The map is a snapshot's.
    is_snapshot: bool,
    state: Condition,
    last_checkpoint: Instant,
}

/// What the volume's own thread was asked for.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Asked {
    Not,
    /// A checkpoint, which is not made yet.
    ForOne,
    /// Its last one came to nothing, and that was told: it is not asked again before one is made.
    InVain,
}

enum Condition {
    Good,
    /// Reads go on; what is durable is unknown.
    Failed(String),
}

/// Facts about an open volume.
#[derive(Clone, Debug, Serialize)]
pub struct VolumeInfo {
    /// Its UUID.
    pub volume: VolumeId,
    /// What the guest sees, in bytes.
    pub size: u64,
    /// What the store holds at most, in bytes.
    pub store_size: u64,
    /// Bytes of it that hold data.
    pub mapped: u64,
    /// Bytes of it in use: data, map, snapshots.
    pub used: u64,
    /// Bytes of data for which there is room beyond its size, in use or not: for what snapshots hold that it does not any more.
    pub room: u64,
    /// Bytes of data that can still be written to places that hold none, or that a snapshot holds. Some of it is for what is written anew.
    pub free: u64,
    /// Snapshots.
    pub snapshots: usize,
    /// The newest superblock's epoch.
    pub epoch: u64,
    /// Who wrote it: an open number.
    pub writer: u32,
    /// The key for new writes.
    pub key_id: KeyId,
    /// Keys that may still be in use, and that a rotation makes needless: those older than the current one, or than the first key of
    /// a rotation that took several.
    pub older_keys: usize,
    /// Blocks sealed under the current key.
    pub blocks_written: u64,
    /// Whether the current key has sealed so many that a rotation goes on under another only.
    pub key_used_up: bool,
    /// Blocks that the last rotation since it was opened left under older keys, because they, or the pages of the map that lead to them, or
    /// those of the free-space map that call them used, don't verify; of such a page of the map, or of a leaf that needs such a page of the
    /// free-space map, all blocks are counted, those too that hold nothing.
    pub not_renewed: u64,
    /// Unacknowledged writes that the last recovery found incomplete and dropped.
    pub dropped_writes: u64,
    /// Whether it takes writes.
    pub read_only: bool,
}

impl Volume {
    fn new(shared: Shared) -> Result<Self, VolumeError> {
        let shared = Arc::new(shared);
        if !shared.read_only {
            housekeeping::start(&shared)?;
        }
        Ok(Self { shared })
    }

    /// Its size in bytes, a multiple of 512.
    pub fn size(&self) -> u64 {
        self.shared.backing.geometry().size
    }

    /// Its UUID.
    pub fn id(&self) -> VolumeId {
        self.shared.backing.uuid
    }

    /// Whether it was opened for reading only.
    pub fn read_only(&self) -> bool {
        self.shared.read_only
    }

    /// Fills `buffer` from `offset`; both in multiples of 512 bytes. After an error the buffer is zero.
    pub fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<(), VolumeError> {
        self.read_many(&mut [(offset, buffer)]).pop().unwrap_or(Ok(()))
    }

    /// Several reads at once, each an offset and a buffer as for [`read`](Self::read); says of each how it went, in order. Their blocks
    /// are hashed and decrypted together, which takes less time than one by one; one that fails does not touch the others. They see
    /// what writes that returned before left.
    pub fn read_many(&self, requests: &mut [(u64, &mut [u8])]) -> Vec<Result<(), VolumeError>> {
        self.shared.read_many(requests)
    }

    /// Writes `data` at `offset`; both in multiples of 512 bytes. Durable after the next [`flush`](Self::flush), and there after the death
    /// of this process before that if the volume was opened so ([`OpenOptions::outlive`]). After an error each 4096-byte block of the
    /// range holds either the old or the new data.
    pub fn write(&self, offset: u64, data: &[u8]) -> Result<(), VolumeError> {
        self.shared.write(offset, data)
    }

    /// Several writes at once, each an offset and data as for [`write`](Self::write); says of each how it went, in order. Their blocks
    /// are encrypted and hashed together, which takes less time than one by one; one that fails does not touch the others. Where
    /// two of them meet, the later one holds.
    pub fn write_many(&self, requests: &[(u64, &[u8])]) -> Vec<Result<(), VolumeError>> {
        self.shared.write_many(requests)
    }

    /// TRIM: the 4096-byte blocks that lie wholly within `length` bytes at `offset` (multiples of 512) read as zeroes from now on, and
    /// their room is given back to the store after the next [`flush`](Self::flush); the rest of the range is left as it is.
    /// Durable like a write. After an error each block holds either its old data or zeroes. Beside a snapshot it takes room for the map, and
    /// may be refused as a write is ([`VolumeError::Full`]).
    pub fn discard(&self, offset: u64, length: u64) -> Result<(), VolumeError> {
        self.shared.discard(offset, length)
    }

    /// `length` bytes at `offset` (multiples of 512) read as zeroes from now on. With `may_unmap` the room of whole 4096-byte blocks is
    /// given back to the store after the next [`flush`](Self::flush); without, the store keeps it for later writes of this volume.
    /// Durable like a write. After an error each block holds either its old data or zeroes.
    pub fn write_zeroes(&self, offset: u64, length: u64, may_unmap: bool) -> Result<(), VolumeError> {
        self.shared.write_zeroes(offset, length, may_unmap)
    }

    /// Returns when every write and discard that returned before is durable, and anchored as the mode asks.
    pub fn flush(&self) -> Result<(), VolumeError> {
        self.shared.flush()
    }

    /// Writes the map, so that opening needs no replay. Includes a FLUSH of the data, not its anchor: the provider can't delay it. Where
    /// nothing changed since the last one it needs no keys.
    pub fn checkpoint(&self) -> Result<(), VolumeError> {
        self.shared.checkpoint()
    }

    /// Returns when the volume's own thread does nothing with it: what requests have cost is spent then.
    pub fn rest(&self) {
        self.shared.housekeeper.rest();
    }

    /// Flushes, checkpoints, and waits (30 s at most) until the anchor is kept; then wipes the keys. After an error the volume
    /// is still open, and this can be called again. Returns the anchor, also when it was closed already.
    pub fn close(&self) -> Result<VolumeAnchor, VolumeError> {
        let anchor = self.shared.close()?;
        self.shared.stop();
        self.shared.backing.set_keys(None);
        Ok(anchor)
    }

    /// Takes a snapshot of what every write that returned before left, and returns its number. It is durable, and anchored as the mode
    /// asks; requests that change something wait meanwhile. `name` has 1 to 64 bytes without control characters. It is refused
    /// ([`VolumeError::Full`]) where others have used up the room, so that nothing could be changed beside it.
    pub fn take_snapshot(&self, name: &str) -> Result<u64, VolumeError> {
        self.shared.take_snapshot(name)
    }

    /// The volume's snapshots, oldest first.
    pub fn snapshots(&self) -> Result<Vec<SnapshotInfo>, VolumeError> {
        self.shared.snapshots()
    }

    /// Deletes a snapshot and frees what only it has; says on the way how many blocks of how many were looked at. Requests go on
    /// between its steps. Durable, and anchored as the mode asks. What a crash interrupts, the next call of this or of
    /// [`revert`](Self::revert), or the volume's own thread, takes up again.
    pub fn delete_snapshot(&self, id: u64, heard: &mut dyn FnMut(u64, u64)) -> Result<(), VolumeError> {
        self.shared.delete_snapshot(id, heard)
    }

    /// The volume holds what its newest snapshot held; what was written since is gone. Its size stays, and must not be smaller than the
    /// snapshot's. The snapshot stays too. Moves the anchor forward: the volume can't be brought back to before.
    pub fn revert(&self, id: u64) -> Result<(), VolumeError> {
        self.shared.revert(id)
    }

    /// The volume has `size` bytes from now on, at least as many as now; what is new reads as zeroes. Requests that change something
    /// wait meanwhile. Durable, and anchored as the mode asks. Snapshots keep their size. A store that is longer than the volume needs is
    /// used to its end: its room is for snapshots. After an error [`size`](Self::size) is what it was, and the volume goes on with that,
    /// unless it grew and only its anchor is still to be kept.
    pub fn grow(&self, size: u64) -> Result<(), VolumeError> {
        self.shared.grow(size)
    }

    /// The volume has room for `room` bytes of data beyond its size from now on, or as much as it has if that is more: for what snapshots hold
    /// that it does not any more. The store becomes as long as that takes. Durable, and anchored as the mode asks.
    pub fn widen(&self, room: u64) -> Result<(), VolumeError> {
        self.shared.widen(room)
    }

    /// The volume has `size` bytes from now on, at most as many as now. Data behind that is lost where `discard_tail` says that it may be,
    /// and keeps this from being done otherwise. Durable, and anchored as the mode asks, before the room of what is lost is given back to
    /// the store; `heard` is told of how many blocks of how many are looked at for that. What a crash interrupts of it, the volume's
    /// own thread takes up again. A crash before leaves the volume as large as it was, with all its data, but that with `discard_tail` the
    /// rest of a block that the new end cuts may be zero. Snapshots keep their size and what they hold. The store stays as long as
    /// it is: data may lie anywhere in it.
    pub fn shrink(
        &mut self,
        size: u64,
        discard_tail: bool,
        heard: &mut dyn FnMut(u64, u64),
    ) -> Result<(), VolumeError> {
        self.shared.shrink(size, discard_tail, heard)
    }

    /// Wraps the volume's masters under `new` instead of `old`, its key-encryption key so far. The provider must keep both until it has
    /// an anchor that names `new`, and may forget `old` then: wherever a crash interrupts this, the key that the newest anchor
    /// names opens the volume.
    pub fn rewrap(&self, old: &Kek, new: &Kek) -> Result<(), VolumeError> {
        self.shared.rewrap(old, new)
    }

    /// Seals all data and pages under the current key that are under an older one, while requests are served, and then forgets the older
    /// keys, unless snapshots need them. `heard` is told of how many blocks of how many were looked at, those of the map included, and ends
    /// it by returning `false`; then, and after a crash, the next call goes on. Returns whether it came to its end, which is durable, and
    /// anchored as the mode asks.
    ///
    /// A new key comes with a grant that names its id: open the volume with it, then call this. Where one key can't seal so much, it ends
    /// with [`VolumeError::KeyExhausted`], and an eighth of what the key may seal is left for other writes: open the volume with
    /// another new key, and it goes on under that. What does not verify is passed over, and keeps its key: see
    /// [`VolumeInfo::not_renewed`].
    pub fn rotate(&self, heard: &mut dyn FnMut(u64, u64) -> bool) -> Result<bool, VolumeError> {
        self.shared.rotate(heard)
    }

    /// The lease is over: wipes the keys at once, whatever store and provider do. Later requests, and those that are under way
    /// and still need a key, get [`VolumeError::NoKeys`] and change nothing.
    pub fn wipe_keys(&self) {
        self.shared.backing.set_keys(None);
        self.shared.anchoring.set_wiped(true);
    }

    /// The same key-encryption key again: nothing was lost.
    pub fn put_back_keys(&self, kek: &Kek) -> Result<(), VolumeError> {
        let slots = {
            let core = self.shared.core()?;
            self.shared.open()?;
            [std::slice::from_ref(&core.superblock.slot), &core.older].concat()
        };
        self.shared.backing.set_keys(Some(KeyRing::open(&slots, kek, &self.shared.customer)?));
        self.shared.anchoring.set_wiped(false);
        Ok(())
    }

    /// Whether FLUSH waits for the provider, which it does at first. While it does not, one whose anchor the mode asks for, and that is not kept
    /// yet, gives [`AnchorRefused::Away`](crate::AnchorRefused::Away), those that wait at once: their data are durable, and who sent one sends it again later.
    pub fn let_flush_wait(&self, wait: bool) {
        self.shared.anchoring.set_hasty(!wait);
    }

    /// Facts.
    pub fn info(&self) -> VolumeInfo {
        self.shared.info()
    }

    /// Reads and verifies everything; see [`CheckStep`] for what it says on the way.
    pub fn check(&self, heard: &mut dyn FnMut(CheckStep)) -> Result<CheckReport, VolumeError> {
        check::check(&self.shared, heard)
    }
}

impl Drop for Volume {
    fn drop(&mut self) {
        self.shared.backing.set_keys(None);
        self.shared.stop();
    }
}

impl Core {
    /// An error unless the volume takes writes.
    fn writable(&self) -> Result<(), VolumeError> {
        match &self.state {
            Condition::Good => Ok(()),
            Condition::Failed(why) => Err(VolumeError::Failed(why.clone())),
        }
    }

    /// No more writes: what is durable is unknown.
    fn fail(&mut self, error: VolumeError, events: &dyn crate::Events) -> VolumeError {
        self.give_up(error.to_string(), events);
        error
    }

    fn give_up(&mut self, why: String, events: &dyn crate::Events) {
        if matches!(self.state, Condition::Good) {
            events.note(&format!("the volume takes no more writes: {why}"));
            self.state = Condition::Failed(why);
        }
    }

    /// The anchor of the newest superblock and a log that is durable up to its block `sequence`, which follows `chain`.
    fn anchor(&self, sequence: u64, chain: [u8; MAC], backing: &Backing) -> VolumeAnchor {
        let fields = AnchorFields {
            volume: backing.uuid,
            writer: self.superblock.writer,
            epoch: self.superblock.epoch,
            sequence,
            chain,
            root: self.superblock.mac,
            key: self.superblock.key(),
            kek: self.superblock.slot.kek,
        };
        fields.build()
    }

    /// The map's entries for the blocks from `first` on, as many as `out` holds.
    fn lookup(&mut self, first: u64, out: &mut [Entry]) -> Result<(), Halt> {
        let mut done = 0;
        while done < out.len() {
            let (id, start) = leaf(first + done as u64);
            let page = self.forest.peek(id)?;
            let count = (crate::format::page::ENTRIES - start).min(out.len() - done);
            for (i, slot) in out[done..done + count].iter_mut().enumerate() {
                *slot = page.map_or(Entry::UNMAPPED, |page| entry(&page.bytes, start + i));
            }
            done += count;
        }
        Ok(())
    }

    /// Whether a snapshot reaches the block of data that `entry` names for `lba`.
    fn data_is_retained(&self, lba: u64, entry: &Entry) -> bool {
        self.snapshots.iter().any(|s| entry.generation < s.generation && s.dying.is_none_or(|position| lba >= position))
    }

    /// Whether a snapshot reaches a page of the map that was born at epoch `birth`.
    fn page_is_retained(&self, id: PageId, birth: u64) -> bool {
        // One that is being taken by this very checkpoint reaches what the checkpoint writes, not what that replaces.
        let taken = self.snapshots.iter().filter(|s| s.epoch <= self.epoch);
        taken.into_iter().any(|s| birth <= s.epoch && s.dying.is_none_or(|position| end_of(id) > position))
    }
}

/// The first logical block behind those of a page of the map.
fn end_of(id: PageId) -> u64 {
    id.blocks().end
}

/// The leaf of a logical block, and its place within.
pub(crate) fn leaf(lba: u64) -> (PageId, usize) {
    let entries = crate::format::page::ENTRIES as u64;
    (PageId { tree: Tree::Map, level: 0, index: lba / entries }, (lba % entries) as usize)
}
