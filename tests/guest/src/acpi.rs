//! As much of ACPI (6.5) as the guest needs: finding tables, and three facts in them.

use core::fmt;

use crate::memory::{Registers, left_by_firmware, number};

/// Tables longer than this are not believed.
const LONGEST_TABLE: u64 = 1 << 20;
const HEADER: usize = 36;

/// The root table.
#[derive(Clone, Copy)]
pub struct Acpi {
    entries: &'static [u8],
    /// Bytes of an entry: 8 in an XSDT, 4 in an RSDT.
    width: usize,
}

/// What is missing.
#[derive(Clone, Copy)]
pub enum AcpiError {
    /// The loader named no root pointer.
    NoRootPointer,
    /// The structure at this address is none.
    Malformed(u64),
    /// No table with this signature.
    Missing(&'static str),
}

impl Acpi {
    /// Follows the root pointer at `rsdp`.
    pub fn find(rsdp: u64) -> Result<Self, AcpiError> {
        if rsdp == 0 {
            return Err(AcpiError::NoRootPointer);
        }
        let root = left_by_firmware(rsdp, 36);
        if !root.starts_with(b"RSD PTR ") {
            return Err(AcpiError::Malformed(rsdp));
        }
        let (address, signature, width) = match number::<8>(root, 24) {
            xsdt if root[15] >= 2 && xsdt != 0 => (xsdt, b"XSDT", 8),
            _ => (number::<4>(root, 16), b"RSDT", 4),
        };
        let table = table(address)?;
        if !table.starts_with(signature) {
            return Err(AcpiError::Malformed(address));
        }
        Ok(Self { entries: &table[HEADER..], width })
    }

    /// The table with this signature.
    pub fn table(self, signature: &'static str) -> Result<&'static [u8], AcpiError> {
        for entry in self.entries.chunks_exact(self.width) {
            let found = table(number::<8>(entry, 0) | number::<4>(entry, 0))?;
            if found.starts_with(signature.as_bytes()) {
                return Ok(found);
            }
        }
        Err(AcpiError::Missing(signature))
    }

    /// Address of PCI's enhanced configuration space, segment 0, bus 0 (PCI firmware 3.3, 4.1.2).
    pub fn ecam(self) -> Result<u64, AcpiError> {
        let mcfg = self.table("MCFG")?;
        let allocations = mcfg.get(44..).unwrap_or_default().chunks_exact(16);
        let first = allocations.clone().find(|entry| number::<2>(entry, 8) == 0 && entry[10] == 0);
        first.map(|entry| number::<8>(entry, 0)).ok_or(AcpiError::Missing("MCFG"))
    }

    /// The VM generation id: 16 bytes where the package ADDR of its device says, below 4 GiB.
    pub fn generation_id(self) -> Result<[u8; 16], AcpiError> {
        let dsdt = self.dsdt()?;
        let missing = AcpiError::Missing("VM generation id");
        let name = dsdt.windows(5).position(|window| window == b"ADDR\x12").ok_or(missing)?;
        // Length, two elements, a number of 32 bits.
        let package = dsdt.get(name + 5..name + 12).filter(|package| package[1..3] == [2, 0x0c]).ok_or(missing)?;
        let address = number::<4>(package, 3);
        left_by_firmware(address, 16);
        // The host changes it, so it is read anew each time.
        Ok(core::array::from_fn(|at| Registers::at(address).read8(at as u64)))
    }

    fn dsdt(self) -> Result<&'static [u8], AcpiError> {
        let fadt = self.table("FACP")?;
        let wide = number::<8>(fadt, 140);
        table(if wide != 0 { wide } else { number::<4>(fadt, 40) })
    }

    /// The sleep type that means "off": the first number of the package `\_S5` in the DSDT.
    pub fn off_sleep_type(self) -> Result<u8, AcpiError> {
        let dsdt = self.dsdt()?;
        let missing = AcpiError::Missing("_S5");
        let name = dsdt.windows(5).position(|window| window == b"_S5_\x12").ok_or(missing)?;
        let package = &dsdt[name + 5..];
        let lead = usize::from(package.first().copied().ok_or(missing)? >> 6);
        match package.get(lead + 2..lead + 4).ok_or(missing)? {
            [0x0a, number] => Ok(*number),
            [number @ (0 | 1), _] => Ok(*number),
            _ => Err(missing),
        }
    }
}

impl fmt::Display for AcpiError {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Self::NoRootPointer => write!(f, "the loader gave no ACPI root pointer"),
            Self::Malformed(address) => write!(f, "no ACPI table at {address:#x}"),
            Self::Missing(what) => write!(f, "no {what} in the ACPI tables"),
        }
    }
}

/// The whole table at `address`.
fn table(address: u64) -> Result<&'static [u8], AcpiError> {
    if address == 0 {
        return Err(AcpiError::Malformed(address));
    }
    match number::<4>(left_by_firmware(address, HEADER as u64), 4) {
        length if (HEADER as u64..LONGEST_TABLE).contains(&length) => Ok(left_by_firmware(address, length)),
        _ => Err(AcpiError::Malformed(address)),
    }
}
