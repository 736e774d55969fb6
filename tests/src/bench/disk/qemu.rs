//! QEMU's LUKS driver, in the process of qemu-io: AES-256-XTS as ours, without integrity and in place.
//!
//! Sequential work and depth 1 are counted by qemu-io's own clock around each request. Depth 32 and work with FLUSHes are
//! counted from outside, less what a qemu-io without requests takes: reading its commands counts there.

use crate::bench::BenchError;
use fealty_disk::bench::{MeasureError, Timing, Work};
use std::fmt::Write as _;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

const SECRET: &str = "secret,id=key,data=benchmark";

/// A LUKS image, and whether it is used past the page cache.
pub(super) struct Luks(PathBuf, bool);

impl Luks {
    pub(super) fn new(path: &Path, size: u64, direct: bool) -> Result<Self, BenchError> {
        let mut make = Command::new("qemu-img");
        make.args(["create", "-q", "-f", "luks", "--object", SECRET]);
        make.args(["-o", "key-secret=key,iter-time=10,cipher-alg=aes-256,cipher-mode=xts,ivgen-alg=plain64"]);
        let status = make.arg(path).arg(size.to_string()).status();
        let status = status.map_err(|error| BenchError::Io("qemu-img".into(), error))?;
        if !status.success() {
            return Err(BenchError::Failed("qemu-img".to_owned(), status.to_string(), "no LUKS image".to_owned()));
        }
        let luks = Self(path.to_owned(), direct);
        luks.commands(&(0..size >> 20).fold(String::new(), |mut script, i| {
            let _ = writeln!(script, "write -q {}M 1M", i);
            script
        }))?;
        Ok(luks)
    }

    /// Does `work`; its processor time is its wall time, for qemu-io's is its own affair.
    pub(super) fn run(&self, work: &Work, size: u64, seed: u64) -> Result<Timing, BenchError> {
        let verb = if work.write { "write" } else { "read" };
        let deep = work.threads * work.batch > 1;
        let by_own_clock = !deep && work.flush_each.is_none();
        let (aio, quiet) = (if deep { "aio_" } else { "" }, if by_own_clock { "" } else { "-q " });
        let mut script = String::new();
        for (i, wave) in work.waves(size, seed).iter().enumerate() {
            for offset in wave {
                let _ = writeln!(script, "{aio}{verb} {quiet}{offset} {}", work.bytes);
            }
            if deep {
                script.push_str("aio_flush\n");
            }
            if work.flush_each.is_some_and(|each| ((i + 1) * work.batch).is_multiple_of(each)) {
                // Threads that flush together share one.
                script.push_str("flush\n");
            }
        }
        let wall = if by_own_clock {
            own_clock(&self.commands(&script)?.1, work.requests)?
        } else {
            let empty = self.commands("")?.0;
            (self.commands(&script)?.0 - empty).max(1e-6)
        };
        Ok(Timing { wall, core: wall })
    }

    /// Seconds from outside, and what it printed.
    fn commands(&self, script: &str) -> Result<(f64, String), BenchError> {
        let io = |error| BenchError::Io("qemu-io".into(), error);
        let direct = if self.1 { ",cache.direct=on" } else { "" };
        let image = format!("driver=luks,key-secret=key,file.driver=file,file.filename={}{direct}", self.0.display());
        let mut command = Command::new("qemu-io");
        command.args(["--object", SECRET, "--image-opts", &image]);
        let start = Instant::now();
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().map_err(io)?;
        let stdin = child.stdin.take();
        let script = script.to_owned();
        let feeder = std::thread::spawn(move || stdin.map_or(Ok(()), |mut stdin| stdin.write_all(script.as_bytes())));
        let output = child.wait_with_output().map_err(io)?;
        let seconds = start.elapsed().as_secs_f64();
        feeder.join().map_err(|_| MeasureError::Panicked)?.map_err(io)?;
        if !output.status.success() {
            return Err(BenchError::Failed("qemu-io".to_owned(), output.status.to_string(), String::new()));
        }
        Ok((seconds, String::from_utf8_lossy(&output.stdout).into_owned()))
    }
}

/// Adds up what qemu-io says of each request: "4 KiB, 1 ops; 00.00 sec (62.5 MiB/sec and 16025.1274 ops/sec)".
fn own_clock(printed: &str, requests: usize) -> Result<f64, BenchError> {
    let rates = printed.lines().filter_map(|line| line.split(" and ").nth(1)?.strip_suffix(" ops/sec)")?.parse().ok());
    let times: Vec<f64> = rates.map(|rate: f64| 1.0 / rate).collect();
    if times.len() == requests {
        Ok(times.iter().sum())
    } else {
        Err(BenchError::Failed("qemu-io".to_owned(), format!("{} of {requests} done", times.len()), printed.to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_read_from_what_qemu_io_prints() {
        let printed = "qemu-io> wrote 4096/4096 bytes at offset 0\n4 KiB, 1 ops; 00.00 sec (62.5 MiB/sec and 16000.0000 ops/sec)\n\
                       qemu-io> read 4096/4096 bytes at offset 0\n1 MiB, 1 ops; 0:00:01.36 (188.8 MiB/sec and 0.5000 ops/sec)\n";
        assert!((own_clock(printed, 2).expect("two") - 2.000_062_5).abs() < 1e-9);
        assert!(own_clock(printed, 3).is_err());
    }
}
