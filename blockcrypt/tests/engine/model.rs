//! Random work with crashes, against a plain vector: no acknowledged FLUSH is lost, nothing is ever wrong.

use crate::common::{Provider, Random, SimStore, check_good};
use fealty_blockcrypt::{Volume, VolumeError};
use policy::AnchorMode;
use std::sync::Arc;

const BLOCK: usize = 4096;

/// What each 4096-byte block may hold: the acknowledged content first, then what was written since, in order.
struct Model {
    size: usize,
    versions: Vec<Vec<Vec<u8>>>,
}

impl Model {
    fn new(size: usize) -> Self {
        let versions = (0..size.div_ceil(BLOCK)).map(|i| vec![vec![0; BLOCK.min(size - i * BLOCK)]]).collect();
        Self { size, versions }
    }

    fn now(&self, offset: usize, length: usize) -> Vec<u8> {
        let all = offset / BLOCK..(offset + length).div_ceil(BLOCK);
        let first = all.start * BLOCK;
        let bytes: Vec<u8> = all.flat_map(|i| self.versions[i].last().expect("one at least").clone()).collect();
        bytes[offset - first..offset - first + length].to_vec()
    }

    fn write(&mut self, offset: usize, data: &[u8]) {
        for i in offset / BLOCK..(offset + data.len()).div_ceil(BLOCK) {
            let mut block = self.versions[i].last().expect("one at least").clone();
            let start = offset.max(i * BLOCK);
            let end = (offset + data.len()).min(i * BLOCK + block.len());
            block[start - i * BLOCK..end - i * BLOCK].copy_from_slice(&data[start - offset..end - offset]);
            self.versions[i].push(block);
        }
    }

    /// TRIM: zeroes in whole blocks only.
    fn discard(&mut self, offset: usize, length: usize) {
        let end = if offset + length == self.size { self.size } else { (offset + length) / BLOCK * BLOCK };
        let start = offset.div_ceil(BLOCK) * BLOCK;
        if start < end {
            self.write(start, &vec![0; end - start]);
        }
    }

    /// A FLUSH was acknowledged.
    fn settle(&mut self) {
        for versions in &mut self.versions {
            versions.drain(..versions.len() - 1);
        }
    }

    /// After a crash: each block holds one of its versions, which is from now on the only one.
    fn recover(&mut self, volume: &Volume, context: &str) {
        for (i, versions) in self.versions.iter_mut().enumerate() {
            let mut found = vec![0; versions[0].len()];
            volume.read((i * BLOCK) as u64, &mut found).unwrap_or_else(|e| panic!("{context}: block {i}: {e}"));
            assert!(versions.contains(&found), "{context}: block {i} holds what was never written there");
            *versions = vec![found];
        }
    }
}

struct Run {
    provider: Arc<Provider>,
    store: Arc<SimStore>,
    model: Model,
    random: Random,
    context: String,
}

impl Run {
    fn request(&mut self) -> (usize, usize) {
        let sectors = self.model.size / 512;
        let start = self.random.below(sectors as u64) as usize;
        let most = [1, 8, 64, 700][self.random.below(4) as usize].min(sectors - start);
        let mut length = 1 + self.random.below(most as u64) as usize;
        let mut start = start;
        if self.random.chance(60) {
            // Whole blocks, as guests mostly do.
            start -= start % 8;
            length = (length.div_ceil(8) * 8).min(sectors - start);
        }
        (start * 512, length * 512)
    }

    /// One step; an error ends the run until the next crash.
    fn step(&mut self, volume: &Volume) -> Result<(), VolumeError> {
        let (offset, length) = self.request();
        match self.random.below(100) {
            0..12 => {
                let length = if self.random.chance(10) { self.model.size - offset } else { length };
                self.model.discard(offset, length);
                volume.discard(offset as u64, length as u64)
            }
            12..20 => {
                self.model.write(offset, &vec![0; length]);
                let may_unmap = self.random.chance(50);
                volume.write_zeroes(offset as u64, length as u64, may_unmap)
            }
            20..50 => {
                let mut data = vec![0; length];
                self.random.fill(&mut data);
                // Also where it fails, parts of it may be there.
                self.model.write(offset, &data);
                volume.write(offset as u64, &data)
            }
            50..75 => {
                let mut found = vec![0xee; length];
                volume.read(offset as u64, &mut found)?;
                assert!(found == self.model.now(offset, length), "{}: read at {offset}", self.context);
                Ok(())
            }
            75..93 => {
                volume.flush()?;
                self.model.settle();
                Ok(())
            }
            93..97 => volume.checkpoint(),
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

    fn life(&mut self, volume: Volume, steps: u64) {
        let mut end = Ok(());
        for _ in 0..steps {
            end = self.step(&volume);
            if end.is_err() {
                break;
            }
        }
        if end.is_ok() && self.random.chance(25) && volume.close().is_ok() {
            self.model.settle();
        }
    }
}

fn run(mode: AnchorMode, size: usize, seed: u64, lives: u64) {
    let (provider, store) = (Provider::new(mode), SimStore::new());
    let volume = provider.create(store.clone(), size as u64).expect("a volume");
    volume.close().expect("closed");
    drop(volume);
    let mut run = Run { provider, store, model: Model::new(size), random: Random(seed), context: String::new() };
    for life in 0..lives {
        run.context = format!("mode {mode:?} seed {seed} life {life}");
        // The process is gone; what it wrote is the kernel's until the power fails too.
        run.store.repair();
        if run.random.chance(60) {
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
            }
        }
        if run.random.chance(20) {
            let seen = run.provider.open_read_only(run.store.clone());
            let seen = seen.unwrap_or_else(|e| panic!("{}: read-only: {e}", run.context));
            check_good(&seen);
            assert!(matches!(seen.write(0, &[0; 512]), Err(VolumeError::ReadOnly)));
        }
        let volume = run.provider.open(run.store.clone());
        let volume = volume.unwrap_or_else(|e| panic!("{}: {e}", run.context));
        run.model.recover(&volume, &run.context);
        if run.random.chance(30) {
            check_good(&volume);
        }
        let steps = 1 + run.random.below(120);
        run.life(volume, steps);
    }
    let events = run.provider.heard();
    assert!(events.iter().all(|e| !e.starts_with("integrity")), "{events:?}");
}

#[test]
fn crashes_lose_no_acknowledged_flush_close() {
    for seed in 0..10 {
        run(AnchorMode::Close, 700 * 1024 + 512, seed, 10);
    }
}

#[test]
fn crashes_lose_no_acknowledged_flush_interval() {
    for seed in 100..120 {
        run(AnchorMode::Interval, 96 * 1024, seed, 12);
    }
}

#[test]
fn crashes_lose_no_acknowledged_flush_flush() {
    for seed in 200..210 {
        run(AnchorMode::Flush, 1200 * 1024, seed, 10);
    }
}
