//! A plain vector beside a volume: what its blocks may hold, and random requests that are held against it.

use crate::common::Random;
use fealty_blockcrypt::{Volume, VolumeError};
use std::collections::HashSet;

pub(crate) const BLOCK: usize = 4096;

/// What each 4096-byte block may hold: the acknowledged content first, then what was written since, in order.
pub(crate) struct Model {
    pub(crate) size: usize,
    /// Where it begins in the volume.
    base: usize,
    versions: Vec<Vec<Vec<u8>>>,
}

impl Model {
    pub(crate) fn new(size: usize) -> Self {
        Self::at(0, size)
    }

    /// A part of a volume.
    pub(crate) fn at(base: usize, size: usize) -> Self {
        let versions = (0..size.div_ceil(BLOCK)).map(|i| vec![vec![0; BLOCK.min(size - i * BLOCK)]]).collect();
        Self { size, base, versions }
    }

    pub(crate) fn now(&self, offset: usize, length: usize) -> Vec<u8> {
        let all = offset / BLOCK..(offset + length).div_ceil(BLOCK);
        let first = all.start * BLOCK;
        let bytes: Vec<u8> = all.flat_map(|i| self.versions[i].last().expect("one at least").clone()).collect();
        bytes[offset - first..offset - first + length].to_vec()
    }

    pub(crate) fn write(&mut self, offset: usize, data: &[u8]) {
        for i in offset / BLOCK..(offset + data.len()).div_ceil(BLOCK) {
            let mut block = self.versions[i].last().expect("one at least").clone();
            let start = offset.max(i * BLOCK);
            let end = (offset + data.len()).min(i * BLOCK + block.len());
            block[start - i * BLOCK..end - i * BLOCK].copy_from_slice(&data[start - offset..end - offset]);
            self.versions[i].push(block);
        }
    }

    /// TRIM: zeroes in whole blocks only. The last may be cut short, if this ends where the volume does.
    pub(crate) fn discard(&mut self, offset: usize, length: usize, ends: bool) {
        let end = if ends && offset + length == self.size { self.size } else { (offset + length) / BLOCK * BLOCK };
        let start = offset.div_ceil(BLOCK) * BLOCK;
        if start < end {
            self.write(start, &vec![0; end - start]);
        }
    }

    /// The volume has another size; what is new is zero.
    pub(crate) fn resize(&mut self, size: usize) {
        self.versions.truncate(size.div_ceil(BLOCK));
        for (i, versions) in self.versions.iter_mut().enumerate() {
            versions.iter_mut().for_each(|block| block.resize(BLOCK.min(size - i * BLOCK), 0));
        }
        let more = Self::at(self.base, size).versions.split_off(self.versions.len());
        self.versions.extend(more);
        self.size = size;
    }

    /// A FLUSH was acknowledged.
    pub(crate) fn settle(&mut self) {
        for versions in &mut self.versions {
            versions.drain(..versions.len() - 1);
        }
    }

    /// After a crash: each block holds one of its versions, which is from now on the only one.
    pub(crate) fn recover(&mut self, volume: &Volume, context: &str) {
        for (i, versions) in self.versions.iter_mut().enumerate() {
            let mut found = vec![0; versions[0].len()];
            volume
                .read((self.base + i * BLOCK) as u64, &mut found)
                .unwrap_or_else(|e| panic!("{context}: block {i}: {e}"));
            assert!(versions.contains(&found), "{context}: block {i} holds what was never written there");
            *versions = vec![found];
        }
    }
}

/// A random part of `size` bytes.
pub(crate) fn request(random: &mut Random, size: usize) -> (usize, usize) {
    let sectors = size / 512;
    let mut start = random.below(sectors as u64) as usize;
    let most = [1, 8, 64, 700][random.below(4) as usize].min(sectors - start);
    let mut length = 1 + random.below(most as u64) as usize;
    if random.chance(60) {
        // Whole blocks, as guests mostly do.
        start -= start % 8;
        length = (length.div_ceil(8) * 8).min(sectors - start);
    }
    (start * 512, length * 512)
}

/// Several random parts, which may meet; mostly as many as fill the lanes that hash them.
pub(crate) fn requests(random: &mut Random, size: usize) -> Vec<(usize, usize)> {
    let most = [3, 20, 50][random.below(3) as usize];
    let count = 1 + random.below(most);
    let mut all: Vec<(usize, usize)> = (0..count).map(|_| request(random, size)).collect();
    if random.chance(60) {
        // Short ones, which share their groups.
        all.iter_mut().for_each(|(_, length)| *length = (*length).min(4096));
    }
    all
}

/// Writes random bytes to all of `requests` at once, `base` further on in the volume, but for those that share a block with one
/// before: where only one of two fails, this model can't say what the block holds. Where that fails, parts may be there.
pub(crate) fn write_many(
    volume: &Volume,
    model: &mut Model,
    base: usize,
    requests: &[(usize, usize)],
    random: &mut Random,
) -> Result<(), VolumeError> {
    let mut taken = HashSet::new();
    let blocks = |(offset, length): &(usize, usize)| offset / BLOCK..(offset + length).div_ceil(BLOCK);
    let mut apart = |request: &&(usize, usize)| {
        let free = blocks(request).all(|block| !taken.contains(&block));
        if free {
            taken.extend(blocks(request));
        }
        free
    };
    let requests: Vec<(usize, usize)> = requests.iter().filter(|request| apart(request)).copied().collect();
    let mut data: Vec<Vec<u8>> = requests.iter().map(|(_, length)| vec![0; *length]).collect();
    data.iter_mut().for_each(|data| random.fill(data));
    let at = |(offset, _): &(usize, usize)| (base + offset) as u64;
    let asked: Vec<(u64, &[u8])> = requests.iter().map(at).zip(data.iter().map(Vec::as_slice)).collect();
    requests.iter().zip(&data).for_each(|((offset, _), data)| model.write(*offset, data));
    let done = volume.write_many(&asked);
    assert_eq!(done.len(), asked.len());
    done.into_iter().collect()
}

/// Reads all of `requests` at once.
pub(crate) fn read_many(
    volume: &Volume,
    model: &Model,
    base: usize,
    requests: &[(usize, usize)],
    context: &str,
) -> Result<(), VolumeError> {
    let mut found: Vec<Vec<u8>> = requests.iter().map(|(_, length)| vec![0xee; *length]).collect();
    let at = |(offset, _): &(usize, usize)| (base + offset) as u64;
    let mut asked: Vec<(u64, &mut [u8])> =
        requests.iter().map(at).zip(found.iter_mut().map(Vec::as_mut_slice)).collect();
    let done = volume.read_many(&mut asked);
    assert_eq!(done.len(), requests.len());
    for ((offset, length), (found, done)) in requests.iter().zip(found.iter().zip(&done)) {
        match done {
            Ok(()) => assert!(*found == model.now(*offset, *length), "{context}: read at {offset}"),
            Err(_) => assert!(found.iter().all(|b| *b == 0), "{context}: an error leaves no bytes"),
        }
    }
    done.into_iter().collect()
}
