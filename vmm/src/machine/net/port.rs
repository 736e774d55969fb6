//! What a pair of queues is connected to.

use std::io;
use std::os::fd::AsFd;

/// Where frames go and come from. Each has the virtio header of 12 bytes before it, in both directions, in the layout of
/// `struct virtio_net_hdr_v1`. Nothing here ever waits: what can't be done now is [`io::ErrorKind::WouldBlock`], and the
/// descriptor says when it can.
pub trait Port: AsFd + Send {
    /// Sends a header and a frame.
    fn send(&mut self, frame: &[u8]) -> io::Result<()>;
    /// Receives a header and a frame into `buffer`; gives their length.
    fn receive(&mut self, buffer: &mut [u8]) -> io::Result<usize>;
    /// Lets it give frames as a driver takes them that negotiated these of [`GUEST_OFFLOADS`](super::feature::GUEST_OFFLOADS).
    fn offload(&mut self, features: u64) -> io::Result<()>;
    /// Whether frames come to this one; at first they do.
    fn set_active(&mut self, active: bool) -> io::Result<()>;
}
