//! Random histories of a large volume of which few blocks are written, far apart: its map has three levels, or gets the third when it
//! grows, and its bitmap a second page. Snapshots, reverts, rotations and growth among requests, on a store that loses power or
//! fails for a while and then works again. No acknowledged FLUSH is lost, snapshots hold what they held, nothing is ever wrong.

use crate::common::{Provider, Random, Replay, SimStore, check_good, lock, options, seeds};
use crate::faults::Faulty;
use crate::hostile::BLOCK;
use crate::known::{Content, Known, content};
use fealty_blockcrypt::{OpenOptions, Store, Volume, VolumeError, make_room};
use policy::AnchorMode;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

/// Blocks from one that is written to the next: more than a leaf of the map has.
const STRIDE: u64 = 263;
/// Such blocks of a volume as it is made: a map of two levels, and one of three; both have one bitmap page.
const FIRST: [u64; 2] = [21, 100];
/// Such blocks at most: then the bitmap has two pages.
const MOST: u64 = 130;
/// Blocks of a map of two levels at most, and of the store that a bitmap page describes.
const TWO_LEVELS: u64 = 84 * 72;
const ONE_BITMAP: u64 = (4096 - 64) * 8;

/// What histories came to, all together.
#[derive(Default, Debug)]
struct Tally {
    succeeded: BTreeMap<&'static str, u64>,
    failed: BTreeMap<&'static str, u64>,
    /// Volumes that got a third level of the map and a second page of the bitmap, and opened after that.
    deeper: u64,
    wider: u64,
}

struct History<'a> {
    provider: Arc<Provider>,
    options: OpenOptions,
    disk: Arc<SimStore>,
    store: Arc<Faulty>,
    /// It is the power that fails, rather than some calls.
    power: bool,
    known: Vec<Known>,
    snapshots: BTreeMap<u64, Vec<BTreeSet<Content>>>,
    /// What a snapshot holds that was being taken when something failed.
    half_taken: Option<Vec<BTreeSet<Content>>>,
    /// Snapshots that were being deleted.
    half_deleted: BTreeSet<u64>,
    /// How many places a volume may have that was growing.
    half_grown: BTreeSet<u64>,
    /// The volume does not know what is durable, and does nothing any more.
    dead: bool,
    random: Random,
    context: String,
    tally: &'a mut Tally,
}

fn offset(place: u64) -> u64 {
    place * STRIDE * BLOCK as u64
}

impl History<'_> {
    fn tell(&self, what: &dyn std::fmt::Display) {
        if std::env::var_os("FEALTY_SEED").is_some() {
            println!("{}: {what}", self.context);
        }
    }

    /// What a request came to: the store's fault, if anything. Whether it was done.
    fn heard<T>(&mut self, what: &'static str, done: &Result<T, VolumeError>) -> bool {
        if let Err(error) = done {
            self.tell(&format_args!("{what}: {error}"));
            let fault = matches!(error, VolumeError::Store(..) | VolumeError::Full(_) | VolumeError::Failed(_));
            assert!(fault, "{}: {what}: {error}", self.context);
            self.dead |= matches!(error, VolumeError::Failed(_));
        }
        let counts = if done.is_ok() { &mut self.tally.succeeded } else { &mut self.tally.failed };
        *counts.entry(what).or_default() += 1;
        done.is_ok()
    }

    /// Everything so far is durable.
    fn settle(&mut self) {
        self.known.iter_mut().for_each(|known| known.since.clear());
    }

    fn now(&self) -> Vec<BTreeSet<Content>> {
        self.known.iter().map(|known| known.now.clone()).collect()
    }

    fn set(&mut self, place: u64, data: Vec<u8>, failed: bool) {
        self.known[place as usize].set([Arc::new(data)].into(), failed);
    }

    fn read(&mut self, volume: &Volume, place: u64) {
        let mut found = vec![0xee; BLOCK];
        let done = volume.read(offset(place), &mut found);
        if self.heard("read", &done) {
            let known = &mut self.known[place as usize];
            let what = u64::from_le_bytes(found[8..16].try_into().expect("8 bytes"));
            assert!(known.may_be(&found, false), "{}: place {place} holds {what}", self.context);
            known.now = [Arc::new(found)].into();
        }
    }

    /// All of it holds what it should, and only the snapshots are there that should be.
    fn look(&mut self, volume: &Volume, opened: bool) {
        (0..self.known.len() as u64).for_each(|place| self.read(volume, place));
        let listed = volume.snapshots().expect("a list");
        let kept: BTreeSet<u64> = listed.iter().filter(|s| !s.deleting).map(|s| s.id).collect();
        if let Some(content) = &self.half_taken {
            for id in &kept {
                self.snapshots.entry(*id).or_insert_with(|| content.clone());
            }
        }
        if opened {
            self.half_taken = None;
            let half = std::mem::take(&mut self.half_deleted);
            self.snapshots.retain(|id, _| kept.contains(id) || !half.contains(id));
        }
        let expected = self.snapshots.keys().filter(|id| kept.contains(*id) || !self.half_deleted.contains(*id));
        assert_eq!(kept, expected.copied().collect(), "{}: snapshots", self.context);
        check_good(volume);
    }

    fn read_snapshots(&self) {
        for (id, content) in self.snapshots.iter().filter(|(id, _)| !self.half_deleted.contains(*id)) {
            let options = OpenOptions { snapshot: Some(*id), ..OpenOptions::default() };
            let seen = self.provider.open_with(self.store.clone(), &self.provider.grant(), options);
            let seen = seen.unwrap_or_else(|e| panic!("{}: snapshot {id}: {e}", self.context));
            for (place, content) in (0..).zip(content) {
                let mut found = vec![0xee; BLOCK];
                let done = seen.read(offset(place), &mut found);
                done.unwrap_or_else(|e| panic!("{}: snapshot {id}, place {place}: {e}", self.context));
                assert!(content.contains(&found), "{}: snapshot {id}, place {place}", self.context);
            }
        }
    }

    fn step(&mut self, volume: &Volume) {
        let places = self.known.len() as u64;
        let first = self.random.below(places);
        let count = (1 + self.random.below(30)).min(places - first);
        let kind = self.random.below(100);
        self.tell(&format_args!("kind {kind}, {count} places from {first}"));
        match kind {
            0..30 => {
                let number = self.random.number() >> 1;
                let data: Vec<Vec<u8>> = (first..first + count).map(|place| content(place, number)).collect();
                let asked: Vec<(u64, &[u8])> =
                    (first..).zip(&data).map(|(place, data)| (offset(place), &data[..])).collect();
                let done = volume.write_many(&asked);
                for ((place, data), done) in (first..).zip(data).zip(&done) {
                    self.set(place, data, done.is_err());
                    self.heard("write", done);
                }
            }
            30..42 => {
                let length = offset(count - 1) + BLOCK as u64;
                let done = volume.discard(offset(first), length);
                (first..first + count).for_each(|place| self.set(place, vec![0; BLOCK], done.is_err()));
                self.heard("discard", &done);
            }
            42..55 => {
                if self.heard("flush", &volume.flush()) {
                    self.settle();
                }
            }
            55..60 => {
                if self.heard("checkpoint", &volume.checkpoint()) {
                    self.settle();
                }
            }
            60..68 => {
                let done = volume.take_snapshot("one");
                self.heard("snapshot", &done);
                match done {
                    Ok(id) => {
                        self.snapshots.insert(id, self.now());
                        self.settle();
                    }
                    Err(_) => self.half_taken = Some(self.now()),
                }
            }
            68..74 => self.delete(volume),
            74..79 => self.revert(volume),
            79..84 => {
                let mut left = self.random.below(10);
                let done = volume.rotate(&mut |_, _| {
                    left = left.saturating_sub(1);
                    left > 0
                });
                self.heard("rotation", &done);
            }
            84..87 if places < MOST => self.grow(volume),
            84..93 => self.read(volume, first),
            93..97 if self.power => self.disk.burn(1 + self.random.below(60)),
            93..97 => {
                let what = self.store.begin(&mut self.random);
                self.tell(&what);
            }
            _ => self.mend(volume),
        }
    }

    fn delete(&mut self, volume: &Volume) {
        let at = self.random.below(self.snapshots.len().max(1) as u64) as usize;
        let Some(id) = self.snapshots.keys().nth(at).copied() else { return };
        let done = volume.delete_snapshot(id, &mut |_, _| {});
        if self.half_deleted.contains(&id) && matches!(done, Err(VolumeError::NoSnapshot(_))) {
            return;
        }
        if self.heard("deletion", &done) {
            self.snapshots.remove(&id);
            self.half_deleted.remove(&id);
        } else {
            self.half_deleted.insert(id);
        }
    }

    fn revert(&mut self, volume: &Volume) {
        let Some((id, mut content)) = self.snapshots.last_key_value().map(|(id, content)| (*id, content.clone()))
        else {
            return;
        };
        // Which is the newest is not known.
        if !self.half_deleted.is_empty() || self.half_taken.is_some() {
            return;
        }
        // What it grew by since is zero.
        content.resize_with(self.known.len(), || Known::zero().now);
        let done = volume.revert(id);
        let done = self.heard("revert", &done);
        self.known.iter_mut().zip(content).for_each(|(known, content)| known.set(content, !done));
        if done {
            self.settle();
        }
    }

    fn grow(&mut self, volume: &Volume) {
        let before = self.known.len() as u64;
        let places = [before + 1, MOST][self.random.below(2) as usize];
        self.tell(&format_args!("grows to {places}"));
        let done = volume.grow(offset(places));
        if self.heard("growth", &done) {
            self.settle();
            self.known.resize_with(places as usize, Known::zero);
        } else {
            self.half_grown.insert(places);
        }
    }

    /// The store works again: so does the volume, unless it does not know what is durable.
    fn mend(&mut self, volume: &Volume) {
        self.disk.repair();
        self.store.end();
        self.tell(&"the store works again");
        let data = content(0, self.random.number() >> 1);
        let done = volume.write(0, &data);
        self.set(0, data, done.is_err());
        if self.heard("write", &done) {
            self.look(volume, false);
        }
    }

    fn open(&mut self) -> Volume {
        if self.random.chance(30) {
            if self.power {
                self.disk.burn(1 + self.random.below(12));
            } else {
                self.store.begin(&mut self.random);
            }
            let opened = self.try_open();
            self.disk.repair();
            self.store.end();
            if self.heard("opening", &opened)
                && let Ok(volume) = opened
            {
                return volume;
            }
            if self.random.chance(50) {
                self.disk.crash(&mut self.random);
            }
        }
        self.try_open().unwrap_or_else(|e| panic!("{}: {e}", self.context))
    }

    fn try_open(&self) -> Result<Volume, VolumeError> {
        self.provider.open_with(self.store.clone(), &self.provider.grant(), self.options)
    }

    fn life(&mut self) {
        if self.random.chance(20) {
            *lock(&self.provider.key_id) += 1;
        }
        let volume = self.open();
        let places = volume.size() / offset(1);
        assert!(
            places == self.known.len() as u64 || self.half_grown.contains(&places),
            "{}: {places} places",
            self.context
        );
        self.half_grown.clear();
        self.known.resize_with(places as usize, Known::zero);
        self.known.iter_mut().for_each(Known::opened);
        self.look(&volume, true);
        self.dead = false;
        for _ in 0..20 + self.random.below(100) {
            if !self.dead {
                self.step(&volume);
            }
        }
        self.disk.repair();
        self.store.end();
        if self.random.chance(50) && volume.close().is_ok() {
            self.tell(&"closed");
            self.settle();
        }
        drop(volume);
        if self.random.chance(50) {
            self.tell(&"the power fails");
            self.disk.crash(&mut self.random);
        }
        self.read_snapshots();
    }
}

fn histories(power: bool, first: u64, count: u64) {
    let mut tally = Tally::default();
    for seed in seeds(first, count) {
        let test = if power { "sparse::power_fails" } else { "sparse::calls_fail" }.to_owned();
        let _replay = Replay { test, seed };
        let mode = [AnchorMode::Close, AnchorMode::Interval, AnchorMode::Flush][seed as usize % 3];
        let (provider, disk, mut random) = (Provider::new(mode), SimStore::new(), Random(seed));
        if random.chance(50) {
            disk.overlap();
        }
        let store = Faulty::over(disk.clone(), seed);
        let places = FIRST[random.below(2) as usize];
        make_room(&store, offset(places), 3 * MOST * BLOCK as u64).expect("room");
        provider.create(store.clone(), offset(places)).expect("a volume").close().expect("closed");
        let before = disk.len().expect("known") / BLOCK as u64;
        assert!(before < ONE_BITMAP, "{before}");
        let outlive = random.chance(50);
        let mut history = History {
            provider: provider.clone(),
            options: OpenOptions { outlive, map_cache: 0, ..options() },
            disk: disk.clone(),
            store,
            power,
            known: vec![Known::zero(); places as usize],
            snapshots: BTreeMap::new(),
            half_taken: None,
            half_deleted: BTreeSet::new(),
            half_grown: BTreeSet::new(),
            dead: false,
            random,
            context: String::new(),
            tally: &mut tally,
        };
        for life in 0..6 {
            history.context = format!("{mode:?} seed {seed} life {life}");
            history.life();
        }
        let blocks = |places: u64| places * STRIDE;
        let now = history.known.len() as u64;
        tally.deeper += u64::from(blocks(places) <= TWO_LEVELS && blocks(now) > TWO_LEVELS);
        tally.wider += u64::from(blocks(now) > ONE_BITMAP);
        assert_eq!(provider.noticed(), [], "seed {seed}: nobody tampered with it");
    }
    println!("{tally:?}");
    if std::env::var_os("FEALTY_SEED").is_none() {
        let all = ["write", "discard", "flush", "checkpoint", "snapshot", "deletion", "revert", "rotation", "growth"];
        for what in all {
            assert!(tally.succeeded.contains_key(what), "no {what} was done: {tally:?}");
        }
        assert!(tally.failed.len() > all.len() / 2, "little failed: {tally:?}");
        assert!(tally.deeper > 0 && tally.wider > 0, "none grew far: {tally:?}");
    }
}

#[test]
fn power_fails() {
    histories(true, 900_000, 8);
}

#[test]
fn calls_fail() {
    histories(false, 1_000_000, 8);
}
