//! Where a volume lies: bytes at offsets, hostile as far as the engine is concerned.

use crate::VolumeError;
use crate::lock::lock;
use crate::uring::Ring;
use rustix::fs::{
    Advice, AtFlags, FallocateFlags, FileType, OFlags, StatxFlags, fadvise, fcntl_getfl, fcntl_setfl, statx,
};
use rustix::io::{Errno, ReadWriteFlags, preadv2};
use std::cell::Cell;
use std::fs::File;
use std::io::{self, IoSliceMut};
use std::num::NonZeroU64;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// Bytes at offsets. Nothing it returns is trusted; what [`sync_data`](Self::sync_data) acknowledged is hoped to be durable.
pub trait Store: Send + Sync {
    /// Its length in bytes.
    fn len(&self) -> io::Result<u64>;

    /// Whether it holds nothing at all.
    fn is_empty(&self) -> io::Result<bool> {
        Ok(self.len()? == 0)
    }

    /// Fills `buffer` from `offset`; an error where the store ends before.
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()>;

    /// Fills several buffers, each from its offset; an error where one can't be filled. What has to be fetched is fetched at the same
    /// time, where the store can do that.
    fn read_many_at(&self, parts: &mut [(u64, &mut [u8])]) -> io::Result<()> {
        parts.iter_mut().try_for_each(|(offset, buffer)| self.read_at(buffer, *offset))
    }

    /// Writes all of `bytes` at `offset`. Durable only after [`sync_data`](Self::sync_data).
    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()>;

    /// Writes several pieces, each at its offset, as [`write_at`](Self::write_at) does: at the same time, where the store can do that. After
    /// an error any of them may have been written.
    fn write_many_at(&self, parts: &[(u64, &[u8])]) -> io::Result<()> {
        parts.iter().try_for_each(|(offset, bytes)| self.write_at(bytes, *offset))
    }

    /// Whether transfers go on while something else is computed, so that it pays to hand it many in lots.
    fn overlaps(&self) -> bool {
        false
    }

    /// As [`read_many_at`](Self::read_many_at), but gives `ready` each lot of parts when they are filled, in order: those of later lots
    /// may still be under way then. A lot goes from the end of the one before it to its own in `ends`, which rise to the number of parts.
    /// After an error no later lot is given.
    fn read_lots_at(&self, parts: &mut [(u64, &mut [u8])], ends: &[usize], ready: &mut Ready) -> io::Result<()> {
        read_at_once(self, parts, ends, ready)
    }

    /// As [`write_many_at`](Self::write_many_at), but takes pieces in lots, and asks `next` for more, until it has none, while those before
    /// may be under way.
    fn write_lots_at<'a>(&self, next: &mut Next<'a, '_>) -> io::Result<()> {
        write_in_turn(self, next)
    }

    /// Returns when everything written before is durable.
    fn sync_data(&self) -> io::Result<()>;

    /// What is read from now on is what the store itself holds: after an fdatasync that failed, kernels keep what they could not write,
    /// show it to readers, and call it durable. Where the store can't do that, it does nothing.
    fn drop_cached(&self) -> io::Result<()> {
        Ok(())
    }

    /// Makes it `bytes` long. A store whose length is given (a block device) must have as many, and keeps the rest.
    fn set_len(&self, bytes: u64) -> io::Result<()>;

    /// Sees to it that later writes to these bytes find room. Where the store can't promise that, it does nothing.
    fn reserve(&self, offset: u64, bytes: u64) -> io::Result<()> {
        let _ = (offset, bytes);
        Ok(())
    }

    /// Gives these bytes' room back: they read as anything until they are written again. Where the store can't do that, it does
    /// nothing.
    fn punch(&self, offset: u64, bytes: u64) -> io::Result<()> {
        let _ = (offset, bytes);
        Ok(())
    }
}

/// Is given a lot's parts: from which offset each was read, and what.
pub type Ready<'r> = dyn FnMut(&mut [(u64, &mut [u8])]) + 'r;

/// Gives the next lot of parts: at which offset each is written, and what.
pub type Next<'a, 'n> = dyn FnMut() -> Option<Vec<(u64, &'a [u8])>> + 'n;

fn read_at_once<S: Store + ?Sized>(
    store: &S,
    parts: &mut [(u64, &mut [u8])],
    ends: &[usize],
    ready: &mut Ready,
) -> io::Result<()> {
    store.read_many_at(parts)?;
    let mut start = 0;
    for end in ends {
        ready(&mut parts[start..*end]);
        start = *end;
    }
    Ok(())
}

fn write_in_turn<'a, S: Store + ?Sized>(store: &S, next: &mut Next<'a, '_>) -> io::Result<()> {
    while let Some(parts) = next() {
        store.write_many_at(&parts)?;
    }
    Ok(())
}

impl<S: Store + ?Sized> Store for Arc<S> {
    fn len(&self) -> io::Result<u64> {
        (**self).len()
    }
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        (**self).read_at(buffer, offset)
    }
    fn read_many_at(&self, parts: &mut [(u64, &mut [u8])]) -> io::Result<()> {
        (**self).read_many_at(parts)
    }
    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        (**self).write_at(bytes, offset)
    }
    fn write_many_at(&self, parts: &[(u64, &[u8])]) -> io::Result<()> {
        (**self).write_many_at(parts)
    }
    fn overlaps(&self) -> bool {
        (**self).overlaps()
    }
    fn read_lots_at(&self, parts: &mut [(u64, &mut [u8])], ends: &[usize], ready: &mut Ready) -> io::Result<()> {
        (**self).read_lots_at(parts, ends, ready)
    }
    fn write_lots_at<'a>(&self, next: &mut Next<'a, '_>) -> io::Result<()> {
        (**self).write_lots_at(next)
    }
    fn sync_data(&self) -> io::Result<()> {
        (**self).sync_data()
    }
    fn drop_cached(&self) -> io::Result<()> {
        (**self).drop_cached()
    }
    fn set_len(&self, bytes: u64) -> io::Result<()> {
        (**self).set_len(bytes)
    }
    fn reserve(&self, offset: u64, bytes: u64) -> io::Result<()> {
        (**self).reserve(offset, bytes)
    }
    fn punch(&self, offset: u64, bytes: u64) -> io::Result<()> {
        (**self).punch(offset, bytes)
    }
}

/// A file or a block device, locked with flock(2) for as long as this lives: for writing by one process, for reading by
/// several.
///
/// System calls after the constructor: fstat, lseek, pread64, preadv2, fadvise64, pwrite64, fdatasync, fallocate; ftruncate
/// where a volume is created; and past the page cache io_uring_setup, mmap, munmap, io_uring_enter, close, without which several
/// transfers follow each other.
pub struct FileStore {
    file: File,
    device: bool,
    /// Past the page cache.
    direct: bool,
    /// Where several transfers are under way at once: as many as there were calls at the same time. Nothing where the kernel gives none.
    rings: Mutex<Option<Vec<Ring>>>,
    /// It can't say what it would have to fetch (RWF_NOWAIT): tmpfs, which fetches nothing, and some network file systems.
    unsaid: AtomicBool,
}

/// What O_DIRECT may ask for at most: that buffers in memory, offsets and lengths are multiples of this.
const ALIGN: usize = 4096;
/// Bytes that a buffer which lies badly is copied through at a time.
const BOUNCE: usize = 256 << 10;

thread_local! {
    /// Where they are copied.
    static BOUNCED: Cell<Vec<u8>> = const { Cell::new(Vec::new()) };
}

impl FileStore {
    /// `file`, open for reading and writing, for this process alone. [`VolumeError::Busy`] if another has it, and keeps it for two
    /// seconds more.
    pub fn exclusive(file: File) -> Result<Self, VolumeError> {
        Self::locked(file, false)
    }

    /// `file`, open for reading at least, beside other readers. [`VolumeError::Busy`] if a writer has it, and keeps it for two
    /// seconds more.
    pub fn shared(file: File) -> Result<Self, VolumeError> {
        Self::locked(file, true)
    }

    /// Reads and writes past the page cache from now on (O_DIRECT): each waits for the device, and what is read is what the device
    /// holds now, whoever else writes to it. [`VolumeError::Store`] where the file system or device can't do that for blocks of
    /// 4096 bytes. Buffers that begin at multiples of 4096 bytes are not copied.
    pub fn direct(self) -> Result<Self, VolumeError> {
        let refused = |e: Errno| VolumeError::Store("be used past the page cache (O_DIRECT)", e.into());
        let flags = fcntl_getfl(&self.file).map_err(refused)?;
        fcntl_setfl(&self.file, flags | OFlags::DIRECT).map_err(refused)?;
        let known = statx(&self.file, c"", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN).map_err(refused)?;
        // Kernels before 6.1 don't say.
        if known.stx_mask & StatxFlags::DIOALIGN.bits() != 0 {
            let (memory, offset) = (known.stx_dio_mem_align as usize, known.stx_dio_offset_align as usize);
            if offset == 0 || !ALIGN.is_multiple_of(offset) || memory == 0 || !ALIGN.is_multiple_of(memory) {
                return Err(refused(Errno::OPNOTSUPP));
            }
        }
        Ok(Self { direct: true, ..self })
    }

    /// Whether a transfer must go through memory that lies better.
    fn bounces(&self, buffer: &[u8]) -> bool {
        self.direct && buffer.as_ptr().align_offset(ALIGN) != 0
    }

    fn locked(file: File, shared: bool) -> Result<Self, VolumeError> {
        let kind = rustix::fs::fstat(&file).map_err(|e| VolumeError::Store("say what it is", e.into()))?.st_mode;
        let device = match FileType::from_raw_mode(kind) {
            FileType::RegularFile => false,
            FileType::BlockDevice => true,
            _ => return Err(VolumeError::NotAVolume),
        };
        lock(&file, shared).map_err(|error| match error.kind() {
            io::ErrorKind::WouldBlock => VolumeError::Busy,
            _ => VolumeError::Store("be locked", error),
        })?;
        Ok(Self { file, device, direct: false, rings: Mutex::new(Some(vec![])), unsaid: AtomicBool::new(false) })
    }
}

impl FileStore {
    /// Does `f` with a ring of its own, if there is one to be had.
    fn with_ring(&self, f: impl FnOnce(&mut Ring) -> io::Result<()>) -> Option<io::Result<()>> {
        let rings = || self.rings.lock().unwrap_or_else(PoisonError::into_inner);
        let idle = rings().as_mut()?.pop();
        let mut ring = match idle.map_or_else(Ring::new, Ok) {
            Ok(ring) => ring,
            Err(_) => {
                *rings() = None;
                return None;
            }
        };
        let done = f(&mut ring);
        if let Some(rings) = rings().as_mut() {
            rings.push(ring);
        }
        Some(done)
    }

    /// Nothing, and nothing was done, where the page cache is used, the kernel gives no ring, or buffers lie badly.
    fn read_in_flight(
        &self,
        parts: &mut [(u64, &mut [u8])],
        ends: &[usize],
        ready: &mut Ready,
    ) -> Option<io::Result<()>> {
        if !self.direct || parts.iter().any(|(_, buffer)| self.bounces(buffer)) {
            return None;
        }
        self.with_ring(|ring| ring.read(&self.file, parts, ends, ready))
    }

    /// Nothing, and nothing was done, where the page cache is used, or the kernel gives no ring. What lies badly is written before its lot.
    fn write_in_flight<'a>(&self, next: &mut Next<'a, '_>) -> Option<io::Result<()>> {
        if !self.direct {
            return None;
        }
        self.with_ring(|ring| {
            let mut done = Ok(());
            let written = ring.write(&self.file, &mut || {
                let mut parts = next()?;
                let mut badly = parts.extract_if(.., |(_, bytes)| self.bounces(bytes));
                done = badly.try_for_each(|(offset, bytes)| self.write_at(bytes, offset));
                drop(badly);
                done.is_ok().then_some(parts)
            });
            done.and(written)
        })
    }

    /// Whether all of it was there without waiting.
    fn read_cached(&self, buffer: &mut [u8], offset: u64) -> bool {
        let length = buffer.len();
        match preadv2(&self.file, &mut [IoSliceMut::new(buffer)], offset, ReadWriteFlags::NOWAIT) {
            Ok(read) => read == length,
            Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL) => {
                self.unsaid.store(true, Ordering::Relaxed);
                false
            }
            Err(_) => false,
        }
    }
}

impl Store for FileStore {
    fn len(&self) -> io::Result<u64> {
        if self.device {
            Ok(rustix::fs::seek(&self.file, rustix::fs::SeekFrom::End(0))?)
        } else {
            Ok(self.file.metadata()?.len())
        }
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        if !self.bounces(buffer) {
            return self.file.read_exact_at(buffer, offset);
        }
        bounced(|room| {
            for (at, piece) in (offset..).step_by(BOUNCE).zip(buffer.chunks_mut(BOUNCE)) {
                let room = &mut room[..piece.len()];
                self.file.read_exact_at(room, at)?;
                piece.copy_from_slice(room);
            }
            Ok(())
        })
    }

    /// The device has all of them in hand together. What the kernel has is taken at once; the rest it is told of before the first of them
    /// is waited for, or, past the page cache, given to an io_uring.
    fn read_many_at(&self, parts: &mut [(u64, &mut [u8])]) -> io::Result<()> {
        if parts.len() > 1
            && let Some(done) = self.read_in_flight(parts, &[parts.len()], &mut |_| {})
        {
            return done;
        }
        if parts.len() == 1 || self.direct || self.unsaid.load(Ordering::Relaxed) {
            return parts.iter_mut().try_for_each(|(offset, buffer)| self.read_at(buffer, *offset));
        }
        let mut missing = Vec::new();
        for (offset, buffer) in parts {
            if !self.read_cached(buffer, *offset) {
                missing.push((*offset, &mut **buffer));
            }
        }
        if missing.len() > 1 {
            for (offset, buffer) in &missing {
                // Advice: whoever does not take it reads one after the other.
                let _ = fadvise(&self.file, *offset, NonZeroU64::new(buffer.len() as u64), Advice::WillNeed);
            }
        }
        missing.iter_mut().try_for_each(|(offset, buffer)| self.read_at(buffer, *offset))
    }

    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        if !self.bounces(bytes) {
            return self.file.write_all_at(bytes, offset);
        }
        bounced(|room| {
            for (at, piece) in (offset..).step_by(BOUNCE).zip(bytes.chunks(BOUNCE)) {
                let room = &mut room[..piece.len()];
                room.copy_from_slice(piece);
                self.file.write_all_at(room, at)?;
            }
            Ok(())
        })
    }

    fn write_many_at(&self, parts: &[(u64, &[u8])]) -> io::Result<()> {
        let mut lot = (parts.len() > 1).then(|| parts.to_vec());
        if lot.is_some()
            && let Some(done) = self.write_in_flight(&mut || lot.take())
        {
            return done;
        }
        parts.iter().try_for_each(|(offset, bytes)| self.write_at(bytes, *offset))
    }

    fn overlaps(&self) -> bool {
        self.direct && self.rings.lock().unwrap_or_else(PoisonError::into_inner).is_some()
    }

    fn read_lots_at(&self, parts: &mut [(u64, &mut [u8])], ends: &[usize], ready: &mut Ready) -> io::Result<()> {
        match self.read_in_flight(parts, ends, ready) {
            Some(done) => done,
            None => read_at_once(self, parts, ends, ready),
        }
    }

    fn write_lots_at<'a>(&self, next: &mut Next<'a, '_>) -> io::Result<()> {
        self.write_in_flight(next).unwrap_or_else(|| write_in_turn(self, next))
    }

    fn sync_data(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    fn drop_cached(&self) -> io::Result<()> {
        Ok(fadvise(&self.file, 0, None, Advice::DontNeed)?)
    }

    fn set_len(&self, bytes: u64) -> io::Result<()> {
        match self.device {
            true if self.len()? < bytes => Err(io::ErrorKind::StorageFull.into()),
            true => Ok(()),
            false => self.file.set_len(bytes),
        }
    }

    fn reserve(&self, offset: u64, bytes: u64) -> io::Result<()> {
        if self.device {
            return Ok(());
        }
        match rustix::fs::fallocate(&self.file, FallocateFlags::empty(), offset, bytes) {
            Err(Errno::OPNOTSUPP | Errno::NOSYS) => Ok(()),
            other => Ok(other?),
        }
    }

    fn punch(&self, offset: u64, bytes: u64) -> io::Result<()> {
        // On a block device this is a discard that leaves zeroes.
        let how = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        match rustix::fs::fallocate(&self.file, how, offset, bytes) {
            Err(Errno::OPNOTSUPP | Errno::NOSYS) => Ok(()),
            other => Ok(other?),
        }
    }
}

/// Gives `f` [`BOUNCE`] bytes of memory that begin where O_DIRECT wants them.
fn bounced(f: impl FnOnce(&mut [u8]) -> io::Result<()>) -> io::Result<()> {
    let mut memory = BOUNCED.take();
    memory.resize(BOUNCE + ALIGN, 0);
    let start = memory.as_ptr().align_offset(ALIGN).min(ALIGN);
    let done = f(&mut memory[start..start + BOUNCE]);
    BOUNCED.set(memory);
    done
}

/// Bytes in memory, gone with it: for tests.
#[derive(Default)]
pub struct MemoryStore(Mutex<Vec<u8>>);

impl MemoryStore {
    /// A store that holds `bytes`.
    pub fn of(bytes: Vec<u8>) -> Self {
        Self(Mutex::new(bytes))
    }

    /// What it holds now.
    pub fn bytes(&self) -> Vec<u8> {
        self.held().clone()
    }

    fn held(&self) -> std::sync::MutexGuard<'_, Vec<u8>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Store for MemoryStore {
    fn len(&self) -> io::Result<u64> {
        Ok(self.held().len() as u64)
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        let held = self.held();
        buffer.copy_from_slice(held.get(range(offset, buffer.len())).ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }

    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        let mut held = self.held();
        held.get_mut(range(offset, bytes.len())).ok_or(io::ErrorKind::StorageFull)?.copy_from_slice(bytes);
        Ok(())
    }

    fn sync_data(&self) -> io::Result<()> {
        Ok(())
    }

    fn set_len(&self, bytes: u64) -> io::Result<()> {
        self.held().resize(usize::try_from(bytes).map_err(|_| io::ErrorKind::StorageFull)?, 0);
        Ok(())
    }
}

fn range(offset: u64, length: usize) -> std::ops::Range<usize> {
    let start = usize::try_from(offset).unwrap_or(usize::MAX);
    start..start.saturating_add(length)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_has_one_writer_or_many_readers() {
        let folder = tempfile::tempdir().expect("a folder");
        let open = || {
            let mut options = File::options();
            options.read(true).write(true).create(true).truncate(false);
            options.open(folder.path().join("v")).expect("a file")
        };
        let writer = FileStore::exclusive(open()).expect("free");
        assert!(matches!(FileStore::exclusive(open()), Err(VolumeError::Busy)));
        assert!(matches!(FileStore::shared(open()), Err(VolumeError::Busy)));
        drop(writer);
        let reader = FileStore::shared(open()).expect("free");
        let second = FileStore::shared(open()).expect("readers share");
        assert!(matches!(FileStore::exclusive(open()), Err(VolumeError::Busy)));
        drop((reader, second));
        FileStore::exclusive(open()).expect("free again");
    }

    /// On whatever disk the working folder is.
    #[test]
    fn past_the_page_cache_buffers_may_lie_anywhere() {
        let file = tempfile::tempfile_in(".").expect("a file");
        file.set_len(1 << 20).expect("room");
        let store = match FileStore::exclusive(file).expect("free").direct() {
            Ok(store) => store,
            Err(error) => return assert!(matches!(error, VolumeError::Store(..)), "{error}"),
        };
        assert!(fcntl_getfl(&store.file).expect("flags").contains(OFlags::DIRECT));
        let bytes: Vec<u8> = (0..3 * BOUNCE + 4096).map(|i| (i / 5) as u8).collect();
        for shift in [0, 1, 512] {
            let mut space = vec![0; bytes.len() + 2 * ALIGN];
            let start = space.as_ptr().align_offset(ALIGN) + shift;
            space[start..start + bytes.len()].copy_from_slice(&bytes);
            store.write_at(&space[start..start + bytes.len()], 8192).expect("written");
            space.fill(0);
            store.read_at(&mut space[start..start + bytes.len()], 8192).expect("read");
            assert!(space[start..start + bytes.len()] == bytes, "{shift}");
            let (one, two) = space.split_at_mut(start + 4096);
            let mut parts: [(u64, &mut [u8]); 2] = [(8192 + 4096, &mut one[start..]), (8192, &mut two[..4096])];
            store.read_many_at(&mut parts).expect("read");
            assert!(one[start..] == bytes[4096..8192] && two[..4096] == bytes[..4096]);
        }
        store.sync_data().expect("synced");
    }

    /// With and without an io_uring.
    #[test]
    fn past_the_page_cache_several_transfers_are_under_way_at_once() {
        let file = tempfile::tempfile_in(".").expect("a file");
        file.set_len(2 << 20).expect("room");
        let Ok(store) = FileStore::exclusive(file).expect("free").direct() else { return };
        for ringless in [false, true] {
            if ringless {
                *store.rings.lock().expect("whole") = None;
            }
            // More than a ring holds, in no order, every other block.
            let at = |i: usize| (i * 37 % 100) as u64 * 8192;
            let mut space = vec![0; 101 * ALIGN];
            let start = space.as_ptr().align_offset(ALIGN);
            let blocks = &mut space[start..start + 100 * ALIGN];
            blocks.iter_mut().enumerate().for_each(|(i, byte)| *byte = (i / 11) as u8 ^ u8::from(ringless));
            let expected = blocks.to_vec();
            let parts: Vec<(u64, &[u8])> = (0..).map(at).zip(blocks.chunks(ALIGN)).collect();
            store.write_many_at(&parts).expect("written");
            blocks.fill(0);
            let mut parts: Vec<(u64, &mut [u8])> = (0..).map(at).zip(blocks.chunks_mut(ALIGN)).collect();
            store.read_many_at(&mut parts).expect("read");
            assert!(blocks == expected);
            for (i, block) in expected.chunks(ALIGN).enumerate() {
                let mut found = vec![0; ALIGN];
                store.read_at(&mut found, at(i)).expect("read");
                assert!(found == block, "{i}");
            }
            // One of them can't be: the others are not taken for bad, and it not for good.
            let mut parts: Vec<(u64, &mut [u8])> =
                [0, 2 << 20, 8192].into_iter().zip(blocks.chunks_mut(ALIGN)).collect();
            assert!(store.read_many_at(&mut parts).is_err());
        }
        let rings = store.rings.lock().expect("whole");
        assert!(rings.is_none(), "none is made where there is none to be had");
    }

    /// With and without an io_uring.
    #[test]
    fn past_the_page_cache_lots_are_worked_on_while_others_are_under_way() {
        const LOTS: [usize; 4] = [30, 31, 60, 100];
        let file = tempfile::tempfile_in(".").expect("a file");
        file.set_len(1 << 20).expect("room");
        let Ok(store) = FileStore::exclusive(file).expect("free").direct() else { return };
        for ringless in [false, true] {
            if ringless {
                *store.rings.lock().expect("whole") = None;
            }
            assert_eq!(store.overlaps(), !ringless);
            let at = |i: usize| (i * 37 % 100) as u64 * 8192;
            let mut space = vec![0; 102 * ALIGN];
            let start = space.as_ptr().align_offset(ALIGN);
            let (blocks, badly) = space[start..start + 101 * ALIGN].split_at_mut(100 * ALIGN);
            blocks.iter_mut().enumerate().for_each(|(i, byte)| *byte = (i / 13) as u8 ^ u8::from(ringless));
            let expected = blocks.to_vec();
            // The last block of all lies badly in memory.
            badly[8..8 + 512].copy_from_slice(&blocks[99 * ALIGN..][..512]);
            let parts: Vec<(u64, &[u8])> = (0..).map(at).zip(blocks.chunks(ALIGN)).collect();
            let mut lots = vec![parts[31..].to_vec(), vec![], parts[30..31].to_vec(), parts[..30].to_vec()];
            store.write_lots_at(&mut || lots.pop()).expect("written");
            let mut lots = vec![vec![(at(99), &badly[8..8 + 512]), (at(0), &blocks[..ALIGN])]];
            store.write_lots_at(&mut || lots.pop()).expect("written");
            drop(lots);
            blocks.fill(0);
            let mut parts: Vec<(u64, &mut [u8])> = (0..).map(at).zip(blocks.chunks_mut(ALIGN)).collect();
            let read = |parts: &mut [(u64, &mut [u8])], ends: &[usize]| {
                let mut seen = 0;
                let done = store.read_lots_at(parts, ends, &mut |lot| {
                    for (_, block) in &*lot {
                        assert!(**block == expected[seen * ALIGN..][..ALIGN], "{seen}");
                        seen += 1;
                    }
                });
                (done.is_ok(), seen)
            };
            assert_eq!(read(&mut parts, &LOTS), (true, 100));
            // A later lot can't be read: it is not given, nor is what comes behind it.
            parts[60].0 = 1 << 20;
            assert_eq!(read(&mut parts, &LOTS), (false, if ringless { 0 } else { 60 }));
            // Whoever fails in the middle leaves nothing under way.
            let unwound = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
                store.read_lots_at(&mut parts[..60], &LOTS[..3], &mut |_| panic!("on purpose"))
            }));
            assert!(unwound.is_err());
            assert_eq!(read(&mut parts[..60], &LOTS[..3]), (true, 60));
        }
    }

    #[test]
    fn several_parts_are_read_as_each_alone_and_an_end_is_an_error() {
        let file = tempfile::tempfile().expect("a file");
        let bytes: Vec<u8> = (0..64 * 1024_u32).map(|i| (i / 7) as u8).collect();
        file.write_all_at(&bytes, 0).expect("room");
        file.sync_all().expect("synced");
        let store = FileStore::exclusive(file).expect("free");
        for forget in [false, true] {
            if forget {
                fadvise(&store.file, 0, None, Advice::DontNeed).expect("advice");
            }
            let mut found = vec![0; 3 * 4096];
            let mut parts: Vec<(u64, &mut [u8])> =
                [8192, 60 * 1024, 0].into_iter().zip(found.chunks_mut(4096)).collect();
            store.read_many_at(&mut parts).expect("read");
            assert!(found == [&bytes[8192..12288], &bytes[60 * 1024..], &bytes[..4096]].concat());
            let mut parts: Vec<(u64, &mut [u8])> = [0, 62 * 1024].into_iter().zip(found.chunks_mut(4096)).collect();
            assert!(store.read_many_at(&mut parts).is_err());
        }
    }

    #[test]
    fn what_is_neither_file_nor_device_is_refused() {
        let null = File::options().read(true).write(true).open("/dev/null").expect("opens");
        assert!(matches!(FileStore::exclusive(null), Err(VolumeError::NotAVolume)));
    }
}
