//! Configuration space of one function: 256 bytes and which bits of them the guest may write (PCI local bus 3.0, 6.1).

/// Bits of the command register.
pub mod command {
    /// Memory space is decoded.
    pub const MEMORY: u16 = 1 << 1;
    /// The function may write memory and send MSIs.
    pub const BUS_MASTER: u16 = 1 << 2;
    /// INTx is off.
    pub const INTX_DISABLE: u16 = 1 << 10;
}

const COMMAND: usize = 0x04;
const STATUS: usize = 0x06;
const BAR_0: usize = 0x10;
const CAPABILITIES: usize = 0x34;
const FIRST_CAPABILITY: usize = 0x40;
const STATUS_HAS_CAPABILITIES: u8 = 1 << 4;

/// Who a function is.
#[derive(Clone, Copy, Debug)]
pub struct Identity {
    /// Vendor id.
    pub vendor: u16,
    /// Device id.
    pub device: u16,
    /// Class, subclass, programming interface, from the high byte down.
    pub class: u32,
    /// Revision.
    pub revision: u8,
    /// Subsystem vendor and device.
    pub subsystem: (u16, u16),
}

/// The registers.
pub struct ConfigSpace {
    bytes: [u8; 256],
    writable: [u8; 256],
    free: usize,
    last_pointer: usize,
}

impl ConfigSpace {
    /// The registers of a type 0 header without BARs or capabilities.
    pub fn new(identity: &Identity) -> Self {
        let mut space =
            Self { bytes: [0; 256], writable: [0; 256], free: FIRST_CAPABILITY, last_pointer: CAPABILITIES };
        space.set(0x00, &identity.vendor.to_le_bytes());
        space.set(0x02, &identity.device.to_le_bytes());
        space.set(0x08, &(identity.class << 8 | u32::from(identity.revision)).to_le_bytes());
        space.set(0x2c, &identity.subsystem.0.to_le_bytes());
        space.set(0x2e, &identity.subsystem.1.to_le_bytes());
        let command = command::MEMORY | command::BUS_MASTER | command::INTX_DISABLE;
        space.allow(COMMAND, &command.to_le_bytes());
        // The line register is the guest's notepad.
        space.allow(0x3c, &[0xff]);
        space
    }

    /// Makes BAR 0 a 32-bit memory BAR of `size` bytes (a power of two of at least 16) at `address`.
    pub fn set_memory_bar(&mut self, address: u32, size: u32) {
        debug_assert!(size.is_power_of_two() && size >= 16 && address.is_multiple_of(size));
        self.set(BAR_0, &address.to_le_bytes());
        self.allow(BAR_0, &(!(size - 1)).to_le_bytes());
    }

    /// Appends a capability: `body` follows its id and link, `writable` says which bits of the body the guest may write.
    /// Gives the offset of the capability, not of its body. There must be room: what a device has is fixed when it is written.
    pub fn add_capability(&mut self, id: u8, body: &[u8], writable: &[u8]) -> u8 {
        let (at, length) = (self.free, 2 + body.len());
        debug_assert!(at + length <= self.bytes.len() && body.len() == writable.len());
        self.set(at, &[id, 0]);
        self.set(at + 2, body);
        self.allow(at + 2, writable);
        let pointer = at as u8;
        self.set(self.last_pointer, &[pointer]);
        self.last_pointer = at + 1;
        self.free = (at + length).next_multiple_of(4);
        self.bytes[STATUS] |= STATUS_HAS_CAPABILITIES;
        pointer
    }

    /// Reads; what lies beyond the end is zero.
    pub fn read(&self, offset: u8, data: &mut [u8]) {
        let from = self.bytes.iter().skip(usize::from(offset)).chain(std::iter::repeat(&0));
        data.iter_mut().zip(from).for_each(|(to, from)| *to = *from);
    }

    /// Writes the writable bits; what lies beyond the end is ignored.
    pub fn write(&mut self, offset: u8, data: &[u8]) {
        let at = usize::from(offset);
        let registers = self.bytes.iter_mut().zip(&self.writable).skip(at);
        for ((register, mask), value) in registers.zip(data) {
            *register = *register & !mask | value & mask;
        }
    }

    /// The command register.
    pub fn command(&self) -> u16 {
        u16::from_le_bytes([self.bytes[COMMAND], self.bytes[COMMAND + 1]])
    }

    /// BAR 0's address; while the guest sizes it, what the guest wrote.
    pub fn bar(&self) -> u32 {
        self.dword(BAR_0) & !0xf
    }

    /// The 32 bits from `offset`; offsets near the end wrap to zeros.
    pub fn dword(&self, offset: usize) -> u32 {
        let mut data = [0; 4];
        self.read(offset as u8, &mut data);
        u32::from_le_bytes(data)
    }

    fn set(&mut self, at: usize, bytes: &[u8]) {
        self.bytes[at..at + bytes.len()].copy_from_slice(bytes);
    }

    fn allow(&mut self, at: usize, mask: &[u8]) {
        self.writable[at..at + mask.len()].copy_from_slice(mask);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn space() -> ConfigSpace {
        let identity =
            Identity { vendor: 0x1af4, device: 0x1042, class: 0x01_8000, revision: 1, subsystem: (0x1af4, 0x40) };
        let mut space = ConfigSpace::new(&identity);
        space.set_memory_bar(0xc001_0000, 0x8000);
        space
    }

    #[test]
    fn a_bar_says_its_size() {
        let mut space = space();
        assert_eq!(space.bar(), 0xc001_0000);
        space.write(0x10, &[0xff; 4]);
        assert_eq!(space.dword(0x10), 0xffff_8000);
        space.write(0x10, &0xd000_1234_u32.to_le_bytes());
        assert_eq!(space.bar(), 0xd000_0000);
        space.write(0x14, &[0xff; 4]);
        assert_eq!(space.dword(0x14), 0, "no second BAR");
    }

    #[test]
    fn capabilities_form_a_list() {
        let mut space = space();
        let first = space.add_capability(0x09, &[1, 2, 3], &[0; 3]);
        let second = space.add_capability(0x11, &[4, 5], &[0, 0xff]);
        assert_eq!((space.bytes[0x34], first, space.bytes[0x41], second), (0x40, 0x40, 0x48, 0x48));
        assert_eq!(space.bytes[0x49], 0, "the end");
        assert_eq!(space.dword(0x04) >> 20 & 1, 1);
        space.write(second + 2, &[9, 9]);
        assert_eq!((space.bytes[0x4a], space.bytes[0x4b]), (4, 9));
    }

    proptest! {
        #[test]
        fn identity_and_links_can_not_be_written(offset: u8, data: [u8; 8]) {
            let mut space = space();
            space.add_capability(0x09, &[1, 2, 3], &[0; 3]);
            let before = space.bytes;
            space.write(offset, &data);
            for at in (0..0x04).chain(0x08..0x10).chain(0x2c..0x3c).chain(0x40..0x43) {
                prop_assert_eq!(space.bytes[at], before[at]);
            }
        }
    }
}
