//! Virtio 1.3: what every device of it shares. A device implements [`VirtioDevice`]; [`VirtioPci`] shows it to the guest
//! (4.1, modern only); a [`Virtqueue`] gives it the requests of a hostile guest (2.7), each taken apart into a [`Chain`]; a
//! [`Seat`] is where its thread waits for work; [`Link`] is its way back to the driver.
//!
//! Containment: whatever a driver writes into its rings costs its own device, which then does nothing until it is reset
//! (DEVICE_NEEDS_RESET), and is counted ([`Link::breaks`]). No part of this waits for a guest, or lets a vCPU wait.

mod chain;
mod config;
pub(crate) mod fuzzing;
mod link;
#[cfg(test)]
pub(crate) mod mock;
mod queue;
#[cfg(test)]
pub(crate) mod rig;
mod ring;
mod seat;
mod service;
mod transport;

pub use chain::{Chain, Segment, pieces};
pub use config::DeviceConfig;
pub use link::Link;
pub use queue::Virtqueue;
pub use ring::{Ring, RingError};
pub use seat::{Seat, Turn};
pub use service::{Serve, Service};
pub use transport::VirtioPci;

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

/// A device, as the transport sees it. It serves its queues on threads of its own, each in a [`Seat`].
pub trait VirtioDevice: Send + Sync {
    /// Device type (5): 2 is a block device.
    fn device_type(&self) -> u16;
    /// PCI class code.
    fn class(&self) -> u32;
    /// Features it offers beside [`feature::ALL`].
    fn features(&self) -> u64;
    /// The largest size of each queue, a power of two. At most 63 queues.
    fn queues(&self) -> &[u16];
    /// Its configuration structure.
    fn config(&self) -> &DeviceConfig;
    /// The driver wrote its configuration structure; most devices have nothing to write there.
    fn config_written(&self, _offset: u64, _data: &[u8]) {}
    /// What a doorbell for `queue` signals.
    fn doorbell(&self, queue: u16) -> Option<&EventFd>;
    /// The driver is ready: the device may use memory and queues until [`stop`](Self::stop).
    fn start(&self, session: Session);
    /// Asks the device to let go of its session, and says whether it has. It may take as long as the requests in hand;
    /// asking again is cheap, and no call waits.
    fn stop(&self) -> bool;
}

/// What a driver negotiated: lives from DRIVER_OK to reset.
pub struct Session {
    /// The queues that the driver enabled, by index; each knows its memory and its way back.
    pub queues: Vec<Option<Virtqueue>>,
    /// The negotiated features.
    pub features: u64,
    /// The way back to the driver.
    pub link: Arc<Link>,
}
