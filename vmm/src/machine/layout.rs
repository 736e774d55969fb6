//! Where everything lies in the guest's address spaces, and in what state the first vCPU enters the guest. These numbers
//! are a contract: the small guest in `tests/guest` relies on them, and saved state will.
//!
//! # Guest physical memory
//!
//! ```text
//! 0x0000_0000  low RAM: min(size, 3 GiB)
//!     0x0500   GDT            0x0800  PVH module list     0x6000  PVH start info and memory map
//!     0x7000   zero page      0x9000  page tables (0x9000 PML4, 0xa000 PDPT, 0xb000..0xf000 PDs)
//!   0x2_0000   command line (NUL-terminated, at most 2047 bytes)
//!   0xe_0000   ACPI tables, RSDP first (reserved in the memory map, up to 0x10_0000)
//!   0xf_f000   the VM generation id, 16 bytes
//!   0xf_fff0   reset vector: real-mode code that writes the reset register
//!  0x10_0000   kernel: a bzImage's protected-mode part, or where an ELF file's segments say
//!        top   initrd, page-aligned, at the end of low RAM (below the kernel's initrd_addr_max)
//! 0xc000_0000  PCI memory window, 512 MiB: BAR 0 of the device in slot S is at 0xc000_0000 + S * 0x1_0000
//! 0xe000_0000  ECAM, 1 MiB: segment 0, bus 0, so slot S function 0 is at 0xe000_0000 + S * 0x8000
//! 0xfec0_0000  I/O APIC, 24 pins, GSI base 0
//! 0xfee0_0000  local APICs
//! 0xfffb_c000  four pages that KVM needs on Intel
//! 0x1_0000_0000  high RAM: the rest; then, from the next multiple of 1 GiB, the hotplug window where one is configured
//! ```
//!
//! # I/O ports
//!
//! ```text
//! 0x70, 0x71    clock chip (MC146818A): index, data; the host's time in UTC, no alarm, no interrupt
//! 0x3f8..0x400  COM1, a 16550A on GSI 4 (edge)
//! 0x600         sleep control, byte: 0x34 (SLP_TYP 5, SLP_EN) powers off
//! 0x601         sleep status, byte: reads 0
//! 0x602         reset register, byte: 0x01 resets
//! 0x603         event status, byte, cleared by the read: bit 0 power button, bit 1 another VM generation id, bit 2 PCI slots. Its interrupt is GSI 16 (edge)
//! 0x610         slots with something new, byte, cleared by the read: bit N is slot 24+N. Event bit 2 (0x603) says so
//! 0x611         slots that the guest is asked to empty, likewise
//! 0x612         slots that the guest has done with, written: what it was asked for leaves the bus
//! 0xcf8, 0xcfc  PCI configuration mechanism 1, as an alternative to ECAM
//! ```
//!
//! # PCI
//!
//! Slot 0 is the host bridge (1b36:0008). Devices follow from slot 1 in the order in which they were added: disk N (from
//! 0) is virtio-blk 1af4:1042 in slot N+1; then what there is of network cards (1041), console on a socket (1043), entropy (1044),
//! sockets (1053), balloon (1045), console in the serial line's place (1043), and the panic device 1b36:0011. BAR 0 is a 32-bit
//! memory BAR of 32 KiB (the panic device's: 16 bytes) that already holds its address at reset; memory decoding and bus mastering are off until the guest sets them in the command register. No INTx. Where
//! the virtio structures lie in the BAR is said by the capabilities; today: common configuration 0x0, ISR 0x1000, device
//! configuration 0x2000, notifications 0x3000 (4 bytes a queue), MSI-X table 0x4000, MSI-X pending bits 0x5000.
//!
//! In an unprotected machine disks come to slots 24 to 31, as far as they are free, and go while it runs: ports 0x610 to 0x612.
//!
//! # The first vCPU's state at entry
//!
//! - *Linux 64-bit* (a bzImage, entered at its load address + 0x200; an ELF file without PVH note, entered at `e_entry`): long
//!   mode, the first 4 GiB mapped one to one by 2 MiB pages, `rsi` = [`ZERO_PAGE`], `rsp` = [`BOOT_STACK`], CS 0x10, DS ES SS 0x18, interrupts off.
//! - *PVH* (an ELF file with the note XEN_ELFNOTE_PHYS32_ENTRY, 18, name "Xen"): 32-bit protected mode, no paging, flat segments, `ebx` =
//!   [`PVH_START_INFO`] (`hvm_start_info` version 1 with memory map, command line, RSDP, and the initrd as module 0), interrupts off.
//!
//! The other vCPUs wait for INIT and SIPI. APIC id = index. No PIT, no i8042.

/// One mebibyte.
pub const MIB: u64 = 1 << 20;
/// One gibibyte.
pub const GIB: u64 = 1 << 30;

/// The boot GDT.
pub const BOOT_GDT: u64 = 0x500;
/// The one entry of PVH's module list.
pub const PVH_MODULES: u64 = 0x800;
/// PVH's start info; its memory map follows at + 0x100.
pub const PVH_START_INFO: u64 = 0x6000;
/// PVH's memory map.
pub const PVH_MEMORY_MAP: u64 = PVH_START_INFO + 0x100;
/// Linux' `boot_params`.
pub const ZERO_PAGE: u64 = 0x7000;
/// Top of the boot stack, which nothing but the kernel's first instructions uses.
pub const BOOT_STACK: u64 = 0x8ff0;
/// PML4 of the boot page tables; a PDPT and four page directories follow it.
pub const BOOT_PAGE_TABLES: u64 = 0x9000;
/// The command line.
pub const COMMAND_LINE: u64 = 0x2_0000;
/// The longest command line in bytes, without its NUL.
pub const COMMAND_LINE_MAX: usize = 2047;
/// End of the memory that the memory map gives away below 1 MiB.
pub const LOW_RAM_END: u64 = 0x9_fc00;
/// ACPI's tables, the RSDP first.
pub const ACPI_TABLES: u64 = 0xe_0000;
/// The VM generation id: the last page of the space that is reserved for firmware tables.
pub const GENERATION_ID: u64 = 0xf_f000;
/// End of the space for ACPI's tables.
pub const ACPI_TABLES_END: u64 = 0x10_0000;
/// Where a processor in real mode begins after a reset, and where Linux jumps to when it reboots "by BIOS".
pub const RESET_VECTOR: u64 = 0xf_fff0;
/// Where kernels may begin.
pub const KERNEL: u64 = 0x10_0000;

/// End of the RAM below 4 GiB, and start of what is no RAM.
pub const HOLE: u64 = 3 * GIB;
/// Start of the RAM above the hole.
pub const HOLE_END: u64 = 4 * GIB;
/// The 32-bit PCI memory window.
pub const PCI_WINDOW: u64 = 0xc000_0000;
/// Its length.
pub const PCI_WINDOW_SIZE: u64 = 0x2000_0000;
/// Distance of one slot's BAR 0 from the next one's at reset.
pub const PCI_BAR_STRIDE: u64 = 0x1_0000;
/// The enhanced configuration space of bus 0.
pub const ECAM: u64 = 0xe000_0000;
/// Its length: one bus.
pub const ECAM_SIZE: u64 = MIB;
/// The I/O APIC.
pub const IO_APIC: u64 = 0xfec0_0000;
/// The local APICs.
pub const LOCAL_APIC: u64 = 0xfee0_0000;
/// A page KVM needs on Intel processors; three pages for a task state segment follow.
pub const KVM_IDENTITY_MAP: u64 = 0xfffb_c000;
/// The pages for KVM's task state segment.
pub const KVM_TSS: u64 = KVM_IDENTITY_MAP + 0x1000;
/// The hotplug window starts at a multiple of this.
pub const HOTPLUG_ALIGNMENT: u64 = GIB;

/// First port of the clock chip.
pub const RTC_PORT: u16 = 0x70;
/// Ports of the clock chip.
pub const RTC_PORTS: u16 = 2;
/// First port of the serial line.
pub const SERIAL_PORT: u16 = 0x3f8;
/// Ports of the serial line.
pub const SERIAL_PORTS: u16 = 8;
/// Interrupt of the serial line.
pub const SERIAL_GSI: u32 = 4;
/// First port of the power device: sleep control.
pub const POWER_PORT: u16 = 0x600;
/// Ports of the power device.
pub const POWER_PORTS: u16 = 4;
/// Interrupt of the power device's events.
pub const POWER_GSI: u32 = 16;
/// First port of the slots that are filled and emptied while the machine runs.
pub const HOTPLUG_PORT: u16 = 0x610;
/// Its ports.
pub const HOTPLUG_PORTS: u16 = 3;
/// First port of PCI's configuration mechanism 1.
pub const PCI_CONFIG_PORT: u16 = 0xcf8;
/// Its ports.
pub const PCI_CONFIG_PORTS: u16 = 8;

/// Pins of the I/O APIC; the GSIs from here on are for MSIs.
pub const IO_APIC_PINS: u32 = 24;
/// Slots of the PCI bus, the host bridge's included.
pub const PCI_SLOTS: usize = 32;
/// The first of the slots that may be filled and emptied while the machine runs; they are the last ones.
pub const HOT_SLOT_FIRST: u8 = 24;
/// How many: a bit of a byte each.
pub const HOT_SLOTS: usize = 8;
