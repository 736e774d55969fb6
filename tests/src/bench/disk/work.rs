//! Pieces of work, and how long a subject takes for one.

use super::subject::Subject;
use crate::bench::BenchError;
use rustix::time::{ClockId, clock_gettime};
use std::sync::Barrier;
use std::thread;
use std::time::Instant;

/// A piece of work: so many requests of so many bytes.
pub(super) struct Work {
    pub(super) name: &'static str,
    pub(super) bytes: usize,
    pub(super) write: bool,
    /// Threads that have one request each in flight.
    pub(super) threads: usize,
    /// Requests of each thread.
    pub(super) requests: usize,
    /// A FLUSH after so many requests of a thread.
    pub(super) flush_each: Option<usize>,
}

const fn large(name: &'static str, write: bool, flush_each: Option<usize>) -> Work {
    Work { name, bytes: 1 << 20, write, threads: 1, requests: 64, flush_each }
}

const fn small(name: &'static str, write: bool, threads: usize, flush_each: Option<usize>) -> Work {
    Work { name, bytes: 4096, write, threads, requests: 2048 / threads, flush_each }
}

/// All of them. With 32 threads each flushes once, after its 32nd request.
pub(super) const WORKS: [Work; 9] = [
    large("1 MiB sequential write", true, None),
    large("1 MiB sequential write, FLUSH every 32", true, Some(32)),
    large("1 MiB sequential read", false, None),
    small("4 KiB random write, depth 1", true, 1, None),
    small("4 KiB random write, depth 1, FLUSH every 32", true, 1, Some(32)),
    small("4 KiB random read, depth 1", false, 1, None),
    small("4 KiB random write, depth 32", true, 32, None),
    small("4 KiB random write, depth 32, FLUSH every 32", true, 32, Some(32)),
    small("4 KiB random read, depth 32", false, 32, None),
];

/// Seconds of one piece of work.
pub(super) struct Timing {
    pub(super) wall: f64,
    /// Of processor time, all threads together.
    pub(super) core: f64,
}

impl Work {
    /// GB/s of large requests, thousands of small ones a second.
    pub(super) fn rate(&self, seconds: f64) -> f64 {
        let requests = (self.threads * self.requests) as f64;
        if self.bytes > 4096 { requests * self.bytes as f64 / seconds / 1e9 } else { requests / seconds / 1e3 }
    }

    pub(super) fn unit(&self) -> &'static str {
        if self.bytes > 4096 { "GB/s" } else { "kIOPS" }
    }

    /// Where the requests of thread `thread` go, in `size` bytes.
    pub(super) fn offsets(&self, thread: usize, size: u64, seed: u64) -> Vec<u64> {
        let places = size / self.bytes as u64;
        let place = |i: usize| match self.bytes {
            4096 => scattered(seed << 32 | (thread * self.requests + i) as u64) % places,
            _ => (seed * self.requests as u64 + i as u64) % places,
        };
        (0..self.requests).map(|i| place(i) * self.bytes as u64).collect()
    }

    /// Does it with `subject`. Only what lies between the first thread's start and the last one's end counts.
    pub(super) fn run(&self, subject: &dyn Subject, size: u64, seed: u64) -> Result<Timing, BenchError> {
        let ready = Barrier::new(self.threads);
        let each = |thread| {
            let offsets = self.offsets(thread, size, seed);
            // The same bytes from every subject, in a buffer that exists before the clock starts.
            let mut buffer = vec![0x5a; self.bytes];
            subject.warm(self.bytes);
            ready.wait();
            let (start, core) = (Instant::now(), thread_time());
            self.requests(subject, &offsets, &mut buffer)?;
            Ok::<_, BenchError>((start, Instant::now(), thread_time() - core))
        };
        let mut done = Vec::new();
        thread::scope(|scope| {
            let each = &each;
            let threads: Vec<_> = (0..self.threads).map(|thread| scope.spawn(move || each(thread))).collect();
            for thread in threads {
                done.push(thread.join().map_err(|_| BenchError::Panicked)??);
            }
            Ok::<_, BenchError>(())
        })?;
        let start = done.iter().map(|(start, ..)| *start).min();
        let end = done.iter().map(|(_, end, _)| *end).max();
        let wall = start.zip(end).map(|(start, end)| (end - start).as_secs_f64()).ok_or(BenchError::Panicked)?;
        Ok(Timing { wall, core: done.iter().map(|(.., core)| core).sum() })
    }

    fn requests(&self, subject: &dyn Subject, offsets: &[u64], buffer: &mut [u8]) -> Result<(), BenchError> {
        for (i, offset) in offsets.iter().enumerate() {
            if self.write {
                subject.write(*offset, buffer)?;
            } else {
                subject.read(*offset, buffer)?;
            }
            if self.flush_each.is_some_and(|each| (i + 1) % each == 0) {
                subject.flush()?;
            }
        }
        Ok(())
    }
}

/// Seconds of processor time of this thread.
pub(in crate::bench) fn thread_time() -> f64 {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    time.tv_sec as f64 + time.tv_nsec as f64 / 1e9
}

/// SplitMix64.
fn scattered(n: u64) -> u64 {
    let n = n.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let n = (n ^ n >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let n = (n ^ n >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    n ^ n >> 31
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_lie_inside_and_each_thread_has_its_own() {
        for work in &WORKS {
            let offsets: Vec<u64> = (0..work.threads).flat_map(|thread| work.offsets(thread, 64 << 20, 3)).collect();
            assert_eq!(offsets.len(), work.threads * work.requests);
            assert!(offsets.iter().all(|o| o % work.bytes as u64 == 0 && o + work.bytes as u64 <= 64 << 20));
            let mut different = offsets.clone();
            different.sort_unstable();
            different.dedup();
            assert!(different.len() * 10 > offsets.len() * 9, "{}", work.name);
        }
    }
}
