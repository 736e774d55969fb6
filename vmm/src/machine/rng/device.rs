//! What the guest sees of the source.

use super::counters::{RngCounters, Tally};
use super::worker::{LIMIT, Source};
use crate::machine::rate::Rate;
use crate::machine::thread::{Background, Crew, ThreadKind};
use crate::machine::virtio::{DeviceConfig, Service, Session, VirtioDevice};
use crate::machine::wires::WireError;
use std::sync::Arc;
use vmm_sys_util::eventfd::EventFd;

const QUEUE_SIZE: u16 = 128;

/// A virtio entropy device (virtio 1.3, 5.4).
pub struct RngDevice {
    /// Nothing.
    config: DeviceConfig,
    service: Service,
    tally: Arc<Tally>,
    limit: Rate,
}

impl RngDevice {
    /// The device.
    pub fn new() -> Result<Self, WireError> {
        Self::with_limit(LIMIT)
    }

    pub(super) fn with_limit(limit: Rate) -> Result<Self, WireError> {
        Ok(Self { config: DeviceConfig::new(vec![]), service: Service::new()?, tally: Arc::default(), limit })
    }

    /// What it did.
    pub fn counters(&self) -> RngCounters {
        self.tally.snapshot(self.config.breaks())
    }

    /// Starts its thread.
    pub fn hire(&self, crew: &Crew) -> std::io::Result<Arc<dyn Background>> {
        self.service.hire(ThreadKind::Rng, "rng".into(), Source::new(self.tally.clone(), self.limit), crew)
    }
}

impl VirtioDevice for RngDevice {
    fn device_type(&self) -> u16 {
        4
    }

    fn class(&self) -> u32 {
        0xff_0000
    }

    fn features(&self) -> u64 {
        0
    }

    fn queues(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    fn config(&self) -> &DeviceConfig {
        &self.config
    }

    fn doorbell(&self, queue: u16) -> Option<&EventFd> {
        (queue == 0).then(|| self.service.doorbell())
    }

    fn start(&self, session: Session) {
        self.service.start(session);
    }

    fn stop(&self) -> bool {
        self.service.stop()
    }
}
