//! Features and configuration space.

use super::request::{SECTOR, SEGMENTS};
use crate::Disk;
use vhost::vhost_user::message::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use virtio_bindings::virtio_blk as blk;
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

/// Descriptors that a queue may have.
pub(super) const QUEUE_SIZE: u16 = 1024;
/// Segments of a request's data: what fits into the smallest queue that front ends make, with header and status.
const SEG_MAX: u32 = 126;
/// Bytes of the configuration space that a front end may read (the message holds no more).
const SPACE: usize = 256;
/// Sectors that one segment of a discard may have, and one of a write of zeroes.
const MOST: u32 = 1 << 22;

/// What the device can do.
pub(super) fn features(disk: &dyn Disk) -> u64 {
    let mut bits = vec![
        VIRTIO_F_VERSION_1,
        VIRTIO_RING_F_INDIRECT_DESC,
        VIRTIO_RING_F_EVENT_IDX,
        blk::VIRTIO_BLK_F_SEG_MAX,
        blk::VIRTIO_BLK_F_BLK_SIZE,
        blk::VIRTIO_BLK_F_FLUSH,
        blk::VIRTIO_BLK_F_TOPOLOGY,
        blk::VIRTIO_BLK_F_MQ,
        blk::VIRTIO_BLK_F_DISCARD,
        blk::VIRTIO_BLK_F_WRITE_ZEROES,
    ];
    if disk.read_only() {
        bits.push(blk::VIRTIO_BLK_F_RO);
    }
    let bits = bits.into_iter().fold(0, |all, bit| all | 1_u64 << bit);
    bits | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits()
}

/// What the back end can do.
pub(super) fn protocol_features() -> VhostUserProtocolFeatures {
    VhostUserProtocolFeatures::CONFIG | VhostUserProtocolFeatures::MQ | VhostUserProtocolFeatures::REPLY_ACK
}

/// The configuration space (virtio 1.3, 5.2.4), little-endian; zero behind its end.
pub(super) fn space(disk: &dyn Disk, queues: u16) -> [u8; SPACE] {
    let mut out = [0; SPACE];
    let mut put = |at: usize, bytes: &[u8]| out[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, &(disk.size() / SECTOR).to_le_bytes());
    put(12, &SEG_MAX.to_le_bytes());
    put(20, &(SECTOR as u32).to_le_bytes());
    // Topology: eight sectors to a physical block; no offset; best in blocks, and 1 MiB at a time.
    put(24, &[3, 0]);
    put(26, &8_u16.to_le_bytes());
    put(28, &2048_u32.to_le_bytes());
    // Write-back, always.
    put(32, &[1]);
    put(34, &queues.to_le_bytes());
    put(36, &MOST.to_le_bytes());
    put(40, &(SEGMENTS as u32).to_le_bytes());
    put(44, &8_u32.to_le_bytes());
    put(48, &MOST.to_le_bytes());
    put(52, &(SEGMENTS as u32).to_le_bytes());
    put(56, &[1]);
    out
}
