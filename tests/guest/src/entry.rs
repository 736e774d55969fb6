//! The ways in, and the way down to ring 3. Every instruction of ring 0 that the guest executes is in this file and in [`crate::tables`].
//!
//! | entry | state | register |
//! | --- | --- | --- |
//! | bzImage, 32-bit (Linux boot protocol, "32-bit boot protocol") | protected mode, no paging | esi: boot_params |
//! | bzImage or ELF, 64-bit (same, "64-bit boot protocol") | long mode, the loader's page tables | rsi: boot_params |
//! | PVH (Xen `pvh.h`) | protected mode, no paging | ebx: hvm_start_info |
//!
//! The first byte goes to the serial port before anything else: it is what start-up benchmarks wait for.

use core::arch::global_asm;

use crate::boot::Entry;
use crate::tables::{CODE0, CODE3, DATA3, TSS};

/// CR0: protection, monitor coprocessor, extension type, numeric error, paging.
const CR0: u32 = 0x8000_0033;
/// CR4: physical address extension, FXSAVE and SIMD exceptions (the guest's Rust uses SSE2).
const CR4: u32 = 0x620;
/// RFLAGS in ring 3: interrupts on, I/O privilege level 3.
const FLAGS: u32 = 0x3202;

global_asm!(
    r#"
    .section .head, "ax"
    .code32
head32:
    mov     edi, {linux32}
    jmp     start32
    .globl pvh_start
pvh_start:
    mov     esi, ebx
    mov     edi, {pvh}

start32:
    mov     dx, 0x3f8
    mov     al, 'f'
    out     dx, al
    lgdt    [gdt_pointer]
    mov     eax, {cr4}
    mov     cr4, eax
    mov     eax, offset pml4
    mov     cr3, eax
    mov     ecx, 0xc0000080                     // EFER: long mode enable
    xor     edx, edx
    mov     eax, 0x100
    wrmsr
    mov     eax, {cr0}
    mov     cr0, eax
    .byte   0xea                                // jmp far CODE0:descend, which the assembler can't say
    .long   descend
    .word   {code0}

    .org    0x200
    .code64
    .globl start64
start64:
    mov     dx, 0x3f8
    mov     al, 'f'
    out     dx, al
    mov     edi, {linux64}
    lgdt    [gdt_pointer]
    mov     eax, {cr4}
    mov     cr4, rax
    mov     eax, offset pml4
    mov     cr3, rax
    mov     eax, {cr0}
    mov     cr0, rax

descend:                                        // edi, rsi: what ring3_main gets
    mov     al, 0xff                            // nothing from an 8259 that firmware left on
    out     0x21, al
    out     0xa1, al
    mov     eax, offset tss                     // its descriptor's base lies in three pieces
    mov     word ptr [gdt + {tss} + 2], ax
    shr     eax, 16
    mov     byte ptr [gdt + {tss} + 4], al
    mov     byte ptr [gdt + {tss} + 7], ah
    mov     ax, {tss}
    ltr     ax
    lidt    [idt_pointer]
    mov     esp, offset ring3_frame
    iretq

    .section .text.ring3_start, "ax"
ring3_start:
    mov     rdx, rdi
    mov     edi, offset bss_start
    mov     ecx, offset bss_length
    xor     eax, eax
    rep     stosb
    mov     rdi, rdx
    call    {main}
    ud2

    .section .tables, "aw"
    .balign 8
ring3_frame:
    .quad   ring3_start, {code3}, {flags}, stack3_top, {data3}

    .section .noinit, "aw", @nobits
    .balign 16
    .skip   0x10000
    .globl stack3_top
stack3_top:

    .section .note.pvh, "a", @note
    .balign 4
    .long   4, 4, 18                            // lengths of name and descriptor, XEN_ELFNOTE_PHYS32_ENTRY
    .asciz  "Xen"
    .long   pvh_start
    "#,
    linux32 = const Entry::Linux32 as u32,
    linux64 = const Entry::Linux64 as u32,
    pvh = const Entry::Pvh as u32,
    cr0 = const CR0,
    cr4 = const CR4,
    code0 = const CODE0,
    code3 = const CODE3,
    data3 = const DATA3,
    tss = const TSS,
    flags = const FLAGS,
    main = sym crate::ring3_main,
);
