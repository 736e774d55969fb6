//! Random work with crashes, against a plain vector: no acknowledged FLUSH is lost, nothing is ever wrong.

use crate::common::{Provider, Random, Replay, SimStore, check_good, lock, options, seeds};
use crate::plain::{BLOCK, Model, read_many, request, requests, write_many};
use fealty_blockcrypt::{OpenOptions, Volume, VolumeError};
use policy::AnchorMode;
use std::collections::BTreeMap;
use std::sync::Arc;

struct Run {
    provider: Arc<Provider>,
    store: Arc<SimStore>,
    model: Model,
    random: Random,
    context: String,
    /// What each snapshot holds.
    snapshots: BTreeMap<u64, Vec<u8>>,
    /// A snapshot that was being taken when something failed.
    half_taken: Option<Vec<u8>>,
    /// One that was being deleted.
    half_deleted: Option<u64>,
    /// The size that the volume was about to have.
    half_resized: Option<usize>,
    /// Histories that failed before volumes could shrink are kept as they were.
    shrinks: bool,
    /// How volumes are opened.
    options: OpenOptions,
    /// Everything that was asked for was acknowledged.
    acknowledged: bool,
}

impl Run {
    /// Takes, deletes, or goes back to a snapshot.
    fn snapshot_step(&mut self, volume: &Volume) -> Result<(), VolumeError> {
        let newest = self.snapshots.keys().last().copied();
        let kind = self.random.below(10);
        self.tell(&format_args!("snapshots {:?}, kind {kind}", self.snapshots.keys()));
        match kind {
            0..6 => {
                let content = self.model.now(0, self.model.size);
                self.half_taken = Some(content.clone());
                let id = volume.take_snapshot("one")?;
                self.half_taken = None;
                self.snapshots.insert(id, content);
                self.model.settle();
                Ok(())
            }
            6..9 => {
                let Some(at) = newest.map(|_| self.random.below(self.snapshots.len() as u64)) else { return Ok(()) };
                let id = *self.snapshots.keys().nth(at as usize).expect("one of them");
                self.half_deleted = Some(id);
                volume.delete_snapshot(id, &mut |_, _| {})?;
                self.half_deleted = None;
                self.snapshots.remove(&id);
                Ok(())
            }
            _ => {
                let Some(id) = newest else { return Ok(()) };
                if let Some(older) = self.snapshots.keys().find(|older| **older != id) {
                    assert!(matches!(
                        volume.revert(*older),
                        Err(VolumeError::NewerSnapshot(_) | VolumeError::Store(..) | VolumeError::Failed(_))
                    ));
                }
                // What it grew by since is zero; what it shrank by has no room.
                let mut content = self.snapshots[&id].clone();
                if content.len() > self.model.size {
                    let refused = volume.revert(id).expect_err("it is larger than the volume");
                    return if matches!(refused, VolumeError::LargerSnapshot { .. }) { Ok(()) } else { Err(refused) };
                }
                content.resize(self.model.size, 0);
                self.model.write(0, &content);
                volume.revert(id)?;
                self.model.settle();
                Ok(())
            }
        }
    }

    /// Grows by something between a sector and a lot.
    fn grow(&mut self, volume: &Volume) -> Result<(), VolumeError> {
        let most = [1, 64, 4000][self.random.below(3) as usize];
        let size = self.model.size + 512 * (1 + self.random.below(most) as usize);
        self.half_resized = Some(size);
        self.tell(&format_args!("grows to {size}"));
        volume.grow(size as u64)?;
        self.half_resized = None;
        self.model.resize(size);
        self.model.settle();
        Ok(())
    }

    /// Shrinks by something between a sector and nearly all.
    fn shrink(&mut self, volume: &mut Volume) -> Result<(), VolumeError> {
        let left = self.model.size as u64 / 512 - 1;
        let most = [1, 64, left][self.random.below(3) as usize].min(left);
        if most == 0 {
            return Ok(());
        }
        let size = self.model.size - 512 * (1 + self.random.below(most) as usize);
        let discard_tail = self.random.chance(60);
        let empty = self.model.now(size, self.model.size - size).iter().all(|b| *b == 0);
        let cut = size.next_multiple_of(BLOCK).min(self.model.size);
        if discard_tail {
            // Also where it fails, this part may be gone.
            self.model.write(size, &vec![0; cut - size]);
        }
        self.half_resized = Some(size);
        self.tell(&format_args!("shrinks to {size}, discards: {discard_tail}"));
        match volume.shrink(size as u64, discard_tail, &mut |_, _| {}) {
            // Blocks may hold zeroes.
            Err(VolumeError::DataBeyond { .. }) if !discard_tail => {
                self.half_resized = None;
                return Ok(());
            }
            other => other?,
        }
        assert!(discard_tail || empty, "{}: data behind {size} is lost", self.context);
        self.half_resized = None;
        self.model.resize(size);
        self.model.settle();
        Ok(())
    }

    /// What snapshots there are, and what they hold.
    fn check_snapshots(&mut self, volume: &Volume) {
        let listed = volume.snapshots().expect("a list");
        let kept: Vec<u64> = listed.iter().filter(|s| !s.deleting).map(|s| s.id).collect();
        if let Some(id) = self.half_deleted.take()
            && !kept.contains(&id)
        {
            self.snapshots.remove(&id);
        }
        if let Some(content) = self.half_taken.take() {
            for id in kept.iter().filter(|id| !self.snapshots.contains_key(id)).copied().collect::<Vec<_>>() {
                self.snapshots.insert(id, content.clone());
            }
        }
        assert_eq!(kept, self.snapshots.keys().copied().collect::<Vec<_>>(), "{}", self.context);
    }

    fn read_snapshots(&self) {
        for (id, content) in &self.snapshots {
            let options = OpenOptions { snapshot: Some(*id), ..OpenOptions::default() };
            let seen = self.provider.open_with(self.store.clone(), &self.provider.grant(), options);
            let seen = seen.unwrap_or_else(|e| panic!("{}: snapshot {id}: {e}", self.context));
            let mut found = vec![0xee; content.len()];
            seen.read(0, &mut found).unwrap_or_else(|e| panic!("{}: snapshot {id}: {e}", self.context));
            assert!(found == *content, "{}: snapshot {id} is not what was taken", self.context);
            assert!(matches!(seen.write(0, &[0; 512]), Err(VolumeError::ReadOnly)));
            check_good(&seen);
        }
    }

    /// What happens, where one history is replayed.
    fn tell(&self, what: &dyn std::fmt::Display) {
        if std::env::var_os("FEALTY_SEED").is_some() {
            println!("{}: {what}", self.context);
        }
    }

    /// One step; an error ends the run until the next crash.
    fn step(&mut self, volume: &mut Volume) -> Result<(), VolumeError> {
        let (offset, length) = request(&mut self.random, self.model.size);
        let kind = self.random.below(100);
        self.tell(&format_args!("kind {kind}, {length} bytes at {offset}"));
        match kind {
            0..12 => {
                let length = if self.random.chance(10) { self.model.size - offset } else { length };
                self.model.discard(offset, length, true);
                volume.discard(offset as u64, length as u64)
            }
            12..20 => {
                self.model.write(offset, &vec![0; length]);
                let may_unmap = self.random.chance(50);
                volume.write_zeroes(offset as u64, length as u64, may_unmap)
            }
            20..35 => {
                let mut data = vec![0; length];
                self.random.fill(&mut data);
                // Also where it fails, parts of it may be there.
                self.model.write(offset, &data);
                volume.write(offset as u64, &data)
            }
            35..50 => {
                let all = requests(&mut self.random, self.model.size);
                write_many(volume, &mut self.model, 0, &all, &mut self.random)
            }
            50..65 => {
                let mut found = vec![0xee; length];
                volume.read(offset as u64, &mut found)?;
                assert!(found == self.model.now(offset, length), "{}: read at {offset}", self.context);
                Ok(())
            }
            65..75 => {
                let all = requests(&mut self.random, self.model.size);
                read_many(volume, &self.model, 0, &all, &self.context)
            }
            75..93 => {
                volume.flush()?;
                self.model.settle();
                Ok(())
            }
            93..94 if self.random.chance(30) => self.grow(volume),
            93..94 if self.shrinks && self.random.chance(40) => self.shrink(volume),
            93..94 if self.random.chance(40) => {
                let mut left = self.random.below(12);
                let finished = volume.rotate(&mut |_, _| {
                    left = left.saturating_sub(1);
                    left > 0
                })?;
                // One that is being deleted needs them too, as long as it is there.
                assert!(!finished || !volume.snapshots()?.is_empty() || volume.info().older_keys == 0);
                Ok(())
            }
            93..94 => volume.checkpoint(),
            94..97 => self.snapshot_step(volume),
            97..98 => {
                volume.wipe_keys();
                let mut sector = [1; 512];
                assert!(matches!(volume.read(0, &mut sector), Err(VolumeError::NoKeys)) && sector == [0; 512]);
                assert!(matches!(volume.write(0, &sector), Err(VolumeError::NoKeys)));
                assert!(matches!(volume.flush(), Err(VolumeError::NoKeys)));
                volume.put_back_keys(&self.provider.kek())
            }
            _ => {
                self.store.burn(1 + self.random.below(40));
                Ok(())
            }
        }
    }

    fn life(&mut self, mut volume: Volume, steps: u64) {
        let mut end = Ok(());
        for _ in 0..steps {
            end = self.step(&mut volume);
            self.tell(&format_args!("{end:?}"));
            if end.is_err() {
                break;
            }
        }
        self.acknowledged = end.is_ok();
        if end.is_ok() && self.random.chance(25) && volume.close().is_ok() {
            self.model.settle();
        }
    }
}

/// What histories differ in.
struct Kind {
    /// The volume is made smaller now and then.
    shrinks: bool,
    /// What is acknowledged outlives the process.
    outlive: bool,
    /// The store takes lots while later ones are sealed.
    overlaps: bool,
    /// Checkpoints are made by the volume's own thread, so that the same seed does not do the same again.
    background: bool,
}

fn kind(seed: u64) -> Kind {
    Kind { shrinks: true, outlive: outlives(seed), overlaps: seed % 4 >= 2, background: false }
}

/// A history of `lives` lives, of a kind that its seed says.
fn history(mode: AnchorMode, size: usize, seed: u64, lives: u64) {
    run(mode, size, seed, lives, kind(seed));
}

fn run(mode: AnchorMode, size: usize, seed: u64, lives: u64, kind: Kind) {
    let Kind { shrinks, outlive, overlaps, background } = kind;
    let name = if background { "in_background".to_owned() } else { format!("{mode:?}").to_lowercase() };
    let test = format!("crashes_lose_no_acknowledged_flush_{name}");
    let _replay = Replay { test, seed };
    let (provider, store) = (Provider::new(mode), SimStore::new());
    if overlaps {
        store.overlap();
    }
    let volume = provider.create(store.clone(), size as u64).expect("a volume");
    volume.close().expect("closed");
    drop(volume);
    let mut run = Run {
        provider,
        store,
        model: Model::new(size),
        random: Random(seed),
        context: String::new(),
        snapshots: BTreeMap::new(),
        half_taken: None,
        half_deleted: None,
        half_resized: None,
        shrinks,
        options: OpenOptions { outlive, background, ..options() },
        acknowledged: true,
    };
    for life in 0..lives {
        run.context = format!("mode {mode:?} seed {seed} life {life}");
        // The process is gone; what it wrote is the kernel's until the power fails too.
        run.store.repair();
        let mut crashed = run.random.chance(60);
        if crashed {
            run.store.crash(&mut run.random);
        }
        if run.random.chance(40) {
            // An opener that dies on its way, with the power or without.
            run.store.burn(1 + run.random.below(12));
            let early = run.provider.open(run.store.clone());
            drop(early);
            run.store.repair();
            if run.random.chance(70) {
                run.store.crash(&mut run.random);
                crashed = true;
            }
        }
        if outlive && run.acknowledged && !crashed {
            // Only the process died.
            run.model.settle();
        }
        if run.random.chance(20) {
            let seen = run.provider.open_read_only(run.store.clone());
            let seen = seen.unwrap_or_else(|e| panic!("{}: read-only: {e}", run.context));
            check_good(&seen);
            assert!(matches!(seen.write(0, &[0; 512]), Err(VolumeError::ReadOnly)));
        }
        if run.random.chance(15) {
            *lock(&run.provider.key_id) += 1;
        }
        let volume = run.provider.open_with(run.store.clone(), &run.provider.grant(), run.options);
        let volume = volume.unwrap_or_else(|e| panic!("{}: {e}", run.context));
        let size = volume.size() as usize;
        run.tell(&format_args!("{size} bytes, snapshots {:?}", run.snapshots.keys()));
        assert!(size == run.model.size || Some(size) == run.half_resized, "{}: {size} bytes", run.context);
        run.half_resized = None;
        run.model.resize(size);
        run.model.recover(&volume, &run.context);
        run.check_snapshots(&volume);
        if run.random.chance(20) {
            drop(volume);
            run.acknowledged = true;
            run.read_snapshots();
            continue;
        }
        if run.random.chance(30) {
            check_good(&volume);
        }
        let steps = 1 + run.random.below(120);
        run.life(volume, steps);
    }
    let events = run.provider.heard();
    assert!(events.iter().all(|e| !e.starts_with("integrity")), "{events:?}");
}

/// Whether in this history what is acknowledged outlives the process: every second one.
pub(crate) fn outlives(seed: u64) -> bool {
    seed % 2 == 1
}

/// A rotation beside a snapshot that is being deleted; a store longer than its volume, whose opener died at its first superblock.
#[test]
fn histories_that_once_failed() {
    for overlaps in [false, true] {
        let kind = || Kind { shrinks: false, outlive: false, overlaps, background: false };
        run(AnchorMode::Close, 700 * 1024 + 512, 267, 10, kind());
        run(AnchorMode::Interval, 96 * 1024, 100_349, 12, kind());
    }
}

#[test]
fn crashes_lose_no_acknowledged_flush_close() {
    for seed in seeds(0, 12) {
        history(AnchorMode::Close, 700 * 1024 + 512, seed, 10);
    }
}

#[test]
fn crashes_lose_no_acknowledged_flush_interval() {
    for seed in seeds(100_000, 20) {
        history(AnchorMode::Interval, 96 * 1024, seed, 12);
    }
}

#[test]
fn crashes_lose_no_acknowledged_flush_flush() {
    for seed in seeds(200_000, 12) {
        history(AnchorMode::Flush, 1200 * 1024, seed, 10);
    }
}

#[test]
fn crashes_lose_no_acknowledged_flush_in_background() {
    for seed in seeds(1_100_000, 16) {
        let mode = [AnchorMode::Close, AnchorMode::Flush][seed as usize / 8 % 2];
        run(mode, 700 * 1024 + 512, seed, 10, Kind { background: true, ..kind(seed) });
    }
}
