//! `bench served`: the volume over NBD, against QEMU's LUKS and raw, nbdkit's LUKS filter, and our own server over a plain file.
//!
//! One client, fio, does the same work with each server in turn, on files in memory. What counts is the processor time of the
//! server for a request: a client or a machine that is busy disturbs it less than a rate.
//!
//! The volume is measured twice: with every block of it mapped, so that what is replaced goes to single free blocks, and, as most
//! volumes are, with half of them.
//!
//! Requests of 4 KiB at depth 32 are measured twice as well: on processors that sleep whenever nobody asks for anything, and on
//! processors that something else uses meanwhile. On the first a client's requests come one by one to a server that has just woken up
//! on another processor, whose caches hold none of them, and both count as the server's time; on the second they come in batches.

mod awake;
mod server;

use super::BenchError;
use super::printer::Printer;
use awake::Awake;
use blockcrypt::bench::Ciphers;
use fealty_disk::bench::{Figure, MeasureError, Samples, thread_time};
use server::Server;
use std::path::{Path, PathBuf};
use std::process::Command;

pub(super) use server::serve_plain;

/// Bytes that are written and read.
const SIZE: u64 = 256 << 20;
const BLOCK: u64 = 4 << 10;
/// Rounds before those that count.
const WARM_UP: u32 = 1;
/// Our processor time for a request by QEMU's LUKS', or by our own server's without ciphers: a fourth of the first, or a fourth more
/// than the second where that is more.
const BY_LUKS: f64 = 0.25;
const BY_PLAIN: f64 = 1.25;

/// What a client does.
struct Work {
    name: &'static str,
    rw: &'static str,
    bytes: u64,
    depth: u32,
    requests: u64,
    /// A FLUSH after so many writes; none if 0.
    flush_each: u32,
}

const fn small(name: &'static str, rw: &'static str, depth: u32, flush_each: u32) -> Work {
    Work { name, rw, bytes: BLOCK, depth, requests: 20_000, flush_each }
}

const fn large(name: &'static str, rw: &'static str, flush_each: u32) -> Work {
    Work { name, rw, bytes: 1 << 20, depth: 2, requests: 256, flush_each }
}

const WORKS: [Work; 8] = [
    small("4 KiB random write, depth 32", "randwrite", 32, 0),
    small("4 KiB random write, depth 32, FLUSH every 32", "randwrite", 32, 32),
    small("4 KiB random read, depth 32", "randread", 32, 0),
    small("4 KiB random write, depth 1", "randwrite", 1, 0),
    small("4 KiB random read, depth 1", "randread", 1, 0),
    large("1 MiB sequential write", "write", 0),
    large("1 MiB sequential write, FLUSH every 32", "write", 32),
    large("1 MiB sequential read", "read", 0),
];

/// Writes all of a disk of `size` bytes.
fn fill(server: &Server, size: u64) -> Result<(), BenchError> {
    Work { requests: size >> 20, ..large("", "write", 0) }.run(server, size).map(drop)
}

/// What one piece of work gave with one server.
#[derive(Default, Clone)]
struct Costs {
    /// Processor time of the server for a request, in microseconds.
    core: Samples,
    /// Requests a second, by the wall's clock.
    wall: Samples,
}

/// Measures and prints.
pub(super) fn run(rounds: u32, folder: &Path, printer: &mut Printer) -> Result<(), BenchError> {
    let folder = tempfile::tempdir_in(folder).map_err(|error| BenchError::Io(folder.into(), error))?;
    let at = folder.path();
    let ciphers = Ciphers::best().map_err(BenchError::volume("expand a key"))?;
    let servers = [
        Server::fealty(at, "full", SIZE)?,
        Server::plain(at, SIZE)?,
        Server::luks(at, SIZE)?,
        Server::raw(at, SIZE)?,
        Server::nbdkit(at, SIZE)?,
        Server::fealty(at, "half", 2 * SIZE)?,
    ];
    let [full, others @ .., half] = &servers;
    // Twice, so that also the blocks that a copy-on-write volume moves to were written before.
    for _ in 0..2 {
        others.iter().chain([full]).try_for_each(|server| fill(server, SIZE))?;
        fill(half, 2 * SIZE)?;
    }
    half.zero(SIZE, SIZE)?;
    let cases =
        || WORKS.iter().map(|work| (work, false)).chain(WORKS.iter().filter(|w| w.is_deep()).map(|w| (w, true)));
    let mut all: Vec<[Costs; 6]> = cases().map(|_| Default::default()).collect();
    let mut crypto = [Samples::default(), Samples::default()];
    for round in 0..rounds + WARM_UP {
        let costs = cipher_costs(&ciphers)?;
        if round >= WARM_UP {
            crypto.iter_mut().zip(costs).for_each(|(samples, cost)| samples.add(cost));
        }
        for ((work, awake), costs) in cases().zip(&mut all) {
            let _awake = awake.then(Awake::all).transpose()?;
            for (server, costs) in servers.iter().zip(costs) {
                let (core, wall) = work.run(server, SIZE)?;
                if round >= WARM_UP {
                    costs.core.add(core);
                    costs.wall.add(wall);
                }
            }
        }
    }
    for ((work, awake), [full, plain, luks, raw, nbdkit, half]) in cases().zip(&all) {
        let name = format!("{}{}", work.name, if awake { ", all processors awake" } else { "" });
        // The one that asks for less counts.
        let by_luks = luks.core.median() * BY_LUKS >= plain.core.median() * BY_PLAIN;
        let counts = work.is_deep() && work.flush_each == 0;
        let target = |target, less| (counts && less).then_some(target);
        let blocks = (work.bytes / BLOCK) as f64;
        let bound = plain.core.with(&crypto[usize::from(work.rw.ends_with("read"))], |plain, one| plain + blocks * one);
        for (volume, ours) in [("", full), (", half of the volume used", half)] {
            let cost = || Figure::new(format!("{name}{volume}: server's core for one"), "us", &ours.core);
            printer.add(cost().against("qemu-storage-daemon, LUKS", &luks.core, target(BY_LUKS, by_luks)));
            printer.add(cost().against("our server, no ciphers", &plain.core, target(BY_PLAIN, !by_luks)));
            printer.add(cost().against("that and the crypto alone", &bound, None));
        }
        let cost = || Figure::new(format!("{name}: server's core for one"), "us", &full.core);
        printer.add(cost().against("qemu-storage-daemon, raw", &raw.core, None));
        printer.add(cost().against("nbdkit, luks filter", &nbdkit.core, None));
        let rate = Figure::new(format!("{name}: by the clock"), "1/s", &full.wall);
        printer.add(rate.against("qemu-storage-daemon, LUKS", &luks.wall, None));
    }
    Ok(())
}

/// What the ciphers take to seal a block, and to open one, in microseconds: of as many as a server gives a volume at once.
fn cipher_costs(ciphers: &Ciphers) -> Result<[f64; 2], BenchError> {
    const BLOCKS: usize = 32;
    const TIMES: u32 = 200;
    let mut data = vec![0x5a; BLOCKS * BLOCK as usize];
    let plain = data.clone();
    let mut sealed = Vec::new();
    let micros = |time: f64| time * 1e6 / f64::from(TIMES) / BLOCKS as f64;
    let start = thread_time();
    for _ in 0..TIMES {
        sealed = ciphers.seal(Some(&plain), &mut data).map_err(BenchError::volume("seal"))?;
    }
    let seal = micros(thread_time() - start);
    let stored = data.clone();
    let start = thread_time();
    for _ in 0..TIMES {
        data.copy_from_slice(&stored);
        if !ciphers.open(&sealed, &mut data) {
            return Err(MeasureError::Unequal("sealed blocks").into());
        }
    }
    Ok([seal, micros(thread_time() - start)])
}

impl Work {
    /// Whether it is what the targets are for.
    fn is_deep(&self) -> bool {
        self.bytes == BLOCK && self.depth > 1
    }

    /// Does it once, within `size` bytes: the server's processor time for a request in microseconds, and requests a second.
    fn run(&self, server: &Server, size: u64) -> Result<(f64, f64), BenchError> {
        let before = server.processor_time()?;
        let mut fio = Command::new("fio");
        fio.args(["--name=work", "--ioengine=nbd", "--output-format=json", "--randrepeat=0", "--norandommap"]);
        fio.arg(format!("--uri={}", server.uri)).arg(format!("--rw={}", self.rw)).arg(format!("--bs={}", self.bytes));
        fio.arg(format!("--iodepth={}", self.depth)).arg(format!("--size={size}"));
        fio.arg(format!("--number_ios={}", self.requests)).arg(format!("--fsync={}", self.flush_each));
        let output = fio.output().map_err(|error| BenchError::Io("fio".into(), error))?;
        let core = server.processor_time()? - before;
        let printed = String::from_utf8_lossy(&output.stdout);
        let failed =
            || BenchError::Failed("fio".into(), output.status.to_string(), printed.chars().take(400).collect());
        if !output.status.success() {
            return Err(failed());
        }
        // Before its JSON it says that it is connected.
        let json = &printed[printed.find('{').unwrap_or(0)..];
        let said: serde_json::Value = serde_json::from_str(json).map_err(|_| failed())?;
        let side = &said["jobs"][0][if self.rw.ends_with("read") { "read" } else { "write" }];
        let (done, rate) = (side["total_ios"].as_f64().unwrap_or(0.0), side["iops"].as_f64().unwrap_or(0.0));
        if done < self.requests as f64 { Err(failed()) } else { Ok((core * 1e6 / done, rate)) }
    }
}

/// What `bench served` is told.
#[derive(Debug, Clone, clap::Args)]
pub(super) struct Places {
    /// A folder in memory, for the disks.
    #[arg(long, default_value = "/dev/shm")]
    pub(super) tmpfs: PathBuf,
}
