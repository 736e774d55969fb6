//! The reset vector. On reduced hardware without EFI, Linux reboots "by BIOS": it goes back to real mode and jumps to where a
//! BIOS begins, at 0xffff:0. What stands there writes the reset register.

use super::layout::{POWER_PORT, RESET_VECTOR};
use super::memory::GuestRam;
use super::power::RESET_VALUE;
use vm_memory::{Bytes, GuestAddress};

/// Writes the code. Every machine has RAM there, so it can't fail.
pub(super) fn write(ram: &GuestRam) {
    let written = ram.write_slice(&code(), GuestAddress(RESET_VECTOR));
    debug_assert!(written.is_ok());
}

fn code() -> [u8; 9] {
    let [low, high] = (POWER_PORT + 2).to_le_bytes();
    // mov dx, reset register; mov al, value; out dx, al; then hlt for ever.
    [0xba, low, high, 0xb0, RESET_VALUE, 0xee, 0xf4, 0xeb, 0xfd]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_code_ends_with_the_first_mebibyte() {
        let ram = GuestRam::from_ranges(&[(GuestAddress(0), 1 << 20)]).expect("1 MiB");
        write(&ram);
        let mut written = [0; 16];
        ram.read_slice(&mut written, GuestAddress(RESET_VECTOR)).expect("the last 16 bytes");
        assert_eq!(written[..9], code());
        assert_eq!(written[..6], [0xba, 0x02, 0x06, 0xb0, 0x01, 0xee]);
    }
}
