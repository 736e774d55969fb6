//! `bare [--pvh | --linux32] GUEST.elf COMMAND-LINE`: starts the small guest with the KVM calls that any VMM has to make, and nothing else: no
//! devices but a serial port that prints to standard output, no ACPI, no second thread. A VMM's start is measured against it.
//!
//! It ends with 0 when the guest powers off through fealty's sleep control port, and with 1 and a line otherwise.

use std::error::Error;
use std::io::{self, Write};
use std::process::ExitCode;
use std::{env, fs, ptr, slice};

use kvm_bindings::{KVM_MAX_CPUID_ENTRIES, Msrs, kvm_msr_entry, kvm_regs, kvm_segment, kvm_userspace_memory_region};
use kvm_ioctls::{Cap, Kvm, VcpuExit, VcpuFd};
use vmm_sys_util::eventfd::EventFd;

const MEMORY: usize = 128 << 20;
/// Where things lie in guest memory: as in fealty.
const START_INFO: u64 = 0x6000;
const ZERO_PAGE: u64 = 0x7000;
const PAGE_TABLES: u64 = 0x9000;
const COMMAND_LINE: u64 = 0x2_0000;

/// What a VMM asks for before it begins.
const NEEDED: [Cap; 8] = [
    Cap::UserMemory,
    Cap::Irqchip,
    Cap::Irqfd,
    Cap::Ioeventfd,
    Cap::IrqRouting,
    Cap::SignalMsi,
    Cap::ImmediateExit,
    Cap::ExtCpuid,
];

const SERIAL: u16 = 0x3f8;
const SERIAL_STATUS: u16 = 0x3fd;
const SLEEP_CONTROL: u16 = 0x600;
const OFF: u8 = 5 << 2 | 1 << 5;

fn main() -> ExitCode {
    let mut arguments: Vec<String> = env::args().skip(1).collect();
    let way = match arguments.first().map(String::as_str) {
        Some("--pvh") => Way::Pvh,
        Some("--linux32") => Way::Linux32,
        _ => Way::Linux64,
    };
    if way != Way::Linux64 {
        arguments.remove(0);
    }
    let [image, command_line] = arguments.as_slice() else {
        eprintln!("usage: bare [--pvh | --linux32] GUEST.elf COMMAND-LINE");
        return ExitCode::from(2);
    };
    match run(image, command_line, way) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bare: {error}");
            ExitCode::FAILURE
        }
    }
}

/// How the guest is entered.
#[derive(Clone, Copy, PartialEq)]
enum Way {
    Linux64,
    Linux32,
    Pvh,
}

fn run(image: &str, command_line: &str, way: Way) -> Result<(), Box<dyn Error>> {
    let kvm = Kvm::new()?;
    if kvm.get_api_version() != 12 || !NEEDED.iter().all(|capability| kvm.check_extension(*capability)) {
        return Err("this KVM lacks something".into());
    }
    let vm = kvm.create_vm()?;
    let memory = guest_memory()?;
    let region = kvm_userspace_memory_region {
        slot: 0,
        flags: 0,
        guest_phys_addr: 0,
        memory_size: MEMORY as u64,
        userspace_addr: memory.as_ptr() as u64,
    };
    // SAFETY: the memory is mapped for the life of the process, and KVM alone writes it once the vCPU runs.
    unsafe { vm.set_user_memory_region(region)? };
    vm.set_identity_map_address(0xfffb_c000)?;
    vm.set_tss_address(0xfffb_d000)?;
    vm.create_irq_chip()?;

    let entry = load(memory, &fs::read(image)?)?;
    memory[COMMAND_LINE as usize..][..command_line.len()].copy_from_slice(command_line.as_bytes());

    let mut vcpu = vm.create_vcpu(0)?;
    vcpu.set_cpuid2(&kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)?)?;
    vcpu.get_tsc_khz()?;
    const MISC_ENABLE: u32 = 0x1a0;
    vcpu.set_msrs(&Msrs::from_entries(&[kvm_msr_entry { index: MISC_ENABLE, data: 1, ..Default::default() }])?)?;
    match way {
        Way::Linux64 => enter_long(&vcpu, memory, entry.linux64)?,
        Way::Linux32 => enter_protected(&vcpu, memory, entry.linux64 - 0x200)?,
        Way::Pvh => enter_protected(&vcpu, memory, entry.pvh)?,
    }
    let lines = [(EventFd::new(0)?, 4), (EventFd::new(0)?, 16)];
    for (line, interrupt) in &lines {
        vm.register_irqfd(line, *interrupt)?;
    }
    serve(&mut vcpu)
}

/// Lets the guest run until it powers off.
fn serve(vcpu: &mut VcpuFd) -> Result<(), Box<dyn Error>> {
    let mut out = io::stdout().lock();
    loop {
        match vcpu.run()? {
            VcpuExit::IoOut(SERIAL, bytes) => {
                out.write_all(bytes)?;
                out.flush()?;
            }
            VcpuExit::IoOut(SLEEP_CONTROL, [OFF]) => return Ok(()),
            VcpuExit::IoOut(..) => {}
            VcpuExit::IoIn(SERIAL_STATUS, bytes) => bytes.fill(0x60),
            VcpuExit::IoIn(_, bytes) | VcpuExit::MmioRead(_, bytes) => bytes.fill(0xff),
            other => return Err(format!("the vCPU stopped: {other:?}").into()),
        }
    }
}

fn guest_memory() -> io::Result<&'static mut [u8]> {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    // SAFETY: a new mapping, which nobody knows of yet.
    let at = unsafe { libc::mmap(ptr::null_mut(), MEMORY, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0) };
    if at == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: mapped just now, that long, zeroed, and never unmapped.
    Ok(unsafe { slice::from_raw_parts_mut(at.cast(), MEMORY) })
}

struct Entry {
    linux64: u64,
    pvh: u64,
}

/// Copies the segments into place.
fn load(memory: &mut [u8], elf: &[u8]) -> Result<Entry, Box<dyn Error>> {
    const PT_LOAD: u64 = 1;
    const PT_NOTE: u64 = 4;
    let number = |at: usize, width: usize| -> Result<u64, Box<dyn Error>> {
        let mut value = [0; 8];
        value[..width].copy_from_slice(elf.get(at..at + width).ok_or("the image is cut off")?);
        Ok(u64::from_le_bytes(value))
    };
    let mut entry = Entry { linux64: number(24, 8)?, pvh: 0 };
    let table = number(32, 8)? as usize;
    for header in (0..number(56, 2)? as usize).map(|n| table + n * 56) {
        let (kind, offset, address, length) =
            (number(header, 4)?, number(header + 8, 8)?, number(header + 24, 8)?, number(header + 32, 8)?);
        let bytes = elf.get(offset as usize..(offset + length) as usize).ok_or("the image is cut off")?;
        match kind {
            PT_LOAD => memory
                .get_mut(address as usize..)
                .and_then(|place| place.get_mut(..bytes.len()))
                .ok_or("the image does not fit")?
                .copy_from_slice(bytes),
            PT_NOTE => entry.pvh = number(offset as usize + 16, 4)?,
            _ => {}
        }
    }
    Ok(entry)
}

fn enter_long(vcpu: &VcpuFd, memory: &mut [u8], entry: u64) -> Result<(), Box<dyn Error>> {
    let mut put = |at: u64, value: u64| memory[at as usize..][..8].copy_from_slice(&value.to_le_bytes());
    put(PAGE_TABLES, PAGE_TABLES + 0x1003);
    for gib in 0..4 {
        put(PAGE_TABLES + 0x1000 + gib * 8, (PAGE_TABLES + 0x2000 + gib * 0x1000) | 3);
    }
    for n in 0..2048 {
        put(PAGE_TABLES + 0x2000 + n * 8, n << 21 | 0x83);
    }
    put(ZERO_PAGE + 0x228, COMMAND_LINE);

    let mut special = vcpu.get_sregs()?;
    special.cs = kvm_segment { l: 1, ..segment(0x10, 11) };
    let data = kvm_segment { db: 1, ..segment(0x18, 3) };
    (special.ds, special.es, special.ss, special.fs, special.gs) = (data, data, data, data, data);
    special.cr0 = 0x8000_0011;
    special.cr3 = PAGE_TABLES;
    special.cr4 = 0x20;
    special.efer = 0x500;
    vcpu.set_sregs(&special)?;
    let mut registers = kvm_regs::default();
    (registers.rip, registers.rsi, registers.rsp, registers.rflags) = (entry, ZERO_PAGE, 0x8ff0, 2);
    Ok(vcpu.set_regs(&registers)?)
}

/// For PVH (ebx) and for Linux (esi).
fn enter_protected(vcpu: &VcpuFd, memory: &mut [u8], entry: u64) -> Result<(), Box<dyn Error>> {
    let mut put = |at: u64, value: u64| memory[at as usize..][..8].copy_from_slice(&value.to_le_bytes());
    put(START_INFO, 1 << 32 | 0x336e_c578);
    put(START_INFO + 24, COMMAND_LINE);
    put(ZERO_PAGE + 0x228, COMMAND_LINE);

    let mut special = vcpu.get_sregs()?;
    special.cs = kvm_segment { db: 1, ..segment(0x10, 11) };
    let data = kvm_segment { db: 1, ..segment(0x18, 3) };
    (special.ds, special.es, special.ss, special.fs, special.gs) = (data, data, data, data, data);
    special.cr0 = 0x11;
    vcpu.set_sregs(&special)?;
    let mut registers = kvm_regs::default();
    (registers.rip, registers.rbx, registers.rsi, registers.rflags) = (entry, START_INFO, ZERO_PAGE, 2);
    Ok(vcpu.set_regs(&registers)?)
}

/// A flat segment.
fn segment(selector: u16, kind: u8) -> kvm_segment {
    kvm_segment { limit: 0xffff_ffff, selector, type_: kind, present: 1, s: 1, g: 1, ..Default::default() }
}
