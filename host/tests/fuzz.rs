//! Every parser over its corpus, and over seeded mutations of it.

use fealty_host::fuzz;
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

/// A target: its name, which is that of its corpus folder, and its function.
type Target = (&'static str, fn(&[u8]));

const TARGETS: [Target; 3] = [("layer-arg", fuzz::layer_arg), ("state", fuzz::state), ("frames", fuzz::frames)];

fn corpus(name: &str) -> Vec<Vec<u8>> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/corpus").join(name);
    let entries = fs::read_dir(&folder).unwrap_or_else(|e| panic!("{}: {e}", folder.display()));
    let mut files: Vec<_> = entries.map(|entry| entry.expect("a file").path()).collect();
    files.sort();
    files.iter().map(|path| fs::read(path).expect("readable")).collect()
}

/// splitmix64: the same mutations on each run.
fn next(state: &mut u64) -> usize {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    (z ^ (z >> 31)) as usize
}

fn mutate(state: &mut u64, seeds: &[Vec<u8>]) -> Vec<u8> {
    let mut data = seeds[next(state) % seeds.len()].clone();
    for _ in 0..1 + next(state) % 4 {
        let at = next(state) % (data.len() + 1);
        match next(state) % 4 {
            0 => data.truncate(at),
            1 => data.insert(at, next(state) as u8),
            2 => data.extend_from_slice(&seeds[next(state) % seeds.len()]),
            _ if at < data.len() => data[at] ^= 1 << (next(state) % 8),
            _ => {}
        }
    }
    data
}

#[test]
fn no_parser_panics_on_its_corpus_or_on_mutations_of_it() {
    for (name, target) in TARGETS {
        let seeds = corpus(name);
        assert!(!seeds.is_empty(), "{name} has no corpus");
        seeds.iter().for_each(|seed| target(seed));
        let (start, mut state) = (Instant::now(), 1);
        while start.elapsed() < Duration::from_millis(300) {
            target(&mutate(&mut state, &seeds));
        }
    }
}
