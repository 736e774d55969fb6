//! The handle to a machine that runs.

use super::DiskSlot;
use super::block::{BlockCounters, BlockDevice, DiskError};
use super::bus::Bus;
use super::control::Control;
use super::devices::{DeviceCounters, Devices};
use super::event::Events;
use super::generation::Generation;
use super::hotplug::{Bay, Gone, PlugError, UnplugError};
use super::memory::Memory;
use super::power::Power;
use super::serial::SerialPort;
use super::sync::lock;
use super::thread::Background;
use super::vcpu::{Vcpu, VcpuError, VcpuState};
use super::wires::KvmWires;
use serde::Serialize;
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use vm_memory::{Bytes, GuestAddress};

/// A machine whose vCPUs were started. Clones are handles to the same machine. It runs on when the last handle is dropped:
/// only [`stop`](Self::stop), the guest, or a failure end it.
#[derive(Clone)]
pub struct Running(pub(super) Arc<Parts>);

pub(super) struct Parts {
    pub(super) control: Arc<Control>,
    pub(super) vcpus: Vec<Arc<Mutex<Vcpu>>>,
    pub(super) exits: Vec<Arc<AtomicU64>>,
    pub(super) background: Vec<Arc<dyn Background>>,
    pub(super) power: Arc<Power>,
    pub(super) generation: Generation,
    pub(super) serial: Arc<SerialPort>,
    pub(super) disks: Vec<Arc<BlockDevice>>,
    pub(super) bay: Option<Arc<Bay>>,
    pub(super) devices: Devices,
    pub(super) bus: Arc<Bus>,
    pub(super) memory: Arc<Memory>,
    /// Never used again, but interrupts end with it.
    pub(super) _wires: Arc<KvmWires>,
    /// One pause, resume, stop or inspection at a time.
    pub(super) turn: Mutex<()>,
}

/// What a machine did since it started.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct Counters {
    /// How often each vCPU left the guest.
    pub vcpu_exits: Vec<u64>,
    /// Accesses to ports and memory that no device answers for.
    pub stray_accesses: u64,
    /// Bytes that the console's other end did not take.
    pub console_bytes_lost: u64,
    /// Each disk, by its name.
    pub disks: BTreeMap<String, BlockCounters>,
    /// The other virtio devices.
    #[serde(flatten)]
    pub devices: DeviceCounters,
}

/// Why a machine can't be inspected.
#[derive(Debug, thiserror::Error)]
pub enum InspectError {
    /// It runs.
    #[error("the machine must be paused first")]
    Runs,
    /// KVM gives no registers.
    #[error("the registers of a vCPU can't be read")]
    Registers(#[from] VcpuError),
    /// No random numbers.
    #[error("cannot draw another generation id")]
    Generation(#[source] std::io::Error),
    /// Not RAM.
    #[error("there is no memory at {0:#x}")]
    Address(u64),
}

/// A paused machine, held still while it is looked at.
pub struct Frozen<'a> {
    parts: &'a Parts,
}

impl Running {
    /// Pauses: returns when every vCPU is out of the guest and every device quiet.
    pub fn pause(&self) {
        let _turn = lock(&self.0.turn);
        self.0.control.pause();
        self.0.background.iter().for_each(|device| device.pause());
    }

    /// Resumes; devices go on with what waits in their queues. Also to be called after keys were put back, and after the
    /// lease's gate was opened again: vCPUs and requests that found it closed wait for this.
    pub fn resume(&self) {
        let _turn = lock(&self.0.turn);
        self.0.background.iter().for_each(|device| device.resume());
        self.0.control.resume();
    }

    /// Presses the power button.
    pub fn power_button(&self) {
        self.0.power.press();
    }

    /// Asks the guest to put so many bytes (a multiple of 4096) into its balloon; false if it has none.
    pub fn resize_balloon(&self, size: u64) -> bool {
        self.0.devices.balloon.as_ref().map(|balloon| balloon.resize(size)).is_some()
    }

    /// Bytes that the guest says are in its balloon.
    pub fn in_balloon(&self) -> u64 {
        self.0.devices.balloon.as_ref().map_or(0, |balloon| balloon.held())
    }

    /// Gives the guest another generation id, and tells it: for a machine that goes on from a saved state. It must be paused.
    pub fn renew_generation(&self) -> Result<(), InspectError> {
        let _turn = lock(&self.0.turn);
        if !self.0.control.resting() {
            return Err(InspectError::Runs);
        }
        self.0.generation.renew(self.0.memory.ram()).map_err(InspectError::Generation)
    }

    /// Ends vCPUs and devices; returns when all their threads have ended. Requests in hand are finished, others stay
    /// unanswered. No event follows.
    pub fn stop(&self) {
        let _turn = lock(&self.0.turn);
        self.0.control.stop();
        self.0.background.iter().for_each(|device| device.stop());
    }

    /// Whether it ends, or has ended: nothing lets it run again.
    pub fn ends(&self) -> bool {
        self.0.control.ends()
    }

    /// Adds a disk, and tells the guest; gives its slot on PCI bus 0. `gone` is called when it has left the machine.
    pub fn plug(&self, disk: DiskSlot, gone: Gone) -> Result<u8, PlugError> {
        let bay = self.0.bay.as_ref().ok_or(PlugError::NoSlots)?;
        match self.0.disks.iter().any(|other| other.name() == disk.id) {
            true => Err(PlugError::Name(disk.id)),
            false => bay.plug(disk, gone),
        }
    }

    /// Asks the guest to let go of a disk that was [added](Self::plug). It leaves when the guest has ejected it; until then it may be
    /// asked for again.
    pub fn unplug(&self, name: &str) -> Result<(), UnplugError> {
        if self.0.disks.iter().any(|disk| disk.name() == name) {
            return Err(UnplugError::Fixed(name.into()));
        }
        self.0.bay.as_ref().map_or_else(|| Err(UnplugError::Unknown(name.into())), |bay| bay.ask(name))
    }

    /// The disks that were added: name, and whether read only.
    pub fn added_disks(&self) -> Vec<(String, bool)> {
        self.added().map(|disk| (disk.name().to_owned(), disk.read_only())).collect()
    }

    /// Makes durable what the guest wrote to its disks: to all, whatever becomes of one. The name of one that failed, and why.
    pub fn flush_disks(&self) -> Result<(), (String, DiskError)> {
        let flush = |disk: Arc<BlockDevice>| disk.flush().map_err(|e| (disk.name().to_owned(), e));
        self.all_disks().map(flush).fold(Ok(()), Result::and)
    }

    fn added(&self) -> impl Iterator<Item = Arc<BlockDevice>> {
        self.0.bay.iter().flat_map(|bay| bay.disks())
    }

    fn all_disks(&self) -> impl Iterator<Item = Arc<BlockDevice>> {
        self.0.disks.iter().cloned().chain(self.added())
    }

    /// How the machine tells its end.
    pub fn events(&self) -> &Arc<Events> {
        self.0.control.events()
    }

    /// What it did.
    pub fn counters(&self) -> Counters {
        let parts = &self.0;
        Counters {
            vcpu_exits: parts.exits.iter().map(|exits| exits.load(Ordering::Relaxed)).collect(),
            stray_accesses: parts.bus.stray(),
            console_bytes_lost: parts.serial.lost(),
            disks: self.all_disks().map(|disk| (disk.name().to_owned(), disk.counters())).collect(),
            devices: parts.devices.counters(),
        }
    }

    /// Looks at the size of the disk called `name` again, and tells the guest where it changed. Gives the bytes that the guest
    /// sees; `None` if there is no such disk.
    pub fn look_again(&self, name: &str) -> Option<u64> {
        self.all_disks().find(|disk| disk.name() == name).map(|disk| disk.look_again())
    }

    /// Makes the disk called `name` `bytes` long, and tells the guest. Gives the bytes that the guest sees; `None` if there is no
    /// such disk.
    pub fn grow(&self, name: &str, bytes: u64) -> Option<Result<u64, DiskError>> {
        self.0.disks.iter().find(|disk| disk.name() == name).map(|disk| disk.grow(bytes))
    }

    /// Looks at memory and registers of a paused machine, which can't be resumed or stopped meanwhile: `look` must not wait for
    /// anybody.
    pub fn inspect<R>(&self, look: impl FnOnce(&Frozen<'_>) -> R) -> Result<R, InspectError> {
        let _turn = lock(&self.0.turn);
        if !self.0.control.resting() {
            return Err(InspectError::Runs);
        }
        Ok(look(&Frozen { parts: &self.0 }))
    }
}

impl Frozen<'_> {
    /// RAM as (guest address, length in bytes), rising.
    pub fn regions(&self) -> Vec<(u64, u64)> {
        self.parts.memory.ranges().collect()
    }

    /// Copies guest memory from `address` on; the range must lie in RAM.
    pub fn read(&self, address: u64, data: &mut [u8]) -> Result<(), InspectError> {
        self.parts.memory.ram().read_slice(data, GuestAddress(address)).map_err(|_| InspectError::Address(address))
    }

    /// Registers of all vCPUs, by index.
    pub fn vcpus(&self) -> Result<Vec<VcpuState>, InspectError> {
        self.parts.vcpus.iter().map(|vcpu| lock(vcpu).state().map_err(Into::into)).collect()
    }
}
