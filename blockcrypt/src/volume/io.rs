//! Reads and writes.
//!
//! A write has three parts: under the lock it is given places and generations; without it its blocks are sealed, as one batch, and
//! written; under the lock map and log learn of them. A read looks its blocks up under the lock and does the rest without: a block
//! that was reused meanwhile fails its tag and is looked up again.

use super::shared::Shared;
use super::{Core, leaf};
use crate::VolumeError;
use crate::backing::Backing;
use crate::format::log::Record;
use crate::format::page::{BITS, Entry, set_entry};
use crate::format::slot::Slot;
use crate::format::{BLOCK, Block, MAC, zero_block};
use crate::keys::{Open, Seal};
use crate::space::bitmap;
use crate::tree::Halt;
use std::cell::Cell;
use std::ops::Range;
use std::time::Duration;

/// Blocks handled at once: 256 KiB.
pub(super) const CHUNK: u64 = 64;
/// Log blocks that must be free for a chunk and the FLUSH behind it.
pub(super) const LOG_ROOM: u64 = 4;

thread_local! {
    /// Where a chunk's ciphertext is made: fresh memory for each request would cost a tenth of its time.
    static CIPHERTEXT: Cell<Vec<u8>> = const { Cell::new(Vec::new()) };
}

/// How often a request that is short of room only because of others tries again: a write for ten seconds.
pub(super) const PATIENCE: u32 = 10_000;

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

/// Where a chunk's blocks go: neighbours as far as there are any, and the first's generation.
struct Granted {
    runs: Vec<Range<u64>>,
    generation: u64,
}

/// Where the plain text of neighbouring blocks is: `whole` has that of some, from number `skip` on; the others hold their own.
#[derive(Clone, Copy, Default)]
pub(super) struct Plain<'a> {
    skip: usize,
    whole: &'a [Block],
}

impl<'a> Plain<'a> {
    fn of(self, i: usize) -> Option<&'a Block> {
        self.whole.get(i.checked_sub(self.skip)?)
    }
}

impl Granted {
    fn places(&self) -> impl Iterator<Item = u64> {
        self.runs.iter().cloned().flatten()
    }
}

impl Shared {
    pub(super) fn check_request(&self, offset: u64, length: u64) -> Result<(), VolumeError> {
        self.ready()?;
        let size = self.backing.geometry().size;
        let inside = offset.checked_add(length).is_some_and(|end| end <= size);
        if !inside || !offset.is_multiple_of(512) || !length.is_multiple_of(512) {
            return Err(VolumeError::Request { offset, length });
        }
        Ok(())
    }

    pub(super) fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<(), VolumeError> {
        self.check_request(offset, buffer.len() as u64)?;
        for chunk in chunks(offset, buffer.len()) {
            self.read_chunk(&chunk, &mut buffer[chunk.buffer.clone()])?;
        }
        Ok(())
    }

    /// Whole blocks are read where they are wanted, those that are cut by the request's edges beside.
    fn read_chunk(&self, chunk: &Chunk, out: &mut [u8]) -> Result<(), VolumeError> {
        let first = chunk.first();
        let lead = chunk.lead();
        let mut rest = out;
        let mut at = first;
        if lead > 0 {
            let (part, after) = rest.split_at_mut(rest.len().min(BLOCK - lead));
            self.read_part(at, lead, part)?;
            (rest, at) = (after, at + 1);
        }
        let (whole, tail) = rest.as_chunks_mut();
        self.read_blocks(at, whole)?;
        if tail.is_empty() { Ok(()) } else { self.read_part(at + whole.len() as u64, 0, tail) }
    }

    fn read_part(&self, lba: u64, start: usize, part: &mut [u8]) -> Result<(), VolumeError> {
        let mut block = zero_block();
        self.read_blocks(lba, std::slice::from_mut(&mut *block))?;
        part.copy_from_slice(&block[start..start + part.len()]);
        Ok(())
    }

    /// The plain text of at most [`CHUNK`] neighbouring blocks.
    pub(super) fn read_blocks(&self, first: u64, blocks: &mut [Block]) -> Result<(), VolumeError> {
        let mut entries = [Entry::UNMAPPED; CHUNK as usize];
        let entries = &mut entries[..blocks.len()];
        self.with_core(|core| core.lookup(first, entries))?;
        for i in self.fetch_and_open(first, entries, blocks)? {
            self.read_again(first + i as u64, entries[i], &mut blocks[i])?;
        }
        Ok(())
    }

    /// Reads neighbours in the store with one call each, and opens all as one batch; returns which do not verify.
    fn fetch_and_open(&self, lba: u64, entries: &[Entry], blocks: &mut [Block]) -> Result<Vec<usize>, VolumeError> {
        let mut i = 0;
        while i < entries.len() {
            let run = run_length(&entries[i..]);
            let part = &mut blocks[i..i + run];
            match entries[i].data() {
                Some(physical) if self.backing.in_pool(physical) && self.backing.in_pool(physical + run as u64 - 1) => {
                    self.backing.read_blocks(physical, part.as_flattened_mut())?;
                }
                _ => part.as_flattened_mut().fill(0),
            }
            i += run;
        }
        open_blocks(lba, entries, blocks, &self.backing)
    }

    /// A block that did not verify: it was replaced and its place reused meanwhile, or it is bad.
    fn read_again(&self, lba: u64, mut tried: Entry, block: &mut Block) -> Result<(), VolumeError> {
        let mut again = false;
        loop {
            let mut now = [Entry::UNMAPPED];
            self.with_core(|core| core.lookup(lba, &mut now))?;
            if now[0] == tried && (again || tried.data().is_none()) {
                return Err(self.bad_block(lba, &tried, block));
            }
            again = now[0] == tried;
            tried = now[0];
            if self.fetch_and_open(lba, &now, std::slice::from_mut(block))?.is_empty() {
                return Ok(());
            }
        }
    }

    fn bad_block(&self, lba: u64, entry: &Entry, block: &mut Block) -> VolumeError {
        block.fill(0);
        let reason = match entry.physical {
            Entry::LOST => "a recovery found its data gone",
            _ => "its tag does not verify",
        };
        self.backing.events.integrity(Some(lba), entry.data(), reason);
        VolumeError::Integrity { lba }
    }

    pub(super) fn write(&self, offset: u64, data: &[u8]) -> Result<(), VolumeError> {
        self.check_writable(offset, data.len() as u64)?;
        let mut scratch = CIPHERTEXT.take();
        for chunk in chunks(offset, data.len()) {
            self.make_room()?;
            let _among_others = self.among_others()?;
            let blocks = chunk.first()..chunk.first() + chunk.blocks() as u64;
            let _locked = self.lock_blocks(blocks);
            scratch.resize(chunk.blocks() * BLOCK, 0);
            let blocks = scratch.as_chunks_mut().0;
            let plain = self.fill_edges(&chunk, blocks, &data[chunk.buffer.clone()])?;
            self.write_blocks(chunk.first(), blocks, plain)?;
        }
        CIPHERTEXT.set(scratch);
        Ok(())
    }

    pub(super) fn check_writable(&self, offset: u64, length: u64) -> Result<(), VolumeError> {
        self.check_request(offset, length)?;
        if self.read_only {
            return Err(VolumeError::ReadOnly);
        }
        self.anchoring.check()
    }

    /// Seals and writes at most [`CHUNK`] neighbouring blocks, which the caller has locked; `blocks` become ciphertext.
    pub(super) fn write_blocks(&self, first: u64, blocks: &mut [Block], plain: Plain) -> Result<(), VolumeError> {
        let granted = self.grant(first, blocks.len() as u64)?;
        let done = seal_and_put(first, &granted, blocks, plain, &self.backing)
            .and_then(|entries| self.with_core(|core| core.publish(first, &entries)));
        if done.is_err() {
            let mut core = self.core()?;
            core.space.unreserve(granted.places());
            core.log.redeem(blocks.len() as u64);
        }
        done?;
        self.relieve()
    }

    /// As [`Core::grant`]; but what is only short of room because of others waits for them.
    fn grant(&self, first: u64, count: u64) -> Result<Granted, VolumeError> {
        for _ in 0..PATIENCE {
            let granted = self.with_core(|core| core.grant(first, count, &self.backing));
            let Err(VolumeError::Full(None)) = granted else { return granted };
            let (log_full, fits, waiting) = {
                let core = self.core()?;
                let geometry = self.backing.geometry();
                let pool = geometry.pool().end - geometry.pool().start;
                let fits = core.space.used() + count + geometry.kept_for_pages() <= pool;
                (core.room_in_log().is_err(), fits, core.space.waiting() > 0)
            };
            if log_full {
                self.checkpoint()?;
            } else if !fits || self.core()?.tight {
                return granted;
            } else if waiting {
                // Blocks that were superseded are free once that is durable.
                let group = self.flushing();
                self.commit(&group)?;
                drop(group);
                self.punch_freed()?;
            } else {
                // Other requests hold more blocks than they will need when they are done.
                std::thread::sleep(Duration::from_millis(1));
            }
        }
        Err(VolumeError::Full(None))
    }

    /// Sees to it that a chunk finds room in log, pool and memory.
    pub(super) fn make_room(&self) -> Result<(), VolumeError> {
        let (checkpoint, flush) = {
            let core = self.core()?;
            let full = core.free_for_data(&self.backing) < CHUNK && core.space.waiting() > 0;
            (core.wants_checkpoint(&self.backing), full)
        };
        if checkpoint {
            self.checkpoint_if_due()?;
        }
        if flush {
            // Superseded blocks wait for their records to be durable; this is nobody's FLUSH, so no anchor is owed.
            let group = self.flushing();
            self.commit(&group)?;
            drop(group);
            self.punch_freed()?;
        }
        Ok(())
    }

    /// Puts together the blocks that a request covers in part; the rest of `data` is not copied.
    fn fill_edges<'a>(&self, chunk: &Chunk, blocks: &mut [Block], data: &'a [u8]) -> Result<Plain<'a>, VolumeError> {
        let (first, last, lead) = (chunk.first(), blocks.len() - 1, chunk.lead());
        let (edge, rest) = data.split_at(if lead > 0 { data.len().min(BLOCK - lead) } else { 0 });
        let (whole, tail) = rest.as_chunks();
        if !edge.is_empty() {
            // Behind the volume's end there is nothing, and what is read of it is zero.
            self.read_blocks(first, &mut blocks[..1])?;
            blocks[0][lead..lead + edge.len()].copy_from_slice(edge);
        }
        if !tail.is_empty() {
            if chunk.bytes.end == self.backing.geometry().size {
                blocks[last].fill(0);
            } else {
                self.read_blocks(first + last as u64, &mut blocks[last..])?;
            }
            blocks[last][..tail.len()].copy_from_slice(tail);
        }
        Ok(Plain { skip: usize::from(!edge.is_empty()), whole })
    }
}

impl Core {
    pub(super) fn room_in_log(&self) -> Result<(), VolumeError> {
        if self.log.free() < LOG_ROOM { Err(VolumeError::Full(None)) } else { Ok(()) }
    }

    /// Places and generations for neighbouring blocks that are about to be written.
    fn grant(&mut self, first: u64, count: u64, from: &Backing) -> Result<Granted, Halt> {
        self.writable()?;
        self.room_in_log()?;
        self.room_for(first, count, from)?;
        let mut near = self.neighbour(first, from)?;
        let mut runs = Vec::new();
        let mut left = count;
        while left > 0 {
            match self.space.reserve(near, left, &mut self.forest) {
                Ok(run) => {
                    (near, left) = (run.end, left - (run.end - run.start));
                    runs.push(run);
                }
                Err(halt) => {
                    self.space.unreserve(runs.into_iter().flatten());
                    return Err(halt);
                }
            }
        }
        let generation = self.next_generation();
        // Counted before anything is sealed: a generation is never used twice, whatever fails.
        self.generations += count;
        self.written += count;
        self.log.promise(count);
        Ok(Granted { runs, generation })
    }

    /// The generation of the next block that is sealed.
    pub(super) fn next_generation(&self) -> u64 {
        (u64::from(self.superblock.writer.get()) << 40) | self.generations
    }

    /// An error where keys or the pool are used up, or where pages might find no room any more.
    fn room_for(&mut self, first: u64, count: u64, from: &Backing) -> Result<(), Halt> {
        if self.generations + count >= 1 << 40 {
            return Err(VolumeError::OpenNumberExhausted.into());
        }
        if self.written + count > Slot::LIMIT {
            return Err(VolumeError::KeyExhausted(self.superblock.key()).into());
        }
        if self.free_for_data(from) < count {
            return Err(VolumeError::Full(None).into());
        }
        if self.tight {
            let have = self.space.spare() as u64 + self.space.free_in_zone(&mut self.forest)?;
            let need = 2 * self.forest.dirty() as u64 + 64;
            if have < need.min(from.geometry().pages()) {
                return Err(VolumeError::Full(None).into());
            }
        }
        // What the map has must be readable before it is replaced.
        let mut old = [Entry::UNMAPPED; CHUNK as usize];
        self.lookup(first, &mut old[..count as usize])
    }

    /// Where new data best goes: behind the block before it.
    fn neighbour(&mut self, first: u64, from: &Backing) -> Result<u64, Halt> {
        let mut around = [Entry::UNMAPPED; 2];
        let start = first.saturating_sub(1);
        self.lookup(start, &mut around[..(first - start) as usize + 1])?;
        let (before, old) = if first > 0 { (around[0].data(), around[1].data()) } else { (None, around[0].data()) };
        let near = before.map(|b| b + 1).or(old).filter(|b| from.in_pool(*b));
        Ok(near.unwrap_or_else(|| {
            let (zone, pool) = (from.geometry().zone(), from.geometry().pool());
            zone.end + first.min(pool.end - zone.end - 1)
        }))
    }

    /// Map and log learn of blocks that were written. Nothing is changed before all that is needed is in memory.
    fn publish(&mut self, first: u64, new: &[Entry]) -> Result<(), Halt> {
        let mut old = [Entry::UNMAPPED; CHUNK as usize];
        let old = &mut old[..new.len()];
        self.lookup(first, old)?;
        self.forest.page(leaf(first).0)?;
        self.forest.page(leaf(first + new.len() as u64 - 1).0)?;
        for block in old.iter().chain(new).filter_map(Entry::data).filter(|block| self.space.has(*block)) {
            self.forest.page(bitmap(block / BITS as u64))?;
        }
        for (lba, (old, new)) in (first..).zip(old.iter().zip(new)) {
            self.release_data(lba, old, false)?;
            if let Some(block) = new.data() {
                self.space.take(block, &mut self.forest)?;
                self.mapped += 1;
            }
            self.enter(lba, *new)?;
        }
        self.log.redeem(new.len() as u64);
        Ok(())
    }

    /// The map's entry for `lba` becomes `new`, and the log hears of it.
    pub(super) fn enter(&mut self, lba: u64, new: Entry) -> Result<(), Halt> {
        let (id, place) = leaf(lba);
        set_entry(&mut self.forest.page_mut(id)?.bytes, place, new);
        self.log.append(Record { lba, entry: new });
        Ok(())
    }

    /// The block that `old` names is not `lba`'s any more, by the record that comes next.
    pub(super) fn release_data(&mut self, lba: u64, old: &Entry, punch: bool) -> Result<(), Halt> {
        let Some(block) = old.data().filter(|block| self.space.has(*block)) else { return Ok(()) };
        self.mapped -= 1;
        if self.data_is_retained(lba, old) {
            return Ok(());
        }
        self.space.supersede(block, self.log.appended, punch, &mut self.forest)
    }
}

/// Encrypts the blocks of a chunk, as one batch, and writes them where they go; returns their entries.
fn seal_and_put(
    first: u64,
    granted: &Granted,
    blocks: &mut [Block],
    plain: Plain,
    from: &Backing,
) -> Result<Vec<Entry>, VolumeError> {
    let entries = from.with_keys(|_, key| {
        let seal = |(i, block)| Seal {
            lba: first + i as u64,
            generation: granted.generation + i as u64,
            plain: plain.of(i),
            block,
            tag: [0; MAC],
        };
        let mut batch: Vec<Seal> = blocks.iter_mut().enumerate().map(seal).collect();
        key.seal_blocks(&mut batch);
        let entry = |(physical, seal): (u64, &Seal)| Entry {
            physical,
            generation: seal.generation,
            key: key.id,
            tag: seal.tag,
        };
        Ok(granted.places().zip(&batch).map(entry).collect())
    })?;
    let mut done = 0;
    for run in &granted.runs {
        let length = (run.end - run.start) as usize;
        from.write_blocks(run.start, blocks[done..done + length].as_flattened())?;
        done += length;
    }
    Ok(entries)
}

/// Verifies and decrypts blocks in place, as one batch; returns which do not verify.
fn open_blocks(first: u64, entries: &[Entry], blocks: &mut [Block], from: &Backing) -> Result<Vec<usize>, VolumeError> {
    from.with_keys(|ring, _| {
        let mapped = (first..).zip(entries.iter().zip(blocks.iter_mut())).filter(|(_, (e, _))| e.physical != 0);
        let mut batch: Vec<Open> =
            mapped.map(|(lba, (entry, block))| Open { lba, entry, block, good: false }).collect();
        ring.open_blocks(&mut batch);
        Ok(batch.iter().filter(|open| !open.good).map(|open| (open.lba - first) as usize).collect())
    })
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
