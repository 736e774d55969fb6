//! What the guest sees of a console.

use super::counters::{ConsoleCounters, Tally};
use super::line::Line;
use super::worker::Carrier;
use crate::machine::sync::lock;
use crate::machine::thread::{Background, Crew, ThreadKind};
use crate::machine::virtio::{DeviceConfig, Service, Session, VirtioDevice};
use crate::machine::wires::WireError;
use std::sync::{Arc, Mutex};
use vmm_sys_util::eventfd::EventFd;

const QUEUE_SIZE: u16 = 128;
/// `struct virtio_console_config` (5.3.4), of which nothing counts without its features.
const CONFIG_SIZE: usize = 12;

/// A virtio console (virtio 1.3, 5.3).
pub struct ConsoleDevice {
    config: DeviceConfig,
    service: Service,
    tally: Arc<Tally>,
    /// Until the thread has it.
    line: Mutex<Option<Line>>,
}

impl ConsoleDevice {
    /// The console at `line`.
    pub fn new(line: Line) -> Result<Self, WireError> {
        let config = DeviceConfig::new(vec![0; CONFIG_SIZE]);
        Ok(Self { config, service: Service::new()?, tally: Arc::default(), line: Mutex::new(Some(line)) })
    }

    /// What it carried.
    pub fn counters(&self) -> ConsoleCounters {
        self.tally.snapshot(self.config.breaks())
    }

    /// Starts its thread; once.
    pub fn hire(&self, crew: &Crew) -> std::io::Result<Arc<dyn Background>> {
        let line = lock(&self.line).take().ok_or(std::io::ErrorKind::AlreadyExists)?;
        self.service.hire(ThreadKind::VirtioConsole, "hvc".into(), Carrier::new(self.tally.clone(), line), crew)
    }
}

impl VirtioDevice for ConsoleDevice {
    fn device_type(&self) -> u16 {
        3
    }

    fn class(&self) -> u32 {
        0x07_8000
    }

    fn features(&self) -> u64 {
        0
    }

    fn queues(&self) -> &[u16] {
        &[QUEUE_SIZE; 2]
    }

    fn config(&self) -> &DeviceConfig {
        &self.config
    }

    fn doorbell(&self, queue: u16) -> Option<&EventFd> {
        (queue < 2).then(|| self.service.doorbell())
    }

    fn start(&self, session: Session) {
        self.service.start(session);
    }

    fn stop(&self) -> bool {
        self.service.stop()
    }
}
