//! Virtio 1.3 over PCI, the modern interface only, and the block driver on it.

pub mod block;
mod queue;
mod transport;
