//! Stores that can't read some of their blocks, or read them wrong for once, and ones whose length is given.

use crate::common::{MIB, Provider, check_good, lock};
use fealty_blockcrypt::{CheckStep, MemoryStore, OpenOptions, Store, Volume, VolumeError, make_room};
use policy::AnchorMode;
use std::collections::BTreeSet;
use std::io;
use std::sync::{Arc, Mutex};

/// Fails to read some blocks, for good or once, reads others wrong once, and becomes no longer than it may.
struct Worn {
    inner: MemoryStore,
    unreadable: Mutex<Vec<u64>>,
    refused: Mutex<BTreeSet<u64>>,
    /// Blocks that were read.
    read: Mutex<BTreeSet<u64>>,
    misread: Mutex<BTreeSet<u64>>,
    longest: u64,
}

impl Worn {
    fn new(longest: u64) -> Arc<Self> {
        let (inner, unreadable, refused) = (MemoryStore::default(), Mutex::default(), Mutex::default());
        let (read, misread) = (Mutex::default(), Mutex::default());
        Arc::new(Self { inner, unreadable, refused, read, misread, longest })
    }
}

impl Store for Worn {
    fn len(&self) -> io::Result<u64> {
        self.inner.len()
    }
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        let blocks = offset / 4096..(offset + buffer.len() as u64).div_ceil(4096);
        lock(&self.read).extend(blocks.clone());
        let refused = blocks.clone().filter(|block| lock(&self.refused).remove(block)).count() > 0;
        if refused || lock(&self.unreadable).iter().any(|block| blocks.contains(block)) {
            return Err(rustix::io::Errno::IO.into());
        }
        self.inner.read_at(buffer, offset)?;
        for (block, bytes) in blocks.zip(buffer.chunks_mut(4096)) {
            if lock(&self.misread).remove(&block) {
                bytes[77] ^= 1;
            }
        }
        Ok(())
    }
    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.inner.write_at(bytes, offset)
    }
    fn sync_data(&self) -> io::Result<()> {
        Ok(())
    }
    fn set_len(&self, bytes: u64) -> io::Result<()> {
        if bytes > self.longest { Err(io::ErrorKind::StorageFull.into()) } else { self.inner.set_len(bytes) }
    }
}

#[test]
fn a_superblock_that_can_not_be_read_is_not_missed_where_its_twin_can() {
    let (provider, store) = (Provider::new(AnchorMode::Close), Worn::new(u64::MAX));
    let volume = provider.create(store.clone(), 2 * MIB).expect("a volume");
    volume.write(4096, &[7; 4096]).expect("written");
    volume.close().expect("closed");
    drop(volume);
    let end = store.len().expect("known") / 4096;
    for (unreadable, opens) in [
        (vec![0, 1], true),
        (vec![end - 2, end - 1], true),
        (vec![0, end - 1], true),
        // Both copies of the newest one, or of the one before: nobody knows which.
        (vec![0, end - 2], false),
        (vec![1, end - 1], false),
        (vec![0, 1, end - 2, end - 1], false),
    ] {
        *lock(&store.unreadable) = unreadable.clone();
        let opened = provider.open_read_only(store.clone());
        assert!(opens == opened.is_ok(), "{unreadable:?}: {:?}", opened.err());
        match opened {
            Ok(volume) => {
                let mut found = [0; 4096];
                volume.read(4096, &mut found).expect("read");
                assert!(found == [7; 4096], "{unreadable:?}: never an older state");
            }
            Err(error) => assert!(matches!(error, VolumeError::Store(..)), "{error}"),
        }
    }
    provider.heard();
    // A writer goes on too, and writes them anew. A disk that can't read is no tamperer.
    *lock(&store.unreadable) = vec![0, 1];
    let volume = provider.open(store.clone()).expect("opens");
    let heard = provider.heard();
    assert!(heard.iter().any(|event| event.contains("can't be read")), "{heard:?}");
    assert!(!heard.iter().any(|event| event.starts_with("integrity")), "{heard:?}");
    volume.write(8192, &[8; 4096]).expect("written");
    volume.close().expect("closed");
    drop(volume);
    lock(&store.unreadable).clear();
    check_good(&provider.open(store).expect("opens"));
}

/// A process was killed behind its first FLUSH. What recovery takes for lost is lost: so it must not believe the first read.
#[test]
fn what_a_recovery_reads_wrong_once_is_neither_the_end_of_the_log_nor_a_lost_write() {
    // A volume of 2 MiB has a log of 64 blocks, behind the superblocks at the front.
    let (front, log) = (2, 64);
    for (what, from, to) in
        [("log", front, front + log), ("data and map", front + log, u64::MAX), ("all", front, u64::MAX)]
    {
        let (provider, store) = (Provider::new(AnchorMode::Close), Worn::new(u64::MAX));
        let volume = provider.create(store.clone(), 2 * MIB).expect("a volume");
        for lba in 0..200 {
            volume.write(lba * 4096, &[1; 4096]).expect("written");
        }
        volume.close().expect("closed");
        drop(volume);
        let volume = provider.open(store.clone()).expect("opens");
        for lba in 0..150 {
            volume.write(lba * 4096, &[2; 4096]).expect("written");
        }
        volume.discard(150 * 4096, 4096).expect("discarded");
        volume.flush().expect("flushed");
        drop(volume);
        provider.heard();
        let back = store.len().expect("known") / 4096 - 2;
        for read_only in [true, false] {
            *lock(&store.misread) = (from..to.min(back)).collect();
            let options = OpenOptions { read_only, ..OpenOptions::default() };
            let volume = provider.open_with(store.clone(), &provider.grant(), options).expect("opens");
            lock(&store.misread).clear();
            for lba in 0..200 {
                let mut found = [0xee; 4096];
                volume.read(lba * 4096, &mut found).expect("read");
                let expected = [2, 0, 1][usize::from(lba >= 150) + usize::from(lba > 150)];
                assert!(found == [expected; 4096], "{what}: block {lba} holds {}", found[0]);
            }
            assert_eq!(provider.heard(), [] as [&str; 0], "{what}");
            check_good(&volume);
        }
    }
}

#[test]
fn a_store_that_is_too_short_is_told_how_long_it_must_be() {
    let (provider, store) = (Provider::new(AnchorMode::Close), Worn::new(4 * MIB));
    let too_short = |error: VolumeError, found: u64| match error {
        VolumeError::TooShort { found: said, needed } => assert!(said == found && needed > 4 * MIB),
        other => panic!("{other}"),
    };
    too_short(make_room(&store, MIB, 8 * MIB).expect_err("no device grows"), 0);
    too_short(provider.create(store.clone(), 8 * MIB).err().expect("no device grows"), 0);
    let store = Worn::new(8 * MIB);
    let volume = provider.create(store.clone(), MIB).expect("a volume");
    let found = store.len().expect("known");
    too_short(volume.grow(64 * MIB).expect_err("no device grows"), found);
    too_short(volume.widen(64 * MIB).expect_err("no device grows"), found);
    // Nothing has happened.
    volume.write(0, &[1; 4096]).expect("written");
    volume.grow(2 * MIB).expect("there is as much");
    check_good(&volume);
    volume.close().expect("closed");
}

/// A check names what can't be read, be it a page or data, says what hangs from it, and looks at all the rest.
#[test]
fn a_check_goes_on_past_what_can_not_be_read() {
    let (provider, store) = (Provider::new(AnchorMode::Close), Worn::new(u64::MAX));
    let size = 32 * MIB;
    let volume = provider.create(store.clone(), size).expect("a volume");
    for at in (0..size).step_by(MIB as usize) {
        volume.write(at, &[7; 4096]).expect("written");
    }
    volume.take_snapshot("then").expect("taken");
    for at in (0..size).step_by(MIB as usize) {
        volume.write(at, &[8; 4096]).expect("written");
    }
    volume.close().expect("closed");
    drop(volume);
    let opened = || provider.open_read_only(store.clone()).expect("opens");
    let whole = opened();
    let check = |volume: &Volume| {
        let (mut said, mut last) = (Vec::new(), 0);
        let report = volume.check(&mut |step| match step {
            CheckStep::Progress { done, .. } => {
                assert!(done >= last && done <= size / 4096);
                last = done;
            }
            CheckStep::Bad { lba, reason, .. } => said.push(format!("block {lba}: {reason}")),
            CheckStep::Problem(text) => said.push(text),
        });
        // The last block that holds something lies in the last MiB.
        assert!(last > (size - MIB) / 4096);
        (report.expect("a whole check"), said.join("\n"))
    };
    lock(&store.read).clear();
    let good = check(&whole).0;
    let read = lock(&store.read).clone();
    assert!(good.good(), "{good:?}");
    drop(whole);
    let copies = {
        let end = store.len().expect("known") / 4096;
        [0, 1, end - 2, end - 1]
    };
    let (mut seen, mut under, mut leaves) = (Vec::new(), 0, 0);
    for block in read {
        lock(&store.unreadable).clear();
        let volume = opened();
        provider.heard();
        *lock(&store.unreadable) = vec![block];
        let (report, said) = check(&volume);
        assert!(!provider.heard().iter().any(|event| event.starts_with("integrity")), "{block}: {said}");
        if report.good() {
            continue;
        }
        assert!(said.contains("Input/output error") || said.contains("the store can't read it"), "{block}: {said}");
        // One thing at a time, but that a snapshot may have it too.
        assert!(report.problems + report.bad_blocks <= 2 && report.leaked_blocks == 0, "{block}: {said}");
        let pages = good.pages - report.pages;
        if said.contains("page of") {
            assert!(
                said.contains(&format!("in block {block} of the store can't be read")) && pages > 0,
                "{block}: {said}"
            );
            under += u64::from(pages > 1 && good.data_blocks > report.data_blocks);
            leaves += u64::from(said.contains("blocks 0 to 71 were not looked at"));
        }
        for kind in ["map in", "free-space map", "its map", "it, in a snapshot", "superblock"] {
            if said.contains(kind) && !seen.contains(&kind) {
                seen.push(kind);
            }
        }
        let is_copy = said.contains("copy of the superblock");
        assert_eq!(is_copy, is_copy && copies.contains(&block));
    }
    assert_eq!(seen.len(), 5, "{seen:?}");
    // A root and the nodes below it, of the volume and of its snapshot; the first leaf of both.
    assert!(under >= 2 && leaves == 2, "{under} {leaves}");
}

/// As everything that a check looks at: what a store reads wrong, or not at all, once is not damaged.
#[test]
fn a_check_reads_superblocks_again_before_it_gives_them_up() {
    let (provider, store) = (Provider::new(AnchorMode::Close), Worn::new(u64::MAX));
    let volume = provider.create(store.clone(), 2 * MIB).expect("a volume");
    volume.write(4096, &[7; 4096]).expect("written");
    volume.close().expect("closed");
    drop(volume);
    let end = store.len().expect("known") / 4096;
    let copies = BTreeSet::from([0, 1, end - 2, end - 1]);
    for read_only in [true, false] {
        let options = OpenOptions { read_only, ..OpenOptions::default() };
        let volume = provider.open_with(store.clone(), &provider.grant(), options).expect("opens");
        provider.heard();
        for set in [&store.misread, &store.refused] {
            *lock(set) = copies.clone();
            check_good(&volume);
            // Of the one that is not the newest there is nothing to say.
            assert_eq!(std::mem::take(&mut *lock(set)).len(), 2);
            assert_eq!(provider.heard(), [] as [&str; 0]);
        }
        volume.close().expect("closed");
    }
}

/// What is read to open it: without a page of the snapshots the rest is seen, and nothing is written; without the log nothing is known.
#[test]
fn a_volume_is_looked_at_without_its_list_of_snapshots() {
    let (provider, store) = (Provider::new(AnchorMode::Close), Worn::new(u64::MAX));
    let volume = provider.create(store.clone(), 2 * MIB).expect("a volume");
    volume.write(4096, &[7; 4096]).expect("written");
    volume.take_snapshot("then").expect("taken");
    volume.write(4096, &[8; 4096]).expect("written");
    volume.close().expect("closed");
    drop(volume);
    lock(&store.read).clear();
    drop(provider.open_read_only(store.clone()).expect("opens"));
    let read = lock(&store.read).clone();
    let (mut lists, mut logs) = (0, 0);
    for block in read {
        *lock(&store.unreadable) = vec![block];
        let volume = match provider.open_read_only(store.clone()) {
            Ok(volume) => volume,
            Err(error) => {
                assert!(error.to_string().ends_with("failed to read its log"), "{block}: {error}");
                logs += 1;
                continue;
            }
        };
        let mut found = [0; 4096];
        volume.read(4096, &mut found).expect("read");
        assert!(found == [8; 4096]);
        let Err(error) = volume.snapshots() else { continue };
        lists += 1;
        assert!(matches!(error, VolumeError::Store(..)), "{error}");
        let mut said = String::new();
        let report = volume.check(&mut |step| {
            if let CheckStep::Problem(text) = step {
                said += &text;
            }
        });
        let report = report.expect("a whole check");
        assert_eq!(
            (report.problems, report.bad_blocks, report.data_blocks, report.leaked_blocks),
            (1, 0, 1, 0),
            "{said}"
        );
        assert!(said.contains(&format!("the list of snapshots can't be read: block {block}: Input/output")), "{said}");
        drop(volume);
        assert!(matches!(provider.open(store.clone()), Err(VolumeError::Store(..))), "a writer would lose it");
    }
    assert_eq!((lists, logs), (1, 1));
}
