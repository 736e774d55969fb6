//! Damaged pages of the free-space map: nothing that a volume holds needs them, and what it writes does.

use crate::common::{Provider, Random, check_good, lock};
use fealty_blockcrypt::{CheckStep, MemoryStore, Store, Volume, VolumeError};
use policy::AnchorMode;
use std::sync::Arc;

/// A volume whose bitmap has two pages: the second describes what lies behind its first 126 MiB.
const SIZE: u64 = 160 << 20;
const BLOCK: u64 = 4096;
/// Blocks with data, which lies where the first page of the bitmap says, and where the second.
const NEAR: std::ops::Range<u64> = 0..100;
const FAR: std::ops::Range<u64> = 36_000..36_100;
/// Blocks of the leaves of the map that hold the latter.
const OF_FAR_LEAVES: u64 = 2 * 72;

fn content(lba: u64) -> Vec<u8> {
    let mut block = vec![0; BLOCK as usize];
    Random(lba).fill(&mut block);
    block
}

fn made() -> (Arc<Provider>, Arc<MemoryStore>) {
    let (provider, store) = (Provider::new(AnchorMode::Close), Arc::new(MemoryStore::default()));
    let volume = provider.create(store.clone(), SIZE).expect("a volume");
    for lba in NEAR.chain(FAR) {
        volume.write(lba * BLOCK, &content(lba)).expect("written");
    }
    volume.close().expect("closed");
    (provider, store)
}

/// Spoils the newest version of a page of the bitmap, or makes it good again.
fn flip(store: &MemoryStore, index: u64) {
    let bytes = store.bytes();
    let pages = bytes.as_chunks::<4096>().0.iter().zip(0..);
    let pages = pages
        .filter(|(page, _)| page[..4] == [2, 0, 0, 0] && page[8..16] == index.to_le_bytes() && page[48..64] == [0; 16]);
    let birth = |page: &[u8; 4096]| page[16..24].try_into().map(u64::from_le_bytes).expect("eight bytes");
    let (page, at) = pages.max_by_key(|(page, _)| birth(page)).expect("there is one");
    let mut page = *page;
    page[4000] ^= 1;
    store.write_at(&page, at * BLOCK).expect("written");
}

#[track_caller]
fn holds(volume: &Volume) {
    for lba in NEAR.chain(FAR) {
        let mut found = vec![0; BLOCK as usize];
        volume.read(lba * BLOCK, &mut found).expect("read");
        assert!(found == content(lba), "{lba}");
    }
}

/// What it says is free can't be told: what lies there stays where it is, under the key that it has. All else is sealed anew.
#[test]
fn a_rotation_passes_over_damaged_pages_of_the_bitmap() {
    let (provider, store) = made();
    flip(&store, 1);
    *lock(&provider.key_id) = 9;
    let volume = provider.open(store.clone()).expect("opens");
    provider.heard();
    for _ in 0..2 {
        assert!(volume.rotate(&mut |_, _| true).expect("rotated"));
        let info = volume.info();
        assert_eq!((info.not_renewed, info.blocks_written, info.older_keys), (OF_FAR_LEAVES, NEAR.end, 1));
        let heard = provider.heard();
        assert!(heard.iter().any(|event| event.contains("a page of the free-space map does not verify")), "{heard:?}");
    }
    holds(&volume);
    // It goes on, but for what would change that page.
    for done in [
        volume.write(FAR.start * BLOCK, &[1; 4096]),
        volume.write((FAR.start - 1) * BLOCK, &[1; 4096]),
        volume.discard(FAR.start * BLOCK, BLOCK),
    ] {
        assert!(matches!(done, Err(VolumeError::Damaged(_))), "{done:?}");
    }
    volume.write(0, &content(0)).expect("written");
    volume.flush().expect("flushed");
    let mut said = Vec::new();
    let report = volume.check(&mut |step| {
        if let CheckStep::Problem(text) = step {
            said.push(text);
        }
    });
    let report = report.expect("a whole check");
    assert_eq!((report.problems, report.bad_blocks, report.leaked_blocks), (1, 0, 0), "{report:?} {said:?}");
    assert!(said[0].contains("the page of the free-space map"), "{said:?}");
    volume.close().expect("closed");
    drop(volume);
    let volume = provider.open(store.clone()).expect("opens");
    holds(&volume);
    volume.close().expect("closed");
    drop(volume);

    flip(&store, 1);
    let volume = provider.open(store).expect("opens");
    assert!(volume.rotate(&mut |_, _| true).expect("rotated"));
    let info = volume.info();
    assert_eq!((info.not_renewed, info.blocks_written, info.older_keys), (0, NEAR.end + 1 + FAR.end - FAR.start, 0));
    holds(&volume);
    check_good(&volume);
}

/// Where no page of a checkpoint finds a place, no writer opens it, and nothing is lost: all of it can be read, and again after each try.
#[test]
fn without_the_first_page_of_the_bitmap_a_volume_is_read_only() {
    let (provider, store) = made();
    flip(&store, 0);
    for key in [1, 9] {
        *lock(&provider.key_id) = key;
        let refused = provider.open(store.clone()).err();
        assert!(matches!(refused, Some(VolumeError::Damaged(_))), "{refused:?}");
        holds(&provider.open_read_only(store.clone()).expect("opens"));
    }
    flip(&store, 0);
    let volume = provider.open(store).expect("opens");
    assert!(volume.rotate(&mut |_, _| true).expect("rotated"));
    assert_eq!((volume.info().not_renewed, volume.info().older_keys), (0, 0));
    holds(&volume);
    check_good(&volume);
}
