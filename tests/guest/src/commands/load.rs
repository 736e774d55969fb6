//! `load`: writes blocks at random, flushes now and then, and checks all that it wrote, for a number of seconds.

use crate::apic::{self, TICKS_PER_SECOND};
use crate::serial::line;
use crate::virtio::block::{BLOCK, Disk, DiskError};

use super::is_as_written;

/// Blocks that take part, spread over the disk.
const BLOCKS: usize = 512;
/// Writes between two flushes.
const WRITES: usize = 32;

/// Runs for `seconds`. Each block is filled with its number and its version, so that a stale, lost or misplaced write is noticed.
pub fn run(disk: &Disk, seconds: u64) -> Result<(), DiskError> {
    let mut load = Load::new(disk);
    line(format_args!("load started"));
    apic::start_timer();
    while apic::ticks() < seconds * TICKS_PER_SECOND {
        for _ in 0..WRITES {
            load.write_one()?;
        }
        disk.flush()?;
        for _ in 0..WRITES {
            let n = load.choose();
            load.verify(n)?;
        }
    }
    apic::stop_timer();
    for n in 0..load.blocks {
        load.verify(n)?;
    }
    if load.wrong == 0 {
        line(format_args!("load ok {}", load.right));
    } else {
        line(format_args!("load wrong {}", load.wrong));
    }
    Ok(())
}

struct Load<'a> {
    disk: &'a Disk,
    /// Blocks that take part.
    blocks: usize,
    /// How often each was written; what was there before the first time is not ours to judge.
    versions: [u32; BLOCKS],
    random: u64,
    /// Blocks that were compared: as they should be, and not.
    right: u64,
    wrong: u64,
}

impl<'a> Load<'a> {
    fn new(disk: &'a Disk) -> Self {
        let blocks = disk.blocks().clamp(1, BLOCKS as u64) as usize;
        Self { disk, blocks, versions: [0; BLOCKS], random: 0x9e37_79b9_7f4a_7c15, right: 0, wrong: 0 }
    }

    fn write_one(&mut self) -> Result<(), DiskError> {
        let n = self.choose();
        self.versions[n] += 1;
        self.disk.write(self.place(n), &pattern(n, self.versions[n]))?;
        Ok(())
    }

    fn verify(&mut self, n: usize) -> Result<(), DiskError> {
        if self.versions[n] == 0 {
            return Ok(());
        }
        match is_as_written(self.disk, self.place(n), &pattern(n, self.versions[n]))? {
            true => self.right += 1,
            false => self.wrong += 1,
        }
        Ok(())
    }

    /// Where on the disk the nth block of the load lies.
    fn place(&self, n: usize) -> u64 {
        n as u64 * (self.disk.blocks() / self.blocks as u64)
    }

    /// A block, by xorshift: the same sequence in each run.
    fn choose(&mut self) -> usize {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        self.random as usize % self.blocks
    }
}

fn pattern(n: usize, version: u32) -> [u8; BLOCK] {
    let mut bytes = [0; BLOCK];
    for pair in bytes.chunks_exact_mut(8) {
        pair[..4].copy_from_slice(&(n as u32).to_le_bytes());
        pair[4..].copy_from_slice(&version.to_le_bytes());
    }
    bytes
}
