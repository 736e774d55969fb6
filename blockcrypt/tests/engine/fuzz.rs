//! Every parser over a corpus of real blocks and mutations of them: no panic, and what parses comes back from its own bytes.

use crate::common::{Provider, Random, SimStore};
use fealty_blockcrypt::fuzz::{fuzz_inspect, fuzz_log_block, fuzz_page, fuzz_superblock};
use policy::AnchorMode;
use std::path::Path;

fn corpus() -> Vec<(String, Vec<u8>)> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/corpus");
    let files = std::fs::read_dir(folder).expect("the corpus").map(|f| f.expect("a file").path());
    let mut all: Vec<_> = files
        .map(|path| {
            (path.file_name().unwrap_or_default().to_string_lossy().into_owned(), std::fs::read(path).expect("read"))
        })
        .collect();
    all.push(("snapshots-new".to_owned(), page_of_snapshots()));
    all.sort();
    assert!(all.len() >= 6);
    all
}

/// A page as the engine writes it.
fn page_of_snapshots() -> Vec<u8> {
    let (provider, store) = (Provider::new(AnchorMode::Close), SimStore::new());
    let volume = provider.create(store.clone(), 1 << 20).expect("a volume");
    for name in ["one", "two", "three"] {
        volume.take_snapshot(name).expect("taken");
    }
    volume.close().expect("closed");
    let bytes = store.bytes();
    let page = bytes.chunks(4096).find(|b| b[..4] == [4, 0, 0, 0] && b[48..64] == [0; 16] && b[112] == 3);
    page.expect("three snapshots in a page").to_vec()
}

fn mutated(random: &mut Random, seed: &[u8], other: &[u8]) -> Vec<u8> {
    let mut bytes = seed.to_vec();
    for _ in 0..1 + random.below(4) {
        let length = bytes.len().max(1) as u64;
        // Headers and counts stand at the beginning: that is where most mutations go.
        let at = if random.chance(70) { random.below(length.min(512)) } else { random.below(length) } as usize;
        match random.below(6) {
            0 => bytes.truncate(at),
            1 => bytes.iter_mut().skip(at).take(8).for_each(|b| *b = 0xff),
            2 => bytes.iter_mut().skip(at).take(8).for_each(|b| *b = 0),
            3 => bytes.iter_mut().skip(at).zip(other.iter().skip(at)).take(64).for_each(|(b, o)| *b = *o),
            4 => bytes.iter_mut().skip(at).take(1).for_each(|b| *b = random.number() as u8),
            _ => bytes.iter_mut().skip(at).take(1).for_each(|b| *b ^= 1 << random.below(8)),
        }
    }
    bytes
}

fn run(target: fn(&[u8]), rounds: u64) {
    let corpus = corpus();
    corpus.iter().for_each(|(_, bytes)| target(bytes));
    for length in [0, 1, 511, 4095, 4097, 16384] {
        target(&vec![0; length]);
        target(&vec![0xff; length]);
    }
    let mut random = Random(rounds);
    for _ in 0..rounds {
        let (a, b) = (random.below(corpus.len() as u64), random.below(corpus.len() as u64));
        target(&mutated(&mut random, &corpus[a as usize].1, &corpus[b as usize].1));
    }
}

#[test]
fn superblocks() {
    run(fuzz_superblock, 4000);
}

#[test]
fn pages() {
    run(fuzz_page, 600);
}

#[test]
fn log_blocks() {
    run(fuzz_log_block, 2000);
}

#[test]
fn whole_stores() {
    run(fuzz_inspect, 2000);
}

/// The corpus is of real blocks: each kind is read as what it is.
#[test]
fn the_corpus_holds_one_of_each() {
    let names: Vec<String> = corpus().into_iter().map(|(name, _)| name).collect();
    for kind in ["bitmap", "leaf", "log", "node", "slots", "snapshots", "superblock"] {
        assert!(names.iter().any(|n| n.starts_with(kind)), "{kind}");
    }
}
