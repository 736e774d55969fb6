//! Where a volume lies: bytes at offsets, hostile as far as the engine is concerned.

use crate::VolumeError;
use rustix::fs::{FallocateFlags, FileType, FlockOperation};
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
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

    /// Writes all of `bytes` at `offset`. Durable only after [`sync_data`](Self::sync_data).
    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()>;

    /// Returns when everything written before is durable.
    fn sync_data(&self) -> io::Result<()>;

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

impl<S: Store + ?Sized> Store for Arc<S> {
    fn len(&self) -> io::Result<u64> {
        (**self).len()
    }
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        (**self).read_at(buffer, offset)
    }
    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        (**self).write_at(bytes, offset)
    }
    fn sync_data(&self) -> io::Result<()> {
        (**self).sync_data()
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
/// System calls after the constructor: fstat, lseek, pread64, pwrite64, fdatasync, fallocate; and ftruncate where a volume is
/// created.
pub struct FileStore {
    file: File,
    device: bool,
}

impl FileStore {
    /// `file`, open for reading and writing, for this process alone. [`VolumeError::Busy`] if another has it.
    pub fn exclusive(file: File) -> Result<Self, VolumeError> {
        Self::locked(file, FlockOperation::NonBlockingLockExclusive)
    }

    /// `file`, open for reading at least, beside other readers. [`VolumeError::Busy`] if a writer has it.
    pub fn shared(file: File) -> Result<Self, VolumeError> {
        Self::locked(file, FlockOperation::NonBlockingLockShared)
    }

    fn locked(file: File, how: FlockOperation) -> Result<Self, VolumeError> {
        let kind = rustix::fs::fstat(&file).map_err(|e| VolumeError::Store("say what it is", e.into()))?.st_mode;
        let device = match FileType::from_raw_mode(kind) {
            FileType::RegularFile => false,
            FileType::BlockDevice => true,
            _ => return Err(VolumeError::NotAVolume),
        };
        match rustix::fs::flock(&file, how) {
            Ok(()) => Ok(Self { file, device }),
            Err(rustix::io::Errno::WOULDBLOCK) => Err(VolumeError::Busy),
            Err(e) => Err(VolumeError::Store("be locked", e.into())),
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
        self.file.read_exact_at(buffer, offset)
    }

    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.file.write_all_at(bytes, offset)
    }

    fn sync_data(&self) -> io::Result<()> {
        self.file.sync_data()
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
            Err(rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::NOSYS) => Ok(()),
            other => Ok(other?),
        }
    }

    fn punch(&self, offset: u64, bytes: u64) -> io::Result<()> {
        // On a block device this is a discard that leaves zeroes.
        let how = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        match rustix::fs::fallocate(&self.file, how, offset, bytes) {
            Err(rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::NOSYS) => Ok(()),
            other => Ok(other?),
        }
    }
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

    #[test]
    fn what_is_neither_file_nor_device_is_refused() {
        let null = File::options().read(true).write(true).open("/dev/null").expect("opens");
        assert!(matches!(FileStore::exclusive(null), Err(VolumeError::NotAVolume)));
    }
}
