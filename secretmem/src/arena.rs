//! Many small secrets in few locked pages: locked memory is scarce (8 MiB by default), keys are 32 bytes.
//!
//! A region is cut into granules of 64 bytes, a cache line each, so that no two secrets share one; a bitmap says which are
//! taken. Nothing about the arena lies in the secret pages themselves. Free granules are always zero.
#![allow(unsafe_code)]

use crate::SecretError;
use crate::process::wipe;
use crate::region::{Protection, Region, best_protection, page_size};
use std::ptr::NonNull;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Bytes of a granule.
const GRANULE: usize = 64;

/// Bytes of a region, where no single secret needs more. Its pages cost memory only once they are used.
const REGION: usize = 256 * 1024;

/// The arena of every secret of the process.
pub(crate) static GLOBAL: Arena = Arena::new();

/// How this process keeps secrets. Decided once, by mapping the first pages: call it before a sandbox closes. Later pages
/// are of the same kind, or there are none.
pub fn protection() -> Result<Protection, SecretError> {
    GLOBAL.protection()
}

/// Maps room for secrets of at least `bytes` in all, each at most [`SecretBuf::MAX`](crate::SecretBuf::MAX), so that making
/// them later needs no system call that a sandbox would have to allow. Beyond it the arena grows with `memfd_secret`,
/// `ftruncate`, `mmap`, `madvise` and `close` (`mmap`, `madvise` and `mlock` in the fallback), and a secret that is
/// larger than 256 KiB is given back with `munmap`.
pub fn reserve(bytes: usize) -> Result<(), SecretError> {
    GLOBAL.reserve(bytes)
}

/// Where secrets lie.
pub(crate) struct Arena {
    state: Mutex<State>,
}

struct State {
    protection: Option<Protection>,
    pools: Vec<Pool>,
}

/// A region and which of its granules are taken.
struct Pool {
    region: Region,
    taken: Vec<u64>,
    used: usize,
    /// No granule below is free.
    low: usize,
}

/// Bytes of an arena that one owner has: zero at first, wiped and given back on drop.
pub(crate) struct Slot {
    start: NonNull<u8>,
    len: usize,
    arena: &'static Arena,
}

impl Arena {
    const fn new() -> Self {
        Self { state: Mutex::new(State { protection: None, pools: Vec::new() }) }
    }

    /// An arena that protects as told, whatever the kernel offers.
    #[cfg(test)]
    pub(crate) fn with_protection(protection: Protection) -> &'static Self {
        let state = State { protection: Some(protection), pools: Vec::new() };
        Box::leak(Box::new(Self { state: Mutex::new(state) }))
    }

    pub(crate) fn protection(&self) -> Result<Protection, SecretError> {
        let mut state = self.lock();
        if state.pools.is_empty() {
            state.grow(REGION)?;
        }
        state.protection()
    }

    pub(crate) fn reserve(&self, bytes: usize) -> Result<(), SecretError> {
        let mut state = self.lock();
        let free: usize = state.pools.iter().map(Pool::free_bytes).sum();
        if free < bytes { state.grow((bytes - free).max(REGION)) } else { Ok(()) }
    }

    /// `len` bytes (1 and more), aligned to `align`, a power of two and at most a page.
    pub(crate) fn allocate(&'static self, len: usize, align: usize) -> Result<Slot, SecretError> {
        let granules = len.div_ceil(GRANULE).max(1);
        let step = align.div_ceil(GRANULE);
        let start = self.lock().take(granules, step)?;
        Ok(Slot { start, len, arena: self })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn protection(&mut self) -> Result<Protection, SecretError> {
        let protection = self.protection.map_or_else(best_protection, Ok)?;
        self.protection = Some(protection);
        Ok(protection)
    }

    fn grow(&mut self, bytes: usize) -> Result<(), SecretError> {
        let protection = self.protection()?;
        let pool = Pool::new(Region::map(bytes, protection)?);
        self.pools.push(pool);
        Ok(())
    }

    fn take(&mut self, granules: usize, step: usize) -> Result<NonNull<u8>, SecretError> {
        if let Some(start) = self.pools.iter_mut().find_map(|p| p.take(granules, step)) {
            return Ok(start);
        }
        self.grow_for(granules * GRANULE)?;
        let fresh = self.pools.last_mut().and_then(|p| p.take(granules, step));
        fresh.ok_or(SecretError::Length(granules * GRANULE))
    }

    /// A further region; where the limit allows no whole one, what this secret needs.
    fn grow_for(&mut self, bytes: usize) -> Result<(), SecretError> {
        match self.grow(bytes.max(REGION)) {
            Err(SecretError::Exhausted { .. }) if bytes.next_multiple_of(page_size()) < REGION => self.grow(bytes),
            other => other,
        }
    }

    fn give_back(&mut self, start: NonNull<u8>, granules: usize) {
        let Some(at) = self.pools.iter().position(|p| p.holds(start)) else { return };
        self.pools[at].give_back(start, granules);
        // A region that one large secret asked for is not kept for the small ones.
        if self.pools[at].used == 0 && self.pools[at].region.len() > REGION {
            self.pools.swap_remove(at);
        }
    }
}

impl Pool {
    fn new(region: Region) -> Self {
        let words = (region.len() / GRANULE).div_ceil(64);
        Self { region, taken: vec![0; words], used: 0, low: 0 }
    }

    fn granules(&self) -> usize {
        self.region.len() / GRANULE
    }

    fn free_bytes(&self) -> usize {
        (self.granules() - self.used) * GRANULE
    }

    fn holds(&self, start: NonNull<u8>) -> bool {
        let first = self.region.start().as_ptr().addr();
        (first..first + self.region.len()).contains(&start.as_ptr().addr())
    }

    /// First fit: the lowest multiple of `step` from which `granules` are free.
    fn take(&mut self, granules: usize, step: usize) -> Option<NonNull<u8>> {
        let mut at = self.low.next_multiple_of(step);
        while at + granules <= self.granules() {
            match (at..at + granules).rev().find(|g| self.is_taken(*g)) {
                None => {
                    self.mark(at, granules, true);
                    // SAFETY: granule `at` lies inside the region, whose len is granules() * GRANULE or more.
                    return Some(unsafe { self.region.start().add(at * GRANULE) });
                }
                Some(blocker) => at = (blocker + 1).next_multiple_of(step),
            }
        }
        None
    }

    fn give_back(&mut self, start: NonNull<u8>, granules: usize) {
        let offset = start.as_ptr().addr() - self.region.start().as_ptr().addr();
        self.mark(offset / GRANULE, granules, false);
    }

    fn is_taken(&self, granule: usize) -> bool {
        self.taken[granule / 64] >> (granule % 64) & 1 == 1
    }

    fn mark(&mut self, at: usize, granules: usize, taken: bool) {
        for granule in at..at + granules {
            debug_assert_ne!(self.is_taken(granule), taken);
            self.taken[granule / 64] ^= 1 << (granule % 64);
        }
        self.used = if taken { self.used + granules } else { self.used - granules };
        self.low = match taken {
            true if at <= self.low => at + granules,
            true => self.low,
            false => self.low.min(at),
        };
    }
}

impl Slot {
    /// Where it starts; valid for [`len`](Self::len) bytes of reads and writes while the slot lives.
    pub(crate) fn start(&self) -> NonNull<u8> {
        self.start
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        // SAFETY: the arena gave start..start + len to this slot alone; it is mapped, readable and initialised (zero at
        // first) while the slot lives, and `&self` keeps writers out.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.len) }
    }

    pub(crate) fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `bytes`, and `&mut self` makes this the only reference.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.len) }
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        wipe(self.bytes_mut());
        self.arena.lock().give_back(self.start, self.len.div_ceil(GRANULE).max(1));
    }
}

// SAFETY: a slot owns its bytes alone, and the arena behind it is locked for every change; reads through `&Slot` only read.
unsafe impl Send for Slot {}
// SAFETY: see above; no method changes anything through `&Slot`.
unsafe impl Sync for Slot {}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn arenas() -> Vec<&'static Arena> {
        crate::attacks::offered().into_iter().map(Arena::with_protection).collect()
    }

    #[test]
    fn the_process_uses_the_best_there_is() {
        assert_eq!(protection().ok(), crate::attacks::offered().first().copied());
    }

    #[test]
    fn keys_share_pages_but_no_cache_line() {
        for arena in arenas() {
            let slots: Vec<Slot> = (0..4096).map(|_| arena.allocate(32, 1).expect("room")).collect();
            let mut starts: Vec<usize> = slots.iter().map(|s| s.start.as_ptr().addr()).collect();
            starts.sort_unstable();
            assert!(starts.windows(2).all(|w| w[1] - w[0] >= GRANULE));
            assert_eq!(arena.lock().pools.len(), 1);
        }
    }

    #[test]
    fn what_is_given_back_is_zero_and_used_again() {
        for arena in arenas() {
            let mut slot = arena.allocate(100, 1).expect("room");
            slot.bytes_mut().fill(0xa5);
            let start = slot.start;
            drop(slot);
            let again = arena.allocate(100, 1).expect("room");
            assert_eq!(again.start, start);
            assert!(again.bytes().iter().all(|b| *b == 0));
        }
    }

    #[test]
    fn a_large_secret_gives_its_region_back() {
        for arena in arenas() {
            let small = arena.allocate(32, 1).expect("room");
            let large = arena.allocate(1 << 20, 4096).expect("room");
            assert_eq!(large.start.as_ptr().addr() % 4096, 0);
            assert_eq!(arena.lock().pools.len(), 2);
            drop(large);
            assert_eq!(arena.lock().pools.len(), 1);
            drop(small);
            assert_eq!(arena.lock().pools.len(), 1);
        }
    }

    #[test]
    fn what_was_reserved_needs_no_further_region() {
        for arena in arenas() {
            arena.reserve(512 * 1024).expect("room");
            let mapped = arena.lock().pools.len();
            let _slots: Vec<Slot> = (0..8192).map(|_| arena.allocate(64, 1).expect("room")).collect();
            assert_eq!(arena.lock().pools.len(), mapped);
        }
    }

    #[test]
    fn threads_get_different_bytes() {
        for arena in arenas() {
            std::thread::scope(|scope| {
                for id in 1..=8_u8 {
                    scope.spawn(move || {
                        for round in 0..200 {
                            let mut slot = arena.allocate(1 + round % 200, 1).expect("room");
                            assert!(slot.bytes().iter().all(|b| *b == 0));
                            slot.bytes_mut().fill(id);
                            std::thread::yield_now();
                            assert!(slot.bytes().iter().all(|b| *b == id));
                        }
                    });
                }
            });
            assert_eq!(arena.lock().pools[0].used, 0);
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]
        #[test]
        fn slots_never_overlap(orders in prop::collection::vec((any::<bool>(), 1_usize..9000, 0_u32..13), 1..120)) {
            let arena = Arena::with_protection(Protection::Mlock);
            let mut held: Vec<(Slot, u8)> = Vec::new();
            for (n, (give_back, len, align)) in orders.into_iter().enumerate() {
                if give_back && !held.is_empty() {
                    held.swap_remove(len % held.len());
                } else {
                    let mut slot = arena.allocate(len, 1 << align).expect("room");
                    prop_assert_eq!(slot.start.as_ptr().addr() % (1 << align), 0);
                    prop_assert!(slot.bytes().iter().all(|b| *b == 0));
                    slot.bytes_mut().fill(n as u8 | 0x80);
                    held.push((slot, n as u8 | 0x80));
                }
            }
            for (slot, mark) in &held {
                prop_assert!(slot.bytes().iter().all(|b| b == mark));
            }
            drop(held);
            prop_assert!(arena.lock().pools.iter().all(|p| p.used == 0));
        }
    }
}
