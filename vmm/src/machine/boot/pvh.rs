//! PVH (Xen, docs/misc/pvh.pandoc): the start info and what it points to.

use super::{BootError, map, put};
use crate::machine::layout::{ACPI_TABLES, COMMAND_LINE, PVH_MEMORY_MAP, PVH_MODULES, PVH_START_INFO};
use crate::machine::memory::Memory;
use linux_loader::loader::elf::start_info::{hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info};
use vm_memory::ByteValued;

const MAGIC: u32 = 0x336e_c578;
const VERSION: u32 = 1;

/// Writes start info, memory map and module list.
pub(super) fn write(memory: &Memory, initrd: Option<(u64, u64)>) -> Result<(), BootError> {
    let ranges = map::ranges(memory);
    let info = hvm_start_info {
        magic: MAGIC,
        version: VERSION,
        nr_modules: u32::from(initrd.is_some()),
        modlist_paddr: if initrd.is_some() { PVH_MODULES } else { 0 },
        cmdline_paddr: COMMAND_LINE,
        rsdp_paddr: ACPI_TABLES,
        memmap_paddr: PVH_MEMORY_MAP,
        memmap_entries: ranges.len() as u32,
        ..Default::default()
    };
    put(memory.ram(), PVH_START_INFO, info.as_slice())?;
    if let Some((paddr, size)) = initrd {
        let module = hvm_modlist_entry { paddr, size, ..Default::default() };
        put(memory.ram(), PVH_MODULES, module.as_slice())?;
    }
    for (index, range) in (0..).zip(ranges) {
        let entry =
            hvm_memmap_table_entry { addr: range.start, size: range.length, type_: range.kind, ..Default::default() };
        put(memory.ram(), PVH_MEMORY_MAP + index * size_of::<hvm_memmap_table_entry>() as u64, entry.as_slice())?;
    }
    Ok(())
}
