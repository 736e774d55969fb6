//! What the guest sees of a balloon.

use super::counters::{BalloonCounters, Tally};
use super::worker::{Balloon, PAGE};
use crate::machine::thread::{Background, Crew, ThreadKind};
use crate::machine::virtio::{DeviceConfig, Service, Session, VirtioDevice};
use crate::machine::wires::WireError;
use std::sync::Arc;
use vmm_sys_util::eventfd::EventFd;

const FEATURE_DEFLATE_ON_OOM: u64 = 1 << 2;
const FEATURE_REPORTING: u64 = 1 << 5;

const QUEUE_SIZE: u16 = 128;
/// Queues for inflating and deflating; then three more, of which a driver that reports uses one. The specification counts the
/// queues of features that were not offered (5.5.2: the fifth), Linux does not (the third); whichever it enables is the one.
const QUEUES: [u16; 5] = [QUEUE_SIZE; 5];
const QUEUES_WITHOUT_REPORTS: usize = 2;

/// Where `actual` lies in the configuration, which the driver writes (5.5.4).
const ACTUAL: std::ops::Range<usize> = 4..8;

/// A balloon to add.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct BalloonSettings {
    /// Bytes that it is to hold: a multiple of 4096.
    pub size: u64,
    /// Whether the guest may take memory out of it rather than end a process.
    pub deflate_on_oom: bool,
    /// Whether the guest is asked to report free pages.
    pub free_page_reporting: bool,
}

/// A virtio balloon (virtio 1.3, 5.5).
pub struct BalloonDevice {
    settings: BalloonSettings,
    config: DeviceConfig,
    service: Service,
    tally: Arc<Tally>,
}

impl BalloonDevice {
    /// The balloon.
    pub fn new(settings: BalloonSettings) -> Result<Self, WireError> {
        let mut config = pages(settings.size).to_le_bytes().to_vec();
        config.extend([0; 4]);
        let config = DeviceConfig::new(config);
        Ok(Self { settings, config, service: Service::new()?, tally: Arc::default() })
    }

    /// Asks the guest to put so many bytes into it.
    pub fn resize(&self, size: u64) {
        self.config.change(|config| config[..4].copy_from_slice(&pages(size).to_le_bytes()));
    }

    /// Bytes that the driver says it holds.
    pub fn held(&self) -> u64 {
        let mut actual = [0; 4];
        self.config.read(ACTUAL.start as u64, &mut actual);
        u64::from(u32::from_le_bytes(actual)) * PAGE
    }

    /// What it did.
    pub fn counters(&self) -> BalloonCounters {
        self.tally.snapshot(self.config.breaks())
    }

    /// Starts its thread.
    pub fn hire(&self, crew: &Crew) -> std::io::Result<Arc<dyn Background>> {
        self.service.hire(ThreadKind::Balloon, "balloon".into(), Balloon::new(self.tally.clone()), crew)
    }
}

impl VirtioDevice for BalloonDevice {
    fn device_type(&self) -> u16 {
        5
    }

    fn class(&self) -> u32 {
        0xff_0000
    }

    fn features(&self) -> u64 {
        let bit = |on: bool, bit: u64| if on { bit } else { 0 };
        bit(self.settings.deflate_on_oom, FEATURE_DEFLATE_ON_OOM)
            | bit(self.settings.free_page_reporting, FEATURE_REPORTING)
    }

    fn queues(&self) -> &[u16] {
        if self.settings.free_page_reporting { &QUEUES } else { &QUEUES[..QUEUES_WITHOUT_REPORTS] }
    }

    fn config(&self) -> &DeviceConfig {
        &self.config
    }

    fn config_written(&self, offset: u64, data: &[u8]) {
        self.config.accept(offset, data, ACTUAL);
    }

    fn doorbell(&self, queue: u16) -> Option<&EventFd> {
        (usize::from(queue) < self.queues().len()).then(|| self.service.doorbell())
    }

    fn start(&self, session: Session) {
        self.service.start(session);
    }

    fn stop(&self) -> bool {
        self.service.stop()
    }
}

/// As many pages as fit into the field.
fn pages(size: u64) -> u32 {
    u32::try_from(size / PAGE).unwrap_or(u32::MAX)
}
