//! What the guest sees of a network card.

use super::counters::{NetCounters, Tally};
use super::feature;
use super::port::Port;
use super::worker::{Card, LINK_UP, Shared};
use crate::machine::rate::RateLimits;
use crate::machine::sync::lock;
use crate::machine::thread::{Background, Crew, ThreadKind};
use crate::machine::virtio::{DeviceConfig, Service, Session, VirtioDevice};
use crate::machine::wires::WireError;
use policy::device::MacAddress;
use std::sync::{Arc, Mutex};
use vmm_sys_util::eventfd::EventFd;

const CONTROL_QUEUE_SIZE: u16 = 64;

/// A card to add.
pub struct NetSlot {
    /// Its name in the API.
    pub id: String,
    /// Its address.
    pub mac: MacAddress,
    /// The largest packet that the guest is told of.
    pub mtu: Option<u16>,
    /// Buffers in a queue.
    pub queue_size: u16,
    /// Limits of each direction.
    pub limits: RateLimits,
    /// One for each pair of queues; at least one.
    pub ports: Vec<Box<dyn Port>>,
}

/// A virtio network card (virtio 1.3, 5.1).
pub struct NetDevice {
    name: String,
    features: u64,
    queues: Vec<u16>,
    service: Service,
    shared: Arc<Shared>,
    /// Until the thread has it.
    card: Mutex<Option<Card>>,
}

impl NetDevice {
    /// The card of `slot`.
    pub fn new(slot: NetSlot) -> Result<Self, WireError> {
        let pairs = slot.ports.len();
        let shared = Arc::new(Shared { config: config(&slot), tally: Tally::default() });
        let mut queues = vec![slot.queue_size; 2 * pairs];
        queues.push(CONTROL_QUEUE_SIZE);
        let mut features = feature::CSUM
            | feature::GUEST_OFFLOADS
            | feature::CTRL_GUEST_OFFLOADS
            | feature::MAC
            | feature::HOST_TSO4
            | feature::HOST_TSO6
            | feature::HOST_ECN
            | feature::MRG_RXBUF
            | feature::STATUS
            | feature::CTRL_VQ
            | feature::CTRL_RX
            | feature::CTRL_MAC_ADDR;
        if slot.mtu.is_some() {
            features |= feature::MTU;
        }
        if pairs > 1 {
            features |= feature::MQ;
        }
        let card = Card::new(shared.clone(), slot.mac, slot.ports, slot.limits);
        let card = Mutex::new(Some(card));
        Ok(Self { name: slot.id, features, queues, service: Service::new()?, shared, card })
    }

    /// Its name in the API.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What it did.
    pub fn counters(&self) -> NetCounters {
        self.shared.tally.snapshot(self.shared.config.breaks())
    }

    /// Starts its thread; once.
    pub fn hire(&self, crew: &Crew) -> std::io::Result<Arc<dyn Background>> {
        let card = lock(&self.card).take().ok_or(std::io::ErrorKind::AlreadyExists)?;
        self.service.hire(ThreadKind::Net, format!("net-{}", self.name), card, crew)
    }
}

impl VirtioDevice for NetDevice {
    fn device_type(&self) -> u16 {
        1
    }

    fn class(&self) -> u32 {
        0x02_0000
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn queues(&self) -> &[u16] {
        &self.queues
    }

    fn config(&self) -> &DeviceConfig {
        &self.shared.config
    }

    fn doorbell(&self, queue: u16) -> Option<&EventFd> {
        (usize::from(queue) < self.queues.len()).then(|| self.service.doorbell())
    }

    fn start(&self, session: Session) {
        self.service.start(session);
    }

    fn stop(&self) -> bool {
        self.service.stop()
    }
}

/// `struct virtio_net_config` (5.1.4) up to its MTU.
fn config(slot: &NetSlot) -> DeviceConfig {
    let mut bytes = slot.mac.bytes().to_vec();
    bytes.extend([LINK_UP, 0]);
    bytes.extend((slot.ports.len() as u16).to_le_bytes());
    bytes.extend(slot.mtu.unwrap_or(0).to_le_bytes());
    DeviceConfig::new(bytes)
}
