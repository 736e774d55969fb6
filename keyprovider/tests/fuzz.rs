//! Every parser over a committed corpus and seeds' mutations: on stable, in seconds. Long runs are `cargo fuzz`'s.

use fealty_keyprovider::fuzz::{fuzz_bodies, fuzz_certificate, fuzz_tool};
use std::path::Path;
use std::time::{Duration, Instant};

/// A small generator (xorshift64*): the runs are the same everywhere but for their length.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) as usize % bound.max(1)
    }
}

fn corpus(name: &str) -> Vec<Vec<u8>> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/corpus").join(name);
    let mut paths: Vec<_> = std::fs::read_dir(folder).expect("a corpus").map(|e| e.expect("an entry").path()).collect();
    paths.sort();
    let seeds: Vec<_> = paths.iter().map(|p| std::fs::read(p).expect("a seed")).collect();
    assert!(!seeds.is_empty(), "{name} has no seeds");
    seeds
}

fn mutate(random: &mut Random, seed: &[u8], other: &[u8]) -> Vec<u8> {
    let mut data = seed.to_vec();
    for _ in 0..=random.below(4) {
        let at = random.below(data.len());
        match random.below(6) {
            0 if !data.is_empty() => data[at] ^= 1 << random.below(8),
            1 if !data.is_empty() => data[at] = random.below(256) as u8,
            2 => data.truncate(at),
            3 => data.insert(at, b"{}[]\",:0-\\\0\xff"[random.below(12)]),
            4 => data.splice(at..at, other.iter().copied().take(random.below(200))).for_each(drop),
            _ => {
                let end = (at + random.below(50)).min(data.len());
                data.drain(at..end);
            }
        }
    }
    data
}

fn run(name: &str, target: fn(&[u8])) {
    let seeds = corpus(name);
    seeds.iter().for_each(|seed| target(seed));
    target(b"");
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    let start = Instant::now();
    while start.elapsed() < Duration::from_millis(600) {
        let (seed, other) = (&seeds[random.below(seeds.len())], &seeds[random.below(seeds.len())]);
        target(&mutate(&mut random, seed, other));
    }
}

#[test]
fn bodies() {
    run("bodies", fuzz_bodies);
}

#[test]
fn tool() {
    run("tool", fuzz_tool);
}

#[test]
fn certificates() {
    run("certificate", fuzz_certificate);
}
