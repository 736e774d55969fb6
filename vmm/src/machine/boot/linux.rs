//! The Linux 64-bit boot protocol: zero page and page tables.

use super::{BootError, map, put};
use crate::machine::layout::{ACPI_TABLES, BOOT_PAGE_TABLES, COMMAND_LINE, ZERO_PAGE};
use crate::machine::memory::Memory;
use linux_loader::loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use vm_memory::ByteValued;

const BOOT_FLAG: u16 = 0xaa55;
const MAGIC: u32 = u32::from_le_bytes(*SetupHeader::MAGIC);
/// A loader without an assigned number.
const LOADER: u8 = 0xff;
const VERSION: u16 = 0x20f;
const ALIGNMENT: u32 = 0x20_0000;

const PRESENT_WRITABLE: u64 = 3;
const LARGE: u64 = 1 << 7;
const PAGE: u64 = 4096;

/// The setup header of a bzImage: what of it the kernel's own length byte covers, zeros elsewhere.
#[derive(Clone, Copy, Debug)]
pub(super) struct SetupHeader(setup_header);

impl SetupHeader {
    /// "HdrS".
    pub(super) const MAGIC: &'static [u8; 4] = b"HdrS";
    /// Where that stands in a file.
    pub(super) const MAGIC_AT: usize = 0x202;
    const START: usize = 0x1f1;

    /// The header in a file that begins with `head`.
    pub(super) fn parse(head: &[u8]) -> Option<Self> {
        // The jump at 0x200 leaps over the header: its offset says where that ends.
        let end = Self::MAGIC_AT + usize::from(*head.get(0x201)?);
        let bytes = head.get(Self::START..end)?;
        let mut header = setup_header::default();
        let room = header.as_mut_slice();
        let count = bytes.len().min(room.len());
        room[..count].copy_from_slice(&bytes[..count]);
        Some(Self(header))
    }

    /// Its fields.
    pub(super) fn fields(&self) -> setup_header {
        self.0
    }
}

/// Writes zero page and page tables.
pub(super) fn write(
    memory: &Memory,
    setup: Option<&SetupHeader>,
    initrd: Option<(u64, u64)>,
    cmdline_length: usize,
) -> Result<(), BootError> {
    let mut page = boot_params {
        hdr: setup.map_or_else(elf_header, SetupHeader::fields),
        acpi_rsdp_addr: ACPI_TABLES,
        ..Default::default()
    };
    page.hdr.type_of_loader = LOADER;
    page.hdr.cmd_line_ptr = COMMAND_LINE as u32;
    if setup.is_none() {
        page.hdr.cmdline_size = cmdline_length as u32;
    }
    if let Some((start, length)) = initrd {
        // Below the hole, so both fit.
        page.hdr.ramdisk_image = start as u32;
        page.hdr.ramdisk_size = length as u32;
    }
    let ranges = map::ranges(memory);
    page.e820_entries = ranges.len() as u8;
    for (entry, range) in page.e820_table.iter_mut().zip(ranges) {
        *entry = boot_e820_entry { addr: range.start, size: range.length, r#type: range.kind };
    }
    put(memory.ram(), ZERO_PAGE, page.as_slice())?;
    write_page_tables(memory)
}

/// What a kernel without a setup header is told.
fn elf_header() -> setup_header {
    setup_header {
        boot_flag: BOOT_FLAG,
        header: MAGIC,
        version: VERSION,
        kernel_alignment: ALIGNMENT,
        ..Default::default()
    }
}

/// The first 4 GiB, one to one: PML4, PDPT, four directories of 2 MiB pages.
fn write_page_tables(memory: &Memory) -> Result<(), BootError> {
    let (pdpt, directories) = (BOOT_PAGE_TABLES + PAGE, BOOT_PAGE_TABLES + 2 * PAGE);
    put(memory.ram(), BOOT_PAGE_TABLES, &(pdpt | PRESENT_WRITABLE).to_le_bytes())?;
    let mut table = [0; 4 * PAGE as usize];
    for (index, entry) in (0..).zip(table.chunks_exact_mut(8)) {
        let page: u64 = index << 21 | LARGE | PRESENT_WRITABLE;
        entry.copy_from_slice(&page.to_le_bytes());
    }
    put(memory.ram(), directories, &table)?;
    for index in 0..4 {
        let directory = directories + index * PAGE;
        put(memory.ram(), pdpt + index * 8, &(directory | PRESENT_WRITABLE).to_le_bytes())?;
    }
    Ok(())
}
