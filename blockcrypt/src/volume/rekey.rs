//! New keys for old: the key-encryption key's change, and the master's rotation.
//!
//! - **Rewrap**: each slot's master is wrapped under another key-encryption key. No block changes. A superblock with the new wrappings
//!   is written and anchored while the one before, with the old ones, still stands: the anchor's key opens the anchored state.
//! - **Rotation**: an opener whose grant names a new key id has a new master for what it writes. [`Shared::rotate`] writes
//!   the rest again under it, block by block and page by page, while requests are served; what is under the new key already is
//!   passed over, so that a crash costs nothing but a look at the map. When nothing needs them any more, the older slots go.
//!   Where one key can't seal all, another follows, with another opening: the superblock says under which one the rotation began.

use super::batch::CHUNK;
use super::durable::Occasion;
use super::reserve::Wants;
use super::shared::Shared;
use super::{Core, leaf};
use crate::backing::Backing;
use crate::format::page::{ENTRIES, Entry, Tree};
use crate::format::slot::Slot;
use crate::format::{BLOCK, Block};
use crate::space::bitmap;
use crate::tree::{Halt, PageId};
use crate::{Kek, VolumeError};
use policy::KeyId;

impl Shared {
    pub(super) fn rewrap(&self, old: &Kek, new: &Kek) -> Result<(), VolumeError> {
        self.check_writable(0, 0)?;
        let alone = self.alone()?;
        let group = self.flushing()?;
        let (current, older) = {
            let core = self.core()?;
            core.writable()?;
            (core.superblock.slot.clone(), core.older.clone())
        };
        let rewrapped = |slot: &Slot| old.rewrap(slot, &self.customer, new);
        let new_current = rewrapped(&current)?;
        let new_older = older.iter().map(rewrapped).collect::<Result<Vec<_>, _>>()?;
        // One that never had an anchor has none to tell the provider with.
        self.anchoring.kept().ok_or(VolumeError::NoAnchor)?;
        self.core()?.change_slots(new_current, new_older);
        if let Err(error) = self.write_checkpoint(&group, Occasion::Rewrapping) {
            self.core()?.change_slots(current, older);
            return Err(error);
        }
        if let Err(error) = self.anchoring.keep_now() {
            // Which key the provider goes by is not known: both superblocks must stay as they are.
            return Err(self.core()?.fail(error, &*self.backing.events));
        }
        self.wipe_stale_slots()?;
        self.core()?.space.release_all();
        // Once more, so that neither superblock has the old wrapping.
        self.write_checkpoint(&group, Occasion::Running)?;
        self.wipe_stale_slots()?;
        // Who waits for the key provider holds up nobody's writes.
        drop((group, alone));
        self.anchoring.after_flush()
    }

    /// Rewrites what older keys seal; `heard` is told of how many blocks of how many, and may end it by saying `false`. Returns
    /// whether it came to its end.
    pub(super) fn rotate(&self, heard: &mut dyn FnMut(u64, u64) -> bool) -> Result<bool, VolumeError> {
        self.check_writable(0, 0)?;
        {
            // No checkpoint is under way, which would take this back.
            let _group = self.flushing()?;
            let mut core = self.core()?;
            let current = core.superblock.key();
            core.superblock.rotation.first.get_or_insert(current);
            core.not_renewed = 0;
        }
        let blocks = self.backing.geometry().blocks();
        // Each block, then each leaf of the map once more.
        let all = blocks + blocks.div_ceil(ENTRIES as u64);
        let (mut index, mut damaged) = (0, false);
        while let Some(next) = self.next_leaf(Tree::Map, index, &mut damaged)? {
            let first = next * ENTRIES as u64;
            if first >= self.backing.geometry().blocks() {
                break;
            }
            if !heard(first.min(blocks), all) {
                return Ok(false);
            }
            match self.rotate_leaf(first) {
                Err(VolumeError::Damaged(_)) => self.pass_over(leaf(first).0, &mut damaged)?,
                done => done?,
            }
            index = next + 1;
        }
        self.rotate_bitmaps(&mut damaged)?;
        self.end_rotation()?;
        // Whatever is damaged needs the key that it has.
        if !damaged && !self.drop_older_keys(&mut |leaf| heard(blocks + leaf.min(all - blocks), all))? {
            return Ok(false);
        }
        self.anchoring.after_flush()?;
        heard(all, all);
        Ok(true)
    }

    /// The first leaf of a tree from `index` on that may hold something, and that no damaged page hides.
    fn next_leaf(&self, tree: Tree, mut index: u64, damaged: &mut bool) -> Result<Option<u64>, VolumeError> {
        loop {
            match self.reach(|core| core.forest.next_leaf(tree, index)) {
                Err((VolumeError::Damaged(_), Some(page))) => {
                    self.pass_over(page, damaged)?;
                    index = page.leaves().end;
                }
                found => return found.map_err(|(error, _)| error),
            }
        }
    }

    /// What hangs from a damaged page keeps its keys, for it can't be told what that is; and so do the blocks of a leaf of which some lie where
    /// a damaged page says what is free, for they could not be freed.
    fn pass_over(&self, page: PageId, damaged: &mut bool) -> Result<(), VolumeError> {
        *damaged = true;
        if page.tree == Tree::Map {
            let (hidden, end) = (page.blocks(), self.backing.geometry().blocks());
            self.core()?.not_renewed += hidden.end.min(end).saturating_sub(hidden.start);
        }
        Ok(())
    }

    /// All that can be is sealed anew, and durable: from here on another new key is another rotation's.
    fn end_rotation(&self) -> Result<(), VolumeError> {
        let _among_others = self.among_others()?;
        let group = self.flushing()?;
        let due = {
            let mut core = self.core()?;
            !std::mem::replace(&mut core.superblock.rotation.ended, true) || core.changed()
        };
        if due { self.write_checkpoint(&group, Occasion::Running) } else { Ok(()) }
    }

    fn rotate_leaf(&self, first: u64) -> Result<(), VolumeError> {
        let end = (first + ENTRIES as u64).min(self.backing.geometry().blocks());
        let mut at = first;
        let mut blocks: Vec<Block> = Vec::new();
        while at < end {
            self.make_room()?;
            let _among_others = self.among_others()?;
            let _locked = self.lock_blocks(std::iter::once(at..end));
            let mut entries = [Entry::UNMAPPED; ENTRIES];
            let entries = &mut entries[..(end - at) as usize];
            let fresh = self.with_core(|core| {
                core.lookup(at, entries)?;
                Ok(core.fresh_keys())
            })?;
            let stale = |entry: &Entry| entry.data().is_some() && !fresh.contains(&entry.key);
            let Some(skip) = entries.iter().position(stale) else { break };
            {
                let core = self.core()?;
                if core.is_used_up() {
                    return Err(VolumeError::KeyExhausted(core.superblock.key()));
                }
            }
            let run = entries[skip..].iter().take_while(|entry| stale(entry)).take(CHUNK as usize).count();
            at += skip as u64;
            blocks.resize(run, [0; BLOCK]);
            let (good, bad) = match self.read_blocks(at, &mut blocks) {
                Ok(()) => (run, 0),
                // A bad block stays what it is, under the key that it had: that one is kept. What lies behind it comes next.
                Err(VolumeError::Integrity { lba }) => ((lba - at) as usize, 1),
                Err(other) => return Err(other),
            };
            self.core()?.not_renewed += bad;
            if good > 0 {
                self.write_blocks(at, &mut blocks[..good])?;
            }
            at += good as u64 + bad;
        }
        let id = leaf(first).0;
        if self.with_core(|core| core.is_stale(id))? {
            // Growth that fails forgets what it finds dirty, and is alone when it looks.
            let _among_others = self.among_others()?;
            self.with_room(Wants { data: 0, leaves: 1 }, |core| core.touch(id))?;
        }
        Ok(())
    }

    fn rotate_bitmaps(&self, damaged: &mut bool) -> Result<(), VolumeError> {
        let mut index = 0;
        while let Some(next) = self.next_leaf(Tree::Free, index, damaged)? {
            if next >= self.backing.geometry().bitmaps() {
                break;
            }
            self.make_room()?;
            let _among_others = self.among_others()?;
            match self.with_core(|core| core.touch(bitmap(next))) {
                Err(VolumeError::Damaged(_)) => self.pass_over(bitmap(next), damaged)?,
                done => done?,
            }
            index = next + 1;
        }
        Ok(())
    }

    /// Forgets older keys, if nothing is left that needs them: no snapshot, and no block that could not be read. Returns false where
    /// `heard`, told of the leaves that are looked at, ended it.
    fn drop_older_keys(&self, heard: &mut dyn FnMut(u64) -> bool) -> Result<bool, VolumeError> {
        let (_alone, group) = loop {
            let taken = {
                let core = self.core()?;
                if core.fresh_keys().len() > core.older.len() || !core.snapshots.is_empty() {
                    return Ok(true);
                }
                core.snapshots_taken
            };
            // Nobody waits for a look at the whole map: what is written meanwhile is under the current key.
            match self.find_older_entry(heard)? {
                Search::Ended => return Ok(false),
                Search::Found => return Ok(true),
                Search::Nothing => {}
            }
            let held = (self.alone()?, self.flushing()?);
            // A revert, which counts as a snapshot too, brings older entries back where it was looked already.
            if self.core()?.snapshots_taken == taken {
                break held;
            }
        };
        self.settle_all(&group)?;
        let (current, older, fresh) = {
            let core = self.core()?;
            (core.superblock.slot.clone(), core.older.clone(), core.fresh_keys().len())
        };
        self.core()?.change_slots(current.clone(), older[..fresh - 1].to_vec());
        if let Err(error) = self.write_checkpoint(&group, Occasion::Running) {
            self.core()?.change_slots(current, older);
            return Err(error);
        }
        self.write_checkpoint(&group, Occasion::Running)?;
        self.wipe_stale_slots()?;
        self.backing.change_keys(|ring| ring.keep_newest(fresh))?;
        self.backing.events.note("no older key is needed any more");
        Ok(true)
    }

    /// Looks for a block or page that is left under an older key; says at which leaf it is.
    fn find_older_entry(&self, heard: &mut dyn FnMut(u64) -> bool) -> Result<Search, VolumeError> {
        let mut index = 0;
        while let Some(next) = self.with_core(|core| core.forest.next_leaf(Tree::Map, index))? {
            if !heard(next) {
                return Ok(Search::Ended);
            }
            if self.with_core(|core| core.is_under_older_key(next * ENTRIES as u64))? {
                return Ok(Search::Found);
            }
            index = next + 1;
        }
        for index in 0..self.backing.geometry().bitmaps() {
            if self.with_core(|core| core.is_stale(bitmap(index)))? {
                return Ok(Search::Found);
            }
        }
        Ok(Search::Nothing)
    }
}

/// How a search came out.
enum Search {
    Found,
    Nothing,
    /// It was told to end.
    Ended,
}

impl Core {
    fn change_slots(&mut self, current: Slot, older: Vec<Slot>) {
        self.superblock.slot = Slot { written: self.superblock.slot.written, ..current };
        self.slots_changed |= !(self.older.is_empty() && older.is_empty());
        self.older = older;
    }

    /// A page that an older key authenticates is written again by the next checkpoint.
    fn touch(&mut self, id: PageId) -> Result<(), Halt> {
        if self.is_stale(id)? {
            self.forest.page_mut(id)?;
        }
        Ok(())
    }

    fn is_stale(&mut self, id: PageId) -> Result<bool, Halt> {
        let fresh = self.fresh_keys();
        let page = self.forest.page(id)?;
        Ok(page.home.is_some() && !fresh.contains(&page.key))
    }

    fn is_under_older_key(&mut self, first: u64) -> Result<bool, Halt> {
        let fresh = self.fresh_keys();
        let mut entries = [Entry::UNMAPPED; ENTRIES];
        self.lookup(first, &mut entries)?;
        Ok(self.is_stale(leaf(first).0)?
            || entries.iter().any(|entry| entry.physical != 0 && !fresh.contains(&entry.key)))
    }

    /// The current key, and older ones that the newest rotation brought, newest first: what is under them is not rewritten by it.
    pub(super) fn fresh_keys(&self) -> Vec<KeyId> {
        let first = self.older.iter().position(|slot| Some(slot.key) == self.superblock.rotation.first);
        let older = self.older[..first.map_or(0, |at| at + 1)].iter().map(|slot| slot.key);
        std::iter::once(self.superblock.key()).chain(older).collect()
    }

    /// Whether the current key has sealed so much that a rotation goes on under another only. The last chunk fits in any case.
    pub(super) fn is_used_up(&self) -> bool {
        self.written + CHUNK > Slot::NEARLY
    }

    /// Tells, once, that the current key will soon have sealed all that it may.
    pub(super) fn warn_of_limit(&mut self, from: &Backing) {
        if !self.warned && self.written >= Slot::NEARLY {
            self.warned = true;
            let (key, gib) = (self.superblock.key(), |blocks: u64| (blocks * BLOCK as u64) >> 30);
            from.events.note(&format!(
                "key {key} has sealed {} of the {} GiB that one key may; rekey the volume (fealty-disk rekey, or serve --rekey) before \
                 it takes no more writes",
                gib(self.written),
                gib(Slot::LIMIT)
            ));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{BLOCK, CHUNK, Slot};
    use crate::{AnchorRefused, Anchors, Events, Kek, MemoryStore, OpenOptions, Volume, VolumeError};
    use policy::disk::{CipherSuite, VolumeGrant};
    use policy::{AnchorMode, KeyId, VolumeAnchor, VolumeId};
    use secretmem::Secret;
    use std::sync::{Arc, Mutex};

    const BLOCKS: u64 = 400;

    /// A key provider, and the store of the volume whose keys it has.
    struct Provider {
        volume: VolumeId,
        openings: Mutex<u64>,
        anchor: Mutex<Option<VolumeAnchor>>,
        notes: Mutex<Vec<String>>,
        store: Arc<MemoryStore>,
    }

    impl Anchors for Provider {
        fn keep(&self, anchor: &VolumeAnchor) -> Result<(), AnchorRefused> {
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

    impl Provider {
        fn new() -> Arc<Self> {
            Arc::new(Self {
                volume: VolumeId::random(),
                openings: Mutex::default(),
                anchor: Mutex::default(),
                notes: Mutex::default(),
                store: Arc::default(),
            })
        }

        /// The volume, with `key` for new writes; a new one at first.
        fn open(self: &Arc<Self>, key: u64) -> Volume {
            let mut openings = self.openings.lock().expect("no panic");
            *openings += 1;
            let grant = VolumeGrant {
                volume: self.volume,
                customer: "acme".parse().expect("id"),
                cipher: CipherSuite::Aes256XtsHmacSha256,
                kek_id: KeyId(1),
                key_id: KeyId(key),
                open_number: (*openings).try_into().expect("number"),
                anchor: self.anchor.lock().expect("no panic").clone(),
                anchor_mode: AnchorMode::Close,
            };
            let (kek, store) = (Kek::new(KeyId(1), Secret::copy_of(&[9; 32]).expect("room")), self.store.clone());
            let (anchors, events) = (self.clone(), self.clone());
            let opened = match grant.anchor {
                None => Volume::create(store, BLOCKS * BLOCK as u64, &grant, &kek, anchors, events),
                Some(_) => Volume::open(store, &grant, &kek, OpenOptions::default(), anchors, events),
            };
            opened.expect("opens")
        }

        fn warnings(&self) -> usize {
            self.notes.lock().expect("no panic").iter().filter(|note| note.contains("GiB that one key may")).count()
        }
    }

    fn filled(provider: &Arc<Provider>) {
        let volume = provider.open(1);
        for lba in 0..BLOCKS {
            volume.write(lba * BLOCK as u64, &[lba as u8; BLOCK]).expect("written");
        }
        volume.close().expect("closed");
    }

    #[track_caller]
    fn check(volume: &Volume) {
        for lba in 0..BLOCKS {
            let mut found = [0; BLOCK];
            volume.read(lba * BLOCK as u64, &mut found).expect("read");
            assert!(found == [lba as u8; BLOCK], "{lba}");
        }
        let report = volume.check(&mut |_| {}).expect("checked");
        assert!(report.good() && report.leaked_blocks == 0, "{report:?}");
    }

    /// As if so many blocks had been sealed under the current key.
    fn age(volume: &Volume, written: u64) {
        volume.shared.core().expect("sound").written = written;
    }

    fn older_slots(volume: &Volume) -> usize {
        volume.shared.core().expect("sound").older.len()
    }

    #[test]
    fn a_rotation_takes_as_many_keys_as_it_needs_and_seals_nothing_twice() {
        let provider = Provider::new();
        filled(&provider);
        let volume = provider.open(2);
        let before = Slot::NEARLY - CHUNK - 100;
        age(&volume, before);
        assert!(matches!(volume.rotate(&mut |_, _| true), Err(VolumeError::KeyExhausted(KeyId(2)))));
        let (sealed, used_up) = (volume.info().blocks_written - before, volume.info().key_used_up);
        assert!((101..=100 + CHUNK).contains(&sealed) && used_up, "{sealed}");
        assert!(matches!(volume.rotate(&mut |_, _| true), Err(VolumeError::KeyExhausted(KeyId(2)))));
        volume.close().expect("closed");
        drop(volume);

        let mut volume = provider.open(3);
        assert_eq!((volume.info().older_keys, older_slots(&volume)), (1, 2));
        for _ in 0..2 {
            assert!(volume.rotate(&mut |_, _| true).expect("rotated"));
            let info = volume.info();
            assert_eq!((info.blocks_written, info.older_keys, older_slots(&volume)), (BLOCKS - sealed, 0, 1));
        }
        check(&volume);
        // Nobody wrote much since: the next is another rotation, also where the key is used up by then.
        for key in 4..7 {
            age(&volume, if key == 5 { Slot::NEARLY } else { 0 });
            volume.close().expect("closed");
            drop(volume);
            volume = provider.open(key);
            assert!(volume.info().older_keys > 0);
            assert!(volume.rotate(&mut |_, _| true).expect("rotated"));
            let info = volume.info();
            assert_eq!((info.blocks_written, info.older_keys, older_slots(&volume)), (BLOCKS, 0, 0), "{key}");
            check(&volume);
        }
        volume.close().expect("closed");
    }

    /// A rekey that was given up for another, by a provider that was restored say, is no part of that.
    #[test]
    fn a_rotation_begins_anew_with_a_key_that_the_one_before_did_not_need() {
        let provider = Provider::new();
        filled(&provider);
        let volume = provider.open(2);
        let mut steps = 0;
        let ended = volume.rotate(&mut |_, _| {
            steps += 1;
            steps < 4
        });
        assert!(!ended.expect("stopped") && volume.info().blocks_written > 0);
        volume.close().expect("closed");
        drop(volume);
        let volume = provider.open(3);
        assert_eq!(volume.info().older_keys, 2);
        assert!(volume.rotate(&mut |_, _| true).expect("rotated"));
        assert_eq!((volume.info().blocks_written, older_slots(&volume)), (BLOCKS, 0));
        check(&volume);
    }

    #[test]
    fn a_key_tells_that_its_end_is_near_and_seals_nothing_after_it() {
        let provider = Provider::new();
        filled(&provider);
        let volume = provider.open(1);
        age(&volume, Slot::NEARLY - 1);
        assert_eq!(provider.warnings(), 0);
        volume.write(0, &[0; BLOCK]).expect("written");
        volume.write(0, &[0; BLOCK]).expect("written");
        assert_eq!(provider.warnings(), 1);
        volume.close().expect("closed");
        drop(volume);
        let volume = provider.open(1);
        assert_eq!(provider.warnings(), 2, "each opening tells");
        age(&volume, Slot::LIMIT - 1);
        volume.write(0, &[0; BLOCK]).expect("the last");
        assert!(matches!(volume.write(0, &[0; BLOCK]), Err(VolumeError::KeyExhausted(KeyId(1)))));
        check(&volume);
        volume.close().expect("closed");
        drop(volume);
        let volume = provider.open(2);
        volume.write(0, &[0; BLOCK]).expect("under the next key");
        assert_eq!((volume.info().blocks_written, provider.warnings()), (1, 2));
        volume.close().expect("closed");
    }
}
