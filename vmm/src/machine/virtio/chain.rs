//! One request's buffers, taken apart and checked, and copying in and out of them.

use super::RingError;
use crate::machine::memory::GuestRam;
use vm_memory::{Bytes, GuestAddress, GuestMemory, Permissions};

/// One buffer of a chain, inside RAM.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Segment {
    /// Where.
    pub address: GuestAddress,
    /// Bytes.
    pub length: usize,
}

/// One request's buffers, in order. Kept by the device and filled anew for each request, so that none allocates.
#[derive(Default, Debug)]
pub struct Chain {
    pub(super) head: u16,
    /// What the driver wrote for the device.
    pub readable: Vec<Segment>,
    /// Where the device writes.
    pub writable: Vec<Segment>,
}

impl Chain {
    pub(super) fn clear(&mut self, head: u16) {
        self.head = head;
        self.readable.clear();
        self.writable.clear();
    }

    /// Appends a buffer; empty ones are left out.
    pub(super) fn push(&mut self, segment: Segment, writable: bool, memory: &GuestRam) -> Result<(), RingError> {
        let access = if writable { Permissions::Write } else { Permissions::Read };
        if segment.length == 0 {
            return Ok(());
        }
        if !GuestMemory::check_range(memory, segment.address, segment.length, access) {
            return Err(RingError::Buffer);
        }
        match (writable, self.writable.is_empty()) {
            (true, _) => self.writable.push(segment),
            (false, true) => self.readable.push(segment),
            (false, false) => return Err(RingError::Order),
        }
        Ok(())
    }

    /// Bytes that the driver wrote.
    pub fn readable_length(&self) -> u64 {
        length(&self.readable)
    }

    /// Bytes that the device may write.
    pub fn writable_length(&self) -> u64 {
        length(&self.writable)
    }

    /// Copies what the driver wrote, from byte `from` on, into all of `data`; false if there is less.
    #[must_use]
    pub fn copy_in(&self, memory: &GuestRam, from: u64, data: &mut [u8]) -> bool {
        pieces(&self.readable, from, data.len()).all(|(address, at, length)| match data.get_mut(at..at + length) {
            Some(part) => memory.read_slice(part, address).is_ok(),
            None => false,
        }) && from.saturating_add(data.len() as u64) <= self.readable_length()
    }

    /// Copies all of `data` to where the device may write, from byte `from` on; false if there is less room.
    #[must_use]
    pub fn copy_out(&self, memory: &GuestRam, from: u64, data: &[u8]) -> bool {
        pieces(&self.writable, from, data.len()).all(|(address, at, length)| match data.get(at..at + length) {
            Some(part) => memory.write_slice(part, address).is_ok(),
            None => false,
        }) && from.saturating_add(data.len() as u64) <= self.writable_length()
    }
}

fn length(segments: &[Segment]) -> u64 {
    segments.iter().map(|s| s.length as u64).sum()
}

/// The parts of `segments` that bytes `from` to `from + count` fall into: (address, offset from `from`, length). As many as
/// there are, where `segments` are shorter.
pub fn pieces(segments: &[Segment], from: u64, count: usize) -> impl Iterator<Item = (GuestAddress, usize, usize)> {
    let (mut skip, mut done) = (from, 0);
    segments.iter().filter_map(move |segment| {
        let inside = usize::try_from(skip).unwrap_or(usize::MAX).min(segment.length);
        skip -= inside as u64;
        let length = (segment.length - inside).min(count - done);
        let piece = (GuestAddress(segment.address.0 + inside as u64), done, length);
        done += length;
        (length > 0).then_some(piece)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Each way to cut 0 to 8 bytes out of buffers of 0 to 3 bytes, against the bytes one by one.
    #[test]
    fn every_piece_of_small_chains_is_where_it_should_be() {
        let lengths = (0..4_usize).flat_map(|a| (0..4).flat_map(move |b| (0..4).map(move |c| [a, b, c])));
        for lengths in lengths {
            let mut segments = Vec::new();
            let mut bytes = Vec::new();
            for (slot, length) in lengths.into_iter().enumerate() {
                let address = 0x1000 * (slot as u64 + 1);
                segments.push(Segment { address: GuestAddress(address), length });
                bytes.extend((0..length as u64).map(|i| address + i));
            }
            for from in 0..10_usize {
                for count in 0..10 {
                    let want: Vec<u64> = bytes.iter().skip(from).take(count).copied().collect();
                    let found: Vec<(GuestAddress, usize, usize)> = pieces(&segments, from as u64, count).collect();
                    let each = |&(address, at, length): &(GuestAddress, usize, usize)| {
                        (0..length).map(move |i| (at + i, address.0 + i as u64))
                    };
                    let got: Vec<(usize, u64)> = found.iter().flat_map(each).collect();
                    assert_eq!(got, want.into_iter().enumerate().collect::<Vec<_>>(), "{lengths:?} {from} {count}");
                }
            }
        }
    }
}
