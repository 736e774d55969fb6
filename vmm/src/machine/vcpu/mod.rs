//! One virtual processor and the thread that runs it.

mod baseline;
pub(super) mod cpuid;
mod exit;
pub(super) mod kick;
pub(super) mod msr;
mod state;

pub use baseline::BaselineError;
pub use state::VcpuState;
pub(super) use state::{Entry, boot_gdt};

use super::bus::Bus;
use super::control::Control;
use super::event::MachineEvent;
use super::memory::Memory;
use super::sync::lock;
use crate::lease::LeaseGate;
use exit::Exit;
use kick::Kickable;
use kvm_bindings::{CpuId, Msrs, kvm_cpuid_entry2, kvm_msr_entry};
use kvm_ioctls::{VcpuFd, VmFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

const MSR_MTRR_DEFAULT_TYPE: u32 = 0x2ff;
/// MTRRs on, all memory write-back; without it Linux does without PAT.
const MTRR_WRITE_BACK: u64 = 1 << 11 | 6;
/// KVM's shared pages: the run structure, the port data, the coalesced ring.
const SHARED_PAGES_MIN: usize = 2 * 4096;
/// How often an access that was begun may go on while a vCPU is brought to rest.
const SETTLE_ROUNDS: usize = 64;

/// A vCPU that is made but does not run.
pub(super) struct Vcpu {
    index: u8,
    fd: VcpuFd,
    /// An access was answered, but the guest has not taken the answer yet.
    unsettled: bool,
    exits: Arc<AtomicU64>,
    /// What its slots show must outlive it.
    _memory: Arc<Memory>,
}

/// A vCPU can't be made or set up.
#[derive(Debug, thiserror::Error)]
#[error("KVM refused {what} of vCPU {index}")]
pub struct VcpuError {
    index: u8,
    what: &'static str,
    #[source]
    source: kvm_ioctls::Error,
}

impl Vcpu {
    /// vCPU `index` of `vm`, with its own copy of the CPUID table.
    pub(super) fn new(
        vm: &VmFd,
        index: u8,
        table: &[kvm_cpuid_entry2],
        memory: Arc<Memory>,
    ) -> Result<Self, VcpuError> {
        let error = |what| move |source| VcpuError { index, what, source };
        let too_small = kvm_ioctls::Error::new(libc::ENODEV);
        if vm.run_size() < SHARED_PAGES_MIN {
            return Err(error("the shared pages")(too_small));
        }
        let fd = vm.create_vcpu(index.into()).map_err(error("the making"))?;
        let mut table = table.to_vec();
        cpuid::personalize(&mut table, index, fd.get_tsc_khz().ok());
        let table = CpuId::from_entries(&table).map_err(|_| error("the CPUID table")(too_small))?;
        fd.set_cpuid2(&table).map_err(error("the CPUID table"))?;
        let mtrr = kvm_msr_entry { index: MSR_MTRR_DEFAULT_TYPE, data: MTRR_WRITE_BACK, ..Default::default() };
        let msrs = Msrs::from_entries(&[mtrr]).map_err(|_| error("the MTRRs")(too_small))?;
        fd.set_msrs(&msrs).map_err(error("the MTRRs"))?;
        Ok(Self { index, fd, unsettled: false, exits: Arc::default(), _memory: memory })
    }

    /// Where the first vCPU enters the guest.
    pub(super) fn set_entry(&self, entry: Entry) -> Result<(), VcpuError> {
        let error = |source| VcpuError { index: self.index, what: "the first registers", source };
        state::set_entry(&self.fd, entry).map_err(error)
    }

    /// Counts how often it left the guest.
    pub(super) fn exits(&self) -> Arc<AtomicU64> {
        self.exits.clone()
    }

    /// All registers; the vCPU must rest.
    pub(super) fn state(&self) -> Result<VcpuState, VcpuError> {
        let error = |source| VcpuError { index: self.index, what: "the registers", source };
        Ok(VcpuState {
            index: self.index,
            regs: self.fd.get_regs().map_err(error)?,
            sregs: self.fd.get_sregs().map_err(error)?,
            fpu: self.fd.get_fpu().map_err(error)?,
        })
    }

    /// Enters the guest once and does what it needs.
    fn step(&mut self, bus: &Bus, kicks: &Kickable) -> Result<(), String> {
        self.exits.fetch_add(1, Ordering::Relaxed);
        self.unsettled = match exit::enter(&mut self.fd) {
            Exit::Interrupted => {
                kicks.clear();
                false
            }
            Exit::Fatal(why) => return Err(why),
            other => {
                answer(other, bus);
                true
            }
        };
        Ok(())
    }

    /// Lets the guest take the last answer without running it, so that its registers are those between two instructions.
    fn settle(&mut self, bus: &Bus, kicks: &Kickable) -> Result<(), String> {
        let mut rounds = 0;
        while self.unsettled && rounds < SETTLE_ROUNDS {
            self.fd.set_kvm_immediate_exit(1);
            self.step(bus, kicks)?;
            rounds += 1;
        }
        Ok(())
    }
}

/// The life of a vCPU's thread.
pub(super) fn live(vcpu: &Mutex<Vcpu>, bus: &Bus, control: &Control, gate: &LeaseGate) {
    if let Err(event) = run(vcpu, bus, control, gate) {
        control.end(event);
    }
    control.leave();
}

fn run(vcpu: &Mutex<Vcpu>, bus: &Bus, control: &Control, gate: &LeaseGate) -> Result<(), MachineEvent> {
    loop {
        // Held while it runs; whoever inspects a resting vCPU takes it.
        let mut own = lock(vcpu);
        let kicks = Kickable::new(&mut own.fd);
        while control.may_enter(gate) {
            own.step(bus, &kicks).map_err(|why| own.failure(&why))?;
        }
        own.settle(bus, &kicks).map_err(|why| own.failure(&why))?;
        drop(kicks);
        drop(own);
        if !control.park(gate) {
            return Ok(());
        }
    }
}

impl Vcpu {
    fn failure(&self, why: &str) -> MachineEvent {
        MachineEvent::Failed(format!("vCPU {}: {why}; {}", self.index, state::describe(&self.fd)))
    }
}

fn answer(exit: Exit<'_>, bus: &Bus) {
    match exit {
        Exit::PortIn { port, width, data } => data.chunks_mut(width).for_each(|unit| bus.port_in(port, unit)),
        Exit::PortOut { port, width, data } => data.chunks(width).for_each(|unit| bus.port_out(port, unit)),
        Exit::MemoryRead { address, data } => bus.memory_read(address, data),
        Exit::MemoryWrite { address, data } => bus.memory_write(address, data),
        Exit::Interrupted | Exit::Fatal(_) => {}
    }
}

#[cfg(test)]
mod tests;
