//! A volume's file or block device, through the page cache or past it.

use super::bounce::{self, ALIGN};
use super::lock::lock;
use super::uring::Rings;
use super::{Next, Ready, Store, read_at_once, write_in_turn};
use crate::VolumeError;
use rustix::fs::{
    Advice, AtFlags, FallocateFlags, FileType, OFlags, StatxFlags, fadvise, fcntl_getfl, fcntl_setfl, statx,
};
use rustix::io::{Errno, ReadWriteFlags, preadv2};
use std::fs::File;
use std::io::{self, IoSliceMut};
use std::num::NonZeroU64;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering};

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
    /// Where several transfers are under way at once.
    rings: Rings,
    /// It can't say what it would have to fetch (RWF_NOWAIT): tmpfs, which fetches nothing, and some network file systems.
    unsaid: AtomicBool,
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
        self.direct && !bounce::lies_well(buffer)
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
        Ok(Self { file, device, direct: false, rings: Rings::new(), unsaid: AtomicBool::new(false) })
    }
}

impl FileStore {
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
        self.rings.with_one(|ring| ring.read(&self.file, parts, ends, ready))
    }

    /// Nothing, and nothing was done, where the page cache is used, or the kernel gives no ring. What lies badly is written before its lot.
    fn write_in_flight<'a>(&self, next: &mut Next<'a, '_>) -> Option<io::Result<()>> {
        if !self.direct {
            return None;
        }
        self.rings.with_one(|ring| {
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
        match self.bounces(buffer) {
            true => bounce::read(&self.file, buffer, offset),
            false => self.file.read_exact_at(buffer, offset),
        }
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
        match self.bounces(bytes) {
            true => bounce::write(&self.file, bytes, offset),
            false => self.file.write_all_at(bytes, offset),
        }
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
        self.direct && self.rings.any()
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

#[cfg(test)]
mod tests {
    use super::super::bounce::BOUNCE;
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
        let Ok(mut store) = FileStore::exclusive(file).expect("free").direct() else { return };
        for ringless in [false, true] {
            if ringless {
                store.rings = Rings::none();
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
        assert!(!store.rings.any(), "none is made where there is none to be had");
    }

    /// With and without an io_uring.
    #[test]
    fn past_the_page_cache_lots_are_worked_on_while_others_are_under_way() {
        const LOTS: [usize; 4] = [30, 31, 60, 100];
        let file = tempfile::tempfile_in(".").expect("a file");
        file.set_len(1 << 20).expect("room");
        let Ok(mut store) = FileStore::exclusive(file).expect("free").direct() else { return };
        for ringless in [false, true] {
            if ringless {
                store.rings = Rings::none();
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
