//! The packet: the payload of one UDP datagram.
//!
//! ```text
//! offset 0            1          2           4         8                                16                 24        n - 16
//!        version (4)  key phase  network id  key id    packet number: queue (8 bits),   what is left to    Ethernet  tag
//!        and type (4)            u16 BE      u32 BE    counter (56 bits), u64 BE        do, 8 bytes        frame     16 bytes
//!        |------------------------- header, authenticated ---------------------------| |----- encrypted -----------|
//! ```
//!
//! AES-256-GCM (NIST SP 800-38D): additional data is the header, the nonce the direction's 4-byte salt and the 8 bytes of the
//! packet number, so no two packets under a key share one. The key id was chosen by the receiver, who finds his key by it.
//!
//! What is left to do stands for the header that a network card keeps with a frame (virtio 1.3, 5.1.6):
//!
//! ```text
//! offset 0      1              2               4                  6
//!        flags  cut of a       segment size    checksum starts    checksum lies this
//!               larger frame   u16 BE          at, u16 BE         far behind, u16 BE
//! ```

/// Bytes of the header.
pub const HEADER: usize = 16;

/// Bytes of the tag.
pub const TAG: usize = 16;

/// Bytes that sealing adds to a frame.
pub const OVERHEAD: usize = HEADER + OFFLOAD + TAG;

/// The shortest frame: an Ethernet header.
pub const MIN_FRAME: usize = 14;

/// The longest frame: what fits a UDP datagram over IPv4.
pub const MAX_FRAME: usize = 65_507 - OVERHEAD;

pub(crate) const OFFLOAD: usize = 8;

const VERSION: u8 = 1;
const TYPE_DATA: u8 = 0;

/// Bytes of the packet that holds a frame of `frame` bytes.
pub const fn sealed_len(frame: usize) -> usize {
    frame + OVERHEAD
}

/// The clear part of a packet.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Header {
    /// Which of the session's successive keys, modulo 256.
    pub phase: u8,
    /// The virtual network, numbered by the session's two ends.
    pub network: u16,
    /// The receiver's name for the session.
    pub key_id: u32,
    /// Never twice under a key.
    pub number: PacketNumber,
}

/// A packet's number: each queue of the sender counts for itself.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct PacketNumber(u64);

/// What the sender's network card left undone, for the receiver's to do or to vouch for.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Offload {
    /// The checksum that still has to be computed.
    pub checksum: Option<Checksum>,
    /// The frame's checksums were verified, or need no verification because it never left memory.
    pub checksum_valid: bool,
    /// The larger frame that this one was cut from.
    pub cut: Option<Cut>,
}

/// A checksum to be computed from `start` to the frame's end and stored `offset` bytes behind `start`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Checksum {
    /// Bytes from the frame's start.
    pub start: u16,
    /// Bytes from `start`.
    pub offset: u16,
}

/// How a larger frame was cut.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Cut {
    /// What was cut.
    pub kind: CutKind,
    /// Payload bytes of each piece but the last, at least 1.
    pub segment: u16,
}

/// What a larger frame held; the codes are those of virtio 1.3, 5.1.6.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum CutKind {
    /// TCP over IPv4.
    Tcp4,
    /// TCP over IPv6.
    Tcp6,
    /// UDP over either.
    Udp,
}

/// Bytes that are no packet of this format.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum PacketError {
    /// Too short or too long for a sealed frame.
    #[error("a packet is {min} to {max} bytes, not {0}", min = sealed_len(MIN_FRAME), max = sealed_len(MAX_FRAME))]
    Length(usize),
    /// Another version of the format, or another type of packet.
    #[error("not a data packet of version {VERSION}: first byte {0:#04x}")]
    Kind(u8),
    /// A frame that asks for what can't be done.
    #[error("a frame's offload fields contradict each other or its length")]
    Offload,
}

impl Header {
    /// The header of a packet: what is needed to find the receiver's key. Nothing of it is authentic yet.
    pub fn parse(packet: &[u8]) -> Result<Self, PacketError> {
        if !(sealed_len(MIN_FRAME)..=sealed_len(MAX_FRAME)).contains(&packet.len()) {
            return Err(PacketError::Length(packet.len()));
        }
        let (bytes, _) = packet.split_first_chunk::<HEADER>().ok_or(PacketError::Length(packet.len()))?;
        let [kind, phase, n0, n1, k0, k1, k2, k3, number @ ..] = *bytes;
        if kind != VERSION << 4 | TYPE_DATA {
            return Err(PacketError::Kind(kind));
        }
        Ok(Self {
            phase,
            network: u16::from_be_bytes([n0, n1]),
            key_id: u32::from_be_bytes([k0, k1, k2, k3]),
            number: PacketNumber(u64::from_be_bytes(number)),
        })
    }

    /// Its bytes.
    pub fn to_bytes(self) -> [u8; HEADER] {
        let mut bytes = [0; HEADER];
        bytes[0] = VERSION << 4 | TYPE_DATA;
        bytes[1] = self.phase;
        bytes[2..4].copy_from_slice(&self.network.to_be_bytes());
        bytes[4..8].copy_from_slice(&self.key_id.to_be_bytes());
        bytes[8..].copy_from_slice(&self.number.0.to_be_bytes());
        bytes
    }
}

impl PacketNumber {
    /// The largest counter: 56 bits.
    pub const MAX_COUNTER: u64 = (1 << 56) - 1;

    /// The packet `counter` of `queue`; None above [`MAX_COUNTER`](Self::MAX_COUNTER).
    pub fn new(queue: u8, counter: u64) -> Option<Self> {
        (counter <= Self::MAX_COUNTER).then_some(Self(u64::from(queue) << 56 | counter))
    }

    /// The sender's queue.
    pub fn queue(self) -> u8 {
        (self.0 >> 56) as u8
    }

    /// Its number within the queue, from 0.
    pub fn counter(self) -> u64 {
        self.0 & Self::MAX_COUNTER
    }

    pub(crate) fn to_bytes(self) -> [u8; 8] {
        self.0.to_be_bytes()
    }
}

const CHECKSUM: u8 = 1;
const CHECKSUM_VALID: u8 = 2;

impl Offload {
    /// Reads it, and checks it against the length of its frame.
    pub(crate) fn parse(bytes: &[u8; OFFLOAD], frame: usize) -> Result<Self, PacketError> {
        let [flags, kind, s0, s1, c0, c1, o0, o1] = *bytes;
        let (segment, start) = (u16::from_be_bytes([s0, s1]), u16::from_be_bytes([c0, c1]));
        let checksum = Checksum { start, offset: u16::from_be_bytes([o0, o1]) };
        let cut = match kind {
            0 => None,
            1 => Some(CutKind::Tcp4),
            4 => Some(CutKind::Tcp6),
            5 => Some(CutKind::Udp),
            _ => return Err(PacketError::Offload),
        };
        let offload = Self {
            checksum: (flags & CHECKSUM != 0).then_some(checksum),
            checksum_valid: flags & CHECKSUM_VALID != 0,
            cut: cut.map(|kind| Cut { kind, segment }),
        };
        // Only one way to write each meaning: unused fields and flags are zero.
        if offload.to_bytes() != *bytes || !offload.fits(frame) {
            return Err(PacketError::Offload);
        }
        Ok(offload)
    }

    pub(crate) fn to_bytes(self) -> [u8; OFFLOAD] {
        let flags = if self.checksum.is_some() { CHECKSUM } else { 0 };
        let flags = flags | if self.checksum_valid { CHECKSUM_VALID } else { 0 };
        let kind = match self.cut.map(|c| c.kind) {
            None => 0,
            Some(CutKind::Tcp4) => 1,
            Some(CutKind::Tcp6) => 4,
            Some(CutKind::Udp) => 5,
        };
        let [s0, s1] = self.cut.map_or(0, |c| c.segment).to_be_bytes();
        let [c0, c1] = self.checksum.map_or(0, |c| c.start).to_be_bytes();
        let [o0, o1] = self.checksum.map_or(0, |c| c.offset).to_be_bytes();
        [flags, kind, s0, s1, c0, c1, o0, o1]
    }

    /// Whether it can be true of a frame of `frame` bytes.
    pub(crate) fn fits(&self, frame: usize) -> bool {
        let inside = |c: Checksum| usize::from(c.start) + usize::from(c.offset) + 2 <= frame;
        self.checksum.is_none_or(inside)
            && self.cut.is_none_or(|c| c.segment > 0)
            && !(self.checksum.is_some() && self.checksum_valid)
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use proptest::prelude::*;

    pub(crate) fn any_offload() -> impl Strategy<Value = Offload> {
        let checksum = prop::option::of((0_u16..40, 0_u16..20).prop_map(|(start, offset)| Checksum { start, offset }));
        let kind = prop::sample::select(vec![CutKind::Tcp4, CutKind::Tcp6, CutKind::Udp]);
        let cut = prop::option::of((kind, 1..=u16::MAX).prop_map(|(kind, segment)| Cut { kind, segment }));
        (checksum, any::<bool>(), cut).prop_map(|(checksum, valid, cut)| Offload {
            checksum,
            checksum_valid: valid && checksum.is_none(),
            cut,
        })
    }

    proptest! {
        #[test]
        fn headers_come_back(phase: u8, network: u16, key_id: u32, queue: u8, counter in 0..=PacketNumber::MAX_COUNTER) {
            let number = PacketNumber::new(queue, counter).expect("in range");
            prop_assert_eq!((number.queue(), number.counter()), (queue, counter));
            let header = Header { phase, network, key_id, number };
            let mut packet = vec![0; sealed_len(MIN_FRAME)];
            packet[..HEADER].copy_from_slice(&header.to_bytes());
            prop_assert_eq!(Header::parse(&packet), Ok(header));
        }

        #[test]
        fn offloads_come_back(offload in any_offload()) {
            prop_assert_eq!(Offload::parse(&offload.to_bytes(), 100), Ok(offload));
        }

        #[test]
        fn an_offload_has_one_encoding(bytes: [u8; OFFLOAD], frame in MIN_FRAME..2000) {
            if let Ok(offload) = Offload::parse(&bytes, frame) {
                prop_assert_eq!(offload.to_bytes(), bytes);
            }
        }
    }

    #[test]
    fn what_is_no_data_packet_is_refused() {
        let good = {
            let mut packet = vec![0; sealed_len(MIN_FRAME)];
            packet[0] = 0x10;
            packet
        };
        assert!(Header::parse(&good).is_ok());
        assert_eq!(Header::parse(&good[1..]), Err(PacketError::Length(53)));
        assert_eq!(Header::parse(&vec![0x10; 65_508]), Err(PacketError::Length(65_508)));
        for kind in [0x00, 0x11, 0x20, 0xff] {
            let mut bad = good.clone();
            bad[0] = kind;
            assert_eq!(Header::parse(&bad), Err(PacketError::Kind(kind)));
        }
    }

    #[test]
    fn an_offload_that_cannot_be_true_is_refused() {
        for bad in [
            [4, 0, 0, 0, 0, 0, 0, 0],
            [0, 2, 0, 0, 0, 0, 0, 0],
            [0, 1, 0, 0, 0, 0, 0, 0],
            [0, 0, 0, 1, 0, 0, 0, 0],
            [0, 0, 0, 0, 0, 1, 0, 0],
            [3, 0, 0, 0, 0, 14, 0, 16],
            [1, 0, 0, 0, 0, 50, 0, 49],
            [1, 0, 0, 0, 255, 255, 255, 255],
        ] {
            assert_eq!(Offload::parse(&bad, 100), Err(PacketError::Offload), "{bad:?}");
        }
        assert!(Offload::parse(&[1, 0, 0, 0, 0, 50, 0, 48], 100).is_ok());
        assert_eq!(PacketNumber::new(0, 1 << 56), None);
    }
}
