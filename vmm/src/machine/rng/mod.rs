//! The entropy device (virtio 1.3, 5.4): [`RngDevice`] is what the guest sees, its worker fills what the guest offers with
//! random bytes of the host's kernel.

mod counters;
mod device;
#[doc(hidden)]
pub mod fuzz;
mod worker;

pub use counters::RngCounters;
pub use device::RngDevice;
