//! Where things lie, from a volume's size.

use super::page::{BITS, CHILDREN, ENTRIES};
use super::{BLOCK, FormatError};
use crate::VolumeError;
use policy::disk::VolumeSize;
use std::ops::Range;

const MIN_SIZE: u64 = VolumeSize::MIN;
pub(crate) const MAX_SIZE: u64 = VolumeSize::MAX;
/// The longest store that a volume uses, in blocks.
const MAX_TOTAL: u64 = 2 * (MAX_SIZE / BLOCK as u64);
/// The shortest log. Two checkpoints' records and the chunk in hand must fit (see `volume::log`).
const MIN_LOG: u64 = 32;
const MAX_LOG: u64 = 4096;
/// The largest zone, 8 MiB: twice the pages of the largest checkpoint.
const MAX_ZONE: u64 = 2048;
/// Superblocks at each end.
const ENDS: u64 = 2;
/// Blocks kept for pages of key slots and snapshots: as many as the longest lists have, twice.
const SLOT_PAGES: u64 = 2 * (super::slot::MAX_PAGES + super::snapshot::MAX_PAGES) as u64;

/// The extents and trees of one volume.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Geometry {
    /// What the guest sees, in bytes: a multiple of 512.
    pub(crate) size: u64,
    /// Blocks of the store that the volume uses.
    pub(crate) total: u64,
    /// Blocks of the log ring, which begins at block 2.
    pub(crate) log_blocks: u64,
    /// Levels of the map tree, leaves included.
    pub(crate) map_levels: u8,
    /// Levels of the free-space tree, bitmap pages included.
    pub(crate) free_levels: u8,
}

impl Geometry {
    /// The plan of a new volume of `size` bytes, in a store that has at least `store` bytes already (0: as many as needed).
    pub(crate) fn plan(size: u64, store: u64) -> Result<Self, VolumeError> {
        if !(MIN_SIZE..=MAX_SIZE).contains(&size) || !size.is_multiple_of(512) {
            return Err(VolumeError::Size { size, min: MIN_SIZE, max: MAX_SIZE });
        }
        let log_blocks = (size.div_ceil(BLOCK as u64) / 64).clamp(2 * MIN_LOG, MAX_LOG);
        Ok(Self::with_log(size, store, log_blocks))
    }

    /// The plan of this volume, in a store of `store` bytes, when it has `size` bytes: its log stays. It takes all of the store.
    pub(crate) fn grown(&self, size: u64, store: u64) -> Result<Self, VolumeError> {
        if !(self.size..=MAX_SIZE).contains(&size) || !size.is_multiple_of(512) {
            return Err(VolumeError::Size { size, min: self.size, max: MAX_SIZE });
        }
        if size == self.size && store / BLOCK as u64 <= self.total {
            return Ok(*self);
        }
        let grown = Self::with_log(size, store.max(self.total * BLOCK as u64), self.log_blocks);
        Ok(Self { map_levels: grown.map_levels.max(self.map_levels), ..grown })
    }

    /// The plan of this volume when it has `size` bytes, not more than now: all else stays, for its data may lie anywhere in the store,
    /// and its snapshots' maps may need each level.
    pub(crate) fn shrunk(&self, size: u64) -> Result<Self, VolumeError> {
        if !(MIN_SIZE..=self.size).contains(&size) || !size.is_multiple_of(512) {
            return Err(VolumeError::Size { size, min: MIN_SIZE, max: self.size });
        }
        Ok(Self { size, ..*self })
    }

    fn with_log(size: u64, store: u64, log_blocks: u64) -> Self {
        let blocks = size.div_ceil(BLOCK as u64);
        let map_pages = tree_pages(blocks.div_ceil(ENTRIES as u64));
        let mut total = 2 * ENDS + log_blocks + blocks + slack(blocks) + 2 * map_pages + SLOT_PAGES;
        // The bitmap covers itself: a few rounds until its own size no longer changes the total.
        let mut with_bitmap = total;
        for _ in 0..8 {
            let free_pages = tree_pages(with_bitmap.div_ceil(BITS as u64));
            with_bitmap = total + 2 * free_pages + zone(map_pages + free_pages);
        }
        total = with_bitmap.max((store / BLOCK as u64).min(MAX_TOTAL));
        let map_levels = levels(blocks.div_ceil(ENTRIES as u64));
        let free_levels = levels(total.div_ceil(BITS as u64));
        Self { size, total, log_blocks, map_levels, free_levels }
    }

    /// Checks fields that came from a disk against each other.
    pub(crate) fn check(self) -> Result<Self, FormatError> {
        if !(MIN_SIZE..=MAX_SIZE).contains(&self.size) || !self.size.is_multiple_of(512) {
            return Err(FormatError("its size is impossible"));
        }
        if !(MIN_LOG..=MAX_LOG).contains(&self.log_blocks) || self.total > MAX_TOTAL {
            return Err(FormatError("its extents are impossible"));
        }
        let metadata = 2 * ENDS + self.log_blocks + SLOT_PAGES + 2 * self.pages() + zone(self.pages());
        if self.total < metadata + self.blocks() {
            return Err(FormatError("its pool is smaller than its size"));
        }
        // A map may have more levels than it needs: the volume was larger once.
        let map_levels =
            levels(self.blocks().div_ceil(ENTRIES as u64))..=levels(MAX_SIZE.div_ceil((BLOCK * ENTRIES) as u64));
        if !map_levels.contains(&self.map_levels) || self.free_levels != levels(self.total.div_ceil(BITS as u64)) {
            return Err(FormatError("its trees don't fit its size"));
        }
        Ok(self)
    }

    /// Blocks that the guest sees; the last may be cut short.
    pub(crate) fn blocks(&self) -> u64 {
        self.size.div_ceil(BLOCK as u64)
    }

    /// The first block of the log ring.
    pub(crate) fn log_start(&self) -> u64 {
        ENDS
    }

    /// The blocks from which data and pages are allocated.
    pub(crate) fn pool(&self) -> Range<u64> {
        ENDS + self.log_blocks..self.total - ENDS
    }

    /// The first blocks of the pool, which data never takes: the store is asked for their room when the volume is made, so that
    /// pages find room when nothing else does.
    pub(crate) fn zone(&self) -> Range<u64> {
        let start = self.pool().start;
        start..start + zone(self.pages())
    }

    /// How many blocks of the pool data leaves alone, so that a checkpoint that rewrites every page still finds room.
    pub(crate) fn kept_for_pages(&self) -> u64 {
        zone(self.pages()) + self.pages() + SLOT_PAGES
    }

    /// How many blocks of the pool, those of the lists among them, nothing takes for good that can be refused, so that snapshots can be
    /// deleted: for the lists at their longest, and bitmaps, which the map's bounds do not count, each with a new version; and a page for
    /// each level of the map, for going back to a snapshot.
    pub(crate) fn kept_for_good(&self) -> u64 {
        2 * self.free_pages() + SLOT_PAGES + u64::from(self.map_levels)
    }

    /// Blocks that snapshots may hold beyond those of a volume that is full, where they lie side by side.
    pub(crate) fn room(&self) -> u64 {
        let beyond = self.beyond();
        let (mut fits, mut too_many) = (0, beyond + 1);
        while too_many - fits > 1 {
            let middle = fits + (too_many - fits) / 2;
            if with_pages(middle) <= beyond {
                fits = middle;
            } else {
                too_many = middle;
            }
        }
        fits
    }

    /// Blocks beyond those of a volume that is full: but for those that what is written anew takes for a moment.
    fn beyond(&self) -> u64 {
        let pool = self.pool().end - self.pool().start;
        pool.saturating_sub(self.blocks() + self.pages() + self.kept_for_pages() + slack(self.blocks()))
    }

    /// The blocks of the shortest store in which this volume has room for `bytes` of data beyond its size.
    pub(crate) fn with_room(&self, bytes: u64) -> Result<u64, VolumeError> {
        let wanted = with_pages(bytes.div_ceil(BLOCK as u64));
        let mut plan = *self;
        // More blocks need more of the bitmap, which is a part of them.
        while plan.beyond() < wanted {
            let total = plan.total.saturating_add(wanted - plan.beyond());
            if total > MAX_TOTAL {
                let most = MAX_TOTAL.saturating_sub(self.total) * BLOCK as u64;
                return Err(VolumeError::Room { room: bytes, most });
            }
            let free_levels = levels(total.div_ceil(BITS as u64));
            plan = Self { total, free_levels, ..plan };
        }
        Ok(plan.total)
    }

    /// Bitmap pages.
    pub(crate) fn bitmaps(&self) -> u64 {
        self.total.div_ceil(BITS as u64)
    }

    /// Where the two copies of a superblock slot (0 or 1) lie.
    pub(crate) fn superblocks(&self, slot: usize) -> [u64; 2] {
        [slot as u64, self.total - ENDS + slot as u64]
    }

    /// Pages of both trees, if all of them exist.
    pub(crate) fn pages(&self) -> u64 {
        self.map_pages() + self.free_pages()
    }

    /// Pages of the map, if all of them exist.
    pub(crate) fn map_pages(&self) -> u64 {
        let leaves = self.blocks().div_ceil(ENTRIES as u64);
        tree_pages(leaves) + u64::from(self.map_levels.saturating_sub(levels(leaves)))
    }

    fn free_pages(&self) -> u64 {
        tree_pages(self.bitmaps())
    }
}

/// Blocks that data takes for a moment, between a write and the FLUSH that frees what it replaced.
fn slack(blocks: u64) -> u64 {
    (blocks / 128).max(256)
}

/// So many blocks of a snapshot's data, and the pages of its map that lead to them where they lie side by side.
fn with_pages(blocks: u64) -> u64 {
    blocks + tree_pages(blocks.div_ceil(ENTRIES as u64))
}

/// Blocks of the zone of a volume with that many pages.
fn zone(pages: u64) -> u64 {
    (2 * pages).min(MAX_ZONE)
}

/// Levels of a tree with that many leaves.
fn levels(leaves: u64) -> u8 {
    let mut levels = 1;
    let mut pages = leaves;
    while pages > 1 {
        pages = pages.div_ceil(CHILDREN as u64);
        levels += 1;
    }
    levels
}

/// Pages of a whole tree with that many leaves.
fn tree_pages(leaves: u64) -> u64 {
    let mut pages = leaves;
    let mut all = leaves;
    while pages > 1 {
        pages = pages.div_ceil(CHILDREN as u64);
        all += pages;
    }
    all
}

/// Bytes that the store of a volume of `size` bytes has when there is to be room for `room` bytes of data beyond its size: for what
/// snapshots hold that the volume does not any more. [`Volume::create`](crate::Volume::create) makes a store as long as it need be
/// without any, and takes all of a longer one.
///
/// # Errors
/// [`VolumeError::Size`] or [`VolumeError::Room`]: there is no such volume.
pub fn store_size(size: u64, room: u64) -> Result<u64, VolumeError> {
    Ok(Geometry::plan(size, 0)?.with_room(room)? * BLOCK as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_store_is_as_long_as_the_room_needs_and_not_much_longer() {
        for size in [512, 1 << 20, (1 << 30) + 512, 1 << 40] {
            let least = Geometry::plan(size, 0).expect("a size");
            assert_eq!(store_size(size, 0).expect("a size"), least.total * BLOCK as u64);
            for room in [1, 1 << 20, size / 4, size, 3 * size] {
                let store = store_size(size, room).expect("a size");
                let plan = Geometry::plan(size, store).expect("a size");
                assert_eq!((plan.check(), plan.total * BLOCK as u64), (Ok(plan), store));
                assert!(plan.room() * BLOCK as u64 >= room, "{size} {room}");
                assert_eq!(plan.with_room(plan.room() * BLOCK as u64).expect("as it is"), plan.total);
                let pages = room / 50 + (1 << 20);
                assert!(store <= (least.total * BLOCK as u64) + room + pages, "{size} {room} {store}");
                let widened = least.grown(size, store).expect("a size");
                assert_eq!((widened.size, widened.total, widened.check()), (size, plan.total, Ok(widened)));
            }
        }
        for (size, room) in [(1 << 50, 1 << 51), (512, u64::MAX)] {
            assert!(matches!(store_size(size, room), Err(VolumeError::Room { .. })));
        }
        assert!(matches!(store_size(513, 0), Err(VolumeError::Size { .. })));
        let endless = Geometry::plan(1 << 50, u64::MAX).expect("a size");
        assert_eq!(endless.check(), Ok(endless));
    }

    #[test]
    fn every_plan_holds_its_data_and_passes_its_own_check() {
        for size in [512, 4096, 4608, 1 << 20, 16 << 20, (1 << 30) + 512, 1 << 40, 1 << 50] {
            let plan = Geometry::plan(size, 0).expect("a size");
            assert_eq!(plan.check(), Ok(plan));
            let pool = plan.pool().end - plan.pool().start;
            assert!(pool >= plan.blocks() + plan.pages() + plan.kept_for_pages() + 256, "{plan:?}");
            assert!(plan.total * BLOCK as u64 <= size + size / 20 + (12 << 20), "{plan:?}");
        }
        let device = Geometry::plan(1 << 20, 1 << 30).expect("a size");
        assert_eq!(device.total, 1 << 18);
        assert_eq!(device.check(), Ok(device));
    }

    #[test]
    fn a_volume_that_shrinks_and_grows_keeps_its_store_and_its_levels() {
        let large = Geometry::plan(1 << 40, 0).expect("a size");
        let small = large.shrunk(512).expect("a size");
        assert_eq!(small.check(), Ok(small));
        assert_eq!((small.size, small.total, small.map_levels), (512, large.total, large.map_levels));
        assert_eq!(small.superblocks(1), large.superblocks(1));
        let again = small.grown(1 << 20, small.total * BLOCK as u64).expect("a size");
        assert_eq!(again.check(), Ok(again));
        assert_eq!((again.total, again.map_levels), (large.total, large.map_levels));
        assert_eq!(small.grown(1 << 40, small.total * BLOCK as u64).expect("a size"), large);
        for size in [0, 513, (1 << 40) + 512] {
            assert!(matches!(large.shrunk(size), Err(VolumeError::Size { .. })), "{size}");
        }
        for levels in [large.map_levels - 1, 8] {
            assert!(Geometry { map_levels: levels, ..large }.check().is_err(), "{levels}");
        }
    }

    #[test]
    fn impossible_sizes_are_refused() {
        for size in [0, 511, 513, (1 << 50) + 512, u64::MAX] {
            assert!(matches!(Geometry::plan(size, 0), Err(VolumeError::Size { .. })), "{size}");
        }
    }
}
