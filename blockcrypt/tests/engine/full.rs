//! A store that has not one block more, and random work on a full volume with snapshots: requests are refused there, and nothing
//! else ever is.

use crate::common::{MIB, Provider, Random, Replay, SimStore, check_good, filled, options, seeds};
use crate::model::outlives;
use crate::plain::{Model, request};
use fealty_blockcrypt::{OpenOptions, Volume, VolumeError};
use policy::AnchorMode;
use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::Arc;

/// Fifteen leaves of the map.
const SIZE: usize = 4 * MIB as usize;
const LEAF: usize = 72 * 4096;

struct Run {
    provider: Arc<Provider>,
    store: Arc<SimStore>,
    options: OpenOptions,
    model: Model,
    random: Random,
    context: String,
    /// What each snapshot holds.
    snapshots: BTreeMap<u64, Rc<Vec<u8>>>,
    half_taken: Option<Rc<Vec<u8>>>,
    half_deleted: Option<u64>,
    /// Discards that were refused.
    refused: u32,
}

impl Run {
    /// A request that may be refused. Then all that was acknowledged can be made durable still; and each of its blocks holds the old or
    /// the new data.
    fn asked(&mut self, volume: &Volume, done: Result<(), VolumeError>) -> Result<bool, VolumeError> {
        let Err(VolumeError::Full(None)) = done else { return done.map(|()| true) };
        volume.flush()?;
        self.model.recover(volume, &self.context);
        Ok(false)
    }

    /// Takes a block out of most leaves: with the pages above them these are all that there are.
    fn scatter(&mut self, volume: &Volume) -> Result<(), VolumeError> {
        let (at, zeroes) = (self.random.below(72) as usize * 4096, self.random.chance(40));
        for offset in (at..SIZE).step_by(LEAF) {
            if self.random.chance(20) {
                continue;
            }
            let done = if zeroes {
                self.model.write(offset, &[0; 4096]);
                volume.write_zeroes(offset as u64, 4096, self.random.chance(50))
            } else {
                self.model.discard(offset, 4096, true);
                volume.discard(offset as u64, 4096)
            };
            if !self.asked(volume, done)? {
                self.refused += 1;
                break;
            }
        }
        Ok(())
    }

    /// Writes something; whether there was room.
    fn write(&mut self, volume: &Volume) -> Result<bool, VolumeError> {
        let (offset, length) = request(&mut self.random, SIZE);
        let mut data = vec![0; length];
        self.random.fill(&mut data);
        self.model.write(offset, &data);
        let done = volume.write(offset as u64, &data);
        self.asked(volume, done)
    }

    fn take(&mut self, volume: &Volume) -> Result<(), VolumeError> {
        let content = Rc::new(self.model.now(0, SIZE));
        self.half_taken = Some(content.clone());
        match volume.take_snapshot("one") {
            Ok(id) => {
                self.snapshots.insert(id, content);
                self.model.settle();
            }
            Err(VolumeError::Full(None)) => {}
            Err(other) => return Err(other),
        }
        self.half_taken = None;
        Ok(())
    }

    fn delete(&mut self, volume: &Volume) -> Result<(), VolumeError> {
        if self.snapshots.is_empty() {
            return Ok(());
        }
        let at = self.random.below(self.snapshots.len() as u64) as usize;
        let id = *self.snapshots.keys().nth(at).expect("one of them");
        self.half_deleted = Some(id);
        volume.delete_snapshot(id, &mut |_, _| {})?;
        self.half_deleted = None;
        self.snapshots.remove(&id);
        Ok(())
    }

    fn revert(&mut self, volume: &Volume) -> Result<(), VolumeError> {
        let Some((id, content)) = self.snapshots.last_key_value() else { return Ok(()) };
        self.model.write(0, content);
        volume.revert(*id)?;
        self.model.settle();
        Ok(())
    }

    /// One step; false where the volume is to be opened again.
    fn step(&mut self, volume: &Volume) -> Result<bool, VolumeError> {
        match self.random.below(100) {
            0..35 => self.scatter(volume)?,
            35..45 => drop(self.write(volume)?),
            45..70 => self.take(volume)?,
            70..72 => self.delete(volume)?,
            72..73 => self.revert(volume)?,
            73..84 => {
                volume.flush()?;
                self.model.settle();
            }
            84..88 => volume.checkpoint()?,
            88..92 => {
                volume.close()?;
                self.model.settle();
                return Ok(false);
            }
            92..95 => self.store.burn(1 + self.random.below(60)),
            _ => return Ok(false),
        }
        Ok(true)
    }

    fn open(&mut self) -> Volume {
        self.store.repair();
        if self.random.chance(60) {
            self.store.crash(&mut self.random);
        }
        if let Some(at) = (self.random.below(8) as usize).checked_sub(4)
            && let Some((id, content)) = self.snapshots.iter().nth(at)
            && Some(*id) != self.half_deleted
        {
            let options = OpenOptions { snapshot: Some(*id), ..Default::default() };
            let seen = self.provider.open_with(self.store.clone(), &self.provider.grant(), options);
            let mut found = vec![0xee; SIZE];
            seen.and_then(|seen| seen.read(0, &mut found)).unwrap_or_else(|e| panic!("{}: {id}: {e}", self.context));
            assert!(found == **content, "{}: snapshot {id} is not what was taken", self.context);
        }
        let volume = self.provider.open_with(self.store.clone(), &self.provider.grant(), self.options);
        let volume = volume.unwrap_or_else(|e| panic!("{}: {e}", self.context));
        self.model.recover(&volume, &self.context);
        let listed = volume.snapshots().expect("a list");
        let kept: Vec<u64> = listed.iter().filter(|s| !s.deleting).map(|s| s.id).collect();
        if let Some(id) = self.half_deleted.take().filter(|id| !kept.contains(id)) {
            self.snapshots.remove(&id);
        }
        if let Some(content) = self.half_taken.take()
            && let Some(id) = kept.iter().find(|id| !self.snapshots.contains_key(id))
        {
            self.snapshots.insert(*id, content);
        }
        assert_eq!(kept, self.snapshots.keys().copied().collect::<Vec<_>>(), "{}", self.context);
        volume
    }
}

/// Returns how many discards were refused.
fn history(seed: u64, steps: u32) -> u32 {
    let _replay = Replay { test: "what_is_full_refuses_requests_and_nothing_else".to_owned(), seed };
    let (provider, store) = (Provider::new(AnchorMode::Close), SimStore::new());
    filled(&provider, &store, SIZE as u64).close().expect("closed");
    let mut model = Model::new(SIZE);
    model.write(0, &vec![7; SIZE]);
    model.settle();
    let mut run = Run {
        provider,
        store,
        options: OpenOptions { outlive: outlives(seed), ..options() },
        model,
        random: Random(seed),
        context: String::new(),
        snapshots: BTreeMap::new(),
        half_taken: None,
        half_deleted: None,
        refused: 0,
    };
    let mut volume = run.open();
    let length = run.store.bytes().len();
    run.take(&volume).expect("taken");
    while run.write(&volume).expect("written, or refused") {}
    for step in 0..steps {
        run.context = format!("seed {seed} step {step}");
        match run.step(&volume) {
            Ok(true) => continue,
            Ok(false) => {}
            // The power failed.
            Err(VolumeError::Store(..) | VolumeError::Failed(_)) => {}
            Err(other) => panic!("{}: {other}", run.context),
        }
        drop(volume);
        volume = run.open();
    }
    run.context = format!("seed {seed}, at its end");
    drop(volume);
    volume = run.open();
    assert_eq!(run.store.bytes().len(), length, "no opener had to make room");
    while !run.snapshots.is_empty() {
        run.delete(&volume).unwrap_or_else(|e| panic!("{}: {e}", run.context));
    }
    volume.close().expect("closed");
    drop(volume);
    volume = run.open();
    check_good(&volume);
    volume.write(0, &vec![1; SIZE]).expect("room for all of it");
    run.refused
}

#[test]
fn what_is_full_refuses_requests_and_nothing_else() {
    let all = seeds(0, 3);
    let one = all.count_of_all() == 1;
    let refused: u32 = all.map(|seed| history(seed, 150)).sum();
    assert!(refused > 0 || one, "no discard was refused");
}

#[test]
fn a_full_store_loses_nothing_acknowledged() {
    let (provider, store) = (Provider::new(AnchorMode::Close), SimStore::new());
    provider.create(store.clone(), 2 * MIB).expect("a volume").close().expect("closed");
    let volume = provider.open(store.clone()).expect("opens");
    let data = vec![5; 64 * 1024];
    volume.write(0, &data).expect("written");
    volume.flush().expect("flushed");
    store.limit(Some(40));
    let mut acknowledged = vec![true];
    for i in 1..32 {
        let written = volume.write(i * 64 * 1024, &data).and_then(|()| volume.flush());
        assert!(written.is_ok() || matches!(written, Err(VolumeError::Full(_))), "{written:?}");
        acknowledged.push(written.is_ok());
    }
    assert!(acknowledged.contains(&true) && acknowledged.contains(&false));
    let check = |volume: &Volume| {
        for (i, _) in acknowledged.iter().enumerate().filter(|(_, a)| **a) {
            let mut found = vec![0; data.len()];
            volume.read(i as u64 * 64 * 1024, &mut found).expect("read");
            assert!(found == data, "{i}");
        }
    };
    check(&volume);
    drop(volume);
    store.crash(&mut Random(1));
    // The metadata of recovery may not find room either: then it does not open, and changes nothing.
    if let Err(error) = provider.open(store.clone()) {
        assert!(matches!(error, VolumeError::Full(_)), "{error}");
    }
    store.limit(None);
    let volume = provider.open(store.clone()).expect("opens once there is room");
    check(&volume);
    volume.write(31 * 64 * 1024, &data).expect("goes on");
    volume.close().expect("closed");
}

/// Not one block more: what is there can be discarded, made durable, opened again, and what that frees can be used.
#[test]
fn a_full_store_takes_discards_and_deletions_and_opens() {
    let (provider, store) = (Provider::new(AnchorMode::Close), SimStore::new());
    let piece = 64 * 1024;
    provider.create(store.clone(), 8 * MIB).expect("a volume").close().expect("closed");
    let volume = provider.open(store.clone()).expect("opens");
    for i in 0..40 {
        volume.write(i * piece, &vec![1; piece as usize]).expect("written");
    }
    let snapshot = volume.take_snapshot("before").expect("taken");
    store.limit(Some(150));
    let mut holds = vec![1; 40];
    for i in 0..100u64 {
        let written = volume.write(i % 128 * piece, &vec![2; piece as usize]).and_then(|()| volume.flush());
        match written {
            Ok(()) if i < 40 => holds[i as usize] = 2,
            Ok(()) => holds.push(2),
            Err(VolumeError::Full(_)) => {
                assert!(i > 0);
                break;
            }
            Err(other) => panic!("{other}"),
        }
    }
    let check = |volume: &Volume, holds: &[u8]| {
        for (i, value) in holds.iter().enumerate() {
            let mut found = vec![9; piece as usize];
            volume.read(i as u64 * piece, &mut found).expect("read");
            assert!(found.iter().all(|b| b == value), "{i}");
        }
    };
    store.limit(Some(0));
    for (i, value) in holds.iter_mut().enumerate().skip(1).step_by(2) {
        volume.discard(i as u64 * piece, piece).expect("discarded");
        volume.flush().expect("flushed");
        volume.checkpoint().expect("a checkpoint");
        *value = 0;
    }
    drop(volume);
    store.crash(&mut Random(8));
    store.limit(Some(0));
    let volume = provider.open(store.clone()).expect("opens on a full store");
    check(&volume, &holds);
    volume.discard(0, piece).expect("discarded");
    holds[0] = 0;
    volume.delete_snapshot(snapshot, &mut |_, _| {}).expect("deleted");
    check(&volume, &holds);
    check_good(&volume);
    // The holes are room again.
    for i in 0..16 {
        volume.write(i * piece, &vec![3; piece as usize]).expect("written");
        volume.flush().expect("flushed");
    }
    volume.close().expect("closed");
}
