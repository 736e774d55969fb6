//! What lies behind a block device.

use std::fs::File;
use std::io::{Seek, SeekFrom};
use std::os::unix::fs::FileExt;

/// Storage of one disk. Offsets and lengths are bytes, multiples of 512 and inside the disk. Calls come from the disk's own
/// thread, one at a time.
pub trait Disk: Send + Sync {
    /// Its size in bytes; the guest sees whole sectors of 512.
    fn size(&self) -> u64;
    /// Fills all of `data` from `offset`.
    fn read(&self, offset: u64, data: &mut [u8]) -> Result<(), DiskError>;
    /// Writes all of `data` at `offset`. It need not be durable before the next [`flush`](Self::flush) returns.
    fn write(&self, offset: u64, data: &[u8]) -> Result<(), DiskError>;
    /// Makes durable what was written.
    fn flush(&self) -> Result<(), DiskError>;
    /// What the guest reads as the disk's serial number: ASCII, padded with NUL.
    fn id(&self) -> [u8; 20];
}

/// Why a disk did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// This request fails; the guest gets an I/O error.
    #[error("the disk could not do it")]
    Io(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// The keys are gone: the request stays in the queue until the machine is resumed with keys.
    #[error("the disk has no keys at the moment")]
    NoKeys,
}

/// A raw image or a block device, for unprotected machines.
pub struct RawDisk {
    file: File,
    size: u64,
    id: [u8; 20],
}

impl RawDisk {
    /// The disk in `file`; `name`, cut to 20 bytes, is its serial number.
    pub fn new(mut file: File, name: &str) -> std::io::Result<Self> {
        // Not the metadata: a block device's says 0.
        let size = file.seek(SeekFrom::End(0))?;
        let mut id = [0; 20];
        id.iter_mut().zip(name.bytes().filter(u8::is_ascii)).for_each(|(to, from)| *to = from);
        Ok(Self { file, size, id })
    }
}

impl Disk for RawDisk {
    fn size(&self) -> u64 {
        self.size
    }

    fn read(&self, offset: u64, data: &mut [u8]) -> Result<(), DiskError> {
        self.file.read_exact_at(data, offset).map_err(|e| DiskError::Io(Box::new(e)))
    }

    fn write(&self, offset: u64, data: &[u8]) -> Result<(), DiskError> {
        self.file.write_all_at(data, offset).map_err(|e| DiskError::Io(Box::new(e)))
    }

    fn flush(&self) -> Result<(), DiskError> {
        self.file.sync_data().map_err(|e| DiskError::Io(Box::new(e)))
    }

    fn id(&self) -> [u8; 20] {
        self.id
    }
}
