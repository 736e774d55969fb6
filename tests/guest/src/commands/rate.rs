//! `reads`, `writes` and `storm`: many requests under way at once.

use crate::serial::line;
use crate::virtio::block::{BLOCK, Disk, DiskError, fill};

use super::is_as_written;

/// Requests that a storm has under way.
const DEPTH: usize = 32;
/// Blocks that take part in a storm: a multiple of the requests under way, so that no two of those are for one block.
const BLOCKS: usize = 512;

/// `count` reads or writes at random places, `depth` at once; begun in batches, as they are finished.
pub fn run(disk: &Disk, name: &str, depth: usize, count: u64) -> Result<(), DiskError> {
    let depth = depth.clamp(1, DEPTH);
    let (blocks, write) = (disk.blocks().max(1), name == "writes");
    let mut random = 0x9e37_79b9_7f4a_7c15;
    let (mut begun, mut done) = (0, 0);
    (0..depth).for_each(|slot| fill(slot, &[slot as u8; BLOCK]));
    line(format_args!("{name} started"));
    while begun < count.min(depth as u64) {
        disk.begin(begun as usize, write, step(&mut random) % blocks)?;
        begun += 1;
    }
    while done < count {
        disk.kick();
        let mut slot = disk.finish()?;
        loop {
            done += 1;
            if begun < count {
                disk.begin(slot, write, step(&mut random) % blocks)?;
                begun += 1;
            }
            match disk.finished() {
                Some(next) => slot = next?,
                None => break,
            }
        }
    }
    line(format_args!("{name} done {done}"));
    Ok(())
}

/// Writes blocks at random, each filled with its number and its version; then flushes and compares all.
pub fn storm(disk: &Disk, count: u64) -> Result<(), DiskError> {
    let rows = (disk.blocks() / DEPTH as u64).clamp(1, (BLOCKS / DEPTH) as u64) as usize;
    let mut versions = [0_u32; BLOCKS];
    let mut random = 0x2545_f491_4f6c_dd1d;
    let mut begin = |slot: usize| {
        let block = slot + DEPTH * (step(&mut random) as usize % rows);
        versions[block] += 1;
        fill(slot, &pattern(block, versions[block]));
        disk.begin(slot, true, block as u64)
    };
    let first = count.min(DEPTH as u64);
    (0..first as usize).try_for_each(&mut begin)?;
    disk.kick();
    for begun in first..count + first {
        let slot = disk.finish()?;
        if begun < count {
            begin(slot)?;
            disk.kick();
        }
    }
    disk.flush()?;
    let (mut right, mut wrong) = (0, 0);
    for (block, version) in versions.iter().enumerate().filter(|(_, version)| **version > 0) {
        match is_as_written(disk, block as u64, &pattern(block, *version))? {
            true => right += 1,
            false => wrong += 1,
        }
    }
    match wrong {
        0 => line(format_args!("storm ok {right}")),
        _ => line(format_args!("storm wrong {wrong}")),
    }
    Ok(())
}

/// By xorshift: the same sequence in each run.
fn step(random: &mut u64) -> u64 {
    *random ^= *random << 13;
    *random ^= *random >> 7;
    *random ^= *random << 17;
    *random
}

fn pattern(block: usize, version: u32) -> [u8; BLOCK] {
    let mut bytes = [0; BLOCK];
    for pair in bytes.chunks_exact_mut(8) {
        pair[..4].copy_from_slice(&(block as u32).to_le_bytes());
        pair[4..].copy_from_slice(&version.to_le_bytes());
    }
    bytes
}
