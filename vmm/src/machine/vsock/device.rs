//! What the guest sees of its sockets.

use super::counters::{Tally, VsockCounters};
use super::worker::Switchboard;
use crate::machine::sync::lock;
use crate::machine::thread::{Background, Crew, ThreadKind};
use crate::machine::virtio::{DeviceConfig, Service, Session, VirtioDevice};
use crate::machine::wires::WireError;
use std::os::unix::net::UnixListener;
use std::sync::{Arc, Mutex};
use vmm_sys_util::eventfd::EventFd;

/// Receive, transmit, events.
const QUEUES: [u16; 3] = [128; 3];

/// A virtio socket device (virtio 1.3, 5.10).
pub struct VsockDevice {
    config: DeviceConfig,
    service: Service,
    tally: Arc<Tally>,
    /// Until the thread has it.
    board: Mutex<Option<Switchboard>>,
}

impl VsockDevice {
    /// The device of a guest whose address is `cid` (3 or more), for clients of `listener`, which must not block.
    pub fn new(cid: u32, listener: UnixListener) -> Result<Self, WireError> {
        let cid = u64::from(cid);
        let tally = Arc::<Tally>::default();
        let board = Mutex::new(Some(Switchboard::new(tally.clone(), cid, Some(listener))));
        Ok(Self { config: DeviceConfig::new(cid.to_le_bytes().to_vec()), service: Service::new()?, tally, board })
    }

    /// What it carried.
    pub fn counters(&self) -> VsockCounters {
        self.tally.snapshot(self.config.breaks())
    }

    /// Starts its thread; once.
    pub fn hire(&self, crew: &Crew) -> std::io::Result<Arc<dyn Background>> {
        let board = lock(&self.board).take().ok_or(std::io::ErrorKind::AlreadyExists)?;
        self.service.hire(ThreadKind::Vsock, "vsock".into(), board, crew)
    }
}

impl VirtioDevice for VsockDevice {
    fn device_type(&self) -> u16 {
        19
    }

    fn class(&self) -> u32 {
        0x07_8000
    }

    fn features(&self) -> u64 {
        0
    }

    fn queues(&self) -> &[u16] {
        &QUEUES
    }

    fn config(&self) -> &DeviceConfig {
        &self.config
    }

    fn doorbell(&self, queue: u16) -> Option<&EventFd> {
        (usize::from(queue) < QUEUES.len()).then(|| self.service.doorbell())
    }

    fn start(&self, session: Session) {
        self.service.start(session);
    }

    fn stop(&self) -> bool {
        self.service.stop()
    }
}
