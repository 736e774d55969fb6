//! Random histories of a volume in a store whose owner tampers with it, while it is closed and while it is open, against a model of
//! what may be seen: an error, or, while the volume stays open, exactly what was written last; after it was opened
//! again, nothing older than the anchor. And the audit log hears of each error.

use crate::common::{Noticed, Provider, Random, Replay, lock, options, seeds};
use crate::hostile::{BLOCK, HostileStore};
use crate::known::{Content, Known, content};
use fealty_blockcrypt::{AnchorRefused, OpenOptions, Volume, VolumeError};
use policy::AnchorMode;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

struct Taken {
    content: BTreeMap<u64, BTreeSet<Content>>,
    /// An anchor covers it.
    anchored: bool,
    /// Somebody tried to delete it since.
    doomed: bool,
}

/// What came of it all.
#[derive(Default, Debug)]
struct Tally {
    tricks: u64,
    bad_blocks: u64,
    bad_pages: u64,
    refused: u64,
    rolled_back: u64,
    /// Blocks that were older than the newest, and not older than the anchor.
    older: u64,
    opened_under_lies: u64,
}

struct History {
    provider: Arc<Provider>,
    store: Arc<HostileStore>,
    donors: Vec<BTreeMap<u64, Arc<[u8; BLOCK]>>>,
    /// The blocks that are used, in order.
    blocks: Vec<u64>,
    known: BTreeMap<u64, Known>,
    snapshots: BTreeMap<u64, Taken>,
    random: Random,
    options: OpenOptions,
    context: String,
    /// Nothing that is durable was written by an opener who had been lied to.
    pure: bool,
    tally: Tally,
}

/// Whether a hostile store may have brought this about.
fn is_its_fault(error: &VolumeError) -> bool {
    error.is_integrity() || matches!(error, VolumeError::Store(..) | VolumeError::Failed(_))
}

/// Snapshots may leave no room.
fn is_full(error: &VolumeError) -> bool {
    matches!(error, VolumeError::Full(None))
}

impl History {
    fn new(mode: AnchorMode, seed: u64, sparse: bool) -> Self {
        let (provider, store) = (Provider::new(mode), HostileStore::new());
        // A leaf of the map describes 72 blocks, and 512 pages are kept in any case.
        let (size, blocks): (u64, Vec<u64>) = match sparse {
            true => (700 * 73 * BLOCK as u64, (0..700).map(|i| i * 73).collect()),
            false => (300 * BLOCK as u64, (0..300).collect()),
        };
        provider.create(store.clone(), size).expect("a volume").close().expect("closed");
        let known = blocks.iter().map(|lba| (*lba, Known::zero())).collect();
        Self {
            provider,
            store,
            donors: Vec::new(),
            blocks,
            known,
            snapshots: BTreeMap::new(),
            random: Random(seed),
            options: OpenOptions { map_cache: if sparse { 0 } else { 64 << 20 }, ..options() },
            context: format!("{mode:?} seed {seed}"),
            pure: true,
            tally: Tally::default(),
        }
    }

    /// What happens, where one history is replayed.
    fn tell(&self, what: &dyn std::fmt::Display) {
        if std::env::var_os("FEALTY_SEED").is_some() {
            println!("{}: {what}", self.context);
        }
    }

    /// No anchor is kept from now on but where the engine waits for it.
    fn hold_anchors(&self, hold: bool) {
        self.provider.keep_none(hold && self.provider.mode == AnchorMode::Interval);
    }

    /// The newest state is anchored.
    fn anchored(&mut self, volume: &Volume) {
        self.known.values_mut().for_each(|known| known.since.clear());
        if let Ok(listed) = volume.snapshots() {
            self.snapshots.retain(|id, _| listed.iter().any(|s| s.id == *id && !s.deleting));
        }
        self.snapshots.values_mut().for_each(|taken| taken.anchored = true);
    }

    fn trick(&mut self) {
        let what = self.store.trick(&mut self.random, &self.donors);
        self.tell(&what);
        self.tally.tricks += 1;
    }

    /// Requests: reads mostly, for it is these that are lied to.
    fn step(&mut self, volume: &Volume) {
        let kind = self.random.below(100);
        let first = self.random.below(self.blocks.len() as u64) as usize;
        let most = [1, 4, 40][self.random.below(3) as usize];
        let count = (1 + self.random.below(most) as usize).min(self.blocks.len() - first);
        let lbas = self.blocks[first..first + count].to_vec();
        self.tell(&format_args!("kind {kind}, {count} blocks from {}", lbas[0]));
        match kind {
            0..50 => self.read(volume, &lbas, false),
            50..72 => self.write(volume, &lbas),
            72..76 => self.write_part(volume, lbas[0]),
            76..80 => self.discard(volume, lbas[0]),
            80..89 => self.flush(volume),
            89..92 => self.bear(volume.checkpoint()),
            92..95 => self.snapshot(volume),
            95..97 => {
                let mut left = self.random.below(5);
                let done = volume.rotate(&mut |_, _| {
                    left = left.saturating_sub(1);
                    left > 0
                });
                self.bear(done.map(|_| ()));
            }
            97..98 => {
                let good = volume.check(&mut |_| {}).map(|report| report.good());
                self.tell(&format_args!("check: {good:?}"));
                assert!(good.is_err() || self.lied() || matches!(good, Ok(true)), "{}: check", self.context);
                self.bear(good.map(|_| ()));
            }
            _ => self.anchor(volume),
        }
    }

    /// Whether the store ever lied.
    fn lied(&self) -> bool {
        self.tally.tricks > 0
    }

    fn bear(&self, done: Result<(), VolumeError>) {
        if let Err(error) = done {
            self.tell(&error);
            assert!(is_full(&error) || is_its_fault(&error) && self.lied(), "{}: {error}", self.context);
        }
    }

    /// Reads blocks all at once; `again`: after the volume was opened for reading, when it may show more.
    fn read(&mut self, volume: &Volume, lbas: &[u64], again: bool) {
        self.provider.noticed();
        let mut found = vec![vec![0xee; BLOCK]; lbas.len()];
        let mut asked: Vec<(u64, &mut [u8])> =
            lbas.iter().zip(&mut found).map(|(lba, found)| (lba * BLOCK as u64, &mut found[..])).collect();
        let done = volume.read_many(&mut asked);
        let noticed = self.provider.noticed();
        for ((lba, found), done) in lbas.iter().zip(found).zip(done) {
            let known = self.known.get_mut(lba).expect("one of ours");
            match done {
                Ok(()) => {
                    let what = u64::from_le_bytes(found[8..16].try_into().expect("8 bytes"));
                    assert!(known.may_be(&found, again), "{}: block {lba} holds {what}", self.context);
                    if !again && known.now.len() > 1 {
                        known.now = BTreeSet::from([Arc::new(found)]);
                    }
                }
                Err(error) => {
                    assert!(found.iter().all(|b| *b == 0), "{}: an error leaves no bytes", self.context);
                    self.blame(*lba, &error, &noticed);
                }
            }
        }
    }

    /// A block can't be read: it is the store's doing, and the audit log knows which block of it.
    fn blame(&mut self, lba: u64, error: &VolumeError, noticed: &[Noticed]) {
        self.tell(&format_args!("block {lba}: {error}; {noticed:?}"));
        let context = &self.context;
        assert!(self.lied() && is_its_fault(error), "{context}: block {lba}: {error}");
        match error {
            VolumeError::Integrity { lba: named } => {
                let of_block = |event: &&Noticed| event.lba == Some(lba) && !event.reason.starts_with("the map page");
                let event = noticed.iter().find(of_block);
                let event = event.unwrap_or_else(|| panic!("{context}: nobody heard of block {lba}: {noticed:?}"));
                assert_eq!(*named, lba);
                match (event.reason.as_str(), event.physical) {
                    ("its tag does not verify", Some(block)) => {
                        assert!(!self.pure || self.store.touched(block), "{context}: {block} was not touched");
                    }
                    ("a recovery found its data gone", None) => assert!(!self.pure, "{context}"),
                    other => panic!("{context}: {other:?}"),
                }
                self.tally.bad_blocks += 1;
            }
            VolumeError::Damaged(_) => {
                let of_page = |event: &&Noticed| {
                    event.lba.is_some_and(|first| first <= lba) && event.reason.starts_with("the map page of blocks")
                };
                let event = noticed.iter().find(of_page);
                let event = event.unwrap_or_else(|| panic!("{context}: nobody heard of {error}: {noticed:?}"));
                let block = event.physical.expect("a page lies somewhere");
                assert!(!self.pure || self.store.touched(block), "{context}: {block} was not touched");
                self.tally.bad_pages += 1;
            }
            _ => assert!(self.store.cut_short(), "{context}: {error}"),
        }
    }

    fn write(&mut self, volume: &Volume, lbas: &[u64]) {
        let number = 1 + self.random.below(1 << 48);
        let data: Vec<Vec<u8>> = lbas.iter().map(|lba| content(*lba, number)).collect();
        let asked: Vec<(u64, &[u8])> =
            lbas.iter().zip(&data).map(|(lba, data)| (lba * BLOCK as u64, &data[..])).collect();
        let done = volume.write_many(&asked);
        for ((lba, data), done) in lbas.iter().zip(&data).zip(done) {
            self.known.get_mut(lba).expect("one of ours").write(0, data, done.is_err());
            self.bear(done);
        }
    }

    /// Some sectors of a block, whose others must be read first.
    fn write_part(&mut self, volume: &Volume, lba: u64) {
        let first = self.random.below(8);
        let sectors = 1 + self.random.below(8 - first);
        let mut data = vec![0; 512 * sectors as usize];
        self.random.fill(&mut data);
        let done = volume.write(lba * BLOCK as u64 + 512 * first, &data);
        self.known.get_mut(&lba).expect("one of ours").write(512 * first as usize, &data, done.is_err());
        self.bear(done);
    }

    fn discard(&mut self, volume: &Volume, first: u64) {
        let end = (first + 1 + self.random.below(100)).min(volume.size() / BLOCK as u64);
        let done = volume.discard(first * BLOCK as u64, (end - first) * BLOCK as u64);
        for (_, known) in self.known.range_mut(first..end) {
            known.write(0, &[0; BLOCK], done.is_err());
        }
        self.bear(done);
    }

    fn flush(&mut self, volume: &Volume) {
        let done = volume.flush();
        if done.is_ok() && self.provider.mode == AnchorMode::Flush {
            self.anchored(volume);
        }
        self.bear(done);
    }

    /// In mode `interval`: a second passes, and the provider answers.
    fn anchor(&mut self, volume: &Volume) {
        if self.provider.mode != AnchorMode::Interval || !self.random.chance(30) || volume.flush().is_err() {
            return;
        }
        let before = *lock(&self.provider.kept);
        self.hold_anchors(false);
        let begun = Instant::now();
        while *lock(&self.provider.kept) == before && begun.elapsed() < Duration::from_millis(2500) {
            std::thread::sleep(Duration::from_millis(10));
        }
        self.hold_anchors(true);
        if *lock(&self.provider.kept) > before {
            self.tell(&"the anchor is kept");
            self.anchored(volume);
        }
    }

    fn snapshot(&mut self, volume: &Volume) {
        let listed = volume.snapshots().expect("a list");
        let newest = listed.iter().rfind(|snapshot| !snapshot.deleting).map(|snapshot| snapshot.id);
        let in_flush = self.provider.mode == AnchorMode::Flush;
        let done = match (self.random.below(3), newest) {
            (0, Some(id)) if listed.len() > 1 => {
                self.snapshots.get_mut(&id).expect("we took it").doomed = true;
                volume.delete_snapshot(id, &mut |_, _| {})
            }
            (1, Some(id)) => {
                let done = volume.revert(id);
                let taken = &self.snapshots[&id].content;
                for (lba, known) in &mut self.known {
                    known.set(taken[lba].clone(), done.is_err());
                }
                done
            }
            _ => {
                let done = volume.take_snapshot("one");
                let content = self.known.iter().map(|(lba, known)| (*lba, known.now.clone())).collect();
                // A number that is not known may be there all the same.
                let id = done.as_ref().map_or_else(|_| listed.iter().map(|s| s.id).max().unwrap_or(0) + 1, |id| *id);
                let doomed = done.is_err();
                let taken = Taken { content, anchored: false, doomed };
                if done.is_ok() || !self.snapshots.contains_key(&id) {
                    self.snapshots.insert(id, taken);
                }
                done.map(|_| ())
            }
        };
        if done.is_ok() && in_flush {
            self.anchored(volume);
        }
        self.bear(done);
    }

    /// What the volume holds when it was opened.
    fn look(&mut self, volume: &Volume, again: bool) {
        let mut blocks = self.blocks.clone();
        if self.random.chance(50) {
            blocks.reverse();
        }
        for some in blocks.chunks(50) {
            self.read(volume, some, again);
        }
        let listed = volume.snapshots().expect("a list");
        for snapshot in &listed {
            assert!(snapshot.deleting || self.snapshots.contains_key(&snapshot.id), "{}", self.context);
        }
        let there = |id: &u64| listed.iter().any(|snapshot| snapshot.id == *id && !snapshot.deleting);
        for (id, taken) in &self.snapshots {
            assert!(there(id) || taken.doomed || !taken.anchored, "{}: snapshot {id} is gone", self.context);
        }
        if !again {
            self.snapshots.retain(|id, _| there(id));
            self.snapshots.values_mut().for_each(|taken| (taken.anchored, taken.doomed) = (true, false));
        }
    }

    /// Reads one of the snapshots.
    fn look_at_a_snapshot(&mut self) {
        let Some(id) = self.snapshots.keys().next_back().copied() else { return };
        // What was heard of before is of somebody else.
        self.provider.noticed();
        let options = OpenOptions { snapshot: Some(id), ..self.options };
        let grant = self.provider.grant();
        let volume = match self.provider.open_with(self.store.clone(), &grant, options) {
            Ok(volume) => volume,
            Err(VolumeError::NoSnapshot(_)) => {
                assert!(self.snapshots[&id].doomed || !self.snapshots[&id].anchored, "{}", self.context);
                return;
            }
            Err(error) => return self.refused(&error),
        };
        for lba in self.blocks.clone() {
            let mut found = vec![0xee; BLOCK];
            match volume.read(lba * BLOCK as u64, &mut found) {
                Ok(()) => {
                    let taken = &self.snapshots[&id].content[&lba];
                    assert!(taken.contains(&found), "{}: block {lba} of snapshot {id}", self.context);
                }
                Err(error) => {
                    let noticed = self.provider.noticed();
                    self.blame(lba, &error, &noticed);
                }
            }
        }
    }

    /// The volume does not open: the store's doing, and the audit log knows.
    fn refused(&mut self, error: &VolumeError) {
        self.tell(&format_args!("does not open: {error}"));
        let context = &self.context;
        assert!(self.lied(), "{context}: {error}");
        let noticed = self.provider.noticed();
        match error {
            VolumeError::Store(..) => assert!(self.store.cut_short(), "{context}: {error}"),
            _ => {
                assert!(error.is_integrity() || matches!(error, VolumeError::Unsupported(_)), "{context}: {error}");
                let told = Noticed { lba: None, physical: None, reason: error.to_string() };
                assert!(noticed.contains(&told), "{context}: {error}: {noticed:?}");
            }
        }
        self.tally.refused += 1;
        self.tally.rolled_back += u64::from(matches!(error, VolumeError::RolledBack(_)));
    }

    fn open(&mut self) -> Result<Volume, VolumeError> {
        self.provider.noticed();
        self.hold_anchors(false);
        let opened = self.provider.open_with(self.store.clone(), &self.provider.grant(), self.options);
        self.hold_anchors(true);
        opened
    }

    /// Opens it as it is shown; if it does not open, without lies. Nothing where that can't be either.
    fn open_somehow(&mut self) -> Option<Volume> {
        let lies = self.store.lies();
        let newest: BTreeMap<u64, BTreeSet<Content>> =
            self.known.iter().map(|(lba, known)| (*lba, known.now.clone())).collect();
        match self.open() {
            Ok(volume) => {
                self.known.values_mut().for_each(Known::opened);
                self.pure &= !lies;
                self.tally.opened_under_lies += u64::from(lies);
                self.look(&volume, false);
                // From here on what it was shown is what it goes on from.
                self.store.believe();
                let older = |(lba, known): &(&u64, &Known)| known.now.is_disjoint(&newest[lba]);
                self.tally.older += self.known.iter().filter(older).count() as u64;
                Some(volume)
            }
            Err(error) => {
                let was_pure = self.pure;
                self.refused(&error);
                self.store.honest();
                // What this opener wrote before it gave up, it wrote because it was lied to.
                self.pure &= !lies;
                match self.open() {
                    Ok(volume) => {
                        self.known.values_mut().for_each(Known::opened);
                        self.look(&volume, false);
                        Some(volume)
                    }
                    Err(again) => {
                        assert!(lies || !was_pure, "{}: an honest store: {again}", self.context);
                        self.refused(&again);
                        None
                    }
                }
            }
        }
    }

    /// An opener whose anchor nobody keeps, and who leaves a superblock.
    fn open_in_vain(&mut self) {
        self.pure &= !self.store.lies();
        self.provider.noticed();
        *lock(&self.provider.refuse) = Some(AnchorRefused::Refused("somebody else has it".to_owned()));
        let opened = self.provider.open_with(self.store.clone(), &self.provider.grant(), self.options);
        self.hold_anchors(true);
        match opened.err().expect("no anchor, no volume") {
            VolumeError::Anchor(_) => {}
            error => self.refused(&error),
        }
    }

    fn life(&mut self, volume: &Volume) {
        let calm = self.random.chance(15);
        for _ in 0..1 + self.random.below(60) {
            if !calm && self.random.chance(15) {
                self.trick();
            }
            if self.random.chance(10) {
                self.store.honest();
            }
            self.step(volume);
        }
        if self.random.chance(30) {
            self.hold_anchors(false);
            match volume.close() {
                Ok(_) => self.anchored(volume),
                Err(error) => self.bear(Err(error)),
            }
            self.hold_anchors(true);
        }
    }

    /// Another volume, and a clone of this one.
    fn make_donors(&mut self) {
        let donor = |other: &Arc<Provider>, store: &Arc<HostileStore>, volume: Volume, blocks: &[u64]| {
            for lba in blocks.iter().step_by(3) {
                volume.write(lba * BLOCK as u64, &content(*lba, 5)).expect("written");
            }
            volume.close().expect("closed");
            drop(volume);
            let volume = other.open(store.clone()).expect("opens");
            volume.write(blocks[1] * BLOCK as u64, &content(blocks[1], 6)).expect("written");
            volume.flush().expect("flushed");
            store.blocks()
        };
        let (other, store) = (Provider::new(AnchorMode::Close), HostileStore::new());
        let size = (self.blocks[self.blocks.len() - 1] + 1) * BLOCK as u64;
        let volume = other.create(store.clone(), size).expect("a volume");
        self.donors.push(donor(&other, &store, volume, &self.blocks));
        let (other, store) = (Provider::new(AnchorMode::Close), HostileStore::new());
        *lock(&other.key_id) = 1 << 32;
        let source = self.provider.open_read_only(self.store.clone()).expect("opens");
        let (grant, kek) = (other.grant(), other.kek());
        let (anchors, events) = (other.clone(), other.clone());
        let clone = Volume::create_clone(store.clone(), &source, &grant, &kek, anchors, events, &mut |_, _| {})
            .expect("cloned");
        self.donors.push(donor(&other, &store, clone, &self.blocks));
    }

    fn run(&mut self, lives: u64) {
        self.hold_anchors(true);
        let context = self.context.clone();
        for life in 0..lives {
            self.context = format!("{context} life {life}");
            if life == 2 && self.pure && !self.store.lies() {
                self.make_donors();
            }
            if life == 0 {
                // Everything is in the map.
                let volume = self.open_somehow().expect("opens");
                for some in self.blocks.clone().chunks(50) {
                    self.write(&volume, some);
                }
                self.hold_anchors(false);
                volume.close().expect("closed");
                self.hold_anchors(true);
                self.anchored(&volume);
                continue;
            }
            if self.random.chance(60) {
                self.store.honest();
            }
            if self.random.chance(70) {
                (0..1 + self.random.below(2)).for_each(|_| self.trick());
            }
            // Who only looks, and is lied to as he opens it, may see an older log, whose blocks were reused since.
            let was_pure = self.pure;
            self.pure &= !self.store.lies();
            if self.random.chance(25) {
                self.provider.noticed();
                match self.provider.open_with(
                    self.store.clone(),
                    &self.provider.grant(),
                    OpenOptions { read_only: true, ..self.options },
                ) {
                    Ok(volume) => self.look(&volume, true),
                    Err(error) => self.refused(&error),
                }
            }
            if self.random.chance(20) {
                self.look_at_a_snapshot();
            }
            self.pure = was_pure;
            if self.random.chance(15) {
                *lock(&self.provider.key_id) += 1;
            }
            for _ in 0..self.random.below(6).saturating_sub(3) {
                self.open_in_vain();
            }
            let Some(volume) = self.open_somehow() else { return };
            self.life(&volume);
        }
        if !self.lied() {
            return;
        }
        // Who was never opened under lies, has lost nothing by them.
        self.store.honest();
        if self.pure
            && let Ok(volume) = self.open()
        {
            self.known.values_mut().for_each(Known::opened);
            for lba in self.blocks.clone() {
                let mut found = vec![0; BLOCK];
                volume.read(lba * BLOCK as u64, &mut found).unwrap_or_else(|e| panic!("{}: {lba}: {e}", self.context));
                assert!(self.known[&lba].may_be(&found, false), "{}: block {lba}", self.context);
            }
            let report = volume.check(&mut |_| {}).expect("a check");
            assert!(report.good(), "{}: {report:?}", self.context);
            // What hung from a page that was hidden while a snapshot was deleted stays set aside.
            let hidden = self.provider.heard().iter().any(|said| said.contains("is not freed"));
            assert!(report.leaked_blocks == 0 || hidden, "{}: {report:?}", self.context);
        } else {
            assert!(!self.pure, "{}: an honest store does not open", self.context);
        }
    }
}

impl std::ops::AddAssign for Tally {
    fn add_assign(&mut self, one: Self) {
        let Self { tricks, bad_blocks, bad_pages, refused, rolled_back, older, opened_under_lies } = one;
        self.tricks += tricks;
        self.bad_blocks += bad_blocks;
        self.bad_pages += bad_pages;
        self.refused += refused;
        self.rolled_back += rolled_back;
        self.older += older;
        self.opened_under_lies += opened_under_lies;
    }
}

/// Histories of so many seeds. Several at once, where they wait for the second that passes between two anchors.
fn histories(mode: AnchorMode, first: u64, count: u64) {
    let (seeds, all) = (Mutex::new(seeds(first, count)), Mutex::new(Tally::default()));
    let one_after_the_other = || {
        loop {
            let Some(seed) = lock(&seeds).next() else { return };
            let test = format!("owner::whatever_the_owner_does_{}", format!("{mode:?}").to_lowercase());
            let _replay = Replay { test, seed };
            let mut history = History::new(mode, seed, seed % 8 == 7);
            history.run(3 + seed % 6);
            *lock(&all) += history.tally;
        }
    };
    std::thread::scope(|scope| {
        let threads = if mode == AnchorMode::Interval { 12 } else { 1 };
        let threads: Vec<_> = (0..threads).map(|_| scope.spawn(one_after_the_other)).collect();
        threads.into_iter().for_each(|thread| thread.join().expect("no history failed"));
    });
    let all = all.into_inner().expect("no history failed");
    println!("{all:?}");
    if std::env::var_os("FEALTY_SEED").is_none() {
        let each =
            [all.tricks / 20, all.bad_blocks, all.bad_pages, all.refused, all.rolled_back, all.opened_under_lies];
        assert!(each.iter().all(|count| *count > 0), "the owner did nothing that mattered: {all:?}");
    }
}

#[test]
fn whatever_the_owner_does_close() {
    histories(AnchorMode::Close, 300_000, 40);
}

#[test]
fn whatever_the_owner_does_interval() {
    histories(AnchorMode::Interval, 400_000, 40);
}

#[test]
fn whatever_the_owner_does_flush() {
    histories(AnchorMode::Flush, 500_000, 40);
}
