//! The memory balloon (virtio 1.3, 5.5): [`BalloonDevice`] is what the guest sees, its worker gives the host back what the guest
//! says it does not need: pages that the balloon holds, and free pages that are reported. Such a page reads as zeroes when the
//! guest takes it again.

mod counters;
mod device;
#[doc(hidden)]
pub mod fuzz;
mod worker;

pub use counters::BalloonCounters;
pub use device::{BalloonDevice, BalloonSettings};
