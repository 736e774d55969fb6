//! Every parser over its corpus, and over seeded mutations of it. `FEALTY_FUZZ_SECONDS` says how long the mutations of all
//! targets together take (2 by default).

use fealty_attest::fuzz::TARGETS;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

fn corpus(name: &str) -> Vec<Vec<u8>> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/corpus").join(name);
    let mut files: Vec<PathBuf> = fs::read_dir(&folder)
        .unwrap_or_else(|e| panic!("{}: {e}", folder.display()))
        .map(|entry| entry.expect("a file").path())
        .collect();
    files.sort();
    files.iter().map(|path| fs::read(path).expect("readable")).collect()
}

/// xorshift64*: the same mutations on each run.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn below(&mut self, limit: usize) -> usize {
        (self.next() % limit.max(1) as u64) as usize
    }
}

fn mutate(random: &mut Random, seeds: &[Vec<u8>]) -> Vec<u8> {
    const ODD: [u32; 8] = [0, 1, 0x7f, 0xff, 0xffff, 0x7fff_ffff, 0x8000_0000, u32::MAX];
    let mut data = seeds[random.below(seeds.len())].clone();
    for _ in 0..1 + random.below(4) {
        let at = random.below(data.len());
        match random.below(8) {
            0 => data.truncate(at),
            1 => data.insert(at.min(data.len()), random.next() as u8),
            2 if !data.is_empty() => drop(data.remove(at)),
            3 => {
                let other = &seeds[random.below(seeds.len())];
                data.truncate(at);
                data.extend_from_slice(&other[random.below(other.len()).min(other.len())..]);
            }
            4 if data.len() >= 4 => {
                let at = at.min(data.len() - 4);
                let odd = ODD[random.below(ODD.len())];
                let bytes = if random.next() & 1 == 0 { odd.to_le_bytes() } else { odd.to_be_bytes() };
                data[at..at + 4].copy_from_slice(&bytes);
            }
            5 => {
                let end = (at + random.below(64)).min(data.len());
                let part = data[at.min(end)..end].to_vec();
                data.splice(at.min(end)..at.min(end), part);
            }
            _ if !data.is_empty() => data[at] ^= 1 << random.below(8),
            _ => {}
        }
    }
    data
}

#[test]
fn no_parser_panics_on_its_corpus_or_on_mutations_of_it() {
    let seconds = std::env::var("FEALTY_FUZZ_SECONDS").ok().and_then(|s| s.parse().ok()).unwrap_or(2.0);
    let share = Duration::from_secs_f64(seconds) / TARGETS.len() as u32;
    for (name, target) in TARGETS {
        let seeds = corpus(name);
        assert!(!seeds.is_empty(), "{name} has no corpus");
        seeds.iter().for_each(|seed| target(seed));
        let mut random = Random(0x9e37_79b9_7f4a_7c15);
        let (start, mut runs) = (Instant::now(), 0_u32);
        // At least some, however slow the machine.
        while runs < 50 || start.elapsed() < share {
            target(&mutate(&mut random, &seeds));
            runs += 1;
        }
        println!("{name}: {runs} mutations of {} seeds", seeds.len());
    }
}
