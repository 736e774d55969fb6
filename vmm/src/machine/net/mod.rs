//! The network card (virtio 1.3, 5.1): [`NetDevice`] is what the guest sees, its worker carries frames between the queues and
//! a [`Port`] for each pair of them; [`Tap`] opens the ports of a host's TAP.
//!
//! ```text
//! guest ─ transmit queue ─► Header::from_guest ─► Port::send            frames are copied once, so that nobody changes
//! guest ◄─ receive queue ── Filter ── Header::from_host ◄─ Port::receive   what was looked at
//! ```

mod control;
mod counters;
mod device;
mod filter;
#[doc(hidden)]
pub mod fuzz;
mod header;
mod port;
mod receive;
mod tap;
mod transmit;
mod worker;

pub use counters::NetCounters;
pub use device::{NetDevice, NetSlot};
pub use port::Port;
pub use tap::{Tap, TapError};

/// Feature bits (5.1.3).
pub mod feature {
    /// The driver may leave checksums to the device.
    pub const CSUM: u64 = 1;
    /// The driver takes frames whose checksum is not complete.
    pub const GUEST_CSUM: u64 = 1 << 1;
    /// What the driver takes can be changed while it runs.
    pub const CTRL_GUEST_OFFLOADS: u64 = 1 << 2;
    /// The device says how large packets may be.
    pub const MTU: u64 = 1 << 3;
    /// The device has a MAC address.
    pub const MAC: u64 = 1 << 5;
    /// The driver takes TCP over IPv4 in large frames.
    pub const GUEST_TSO4: u64 = 1 << 7;
    /// The same over IPv6.
    pub const GUEST_TSO6: u64 = 1 << 8;
    /// The same with ECN.
    pub const GUEST_ECN: u64 = 1 << 9;
    /// The device takes TCP over IPv4 in large frames.
    pub const HOST_TSO4: u64 = 1 << 11;
    /// The same over IPv6.
    pub const HOST_TSO6: u64 = 1 << 12;
    /// The same with ECN.
    pub const HOST_ECN: u64 = 1 << 13;
    /// The driver merges receive buffers.
    pub const MRG_RXBUF: u64 = 1 << 15;
    /// The device says whether its link is up.
    pub const STATUS: u64 = 1 << 16;
    /// There is a control queue.
    pub const CTRL_VQ: u64 = 1 << 17;
    /// The control queue filters what is received.
    pub const CTRL_RX: u64 = 1 << 18;
    /// There are several pairs of queues.
    pub const MQ: u64 = 1 << 22;
    /// The control queue sets the MAC address.
    pub const CTRL_MAC_ADDR: u64 = 1 << 23;
    /// What CTRL_GUEST_OFFLOADS can switch.
    pub const GUEST_OFFLOADS: u64 = GUEST_CSUM | GUEST_TSO4 | GUEST_TSO6 | GUEST_ECN;
}
