//! A raw image or a block device, for unprotected machines.

use super::disk::{Disk, DiskError};
use super::uring::DiskRing;
use crate::machine::sync::lock;
use rustix::fs::{FallocateFlags, fallocate};
use rustix::io::Errno;
use std::fs::File;
use std::io::{Seek, SeekFrom};
use std::os::unix::fs::FileExt;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use vmm_sys_util::eventfd::EventFd;

/// A raw disk.
pub struct RawDisk {
    file: File,
    size: AtomicU64,
    id: [u8; 20],
    rings: Mutex<Vec<(DiskRing, EventFd)>>,
}

impl RawDisk {
    /// The disk in `file`; `name`, cut to 20 bytes, is its serial number. One thread for each queue does one request after the
    /// other, until [`with_rings`](Self::with_rings).
    pub fn new(file: File, name: &str) -> std::io::Result<Self> {
        let size = AtomicU64::new(size_of(&file)?);
        Ok(Self { file, size, id: serial_number(name), rings: Mutex::default() })
    }

    /// Makes an io_uring for each of `queues` queues of `depth` entries: to be called before the sandbox closes, which makes
    /// none. Where the kernel has none for this process the disk stays as it was, and the error says why.
    pub fn with_rings(self, queues: u16, depth: u16) -> (Self, std::io::Result<()>) {
        let rings: std::io::Result<Vec<_>> = (0..queues).map(|_| DiskRing::open(&self.file, depth)).collect();
        let made = rings.map(|rings| *lock(&self.rings) = rings);
        (self, made)
    }
}

/// A serial number as the guest reads it: `text`'s ASCII characters, cut to 20 bytes.
pub fn serial_number(text: &str) -> [u8; 20] {
    let mut id = [0; 20];
    id.iter_mut().zip(text.bytes().filter(u8::is_ascii)).for_each(|(to, from)| *to = from);
    id
}

impl Disk for RawDisk {
    fn size(&self) -> u64 {
        self.size.load(Ordering::Relaxed)
    }

    fn read(&self, offset: u64, data: &mut [u8]) -> Result<(), DiskError> {
        self.file.read_exact_at(data, offset).map_err(io)
    }

    fn write(&self, offset: u64, data: &[u8]) -> Result<(), DiskError> {
        self.file.write_all_at(data, offset).map_err(io)
    }

    fn flush(&self) -> Result<(), DiskError> {
        self.file.sync_data().map_err(io)
    }

    fn id(&self) -> [u8; 20] {
        self.id
    }

    fn can_discard(&self) -> bool {
        true
    }

    fn discard(&self, offset: u64, length: u64) -> Result<(), DiskError> {
        match self.allocate(HOLE, offset, length) {
            // A store that can't, or not at this place, loses nothing by it.
            Err(Errno::OPNOTSUPP | Errno::INVAL) => Ok(()),
            answer => answer.map_err(|e| io(e.into())),
        }
    }

    fn write_zeroes(&self, offset: u64, length: u64, may_unmap: bool) -> Result<(), DiskError> {
        if may_unmap && self.allocate(HOLE, offset, length).is_ok() {
            return Ok(());
        }
        match self.allocate(ZEROES, offset, length) {
            // The guest then writes them itself: requests of its own, which a pause waits for and a rate limit counts.
            Err(Errno::OPNOTSUPP | Errno::INVAL) => Err(DiskError::Unsupported),
            answer => answer.map_err(|e| io(e.into())),
        }
    }

    fn look_again(&self) {
        if let Ok(size) = size_of(&self.file) {
            self.size.store(size, Ordering::Relaxed);
        }
    }

    fn rings(&self) -> Vec<(DiskRing, EventFd)> {
        std::mem::take(&mut *lock(&self.rings))
    }
}

/// A hole, which reads as zeroes.
const HOLE: FallocateFlags = FallocateFlags::PUNCH_HOLE.union(FallocateFlags::KEEP_SIZE);
/// Zeroes that keep their room.
const ZEROES: FallocateFlags = FallocateFlags::ZERO_RANGE.union(FallocateFlags::KEEP_SIZE);

impl RawDisk {
    fn allocate(&self, mode: FallocateFlags, offset: u64, length: u64) -> Result<(), Errno> {
        if length == 0 {
            return Ok(());
        }
        loop {
            match fallocate(&self.file, mode, offset, length) {
                Err(Errno::INTR) => {}
                answer => return answer,
            }
        }
    }
}

fn io(error: std::io::Error) -> DiskError {
    DiskError::Io(Box::new(error))
}

fn size_of(mut file: &File) -> std::io::Result<u64> {
    // Not the metadata: a block device's says 0.
    file.seek(SeekFrom::End(0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zeroes_and_holes_read_as_zeroes_and_nothing_else_changes() {
        for may_unmap in [false, true] {
            let file = tempfile::tempfile().expect("a file");
            file.set_len(1 << 20).expect("room");
            let disk = RawDisk::new(file, "d").expect("a disk");
            disk.write(0, &vec![7; 1 << 20]).expect("written");
            match disk.write_zeroes(512, 70_000 / 512 * 512, may_unmap) {
                // A file system that has holes may not know how to zero and keep the room.
                Err(DiskError::Unsupported) if !may_unmap => continue,
                zeroed => zeroed.expect("zeroed"),
            }
            disk.discard(1 << 19, 1 << 19).expect("discarded");
            disk.discard(0, 0).expect("nothing");
            let mut data = vec![1; 1 << 19];
            disk.read(0, &mut data).expect("read");
            let end = 512 + 70_000 / 512 * 512;
            assert!(data[..512].iter().all(|b| *b == 7) && data[512..end].iter().all(|b| *b == 0));
            assert!(data[end..].iter().all(|b| *b == 7));
            assert_eq!(disk.size(), 1 << 20);
        }
    }

    #[test]
    fn a_file_that_grew_is_larger_at_the_next_look() {
        let file = tempfile::tempfile().expect("a file");
        let disk = RawDisk::new(file.try_clone().expect("a descriptor"), "d").expect("a disk");
        file.set_len(4096).expect("room");
        assert_eq!(disk.size(), 0);
        disk.look_again();
        assert_eq!(disk.size(), 4096);
    }
}
