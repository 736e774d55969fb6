//! bzImage kernels (Linux, Documentation/arch/x86/boot.rst), entered by the 64-bit protocol.

use super::feed::Piece;
use super::linux::SetupHeader;
use super::{BootError, Kernel, Plan};
use crate::machine::layout::KERNEL;
use crate::machine::vcpu::Entry;

const ENTRY_64: u64 = 0x200;
const SECTOR: u64 = 512;
/// The first protocol with `xloadflags`.
const VERSION_MIN: u16 = 0x20c;
const LOADED_HIGH: u8 = 1;
const KERNEL_64: u16 = 1;

/// Whether a file that begins with `head` calls itself a bzImage.
pub(super) fn is_one(head: &[u8]) -> bool {
    head.get(SetupHeader::MAGIC_AT..).is_some_and(|rest| rest.starts_with(SetupHeader::MAGIC))
}

/// Where the protected-mode part of a file of `length` bytes goes.
pub(super) fn plan(head: &[u8], length: u64, low_end: u64) -> Result<Plan, BootError> {
    let setup = SetupHeader::parse(head).ok_or(BootError::BzImage("its setup header is cut short"))?;
    let header = setup.fields();
    if header.version < VERSION_MIN {
        return Err(BootError::BzImage("its boot protocol is older than 2.12 (Linux 3.8)"));
    }
    if header.loadflags & LOADED_HIGH == 0 || header.xloadflags & KERNEL_64 == 0 {
        return Err(BootError::BzImage("it has no 64-bit entry"));
    }
    let sectors = if header.setup_sects == 0 { 4 } else { u64::from(header.setup_sects) };
    let from = (sectors + 1) * SECTOR;
    let size = length.checked_sub(from).filter(|size| *size > ENTRY_64).ok_or(BootError::Short)?;

    let too_small = || BootError::Memory { what: "kernel", memory: low_end };
    let loaded = KERNEL.checked_add(size).ok_or_else(too_small)?;
    // It unpacks itself to its preferred address and needs `init_size` there; a fixed kernel runs nowhere else.
    let (preferred, init_size) = (header.pref_address, u64::from(header.init_size));
    let unpacked = preferred.max(KERNEL).checked_add(init_size.max(size)).ok_or_else(too_small)?;
    let end = loaded.max(unpacked);
    if end > low_end {
        return Err(too_small());
    }
    let kernel = Kernel {
        entry: Entry::Linux64(KERNEL + ENTRY_64),
        end,
        initrd_max: header.initrd_addr_max.into(),
        cmdline_max: header.cmdline_size as usize,
        setup: Some(setup),
    };
    Ok(Plan { pieces: vec![Piece { from, length: size, to: KERNEL }], notes: vec![], kernel })
}
