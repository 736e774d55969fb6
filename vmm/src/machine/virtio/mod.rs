//! Virtio 1.3: what every device of it shares. A device implements [`VirtioDevice`]; [`VirtioPci`] shows it to the guest
//! (4.1, modern only); [`Ring`] takes requests out of a hostile guest's queue (2.7); [`Link`] is its way back to the driver.

mod link;
#[cfg(test)]
pub(crate) mod mock;
mod ring;
mod transport;

pub use link::Link;
pub use ring::{Chain, Ring, RingError, Segment};
pub use transport::VirtioPci;

use super::memory::GuestRam;
use std::sync::Arc;
use vmm_sys_util::eventfd::EventFd;

/// Feature bits that the transport and the rings take part in (6).
pub mod feature {
    /// VIRTIO_F_INDIRECT_DESC.
    pub const INDIRECT_DESCRIPTORS: u64 = 1 << 28;
    /// VIRTIO_F_EVENT_IDX.
    pub const EVENT_INDEX: u64 = 1 << 29;
    /// VIRTIO_F_VERSION_1.
    pub const VERSION_1: u64 = 1 << 32;
    /// What every device here offers.
    pub const ALL: u64 = INDIRECT_DESCRIPTORS | EVENT_INDEX | VERSION_1;
}

/// A device, as the transport sees it. It serves its queues on a thread of its own.
pub trait VirtioDevice: Send + Sync {
    /// Device type (5): 2 is a block device.
    fn device_type(&self) -> u16;
    /// PCI class code.
    fn class(&self) -> u32;
    /// Features it offers beside [`feature::ALL`].
    fn features(&self) -> u64;
    /// The largest size of each queue, a power of two.
    fn queues(&self) -> &[u16];
    /// Its configuration structure, little-endian. What lies beyond its end reads as zero.
    fn config(&self) -> &[u8];
    /// What a doorbell for `queue` signals.
    fn doorbell(&self, queue: u16) -> Option<&EventFd>;
    /// The driver is ready: the device may use memory and queues until [`stop`](Self::stop).
    fn start(&self, session: Session);
    /// Asks the device to let go of its session, and says whether it has. It may take as long as the request in hand;
    /// asking again is cheap.
    fn stop(&self) -> bool;
}

/// What a driver negotiated: lives from DRIVER_OK to reset.
pub struct Session {
    /// The guest's RAM.
    pub memory: GuestRam,
    /// The queues that the driver enabled, by index.
    pub rings: Vec<Option<Ring>>,
    /// The negotiated features.
    pub features: u64,
    /// The way back to the driver.
    pub link: Arc<Link>,
}
