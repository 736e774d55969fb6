//! The way of a request as a function of bytes, for fuzzing: guest memory in, whatever the driver wrote there.

use super::counters::Tally;
use super::disk::{Disk, DiskError};
use super::request::{Facts, Outcome, PIECE, Request, Server};
use crate::machine::memory::GuestRam;
use crate::machine::sync::lock;
use crate::machine::virtio::{Chain, Ring, feature};
use std::sync::Mutex;
use vm_memory::{Bytes, GuestAddress};

const MEMORY: usize = 64 << 10;
const DISK: usize = 16 << 10;
/// Size, and descriptor table, available ring, used ring.
const QUEUE: (u16, [u64; 3]) = (16, [0, 0x100, 0x200]);
/// A queue holds no more at once, and nobody adds any.
const REQUESTS_MAX: usize = 16;

/// A disk in memory, without threads.
pub(in crate::machine) struct Scratch(Mutex<Vec<u8>>);

/// 16 KiB.
impl Default for Scratch {
    fn default() -> Self {
        Self(Mutex::new(vec![0; DISK]))
    }
}

impl Disk for Scratch {
    fn size(&self) -> u64 {
        DISK as u64
    }
    fn read(&self, offset: u64, data: &mut [u8]) -> Result<(), DiskError> {
        data.copy_from_slice(&lock(&self.0)[offset as usize..][..data.len()]);
        Ok(())
    }
    fn write(&self, offset: u64, data: &[u8]) -> Result<(), DiskError> {
        lock(&self.0)[offset as usize..][..data.len()].copy_from_slice(data);
        Ok(())
    }
    fn flush(&self) -> Result<(), DiskError> {
        Ok(())
    }
    fn id(&self) -> [u8; 20] {
        [b'x'; 20]
    }
    fn can_discard(&self) -> bool {
        true
    }
    fn discard(&self, offset: u64, length: u64) -> Result<(), DiskError> {
        self.write_zeroes(offset, length, true)
    }
    fn write_zeroes(&self, offset: u64, length: u64, _may_unmap: bool) -> Result<(), DiskError> {
        lock(&self.0)[offset as usize..][..length as usize].fill(0);
        Ok(())
    }
}

/// Serves the queue in a guest of 64 KiB whose memory begins with `data`. The disk panics if it is asked for what it does not
/// have, so that a request that leaves its bounds shows.
pub fn fuzz_requests(data: &[u8]) {
    serve(data);
}

/// How many requests were answered.
fn serve(data: &[u8]) -> usize {
    let Ok(memory) = GuestRam::from_ranges(&[(GuestAddress(0), MEMORY)]) else { return 0 };
    if memory.write_slice(&data[..data.len().min(MEMORY)], GuestAddress(0)).is_err() {
        return 0;
    }
    let (disk, tally) = (Scratch::default(), Tally::default());
    let server = Server { disk: &disk, tally: &tally, write_through: false, may_submit: &|| true };
    let facts = Facts::of(&disk, false, disk.id());
    let Ok(mut ring) = Ring::new(QUEUE.0, QUEUE.0, QUEUE.1, feature::ALL, 64) else { return 0 };
    let (mut buffer, mut served) = (vec![], 0);
    // A request may write into the ring itself and so make more requests; a driver could do that for ever, too.
    while served < REQUESTS_MAX {
        let (taken, alone) = take(&mut ring, &facts, &memory);
        let Some(mut outcomes) = server.serve_together(&taken, &memory, &mut buffer) else { break };
        if let Some((chain, request)) = &alone {
            outcomes.push(server.serve(request, &facts, chain, &memory, &mut buffer));
        }
        let mut answered = 0;
        for ((chain, _), outcome) in taken.iter().chain(&alone).zip(outcomes) {
            let Outcome::Done(written) = outcome else { return served };
            if ring.complete(&memory, chain, written).is_err() || ring.show(&memory).is_err() {
                return served;
            }
            answered += 1;
        }
        if answered == 0 {
            break;
        }
        served += answered;
    }
    assert!(buffer.len() <= PIECE, "no buffer is larger than what good requests need");
    served
}

type Asked = (Chain, Request);

/// Takes what goes together, as the disk's thread does, and the one behind it that does not.
fn take(ring: &mut Ring, facts: &Facts, memory: &GuestRam) -> (Vec<Asked>, Option<Asked>) {
    let (mut taken, mut bytes) = (vec![], 0);
    loop {
        let mut chain = Chain::default();
        if ring.next(memory, &mut chain) != Ok(true) {
            return (taken, None);
        }
        let Some(request) = Request::parse(facts, &chain, memory) else { return (taken, None) };
        match request.shared() {
            Some(more) if bytes + more <= PIECE && taken.len() < REQUESTS_MAX => {
                bytes += more;
                taken.push((chain, request));
            }
            _ => return (taken, Some((chain, request))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A guest with a read, a write, a flush, a question for the name, a discard, and zeroes by an indirect table.
    fn seed() -> Vec<u8> {
        let mut memory = vec![0; 0x2000];
        let mut put = |at: usize, bytes: &[u8]| memory[at..at + bytes.len()].copy_from_slice(bytes);
        for (slot, kind) in [0_u32, 1, 4, 8, 11].into_iter().enumerate() {
            let (first, header) = (3 * slot as u16, 0x400 + 64 * slot as u64);
            put(header as usize, &kind.to_le_bytes());
            put(header as usize + 8, &(slot as u64).to_le_bytes());
            let data = if matches!(kind, 1 | 11) { 1_u16 } else { 3 };
            let length = if kind == 11 { 16 } else { 512 };
            let chain = [(header, 16_u32, 1_u16, first + 1), (0x1000, length, data, first + 2), (header + 32, 1, 2, 0)];
            for (index, (address, length, flags, next)) in chain.into_iter().enumerate() {
                let at = 16 * (usize::from(first) + index);
                put(at, &address.to_le_bytes());
                put(at + 8, &length.to_le_bytes());
                put(at + 12, &flags.to_le_bytes());
                put(at + 14, &next.to_le_bytes());
            }
            put(0x104 + 2 * slot, &first.to_le_bytes());
        }
        put(0x400 + 5 * 64, &13_u32.to_le_bytes());
        let table = [(0x400 + 5 * 64, 16_u32, 1_u16, 1_u16), (0x1000, 16, 1, 2), (0x5f0, 1, 2, 0)];
        for (index, (address, length, flags, next)) in table.into_iter().enumerate() {
            put(0x580 + 16 * index, &u64::to_le_bytes(address));
            put(0x588 + 16 * index, &length.to_le_bytes());
            put(0x58c + 16 * index, &flags.to_le_bytes());
            put(0x58e + 16 * index, &next.to_le_bytes());
        }
        put(16 * 15, &0x580_u64.to_le_bytes());
        put(16 * 15 + 8, &48_u32.to_le_bytes());
        put(16 * 15 + 12, &4_u16.to_le_bytes());
        put(0x104 + 2 * 5, &15_u16.to_le_bytes());
        put(0x102, &6_u16.to_le_bytes());
        memory
    }

    #[test]
    fn requests_and_their_mutations_are_survived() {
        let seed = seed();
        assert_eq!(serve(&seed), 6);
        let mut random = 0x9e37_79b9_7f4a_7c15_u64;
        let mut next = move || {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            random as usize
        };
        for _ in 0..10_000 {
            let mut memory = seed.clone();
            for _ in 0..1 + next() % 12 {
                // Rings, tables and headers are where it matters.
                let at = next() % 0x600;
                memory[at] = if next() % 3 == 0 { 0xff } else { next() as u8 };
            }
            fuzz_requests(&memory);
        }
    }
}
