//! The block device (virtio 1.3, 5.2): [`BlockDevice`] is what the guest sees, [`Disk`] is what lies behind it. Each queue has a
//! thread, which serves it in one of two ways: `flights` has all its requests under way together in the disk's io_uring, `worker`
//! does the reads and writes that wait together with the disk's own calls, and all else one after the other.

mod counters;
mod device;
mod disk;
mod flights;
#[doc(hidden)]
pub mod fuzz;
mod raw;
mod request;
mod uring;
mod worker;

pub use counters::BlockCounters;
pub use device::{BlockDevice, DiskSettings};
pub use disk::{Disk, DiskError};
pub use raw::{RawDisk, serial_number};
pub use uring::DiskRing;
