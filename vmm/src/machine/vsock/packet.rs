//! The header of a packet (virtio 1.3, 5.10.6).
//!
//! ```text
//! src_cid u64, dst_cid u64, src_port u32, dst_port u32, len u32, type u16, op u16, flags u32, buf_alloc u32, fwd_cnt u32
//! ```

/// Its length in bytes.
pub(super) const HEADER: usize = 44;
/// The host's address.
pub(super) const HOST_CID: u64 = 2;
/// The only type there is: streams.
pub(super) const STREAM: u16 = 1;
/// Flags of a shutdown: its sender receives no more, sends no more.
pub(super) const SHUTDOWN_RECEIVE: u32 = 1;
pub(super) const SHUTDOWN_SEND: u32 = 2;

/// What a packet is for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Op {
    Request,
    Response,
    Reset,
    Shutdown,
    Data,
    CreditUpdate,
    CreditRequest,
}

const OPS: [(Op, u16); 7] = [
    (Op::Request, 1),
    (Op::Response, 2),
    (Op::Reset, 3),
    (Op::Shutdown, 4),
    (Op::Data, 5),
    (Op::CreditUpdate, 6),
    (Op::CreditRequest, 7),
];

/// A header.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Header {
    pub(super) src_cid: u64,
    pub(super) dst_cid: u64,
    pub(super) src_port: u32,
    pub(super) dst_port: u32,
    /// Bytes that follow.
    pub(super) len: u32,
    pub(super) kind: u16,
    /// None where it is no operation.
    pub(super) op: Option<Op>,
    pub(super) flags: u32,
    pub(super) buf_alloc: u32,
    pub(super) fwd_cnt: u32,
}

impl Header {
    /// The header in `bytes`.
    pub(super) fn parse(bytes: &[u8; HEADER]) -> Self {
        let quad = |at: usize| bytes[at..at + 8].iter().rev().fold(0, |value: u64, byte| value << 8 | u64::from(*byte));
        let dword =
            |at: usize| bytes[at..at + 4].iter().rev().fold(0, |value: u32, byte| value << 8 | u32::from(*byte));
        let word = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        Self {
            src_cid: quad(0),
            dst_cid: quad(8),
            src_port: dword(16),
            dst_port: dword(20),
            len: dword(24),
            kind: word(28),
            op: OPS.iter().find(|(_, number)| *number == word(30)).map(|(op, _)| *op),
            flags: dword(32),
            buf_alloc: dword(36),
            fwd_cnt: dword(40),
        }
    }

    /// Its bytes.
    pub(super) fn bytes(&self) -> [u8; HEADER] {
        let op = OPS.iter().find(|(op, _)| Some(*op) == self.op).map_or(0, |(_, number)| *number);
        let mut bytes = [0; HEADER];
        let mut put = |at: usize, part: &[u8]| bytes[at..at + part.len()].copy_from_slice(part);
        put(0, &self.src_cid.to_le_bytes());
        put(8, &self.dst_cid.to_le_bytes());
        put(16, &self.src_port.to_le_bytes());
        put(20, &self.dst_port.to_le_bytes());
        put(24, &self.len.to_le_bytes());
        put(28, &self.kind.to_le_bytes());
        put(30, &op.to_le_bytes());
        put(32, &self.flags.to_le_bytes());
        put(36, &self.buf_alloc.to_le_bytes());
        put(40, &self.fwd_cnt.to_le_bytes());
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_header_survives_the_way_out_and_in(bytes: [u8; HEADER]) {
            let header = Header::parse(&bytes);
            let mut same = bytes;
            if header.op.is_none() {
                same[30..32].fill(0);
            }
            prop_assert_eq!(header.bytes(), same);
        }
    }
}
