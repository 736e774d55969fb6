//! What lies behind a block device.

use super::uring::DiskRing;
use vmm_sys_util::eventfd::EventFd;

/// Storage of one disk. Offsets and lengths are bytes, multiples of 512 and inside the disk. Each of the device's queues calls
/// from a thread of its own, so calls may overlap; two that overlap in time and place have no order.
pub trait Disk: Send + Sync {
    /// Its size in bytes; the guest sees whole sectors of 512.
    fn size(&self) -> u64;
    /// Fills all of `data` from `offset`.
    fn read(&self, offset: u64, data: &mut [u8]) -> Result<(), DiskError>;
    /// Writes all of `data` at `offset`. It need not be durable before the next [`flush`](Self::flush) returns.
    fn write(&self, offset: u64, data: &[u8]) -> Result<(), DiskError>;
    /// Several reads at once, each an offset and a buffer; says of each how it went, in order.
    fn read_many(&self, requests: &mut [(u64, &mut [u8])]) -> Vec<Result<(), DiskError>> {
        requests.iter_mut().map(|(offset, data)| self.read(*offset, data)).collect()
    }
    /// Several writes at once, each an offset and data; says of each how it went, in order. Where two meet, the later one holds.
    fn write_many(&self, requests: &[(u64, &[u8])]) -> Vec<Result<(), DiskError>> {
        requests.iter().map(|(offset, data)| self.write(*offset, data)).collect()
    }
    /// Makes durable what was written, discarded and zeroed by calls that have returned, on any thread.
    fn flush(&self) -> Result<(), DiskError>;
    /// What the guest reads as the disk's serial number where none is configured: ASCII, padded with NUL.
    fn id(&self) -> [u8; 20];
    /// Whether it knows [`discard`](Self::discard) and [`write_zeroes`](Self::write_zeroes).
    fn can_discard(&self) -> bool {
        false
    }
    /// The guest has no use for these bytes any more; what is read there afterwards is not promised.
    fn discard(&self, _offset: u64, _length: u64) -> Result<(), DiskError> {
        Err(DiskError::Unsupported)
    }
    /// These bytes read as zeroes afterwards. Only with `may_unmap` may the room for them be given back.
    fn write_zeroes(&self, _offset: u64, _length: u64, _may_unmap: bool) -> Result<(), DiskError> {
        Err(DiskError::Unsupported)
    }
    /// Looks at its size again: somebody may have resized what lies behind it.
    fn look_again(&self) {}
    /// Makes it `bytes` long, not less than it is; what is new reads as zeroes. Durable when this returns.
    fn grow(&self, _bytes: u64) -> Result<(), DiskError> {
        Err(DiskError::Unsupported)
    }
    /// Rings in which the device's queues submit without a thread for each request, with what wakes them; asked once. Where there
    /// are none, or fewer than queues, the other calls are made.
    fn rings(&self) -> Vec<(DiskRing, EventFd)> {
        vec![]
    }
}

/// Why a disk did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// This request fails; the guest gets an I/O error.
    #[error("the disk could not do it")]
    Io(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// The disk does not know such requests.
    #[error("the disk does not know how")]
    Unsupported,
    /// The keys are gone, or the machine is to stand still and a FLUSH would wait for the provider: the request stays in the queue until the
    /// machine is resumed.
    #[error("the disk can't do it at the moment")]
    NotNow,
}
