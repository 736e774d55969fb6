//! An ELF core file of a guest (System V gABI; elf(5)): what debuggers and `crash` read. Notes first, then guest memory as
//! it lies, one PT_LOAD for each region; physical and virtual addresses are the guest's physical ones.

use crate::machine::VcpuState;
use kvm_bindings::kvm_sregs;

/// Name and type of the note that holds [`kvm_sregs`] as the kernel's ABI lays it out.
const SREGS_NOTE: (&[u8], u32) = (b"FEALTY\0", 1);
const PRSTATUS_NOTE: (&[u8], u32) = (b"CORE\0", 1);

const EHDR: usize = 64;
const PHDR: usize = 56;
const PT_LOAD: u32 = 1;
const PT_NOTE: u32 = 4;
/// Memory begins at a multiple of this in the file.
const PAGE: usize = 4096;
/// Length of `elf_prstatus` on x86_64, and where its registers begin.
const PRSTATUS: usize = 336;
const PRSTATUS_PID: usize = 32;
const PRSTATUS_REGS: usize = 112;

/// Everything that stands before the memory: header, program headers, notes, padding. The regions' bytes follow without
/// gaps in the order of `regions`, which are (guest address, length in bytes).
pub fn head(cpus: &[VcpuState], regions: &[(u64, u64)]) -> Vec<u8> {
    let notes = notes(cpus);
    let notes_at = EHDR + PHDR * (1 + regions.len());
    let memory_at = (notes_at + notes.len()).next_multiple_of(PAGE);
    let mut out = Vec::with_capacity(memory_at);
    elf_header(&mut out, 1 + regions.len());
    program_header(&mut out, PT_NOTE, notes_at as u64, 0, notes.len() as u64);
    let mut offset = memory_at as u64;
    for (start, length) in regions {
        program_header(&mut out, PT_LOAD, offset, *start, *length);
        offset += length;
    }
    out.extend(notes);
    out.resize(memory_at, 0);
    out
}

fn elf_header(out: &mut Vec<u8>, program_headers: usize) {
    out.extend([0x7f, b'E', b'L', b'F', 2, 1, 1, 0]);
    out.resize(out.len() + 8, 0);
    let half = |out: &mut Vec<u8>, n: u16| out.extend(n.to_le_bytes());
    half(out, 4); // ET_CORE
    half(out, 62); // EM_X86_64
    out.extend(1u32.to_le_bytes());
    out.extend(0u64.to_le_bytes()); // entry
    out.extend((EHDR as u64).to_le_bytes()); // program headers
    out.extend(0u64.to_le_bytes()); // section headers
    out.extend(0u32.to_le_bytes()); // flags
    half(out, EHDR as u16);
    half(out, PHDR as u16);
    half(out, program_headers as u16);
    half(out, 64);
    half(out, 0);
    half(out, 0);
}

fn program_header(out: &mut Vec<u8>, kind: u32, offset: u64, address: u64, length: u64) {
    out.extend(kind.to_le_bytes());
    out.extend(6u32.to_le_bytes()); // read, write
    for word in [offset, address, address, length, length, 0] {
        out.extend(word.to_le_bytes());
    }
}

fn notes(cpus: &[VcpuState]) -> Vec<u8> {
    let mut out = Vec::new();
    for (index, cpu) in cpus.iter().enumerate() {
        note(&mut out, PRSTATUS_NOTE, &prstatus(index, cpu));
        note(&mut out, SREGS_NOTE, &sregs(&cpu.sregs));
    }
    out
}

fn note(out: &mut Vec<u8>, (name, kind): (&[u8], u32), content: &[u8]) {
    out.extend((name.len() as u32).to_le_bytes());
    out.extend((content.len() as u32).to_le_bytes());
    out.extend(kind.to_le_bytes());
    for part in [name, content] {
        out.extend(part);
        out.resize(out.len().next_multiple_of(4), 0);
    }
}

fn prstatus(index: usize, cpu: &VcpuState) -> Vec<u8> {
    let mut out = vec![0; PRSTATUS];
    out[PRSTATUS_PID..PRSTATUS_PID + 4].copy_from_slice(&(index as u32 + 1).to_le_bytes());
    let (r, s) = (&cpu.regs, &cpu.sregs);
    // user_regs_struct, in its order.
    let words = [
        r.r15,
        r.r14,
        r.r13,
        r.r12,
        r.rbp,
        r.rbx,
        r.r11,
        r.r10,
        r.r9,
        r.r8,
        r.rax,
        r.rcx,
        r.rdx,
        r.rsi,
        r.rdi,
        u64::MAX, // no system call
        r.rip,
        u64::from(s.cs.selector),
        r.rflags,
        r.rsp,
        u64::from(s.ss.selector),
        s.fs.base,
        s.gs.base,
        u64::from(s.ds.selector),
        u64::from(s.es.selector),
        u64::from(s.fs.selector),
        u64::from(s.gs.selector),
    ];
    for (word, place) in words.iter().zip(out[PRSTATUS_REGS..].chunks_exact_mut(8)) {
        place.copy_from_slice(&word.to_le_bytes());
    }
    out
}

/// `struct kvm_sregs` field by field, so that no padding of this process gets out.
fn sregs(s: &kvm_sregs) -> Vec<u8> {
    let mut out = Vec::with_capacity(size_of::<kvm_sregs>());
    for seg in [&s.cs, &s.ds, &s.es, &s.fs, &s.gs, &s.ss, &s.tr, &s.ldt] {
        out.extend(seg.base.to_le_bytes());
        out.extend(seg.limit.to_le_bytes());
        out.extend(seg.selector.to_le_bytes());
        out.extend([seg.type_, seg.present, seg.dpl, seg.db, seg.s, seg.l, seg.g, seg.avl, seg.unusable, 0]);
    }
    for table in [&s.gdt, &s.idt] {
        out.extend(table.base.to_le_bytes());
        out.extend(table.limit.to_le_bytes());
        out.extend([0; 6]);
    }
    for word in [s.cr0, s.cr2, s.cr3, s.cr4, s.cr8, s.efer, s.apic_base] {
        out.extend(word.to_le_bytes());
    }
    for word in s.interrupt_bitmap {
        out.extend(word.to_le_bytes());
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cpu(rip: u64) -> VcpuState {
        let regs = kvm_bindings::kvm_regs { rip, ..Default::default() };
        VcpuState { index: 0, regs, sregs: kvm_sregs { cr3: 0x9000, ..Default::default() }, fpu: Default::default() }
    }

    fn word(bytes: &[u8], at: usize) -> u64 {
        u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
    }

    #[test]
    fn the_head_says_where_memory_lies() {
        let head = head(&[cpu(1), cpu(2)], &[(0, 0x1000), (1 << 32, 0x2000)]);
        assert_eq!(head.len() % PAGE, 0);
        assert_eq!((&head[..4], head[16], head[18]), (&b"\x7fELF"[..], 4, 62));
        assert_eq!(u16::from_le_bytes([head[56], head[57]]), 3);
        let (first, second) = (EHDR + PHDR, EHDR + 2 * PHDR);
        assert_eq!(word(&head, first + 8), head.len() as u64);
        assert_eq!(word(&head, second + 8), head.len() as u64 + 0x1000);
        assert_eq!((word(&head, second + 24), word(&head, second + 32)), (1 << 32, 0x2000));
    }

    #[test]
    fn registers_stand_where_debuggers_look() {
        let notes = notes(&[cpu(0x1234)]);
        let status = 12 + 8;
        assert_eq!(word(&notes, status + PRSTATUS_REGS + 16 * 8), 0x1234);
        assert_eq!(sregs(&cpu(0).sregs).len(), size_of::<kvm_sregs>());
    }
}
