//! Virtio 1.3 over PCI, the modern interface only, and the drivers on it.

pub mod balloon;
pub mod block;
pub mod console;
pub mod net;
mod queue;
pub mod rng;
pub mod transport;
pub mod vsock;
