//! `bench queue`: requests a second on a plain file, 32 of 4 KiB under way at once, and what each costs; against what they can't
//! do without.

use super::BenchError;
use super::floor::Floor;
use super::printer::Printer;
use crate::guest::images;
use crate::process::program;
use fealty_disk::bench::{Figure, Samples};
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

/// Requests under way.
const DEPTH: u16 = 32;
/// Bytes of the file: it stays in the page cache, so that the way through the programs is what takes time.
const FILE_SIZE: usize = 256 << 20;
const MEMORY_SIZE: u64 = 128 << 20;
/// A round's requests.
const READS: u64 = 100_000;
const WRITES: u64 = 30_000;
/// Of the kernel's clock in /proc/PID/stat.
const TICKS_PER_SECOND: f64 = 100.0;

/// What a round of requests took.
#[derive(Debug, Clone, Copy)]
pub(super) struct Effort {
    pub(super) requests: u64,
    /// From the first to the last.
    pub(super) seconds: f64,
    /// Of all processors, user and system.
    pub(super) cpu_seconds: f64,
}

#[derive(Default)]
struct Efforts {
    rate: Samples,
    cost: Samples,
}

impl Efforts {
    fn add(&mut self, effort: Effort) {
        self.rate.add(effort.requests as f64 / effort.seconds);
        self.cost.add(effort.cpu_seconds * 1e6 / effort.requests as f64);
    }
}

/// Measures and prints.
pub(super) fn run(rounds: u32, printer: &mut Printer) -> Result<(), BenchError> {
    let folder = tempfile::tempdir().map_err(|error| BenchError::Io("a temporary folder".into(), error))?;
    let disk = folder.path().join("disk.img");
    std::fs::write(&disk, vec![0x5a; FILE_SIZE]).map_err(|error| BenchError::Io(disk.clone(), error))?;
    for (word, count) in [("reads", READS), ("writes", WRITES)] {
        let config = configure(folder.path(), word, count)?;
        let mut floor = Floor::new(&disk, word == "writes", DEPTH).map_err(|e| BenchError::Io(disk.clone(), e))?;
        let (mut ours, mut least) = (Efforts::default(), Efforts::default());
        // The first round fills caches.
        for round in 0..=rounds {
            let bare = floor.run(count).map_err(|error| BenchError::Io(disk.clone(), error))?;
            let guest = guest(&config, word, count)?;
            if round > 0 {
                least.add(bare);
                ours.add(guest);
            }
        }
        let floor = "ioeventfd and io_uring alone";
        let name = format!("virtio-blk {word} a second, 4 KiB, queue depth {DEPTH}");
        printer.add(Figure::new(name, "1/s", &ours.rate).against(floor, &least.rate, None));
        let name = format!("CPU for each of these {word}, VM process and guest");
        printer.add(Figure::new(name, "µs", &ours.cost).against(floor, &least.cost, None));
    }
    Ok(())
}

fn configure(folder: &Path, word: &str, count: u64) -> Result<PathBuf, BenchError> {
    let config = serde_json::json!({
        "cpus": {"boot_vcpus": 1},
        "memory": {"size": MEMORY_SIZE},
        "payload": {"kernel": images().elf, "cmdline": format!("console=ttyS0 fealty.do={word}:{DEPTH}:{count},poweroff")},
        "disks": [{"id": "root", "path": "disk.img"}],
    });
    let path = folder.join(format!("{word}.json"));
    std::fs::write(&path, config.to_string()).map_err(|error| BenchError::Io(path.clone(), error))?;
    Ok(path)
}

/// Runs the small guest, which says when it begins and when it is done.
fn guest(config: &Path, word: &str, count: u64) -> Result<Effort, BenchError> {
    let fealty = program("fealty");
    let io = |error| BenchError::Io(fealty.clone(), error);
    let mut command = Command::new(&fealty);
    command.args(["run", "--unprotected"]).arg(config);
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().map_err(io)?;
    let pid = child.id();
    let mut lines = BufReader::new(child.stdout.take().into_iter().next().ok_or(BenchError::NoSteps)?).lines();
    let mut until = |line: String| -> Result<(Instant, f64), BenchError> {
        let found = lines.by_ref().map_while(Result::ok).any(|shown| shown.trim() == line);
        let now = Instant::now();
        if found { Ok((now, cpu_seconds(pid)?)) } else { Err(BenchError::Quiet(line)) }
    };
    let begun = until(format!("{word} started"))?;
    let done = until(format!("{word} done {count}"))?;
    child.wait().map_err(io)?;
    let seconds = (done.0 - begun.0).as_secs_f64();
    Ok(Effort { requests: count, seconds, cpu_seconds: done.1 - begun.1 })
}

/// What a process and its threads have used, the guest's time and the kernel's workers for it included.
fn cpu_seconds(pid: u32) -> Result<f64, BenchError> {
    let path = PathBuf::from(format!("/proc/{pid}/stat"));
    let stat = std::fs::read_to_string(&path).map_err(|error| BenchError::Io(path.clone(), error))?;
    // After the name, which may hold anything: user and system time are fields 14 and 15.
    let fields = stat.rsplit(')').next().unwrap_or_default().split_whitespace().skip(11).take(2);
    let ticks: f64 = fields.filter_map(|field| field.parse::<f64>().ok()).sum();
    Ok(ticks / TICKS_PER_SECOND)
}
