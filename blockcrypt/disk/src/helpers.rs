//! Large requests by several threads. A volume seals and opens what is asked of it on the thread that asks: whoever asks for one thing
//! after the other would leave all processors but one idle.
//!
//! The virtual machine monitor has none of these: a guest's queues have threads of their own, and the other processors are its vCPUs'.

use blockcrypt::{Volume, VolumeError};
use rayon_core::{ThreadPool, ThreadPoolBuilder};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicIsize, Ordering};

/// Bytes that a thread is worth waking for. Parts meet at multiples of it, so that no two threads share a block.
const PART: u64 = 256 << 10;
/// Threads that help, at most: the machine has other things to do.
const MOST: usize = 3;

/// Threads that take part of a request where there are 512 KiB of it or more. They are this process's: as many threads as there are
/// processors work on large requests, those that ask first.
pub struct Helpers {
    /// None on a machine of one processor, or that has no threads left.
    pool: Option<ThreadPool>,
    /// How many more threads may work on large requests; below zero where more ask.
    free: AtomicIsize,
}

/// This thread, and so many helpers, work on a request as long as this lives.
struct Lent<'a> {
    free: &'a AtomicIsize,
    helpers: usize,
}

impl Drop for Lent<'_> {
    fn drop(&mut self) {
        self.free.fetch_add(self.helpers as isize + 1, Ordering::Relaxed);
    }
}

impl Helpers {
    /// This process's: one for each processor but that of the thread that asks, three at most.
    pub fn here() -> &'static Self {
        static HERE: OnceLock<Helpers> = OnceLock::new();
        HERE.get_or_init(|| {
            let processors = std::thread::available_parallelism().map_or(1, usize::from);
            Self::new((processors - 1).min(MOST))
        })
    }

    fn new(threads: usize) -> Self {
        let builder = ThreadPoolBuilder::new().num_threads(threads).thread_name(|_| "helper".to_owned());
        let pool = if threads > 0 { builder.build().ok() } else { None };
        let free = AtomicIsize::new(pool.as_ref().map_or(0, ThreadPool::current_num_threads) as isize + 1);
        Self { pool, free }
    }

    /// How many there are.
    pub fn threads(&self) -> usize {
        self.pool.as_ref().map_or(0, ThreadPool::current_num_threads)
    }

    /// As [`Volume::read`].
    ///
    /// # Errors
    /// The volume's; of several the first in order.
    pub fn read(&self, volume: &Volume, offset: u64, buffer: &mut [u8]) -> Result<(), VolumeError> {
        let Some((pool, lent)) = self.lend(buffer.len()) else { return volume.read(offset, buffer) };
        let mut rest = &mut *buffer;
        let parts = cut(offset, rest.len() as u64, lent.helpers + 1).map(|(at, length)| {
            let (part, behind) = std::mem::take(&mut rest).split_at_mut(length);
            rest = behind;
            (at, part)
        });
        let done = each(pool, parts.collect(), |at, part| volume.read(at, part));
        if done.is_err() {
            buffer.fill(0);
        }
        done
    }

    /// As [`Volume::write`].
    ///
    /// # Errors
    /// The volume's; of several the first in order.
    pub fn write(&self, volume: &Volume, offset: u64, data: &[u8]) -> Result<(), VolumeError> {
        let Some((pool, lent)) = self.lend(data.len()) else { return volume.write(offset, data) };
        let mut rest = data;
        let parts = cut(offset, rest.len() as u64, lent.helpers + 1).map(|(at, length)| {
            let (part, behind) = rest.split_at(length);
            rest = behind;
            (at, part)
        });
        each(pool, parts.collect(), |at, part| volume.write(at, part))
    }

    /// As [`Volume::read_many`]; large requests one after the other.
    pub fn read_many(&self, volume: &Volume, requests: &mut [(u64, &mut [u8])]) -> Vec<Result<(), VolumeError>> {
        let together = requests.chunk_by_mut(|(_, a), (_, b)| is_small(a) && is_small(b));
        let read = |requests: &mut [(u64, &mut [u8])]| match requests {
            [(offset, buffer)] => vec![self.read(volume, *offset, buffer)],
            several => volume.read_many(several),
        };
        together.flat_map(read).collect()
    }

    /// As [`Volume::write_many`]; large requests one after the other.
    pub fn write_many(&self, volume: &Volume, requests: &[(u64, &[u8])]) -> Vec<Result<(), VolumeError>> {
        let together = requests.chunk_by(|(_, a), (_, b)| is_small(a) && is_small(b));
        let write = |requests: &[(u64, &[u8])]| match requests {
            [(offset, data)] => vec![self.write(volume, *offset, data)],
            several => volume.write_many(several),
        };
        together.flat_map(write).collect()
    }

    /// Helpers for so many bytes. Those that ask have the first claim to the processors: who finds none free works alone.
    fn lend(&self, bytes: usize) -> Option<(&ThreadPool, Lent<'_>)> {
        let pool = self.pool.as_ref()?;
        let wanted = (bytes / PART as usize).checked_sub(1).filter(|wanted| *wanted > 0)? as isize;
        let helpers = |free: isize| (free - 1).clamp(0, wanted);
        let taken = |free| Some(free - 1 - helpers(free));
        let free = self.free.fetch_update(Ordering::Relaxed, Ordering::Relaxed, taken).ok()?;
        Some((pool, Lent { free: &self.free, helpers: helpers(free) as usize }))
    }
}

/// Whether it is not worth a helper.
fn is_small(data: &[u8]) -> bool {
    data.len() < 2 * PART as usize
}

/// Cuts `length` bytes, a [`PART`] for each of `count` at least, into about equal parts: where each begins, and its bytes.
fn cut(offset: u64, length: u64, count: usize) -> impl Iterator<Item = (u64, usize)> {
    let (mut at, count) = (offset, count as u64);
    (1..=count).map(move |i| {
        let start = at;
        at = if i == count { offset + length } else { (offset + length / count * i) / PART * PART };
        (start, (at - start) as usize)
    })
}

/// Does something with each part, the first on this thread; the first error in order.
fn each<T: Send>(
    pool: &ThreadPool,
    parts: Vec<(u64, T)>,
    what: impl Fn(u64, T) -> Result<(), VolumeError> + Sync,
) -> Result<(), VolumeError> {
    let (what, mut done) = (&what, Vec::new());
    done.resize_with(parts.len(), || Ok(()));
    pool.in_place_scope(|scope| {
        let mut own = None;
        for ((at, part), done) in parts.into_iter().zip(&mut done) {
            match own {
                None => own = Some((at, part, done)),
                Some(_) => scope.spawn(move |_| *done = what(at, part)),
            }
        }
        if let Some((at, part, done)) = own {
            *done = what(at, part);
        }
    });
    done.into_iter().collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::Keeper;
    use blockcrypt::{MemoryStore, Store};
    use proptest::prelude::*;
    use std::sync::Arc;

    const SIZE: u64 = 16 << 20;

    fn volume() -> (Volume, Arc<MemoryStore>) {
        let store = Arc::new(MemoryStore::default());
        let volume = Keeper::new().expect("a key").create(store.clone(), SIZE).expect("a volume");
        (volume, store)
    }

    fn content(length: usize, seed: u64) -> Vec<u8> {
        (0..length as u64).map(|i| (i.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 40) as u8 ^ seed as u8).collect()
    }

    proptest! {
        #[test]
        fn parts_are_all_of_a_request_and_share_no_block(
            offset in 0_u64..1 << 40, parts in 2_u64..40, more in 0..PART, count in 2_usize..=MOST + 1
        ) {
            let length = parts.max(count as u64) * PART + more;
            let mut end = offset;
            for (at, bytes) in cut(offset, length, count) {
                prop_assert!(at == end && bytes > 0);
                prop_assert!(at == offset || at % PART == 0);
                end += bytes as u64;
            }
            prop_assert_eq!(end, offset + length);
        }
    }

    #[test]
    fn several_threads_do_what_one_does() {
        for threads in [0, 1, 3] {
            let (helpers, (volume, _)) = (Helpers::new(threads), volume());
            assert_eq!(helpers.threads(), threads);
            // Sizes with and without helpers, at blocks and within them.
            for (i, length) in
                [512, 8192, 256 << 10, 512 << 10, (512 << 10) + 512, 1 << 20, 3 << 20].into_iter().enumerate()
            {
                let (offset, data) = (i as u64 * (1 << 20) + i as u64 * 512, content(length, i as u64));
                helpers.write(&volume, offset, &data).expect("written");
                let (mut by_one, mut by_all) = (vec![1; length], vec![2; length]);
                volume.read(offset, &mut by_one).expect("read");
                helpers.read(&volume, offset, &mut by_all).expect("read");
                assert!(by_one == data && by_all == data, "{length} bytes, {threads} threads");
            }
        }
    }

    #[test]
    fn of_writes_that_meet_the_later_one_holds() {
        for threads in [0, 3] {
            let (helpers, (volume, _)) = (Helpers::new(threads), volume());
            let (large, small) = (content(1 << 20, 1), content(4096, 2));
            let requests: [(u64, &[u8]); 5] =
                [(8192, &small), (0, &large), (4096, &small), (12288, &small), (4 << 20, &large)];
            assert!(helpers.write_many(&volume, &requests).iter().all(Result::is_ok));
            let (mut first, mut second, mut third) = (vec![0; 1 << 20], [0; 4096], vec![0; 1 << 20]);
            let mut asked: [(u64, &mut [u8]); 3] = [(0, &mut first), (4096, &mut second), (4 << 20, &mut third)];
            assert!(helpers.read_many(&volume, &mut asked).iter().all(Result::is_ok));
            let mut expected = large.clone();
            expected[4096..8192].copy_from_slice(&small);
            expected[12288..16384].copy_from_slice(&small);
            assert!(first == expected && second[..] == small && third == large, "{threads} threads");
        }
    }

    #[test]
    fn an_error_in_any_part_is_the_request_s() {
        let (helpers, (volume, store)) = (Helpers::new(3), volume());
        let data = content(2 << 20, 7);
        helpers.write(&volume, 0, &data).expect("written");
        volume.flush().expect("flushed");
        let end = SIZE - (1 << 20);
        assert!(matches!(helpers.write(&volume, end, &data), Err(VolumeError::Request { .. })));
        // Its last block is spoilt, which is the last helper's.
        let mut found = vec![0; store.len().expect("known") as usize];
        store.read_at(&mut found, 0).expect("read");
        let sealed: Vec<u64> = (0..found.len() / 4096)
            .filter(|i| found[i * 4096..][..4096].iter().any(|b| *b != 0))
            .map(|i| i as u64)
            .collect();
        let mut failures = 0;
        for block in sealed {
            let at = block as usize * 4096;
            store.write_at(&[0xee; 4096], at as u64).expect("spoilt");
            let mut read = vec![9; data.len()];
            match helpers.read(&volume, 0, &mut read) {
                Ok(()) => assert!(read == data),
                Err(error) => {
                    assert!(error.is_integrity() && read.iter().all(|b| *b == 0), "{error}");
                    failures += 1;
                }
            }
            store.write_at(&found[at..at + 4096], at as u64).expect("mended");
        }
        assert_eq!(failures, data.len() / 4096, "each block of data, and no other");
        assert_eq!(helpers.free.load(Ordering::Relaxed), 4, "all came back");
    }

    #[test]
    fn helpers_are_for_processors_that_nobody_asks_on() {
        let helpers = Helpers::new(3);
        let lend = |bytes: u64| helpers.lend(bytes as usize).map(|(_, lent)| lent);
        let count = |lent: &Option<Lent>| lent.as_ref().map(|lent| lent.helpers);
        assert_eq!(count(&lend(2 * PART - 1)), None, "small");
        let (first, second) = (lend(2 * PART), lend(8 * PART));
        assert_eq!((count(&first), count(&second)), (Some(1), Some(1)), "all four work");
        let third = lend(8 * PART);
        assert_eq!(count(&third), Some(0));
        drop((first, second));
        assert_eq!(count(&lend(8 * PART)), Some(2), "beside the third");
        drop(third);
        assert_eq!(count(&lend(8 * PART)), Some(3));
    }

    #[test]
    fn requests_that_find_no_helper_do_without() {
        let (helpers, (volume, _)) = (&Helpers::new(1), volume());
        let volume = &volume;
        std::thread::scope(|scope| {
            for thread in 0..4 {
                scope.spawn(move || {
                    let (offset, mut found) = (thread * (4 << 20), vec![0; 1 << 20]);
                    for round in 0..20 {
                        let data = content(1 << 20, thread * 20 + round);
                        helpers.write(volume, offset, &data).expect("written");
                        helpers.read(volume, offset, &mut found).expect("read");
                        assert!(found == data);
                    }
                });
            }
        });
        assert_eq!(helpers.free.load(Ordering::Relaxed), 2, "all came back");
    }
}
