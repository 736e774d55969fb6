//! What the loader handed over: command line, initial ramdisk, memory, and where ACPI's tables begin.

use crate::memory::{left_by_firmware, number};

/// Longest command line that is looked at.
const LONGEST_COMMAND_LINE: usize = 4096;

/// The way in.
#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum Entry {
    /// Linux boot protocol, 64 bit.
    Linux64 = 0,
    /// Linux boot protocol, 32 bit.
    Linux32 = 1,
    /// PVH.
    Pvh = 2,
}

impl Entry {
    /// From what `entry` put into edi.
    pub fn from_register(value: u32) -> Self {
        match value {
            1 => Self::Linux32,
            2 => Self::Pvh,
            _ => Self::Linux64,
        }
    }

    /// For people.
    pub fn name(self) -> &'static str {
        match self {
            Self::Linux64 => "linux64",
            Self::Linux32 => "linux32",
            Self::Pvh => "pvh",
        }
    }
}

/// What the guest wants to know of boot_params or hvm_start_info.
pub struct BootInfo {
    /// The way in.
    pub entry: Entry,
    /// Command line, up to its NUL.
    pub command_line: &'static [u8],
    /// Address and length of the initial ramdisk.
    pub initrd: Option<(u64, u64)>,
    /// Usable bytes in the memory map.
    pub memory: u64,
    /// Address of ACPI's root pointer, 0 for none.
    pub rsdp: u64,
}

impl BootInfo {
    /// Reads the structure at `info`.
    pub fn read(entry: Entry, info: u64) -> Self {
        match entry {
            Entry::Pvh => Self::from_start_info(info),
            Entry::Linux32 | Entry::Linux64 => Self::from_boot_params(entry, info),
        }
    }

    /// The zero page (Linux, Documentation/arch/x86/zero-page.rst and boot.rst).
    fn from_boot_params(entry: Entry, address: u64) -> Self {
        let page = left_by_firmware(address, 4096);
        let wide = |low: usize, high: usize| number::<4>(page, low) | number::<4>(page, high) << 32;
        let entries = usize::from(page[0x1e8]).min(128);
        let map = page[0x2d0..].chunks_exact(20).take(entries);
        let ramdisk = (wide(0x218, 0xc0), wide(0x21c, 0xc4));
        Self {
            entry,
            command_line: text(wide(0x228, 0xc8)),
            initrd: (ramdisk.1 != 0).then_some(ramdisk),
            memory: map.filter(|entry| number::<4>(entry, 16) == 1).map(|entry| number::<8>(entry, 8)).sum(),
            rsdp: number::<8>(page, 0x70),
        }
    }

    /// `hvm_start_info` (Xen, public/arch-x86/hvm/start_info.h).
    fn from_start_info(address: u64) -> Self {
        let info = left_by_firmware(address, 56);
        let modules = left_by_firmware(number::<8>(info, 16), 32);
        let version = number::<4>(info, 4);
        let entries = if version >= 1 { number::<4>(info, 48).min(128) } else { 0 };
        let map = left_by_firmware(number::<8>(info, 40), entries * 24).chunks_exact(24);
        Self {
            entry: Entry::Pvh,
            command_line: text(number::<8>(info, 24)),
            initrd: (number::<4>(info, 12) != 0).then(|| (number::<8>(modules, 0), number::<8>(modules, 8))),
            memory: map.filter(|entry| number::<4>(entry, 16) == 1).map(|entry| number::<8>(entry, 8)).sum(),
            rsdp: number::<8>(info, 32),
        }
    }
}

fn text(address: u64) -> &'static [u8] {
    if address == 0 {
        return &[];
    }
    let bytes = left_by_firmware(address, LONGEST_COMMAND_LINE as u64);
    &bytes[..bytes.iter().position(|&byte| byte == 0).unwrap_or(LONGEST_COMMAND_LINE)]
}
