//! Raw memory: device registers, tables that firmware or the loader left, and the four functions that the compiler expects.

use core::arch::asm;
use core::ptr;

use crate::paging;

/// A block of device registers at an identity-mapped address.
#[derive(Clone, Copy)]
pub struct Registers(u64);

impl Registers {
    /// Registers at `address`, which the static page tables map or [`paging::map`] mapped.
    pub const fn at(address: u64) -> Self {
        Self(address)
    }

    /// Maps `length` bytes at `address` first.
    pub fn map(address: u64, length: u64) -> Self {
        paging::map(address, length);
        Self(address)
    }

    /// The same block from `offset` on.
    pub const fn from(self, offset: u64) -> Self {
        Self(self.0 + offset)
    }
}

macro_rules! access {
    ($read:ident, $write:ident, $type:ty) => {
        impl Registers {
            /// Reads the register at `offset`.
            pub fn $read(self, offset: u64) -> $type {
                // SAFETY: whoever made the block vouches that it is mapped; no Rust object lives in device memory.
                unsafe { ptr::read_volatile((self.0 + offset) as *const $type) }
            }

            /// Writes the register at `offset`.
            #[allow(dead_code)]
            pub fn $write(self, offset: u64, value: $type) {
                // SAFETY: as for reading.
                unsafe { ptr::write_volatile((self.0 + offset) as *mut $type, value) }
            }
        }
    };
}

access!(read8, write8, u8);
access!(read16, write16, u16);
access!(read32, write32, u32);

impl Registers {
    /// Writes 64 bits as two halves, the low one first: what every device accepts.
    pub fn write64(self, offset: u64, value: u64) {
        self.write32(offset, value as u32);
        self.write32(offset + 4, (value >> 32) as u32);
    }
}

/// Bytes that the loader or firmware left at a physical address and nobody changes any more.
///
/// Maps them first. `length` is bounded by the caller.
pub fn left_by_firmware(address: u64, length: u64) -> &'static [u8] {
    paging::map(address, length);
    // SAFETY: mapped just now; tables and command line lie outside of the guest's image and stay as they are. Address 0 never
    // gets here: callers take it for "none".
    unsafe { core::slice::from_raw_parts(address as *const u8, length as usize) }
}

/// A little-endian number of `N` bytes at `offset`, zero beyond the end.
pub fn number<const N: usize>(bytes: &[u8], offset: usize) -> u64 {
    let mut value = [0; 8];
    if let Some(part) = bytes.get(offset..offset + N) {
        value[..N].copy_from_slice(part);
    }
    u64::from_le_bytes(value)
}

#[unsafe(no_mangle)]
unsafe extern "C" fn memcpy(to: *mut u8, from: *const u8, length: usize) -> *mut u8 {
    // SAFETY: the caller's contract is memcpy's.
    unsafe {
        asm!("rep movsb", inout("rdi") to => _, inout("rsi") from => _, inout("rcx") length => _, options(nostack, preserves_flags))
    }
    to
}

#[unsafe(no_mangle)]
unsafe extern "C" fn memmove(to: *mut u8, from: *const u8, length: usize) -> *mut u8 {
    if (to as usize).wrapping_sub(from as usize) >= length {
        // SAFETY: copying upwards never overtakes the source here.
        return unsafe { memcpy(to, from, length) };
    }
    // SAFETY: the caller's contract is memmove's; copied from the end down, and the direction flag is put back.
    unsafe {
        asm!("std", "rep movsb", "cld", inout("rdi") to.add(length).wrapping_sub(1) => _, inout("rsi") from.add(length).wrapping_sub(1) => _,
            inout("rcx") length => _, options(nostack));
    }
    to
}

#[unsafe(no_mangle)]
unsafe extern "C" fn memset(to: *mut u8, byte: i32, length: usize) -> *mut u8 {
    // SAFETY: the caller's contract is memset's.
    unsafe {
        asm!("rep stosb", inout("rdi") to => _, in("al") byte as u8, inout("rcx") length => _, options(nostack, preserves_flags))
    }
    to
}

#[unsafe(no_mangle)]
unsafe extern "C" fn memcmp(a: *const u8, b: *const u8, length: usize) -> i32 {
    for i in 0..length {
        // SAFETY: the caller's contract is memcmp's; volatile, or the compiler would make this loop a call of memcmp.
        let (x, y) = unsafe { (ptr::read_volatile(a.add(i)), ptr::read_volatile(b.add(i))) };
        if x != y {
            return i32::from(x) - i32::from(y);
        }
    }
    0
}

#[unsafe(no_mangle)]
unsafe extern "C" fn bcmp(a: *const u8, b: *const u8, length: usize) -> i32 {
    // SAFETY: the same contract.
    unsafe { memcmp(a, b, length) }
}
