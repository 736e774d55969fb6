//! Pieces of work, and how long a subject takes for one.

use super::MeasureError;
use super::sample::Samples;
use super::subject::Subject;
use rustix::time::{ClockId, clock_gettime};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;
use std::time::Instant;

/// A piece of work: so many requests of so many bytes.
pub struct Work {
    /// What it is called.
    pub name: &'static str,
    /// Bytes of a request.
    pub bytes: usize,
    /// Whether it writes, or reads.
    pub write: bool,
    /// Threads that have requests in flight.
    pub threads: usize,
    /// Requests that each hands over at a time, and waits for: as a queue's worker does with all that wait there.
    pub batch: usize,
    /// Requests of each thread.
    pub requests: usize,
    /// A FLUSH after so many requests of a thread.
    pub flush_each: Option<usize>,
}

const fn large(name: &'static str, write: bool, flush_each: Option<usize>) -> Work {
    Work { name, bytes: 1 << 20, write, threads: 1, batch: 1, requests: 64, flush_each }
}

const fn small(name: &'static str, write: bool, threads: usize, batch: usize, flush_each: Option<usize>) -> Work {
    Work { name, bytes: 4096, write, threads, batch, requests: 2048 / threads, flush_each }
}

/// All of them. With 32 threads each flushes once, after its 32nd request.
pub const WORKS: [Work; 12] = [
    large("1 MiB sequential write", true, None),
    large("1 MiB sequential write, FLUSH every 32", true, Some(32)),
    large("1 MiB sequential read", false, None),
    small("4 KiB random write, depth 1", true, 1, 1, None),
    small("4 KiB random write, depth 1, FLUSH every 32", true, 1, 1, Some(32)),
    small("4 KiB random read, depth 1", false, 1, 1, None),
    small("4 KiB random write, depth 32", true, 1, 32, None),
    small("4 KiB random write, depth 32, FLUSH every 32", true, 1, 32, Some(32)),
    small("4 KiB random read, depth 32", false, 1, 32, None),
    small("4 KiB random write, 32 threads", true, 32, 1, None),
    small("4 KiB random write, 32 threads, FLUSH every 32", true, 32, 1, Some(32)),
    small("4 KiB random read, 32 threads", false, 32, 1, None),
];

/// Rounds before those that count.
pub const WARM_UP: u32 = 1;

/// Seconds of one piece of work.
pub struct Timing {
    /// By the wall's clock.
    pub wall: f64,
    /// Of processor time, all threads together.
    pub core: f64,
}

/// What one piece of work gave one subject: its rates by the wall's clock, and by processor time.
#[derive(Default, Clone)]
pub struct Rates {
    /// By the wall's clock.
    pub wall: Samples,
    /// By processor time, all threads together.
    pub core: Samples,
    /// The same, of the first time after other work.
    pub first: Samples,
}

impl Rates {
    fn add(&mut self, work: &Work, first: &Timing, second: &Timing) {
        self.wall.add(work.rate(second.wall));
        self.core.add(work.rate(second.core));
        self.first.add(work.rate(first.core));
    }
}

/// Does a piece of work with some seed.
pub type Runner<'a, E> = &'a dyn Fn(&Work, u64) -> Result<Timing, E>;

/// Each of `works` twice with each subject in turn, `rounds` times after one that does not count; `heard` is told each time before. The
/// rates are in the order of the works and of the subjects.
///
/// # Errors
/// The first of a subject's.
pub fn interleave<E, const N: usize>(
    works: &[Work],
    rounds: u32,
    subjects: [Runner<'_, E>; N],
    heard: &mut dyn FnMut(&Work),
) -> Result<Vec<[Rates; N]>, E> {
    let mut all: Vec<[Rates; N]> = works.iter().map(|_| std::array::from_fn(|_| Rates::default())).collect();
    for round in 0..rounds + WARM_UP {
        for (work, rates) in works.iter().zip(&mut all) {
            for (subject, rates) in subjects.iter().zip(rates) {
                let mut time = |seed| {
                    heard(work);
                    subject(work, seed)
                };
                let (first, second) = (time(2 * u64::from(round))?, time(2 * u64::from(round) + 1)?);
                if round >= WARM_UP {
                    rates.add(work, &first, &second);
                }
            }
        }
    }
    Ok(all)
}

impl Work {
    /// Bytes of all its requests.
    pub fn total(&self) -> u64 {
        (self.threads * self.requests * self.bytes) as u64
    }

    /// GB/s of large requests, thousands of small ones a second.
    pub fn rate(&self, seconds: f64) -> f64 {
        let requests = (self.threads * self.requests) as f64;
        if self.bytes > 4096 { requests * self.bytes as f64 / seconds / 1e9 } else { requests / seconds / 1e3 }
    }

    /// The unit of [`rate`](Self::rate).
    pub fn unit(&self) -> &'static str {
        if self.bytes > 4096 { "GB/s" } else { "kIOPS" }
    }

    /// Where the requests of thread `thread` go, in `size` bytes.
    pub fn offsets(&self, thread: usize, size: u64, seed: u64) -> Vec<u64> {
        let places = size / self.bytes as u64;
        let place = |i: usize| match self.bytes {
            4096 => scattered(seed << 32 | (thread * self.requests + i) as u64) % places,
            _ => (seed * self.requests as u64 + i as u64) % places,
        };
        (0..self.requests).map(|i| place(i) * self.bytes as u64).collect()
    }

    /// Does it with `subject`. By the clock what lies between the first thread's start and the last one's end counts; of processor
    /// time also what the subject does behind that.
    pub fn run(&self, subject: &dyn Subject, size: u64, seed: u64) -> Result<Timing, MeasureError> {
        let (arrive, arrived) = channel::<()>();
        let each = |thread, arrive: Sender<()>, go: Receiver<()>| {
            let offsets = self.offsets(thread, size, seed);
            // The same bytes from every subject, in memory that exists before the clock starts, at pages as a guest's buffers are.
            let mut memory = vec![0x5a; self.batch * self.bytes + 4096];
            let buffers = memory.as_ptr().align_offset(4096);
            let buffers = &mut memory[buffers..buffers + self.batch * self.bytes];
            subject.warm(self.batch * self.bytes);
            drop(arrive);
            go.recv().map_err(|_| MeasureError::Panicked)?;
            let start = Instant::now();
            self.requests(subject, &offsets, buffers)?;
            Ok::<_, MeasureError>((start, Instant::now()))
        };
        let (mut done, mut core) = (Vec::new(), 0.0);
        thread::scope(|scope| {
            let (each, arrive) = (&each, arrive);
            let (mut threads, mut gates) = (Vec::new(), Vec::new());
            for thread in 0..self.threads {
                let ((gate, go), arrive) = (channel(), arrive.clone());
                let work = move || each(thread, arrive, go);
                // Without one, the gates close, and the others end.
                threads.push(thread::Builder::new().spawn_scoped(scope, work).map_err(MeasureError::Thread)?);
                gates.push(gate);
            }
            // Until the last one has arrived: nobody sends anything.
            drop(arrive);
            let _ = arrived.recv();
            // Not after they have begun, which may be long before this thread goes on.
            core = process_time();
            gates.iter().for_each(|gate| _ = gate.send(()));
            for thread in threads {
                done.push(thread.join().map_err(|_| MeasureError::Panicked)??);
            }
            Ok::<_, MeasureError>(())
        })?;
        subject.rest();
        let core = process_time() - core;
        let start = done.iter().map(|(start, _)| *start).min();
        let end = done.iter().map(|(_, end)| *end).max();
        let wall = start.zip(end).map(|(start, end)| (end - start).as_secs_f64()).ok_or(MeasureError::Panicked)?;
        Ok(Timing { wall, core })
    }

    fn requests(&self, subject: &dyn Subject, offsets: &[u64], buffers: &mut [u8]) -> Result<(), MeasureError> {
        for (i, offsets) in offsets.chunks(self.batch).enumerate() {
            if self.write {
                let parts: Vec<_> = offsets.iter().copied().zip(buffers.chunks(self.bytes)).collect();
                subject.write(&parts)?;
            } else {
                let mut parts: Vec<_> = offsets.iter().copied().zip(buffers.chunks_mut(self.bytes)).collect();
                subject.read(&mut parts)?;
            }
            if self.flush_each.is_some_and(|each| ((i + 1) * self.batch).is_multiple_of(each)) {
                subject.flush()?;
            }
        }
        Ok(())
    }

    /// Requests that are in flight together, each time in order: of one thread those that it hands over at a time, or one of each thread.
    pub fn waves(&self, size: u64, seed: u64) -> Vec<Vec<u64>> {
        let all: Vec<Vec<u64>> = (0..self.threads).map(|thread| self.offsets(thread, size, seed)).collect();
        let wave = |i: usize| all.iter().flat_map(|offsets| &offsets[i..i + self.batch]).copied().collect();
        (0..self.requests).step_by(self.batch).map(wave).collect()
    }
}

/// Seconds of processor time of this thread.
pub fn thread_time() -> f64 {
    seconds(ClockId::ThreadCPUTime)
}

/// Seconds of processor time of this process: of a volume's own thread too, and of what the kernel does for it aside.
fn process_time() -> f64 {
    seconds(ClockId::ProcessCPUTime)
}

fn seconds(clock: ClockId) -> f64 {
    let time = clock_gettime(clock);
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

    /// Each write takes some time of the processor's.
    #[derive(Default)]
    struct Busy(std::sync::Mutex<f64>);

    impl Subject for Busy {
        fn read(&self, _parts: &mut [(u64, &mut [u8])]) -> Result<(), MeasureError> {
            Ok(())
        }

        fn write(&self, _parts: &[(u64, &[u8])]) -> Result<(), MeasureError> {
            let begun = thread_time();
            while thread_time() - begun < 1e-4 {}
            *self.0.lock().expect("no panic") += thread_time() - begun;
            Ok(())
        }

        fn flush(&self) -> Result<(), MeasureError> {
            Ok(())
        }
    }

    #[test]
    fn all_processor_time_of_its_threads_counts() {
        let work = small("busy", true, 32, 1, None);
        for round in 0..4 {
            let busy = Busy::default();
            let timing = work.run(&busy, 64 << 20, round).expect("done");
            let spent = *busy.0.lock().expect("no panic");
            assert!(timing.core >= spent, "{} of {spent} s", timing.core);
        }
    }

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
