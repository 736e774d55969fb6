//! Reads and writes.

use super::{Core, Shared, leaf};
use crate::VolumeError;
use crate::backing::Backing;
use crate::format::log::Record;
use crate::format::page::{Entry, set_entry};
use crate::format::slot::Slot;
use crate::format::{BLOCK, Block, zero_block};
use std::ops::Range;

/// Blocks handled under one lock: 256 KiB.
const CHUNK: u64 = 64;
/// Log blocks that must be free for a chunk and the FLUSH behind it.
const LOG_ROOM: u64 = 4;

/// A part of a request that covers whole or partial neighbouring blocks.
struct Chunk {
    /// Bytes of the volume.
    bytes: Range<u64>,
    /// Bytes of the caller's buffer.
    buffer: Range<usize>,
}

impl Chunk {
    fn first(&self) -> u64 {
        self.bytes.start / BLOCK as u64
    }

    fn blocks(&self) -> usize {
        (self.bytes.end.div_ceil(BLOCK as u64) - self.first()) as usize
    }

    /// Bytes of the first block before this begins.
    fn lead(&self) -> usize {
        (self.bytes.start % BLOCK as u64) as usize
    }
}

/// Cuts a request at multiples of [`CHUNK`] blocks.
fn chunks(offset: u64, length: usize) -> impl Iterator<Item = Chunk> {
    let size = CHUNK * BLOCK as u64;
    let end = offset + length as u64;
    let mut at = offset;
    std::iter::from_fn(move || {
        let start = at;
        at = end.min((start / size + 1) * size);
        (start < end).then(|| Chunk { bytes: start..at, buffer: (start - offset) as usize..(at - offset) as usize })
    })
}

impl Shared {
    pub(super) fn check_request(&self, offset: u64, length: u64) -> Result<(), VolumeError> {
        self.ready()?;
        let size = self.backing.geometry.size;
        let inside = offset.checked_add(length).is_some_and(|end| end <= size);
        if !inside || !offset.is_multiple_of(512) || !length.is_multiple_of(512) {
            return Err(VolumeError::Request { offset, length });
        }
        Ok(())
    }

    pub(super) fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<(), VolumeError> {
        self.check_request(offset, buffer.len() as u64)?;
        for chunk in chunks(offset, buffer.len()) {
            let mut entries = [Entry::UNMAPPED; CHUNK as usize];
            let entries = &mut entries[..chunk.blocks()];
            {
                let mut core = self.core()?;
                core.lookup(chunk.first(), entries, &self.backing)?;
            }
            self.read_chunk(&chunk, entries, &mut buffer[chunk.buffer.clone()])?;
        }
        Ok(())
    }

    /// Reads neighbours in the store with one call each, outside the lock: a block that was reused meanwhile fails its tag and is
    /// looked up again.
    fn read_chunk(&self, chunk: &Chunk, entries: &[Entry], out: &mut [u8]) -> Result<(), VolumeError> {
        let mut i = 0;
        let mut rest = out;
        while i < entries.len() {
            let lba = chunk.first() + i as u64;
            let lead = if i == 0 { chunk.lead() } else { 0 };
            if lead > 0 || rest.len() < BLOCK {
                let (part, after) = rest.split_at_mut(rest.len().min(BLOCK - lead));
                let mut block = zero_block();
                self.read_run(lba, &entries[i..=i], std::slice::from_mut(&mut *block))?;
                part.copy_from_slice(&block[lead..lead + part.len()]);
                (rest, i) = (after, i + 1);
                continue;
            }
            let run = run_length(&entries[i..]).min(rest.len() / BLOCK);
            let (part, after) = rest.split_at_mut(run * BLOCK);
            self.read_run(lba, &entries[i..i + run], part.as_chunks_mut().0)?;
            (rest, i) = (after, i + run);
        }
        Ok(())
    }

    /// Whole blocks that are neighbours in the store, or all unmapped.
    fn read_run(&self, lba: u64, entries: &[Entry], blocks: &mut [Block]) -> Result<(), VolumeError> {
        let Some(first) = entries[0].data() else {
            if entries[0].physical == Entry::LOST {
                return Err(self.lost(lba));
            }
            blocks.as_flattened_mut().fill(0);
            return Ok(());
        };
        if self.backing.in_pool(first) && self.backing.in_pool(first + blocks.len() as u64 - 1) {
            self.backing.read_blocks(first, blocks.as_flattened_mut())?;
        }
        let bad = self.backing.with_keys(|ring, _| {
            let mut bad = Vec::new();
            for (i, (entry, block)) in entries.iter().zip(blocks.iter_mut()).enumerate() {
                if !ring.find(entry.key).is_some_and(|key| key.open(lba + i as u64, entry, block)) {
                    bad.push(i);
                }
            }
            Ok(bad)
        })?;
        for i in bad {
            let mut core = self.core()?;
            core.load_block(lba + i as u64, &mut blocks[i], &self.backing)?;
        }
        Ok(())
    }

    fn lost(&self, lba: u64) -> VolumeError {
        self.backing.events.integrity(Some(lba), None, "a recovery found its data gone");
        VolumeError::Integrity { lba }
    }

    pub(super) fn write(&self, offset: u64, data: &[u8]) -> Result<(), VolumeError> {
        self.check_request(offset, data.len() as u64)?;
        if self.read_only {
            return Err(VolumeError::ReadOnly);
        }
        self.anchoring.check()?;
        for chunk in chunks(offset, data.len()) {
            self.make_room()?;
            let mut core = self.core()?;
            core.writable()?;
            core.room_in_log()?;
            let mut scratch = std::mem::take(&mut core.scratch);
            let done = core.write_chunk(&chunk, &data[chunk.buffer.clone()], &mut scratch, &self.backing);
            core.scratch = scratch;
            done?;
        }
        Ok(())
    }

    /// Sees to it that a chunk finds room in log, pool and memory.
    pub(super) fn make_room(&self) -> Result<(), VolumeError> {
        let (checkpoint, flush) = {
            let core = self.core()?;
            let full = core.mapped + core.space.waiting() + CHUNK > self.backing.geometry.data_capacity();
            (core.wants_checkpoint(&self.backing), full)
        };
        if checkpoint {
            return self.checkpoint();
        }
        if flush {
            // Superseded blocks wait for their records to be durable; this is nobody's FLUSH, so no anchor is owed.
            let group = self.flushing();
            return self.commit(&group);
        }
        Ok(())
    }
}

impl Core {
    pub(super) fn room_in_log(&self) -> Result<(), VolumeError> {
        if self.log.free() < LOG_ROOM { Err(VolumeError::Full(None)) } else { Ok(()) }
    }

    fn write_chunk(
        &mut self,
        chunk: &Chunk,
        data: &[u8],
        scratch: &mut Vec<u8>,
        from: &Backing,
    ) -> Result<(), VolumeError> {
        let (first, count) = (chunk.first(), chunk.blocks());
        scratch.clear();
        scratch.resize(count * BLOCK, 0);
        self.fill_edges(chunk, scratch, from)?;
        scratch[chunk.lead()..chunk.lead() + data.len()].copy_from_slice(data);
        let mut old = [Entry::UNMAPPED; CHUNK as usize];
        self.lookup(first, &mut old[..count], from)?;
        let mut near = self.neighbour(first, &old[..count], from)?;
        let mut done = 0;
        while done < count {
            let run = self.space.allocate(near, (count - done) as u64, &mut self.forest, from)?;
            let length = (run.end - run.start) as usize;
            let blocks = scratch[done * BLOCK..][..length * BLOCK].as_chunks_mut().0;
            let written = self.seal_and_put(first + done as u64, run.start, blocks, from);
            match written {
                Ok(new) => self.publish(first + done as u64, &old[done..done + length], &new, from)?,
                Err(error) => {
                    let freed = self.space.mark(run, false, &mut self.forest, from);
                    freed.map_err(|e| self.fail(e, &*from.events))?;
                    return Err(error);
                }
            }
            near = run.end;
            done += length;
        }
        self.log.relieve(from)
    }

    /// Reads what the first and last block hold beside the request.
    fn fill_edges(&mut self, chunk: &Chunk, scratch: &mut [u8], from: &Backing) -> Result<(), VolumeError> {
        let last = chunk.blocks() - 1;
        let tail = !chunk.bytes.end.is_multiple_of(BLOCK as u64) && chunk.bytes.end != from.geometry.size;
        for i in [0, last].into_iter().take(if last == 0 { 1 } else { 2 }) {
            if (i == 0 && chunk.lead() > 0) || (i == last && tail) {
                let block = &mut scratch.as_chunks_mut().0[i];
                self.load_block(chunk.first() + i as u64, block, from)?;
            }
        }
        Ok(())
    }

    /// Where new data best goes: behind the block before it.
    fn neighbour(&mut self, first: u64, old: &[Entry], from: &Backing) -> Result<u64, VolumeError> {
        let mut before = [Entry::UNMAPPED];
        if first > 0 {
            self.lookup(first - 1, &mut before, from)?;
        }
        let near = before[0].data().map(|b| b + 1).or(old[0].data()).filter(|b| from.in_pool(*b));
        Ok(near.unwrap_or_else(|| {
            let pool = from.geometry.pool();
            pool.start + first.min(pool.end - pool.start - 1)
        }))
    }

    /// Encrypts blocks in place and writes them at `physical`; returns their entries.
    fn seal_and_put(
        &mut self,
        lba: u64,
        physical: u64,
        blocks: &mut [Block],
        from: &Backing,
    ) -> Result<Vec<Entry>, VolumeError> {
        let count = blocks.len() as u64;
        let generation = (u64::from(self.superblock.writer.get()) << 40) | self.generations;
        if self.generations + count >= 1 << 40 {
            return Err(VolumeError::OpenNumberExhausted);
        }
        if self.written + count > Slot::LIMIT {
            return Err(VolumeError::KeyExhausted(self.superblock.key()));
        }
        // Counted before anything is sealed: a generation is never used twice, whatever fails.
        self.generations += count;
        self.written += count;
        let entries = from.with_keys(|_, key| {
            let seal = |(i, block): (usize, &mut Block)| {
                let (i, physical) = (i as u64, physical + i as u64);
                let tag = key.seal(lba + i, generation + i, block);
                Entry { physical, generation: generation + i, key: key.id, tag }
            };
            Ok(blocks.iter_mut().enumerate().map(seal).collect())
        })?;
        from.write_blocks(physical, blocks.as_flattened())?;
        Ok(entries)
    }

    /// The map and the log learn of written blocks.
    fn publish(&mut self, lba: u64, old: &[Entry], new: &[Entry], from: &Backing) -> Result<(), VolumeError> {
        for (i, (old, new)) in old.iter().zip(new).enumerate() {
            let published = self.publish_one(lba + i as u64, old, new, from);
            // The pages were there a moment ago; if one is not any more, memory no longer says what the log will.
            published.map_err(|error| self.fail(error, &*from.events))?;
        }
        Ok(())
    }

    fn publish_one(&mut self, lba: u64, old: &Entry, new: &Entry, from: &Backing) -> Result<(), VolumeError> {
        let (id, place) = leaf(lba);
        set_entry(&mut self.forest.page_mut(id, from)?.bytes, place, *new);
        match old.data() {
            Some(block) if from.in_pool(block) => {
                self.space.supersede(block, self.log.appended, false, &mut self.forest, from)?;
            }
            _ => self.mapped += 1,
        }
        self.log.append(Record { lba, entry: *new });
        Ok(())
    }

    /// A block's plain text, read under the lock; a second time where its tag fails.
    pub(super) fn load_block(&mut self, lba: u64, block: &mut Block, from: &Backing) -> Result<(), VolumeError> {
        let mut found = [Entry::UNMAPPED];
        self.lookup(lba, &mut found, from)?;
        let entry = found[0];
        if entry.physical == 0 {
            block.fill(0);
            return Ok(());
        }
        if let Some(physical) = entry.data().filter(|b| from.in_pool(*b)) {
            for _ in 0..2 {
                from.read_blocks(physical, block)?;
                if from.with_keys(|ring, _| Ok(ring.find(entry.key).is_some_and(|k| k.open(lba, &entry, block))))? {
                    return Ok(());
                }
            }
        }
        block.fill(0);
        from.events.integrity(Some(lba), entry.data(), "its tag does not verify");
        Err(VolumeError::Integrity { lba })
    }
}

/// How many entries from the first on are neighbours in the store, or unmapped like it.
fn run_length(entries: &[Entry]) -> usize {
    let first = entries[0];
    let follows = |(i, e): (usize, &Entry)| match first.data() {
        Some(physical) => e.data() == physical.checked_add(i as u64),
        None => e.physical == first.physical,
    };
    entries.iter().enumerate().take_while(|(i, e)| follows((*i, e))).count()
}
