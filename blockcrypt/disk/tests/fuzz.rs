//! Every parser over a corpus of what real clients say, and mutations of it: no panic, and nothing is let through that can't be done.

use fealty_disk::fuzz::{fuzz_nbd_handshake, fuzz_nbd_requests, fuzz_vhost_user, fuzz_virtio_queue};
use std::path::Path;

/// A generator of numbers: xorshift64*.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) % bound.max(1) as u64) as usize
    }
}

fn corpus(kind: &str) -> Vec<Vec<u8>> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/corpus");
    let paths = std::fs::read_dir(folder).expect("the corpus").map(|f| f.expect("a file").path());
    let mut paths: Vec<_> =
        paths.filter(|p| p.file_name().is_some_and(|n| n.to_string_lossy().starts_with(kind))).collect();
    paths.sort();
    assert!(!paths.is_empty(), "{kind}");
    paths.iter().map(|path| std::fs::read(path).expect("read")).collect()
}

fn mutated(random: &mut Random, seed: &[u8]) -> Vec<u8> {
    let mut bytes = seed.to_vec();
    for _ in 0..1 + random.below(5) {
        let at = random.below(bytes.len());
        match random.below(6) {
            0 => bytes.truncate(at),
            1 => bytes.iter_mut().skip(at).take(4).for_each(|b| *b = 0xff),
            2 => bytes.iter_mut().skip(at).take(4).for_each(|b| *b = 0),
            3 => bytes.insert(at, random.below(256) as u8),
            4 => bytes.extend_from_within(at..(at + 64).min(bytes.len())),
            _ => bytes.iter_mut().skip(at).take(1).for_each(|b| *b ^= 1 << random.below(8)),
        }
    }
    bytes
}

fn run(kind: &str, target: fn(&[u8]), rounds: u64) {
    let corpus = corpus(kind);
    corpus.iter().for_each(|bytes| target(bytes));
    for length in [0, 1, 27, 28, 29, 4096, 70_000] {
        target(&vec![0; length]);
        target(&vec![0xff; length]);
    }
    let mut random = Random(rounds);
    for _ in 0..rounds {
        let seed = random.below(corpus.len());
        target(&mutated(&mut random, &corpus[seed]));
    }
}

#[test]
fn nbd_handshakes() {
    run("nbd-handshake", fuzz_nbd_handshake, 5_000);
}

#[test]
fn nbd_requests() {
    run("nbd-requests", fuzz_nbd_requests, 5_000);
}

#[test]
fn virtio_queues() {
    run("virtio-queue", fuzz_virtio_queue, 20_000);
}

/// The real server at the other end of a socket: it lives, serves the next, ends when it is asked to, and keeps nothing of whoever left.
#[test]
fn vhost_user_front_ends() {
    // What the corpus says is understood: a block is read, another is written.
    // The last begins as a front end does whose back end died with a request in hand: behind it (Cloud Hypervisor), and kicks no more.
    for (name, sector) in [("vhost-user-read", 8), ("vhost-user-write", 16), ("vhost-user-base", 8)] {
        let (memory, interrupts) = fuzz_vhost_user(&corpus(name)[0]);
        assert_eq!(
            (memory[0x1008], memory[0x302], memory[0x3000]),
            (sector, 1, 0),
            "{name}: one request is done, and well"
        );
        assert!(interrupts > 0, "{name}: the guest is told");
    }
    // Or died before it told of one that was done: it is not done again, and the guest hears of it.
    let (memory, interrupts) = fuzz_vhost_user(&corpus("vhost-user-untold")[0]);
    assert_eq!((memory[0x302], memory[0x3000]), (1, 0xff));
    assert!(interrupts > 0);
    let held = || {
        let count = |path| std::fs::read_dir(path).expect("procfs").count();
        let status = std::fs::read_to_string("/proc/self/status").expect("procfs");
        let field = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name)).expect(name);
            line.split_whitespace().next().and_then(|number| number.parse::<usize>().ok()).expect(name)
        };
        (count("/proc/self/fd"), count("/proc/self/task"), field("VmSize:"), field("VmRSS:"))
    };
    let before = held();
    run("vhost-user", |data| drop(fuzz_vhost_user(data)), 300);
    let after = held();
    println!("descriptors, threads, KiB mapped, KiB resident: {before:?}, then {after:?}");
    // Other tests run beside this one, in threads of the same process.
    assert!(after.0 < before.0 + 40 && after.1 < before.1 + 20, "{before:?} {after:?}");
    assert!(after.2 < before.2 + (4 << 20) && after.3 < before.3 + (256 << 10), "{before:?} {after:?}");
}
