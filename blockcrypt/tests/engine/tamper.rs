//! A store that lies: whatever it does, an error or a state that the anchor allows, never other data.

use crate::common::{Provider, Random, SimStore};
use crate::scene::{BLOCK, Outcome, SIZE, fill, scene};
use fealty_blockcrypt::{OpenOptions, VolumeError};
use policy::AnchorMode;
use std::sync::Arc;

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
