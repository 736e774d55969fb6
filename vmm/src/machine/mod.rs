//! The virtual machine: memory, processors, devices, and how a guest gets into it. Everything here works without keys and
//! knows nothing of providers; a [`StartPermit`] is what lets it run.
//!
//! ```text
//! Machine::open ─► EarlyVm ─► prepare(shape) ─► Machine ─► load, add_disk, set_console ─► start(permit) ─► Running
//!                  no shape                     memory, then interrupt controller, then vCPUs
//! ```
//!
//! A disk write goes through `bus` or KVM's doorbell to [`block`], whose worker takes the request out of the [`virtio`] ring,
//! writes it to a [`Disk`], and answers through the ring and an MSI ([`pci`], [`wires`]).

mod acpi;
pub mod balloon;
pub mod block;
pub mod boot;
mod bus;
pub mod console;
mod control;
mod devices;
mod event;
mod generation;
mod hotplug;
pub mod layout;
pub mod memory;
pub mod net;
mod panic;
pub mod pci;
mod power;
pub mod rate;
mod reset;
pub mod rng;
mod rtc;
mod running;
mod serial;
mod sync;
mod thread;
mod vcpu;
pub mod virtio;
pub mod vsock;
pub mod wires;

/// Parsers of this room as functions of bytes, for fuzzing: they must return, whatever comes.
#[doc(hidden)]
pub mod fuzz {
    pub use super::balloon::fuzz::fuzz_balloon;
    pub use super::block::fuzz::fuzz_requests;
    pub use super::boot::fuzz_kernel;
    pub use super::bus::fuzz::fuzz_bus;
    pub use super::console::fuzz::fuzz_console;
    pub use super::net::fuzz::fuzz_net;
    pub use super::pci::fuzz::fuzz_pci;
    pub use super::rng::fuzz::fuzz_rng;
    pub use super::vsock::fuzz::fuzz_vsock;
}

pub use acpi::AcpiError;
pub use balloon::{BalloonCounters, BalloonSettings};
pub use block::{BlockCounters, Disk, DiskError, DiskSettings, RawDisk, serial_number};
pub use boot::{Boot, BootError, Image};
pub use devices::DeviceCounters;
pub use event::{Events, MachineEvent};
pub use hotplug::{Gone, PlugError, UnplugError};
pub use memory::{MemoryError, Pages};
pub use net::{NetCounters, NetSlot, Tap, TapError};
pub use rng::RngCounters;
pub use running::{Counters, Frozen, InspectError, Running};
pub use serial::ConsoleBackend;
pub use thread::{ThreadHook, ThreadKind};
pub use vcpu::{BaselineError, VcpuError, VcpuState};
pub use wires::WireError;

use crate::lease::LeaseGate;
use crate::permit::StartPermit;
use balloon::BalloonDevice;
use block::BlockDevice;
use boot::Loader;
use bus::Bus;
use console::{ConsoleDevice, Line};
use control::Control;
use devices::Devices;
use generation::Generation;
use hotplug::{Bay, Ground, Slots};
use kvm_bindings::{CpuId, KVM_API_VERSION, KVM_MAX_CPUID_ENTRIES};
use kvm_ioctls::{Cap, Kvm, VmFd};
use layout::{KVM_IDENTITY_MAP, KVM_TSS, POWER_GSI, SERIAL_GSI};
use memory::Memory;
use net::NetDevice;
use panic::PanicDevice;
use pci::{PciBus, SlotsTaken};
use policy::config::CpuBaseline;
use policy::encoding::Digest;
use power::Power;
use rng::RngDevice;
use running::Parts;
use serial::{ConsoleInput, SerialPort};
use std::fs::File;
use std::os::fd::{FromRawFd, IntoRawFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::sync::{Arc, Mutex};
use thread::{Background, Crew};
use vcpu::{Vcpu, cpuid};
use virtio::{VirtioDevice, VirtioPci};
use vsock::VsockDevice;
use wires::KvmWires;

/// What must be known before memory is mapped.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Shape {
    /// Processors, 1 to 16.
    pub vcpus: u8,
    /// RAM in bytes: a multiple of 2 MiB from 16 MiB on.
    pub memory: u64,
    /// Address space in bytes for memory added later; a multiple of 2 MiB.
    pub hotplug: u64,
}

/// What a machine may be told beside its shape.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Traits {
    /// What its processors can do.
    pub baseline: CpuBaseline,
    /// Where its memory lies.
    pub pages: Pages,
    /// Whether disks may come and go while it runs.
    pub hotplug: bool,
}

impl Traits {
    /// What a configuration says of them.
    pub fn of(cpus: policy::config::Cpus, memory: policy::config::Memory) -> Self {
        let pages = match (memory.hugepages, memory.hugepage_size, memory.thp) {
            (true, Some(size), _) if size == layout::GIB => Pages::Huge1G,
            (true, _, _) => Pages::Huge2M,
            (false, _, true) => Pages::Transparent,
            (false, _, false) => Pages::Usual,
        };
        Self { baseline: cpus.baseline, pages, hotplug: false }
    }
}

/// A disk to add.
pub struct DiskSlot {
    /// Its name in the API.
    pub id: String,
    /// What lies behind it.
    pub disk: Arc<dyn Disk>,
    /// How it is shown and served.
    pub settings: DiskSettings,
}

/// A machine can't be made or started.
#[derive(Debug, thiserror::Error)]
pub enum MachineError {
    /// No /dev/kvm.
    #[error("cannot open /dev/kvm; this host needs KVM and this process the right to use it")]
    NoKvm(#[source] std::io::Error),
    /// A KVM that lacks something.
    #[error("this host's KVM lacks {0}; a kernel from 5.10 on has it")]
    Lacks(&'static str),
    /// An ioctl failed.
    #[error("KVM refused {what}")]
    Kvm {
        /// What was asked of it.
        what: &'static str,
        /// What it said.
        #[source]
        source: kvm_ioctls::Error,
    },
    /// A shape that no machine has.
    #[error("a machine has 1 to 16 vCPUs and at least 16 MiB of memory in steps of 2 MiB")]
    Shape,
    /// Memory.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// A vCPU.
    #[error(transparent)]
    Vcpu(#[from] VcpuError),
    /// A processor that is less than the configuration asks for.
    #[error(transparent)]
    Baseline(#[from] BaselineError),
    /// Interrupts and doorbells.
    #[error(transparent)]
    Wire(#[from] WireError),
    /// Firmware tables.
    #[error(transparent)]
    Acpi(#[from] AcpiError),
    /// No random numbers.
    #[error("cannot draw the VM's generation id")]
    Generation(#[source] std::io::Error),
    /// What is booted.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// Too many devices.
    #[error(transparent)]
    Slots(#[from] SlotsTaken),
    /// No thread.
    #[error("cannot start a thread; raise the limit on processes")]
    Thread(#[source] std::io::Error),
    /// Nothing is loaded.
    #[error("nothing to boot was loaded")]
    Nothing,
}

/// What can be made before the machine's shape is known: while the host attests.
pub struct EarlyVm {
    vm: VmFd,
    supported: CpuId,
    traits: Traits,
}

/// A machine that does not run yet.
pub struct Machine {
    // Dropped in this order: vCPUs and VM before the memory that their slots show.
    vcpus: Vec<Vcpu>,
    wires: Arc<KvmWires>,
    memory: Arc<Memory>,
    loader: Loader,
    entry: Option<vcpu::Entry>,
    pci: PciBus,
    disks: Vec<Arc<BlockDevice>>,
    devices: Devices,
    panic: bool,
    hotplug: bool,
    console: Option<ConsoleBackend>,
}

impl Machine {
    /// Opens a VM on `kvm`, an open /dev/kvm (see [`open_kvm`]).
    pub fn open(kvm: OwnedFd) -> Result<EarlyVm, MachineError> {
        let kvm = own(kvm);
        check(&kvm)?;
        let error = |what| move |source| MachineError::Kvm { what, source };
        let vm = kvm.create_vm().map_err(error("a VM"))?;
        // Needed on Intel processors without unrestricted guest, harmless elsewhere; before the first vCPU.
        vm.set_identity_map_address(KVM_IDENTITY_MAP).map_err(error("the identity map"))?;
        vm.set_tss_address(KVM_TSS as usize).map_err(error("the task state segment"))?;
        // While nothing else was set: later KVM waits milliseconds, as it does for memory after the interrupt controller.
        vcpu::msr::filter(&vm).map_err(error("a filter of model-specific registers"))?;
        let supported = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(error("its CPUID table"))?;
        Ok(EarlyVm { vm, supported, traits: Traits::default() })
    }

    /// [`open`](Self::open) and [`prepare`](EarlyVm::prepare) in one.
    pub fn prepare(kvm: OwnedFd, shape: Shape) -> Result<Self, MachineError> {
        Self::open(kvm)?.prepare(shape)
    }

    /// Loads what is booted. Each file's digest, where one is given, is compared with the bytes that lie in guest memory.
    pub fn load(&mut self, boot: &Boot<'_>) -> Result<(), MachineError> {
        self.entry = Some(self.loader.load(&self.memory, boot)?);
        Ok(())
    }

    /// The first third of [`load`](Self::load), for when the digest is not known yet: the caller compares what this gives.
    pub fn load_kernel(&mut self, file: &File) -> Result<Digest, MachineError> {
        Ok(self.loader.load_kernel(&self.memory, file)?)
    }

    /// The second third, likewise.
    pub fn load_initrd(&mut self, file: &File) -> Result<Digest, MachineError> {
        Ok(self.loader.load_initrd(&self.memory, file)?)
    }

    /// The last third: the command line, and everything that the kernel finds at its start.
    pub fn finish_load(&mut self, cmdline: &str) -> Result<(), MachineError> {
        self.entry = Some(self.loader.finish(&self.memory, cmdline)?);
        Ok(())
    }

    /// Adds a disk: the next PCI slot.
    pub fn add_disk(&mut self, slot: DiskSlot) -> Result<(), MachineError> {
        let device = Arc::new(BlockDevice::new(&slot.id, slot.disk, &slot.settings)?);
        self.plug(device.clone())?;
        self.disks.push(device);
        Ok(())
    }

    /// Adds the source of random numbers.
    pub fn add_rng(&mut self) -> Result<(), MachineError> {
        let device = Arc::new(RngDevice::new()?);
        self.plug(device.clone())?;
        self.devices.rng = Some(device);
        Ok(())
    }

    /// Adds a network card.
    pub fn add_net(&mut self, slot: NetSlot) -> Result<(), MachineError> {
        let device = Arc::new(NetDevice::new(slot)?);
        self.plug(device.clone())?;
        self.devices.nets.push(device);
        Ok(())
    }

    /// Adds a virtio console at `line`.
    pub fn add_console(&mut self, line: Line) -> Result<(), MachineError> {
        let device = Arc::new(ConsoleDevice::new(line)?);
        self.plug(device.clone())?;
        self.devices.console = Some(device);
        Ok(())
    }

    /// Adds a balloon.
    pub fn add_balloon(&mut self, settings: BalloonSettings) -> Result<(), MachineError> {
        let device = Arc::new(BalloonDevice::new(settings)?);
        self.plug(device.clone())?;
        self.devices.balloon = Some(device);
        Ok(())
    }

    /// Adds sockets between the guest, whose address is `cid`, and clients of `listener`, which must not block.
    pub fn add_vsock(&mut self, cid: u32, listener: UnixListener) -> Result<(), MachineError> {
        let device = Arc::new(VsockDevice::new(cid, listener)?);
        self.plug(device.clone())?;
        self.devices.vsock = Some(device);
        Ok(())
    }

    /// Adds the device by which a kernel that panics ends the machine: in the last slot.
    pub fn add_panic(&mut self) {
        self.panic = true;
    }

    fn plug(&mut self, device: Arc<dyn VirtioDevice>) -> Result<(), MachineError> {
        let slot = self.pci.next_slot()?;
        let function = VirtioPci::new(device, slot, self.memory.ram().clone(), self.wires.clone())?;
        Ok(self.pci.add(Arc::new(function))?)
    }

    /// Connects the serial line; without this nobody types and what the guest sends is lost.
    pub fn set_console(&mut self, console: ConsoleBackend) {
        self.console = Some(console);
    }

    /// Starts all threads, the vCPUs' last. `gate` is asked before every vCPU entry and every disk submission; `hook` runs
    /// first in each thread.
    pub fn start(self, permit: StartPermit, gate: Arc<LeaseGate>, hook: ThreadHook) -> Result<Running, MachineError> {
        let entry = self.entry.ok_or(MachineError::Nothing)?;
        let first = self.vcpus.first().ok_or(MachineError::Shape)?;
        first.set_entry(entry)?;
        vcpu::kick::install().map_err(MachineError::Thread)?;

        let events = Arc::new(Events::new()?);
        let control = Arc::new(Control::new(events));
        let crew = Arc::new(Crew::new(hook, gate.clone(), control.clone()));
        let power = Arc::new(Power::new(control.clone(), self.wires.pin(POWER_GSI)?));
        let console = self.console.unwrap_or(ConsoleBackend { input: None, output: Box::new(std::io::sink()) });
        let serial = Arc::new(SerialPort::new(self.wires.pin(SERIAL_GSI)?, console.output)?);
        let mut pci = self.pci;
        if self.panic {
            let device = PanicDevice::new(control.clone(), pci.next_slot()?);
            pci.add(Arc::new(device))?;
        }
        let generation = Generation::new(power.clone());
        let bay = match self.hotplug {
            true => {
                let fixed = pci.next_slot().unwrap_or(layout::PCI_SLOTS as u8);
                let ground = Ground { memory: self.memory.ram().clone(), wires: self.wires.clone(), fixed };
                let registers = |emptied| Arc::new(Slots::new(power.clone(), pci.hot().clone(), emptied));
                Some(Bay::hire(crew.clone(), ground, registers).map_err(MachineError::Thread)?)
            }
            false => None,
        };
        let slots = bay.as_ref().map(|bay| bay.registers().clone());
        let bus = Arc::new(Bus::new(serial.clone(), power.clone(), pci, slots));

        let mut background: Vec<Arc<dyn Background>> = vec![];
        for disk in &self.disks {
            background.extend(disk.hire(&crew).map_err(MachineError::Thread)?);
        }
        background.extend(bay.iter().map(|bay| bay.clone() as Arc<dyn Background>));
        background.extend(self.devices.hire(&crew).map_err(MachineError::Thread)?);
        if let Some(input) = console.input {
            background.push(ConsoleInput::hire(serial.clone(), input, &crew)?);
        }
        let exits = self.vcpus.iter().map(Vcpu::exits).collect();
        let vcpus: Vec<_> = self.vcpus.into_iter().map(|vcpu| Arc::new(Mutex::new(vcpu))).collect();
        let started = run_vcpus(&vcpus, &bus, &control, &gate, &crew, permit);
        let memory = self.memory;
        let (disks, devices) = (self.disks, self.devices);
        let turn = Mutex::new(());
        let _wires = self.wires;
        let parts = Parts {
            control,
            vcpus,
            exits,
            background,
            power,
            generation,
            serial,
            disks,
            bay,
            devices,
            bus,
            memory,
            _wires,
            turn,
        };
        let running = Running(Arc::new(parts));
        if let Err(error) = started {
            running.stop();
            return Err(MachineError::Thread(error));
        }
        Ok(running)
    }
}

/// The one place where vCPUs begin to run: it takes the leave to.
fn run_vcpus(
    vcpus: &[Arc<Mutex<Vcpu>>],
    bus: &Arc<Bus>,
    control: &Arc<Control>,
    gate: &Arc<LeaseGate>,
    crew: &Crew,
    _permit: StartPermit,
) -> std::io::Result<()> {
    control.begin(vcpus.len(), |index| {
        let (vcpu, bus, control, gate) = (vcpus[index].clone(), bus.clone(), control.clone(), gate.clone());
        crew.spawn(ThreadKind::Vcpu, format!("vcpu-{index}"), move || vcpu::live(&vcpu, &bus, &control, &gate))
    })
}

impl EarlyVm {
    /// Tells it more than its shape.
    pub fn with(mut self, traits: Traits) -> Self {
        self.traits = traits;
        self
    }

    /// Gives the VM its memory, interrupt controller, vCPUs and firmware tables. No byte of a guest, and no key.
    pub fn prepare(self, shape: Shape) -> Result<Machine, MachineError> {
        const STEP: u64 = 2 << 20;
        let steps = shape.memory.is_multiple_of(STEP) && shape.hotplug.is_multiple_of(STEP);
        if !(1..=16).contains(&shape.vcpus) || shape.memory < 16 << 20 || !steps {
            return Err(MachineError::Shape);
        }
        let vm = Arc::new(self.vm);
        let facts = cpuid::Facts {
            baseline: self.traits.baseline,
            count: shape.vcpus,
            tsc_deadline: vm.check_extension(Cap::TscDeadlineTimer),
        };
        let table = cpuid::common(&self.supported, facts)?;
        let memory = Arc::new(Memory::of(self.traits.pages, shape.memory, shape.hotplug)?);
        // All slots before the interrupt controller: each one after it costs milliseconds.
        memory.register(&vm)?;
        vm.create_irq_chip().map_err(|source| MachineError::Kvm { what: "an interrupt controller", source })?;
        let vcpus = (0..shape.vcpus).map(|index| Vcpu::new(&vm, index, &table, memory.clone()));
        let vcpus = vcpus.collect::<Result<Vec<_>, _>>()?;
        acpi::write(memory.ram(), shape.vcpus, self.traits.hotplug)?;
        Generation::write(memory.ram()).map_err(MachineError::Generation)?;
        reset::write(memory.ram());
        Ok(Machine {
            vcpus,
            wires: Arc::new(KvmWires::new(vm)),
            memory,
            loader: Loader::default(),
            entry: None,
            pci: PciBus::default(),
            disks: vec![],
            devices: Devices::default(),
            panic: false,
            hotplug: self.traits.hotplug,
            console: None,
        })
    }
}

/// Opens /dev/kvm.
pub fn open_kvm() -> Result<OwnedFd, MachineError> {
    let file = File::options().read(true).write(true).open("/dev/kvm").map_err(MachineError::NoKvm)?;
    Ok(file.into())
}

#[allow(unsafe_code)]
fn own(kvm: OwnedFd) -> Kvm {
    // SAFETY: the descriptor is open and nobody else's: `Kvm` now owns it. If it is no KVM, every ioctl fails cleanly.
    unsafe { Kvm::from_raw_fd(kvm.into_raw_fd()) }
}

fn check(kvm: &Kvm) -> Result<(), MachineError> {
    if kvm.get_api_version() != KVM_API_VERSION.cast_signed() {
        return Err(MachineError::Lacks("API version 12"));
    }
    let needed = [
        (Cap::UserMemory, "user memory"),
        (Cap::Irqchip, "an interrupt controller"),
        (Cap::Irqfd, "irqfd"),
        (Cap::Ioeventfd, "ioeventfd"),
        (Cap::IrqRouting, "interrupt routing"),
        (Cap::SignalMsi, "message-signalled interrupts"),
        (Cap::ImmediateExit, "immediate exit"),
        (Cap::ExtCpuid, "CPUID tables"),
        (Cap::X86MsrFilter, "a filter of model-specific registers"),
    ];
    match needed.into_iter().find(|(cap, _)| !kvm.check_extension(*cap)) {
        Some((_, what)) => Err(MachineError::Lacks(what)),
        None => Ok(()),
    }
}
