//! Room that is kept for pages, so that a volume can always be flushed, closed, opened, and rid of a snapshot.
//!
//! A page of the map that a snapshot holds is not freed when a newer version of it is written: whoever changes a leaf beside a
//! snapshot takes room for good, also who only discards. So requests are admitted one by one, under the volume's lock, for
//!
//! > **the invariant**: the free blocks, spare ones included, are at least one for each page of the map that checkpoints still have to find
//! > a place for (the dirty ones, those that requests in hand will make dirty, and all pages above them), and
//! > [`kept_for_good`](crate::format::geometry::Geometry::kept_for_good), of which the lists of key slots and snapshots have a part already.
//!
//! Then all of these find room, one after the other and again after a crash at any point:
//!
//! - a checkpoint: it writes those pages of the map, and bitmaps and lists, whose old places are free again when it is done. So it
//!   leaves the second part whole, and nothing of the first is needed any more;
//! - an opener's checkpoint: the log leads to pages that were dirty, and what was on its way then is free;
//! - a step of a deletion, which writes bitmaps and the list of snapshots only; and so do rewrap and the end of a rotation;
//! - going back to a snapshot: a page for each level and one more of the list, until what the volume held is deleted, which frees more;
//! - `close`, which writes nothing more than a checkpoint.
//!
//! Data leaves more alone ([`kept_for_pages`](crate::format::geometry::Geometry::kept_for_pages)): what a volume that is full still takes are discards, and then none of these
//! beside a snapshot either.
//!
//! A volume that an earlier version brought below that is made longer by the next opener, before its first checkpoint.

use super::Core;
use super::resize::old_end;
use super::shared::Shared;
use super::write::PATIENCE;
use crate::VolumeError;
use crate::backing::Backing;
use crate::format::BLOCK;
use crate::tree::Halt;
use std::time::Duration;

/// What a request takes.
#[derive(Clone, Copy)]
pub(super) struct Wants {
    /// Blocks for data.
    pub(super) data: u64,
    /// Leaves of the map that it changes, at most.
    pub(super) leaves: u64,
}

impl Shared {
    /// As [`with_core`](Self::with_core), for `f` that changes the map once it is [admitted](Core::admit); but what is only short of room because
    /// of others, or until a checkpoint, waits for that. The caller holds neither `flushing` nor the gate alone.
    pub(super) fn with_room<R>(
        &self,
        wants: Wants,
        mut f: impl FnMut(&mut Core) -> Result<R, Halt>,
    ) -> Result<R, VolumeError> {
        let from = &self.backing;
        for _ in 0..PATIENCE {
            let done = self.with_core(|core| {
                core.admit(wants, from)?;
                f(core)
            });
            let Err(VolumeError::Full(in_store)) = &done else { return done };
            let in_store = in_store.is_some();
            let (checkpointing, checkpoint, fits, frees_more) = {
                let core = self.core()?;
                let for_data = core.free_for_data(from) < wants.data;
                let for_pages =
                    !for_data && core.forest.dirty() > 0 && core.free_for_pages() < core.taken_with(wants, from);
                // A store that is full has room for the pages that are dirty, and needs none for them afterwards.
                let for_store = in_store && core.forest.dirty() > 0;
                let fits = !in_store && core.fits_alone(wants, from);
                let checkpoint = core.room_in_log().is_err() || for_pages || for_store;
                (core.checkpointing, checkpoint, fits, core.space.frees_more())
            };
            if checkpointing {
                // What room there is shows when it is done.
                drop(self.flushing()?);
            } else if checkpoint {
                match self.checkpoint() {
                    Err(_) if in_store => return done,
                    made => made?,
                }
                if self.core()?.room_in_log().is_err() {
                    // Other requests hold more of the log than they will need when they are done.
                    std::thread::sleep(Duration::from_millis(1));
                }
            } else if !fits {
                return done;
            } else if frees_more {
                // Blocks that were superseded are free once that is durable.
                let group = self.flushing()?;
                self.commit(&group)?;
                drop(group);
                self.punch_freed()?;
            } else {
                // Other requests hold more blocks than they will need when they are done.
                std::thread::sleep(Duration::from_millis(1));
            }
        }
        Err(VolumeError::Full(None))
    }

    /// Before an opener's first checkpoint: a volume in which that, or what must be possible after it, would not find room gets more. Where
    /// the store has none, returns why, for the checkpoint may find room all the same.
    pub(super) fn make_room_to_open(&self) -> Result<Option<VolumeError>, VolumeError> {
        let from = &self.backing;
        let missing = {
            let core = self.core()?;
            core.taken_with(Wants { data: 0, leaves: 0 }, from).saturating_sub(core.free_for_pages())
        };
        if missing == 0 {
            return Ok(None);
        }
        let old = from.geometry();
        let found = from.store.len().map_err(VolumeError::store("say its length"))?;
        // Once more what is kept: the bitmap grows too.
        let needed = (old.total + missing + old.kept_for_good()) * BLOCK as u64;
        let new = old.grown(old.size, found.max(needed))?;
        if new.total == old.total {
            // It is as long as a volume's store may be.
            return Ok(None);
        }
        if let Err(why) = self.lengthen_store(found, &new) {
            return Ok(Some(why));
        }
        self.with_core(|core| core.lengthen(&new))?;
        from.set_geometry(new);
        self.with_core(|core| core.move_fence(&old, &new))?;
        // The superblock that was read has a copy there: it stays until the next one is anchored, and is wiped then.
        self.core()?.stale_slots.extend(old_end(&old, &new));
        let length = new.total * BLOCK as u64;
        from.events
            .note(&format!("the volume's snapshots left its map no room: its store has {length} bytes from now on"));
        Ok(None)
    }
}

impl Core {
    /// An error where the room that is kept for pages would not be left: [`VolumeError::Full`]. A volume that takes no more writes says
    /// that instead: no room would help it.
    pub(super) fn admit(&mut self, wants: Wants, from: &Backing) -> Result<(), Halt> {
        self.writable()?;
        if self.free_for_data(from) < wants.data || self.free_for_pages() < self.taken_with(wants, from) {
            return Err(VolumeError::Full(None).into());
        }
        if self.tight {
            // The store may have room for no others.
            let have = self.space.spare() as u64 + self.space.free_in_zone(&mut self.forest)?;
            let need = 2 * self.forest.dirty() as u64 + 64;
            if have < need.min(from.geometry().pages()) {
                return Err(VolumeError::Full(Some(rustix::io::Errno::NOSPC.into())).into());
            }
        }
        Ok(())
    }

    /// Blocks that data may still take.
    pub(super) fn free_for_data(&self, from: &Backing) -> u64 {
        // What is spare belongs to the pages already.
        (self.space.free() + self.space.spare() as u64).saturating_sub(from.geometry().kept_for_pages())
    }

    /// Blocks that pages may still take, and those of the lists, which count among what is kept.
    fn free_for_pages(&self) -> u64 {
        self.space.free() + self.space.spare() as u64 + self.in_lists()
    }

    fn in_lists(&self) -> u64 {
        (self.slot_pages.len() + self.snapshot_pages.len()) as u64
    }

    /// What must be free for the invariant to hold with a request's data and leaves.
    fn taken_with(&self, wants: Wants, from: &Backing) -> u64 {
        let geometry = from.geometry();
        let most = geometry.map_pages();
        let rest = wants.data + geometry.kept_for_good();
        if self.free_for_pages() >= rest + most {
            // There is room for all of the map: nothing need be counted.
            return rest + most;
        }
        let to_come = (self.log.promised() + wants.leaves) * u64::from(geometry.map_levels);
        rest + most.min(self.forest.map_pages_to_write() + to_come)
    }

    /// Whether there is room for a request where nothing else is in hand, and all is durable.
    fn fits_alone(&self, wants: Wants, from: &Backing) -> bool {
        let geometry = from.geometry();
        let pages = geometry.map_pages().min(wants.leaves * u64::from(geometry.map_levels));
        let kept = (pages + geometry.kept_for_good()).saturating_sub(self.in_lists());
        let kept = if wants.data > 0 { kept.max(geometry.kept_for_pages()) } else { kept };
        let pool = geometry.pool();
        self.space.used() + wants.data + kept <= pool.end - pool.start
    }
}

#[cfg(test)]
mod tests {
    use crate::format::BLOCK;
    use crate::format::page::ENTRIES;
    use crate::{AnchorRefused, Anchors, Events, Kek, MemoryStore, OpenOptions, Store, Volume, VolumeError};
    use policy::disk::{CipherSuite, VolumeGrant};
    use policy::{AnchorMode, KeyId, VolumeAnchor, VolumeId};
    use secretmem::Secret;
    use std::io;
    use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
    use std::sync::{Arc, Mutex};

    const BLOCKS: u64 = 2048;

    /// Keeps anchors, and hears what a volume notes.
    #[derive(Default)]
    struct Provider {
        anchor: Mutex<Option<VolumeAnchor>>,
        notes: Mutex<Vec<String>>,
        away: Mutex<bool>,
    }

    impl Anchors for Provider {
        fn keep(&self, anchor: &VolumeAnchor) -> Result<(), AnchorRefused> {
            if *self.away.lock().expect("no panic") {
                return Err(AnchorRefused::GivenUp("not now".to_owned()));
            }
            *self.anchor.lock().expect("no panic") = Some(anchor.clone());
            Ok(())
        }
    }

    impl Events for Provider {
        fn integrity(&self, lba: Option<u64>, physical: Option<u64>, reason: &str) {
            panic!("{lba:?} {physical:?} {reason}");
        }
        fn note(&self, text: &str) {
            self.notes.lock().expect("no panic").push(text.to_owned());
        }
    }

    /// A block device, which has the length that it has; or a file whose process dies so many writes on its way.
    #[derive(Clone)]
    struct Device {
        store: Arc<MemoryStore>,
        dies: Option<Arc<AtomicU64>>,
    }

    impl Device {
        fn lives(&self) -> io::Result<()> {
            let left = self.dies.as_ref().map(|left| left.fetch_update(Relaxed, Relaxed, |left| left.checked_sub(1)));
            if let Some(Err(_)) = left { Err(io::Error::other("dead")) } else { Ok(()) }
        }
    }

    impl Store for Device {
        fn len(&self) -> io::Result<u64> {
            self.store.len()
        }
        fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
            self.store.read_at(buffer, offset)
        }
        fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
            self.lives()?;
            self.store.write_at(bytes, offset)
        }
        fn sync_data(&self) -> io::Result<()> {
            self.lives()?;
            self.store.sync_data()
        }
        fn set_len(&self, bytes: u64) -> io::Result<()> {
            self.dies.as_ref().ok_or(io::ErrorKind::StorageFull)?;
            self.lives()?;
            self.store.set_len(bytes)
        }
        fn reserve(&self, offset: u64, bytes: u64) -> io::Result<()> {
            self.store.reserve(offset, bytes)
        }
        fn punch(&self, offset: u64, bytes: u64) -> io::Result<()> {
            self.store.punch(offset, bytes)
        }
    }

    struct Fixture {
        store: Arc<MemoryStore>,
        provider: Arc<Provider>,
        kek: Kek,
        volume: VolumeId,
        openings: u64,
    }

    impl Fixture {
        fn grant(&mut self) -> VolumeGrant {
            self.openings += 1;
            VolumeGrant {
                volume: self.volume,
                customer: "acme".parse().expect("id"),
                cipher: CipherSuite::Aes256XtsHmacSha256,
                kek_id: KeyId(1),
                key_id: KeyId(2),
                open_number: self.openings.try_into().expect("number"),
                anchor: self.provider.anchor.lock().expect("no panic").clone(),
                anchor_mode: AnchorMode::Close,
            }
        }

        fn open(&mut self, store: impl Store + 'static) -> Result<Volume, VolumeError> {
            let grant = self.grant();
            Volume::open(store, &grant, &self.kek, OpenOptions::default(), self.provider.clone(), self.provider.clone())
        }

        /// A full volume as an earlier version left it, which took discards beside snapshots as long as its log did. Returns how
        /// many blocks at the beginning of each leaf are gone.
        fn used_up() -> (Self, usize) {
            let (store, provider) = (Arc::new(MemoryStore::default()), Arc::new(Provider::default()));
            let kek = Kek::new(KeyId(1), Secret::random().expect("room"));
            let mut fixture = Self { store, provider, kek, volume: VolumeId::random(), openings: 0 };
            let (grant, provider) = (fixture.grant(), fixture.provider.clone());
            let size = BLOCKS * BLOCK as u64;
            let volume = Volume::create(fixture.store.clone(), size, &grant, &fixture.kek, provider.clone(), provider);
            let volume = volume.expect("a volume");
            volume.write(0, &vec![7; size as usize]).expect("written");
            volume.close().expect("closed");
            let volume = fixture.open(fixture.store.clone()).expect("opens");
            let shared = &volume.shared;
            for round in 0..ENTRIES {
                shared.core().expect("sound").add_snapshot("one", size).expect("not too many");
                let checkpoint = volume.checkpoint();
                for lba in (round as u64..BLOCKS).step_by(ENTRIES) {
                    // What a discard does when it is admitted.
                    let unmapped = shared.with_core(|core| core.unmap(lba..lba + 1, true));
                    unmapped.expect("the log has room");
                }
                let flushed = volume.flush();
                if let Err(error) = checkpoint.and(flushed).and_then(|()| volume.checkpoint()) {
                    assert!(matches!(error, VolumeError::Full(None)), "{error}");
                    let id = volume.snapshots().expect("a list")[0].id;
                    volume.delete_snapshot(id, &mut |_, _| {}).expect_err("this is the state");
                    volume.close().expect_err("this is the state");
                    return (fixture, round + 1);
                }
            }
            panic!("there was room for all of that");
        }
    }

    #[track_caller]
    fn holds(volume: &Volume, gone: usize) {
        let mut found = [0; BLOCK];
        for lba in 0..BLOCKS {
            volume.read(lba * BLOCK as u64, &mut found).expect("read");
            let expected = if lba as usize % ENTRIES < gone { 0 } else { 7 };
            assert!(found == [expected; BLOCK], "block {lba}");
        }
    }

    #[test]
    fn a_volume_whose_pages_find_no_room_gets_more_when_it_is_opened() {
        let (mut fixture, gone) = Fixture::used_up();
        let (store, length) = (fixture.store.clone(), fixture.store.len().expect("known"));
        // Nothing of what was there goes before the larger volume is anchored.
        *fixture.provider.away.lock().expect("no panic") = true;
        assert!(matches!(fixture.open(store.clone()), Err(VolumeError::Anchor(_))));
        *fixture.provider.away.lock().expect("no panic") = false;
        let volume = fixture.open(store.clone()).expect("opens");
        let longer = store.len().expect("known");
        assert!(longer > length && longer < length + length / 4, "{length} {longer}");
        assert!(fixture.provider.notes.lock().expect("no panic").iter().any(|note| note.contains(&longer.to_string())));
        holds(&volume, gone);
        let report = volume.check(&mut |_| {}).expect("a check");
        assert!(report.good() && report.leaked_blocks == 0, "{report:?}");
        for snapshot in volume.snapshots().expect("a list") {
            volume.delete_snapshot(snapshot.id, &mut |_, _| {}).expect("deleted");
        }
        volume.close().expect("closed");
        drop(volume);
        let volume = fixture.open(store.clone()).expect("opens");
        holds(&volume, gone);
        assert_eq!(store.len().expect("known"), longer, "once is enough");
        let report = volume.check(&mut |_| {}).expect("a check");
        assert!(report.good() && report.leaked_blocks == 0, "{report:?}");
    }

    #[test]
    fn wherever_its_opener_dies_the_next_one_opens_it() {
        let mut opened = 0;
        for writes in 0..200 {
            let (mut fixture, gone) = Fixture::used_up();
            let dies = Some(Arc::new(AtomicU64::new(writes)));
            let died = fixture.open(Device { store: fixture.store.clone(), dies }).is_err();
            let volume = fixture.open(fixture.store.clone()).expect("opens");
            holds(&volume, gone);
            volume.delete_snapshot(1, &mut |_, _| {}).expect("deleted");
            volume.close().expect("closed");
            opened += u32::from(!died);
            if opened > 2 {
                assert!(writes > 8, "it never died");
                return;
            }
        }
        panic!("it takes more writes than that?");
    }

    /// More room would not help it.
    #[test]
    fn a_volume_that_takes_no_more_writes_says_so_also_where_its_pages_have_no_room() {
        let kek = Kek::new(KeyId(1), Secret::random().expect("room"));
        let (store, provider) = (Arc::new(MemoryStore::default()), Arc::new(Provider::default()));
        let mut fixture = Fixture { store, provider, kek, volume: VolumeId::random(), openings: 0 };
        let (grant, provider) = (fixture.grant(), fixture.provider.clone());
        let volume = Volume::create(fixture.store.clone(), 1 << 20, &grant, &fixture.kek, provider.clone(), provider);
        let volume = volume.expect("a volume");
        volume.write(0, &[1; BLOCK]).and_then(|()| volume.checkpoint()).expect("written");
        let taken = volume.shared.with_core(|core| {
            // As a checkpoint leaves them whose superblock may be durable or not.
            core.tight = true;
            for _ in 0..core.space.spare() as u64 + core.space.free_in_zone(&mut core.forest)? {
                core.space.reserve_for_page(&mut core.forest)?;
            }
            Ok(())
        });
        taken.expect("there are some");
        assert!(matches!(volume.discard(0, BLOCK as u64), Err(VolumeError::Full(Some(_)))));
        volume.shared.core().expect("sound").fail(VolumeError::System("write a superblock"), &*fixture.provider);
        let refused = volume.discard(0, BLOCK as u64).expect_err("it takes no more writes");
        assert!(matches!(refused, VolumeError::Failed(_)), "{refused}");
    }

    /// What it took for pages, and what those replace, is no room that a request has to do without.
    #[test]
    fn a_request_that_finds_no_room_during_a_checkpoint_waits_for_it() {
        let kek = Kek::new(KeyId(1), Secret::random().expect("room"));
        let (store, provider) = (Arc::new(MemoryStore::default()), Arc::new(Provider::default()));
        let mut fixture = Fixture { store, provider, kek, volume: VolumeId::random(), openings: 0 };
        let (grant, provider) = (fixture.grant(), fixture.provider.clone());
        let volume = Volume::create(fixture.store.clone(), 1 << 20, &grant, &fixture.kek, provider.clone(), provider);
        let volume = volume.expect("a volume");
        volume.write(0, &[1; BLOCK]).and_then(|()| volume.checkpoint()).expect("written");
        let shared = &volume.shared;
        let counted = shared.with_core(|core| {
            let mut one_by_one = 0;
            for block in shared.backing.geometry().zone() {
                one_by_one += u64::from(core.space.is_free(block, &mut core.forest)?);
            }
            Ok((core.space.free_in_zone(&mut core.forest)?, one_by_one))
        });
        assert!(counted.is_ok_and(|(free, one_by_one)| free == one_by_one && free > 0));
        let group = shared.flushing().expect("sound");
        // As one leaves them whose pages are on their way, in a store that is full.
        let taken = shared.with_core(|core| {
            (core.checkpointing, core.tight) = (true, true);
            let spare = core.space.spare();
            let all = spare as u64 + core.space.free_in_zone(&mut core.forest)?;
            let taken = (0..all).map(|_| core.space.reserve_for_page(&mut core.forest));
            Ok((taken.collect::<Result<Vec<_>, _>>()?, spare))
        });
        let (taken, spare) = taken.expect("there are some");
        std::thread::scope(|scope| {
            let discard = scope.spawn(|| volume.discard(0, BLOCK as u64));
            std::thread::sleep(std::time::Duration::from_millis(50));
            {
                let mut core = shared.core().expect("sound");
                core.space.give_back(&taken, spare);
                core.checkpointing = false;
            }
            drop(group);
            discard.join().expect("no panic").expect("there is room again");
        });
    }

    #[test]
    fn on_a_device_such_a_volume_asks_for_a_longer_one() {
        let (mut fixture, gone) = Fixture::used_up();
        let length = fixture.store.len().expect("known");
        let device = Device { store: fixture.store.clone(), dies: None };
        let refused = fixture.open(device.clone()).err().expect("no room");
        let VolumeError::TooShort { found, needed } = refused else { panic!("{refused}") };
        assert!(found == length && needed > length);
        fixture.store.set_len(needed).expect("longer");
        let volume = fixture.open(device).expect("opens");
        holds(&volume, gone);
    }
}
