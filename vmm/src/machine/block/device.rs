//! What the guest sees of a disk.

use super::counters::{BlockCounters, Tally};
use super::disk::Disk;
use super::request::SECTOR;
use super::worker::{Desk, work};
use crate::machine::thread::{Background, Crew, ThreadKind};
use crate::machine::virtio::{DeviceConfig, Seat, Session, VirtioDevice, Virtqueue};
use crate::machine::wires::WireError;
use std::sync::Arc;
use vmm_sys_util::eventfd::EventFd;

const FEATURE_SEG_MAX: u64 = 1 << 2;
const FEATURE_RO: u64 = 1 << 5;
const FEATURE_BLK_SIZE: u64 = 1 << 6;
const FEATURE_FLUSH: u64 = 1 << 9;
const FEATURE_TOPOLOGY: u64 = 1 << 10;

const QUEUE_SIZE: u16 = 256;
/// Data buffers of one request; with header and status it stays below the transport's limit.
const SEGMENTS_MAX: u32 = 254;
const CONFIG_SIZE: usize = 36;
/// The physical block of 4096 bytes, as a power of two of logical ones.
const PHYSICAL_BLOCK_EXPONENT: u8 = 3;

/// A virtio block device (virtio 1.3, 5.2).
pub struct BlockDevice {
    name: String,
    config: DeviceConfig,
    desk: Arc<Desk>,
    seat: Arc<Seat<Virtqueue>>,
}

impl BlockDevice {
    /// The device called `name` in front of `disk`.
    pub fn new(name: &str, disk: Arc<dyn Disk>, read_only: bool) -> Result<Self, WireError> {
        let config = DeviceConfig::new(config(disk.size() / SECTOR).to_vec());
        let desk = Arc::new(Desk { disk, read_only, tally: Tally::default() });
        Ok(Self { name: name.to_owned(), config, desk, seat: Arc::new(Seat::new()?) })
    }

    /// Its name in the API.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What it did.
    pub fn counters(&self) -> BlockCounters {
        BlockCounters { breaks: self.config.breaks(), ..self.desk.tally.snapshot() }
    }

    /// Starts its thread.
    pub fn hire(&self, crew: &Crew) -> std::io::Result<Arc<dyn Background>> {
        let (desk, gate) = (self.desk.clone(), crew.gate().clone());
        self.seat.hire(crew, ThreadKind::Disk, format!("disk-{}", self.name), move |seat| work(seat, &desk, &gate))
    }
}

impl VirtioDevice for BlockDevice {
    fn device_type(&self) -> u16 {
        2
    }

    fn class(&self) -> u32 {
        0x01_8000
    }

    fn features(&self) -> u64 {
        let base = FEATURE_SEG_MAX | FEATURE_BLK_SIZE | FEATURE_FLUSH | FEATURE_TOPOLOGY;
        if self.desk.read_only { base | FEATURE_RO } else { base }
    }

    fn queues(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    fn config(&self) -> &DeviceConfig {
        &self.config
    }

    fn doorbell(&self, queue: u16) -> Option<&EventFd> {
        (queue == 0).then(|| self.seat.doorbell())
    }

    fn start(&self, session: Session) {
        session.queues.into_iter().flatten().for_each(|queue| self.seat.start(queue));
    }

    fn stop(&self) -> bool {
        self.seat.stop()
    }
}

/// `struct virtio_blk_config` (5.2.4) up to its topology.
fn config(sectors: u64) -> [u8; CONFIG_SIZE] {
    let mut config = [0; CONFIG_SIZE];
    let mut put = |at: usize, bytes: &[u8]| config[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, &sectors.to_le_bytes());
    put(12, &SEGMENTS_MAX.to_le_bytes());
    put(20, &(SECTOR as u32).to_le_bytes());
    put(24, &[PHYSICAL_BLOCK_EXPONENT, 0]);
    // The smallest good write, in logical blocks.
    put(26, &(1_u16 << PHYSICAL_BLOCK_EXPONENT).to_le_bytes());
    config
}
