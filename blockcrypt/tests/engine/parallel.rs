//! Several threads at once, over stores that lose power: each sees its own part as if it were alone.

use crate::common::{MIB, Provider, Random, Replay, SimStore, check_good, seeds};
use crate::model::outlives;
use crate::plain::{Model, read_many, request, requests, write_many};
use fealty_blockcrypt::{MemoryStore, OpenOptions, Volume, VolumeError};
use policy::AnchorMode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

const THREADS: usize = 4;
const PART: usize = 300 * 1024;

/// One thread's work until something fails.
fn work(volume: &Volume, model: &mut Model, base: usize, random: &mut Random, steps: u64) -> Result<(), VolumeError> {
    for _ in 0..steps {
        let (offset, length) = request(random, model.size);
        let at = (base + offset) as u64;
        match random.below(100) {
            0..20 => {
                let all = requests(random, model.size);
                write_many(volume, model, base, &all, random)?;
            }
            20..45 => {
                let mut data = vec![0; length];
                random.fill(&mut data);
                model.write(offset, &data);
                volume.write(at, &data)?;
            }
            45..55 => {
                model.discard(offset, length, false);
                volume.discard(at, length as u64)?;
            }
            55..65 => {
                let all = requests(random, model.size);
                read_many(volume, model, base, &all, "several threads")?;
            }
            65..80 => {
                let mut found = vec![0xee; length];
                volume.read(at, &mut found)?;
                assert!(found == model.now(offset, length), "read at {at}");
            }
            80..97 => {
                volume.flush()?;
                model.settle();
            }
            _ => volume.checkpoint()?,
        }
    }
    Ok(())
}

fn run(mode: AnchorMode, seed: u64, lives: u64) {
    let _replay = Replay { test: "threads_lose_no_acknowledged_flush".to_owned(), seed };
    let (provider, store) = (Provider::new(mode), SimStore::new());
    let size = THREADS * PART;
    provider.create(store.clone(), size as u64).expect("a volume").close().expect("closed");
    let mut random = Random(seed);
    let mut models: Vec<Model> = (0..THREADS).map(|i| Model::at(i * PART, PART)).collect();
    let outlive = outlives(seed);
    for life in 0..lives {
        let context = format!("mode {mode:?} seed {seed} life {life}");
        // The smallest cache there is: pages go and come back all the time.
        let options = OpenOptions { map_cache: 0, outlive, ..OpenOptions::default() };
        let volume = provider.open_with(store.clone(), &provider.grant(), options);
        let volume = volume.unwrap_or_else(|e| panic!("{context}: {e}"));
        for model in &mut models {
            model.recover(&volume, &context);
        }
        if random.chance(50) {
            store.burn(20 + random.below(400));
        }
        let steps = 10 + random.below(60);
        let seeds: Vec<u64> = models.iter().map(|_| random.number()).collect();
        let worked: Vec<_> = std::thread::scope(|scope| {
            let parts = models.iter_mut().zip(seeds).enumerate();
            let begin = |(i, (model, seed)): (usize, (_, u64))| {
                let volume = &volume;
                scope.spawn(move || work(volume, model, i * PART, &mut Random(seed), steps))
            };
            let threads: Vec<_> = parts.map(begin).collect();
            threads.into_iter().map(|thread| thread.join().expect("no panic")).collect()
        });
        if random.chance(40) && volume.checkpoint().is_ok() {
            check_good(&volume);
        }
        drop(volume);
        store.repair();
        if random.chance(80) {
            store.crash(&mut random);
        } else if outlive {
            // Only the process died: each thread finds what it was told is written.
            models.iter_mut().zip(&worked).filter(|(_, done)| done.is_ok()).for_each(|(model, _)| model.settle());
        }
    }
    let events = provider.heard();
    assert!(events.iter().all(|e| !e.starts_with("integrity")), "{events:?}");
}

#[test]
fn threads_lose_no_acknowledged_flush() {
    for seed in seeds(300_000, 10) {
        run(AnchorMode::Close, seed, 8);
    }
    for seed in seeds(400_000, 6) {
        run(AnchorMode::Flush, seed, 8);
    }
}

/// Each write is one value throughout, so each block read must be.
#[test]
fn requests_for_the_same_blocks_follow_each_other() {
    let provider = Provider::new(AnchorMode::Close);
    let volume = provider.create(MemoryStore::default(), MIB).expect("a volume");
    let volume = Arc::new(volume);
    let stop = Arc::new(AtomicBool::new(false));
    let readers: Vec<_> = (0..2)
        .map(|_| {
            let (volume, stop) = (volume.clone(), stop.clone());
            std::thread::spawn(move || {
                while !stop.load(Ordering::Relaxed) {
                    let mut found = vec![0xee; 16 * 4096];
                    volume.read(0, &mut found).expect("read");
                    for block in found.as_chunks::<4096>().0 {
                        assert!(block[1..4095].iter().all(|b| *b == block[1]), "a block of two writes");
                    }
                }
            })
        })
        .collect();
    std::thread::scope(|scope| {
        for thread in 0..3u8 {
            let volume = &volume;
            scope.spawn(move || {
                let mut random = Random(u64::from(thread));
                for round in 0..60 {
                    let (first, count) = (random.below(12), 1 + random.below(4));
                    let data = vec![1 + thread * 80 + round; count as usize * 4096];
                    volume.write(first * 4096, &data).expect("written");
                    // Part of a block must not bring back the past of another part.
                    let own = 100 * 4096 + u64::from(thread) * 512;
                    let mut found = [0; 512];
                    volume.read(own, &mut found).expect("read");
                    assert!(round == 0 || found == data_of(thread, round - 1));
                    volume.write(own, &data_of(thread, round)).expect("written");
                    if round % 8 == 0 {
                        volume.flush().expect("flushed");
                        volume.discard(first * 4096, 4096).expect("discarded");
                    }
                }
            });
        }
    });
    stop.store(true, Ordering::Relaxed);
    readers.into_iter().for_each(|reader| reader.join().expect("joined"));
    check_good(&volume);
}

fn data_of(thread: u8, round: u8) -> [u8; 512] {
    [1 + thread * 80 + round; 512]
}

/// A full volume takes overwrites from any number of threads.
#[test]
fn threads_overwrite_a_full_volume() {
    let provider = Provider::new(AnchorMode::Close);
    let volume = provider.create(MemoryStore::default(), 2 * MIB).expect("a volume");
    std::thread::scope(|scope| {
        for thread in 0..8u64 {
            let volume = &volume;
            scope.spawn(move || {
                let part = MIB / 4;
                let mut data = vec![0; part as usize];
                for round in 0..6 {
                    Random(thread << 8 | round).fill(&mut data);
                    volume.write(thread * part, &data).expect("written");
                }
                let mut found = vec![0; part as usize];
                volume.read(thread * part, &mut found).expect("read");
                assert!(found == data);
            });
        }
    });
    check_good(&volume);
}

/// A small log runs full of other requests' promises: that is no reason to refuse what frees room.
#[test]
fn threads_discard_and_flush_beside_each_other() {
    let provider = Provider::new(AnchorMode::Close);
    let volume = provider.create(MemoryStore::default(), 24 * MIB).expect("a volume");
    std::thread::scope(|scope| {
        for thread in 0..48_u64 {
            let volume = &volume;
            scope.spawn(move || {
                let (at, part) = (thread * MIB / 2, MIB / 2);
                for round in 0..6_u8 {
                    volume.write(at, &vec![1 + round; part as usize]).expect("written");
                    for i in 0..6 {
                        volume.discard(at + i * 4096, 4096).expect("discarded");
                        volume.flush().expect("flushed");
                    }
                    volume.write_zeroes(at, part, round % 2 == 0).expect("zeroed");
                }
            });
        }
    });
    assert_eq!(volume.info().mapped, 0);
    check_good(&volume);
}
