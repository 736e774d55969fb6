//! The header before each frame (virtio 1.3, 5.1.6), parsed once at the edge.
//!
//! ```text
//! flags u8, gso_type u8, hdr_len u16, gso_size u16, csum_start u16, csum_offset u16, num_buffers u16      little-endian
//! ```

use super::feature;

/// Its length in bytes.
pub(super) const HEADER: usize = 12;
/// An Ethernet header: less is no frame.
pub(super) const ETHERNET: usize = 14;
/// The longest frame with its header: an IP packet of 64 KiB, its Ethernet header, and the header here (5.1.6.3.1).
pub(super) const LONGEST: usize = 65_562;

const NEEDS_CSUM: u8 = 1;
const DATA_VALID: u8 = 2;
const GSO_NONE: u8 = 0;
const GSO_TCPV4: u8 = 1;
const GSO_TCPV6: u8 = 4;
const GSO_ECN: u8 = 0x80;

/// What is to be done with a frame, and may be.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Header {
    flags: u8,
    gso_type: u8,
    hdr_len: u16,
    gso_size: u16,
    csum_start: u16,
    csum_offset: u16,
}

impl Header {
    /// The header of a frame of `frame` bytes that the guest sends. None if it asks for what was not negotiated, or for what
    /// can't be done with so short a frame (5.1.6.2).
    pub(super) fn from_guest(bytes: &[u8; HEADER], frame: usize, features: u64) -> Option<Self> {
        let has = |bit: u64| features & bit != 0;
        let header = Self::parse(bytes);
        let header = Self { flags: header.flags & NEEDS_CSUM, ..header };
        let checksum = header.flags & NEEDS_CSUM != 0;
        if checksum {
            let at = usize::from(header.csum_start) + usize::from(header.csum_offset);
            if !has(feature::CSUM) || at + 2 > frame {
                return None;
            }
        }
        match header.gso_type & !GSO_ECN {
            GSO_NONE if header.gso_type == GSO_NONE => return Some(Self { hdr_len: 0, gso_size: 0, ..header }),
            GSO_TCPV4 if has(feature::HOST_TSO4) => {}
            GSO_TCPV6 if has(feature::HOST_TSO6) => {}
            _ => return None,
        }
        let ecn = header.gso_type & GSO_ECN == 0 || has(feature::HOST_ECN);
        let cut = header.gso_size > 0 && usize::from(header.hdr_len) <= frame;
        (checksum && ecn && cut).then_some(header)
    }

    /// The header of a frame that the host gives. None if it is for a driver that takes more than this one (5.1.6.4).
    pub(super) fn from_host(bytes: &[u8; HEADER], features: u64) -> Option<Self> {
        let has = |bit: u64| features & bit != 0;
        let header = Self::parse(bytes);
        let flags = if has(feature::GUEST_CSUM) { header.flags & (NEEDS_CSUM | DATA_VALID) } else { 0 };
        // An incomplete checksum that nobody would complete.
        let whole = header.flags & NEEDS_CSUM == flags & NEEDS_CSUM;
        let taken = match header.gso_type & !GSO_ECN {
            GSO_NONE => header.gso_type == GSO_NONE,
            GSO_TCPV4 => has(feature::GUEST_TSO4),
            GSO_TCPV6 => has(feature::GUEST_TSO6),
            _ => false,
        };
        let ecn = header.gso_type & GSO_ECN == 0 || has(feature::GUEST_ECN);
        (whole && taken && ecn).then_some(Self { flags, ..header })
    }

    /// Its bytes; `buffers` receive buffers hold the frame, 0 where it is sent.
    pub(super) fn bytes(self, buffers: u16) -> [u8; HEADER] {
        let mut bytes = [0; HEADER];
        bytes[0] = self.flags;
        bytes[1] = self.gso_type;
        let words = [self.hdr_len, self.gso_size, self.csum_start, self.csum_offset, buffers];
        for (to, word) in bytes[2..].chunks_exact_mut(2).zip(words) {
            to.copy_from_slice(&word.to_le_bytes());
        }
        bytes
    }

    fn parse(bytes: &[u8; HEADER]) -> Self {
        let word = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        Self {
            flags: bytes[0],
            gso_type: bytes[1],
            hdr_len: word(2),
            gso_size: word(4),
            csum_start: word(6),
            csum_offset: word(8),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const ALL: u64 = feature::CSUM | feature::HOST_TSO4 | feature::HOST_TSO6 | feature::HOST_ECN;

    fn header(flags: u8, gso_type: u8, words: [u16; 4]) -> [u8; HEADER] {
        let [hdr_len, gso_size, csum_start, csum_offset] = words;
        Header { flags, gso_type, hdr_len, gso_size, csum_start, csum_offset }.bytes(9)
    }

    #[test]
    fn a_frame_goes_as_it_was_negotiated() {
        let plain = header(0, 0, [0; 4]);
        assert_eq!(Header::from_guest(&plain, 60, 0).map(|h| h.bytes(0)), Some([0; HEADER]));
        let tso = header(NEEDS_CSUM, GSO_TCPV4, [54, 1448, 34, 16]);
        assert!(Header::from_guest(&tso, 9000, ALL).is_some());
        for (name, bytes, frame, features) in [
            ("no checksums", header(NEEDS_CSUM, 0, [0, 0, 34, 16]), 60, 0),
            ("checksum beyond the end", header(NEEDS_CSUM, 0, [0, 0, 34, 25]), 60, ALL),
            ("no TSO", tso, 9000, ALL & !feature::HOST_TSO4),
            ("TSO without checksum", header(0, GSO_TCPV4, [54, 1448, 34, 16]), 9000, ALL),
            ("segments of nothing", header(NEEDS_CSUM, GSO_TCPV4, [54, 0, 34, 16]), 9000, ALL),
            ("headers beyond the end", header(NEEDS_CSUM, GSO_TCPV4, [9001, 1448, 34, 16]), 9000, ALL),
            ("no ECN", header(NEEDS_CSUM, GSO_TCPV4 | GSO_ECN, [54, 1448, 34, 16]), 9000, ALL & !feature::HOST_ECN),
            ("UDP fragments", header(NEEDS_CSUM, 3, [54, 1448, 34, 6]), 9000, ALL),
            ("ECN of nothing", header(NEEDS_CSUM, GSO_ECN, [54, 1448, 34, 16]), 9000, ALL),
        ] {
            assert_eq!(Header::from_guest(&bytes, frame, features), None, "{name}");
        }
    }

    #[test]
    fn a_driver_gets_no_more_than_it_takes() {
        let tso = header(NEEDS_CSUM, GSO_TCPV4, [54, 1448, 34, 16]);
        let features = feature::GUEST_CSUM | feature::GUEST_TSO4;
        assert_eq!(Header::from_host(&tso, features).map(|h| h.bytes(9)), Some(tso));
        assert_eq!(Header::from_host(&tso, feature::GUEST_CSUM), None);
        assert_eq!(Header::from_host(&header(NEEDS_CSUM, 0, [0; 4]), 0), None);
        let valid = header(DATA_VALID, 0, [0; 4]);
        assert_eq!(Header::from_host(&valid, 0).map(|h| h.bytes(1)[0]), Some(0), "flags are zero without GUEST_CSUM");
    }

    proptest! {
        /// Whatever the guest writes: what the host's kernel is given lies inside the frame, and is what was negotiated.
        #[test]
        fn any_header_is_judged(bytes: [u8; HEADER], frame in ETHERNET..LONGEST, features: u64) {
            if let Some(header) = Header::from_guest(&bytes, frame, features) {
                let out = header.bytes(0);
                prop_assert!(out[0] & !NEEDS_CSUM == 0 && out[10..] == [0, 0]);
                prop_assert!(header.flags == 0 || usize::from(header.csum_start) + usize::from(header.csum_offset) + 2 <= frame);
                prop_assert!(header.gso_type == 0 || usize::from(header.hdr_len) <= frame && header.gso_size > 0);
            }
            let _ = Header::from_host(&bytes, features);
        }
    }
}
