//! What the guest sees of a disk.

use super::counters::{BlockCounters, Tally};
use super::disk::{Disk, DiskError};
use super::request::{EXTENT_SECTORS_MAX, EXTENTS_MAX, SECTOR};
use super::uring::DiskRing;
use super::worker::Desk;
use super::{flights, worker};
use crate::machine::rate::{RateLimiter, RateLimits};
use crate::machine::sync::lock;
use crate::machine::thread::{Background, Crew, ThreadKind};
use crate::machine::virtio::{DeviceConfig, Seat, Session, VirtioDevice, Virtqueue};
use crate::machine::wires::WireError;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex};
use vmm_sys_util::eventfd::EventFd;

const FEATURE_SIZE_MAX: u64 = 1 << 1;
const FEATURE_SEG_MAX: u64 = 1 << 2;
const FEATURE_RO: u64 = 1 << 5;
const FEATURE_BLK_SIZE: u64 = 1 << 6;
const FEATURE_FLUSH: u64 = 1 << 9;
const FEATURE_TOPOLOGY: u64 = 1 << 10;
const FEATURE_MQ: u64 = 1 << 12;
const FEATURE_DISCARD: u64 = 1 << 13;
const FEATURE_WRITE_ZEROES: u64 = 1 << 14;

/// The most data buffers of one request; with header and status it stays below the transport's limit.
const SEGMENTS_MAX: u16 = 254;
/// The most bytes in one of them.
const SEGMENT_SIZE_MAX: u32 = 4 << 20;
const CONFIG_SIZE: usize = 60;
/// The physical block of 4096 bytes, as a power of two of logical ones.
const PHYSICAL_BLOCK_EXPONENT: u8 = 3;

/// How a disk is shown and served.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct DiskSettings {
    /// Whether the guest may not write.
    pub read_only: bool,
    /// Queues, 1 to 16, each with a thread of its own.
    pub queues: u16,
    /// Entries of each: a power of two, 16 to 1024.
    pub queue_size: u16,
    /// What the guest reads as its serial number, padded with NUL; by default what the disk says itself.
    pub serial: Option<[u8; 20]>,
    /// Its rate limits, over all queues.
    pub limits: RateLimits,
}

/// One queue of 256 entries, for reading and writing, without limits.
impl Default for DiskSettings {
    fn default() -> Self {
        Self { read_only: false, queues: 1, queue_size: 256, serial: None, limits: RateLimits::default() }
    }
}

/// A virtio block device (virtio 1.3, 5.2).
pub struct BlockDevice {
    name: String,
    config: DeviceConfig,
    queues: Vec<u16>,
    desk: Arc<Desk>,
    seats: Vec<Arc<Seat<Virtqueue>>>,
    /// By queue, until its thread takes it.
    rings: Mutex<Vec<Option<DiskRing>>>,
}

impl BlockDevice {
    /// The device called `name` in front of `disk`.
    pub fn new(name: &str, disk: Arc<dyn Disk>, settings: &DiskSettings) -> Result<Self, WireError> {
        let config = DeviceConfig::new(config(disk.as_ref(), settings).to_vec());
        let mut made = disk.rings();
        // All queues in the same way: a disk that has too few rings for these queues needs none.
        let mut made = if made.len() >= usize::from(settings.queues) { made.drain(..) } else { made.drain(..0) };
        let (mut seats, mut rings) = (vec![], vec![]);
        for _ in 0..settings.queues {
            let (ring, seat) = match made.next() {
                Some((ring, wake)) => (Some(ring), Seat::with_wake(wake)),
                None => (None, Seat::new()?),
            };
            seats.push(Arc::new(seat));
            rings.push(ring);
        }
        drop(made);
        let desk = Desk {
            id: settings.serial.unwrap_or_else(|| disk.id()),
            disk,
            read_only: settings.read_only,
            limiter: RateLimiter::new(settings.limits),
            tally: Tally::default(),
            write_through: AtomicBool::new(false),
        };
        let queues = vec![settings.queue_size; usize::from(settings.queues)];
        Ok(Self { name: name.to_owned(), config, queues, desk: Arc::new(desk), seats, rings: Mutex::new(rings) })
    }

    /// Its name in the API.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Whether the guest may not write.
    pub fn read_only(&self) -> bool {
        self.desk.read_only
    }

    /// What it did.
    pub fn counters(&self) -> BlockCounters {
        let held = self.desk.limiter.held();
        BlockCounters { breaks: self.config.breaks(), held, ..self.desk.tally.snapshot() }
    }

    /// Looks at the disk's size again, and tells the driver where it changed (5.2.5.2). Gives the bytes that the guest sees.
    pub fn look_again(&self) -> u64 {
        self.desk.disk.look_again();
        let sectors = self.desk.disk.size() / SECTOR;
        self.config.change(|bytes| bytes[..8].copy_from_slice(&sectors.to_le_bytes()));
        sectors * SECTOR
    }

    /// Makes the disk `bytes` long, and tells the driver. Gives the bytes that the guest sees.
    pub fn grow(&self, bytes: u64) -> Result<u64, DiskError> {
        if self.desk.read_only {
            return Err(DiskError::Unsupported);
        }
        let grown = self.desk.disk.grow(bytes);
        // It may have grown although something failed after that.
        let size = self.look_again();
        grown.map(|()| size)
    }

    /// Makes durable what the guest wrote.
    pub fn flush(&self) -> Result<(), DiskError> {
        if self.desk.read_only { Ok(()) } else { self.desk.disk.flush() }
    }

    /// Starts its threads: all, or none.
    pub fn hire(&self, crew: &Crew) -> std::io::Result<Vec<Arc<dyn Background>>> {
        let rings = std::mem::take(&mut *lock(&self.rings));
        let seats = self.seats.iter().zip(rings).enumerate();
        let hire = |(number, (seat, ring)): (usize, (&Arc<Seat<Virtqueue>>, Option<DiskRing>))| {
            let (desk, gate) = (self.desk.clone(), crew.gate().clone());
            let name = format!("disk-{}-{number}", self.name);
            seat.hire(crew, ThreadKind::Disk, name, move |seat| match ring {
                Some(ring) => flights::work(seat, &desk, &gate, ring),
                None => worker::work(seat, &desk, &gate),
            })
        };
        let mut hired: Vec<Arc<dyn Background>> = vec![];
        for seat in seats {
            match hire(seat) {
                Ok(thread) => hired.push(thread),
                Err(error) => {
                    hired.iter().for_each(|thread| thread.stop());
                    return Err(error);
                }
            }
        }
        Ok(hired)
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
        let mut features = FEATURE_SIZE_MAX | FEATURE_SEG_MAX | FEATURE_BLK_SIZE | FEATURE_FLUSH | FEATURE_TOPOLOGY;
        if self.queues.len() > 1 {
            features |= FEATURE_MQ;
        }
        if self.desk.facts().can_discard {
            features |= FEATURE_DISCARD | FEATURE_WRITE_ZEROES;
        }
        if self.desk.read_only { features | FEATURE_RO } else { features }
    }

    fn queues(&self) -> &[u16] {
        &self.queues
    }

    fn config(&self) -> &DeviceConfig {
        &self.config
    }

    fn doorbell(&self, queue: u16) -> Option<&EventFd> {
        self.seats.get(usize::from(queue)).map(|seat| seat.doorbell())
    }

    fn start(&self, session: Session) {
        self.desk.set_write_through(session.features & FEATURE_FLUSH == 0);
        for (seat, queue) in self.seats.iter().zip(session.queues) {
            if let Some(queue) = queue {
                seat.start(queue);
            }
        }
    }

    fn stop(&self) -> bool {
        // Each is asked, so that they let go together.
        let resting = self.seats.iter().filter(|seat| seat.stop()).count();
        resting == self.seats.len()
    }
}

/// `struct virtio_blk_config` (5.2.4) up to WRITE_ZEROES.
fn config(disk: &dyn Disk, settings: &DiskSettings) -> [u8; CONFIG_SIZE] {
    let mut config = [0; CONFIG_SIZE];
    let mut put = |at: usize, bytes: &[u8]| config[at..at + bytes.len()].copy_from_slice(bytes);
    // Without indirect descriptors a request is no longer than the queue.
    let segments = settings.queue_size.saturating_sub(2).min(SEGMENTS_MAX);
    put(0, &(disk.size() / SECTOR).to_le_bytes());
    put(8, &SEGMENT_SIZE_MAX.to_le_bytes());
    put(12, &u32::from(segments).to_le_bytes());
    put(20, &(SECTOR as u32).to_le_bytes());
    put(24, &[PHYSICAL_BLOCK_EXPONENT, 0]);
    // The smallest good write, in logical blocks.
    put(26, &(1_u16 << PHYSICAL_BLOCK_EXPONENT).to_le_bytes());
    put(34, &settings.queues.to_le_bytes());
    if disk.can_discard() && !settings.read_only {
        put(36, &EXTENT_SECTORS_MAX.to_le_bytes());
        put(40, &EXTENTS_MAX.to_le_bytes());
        put(44, &(1_u32 << PHYSICAL_BLOCK_EXPONENT).to_le_bytes());
        put(48, &EXTENT_SECTORS_MAX.to_le_bytes());
        put(52, &EXTENTS_MAX.to_le_bytes());
        put(56, &[1]);
    }
    config
}
