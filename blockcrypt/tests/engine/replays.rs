//! Every old version of every block of a store, shown again alone; old superblocks, logs, pages and whole volumes of every moment;
//! every pair of blocks swapped; every length. Before the volume is opened, and while it is open.

use crate::common::{Noticed, Provider, lock};
use crate::hostile::{BLOCK, HostileStore, Kind};
use fealty_blockcrypt::{AnchorRefused, Volume, VolumeError};
use policy::AnchorMode;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

/// Blocks that hold something, each in a page of the map of its own: as many pages as an entry of 56 bytes leaves.
const BLOCKS: u64 = 40;
const APART: u64 = 72 * BLOCK as u64;
const MODES: [AnchorMode; 3] = [AnchorMode::Close, AnchorMode::Interval, AnchorMode::Flush];

/// A volume that was closed once, and then lost its holder.
struct Scene {
    provider: Arc<Provider>,
    store: Arc<HostileStore>,
    /// What an honest store leads to.
    newest: Vec<u8>,
    /// And what else may be seen of each block after it is opened again: what it held since the anchor.
    allowed: Vec<BTreeSet<u8>>,
    /// How much had been written when what the anchor names began to be, and when the anchor was kept.
    anchored: [u64; 2],
}

fn fill(lba: u64, round: u8) -> Vec<u8> {
    let mut block = vec![round; BLOCK];
    if round > 0 {
        block[..8].copy_from_slice(&lba.to_le_bytes());
    }
    block
}

/// Two lives: one that fills all and is closed, one with FLUSHes, a snapshot, a checkpoint and discards, whose holder dies. Each
/// FLUSH is anchored in mode `flush`, none in the others: no second passes.
fn scene(mode: AnchorMode) -> Scene {
    let (provider, store) = (Provider::new(mode), HostileStore::new());
    let volume = provider.create(store.clone(), BLOCKS * APART).expect("a volume");
    let (mut newest, mut allowed) = (vec![1; BLOCKS as usize], Vec::new());
    for lba in 0..BLOCKS {
        volume.write(lba * APART, &fill(lba, 1)).expect("written");
        allowed.push(BTreeSet::from([1]));
    }
    volume.flush().expect("flushed");
    volume.close().expect("closed");
    drop(volume);
    let before = store.time();
    let volume = provider.open(store.clone()).expect("opens");
    let mut anchored = [before, store.time()];
    provider.keep_none(mode == AnchorMode::Interval);
    // As many as go twice round the log, whose 64 blocks take one FLUSH each.
    for round in 2..110 {
        for lba in [u64::from(round) * 7, u64::from(round) * 11 + 1].map(|lba| lba % BLOCKS) {
            volume.write(lba * APART, &fill(lba, round)).expect("written");
            newest[lba as usize] = round;
            allowed[lba as usize].insert(round);
        }
        match round % 32 {
            4 => {
                let lba = u64::from(round) % BLOCKS;
                volume.discard(lba * APART, BLOCK as u64).expect("discarded");
                newest[lba as usize] = 0;
                allowed[lba as usize].insert(0);
            }
            12 => volume.checkpoint().expect("written"),
            20 if round == 20 => drop(volume.take_snapshot("one").expect("taken")),
            _ => {}
        }
        let before = store.time();
        volume.flush().expect("flushed");
        if mode == AnchorMode::Flush {
            anchored = [before, store.time()];
            allowed = newest.iter().map(|newest| BTreeSet::from([*newest])).collect();
        }
    }
    provider.keep_none(false);
    drop(volume);
    Scene { provider, store, newest, allowed, anchored }
}

/// How a look at the whole volume went.
#[derive(Default)]
struct Seen {
    bad: Vec<u64>,
    /// Those that can't be found: the error is no block's own.
    damaged: Vec<u64>,
    older: u64,
}

impl Scene {
    fn open(&self) -> Result<Volume, VolumeError> {
        self.provider.noticed();
        self.provider.open_read_only(self.store.clone())
    }

    /// Reads all; what can be read is one of `allowed`.
    #[track_caller]
    fn read(&self, volume: &Volume, allowed: impl Fn(usize, u8) -> bool, what: &dyn std::fmt::Display) -> Seen {
        let mut seen = Seen::default();
        for lba in 0..BLOCKS {
            let mut found = vec![0xee; BLOCK];
            match volume.read(lba * APART, &mut found) {
                Ok(()) => {
                    let round = found[BLOCK - 1];
                    assert!(found == fill(lba, round) && allowed(lba as usize, round), "{what}: {lba} holds {round}");
                    seen.older += u64::from(round != self.newest[lba as usize]);
                }
                Err(VolumeError::Integrity { lba: named }) => {
                    assert!(named == lba * APART / BLOCK as u64 && found.iter().all(|b| *b == 0), "{what}: {lba}");
                    seen.bad.push(named);
                }
                Err(error) => {
                    assert!(error.is_integrity() && found.iter().all(|b| *b == 0), "{what}: {lba}: {error}");
                    seen.damaged.push(lba * APART / BLOCK as u64);
                }
            }
        }
        seen
    }

    /// Opens what is shown, and reads it: nothing older than the anchor. An error is told of.
    #[track_caller]
    fn judge(&self, what: &dyn std::fmt::Display) -> Result<Seen, VolumeError> {
        match self.open() {
            Ok(volume) => {
                let seen = self.read(&volume, |lba, round| self.allowed[lba].contains(&round), what);
                let noticed = self.provider.noticed();
                for lba in &seen.bad {
                    assert!(noticed.iter().any(|event| event.lba == Some(*lba)), "{what}: {lba}: {noticed:?}");
                }
                assert!(seen.damaged.is_empty() || noticed.iter().any(|event| event.physical.is_some()), "{what}");
                Ok(seen)
            }
            Err(error) => {
                let told = Noticed { lba: None, physical: None, reason: error.to_string() };
                assert!(error.is_integrity() && self.provider.noticed().contains(&told), "{what}: {error}");
                Err(error)
            }
        }
    }
}

#[test]
fn untouched_scenes_are_what_was_written() {
    for mode in MODES {
        let scene = scene(mode);
        let seen = scene.judge(&"untouched").expect("opens");
        assert!(seen.bad.is_empty() && seen.damaged.is_empty() && seen.older == 0, "{mode:?}");
        let several = scene.allowed.iter().any(|allowed| allowed.len() > 1);
        assert_eq!(several, mode != AnchorMode::Flush, "{mode:?}");
    }
}

#[test]
fn each_old_block_is_refused_or_younger_than_the_anchor() {
    for mode in MODES {
        let scene = scene(mode);
        let mut outcomes: BTreeMap<Kind, [u64; 4]> = BTreeMap::new();
        for (at, old) in scene.store.older() {
            scene.store.honest();
            scene.store.show(at, &old);
            let outcome = match scene.judge(&format_args!("{mode:?}: an old version of block {at}")) {
                Err(_) => 0,
                Ok(seen) if !seen.bad.is_empty() || !seen.damaged.is_empty() => 1,
                Ok(seen) if seen.older > 0 => 2,
                Ok(_) => 3,
            };
            outcomes.entry(Kind::of(&scene.store.blocks()[&at])).or_default()[outcome] += 1;
        }
        println!("{mode:?}: refused, bad blocks, older, as if nothing had been: {outcomes:?}");
        // A log that is cut short is no older than the anchor, but in mode `flush`; and of superblocks there are two copies.
        let [refused, _, older, _] = outcomes[&Kind::Log];
        assert_eq!((refused > 0, older > 0), (mode == AnchorMode::Flush, mode != AnchorMode::Flush), "{mode:?}");
        assert!(outcomes[&Kind::Data][1] > 20 && outcomes[&Kind::Page][0] + outcomes[&Kind::Page][1] > 2, "{mode:?}");
        assert!(outcomes[&Kind::Superblock][3] > 4, "{mode:?}");
    }
}

/// With the map in memory and without, each error names the block that was replaced, and no other request suffers.
#[test]
fn each_old_block_under_an_open_volume_is_an_error_that_names_it() {
    let (mut data, mut pages, mut kept) = (0, 0, 0);
    let scene = scene(AnchorMode::Flush);
    for (at, old) in scene.store.older() {
        for warm in [false, true] {
            scene.store.honest();
            let volume = scene.open().expect("an honest store");
            let newest = |lba: usize, round| scene.newest[lba] == round;
            if warm {
                scene.read(&volume, newest, &"honest");
            }
            scene.provider.noticed();
            scene.store.show(at, &old);
            let what = format!("warm: {warm}: an old version of block {at}");
            let seen = scene.read(&volume, newest, &what);
            let one = |lba, reason| Noticed { lba: Some(lba), physical: Some(at), reason };
            let data_is_bad = |lba: &u64| one(*lba, "its tag does not verify".to_owned());
            let page_is_bad =
                |lba: &u64| one(*lba, format!("the map page of blocks {lba} to {} does not verify", lba + 71));
            let expected: Vec<Noticed> =
                seen.bad.iter().map(data_is_bad).chain(seen.damaged.iter().map(page_is_bad)).collect();
            assert_eq!(scene.provider.noticed(), expected, "{what}");
            assert!(seen.bad.len() <= 1 && (seen.damaged.is_empty() || !warm), "{what}");
            data += seen.bad.len();
            pages += u64::from(!seen.damaged.is_empty());
            kept += u64::from(seen.bad.is_empty() && seen.damaged.is_empty());
        }
    }
    println!("{data} blocks and {pages} pages were noticed, {kept} did not matter");
    assert!(data > 60 && pages > 60);
}

#[test]
fn no_moment_before_the_anchor_comes_back_whole_or_in_parts() {
    let parts: [&[Kind]; 6] = [
        &Kind::ALL,
        &[Kind::Superblock],
        &[Kind::Log],
        &[Kind::Page],
        &[Kind::Superblock, Kind::Log],
        &[Kind::Superblock, Kind::Log, Kind::Page],
    ];
    for mode in MODES {
        let scene = scene(mode);
        let end = scene.store.time();
        let mut opened = vec![0; parts.len()];
        for (part, kinds) in parts.iter().enumerate() {
            for time in (0..=end).rev().step_by(if part == 0 { 1 } else { 7 }) {
                scene.store.honest();
                scene.store.show_as_of(time, kinds);
                let what = format!("{mode:?}: {kinds:?} as of {time}, the anchor is of {:?}", scene.anchored);
                let judged = scene.judge(&what);
                opened[part] += u64::from(judged.is_ok());
                if part == 0 && time <= scene.anchored[0] {
                    assert!(
                        matches!(judged, Err(VolumeError::RolledBack(_) | VolumeError::NotAVolume)),
                        "{what}: {:?}",
                        judged.err()
                    );
                }
                if part == 0 && time >= scene.anchored[1] {
                    let seen = judged.unwrap_or_else(|e| panic!("{what}: {e}"));
                    assert!(seen.bad.is_empty() && seen.damaged.is_empty(), "{what}");
                }
            }
        }
        println!("{mode:?}: of {end} moments these open, of the parts every seventh: {opened:?}");
        assert!(opened[0] < end && opened.iter().all(|count| *count > 0), "{opened:?}");
    }
}

/// Of each slot any version, and of its other copy the same.
#[test]
fn old_superblocks_of_one_slot_or_both_do_not_bring_back_what_is_older_than_the_anchor() {
    for mode in MODES {
        let scene = scene(mode);
        let blocks = scene.store.blocks();
        let places: Vec<u64> =
            blocks.iter().filter(|(_, b)| Kind::of(b) == Kind::Superblock).map(|(at, _)| *at).collect();
        let [a, b, a_copy, b_copy] = places[..] else { panic!("{places:?}") };
        let versions = |slot: u64| {
            let old = scene.store.older().into_iter().filter(|(at, _)| *at == slot).map(|(_, block)| block);
            old.chain([blocks[&slot].clone()]).collect::<Vec<_>>()
        };
        let (mut opened, mut all) = (0, 0);
        for (i, first) in versions(a).iter().enumerate() {
            for (k, second) in versions(b).iter().enumerate() {
                scene.store.honest();
                for (at, block) in [(a, first), (a_copy, first), (b, second), (b_copy, second)] {
                    scene.store.show(at, block);
                }
                let judged = scene.judge(&format_args!("{mode:?}: superblock {i} in slot A, {k} in slot B"));
                opened += u64::from(judged.is_ok());
                all += 1;
            }
        }
        println!("{mode:?}: {opened} of {all} pairs open");
        assert!(opened >= 1 && opened < all, "{opened} of {all}");
    }
}

/// Two openers whose anchors nobody kept, the second of whom saw the first's superblock; then one who sees neither. What the second left
/// has a higher epoch than what the third writes, and must count for nothing all the same.
#[test]
fn what_an_opener_left_who_got_no_anchor_does_not_come_back() {
    let scene = scene(AnchorMode::Flush);
    let (provider, store) = (&scene.provider, &scene.store);
    let (blocks, before) = (store.blocks(), store.time());
    let is_superblock = |(_, block): &(&u64, &Arc<[u8; BLOCK]>)| Kind::of(block) == Kind::Superblock;
    let places: Vec<u64> = blocks.iter().filter(is_superblock).map(|(at, _)| *at).collect();
    let refused = || {
        *lock(&provider.refuse) = Some(AnchorRefused::Refused("somebody else has it".to_owned()));
        assert!(matches!(provider.open(store.clone()).err(), Some(VolumeError::Anchor(_))));
        *lock(&provider.refuse) = None;
    };
    refused();
    refused();
    let theirs = store.blocks();
    store.show_as_of(before, &[Kind::Superblock]);
    let volume = provider.open(store.clone()).expect("opens");
    volume.write(0, &fill(0, 200)).expect("written");
    volume.flush().expect("flushed and anchored");
    drop(volume);
    store.honest();
    let ours = store.blocks();
    let changed: Vec<u64> = places.iter().filter(|at| theirs[*at] != ours[*at]).copied().collect();
    assert_eq!(changed.len(), 2, "one slot");
    changed.iter().for_each(|at| store.show(*at, &theirs[at]));
    let opened = scene.open();
    assert!(matches!(opened, Err(VolumeError::RolledBack(_))), "{:?}", opened.err());
    store.honest();
    let mut found = vec![0; BLOCK];
    scene.open().expect("opens").read(0, &mut found).expect("read");
    assert!(found == fill(0, 200));
}

/// Whole records, each with the tag of data that is there again, in place of those of the newest log.
#[test]
fn records_of_an_older_log_count_for_nothing_in_a_newer_one() {
    let scene = scene(AnchorMode::Close);
    let logs = |blocks: Vec<Arc<[u8; BLOCK]>>| blocks.into_iter().filter(|block| Kind::of(block) == Kind::Log);
    let old = scene.store.older().into_iter().map(|(_, block)| block).collect();
    let records: BTreeSet<Vec<u8>> =
        logs(old).flat_map(|block| block[64..].chunks(64).map(<[u8]>::to_vec).collect::<Vec<_>>()).collect();
    let mut newest: Vec<(u64, Arc<[u8; BLOCK]>)> =
        scene.store.blocks().into_iter().filter(|(_, block)| Kind::of(block) == Kind::Log).collect();
    newest.sort_by_key(|(_, block)| block[8..16].try_into().map(u64::from_le_bytes).expect("a sequence number"));
    let (mut refused, mut tried) = (0, 0);
    for (at, block) in newest.iter().rev().take(2) {
        for record in &records {
            // What the first life wrote lies where its records say.
            scene.store.honest();
            scene.store.show_as_of(scene.anchored[0], &[Kind::Data]);
            let mut forged = **block;
            forged[64..128].copy_from_slice(record);
            scene.store.show(*at, &Arc::new(forged));
            let judged = scene.judge(&format_args!("a record of an older log in block {at}"));
            refused += u64::from(judged.is_err());
            tried += 1;
        }
    }
    assert!(tried > 100 && refused == 0, "the log ends there, and that is all: {refused} of {tried}");
}

#[test]
fn swapped_blocks_and_pages_are_errors_or_nothing() {
    for mode in [AnchorMode::Close, AnchorMode::Flush] {
        let scene = scene(mode);
        let blocks = scene.store.blocks();
        let of = |kind| blocks.iter().filter(move |(_, block)| Kind::of(block) == kind).map(|(at, _)| *at).collect();
        let (pages, data, logs): (Vec<u64>, Vec<u64>, Vec<u64>) = (of(Kind::Page), of(Kind::Data), of(Kind::Log));
        let mut pairs = Vec::new();
        for kind in [&pages, &logs] {
            let all: Vec<_> =
                kind.iter().flat_map(|a| kind.iter().filter(move |b| a < b).map(move |b| (*a, *b))).collect();
            pairs.extend(all.iter().step_by(all.len().div_ceil(200)));
        }
        pairs.extend(data.iter().zip(data.iter().skip(1)).map(|(a, b)| (*a, *b)));
        pairs.extend(data.iter().zip(data.iter().rev()).map(|(a, b)| (*a, *b)));
        pairs.extend(pages.iter().zip(&data).map(|(a, b)| (*a, *b)));
        let (mut noticed, mut under) = (0, 0);
        for (a, b) in &pairs {
            scene.store.honest();
            let volume = scene.open().expect("an honest store");
            let swap = || {
                scene.store.show(*a, &blocks[b]);
                scene.store.show(*b, &blocks[a]);
            };
            swap();
            let what = format!("{mode:?}: blocks {a} and {b} swapped");
            let seen = scene.read(&volume, |lba, round| scene.newest[lba] == round, &what);
            under += u64::from(!seen.bad.is_empty() || !seen.damaged.is_empty());
            drop(volume);
            let judged = scene.judge(&what);
            noticed +=
                u64::from(judged.is_err() || judged.is_ok_and(|seen| !seen.bad.is_empty() || !seen.damaged.is_empty()));
        }
        println!("{mode:?}: of {} pairs {noticed} were noticed, {under} under an open volume", pairs.len());
        assert!(noticed > 40 && under > 40);
    }
}

#[test]
fn a_store_of_any_shorter_length_does_not_open() {
    let scene = scene(AnchorMode::Close);
    let length = fealty_blockcrypt::Store::len(&*scene.store).expect("a length");
    for blocks in 0..length / BLOCK as u64 {
        for rest in [0, 511, 4095] {
            scene.store.honest();
            scene.store.cut(blocks * BLOCK as u64 + rest);
            let refused = scene.judge(&"cut").err();
            let right = match refused {
                Some(VolumeError::NotAVolume) => blocks < 1,
                Some(VolumeError::Truncated { found, expected }) => {
                    found == blocks * BLOCK as u64 + rest && expected == length
                }
                // The slot that counts is the second.
                Some(VolumeError::RolledBack(_)) => blocks < 2,
                _ => false,
            };
            assert!(right, "{blocks} blocks and {rest}");
        }
    }
}
