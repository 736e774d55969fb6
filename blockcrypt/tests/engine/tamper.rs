//! A store that lies: whatever it does, an error or a state that the anchor allows, never other data.

use crate::common::{MIB, Provider, Random, SimStore, lock};
use fealty_blockcrypt::{OpenOptions, Volume, VolumeError, inspect};
use policy::AnchorMode;
use std::sync::Arc;

const BLOCK: usize = 4096;
const SIZE: u64 = MIB;

/// A volume with data in its map and, if not closed, more in its log; and what each block may hold.
struct Scene {
    provider: Arc<Provider>,
    store: Arc<SimStore>,
    bytes: Vec<u8>,
    /// Each block's acknowledged content, then what is older but not older than the anchor.
    allowed: Vec<Vec<u8>>,
    /// Holds what the first life left.
    snapshot: u64,
}

fn fill(lba: u64, round: u8) -> Vec<u8> {
    let mut block = vec![round; BLOCK];
    block[..8].copy_from_slice(&lba.to_le_bytes());
    block
}

/// Two lives: the first fills every other block and closes, the second overwrites some and discards others, with FLUSHes, and
/// dies.
fn scene(mode: AnchorMode) -> Scene {
    let (provider, store) = (Provider::new(mode), SimStore::new());
    let volume = provider.create(store.clone(), SIZE).expect("a volume");
    let mut allowed = vec![vec![0]; (SIZE as usize) / BLOCK];
    for lba in (0..SIZE / BLOCK as u64).step_by(2) {
        volume.write(lba * BLOCK as u64, &fill(lba, 1)).expect("written");
        allowed[lba as usize] = vec![1];
    }
    volume.close().expect("closed");
    drop(volume);
    let volume = provider.open(store.clone()).expect("opens");
    let snapshot = volume.take_snapshot("first").expect("taken");
    for round in 2..8 {
        for lba in (0..40).map(|i| (i * 7 + u64::from(round)) % 200) {
            volume.write(lba * BLOCK as u64, &fill(lba, round)).expect("written");
            if mode == AnchorMode::Flush {
                allowed[lba as usize] = vec![round];
            } else {
                allowed[lba as usize].push(round);
            }
        }
        let gone = u64::from(round) * 30..u64::from(round) * 30 + 5;
        volume.discard(gone.start * BLOCK as u64, 5 * BLOCK as u64).expect("discarded");
        for lba in gone {
            if mode == AnchorMode::Flush {
                allowed[lba as usize] = vec![0];
            } else {
                allowed[lba as usize].push(0);
            }
        }
        volume.flush().expect("flushed");
    }
    drop(volume);
    let bytes = store.bytes();
    Scene { provider, store, bytes, allowed, snapshot }
}

impl Scene {
    /// Opens over `bytes`; every block that can be read must be one that is allowed. Says how it went.
    #[track_caller]
    fn judge(&self, bytes: Vec<u8>, what: &str) -> Outcome {
        self.store.set(bytes);
        let anchor = self.provider.anchor();
        let opened = self.provider.open_read_only(self.store.clone());
        let outcome = match opened {
            Err(error) => {
                assert!(error.is_integrity(), "{what}: {error}");
                Outcome::Refused(error)
            }
            Ok(volume) => self.read_all(&volume, what),
        };
        *lock(&self.provider.anchor) = anchor;
        outcome
    }

    /// The same for the snapshot, whose blocks may hold one thing only.
    #[track_caller]
    fn judge_snapshot(&self, bytes: Vec<u8>, what: &str) -> Outcome {
        self.store.set(bytes);
        let options = OpenOptions { snapshot: Some(self.snapshot), ..OpenOptions::default() };
        let opened = self.provider.open_with(self.store.clone(), &self.provider.grant(), options);
        let volume = match opened {
            Err(error) => {
                assert!(error.is_integrity(), "{what}: {error}");
                return Outcome::Refused(error);
            }
            Ok(volume) => volume,
        };
        let mut bad = 0;
        for lba in 0..SIZE / BLOCK as u64 {
            let mut found = vec![0xee; BLOCK];
            match volume.read(lba * BLOCK as u64, &mut found) {
                Ok(()) if lba % 2 == 0 => assert!(found == fill(lba, 1), "{what}: block {lba}"),
                Ok(()) => assert!(found == [0; BLOCK], "{what}: block {lba}"),
                Err(error) => {
                    assert!(error.is_integrity(), "{what}: {error}");
                    bad += 1;
                }
            }
        }
        if bad == 0 { Outcome::Whole } else { Outcome::Bad }
    }

    /// Reads each block alone, and then all together: what one of them is, is the same.
    fn read_all(&self, volume: &Volume, what: &str) -> Outcome {
        let mut alone = vec![vec![0xee; BLOCK]; self.allowed.len()];
        let at = |lba: usize| (lba * BLOCK) as u64;
        let each: Vec<_> = alone.iter_mut().enumerate().map(|(lba, found)| volume.read(at(lba), found)).collect();
        let mut together = vec![vec![0xee; BLOCK]; self.allowed.len()];
        let mut asked: Vec<(u64, &mut [u8])> =
            together.iter_mut().enumerate().map(|(lba, found)| (at(lba), found.as_mut_slice())).collect();
        let all = volume.read_many(&mut asked);
        for ((lba, one), many) in each.iter().enumerate().zip(&all) {
            let same = match (one, many) {
                (Ok(()), Ok(())) => true,
                (Err(VolumeError::Integrity { lba: one }), Err(VolumeError::Integrity { lba: many })) => {
                    (*one, *many) == (lba as u64, lba as u64)
                }
                (Err(one), Err(many)) => one.to_string() == many.to_string(),
                _ => false,
            };
            assert!(same && alone[lba] == together[lba], "{what}: block {lba}: {one:?}, with others {many:?}");
        }
        let mut bad = 0;
        for ((lba, allowed), (done, found)) in self.allowed.iter().enumerate().zip(all.into_iter().zip(together)) {
            match done {
                Ok(()) => {
                    let round = found[BLOCK - 1];
                    let right = if round == 0 { vec![0; BLOCK] } else { fill(lba as u64, round) };
                    assert!(found == right && allowed.contains(&round), "{what}: block {lba} holds {round}");
                }
                Err(error) => {
                    assert!(error.is_integrity(), "{what}: {error}");
                    assert!(found.iter().all(|b| *b == 0), "{what}: an error leaves no bytes");
                    bad += 1;
                }
            }
        }
        if bad == 0 { Outcome::Whole } else { Outcome::Bad }
    }
}

#[derive(Debug)]
enum Outcome {
    Refused(VolumeError),
    Bad,
    Whole,
}

#[test]
fn flipped_bits_are_errors() {
    for mode in [AnchorMode::Close, AnchorMode::Flush] {
        let scene = scene(mode);
        assert!(matches!(scene.judge(scene.bytes.clone(), "untouched"), Outcome::Whole));
        let mut random = Random(mode as u64);
        let used: Vec<usize> = (0..scene.bytes.len() / BLOCK)
            .filter(|b| scene.bytes[b * BLOCK..][..BLOCK].iter().any(|x| *x != 0))
            .collect();
        let (mut noticed, mut all) = (0, 0);
        for _ in 0..120 {
            let mut bytes = scene.bytes.clone();
            let block = used[random.below(used.len() as u64) as usize];
            let at = block * BLOCK + random.below(BLOCK as u64) as usize;
            bytes[at] ^= 1 << random.below(8);
            let outcome = scene.judge(bytes, &format!("{mode:?}: a bit of byte {at} (block {block})"));
            noticed += u32::from(!matches!(outcome, Outcome::Whole));
            all += 1;
        }
        // Some hit blocks that nothing refers to any more.
        assert!(noticed * 3 > all, "{noticed} of {all}");
    }
}

#[test]
fn a_snapshot_is_what_was_taken_or_an_error() {
    let scene = scene(AnchorMode::Close);
    assert!(matches!(scene.judge_snapshot(scene.bytes.clone(), "untouched"), Outcome::Whole));
    let mut random = Random(77);
    let used: Vec<usize> =
        (0..scene.bytes.len() / BLOCK).filter(|b| scene.bytes[b * BLOCK..][..BLOCK].iter().any(|x| *x != 0)).collect();
    let mut noticed = 0;
    for _ in 0..100 {
        let mut bytes = scene.bytes.clone();
        let mut pick = || used[random.below(used.len() as u64) as usize];
        let (a, b) = (pick(), pick());
        if random.chance(50) {
            bytes[a * BLOCK + random.below(BLOCK as u64) as usize] ^= 1 << random.below(8);
        } else {
            let other = bytes[b * BLOCK..][..BLOCK].to_vec();
            bytes[a * BLOCK..][..BLOCK].copy_from_slice(&other);
        }
        let outcome = scene.judge_snapshot(bytes, &format!("block {a}, perhaps from {b}"));
        noticed += u32::from(!matches!(outcome, Outcome::Whole));
    }
    assert!(noticed > 20, "{noticed}");
    let none = OpenOptions { snapshot: Some(99), ..OpenOptions::default() };
    scene.store.set(scene.bytes.clone());
    let refused = scene.provider.open_with(scene.store.clone(), &scene.provider.grant(), none).err();
    assert!(matches!(refused, Some(VolumeError::NoSnapshot(99))));
}

/// A volume that went back to its snapshot is newer than what it held before.
#[test]
fn what_a_revert_left_behind_does_not_open() {
    for mode in [AnchorMode::Flush, AnchorMode::Close] {
        let scene = scene(mode);
        scene.store.set(scene.bytes.clone());
        let volume = scene.provider.open(scene.store.clone()).expect("opens");
        let before = scene.store.bytes();
        volume.revert(scene.snapshot).expect("reverted");
        volume.close().expect("closed");
        drop(volume);
        let after = scene.store.bytes();
        scene.store.set(before);
        assert!(matches!(scene.provider.open(scene.store.clone()).err(), Some(VolumeError::RolledBack(_))));
        scene.store.set(after);
        let volume = scene.provider.open(scene.store.clone()).expect("opens");
        let mut found = vec![0; BLOCK];
        volume.read(0, &mut found).expect("read");
        assert!(found == fill(0, 1));
        crate::common::check_good(&volume);
    }
}

#[test]
fn swapped_and_zeroed_blocks_are_errors() {
    let scene = scene(AnchorMode::Flush);
    let mut random = Random(5);
    let blocks = (scene.bytes.len() / BLOCK) as u64;
    for _ in 0..80 {
        let mut bytes = scene.bytes.clone();
        let (a, b) = (random.below(blocks) as usize, random.below(blocks) as usize);
        if random.chance(30) {
            bytes[a * BLOCK..][..BLOCK].fill(0);
        } else {
            let (first, second) = (bytes[a * BLOCK..][..BLOCK].to_vec(), bytes[b * BLOCK..][..BLOCK].to_vec());
            bytes[a * BLOCK..][..BLOCK].copy_from_slice(&second);
            bytes[b * BLOCK..][..BLOCK].copy_from_slice(&first);
        }
        scene.judge(bytes, &format!("blocks {a} and {b}"));
    }
}

#[test]
fn blocks_of_another_volume_are_errors() {
    let (scene, other) = (scene(AnchorMode::Flush), scene(AnchorMode::Flush));
    let mut random = Random(6);
    for _ in 0..60 {
        let mut bytes = scene.bytes.clone();
        let at = random.below((bytes.len() / BLOCK) as u64) as usize * BLOCK;
        bytes[at..at + BLOCK].copy_from_slice(&other.bytes[at..at + BLOCK]);
        scene.judge(bytes, "a block of another volume");
    }
    let whole = scene.judge(other.bytes.clone(), "another volume");
    assert!(matches!(whole, Outcome::Refused(VolumeError::OtherVolume { .. })), "{whole:?}");
}

#[test]
fn a_truncated_volume_does_not_open() {
    let scene = scene(AnchorMode::Close);
    for keep in [0, 512, 4096, 8192, 12_288, scene.bytes.len() / 2, scene.bytes.len() - 1, scene.bytes.len() - 4096] {
        let outcome = scene.judge(scene.bytes[..keep].to_vec(), "truncated");
        assert!(matches!(outcome, Outcome::Refused(_)), "{keep}: {outcome:?}");
        if keep >= 12_288 {
            assert!(matches!(outcome, Outcome::Refused(VolumeError::Truncated { .. })), "{keep}: {outcome:?}");
        }
    }
}

#[test]
fn either_end_of_superblocks_may_be_lost() {
    let scene = scene(AnchorMode::Close);
    let end = scene.bytes.len();
    for damaged in [0..2 * BLOCK, end - 2 * BLOCK..end, 0..BLOCK, BLOCK..2 * BLOCK] {
        let mut bytes = scene.bytes.clone();
        bytes[damaged.clone()].fill(0x5a);
        assert!(matches!(scene.judge(bytes, "one end"), Outcome::Whole), "{damaged:?}");
    }
    let mut bytes = scene.bytes.clone();
    bytes[..2 * BLOCK].fill(0);
    bytes[end - 2 * BLOCK..].fill(0);
    assert!(matches!(scene.judge(bytes, "both ends"), Outcome::Refused(VolumeError::NotAVolume)));
}

#[test]
fn attack_34_the_store_chooses_no_cipher_and_no_key() {
    let scene = scene(AnchorMode::Close);
    let end = scene.bytes.len();
    let copies = [0, BLOCK, end - 2 * BLOCK, end - BLOCK];
    // The cipher suite: cipher, MAC, tag length, zero. None is not a cipher.
    for (at, value) in [(48, 0), (48, 2), (50, 0), (50, 2), (52, 0), (52, 16), (54, 1)] {
        let mut bytes = scene.bytes.clone();
        copies.iter().for_each(|copy| bytes[copy + at] = value);
        let outcome = scene.judge(bytes, "another cipher suite");
        assert!(matches!(outcome, Outcome::Refused(_)), "{at} {value}: {outcome:?}");
    }
    // A volume of the same name, whole in itself, under a key that the attacker made.
    let mut foreign = Provider::new(AnchorMode::Close);
    Arc::get_mut(&mut foreign).expect("nobody else's").volume = scene.provider.volume;
    foreign.set_kek(77, 0xee);
    let store = SimStore::new();
    let volume = foreign.create(store.clone(), SIZE).expect("a volume");
    volume.write(0, &fill(0, 9)).expect("written");
    volume.close().expect("closed");
    foreign.open_read_only(store.clone()).expect("it opens for him");
    let outcome = scene.judge(store.bytes(), "a foreign header");
    assert!(matches!(outcome, Outcome::Refused(_)), "{outcome:?}");
}

#[test]
fn an_older_volume_does_not_open() {
    let (provider, store) = (Provider::new(AnchorMode::Close), SimStore::new());
    provider.create(store.clone(), SIZE).expect("a volume").close().expect("closed");
    let mut copies = vec![store.bytes()];
    for round in 1..4 {
        let volume = provider.open(store.clone()).expect("opens");
        copies.push(store.bytes());
        volume.write(0, &fill(0, round)).expect("written");
        volume.flush().expect("flushed");
        volume.close().expect("closed");
        drop(volume);
        copies.push(store.bytes());
    }
    let newest = copies.pop().expect("some");
    for (i, copy) in copies.into_iter().enumerate() {
        store.set(copy);
        let refused = provider.open(store.clone()).err();
        let Some(VolumeError::RolledBack(_)) = &refused else { panic!("copy {i}: {refused:?}") };
        let text = refused.map(|e| e.to_string()).unwrap_or_default();
        assert!(text.contains("volume") && text.contains("anchor") && text.contains("older"), "{text}");
        // Another life's superblock in one slot does not help it.
        let mut mixed = newest.clone();
        let old = store.bytes();
        let end = old.len();
        mixed[..BLOCK].copy_from_slice(&old[..BLOCK]);
        mixed[end - 2 * BLOCK..end - BLOCK].copy_from_slice(&old[end - 2 * BLOCK..end - BLOCK]);
        store.set(mixed);
        if let Ok(volume) = provider.open_read_only(store.clone()) {
            let mut found = vec![0; BLOCK];
            volume.read(0, &mut found).expect("read");
            assert!(found == fill(0, 3));
        }
    }
    assert!(provider.heard().iter().any(|e| e.starts_with("integrity")));
    store.set(newest);
    provider.open(store).expect("the newest opens");
}

/// The log between an earlier copy of this life and now: what a store could serve.
#[test]
fn in_mode_flush_a_shorter_log_does_not_open() {
    let (provider, store) = (Provider::new(AnchorMode::Flush), SimStore::new());
    provider.create(store.clone(), SIZE).expect("a volume").close().expect("closed");
    let volume = provider.open(store.clone()).expect("opens");
    let mut copies = Vec::new();
    for round in 1..6 {
        volume.write(0, &fill(0, round)).expect("written");
        volume.flush().expect("flushed");
        copies.push(store.bytes());
    }
    drop(volume);
    let newest = copies.pop().expect("some");
    for copy in copies {
        store.set(copy);
        assert!(matches!(provider.open(store.clone()).err(), Some(VolumeError::RolledBack(_))));
    }
    // The log alone taken back, or its last block damaged.
    store.set(newest);
    let mut found = vec![0; BLOCK];
    provider.open_read_only(store.clone()).expect("opens").read(0, &mut found).expect("read");
    assert!(found == fill(0, 5));
}

#[test]
fn in_mode_close_a_shorter_log_is_a_state_since_the_anchor() {
    let (provider, store) = (Provider::new(AnchorMode::Close), SimStore::new());
    let volume = provider.create(store.clone(), SIZE).expect("a volume");
    volume.write(0, &fill(0, 9)).expect("written");
    volume.close().expect("closed");
    drop(volume);
    let volume = provider.open(store.clone()).expect("opens");
    let mut copies = vec![(9, store.bytes())];
    for round in 1..6 {
        volume.write(0, &fill(0, round)).expect("written");
        volume.flush().expect("flushed");
        copies.push((round, store.bytes()));
    }
    drop(volume);
    let newest = store.bytes();
    for (round, copy) in &copies {
        store.set(copy.clone());
        let volume = provider.open_read_only(store.clone()).expect("allowed in this mode, and said so");
        let mut found = vec![0; BLOCK];
        volume.read(0, &mut found).expect("read");
        assert!(found == fill(0, *round));
    }
    // The newest log over an older copy's data: mandatory records are errors, never older versions; optional ones may go.
    let log = 2 * BLOCK..66 * BLOCK;
    let mut mixed = copies[0].1.clone();
    mixed[log.clone()].copy_from_slice(&newest[log]);
    store.set(mixed);
    let volume = provider.open_read_only(store.clone()).expect("opens");
    let mut found = vec![0; BLOCK];
    let read = volume.read(0, &mut found);
    assert!(matches!(read, Err(VolumeError::Integrity { lba: 0 })), "{read:?} {}", found[BLOCK - 1]);
}

/// Zeroes mean "never written" in entries, pointers and records: where they are not the writer's, they are errors.
#[test]
fn nothing_can_be_made_to_read_as_never_written() {
    let scene = scene(AnchorMode::Flush);
    let blocks = |kind: fn(&[u8]) -> bool| -> Vec<usize> {
        (0..scene.bytes.len() / BLOCK).filter(|b| kind(&scene.bytes[b * BLOCK..][..BLOCK])).collect()
    };
    let leaves = blocks(|b| b[..4] == [1, 0, 0, 0] && b[48..64] == [0; 16]);
    let nodes = blocks(|b| b[..4] == [1, 1, 0, 0] && b[48..64] == [0; 16]);
    let logs = blocks(|b| b[0] == 4 && b[24..32] == [0; 8] && b[2] > 0 && b[3] == 0);
    let superblocks = blocks(|b| b.starts_with(b"fealty volume"));
    assert!(leaves.len() >= 4 && !nodes.is_empty() && logs.len() >= 6 && superblocks.len() == 4);
    let mut refused = [0; 4];
    let cases = [(0, leaves, 64, 56, 72), (1, nodes, 64, 48, 4), (2, logs, 64, 64, 40)];
    for (kind, blocks, start, size, count) in cases {
        for block in blocks {
            for i in [0, 1, 2, count / 2, count - 1] {
                let mut bytes = scene.bytes.clone();
                bytes[block * BLOCK + start + i * size..][..size].fill(0);
                let outcome = scene.judge(bytes, &format!("kind {kind}, block {block}, item {i} made zero"));
                refused[kind] += u32::from(!matches!(outcome, Outcome::Whole));
            }
        }
    }
    // The roots: of the map, of free space, of older keys; in every superblock at once.
    for root in [112, 160, 208] {
        let mut bytes = scene.bytes.clone();
        superblocks.iter().for_each(|block| bytes[block * BLOCK + root..][..48].fill(0));
        let outcome = scene.judge(bytes, &format!("a root at {root} made zero"));
        refused[3] += u32::from(matches!(outcome, Outcome::Refused(_)));
    }
    assert!(refused.iter().all(|r| *r > 0) && refused[3] >= 2, "{refused:?}");
}

#[test]
fn a_block_that_fails_can_be_written_anew_and_the_rest_goes_on() {
    let scene = scene(AnchorMode::Flush);
    let shown = inspect(&*scene.store).expect("readable");
    // Every block of the pool that is not metadata of this superblock: find one of data by trying.
    let pool = 66..(shown.store_size as usize / BLOCK) - 2;
    let mut tried = 0;
    for block in pool {
        let mut bytes = scene.bytes.clone();
        bytes[block * BLOCK + 100] ^= 1;
        scene.store.set(bytes);
        let anchor = scene.provider.anchor();
        let opened = scene.provider.open(scene.store.clone());
        if let Ok(volume) = &opened {
            let bad = (0..SIZE / BLOCK as u64).find(|lba| {
                let mut found = vec![0; BLOCK];
                matches!(volume.read(lba * BLOCK as u64, &mut found), Err(VolumeError::Integrity { .. }))
            });
            if let Some(lba) = bad {
                let mut found = vec![0; BLOCK];
                let partly = volume.write(lba * BLOCK as u64 + 512, &[1; 512]);
                assert!(matches!(partly, Err(VolumeError::Integrity { .. })), "the rest of the block is unknown");
                volume.write(lba * BLOCK as u64, &fill(lba, 77)).expect("written anew");
                volume.read(lba * BLOCK as u64, &mut found).expect("read");
                assert!(found == fill(lba, 77));
                assert!(scene.provider.heard().iter().any(|e| e.starts_with(&format!("integrity Some({lba})"))));
                volume.close().expect("closed");
                tried += 1;
            }
        }
        drop(opened);
        *lock(&scene.provider.anchor) = anchor;
        if tried == 3 {
            return;
        }
    }
    panic!("no block of data was found");
}

/// The block of the store that changed between two looks at it; the log apart.
fn changed(before: &[u8], after: &[u8]) -> usize {
    let differs = |b: &usize| before[b * BLOCK..][..BLOCK] != after[b * BLOCK..][..BLOCK];
    let log_end = 2 + (8 * MIB as usize / BLOCK) / 64;
    let all: Vec<usize> = (log_end..before.len() / BLOCK).filter(differs).collect();
    assert_eq!(all.len(), 1, "{all:?}");
    all[0]
}

/// A store that drops a block which the process had seen durable, and whose predecessor was overwritten since: gone is gone.
#[test]
fn a_block_whose_every_version_is_gone_is_an_error_and_takes_no_other_with_it() {
    let (provider, store) = (Provider::new(AnchorMode::Close), SimStore::new());
    let at = |lba: u64| lba * BLOCK as u64;
    let volume = provider.create(store.clone(), 8 * MIB).expect("a volume");
    // Several times, so that it lies where another block will go by itself.
    for _ in 0..5 {
        volume.write(at(5), &fill(5, 0)).expect("written");
    }
    let before = store.bytes();
    volume.write(at(5), &fill(5, 1)).expect("written");
    let old_place = changed(&before, &store.bytes());
    volume.close().expect("closed");
    drop(volume);

    let volume = provider.open(store.clone()).expect("opens");
    let before = store.bytes();
    volume.write(at(5), &fill(5, 2)).expect("written");
    let new_place = changed(&before, &store.bytes());
    volume.flush().expect("flushed: the old place is free now");
    // Other blocks follow until one takes the old place, and then until the log is written, without a FLUSH.
    let mut thief = None;
    for lba in (8..1600).step_by(2) {
        let before = store.bytes();
        volume.write(at(lba), &fill(lba, 3)).expect("written");
        if thief.is_none() && before[old_place * BLOCK..][..BLOCK] != store.bytes()[old_place * BLOCK..][..BLOCK] {
            thief = Some(lba);
        }
        if thief.is_some() {
            break;
        }
    }
    let thief = thief.expect("one took the old place");
    for i in 0..1100 {
        let lba = 1700 + i % 300;
        volume.write(at(lba), &fill(lba, 4)).expect("written");
    }
    drop(volume);
    let mut bytes = store.bytes();
    bytes[new_place * BLOCK..][..BLOCK].fill(0);
    store.set(bytes);

    let is_gone = |volume: &Volume| {
        let mut found = vec![0; BLOCK];
        matches!(volume.read(at(5), &mut found), Err(VolumeError::Integrity { lba: 5 }))
    };
    let volume = provider.open(store.clone()).expect("opens");
    assert!(is_gone(&volume));
    assert!(provider.heard().iter().any(|e| e.starts_with("integrity Some(5)")));
    volume.close().expect("closed");
    drop(volume);
    let volume = provider.open(store.clone()).expect("opens");
    assert!(is_gone(&volume), "also in the next life");
    let report = volume.check(&mut |_| {}).expect("checked");
    assert_eq!((report.bad_blocks, report.problems, report.leaked_blocks), (1, 0, 0));
    volume.write(at(5), &fill(5, 6)).expect("written anew");
    for lba in 500..700 {
        volume.write(at(lba), &fill(lba, 7)).expect("written");
        volume.flush().expect("flushed");
    }
    let mut found = vec![0; BLOCK];
    volume.read(at(5), &mut found).expect("read");
    assert!(found == fill(5, 6));
    volume.read(at(thief), &mut found).expect("read");
    assert!(found == fill(thief, if (500..700).contains(&thief) { 7 } else { 3 }));
    crate::common::check_good(&volume);
}

/// The store's blocks that look like the map's first leaf.
fn first_leaves(bytes: &[u8]) -> Vec<usize> {
    let is_leaf =
        |block: &[u8; BLOCK]| block[..4] == [1, 0, 0, 0] && block[8..16] == [0; 8] && block[48..64] == [0; 16];
    bytes.as_chunks().0.iter().enumerate().filter(|(_, block)| is_leaf(block)).map(|(at, _)| at).collect()
}

/// A page of a snapshot's map is gone, the one that goes or the newer one: what hangs from it stays in use, and nothing else suffers.
#[test]
fn a_snapshot_whose_map_is_damaged_is_deleted_all_the_same() {
    const BLOCKS: u64 = 300;
    for damaged in [1, 2] {
        let (provider, store) = (Provider::new(AnchorMode::Interval), SimStore::new());
        let volume = provider.create(store.clone(), 8 * MIB).expect("a volume");
        let mut leaves = Vec::new();
        for round in 1..4 {
            for lba in 0..BLOCKS {
                volume.write(lba * BLOCK as u64, &fill(lba, round)).expect("written");
            }
            let before = store.bytes();
            assert_eq!(volume.take_snapshot("one of three").expect("taken"), u64::from(round));
            let after = store.bytes();
            let new = |at: &usize| before[at * BLOCK..][..BLOCK] != after[at * BLOCK..][..BLOCK];
            leaves.push(first_leaves(&after).into_iter().find(new).expect("a leaf"));
        }
        volume.close().expect("closed");
        drop(volume);
        let mut bytes = store.bytes();
        bytes[leaves[damaged - 1] * BLOCK + 1000] ^= 1;
        store.set(bytes);

        let volume = provider.open(store.clone()).expect("opens");
        provider.heard();
        volume.delete_snapshot(1, &mut |_, _| {}).expect("deleted");
        let heard = provider.heard();
        let told = |what: &str| heard.iter().filter(|event| event.contains(what)).count();
        assert_eq!(
            (
                told("map page of blocks 0 to 71 does not verify"),
                told("1 damaged pages"),
                told("snapshot 1 is deleted")
            ),
            (1, 1, 1),
            "{heard:?}"
        );
        volume.delete_snapshot(2, &mut |_, _| {}).expect("deleted");
        volume.write(0, &fill(0, 9)).expect("written");
        volume.revert(3).expect("reverted");
        volume.delete_snapshot(3, &mut |_, _| {}).expect("deleted");
        let mut found = vec![0; BLOCK];
        for lba in 0..BLOCKS {
            volume.read(lba * BLOCK as u64, &mut found).expect("read");
            assert!(found == fill(lba, 3), "{lba}");
        }
        let mut said = Vec::new();
        let report = volume.check(&mut |step| said.push(format!("{step:?}"))).expect("checked");
        // A leaf and what it names, of each snapshot that had it or was compared with it.
        assert!(report.good(), "{report:?} {said:?}");
        assert_eq!(report.leaked_blocks, 73 * damaged as u64);
    }
}

/// Whatever the store changed of what the volume begins with, the audit log hears of it.
#[test]
fn damage_to_superblocks_is_told_of() {
    let scene = scene(AnchorMode::Flush);
    let end = scene.bytes.len();
    let copies = [0, BLOCK, end - 2 * BLOCK, end - BLOCK];
    let open = |changes: &[usize], at: usize| {
        let mut bytes = scene.bytes.clone();
        changes.iter().for_each(|copy| bytes[copy + at] ^= 8);
        scene.store.set(bytes);
        scene.provider.heard();
        let opened = scene.provider.open_read_only(scene.store.clone());
        let heard = scene.provider.heard();
        let told = heard.iter().filter(|event| event.starts_with("integrity")).count();
        (opened.err(), told)
    };
    assert!(matches!(open(&[], 0), (None, 0)));
    // A key slot in the superblock: key-encryption key, nonce, wrapped master, tag.
    for at in [8, 32, 44 + 5, 76] {
        let (error, told) = open(&copies, 384 + at);
        assert!(matches!(error, Some(VolumeError::Damaged(_))) && told == 1, "{at}: {error:?} {told}");
    }
    let (error, told) = open(&copies, 16);
    assert!(matches!(error, Some(VolumeError::Unsupported(_))) && told == 1, "{error:?} {told}");
    // Of each slot one copy: the one that counts is among them.
    for damaged in [[copies[0], copies[1]], [copies[2], copies[3]]] {
        for at in [0, 100, 384 + 50] {
            let (error, told) = open(&damaged, at);
            assert!(error.is_none() && told == 1, "{at}: {error:?} {told}");
        }
    }
}

/// What a check finds the audit log hears of, once.
#[test]
fn problems_that_a_check_finds_are_told_of() {
    let (provider, store) = (Provider::new(AnchorMode::Close), SimStore::new());
    let volume = provider.create(store.clone(), SIZE).expect("a volume");
    volume.write(0, &fill(0, 1)).expect("written");
    volume.close().expect("closed");
    drop(volume);
    let volume = provider.open_read_only(store.clone()).expect("opens");
    let good = store.bytes();
    let mut told = Vec::new();
    for at in [0, BLOCK] {
        let mut bytes = good.clone();
        bytes[at + 1000] ^= 1;
        store.set(bytes);
        provider.noticed();
        let report = volume.check(&mut |_| {}).expect("checked");
        let noticed = provider.noticed();
        assert_eq!(report.problems, noticed.len() as u64, "{noticed:?}");
        assert!(noticed.iter().all(|n| n.physical == Some((at / BLOCK) as u64)), "{noticed:?}");
        told.push(report.problems);
    }
    told.sort_unstable();
    assert_eq!(told, [0, 1], "one of the two slots counts");
}
