//! The block device (virtio 1.3, 5.2): [`BlockDevice`] is what the guest sees, its worker is the thread that serves the
//! queue, [`Disk`] is what lies behind it.

mod counters;
mod device;
mod disk;
#[doc(hidden)]
pub mod fuzz;
mod request;
mod worker;

pub use counters::BlockCounters;
pub use device::BlockDevice;
pub use disk::{Disk, DiskError, RawDisk};
