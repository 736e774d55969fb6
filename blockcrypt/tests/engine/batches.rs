//! Requests that come together: each is as if it were alone.

use crate::common::{MIB, Provider, Random, SimStore, check_good, lock};
use crate::hooked::{Call, Hook, Hooked};
use fealty_blockcrypt::{MemoryStore, Volume, VolumeError};
use policy::AnchorMode;
use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex};

const BLOCK: usize = 4096;

fn at(lba: u64) -> u64 {
    lba * BLOCK as u64
}

/// Reads so many blocks from `first` on, all at once: what they hold, or how it failed.
fn read_blocks(volume: &Volume, lbas: Range<u64>) -> Vec<Result<Vec<u8>, VolumeError>> {
    let mut found = vec![vec![0xee; BLOCK]; (lbas.end - lbas.start) as usize];
    let mut asked: Vec<(u64, &mut [u8])> = lbas.map(at).zip(found.iter_mut().map(Vec::as_mut_slice)).collect();
    let done = volume.read_many(&mut asked);
    done.into_iter().zip(found).map(|(done, found)| done.map(|()| found)).collect()
}

#[test]
fn what_can_not_be_fails_alone() {
    let provider = Provider::new(AnchorMode::Close);
    let volume = provider.create(MemoryStore::default(), MIB + 512).expect("a volume");
    let data = vec![7; 8192];
    let asked: [(u64, &[u8]); 6] = [
        (0, &data[..4096]),
        (MIB, &data[..1024]),
        (8192, &data[..512]),
        (100, &data[..512]),
        (u64::MAX - 511, &data[..512]),
        (MIB, &data[..512]),
    ];
    let good = |done: &[Result<(), VolumeError>]| {
        let refused = |r: &Result<(), VolumeError>| matches!(r, Err(VolumeError::Request { .. }));
        for (i, done) in done.iter().enumerate() {
            assert!(if [1, 3, 4].contains(&i) { refused(done) } else { done.is_ok() }, "{i}: {done:?}");
        }
    };
    good(&volume.write_many(&asked));
    let mut found: Vec<Vec<u8>> = asked.iter().map(|(_, data)| vec![0xee; data.len()]).collect();
    let mut back: Vec<(u64, &mut [u8])> =
        asked.iter().map(|(at, _)| *at).zip(found.iter_mut().map(Vec::as_mut_slice)).collect();
    good(&volume.read_many(&mut back));
    for (i, ((_, data), found)) in asked.iter().zip(&found).enumerate() {
        assert!(found.iter().all(|b| *b == 0) || found == data, "{i}");
    }
    assert!(volume.read_many(&mut []).is_empty() && volume.write_many(&[]).is_empty());
    volume.wipe_keys();
    assert!(volume.write_many(&asked).iter().all(|done| matches!(done, Err(VolumeError::NoKeys))));
    volume.put_back_keys(&provider.kek()).expect("the same key");
    check_good(&volume);
}

#[test]
fn writes_that_meet_follow_each_other() {
    let provider = Provider::new(AnchorMode::Close);
    let volume = provider.create(MemoryStore::default(), MIB).expect("a volume");
    let mut model = vec![0; MIB as usize];
    let mut random = Random(4);
    for _ in 0..60 {
        // Sectors and pieces of the same few blocks, so that nearly all meet.
        let all: Vec<(usize, Vec<u8>)> = (0..40)
            .map(|_| {
                let (sector, sectors) = (random.below(100) as usize, 1 + random.below(12) as usize);
                let mut data = vec![0; sectors * 512];
                random.fill(&mut data);
                (sector * 512, data)
            })
            .collect();
        let asked: Vec<(u64, &[u8])> = all.iter().map(|(offset, data)| (*offset as u64, &data[..])).collect();
        assert!(volume.write_many(&asked).iter().all(Result::is_ok));
        all.iter().for_each(|(offset, data)| model[*offset..*offset + data.len()].copy_from_slice(data));
        let mut found = vec![0; 120 * 512];
        volume.read(0, &mut found).expect("read");
        assert!(found == model[..120 * 512]);
    }
    check_good(&volume);
}

/// Where a store fails, and what it has seen.
#[derive(Default)]
struct Failing {
    reads: Mutex<Range<u64>>,
    writes: Mutex<Range<u64>>,
    /// Where blocks were written.
    seen: Mutex<Vec<u64>>,
}

/// A store that fails where it is told to, which is nowhere yet.
fn failing() -> Arc<Hooked<Failing>> {
    Hooked::over(SimStore::new(), Failing::default())
}

impl Hook for Failing {
    fn before(&self, call: Call) -> io::Result<()> {
        let meets = |bad: &Mutex<Range<u64>>, at: &Range<u64>| {
            let bad = lock(bad);
            at.start < bad.end && bad.start < at.end
        };
        match call {
            Call::Read(at) if meets(&self.reads, &at) => Err(io::Error::other("a bad place")),
            Call::Write(at) if meets(&self.writes, &at) => Err(io::Error::other("a bad place")),
            Call::Write(at) => {
                lock(&self.seen).push(at.start);
                Ok(())
            }
            _ => Ok(()),
        }
    }
}

#[test]
fn where_the_store_fails_only_who_needs_that_place_fails() {
    where_it_fails(&failing());
}

#[test]
fn nor_does_anyone_else_where_lots_are_under_way_together() {
    let store = failing();
    store.inner.overlap();
    where_it_fails(&store);
}

fn where_it_fails(store: &Arc<Hooked<Failing>>) {
    let provider = Provider::new(AnchorMode::Close);
    let (none, all) = (0..0, 0..u64::MAX);
    let volume = provider.create(store.clone(), 4 * MIB).expect("a volume");
    let block = |lba: u64, round: u8| vec![lba as u8 ^ round; BLOCK];
    let write = |lbas: Range<u64>, round| {
        let data: Vec<Vec<u8>> = lbas.clone().map(|lba| block(lba, round)).collect();
        let asked: Vec<(u64, &[u8])> = lbas.map(at).zip(data.iter().map(Vec::as_slice)).collect();
        volume.write_many(&asked)
    };
    // Every other block, so that each lies by itself.
    for lba in (0..64).step_by(2) {
        volume.write(at(lba), &block(lba, 1)).expect("written");
    }
    lock(&store.hook.seen).clear();
    volume.write(at(20), &block(20, 1)).expect("written");
    let place = lock(&store.hook.seen)[0];
    *lock(&store.hook.reads) = place..place + 1;
    for (lba, found) in read_blocks(&volume, 0..64).into_iter().enumerate() {
        match found {
            Ok(found) if lba % 2 == 0 => assert!(lba != 20 && found == block(lba as u64, 1)),
            Ok(found) => assert!(found == [0; BLOCK]),
            Err(error) => assert!(lba == 20 && matches!(error, VolumeError::Store(..)), "{lba}: {error}"),
        }
    }
    // A part of that block can't be written either, others' parts can.
    let sector = [9; 512];
    let asked: Vec<(u64, &[u8])> = (0..64).step_by(2).map(|lba| (at(lba) + 512, &sector[..])).collect();
    for (i, done) in volume.write_many(&asked).into_iter().enumerate() {
        assert_eq!(done.is_err(), i == 10, "{i}: {done:?}");
    }
    *lock(&store.hook.reads) = none.clone();
    for (lba, found) in read_blocks(&volume, 0..64).into_iter().enumerate().step_by(2) {
        let mut expected = block(lba as u64, 1);
        if lba != 20 {
            expected[512..1024].fill(9);
        }
        assert!(found.expect("read") == expected, "{lba}");
    }
    // Nothing can be written: all fail, and what they were stays.
    *lock(&store.hook.writes) = all;
    assert!(write(0..40, 2).iter().all(|done| matches!(done, Err(VolumeError::Store(..)))));
    *lock(&store.hook.writes) = none;
    let found = read_blocks(&volume, 20..21).remove(0).expect("read");
    assert!(found == block(20, 1));
    assert!(write(0..64, 3).iter().all(Result::is_ok));
    volume.flush().expect("flushed");
    for (lba, found) in read_blocks(&volume, 0..64).into_iter().enumerate() {
        assert!(found.expect("read") == block(lba as u64, 3), "{lba}");
    }
    check_good(&volume);
}

/// The store is asked once for many: each time it is asked costs a disk's latency, or a system call.
#[test]
fn what_is_replaced_together_is_written_together_and_so_are_the_pages_of_a_checkpoint() {
    let provider = Provider::new(AnchorMode::Close);
    let store = failing();
    let volume = provider.create(store.clone(), 16 * MIB).expect("a volume");
    for lba in 0..2048 {
        volume.write(at(lba), &[1; BLOCK]).expect("written");
    }
    volume.checkpoint().expect("durable");
    lock(&store.hook.seen).clear();
    // One block of each of the first leaves of the map, in no order.
    let data: Vec<Vec<u8>> = (0..28).map(|i| vec![2 + i; BLOCK]).collect();
    let lba = |i: u64| (i * 11 % 28) * 73;
    let asked: Vec<(u64, &[u8])> = (0..28).map(|i| at(lba(i))).zip(data.iter().map(Vec::as_slice)).collect();
    assert!(volume.write_many(&asked).iter().all(Result::is_ok));
    let written = std::mem::take(&mut *lock(&store.hook.seen));
    assert!(written.len() <= 2, "{written:?}");
    volume.checkpoint().expect("durable");
    let written = std::mem::take(&mut *lock(&store.hook.seen));
    assert!(written.len() < 14, "{written:?}");
    for i in 0..28 {
        assert!(read_blocks(&volume, lba(i)..lba(i) + 1).remove(0).expect("read") == data[i as usize]);
    }
    check_good(&volume);
}

/// One bad block among many is named, and it alone.
#[test]
fn a_tampered_block_fails_its_own_request_alone() {
    let (provider, store) = (Provider::new(AnchorMode::Close), SimStore::new());
    let volume = provider.create(store.clone(), 4 * MIB).expect("a volume");
    let before = store.bytes();
    let data: Vec<Vec<u8>> = (0..100).map(|i| vec![1 + i; BLOCK]).collect();
    let asked: Vec<(u64, &[u8])> = (0..100).map(at).zip(data.iter().map(Vec::as_slice)).collect();
    assert!(volume.write_many(&asked).iter().all(Result::is_ok));
    let mut bytes = store.bytes();
    let places: Vec<usize> =
        (0..bytes.len() / BLOCK).filter(|b| bytes[b * BLOCK..][..BLOCK] != before[b * BLOCK..][..BLOCK]).collect();
    for bad in [places[3], places[50]] {
        bytes[bad * BLOCK + 77] ^= 4;
    }
    store.set(bytes);
    let found = read_blocks(&volume, 0..100);
    let failed: Vec<usize> = (0..100).filter(|i| found[*i].is_err()).collect();
    assert_eq!(failed.len(), 2, "{failed:?}");
    for (lba, found) in found.into_iter().enumerate() {
        match found {
            Ok(found) => assert!(found == data[lba]),
            Err(VolumeError::Integrity { lba: named }) => assert_eq!(named, lba as u64),
            Err(other) => panic!("{other}"),
        }
    }
    let heard = provider.heard();
    assert_eq!(heard.len(), 2, "{heard:?}");
    assert!(failed.iter().zip(&heard).all(|(lba, event)| event.starts_with(&format!("integrity Some({lba})"))));
    // A request over several blocks is one request: it fails once, and is zero throughout.
    let (mut over, mut beside) = (vec![0xee; 8 * BLOCK], vec![0xee; BLOCK]);
    let first = failed[0].saturating_sub(3) as u64;
    let done = volume.read_many(&mut [(at(first), &mut over), (at(80), &mut beside)]);
    assert!(matches!(done[0], Err(VolumeError::Integrity { lba }) if lba == failed[0] as u64) && done[1].is_ok());
    assert!(over.iter().all(|b| *b == 0) && beside == data[80]);
    assert_eq!(provider.heard().len(), 1);
}

/// A volume with room for some of them takes those.
#[test]
fn a_full_store_takes_what_finds_room() {
    let (provider, store) = (Provider::new(AnchorMode::Close), SimStore::new());
    provider.create(store.clone(), 2 * MIB).expect("a volume").close().expect("closed");
    let volume = provider.open(store.clone()).expect("opens");
    store.limit(Some(20));
    let data: Vec<Vec<u8>> = (0..60).map(|i| vec![1 + i; BLOCK]).collect();
    let asked: Vec<(u64, &[u8])> = (0..60).map(at).zip(data.iter().map(Vec::as_slice)).collect();
    let done = volume.write_many(&asked);
    let written = done.iter().filter(|done| done.is_ok()).count();
    assert!((1..60).contains(&written), "{written}");
    assert!(done.iter().all(|done| matches!(done, Ok(()) | Err(VolumeError::Full(_)))), "{done:?}");
    for ((done, found), data) in done.iter().zip(read_blocks(&volume, 0..60)).zip(&data) {
        let expected = if done.is_ok() { data.clone() } else { vec![0; BLOCK] };
        assert!(found.expect("read") == expected);
    }
}

/// Batches that meet in different orders wait for each other, and never for ever.
#[test]
fn batches_of_several_threads_meet() {
    let provider = Provider::new(AnchorMode::Close);
    let volume = provider.create(MemoryStore::default(), MIB).expect("a volume");
    std::thread::scope(|scope| {
        for thread in 0..4_u8 {
            let volume = &volume;
            scope.spawn(move || {
                let mut random = Random(thread.into());
                for round in 0..150_u8 {
                    let data = vec![thread << 6 | round >> 2; 3 * BLOCK];
                    let asked: Vec<(u64, &[u8])> = (0..20)
                        .map(|_| (at(random.below(40)), &data[..(1 + random.below(3) as usize) * BLOCK]))
                        .collect();
                    assert!(volume.write_many(&asked).iter().all(Result::is_ok));
                    for found in read_blocks(volume, 0..42) {
                        let found = found.expect("read");
                        assert!(found.iter().all(|b| *b == found[0]), "a block of two writes");
                    }
                }
            });
        }
    });
    check_good(&volume);
}
