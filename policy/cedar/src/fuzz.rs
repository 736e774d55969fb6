//! Fuzz target: rules from an administrator.

use crate::{CedarPolicy, Question, Verdict};
use policy::document::KeyMemory;
use policy::encoding::Digest;
use policy::{HostId, Operation};
use std::collections::BTreeMap;

/// Parses `data` and, where it is accepted, asks it; checks that what is said is one line.
#[doc(hidden)]
pub fn fuzz_rules(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let said = match CedarPolicy::parse(text) {
        Err(error) => error.to_string(),
        Ok(policy) => match ask(&policy) {
            Some(Verdict::Refuse { reason }) => reason,
            _ => return,
        },
    };
    assert!(!said.contains('\n') && said.len() < 2000, "{said}");
}

fn ask(policy: &CedarPolicy) -> Option<Verdict> {
    let question = Question {
        host: HostId(Digest([1; 32])),
        lab: true,
        cloud: "north".parse().ok()?,
        customer: "acme".parse().ok()?,
        vm: "payroll".parse().ok()?,
        operation: Operation::PowerOn,
        instance: None,
        time_unix_s: 1_700_000_000,
        key_memory: KeyMemory::MemfdSecret,
        ptrace_scope: Some(3),
        parameters: &BTreeMap::new(),
        operations_last_hour: 0,
    };
    Some(policy.decide(&question))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::{Duration, Instant};

    /// A small xorshift generator: the same mutations each time.
    struct Mutations(u64);

    impl Mutations {
        fn below(&mut self, n: usize) -> usize {
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            (self.0 % n as u64) as usize
        }

        fn of(&mut self, seeds: &[Vec<u8>]) -> Vec<u8> {
            let mut data = seeds[self.below(seeds.len())].clone();
            for _ in 0..1 + self.below(4) {
                let other = &seeds[self.below(seeds.len())];
                let (at, from) = (self.below(data.len() + 1), self.below(other.len() + 1));
                let count = self.below(40);
                match self.below(3) {
                    0 if at < data.len() => data[at] = self.below(256) as u8,
                    1 => drop(data.drain(at..(at + count).min(data.len()))),
                    _ => drop(data.splice(at..at, other[from..(from + count).min(other.len())].iter().copied())),
                }
            }
            data
        }
    }

    #[test]
    fn rules_from_anywhere_neither_panic_nor_hang() {
        let corpus = concat!(env!("CARGO_MANIFEST_DIR"), "/corpus");
        let mut files: Vec<_> = std::fs::read_dir(corpus).expect("corpus").map(|f| f.expect("file").path()).collect();
        files.sort();
        let seeds: Vec<Vec<u8>> = files.iter().map(|f| std::fs::read(f).expect("readable")).collect();
        assert!(!seeds.is_empty());
        seeds.iter().for_each(|seed| fuzz_rules(seed));
        let (mut mutations, end) = (Mutations(0x5eed), Instant::now() + Duration::from_secs(1));
        while Instant::now() < end {
            fuzz_rules(&mutations.of(&seeds));
        }
    }
}
