//! What the processor looks up: segment descriptors, the task state with the ring-0 stack, interrupt gates and the page tables that
//! entry needs. All but the gates is built by the assembler, so that ring 0 only has to load it.
//!
//! Ring 3 sleeps by executing `hlt`, which it may not: the handler of the protection fault does it. That needs nothing set up, and
//! the KVM that emulates ring 0 has no `int` from ring 3. Ring 0 keeps nothing on its stack between visits, so each handler goes back
//! by the frame at the stack's top: also the interrupt that ends that `hlt`.

use core::arch::global_asm;
use core::sync::atomic::{AtomicU64, Ordering};

use crate::interrupts::{FIRST_VECTOR, SOURCES, SPURIOUS_VECTOR};
use crate::power::Power;
use crate::serial;

/// Selector of 64-bit code, ring 0: the place where the Linux boot protocol has it too.
pub const CODE0: u16 = 0x10;
/// Selector of data, ring 3.
pub const DATA3: u16 = 0x20 | 3;
/// Selector of 64-bit code, ring 3.
pub const CODE3: u16 = 0x28 | 3;
/// Selector of the task state segment.
pub const TSS: u16 = 0x30;

const EXCEPTIONS: usize = 32;
/// Mapped by the page tables, but above the memory of every machine that is asked to go there.
const NOWHERE: u32 = 0x3000_0000;
const PROTECTION_VECTOR: u8 = 13;
/// Bytes from one exception stub to the next, and from one interrupt stub to the next.
const EXCEPTION_STUB: u64 = 16;
const INTERRUPT_STUB: u64 = 32;
/// And from one of [`Privileged`] to the next.
const PRIVILEGED_STUB: u64 = 32;

/// Fills the interrupt gates. Before this an exception ends the machine, as it would anyway.
pub fn init() {
    for n in 0..EXCEPTIONS {
        set_gate(n as u8, address(&raw const exception_stubs) + n as u64 * EXCEPTION_STUB);
    }
    for n in 0..SOURCES as u8 {
        set_gate(FIRST_VECTOR + n, address(&raw const interrupt_stubs) + u64::from(n) * INTERRUPT_STUB);
    }
    set_gate(PROTECTION_VECTOR, address(&raw const protection));
    set_gate(SPURIOUS_VECTOR, address(&raw const spurious));
}

/// Ends the machine as a broken kernel would: with no gate left, an exception becomes a triple fault.
pub fn triple_fault() -> ! {
    for gate in &IDT.0 {
        gate[0].store(0, Ordering::Relaxed);
        gate[1].store(0, Ordering::Relaxed);
    }
    // SAFETY: the instruction does nothing but raise #UD, which is what is wanted.
    unsafe { core::arch::asm!("ud2", options(noreturn)) }
}

/// What ring 0 is had do by [`in_ring0`].
#[derive(Clone, Copy)]
pub enum Privileged {
    /// `cmpxchg16b`.
    Cmpxchg16b,
    /// `xrstor`.
    Xrstor,
    /// `int3`.
    Int3,
    /// A jump to where no memory is: no KVM can go on.
    Nowhere,
}

/// Has ring 0 do `what`, which a KVM that emulates it may not be able to. Where it is done, the fault that led to ring 0 is told.
pub fn in_ring0(what: Privileged) -> ! {
    const DIVIDE_VECTOR: u8 = 0;
    set_gate(DIVIDE_VECTOR, address(&raw const privileged_stubs) + what as u64 * PRIVILEGED_STUB);
    // SAFETY: the instruction does nothing but raise #DE, which is what is wanted.
    unsafe { core::arch::asm!("xor eax, eax", "div eax", options(noreturn)) }
}

/// An interrupt gate for `vector` (Intel SDM 3A, 6.14.1).
fn set_gate(vector: u8, handler: u64) {
    let low = (handler & 0xffff) | u64::from(CODE0) << 16 | 0x8e00 << 32 | (handler >> 16 & 0xffff) << 48;
    let gate = &IDT.0[usize::from(vector)];
    gate[1].store(handler >> 32, Ordering::Relaxed);
    gate[0].store(low, Ordering::Release);
}

fn address(of: *const u8) -> u64 {
    of as u64
}

/// What an exception left behind; written in ring 0.
#[repr(C)]
struct Fault {
    address: AtomicU64,
    vector: AtomicU64,
    error: AtomicU64,
    rip: AtomicU64,
}

/// Where ring 0 continues ring 3 after an exception: says what it was and ends the machine.
extern "C" fn fault_report() -> ! {
    let get = |field: &AtomicU64| field.load(Ordering::Relaxed);
    serial::line(format_args!(
        "fault vector={} error={:#x} rip={:#x} address={:#x}",
        get(&FAULT.vector),
        get(&FAULT.error),
        get(&FAULT.rip),
        get(&FAULT.address)
    ));
    Power::last_resort()
}

#[repr(C, align(16))]
struct Idt([[AtomicU64; 2]; 256]);

#[unsafe(no_mangle)]
static IDT: Idt = Idt([const { [const { AtomicU64::new(0) }; 2] }; 256]);
#[unsafe(no_mangle)]
static FAULT: Fault =
    Fault { address: AtomicU64::new(0), vector: AtomicU64::new(0), error: AtomicU64::new(0), rip: AtomicU64::new(0) };

unsafe extern "C" {
    safe static exception_stubs: u8;
    safe static interrupt_stubs: u8;
    safe static protection: u8;
    safe static spurious: u8;
    safe static privileged_stubs: u8;
}

global_asm!(
    r#"
    .section .tables, "aw"
    .balign 4096
    .globl pml4
pml4:                                           // the last entry too: 0xfffffffffee00000 is the local APIC, within reach of
    .quad   pdpt + 0x67                         // a 32-bit displacement
    .skip   510 * 8
    .quad   pdpt + 0x67
pdpt:
    .quad   low_gib + 0x67, 0, 0, device_gib + 0x67
    .skip   507 * 8
    .quad   device_gib + 0x67
low_gib:                                        // present, writable, user, accessed, dirty, 2 MiB
    .set    frame, 0
    .rept   512
    .quad   frame + 0xe7
    .set    frame, frame + 0x200000
    .endr
device_gib:                                     // 3 to 4 GiB: only the interrupt controllers, uncached
    .skip   502 * 8
    .quad   0xfec00000 + 0xff, 0xfee00000 + 0xff
    .skip   8 * 8

    .balign 8
gdt:
    .quad   0, 0
    .quad   0x00af9b000000ffff                  // 0x10: code, 64 bit, ring 0
    .quad   0x00cf93000000ffff                  // 0x18: data, ring 0
    .quad   0x00cff3000000ffff                  // 0x20: data, ring 3
    .quad   0x00affb000000ffff                  // 0x28: code, 64 bit, ring 3
    .quad   0x0000890000000268, 0               // 0x30: task state; entry fills in the base
tss:
    .long   0
    .quad   stack0_top                          // rsp0
    .skip   90
    .word   104
    .skip   512                                 // I/O permission bitmap: ports 0 to 0xfff are allowed
    .byte   0xff
gdt_pointer:
    .word   8 * 8 - 1
    .quad   gdt
idt_pointer:
    .word   256 * 16 - 1
    .quad   IDT
    .balign 64
scratch:
    .skip   4096
    .balign 8
fault_frame:
    .quad   {report}, {code3}, 0x3002, stack3_top - 8, {data3}

    .section .noinit, "aw", @nobits
    .balign 16
    .skip   4096
stack0_top:

    .section .text.stubs, "ax"
    .balign 32
    .globl exception_stubs
exception_stubs:
    .set    vector, 0
    .rept   {exceptions}
    .balign {exception_stub}
    .if     (0x60227d00 >> vector) & 1          // 8, 10 to 14, 17, 21, 29, 30 push an error code
    .else
    push    0
    .endif
    push    vector
    jmp     fault
    .set    vector, vector + 1
    .endr
fault:
    pop     qword ptr [FAULT + 8]
    pop     qword ptr [FAULT + 16]
    pop     qword ptr [FAULT + 24]
    mov     rax, cr2
    mov     qword ptr [FAULT], rax
    mov     esp, offset fault_frame
    iretq

    .balign 32
    .globl interrupt_stubs
interrupt_stubs:
    .set    source, 0
    .rept   {sources}
    .balign {interrupt_stub}
    mov     byte ptr [PENDING + source], 1
    mov     dword ptr [0xfffffffffee000b0], 0   // end of interrupt
    mov     esp, offset stack0_top - 40
    iretq
    .set    source, source + 1
    .endr

    .globl idle
idle:
    hlt                                         // ring 3 may not: #GP, and protection does it
    ret
    .globl protection
protection:
    cmp     qword ptr [rsp + 8], offset idle
    jne     not_idle
    inc     qword ptr [rsp + 8]
    test    qword ptr [PENDING], rdi            // interrupts are off, so none is lost between look and sleep
    jnz     1f
    sti
    hlt
1:  mov     esp, offset stack0_top - 40
    iretq
not_idle:
    push    13
    jmp     fault

    .globl spurious
spurious:
    mov     esp, offset stack0_top - 40
    iretq

    .balign {privileged_stub}
    .globl privileged_stubs
privileged_stubs:                               // in the order of Privileged
    cmpxchg16b [scratch]
    jmp     done
    .balign {privileged_stub}
    xor     eax, eax
    xor     edx, edx
    xrstor  [scratch]
    jmp     done
    .balign {privileged_stub}
    int3
    jmp     done
    .balign {privileged_stub}
    mov     eax, {nowhere}
    jmp     rax
done:
    push    0
    push    0
    jmp     fault
    "#,
    report = sym fault_report,
    code3 = const CODE3,
    data3 = const DATA3,
    exceptions = const EXCEPTIONS,
    exception_stub = const EXCEPTION_STUB,
    interrupt_stub = const INTERRUPT_STUB,
    privileged_stub = const PRIVILEGED_STUB,
    nowhere = const NOWHERE,
    sources = const SOURCES,
);
