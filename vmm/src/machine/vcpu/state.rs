//! A vCPU's registers: how it enters the guest, and how it is described.

use crate::machine::layout::{BOOT_GDT, BOOT_PAGE_TABLES, BOOT_STACK, PVH_START_INFO, ZERO_PAGE};
use kvm_bindings::{kvm_fpu, kvm_regs, kvm_segment, kvm_sregs};
use kvm_ioctls::{Error, VcpuFd};

const CR0_PE: u64 = 1;
const CR0_ET: u64 = 1 << 4;
const CR0_NE: u64 = 1 << 5;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
/// The bit that is always set.
const RFLAGS: u64 = 2;

/// Where a processor begins after a reset: base of the code segment, and instruction pointer.
const RESET_ADDRESS: (u64, u64) = (0xffff_0000, 0xfff0);

/// Selectors of the boot GDT, as the Linux boot protocol wants them.
const CODE: u16 = 0x10;
const DATA: u16 = 0x18;
const TASK: u16 = 0x20;

/// How the first vCPU enters.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Entry {
    /// Linux 64-bit boot protocol, at this address.
    Linux64(u64),
    /// PVH, at this address.
    Pvh(u32),
}

/// All registers of one vCPU, for a core dump.
#[derive(Clone, Copy)]
pub struct VcpuState {
    /// Index, and APIC id.
    pub index: u8,
    /// General registers.
    pub regs: kvm_regs,
    /// Segments and control registers.
    pub sregs: kvm_sregs,
    /// x87 and SSE.
    pub fpu: kvm_fpu,
}

/// The GDT that both ways of entry begin with: a 64-bit code segment, flat data, and a task.
pub(crate) fn boot_gdt(entry: Entry) -> [u64; 5] {
    let code = match entry {
        Entry::Linux64(_) => 0x00af_9b00_0000_ffff,
        Entry::Pvh(_) => 0x00cf_9b00_0000_ffff,
    };
    [0, 0, code, 0x00cf_9300_0000_ffff, 0x0000_8b00_0000_0067]
}

/// Brings the first vCPU to `entry`.
pub(super) fn set_entry(vcpu: &VcpuFd, entry: Entry) -> Result<(), Error> {
    let mut sregs = vcpu.get_sregs()?;
    let long = matches!(entry, Entry::Linux64(_));
    sregs.cs = segment(CODE, 0xb, long);
    let data = segment(DATA, 0x3, false);
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.tr = kvm_segment { selector: TASK, type_: 0xb, limit: 0x67, present: 1, ..Default::default() };
    sregs.ldt = kvm_segment { unusable: 1, ..Default::default() };
    sregs.gdt.base = BOOT_GDT;
    sregs.gdt.limit = (size_of_val(&boot_gdt(entry)) - 1) as u16;
    sregs.idt.base = 0;
    sregs.idt.limit = 0;
    if long {
        sregs.cr0 = CR0_PE | CR0_ET | CR0_NE | CR0_PG;
        sregs.cr3 = BOOT_PAGE_TABLES;
        sregs.cr4 = CR4_PAE;
        sregs.efer = EFER_LME | EFER_LMA;
    } else {
        sregs.cr0 = CR0_PE | CR0_ET;
        sregs.cr4 = 0;
        sregs.efer = 0;
    }
    vcpu.set_sregs(&sregs)?;
    let regs = match entry {
        Entry::Linux64(rip) => {
            kvm_regs { rip, rsi: ZERO_PAGE, rsp: BOOT_STACK, rbp: BOOT_STACK, rflags: RFLAGS, ..Default::default() }
        }
        Entry::Pvh(rip) => {
            kvm_regs { rip: rip.into(), rbx: PVH_START_INFO, rsp: BOOT_STACK, rflags: RFLAGS, ..Default::default() }
        }
    };
    vcpu.set_regs(&regs)
}

fn segment(selector: u16, type_: u8, long: bool) -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector,
        type_,
        present: 1,
        s: 1,
        g: 1,
        l: u8::from(long),
        db: u8::from(!long),
        ..Default::default()
    }
}

/// Where a vCPU stands, in one line. Only what controls it: general registers may hold the guest's secrets, and the line goes
/// to whoever runs the host.
pub(super) fn describe(vcpu: &VcpuFd) -> String {
    let (Ok(regs), Ok(sregs)) = (vcpu.get_regs(), vcpu.get_sregs()) else {
        return "its registers can't be read".into();
    };
    // AMD's processors do not keep the state of a triple fault (APM 2, 15.14.3), and KVM then resets the vCPU.
    let reset = (sregs.cs.base, regs.rip) == RESET_ADDRESS;
    let note = if reset { " (as after a reset: what it was before is not kept)" } else { "" };
    format!(
        "rip={:#x} rsp={:#x} rflags={:#x} cs={:#x} cpl={} cr0={:#x} cr2={:#x} cr3={:#x} cr4={:#x} efer={:#x}{note}",
        regs.rip,
        regs.rsp,
        regs.rflags,
        sregs.cs.selector,
        sregs.cs.dpl,
        sregs.cr0,
        sregs.cr2,
        sregs.cr3,
        sregs.cr4,
        sregs.efer
    )
}
