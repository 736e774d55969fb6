//! The thread that readies disks and clears away what the guest ejected, and where its owner finds it. Whatever may wait (threads that
//! start and end, a last flush) is done by this thread; it is the only one that makes threads once the machine runs.

use super::{Emptied, Slots};
use crate::machine::DiskSlot;
use crate::machine::block::{BlockDevice, DiskError};
use crate::machine::layout::{HOT_SLOT_FIRST, HOT_SLOTS};
use crate::machine::memory::GuestRam;
use crate::machine::pci::PciFunction;
use crate::machine::sync::lock;
use crate::machine::thread::{Background, Crew, Task, ThreadKind};
use crate::machine::virtio::VirtioPci;
use crate::machine::wires::{WireError, Wires};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, OnceLock};

/// Told once the guest has ejected a disk and nothing of it is under way any more: how its last flush went. Dropped untold where the
/// machine ends first.
pub type Gone = Box<dyn FnOnce(Result<(), DiskError>) + Send>;

/// Why a disk can't be added.
#[derive(Debug, thiserror::Error)]
pub enum PlugError {
    /// The machine has no such slots.
    #[error("this machine takes no disks while it runs")]
    NoSlots,
    /// A name that is taken.
    #[error("the VM has a disk {0} already")]
    Name(String),
    /// All slots are taken.
    #[error("the slots for disks that are added are all taken; remove one first")]
    Full,
    /// Interrupts and doorbells.
    #[error(transparent)]
    Wire(#[from] WireError),
    /// No thread.
    #[error("cannot start a thread; raise the limit on processes")]
    Thread(#[source] std::io::Error),
    /// The machine ends.
    #[error("the machine ends")]
    Ends,
}

/// Why a disk can't be asked for.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum UnplugError {
    /// No such disk.
    #[error("the VM has no disk {0}")]
    Unknown(String),
    /// A disk of the start.
    #[error("disk {0} was there when the VM started, and stays: only disks that were added can be removed")]
    Fixed(String),
    /// It is on its way.
    #[error("the guest has let go of disk {0} already; it will be gone in a moment")]
    Leaving(String),
}

/// What a disk is put into.
pub(in crate::machine) struct Ground {
    /// Guest memory.
    pub(in crate::machine) memory: GuestRam,
    /// Interrupts and doorbells.
    pub(in crate::machine) wires: Arc<dyn Wires>,
    /// Slots of the bus that are taken for good.
    pub(in crate::machine) fixed: u8,
}

/// The disks that came while the machine runs.
pub(in crate::machine) struct Bay {
    registers: Arc<Slots>,
    work: Sender<Work>,
    held: Mutex<Held>,
    task: OnceLock<Task>,
}

#[derive(Default)]
struct Held {
    disks: Vec<Plugged>,
    /// The machine is paused: what comes now rests until it goes on.
    paused: bool,
}

/// A disk from when its threads run until they have ended.
struct Plugged {
    slot: u8,
    device: Arc<BlockDevice>,
    threads: Vec<Arc<dyn Background>>,
    gone: Gone,
}

/// What the thread is to do.
enum Work {
    Plug(Box<(DiskSlot, Gone)>, Sender<Result<u8, PlugError>>),
    Emptied(u8, Arc<dyn PciFunction>),
    End,
}

impl Bay {
    /// An empty bay and its thread. `registers` makes the registers, with what they tell of slots that the guest emptied.
    pub(in crate::machine) fn hire(
        crew: Arc<Crew>,
        ground: Ground,
        registers: impl FnOnce(Box<Emptied>) -> Arc<Slots>,
    ) -> std::io::Result<Arc<Self>> {
        let (work, inbox) = channel();
        let tell = work.clone();
        // Where nobody listens any more the machine ends.
        let registers = registers(Box::new(move |slot, function| drop(tell.send(Work::Emptied(slot, function)))));
        let bay = Arc::new(Self { registers, work, held: Mutex::default(), task: OnceLock::new() });
        let own = bay.clone();
        let hirer = crew.clone();
        let task = crew.spawn(ThreadKind::Slots, "slots".into(), move || own.serve(&inbox, &ground, &hirer))?;
        // Nobody else sets it.
        let _ = bay.task.set(task);
        Ok(bay)
    }

    /// The registers.
    pub(in crate::machine) fn registers(&self) -> &Arc<Slots> {
        &self.registers
    }

    /// Adds a disk and tells the guest; gives its slot.
    pub(in crate::machine) fn plug(&self, disk: DiskSlot, gone: Gone) -> Result<u8, PlugError> {
        let (tell, told) = channel();
        self.work.send(Work::Plug(Box::new((disk, gone)), tell)).map_err(|_| PlugError::Ends)?;
        told.recv().map_err(|_| PlugError::Ends)?
    }

    /// Asks the guest to let go of the disk called `name`.
    pub(in crate::machine) fn ask(&self, name: &str) -> Result<(), UnplugError> {
        let slot = lock(&self.held).disks.iter().find(|disk| disk.device.name() == name).map(|disk| disk.slot);
        match slot.map(|slot| self.registers.ask(slot)) {
            None => Err(UnplugError::Unknown(name.into())),
            Some(false) => Err(UnplugError::Leaving(name.into())),
            Some(true) => Ok(()),
        }
    }

    /// Those that there are, also those that leave.
    pub(in crate::machine) fn disks(&self) -> Vec<Arc<BlockDevice>> {
        lock(&self.held).disks.iter().map(|disk| disk.device.clone()).collect()
    }

    fn serve(&self, inbox: &Receiver<Work>, ground: &Ground, crew: &Crew) {
        while let Ok(work) = inbox.recv() {
            match work {
                // Whoever asked may be gone; the disk is there all the same.
                Work::Plug(disk, tell) => drop(tell.send(self.ready(disk.0, disk.1, ground, crew))),
                Work::Emptied(slot, function) => self.clear_away(slot, function),
                Work::End => return,
            }
        }
    }

    fn ready(&self, disk: DiskSlot, gone: Gone, ground: &Ground, crew: &Crew) -> Result<u8, PlugError> {
        let slot = self.room_for(&disk.id, ground.fixed)?;
        let device = Arc::new(BlockDevice::new(&disk.id, disk.disk, &disk.settings)?);
        let function = VirtioPci::new(device.clone(), slot, ground.memory.clone(), ground.wires.clone())?;
        let threads = device.hire(crew).map_err(|error| {
            function.withdraw();
            PlugError::Thread(error)
        })?;
        {
            let mut held = lock(&self.held);
            if held.paused {
                threads.iter().for_each(|thread| thread.pause());
            }
            held.disks.push(Plugged { slot, device, threads, gone });
        }
        self.registers.fill(slot, Arc::new(function));
        Ok(slot)
    }

    /// A slot for a disk called `name`. None is taken twice before it is cleared away: this thread alone fills and clears.
    fn room_for(&self, name: &str, fixed: u8) -> Result<u8, PlugError> {
        let held = lock(&self.held);
        if held.disks.iter().any(|disk| disk.device.name() == name) {
            return Err(PlugError::Name(name.into()));
        }
        let mut slots = (HOT_SLOT_FIRST..HOT_SLOT_FIRST + HOT_SLOTS as u8).filter(|slot| *slot >= fixed);
        slots.find(|slot| held.disks.iter().all(|disk| disk.slot != *slot)).ok_or(PlugError::Full)
    }

    /// Ends what was in `slot`. It is in the list until its threads have ended, so that a pause waits for them.
    fn clear_away(&self, slot: u8, function: Arc<dyn PciFunction>) {
        let of_slot = |disk: &Plugged| disk.slot == slot;
        let threads = lock(&self.held).disks.iter().find(|disk| of_slot(disk)).map(|disk| disk.threads.clone());
        threads.unwrap_or_default().iter().for_each(|thread| thread.stop());
        let plugged = {
            let mut held = lock(&self.held);
            held.disks.iter().position(of_slot).map(|index| held.disks.remove(index))
        };
        if let Some(Plugged { device, gone, .. }) = plugged {
            let flushed = device.flush();
            // The last of them closes the disk.
            drop((function, device));
            gone(flushed);
        }
    }
}

impl Background for Bay {
    fn pause(&self) {
        let mut held = lock(&self.held);
        held.paused = true;
        held.disks.iter().flat_map(|disk| &disk.threads).for_each(|thread| thread.pause());
    }

    fn resume(&self) {
        let mut held = lock(&self.held);
        held.paused = false;
        held.disks.iter().flat_map(|disk| &disk.threads).for_each(|thread| thread.resume());
    }

    fn stop(&self) {
        // A thread that is gone has ended the machine.
        let _ = self.work.send(Work::End);
        if let Some(task) = self.task.get() {
            task.join();
        }
        let threads: Vec<_> = lock(&self.held).disks.iter().flat_map(|disk| disk.threads.clone()).collect();
        threads.iter().for_each(|thread| thread.stop());
    }
}

#[cfg(test)]
#[path = "worker_tests.rs"]
mod tests;
