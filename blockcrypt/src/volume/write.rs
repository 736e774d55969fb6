//! Writes. Under the lock they are given places and generations; without it their blocks are sealed, as one batch, and written;
//! under the lock map and log learn of them.

use super::batch::{CHUNK, Group, LARGE, Piece, cut, lead};
use super::durable::Due;
use super::read::Done;
use super::reserve::Wants;
use super::shared::Shared;
use super::{Asked, Core, leaf};
use crate::VolumeError;
use crate::backing::Backing;
use crate::format::log::{RECORDS, Record};
use crate::format::page::{BITS, ENTRIES, Entry, set_entry};
use crate::format::slot::Slot;
use crate::format::{BLOCK, Block, MAC};
use crate::keys::Seal;
use crate::room::with_room;
use crate::space::bitmap;
use crate::tree::{Halt, PageId};
use std::ops::Range;

/// Log blocks that must be free for a group and the FLUSH behind it.
pub(super) const LOG_ROOM: u64 = LARGE.div_ceil(RECORDS as u64) + 2;

/// How often a request that is short of room only because of others tries again: a write for ten seconds.
pub(super) const PATIENCE: u32 = 10_000;

/// Neighbouring blocks that are about to be written.
struct Part<'a> {
    blocks: Range<u64>,
    plain: Plain<'a>,
}

impl Part<'_> {
    fn count(&self) -> usize {
        (self.blocks.end - self.blocks.start) as usize
    }

    /// The leaves of the map that have its blocks, two at most: a leaf has more than [`CHUNK`].
    fn leaves(&self) -> impl Iterator<Item = PageId> {
        let (first, last) = (leaf(self.blocks.start).0, leaf(self.blocks.end - 1).0);
        [Some(first), (last != first).then_some(last)].into_iter().flatten()
    }
}

const _: () = assert!(CHUNK as usize <= ENTRIES);
const _: () = assert!(Slot::LIMIT < 1 << 40);

/// Where the plain text of neighbouring blocks is: `whole` has that of some, from number `skip` on; the others hold their own.
#[derive(Clone, Copy, Default)]
struct Plain<'a> {
    skip: usize,
    whole: &'a [Block],
}

impl<'a> Plain<'a> {
    fn of(self, i: usize) -> Option<&'a Block> {
        self.whole.get(i.checked_sub(self.skip)?)
    }
}

/// Where a group's blocks go: neighbours as far as there are any, and the first's generation.
struct Granted {
    runs: Vec<Range<u64>>,
    generation: u64,
}

impl Granted {
    fn places(&self) -> impl Iterator<Item = u64> {
        self.runs.iter().cloned().flatten()
    }
}

impl Shared {
    pub(super) fn write(&self, offset: u64, data: &[u8]) -> Done {
        self.write_many(&[(offset, data)]).pop().unwrap_or(Ok(()))
    }

    pub(super) fn write_many(&self, requests: &[(u64, &[u8])]) -> Vec<Done> {
        let check = |(offset, data): &(u64, &[u8])| self.check_writable(*offset, data.len() as u64);
        let mut done: Vec<Done> = requests.iter().map(check).collect();
        let mut group = Group::new(requests.len(), self.at_once());
        for (request, (offset, data)) in requests.iter().enumerate() {
            if done[request].is_err() {
                continue;
            }
            let mut rest = *data;
            for (offset, length) in cut(*offset, data.len(), CHUNK) {
                let (data, after) = rest.split_at(length);
                rest = after;
                group.add(Piece { request, offset, data }, |pieces| self.write_group(pieces, &mut done));
            }
        }
        group.end(|pieces| self.write_group(pieces, &mut done));
        // One write for all of them; where that fails, each finds out how it stands with its own.
        if self.hand_over().is_err() {
            done.iter_mut().filter(|done| done.is_ok()).for_each(|done| *done = self.hand_over());
        }
        done
    }

    /// Blocks that are written at once, at most.
    fn at_once(&self) -> u64 {
        if self.backing.overlaps() { LARGE } else { CHUNK }
    }

    pub(super) fn check_writable(&self, offset: u64, length: u64) -> Result<(), VolumeError> {
        self.check_request(offset, length)?;
        if self.read_only {
            return Err(VolumeError::ReadOnly);
        }
        self.anchoring.check()
    }

    /// Writes pieces together; each alone, where one of them can't be.
    fn write_group(&self, pieces: &mut Vec<Piece<&[u8]>>, done: &mut [Done]) {
        pieces.retain(|piece| done[piece.request].is_ok());
        // Neighbours lie side by side, in whatever order they came.
        pieces.sort_unstable_by_key(|piece| piece.offset);
        let Some(last) = pieces.last().map(|piece| piece.request) else { return };
        if let Err(error) = self.write_pieces(pieces) {
            match &pieces[..] {
                [_] => done[last] = Err(error),
                several => self.write_each(several, done),
            }
        }
        if let Err(error) = self.relieve() {
            // They are written; but the log that has their records is in trouble, and somebody must hear of it.
            done[last] = Err(error);
        }
    }

    fn write_each(&self, pieces: &[Piece<&[u8]>], done: &mut [Done]) {
        for piece in pieces {
            if done[piece.request].is_ok() {
                done[piece.request] = self.write_pieces(std::slice::from_ref(piece));
            }
        }
    }

    /// Writes pieces of [`LARGE`] blocks at most, in all, and [`CHUNK`] each, or none of them.
    fn write_pieces(&self, pieces: &[Piece<&[u8]>]) -> Done {
        self.make_room()?;
        let _among_others = self.among_others()?;
        let _locked = self.lock_blocks(pieces.iter().map(Piece::blocks));
        with_room(pieces.iter().map(Piece::count).sum(), |blocks| {
            let mut parts = Vec::with_capacity(pieces.len());
            let mut rest = &mut *blocks;
            for piece in pieces {
                let (own, after) = rest.split_at_mut(piece.count());
                parts.push(Part { blocks: piece.blocks(), plain: self.fill_edges(piece, own)? });
                rest = after;
            }
            self.write_parts(&parts, blocks)
        })
    }

    /// Seals and writes at most [`CHUNK`] neighbouring blocks, which the caller has locked; `blocks` become ciphertext.
    pub(super) fn write_blocks(&self, first: u64, blocks: &mut [Block]) -> Result<(), VolumeError> {
        let part = Part { blocks: first..first + blocks.len() as u64, plain: Plain::default() };
        self.write_parts(&[part], blocks)?;
        self.relieve()
    }

    fn write_parts(&self, parts: &[Part], blocks: &mut [Block]) -> Result<(), VolumeError> {
        let count = blocks.len() as u64;
        let wants = Wants { data: count, leaves: count };
        let granted = self.with_room(wants, |core| core.grant(parts, count, &self.backing))?;
        let done = seal_and_put(parts, &granted, blocks, &self.backing)
            .and_then(|entries| self.with_core(|core| core.publish(parts, &granted, &entries)));
        if done.is_err() {
            let mut core = self.core()?;
            core.space.unreserve(granted.places());
            core.log.redeem(blocks.len() as u64);
        }
        done
    }

    /// Sees to it that a chunk finds room in log, pool and memory.
    pub(super) fn make_room(&self) -> Result<(), VolumeError> {
        let (due, ask, flush) = {
            let mut core = self.core()?;
            let full = core.free_for_data(&self.backing) < self.at_once() && core.space.frees_more();
            let due = core.due(&self.backing);
            let ask = due == Due::Soon && self.background && core.asked == Asked::Not;
            if ask {
                core.asked = Asked::ForOne;
            }
            (due, ask, full)
        };
        if ask {
            self.housekeeper.ask_for_checkpoint();
        } else if due == Due::Now || due == Due::Soon && !self.background {
            self.checkpoint_if_due()?;
        }
        if flush {
            // Superseded blocks wait for their records to be durable, then for their room to be given back; this is nobody's FLUSH,
            // so no anchor is owed.
            let group = self.flushing()?;
            self.commit(&group)?;
            drop(group);
            self.punch_freed()?;
        }
        Ok(())
    }

    /// Puts together the blocks that a piece covers in part; the rest of its data is not copied.
    fn fill_edges<'a>(&self, piece: &Piece<&'a [u8]>, blocks: &mut [Block]) -> Result<Plain<'a>, VolumeError> {
        let (first, last) = (piece.blocks().start, blocks.len() - 1);
        let (start, filled) = lead(piece.offset, piece.data.len());
        let (edge, rest) = piece.data.split_at(filled);
        let (whole, tail) = rest.as_chunks();
        if !edge.is_empty() {
            // Behind the volume's end there is nothing, and what is read of it is zero.
            self.read_blocks(first, &mut blocks[..1])?;
            blocks[0][start..start + edge.len()].copy_from_slice(edge);
        }
        if !tail.is_empty() {
            if piece.end() == self.backing.geometry().size {
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
    /// An error where a checkpoint must come first: the log is full, or the newest superblock says that no record follows it. A request
    /// may meet that one even after it made room: a `close` overtook it, and heard no answer.
    pub(super) fn room_in_log(&self) -> Result<(), VolumeError> {
        let room = self.log.free() >= LOG_ROOM && !self.superblock.clean;
        if room { Ok(()) } else { Err(VolumeError::Full(None)) }
    }

    /// Places and generations for `count` blocks that are about to be written, those of `parts`.
    fn grant(&mut self, parts: &[Part], count: u64, from: &Backing) -> Result<Granted, Halt> {
        self.writable()?;
        self.room_in_log()?;
        self.key_for(count)?;
        let mut old = Vec::with_capacity(parts.len());
        for part in parts {
            // What the map has must be readable before it is replaced.
            for id in part.leaves() {
                self.forest.peek(id)?;
            }
            old.push(self.block_of(part.blocks.start)?);
        }
        let mut runs = Vec::with_capacity(parts.len());
        if let Err(halt) = self.place(parts, &old, &mut runs, from) {
            self.space.unreserve(runs.into_iter().flatten());
            return Err(halt);
        }
        let generation = self.next_generation();
        // Counted before anything is sealed: a generation is never used twice, whatever fails.
        self.generations += count;
        self.written += count;
        self.warn_of_limit(from);
        self.log.promise(count);
        Ok(Granted { runs, generation })
    }

    /// Reserves a place for each block, in order; what was reserved is in `runs`, also after an error. `old` says where each part's first
    /// block lies so far. A new block lies behind the one before it in the volume, so that what is filled lies in order. One that is replaced
    /// can't lie where it was: it lies behind what is written with it, so that the store is asked once for many.
    fn place(
        &mut self,
        parts: &[Part],
        old: &[Option<u64>],
        runs: &mut Vec<Range<u64>>,
        from: &Backing,
    ) -> Result<(), Halt> {
        let mut before = None;
        for (part, old) in parts.iter().zip(old) {
            let first = part.blocks.start;
            let mut near = match runs.last() {
                Some(behind) if before == Some(first) || old.is_some() => behind.end,
                _ => self.neighbour(first, *old, from),
            };
            let mut left = part.count() as u64;
            while left > 0 {
                let run = self.space.reserve(near, left, &mut self.forest)?;
                (near, left) = (run.end, left - (run.end - run.start));
                match runs.last_mut() {
                    Some(last) if last.end == run.start => last.end = run.end,
                    _ => runs.push(run),
                }
            }
            before = Some(part.blocks.end);
        }
        Ok(())
    }

    /// The generation of the next block that is sealed: an open number seals under one key, whose limit comes long before its 2^40th.
    pub(super) fn next_generation(&self) -> u64 {
        (u64::from(self.superblock.writer.get()) << 40) | self.generations
    }

    /// An error where the key is used up.
    fn key_for(&self, count: u64) -> Result<(), VolumeError> {
        if self.written + count > Slot::LIMIT {
            return Err(VolumeError::KeyExhausted(self.superblock.key()));
        }
        Ok(())
    }

    /// The block of the store that holds the data of `lba`.
    fn block_of(&mut self, lba: u64) -> Result<Option<u64>, Halt> {
        let mut found = [Entry::UNMAPPED];
        self.lookup(lba, &mut found)?;
        Ok(found[0].data())
    }

    /// Where new data best goes: behind the block before it, or near where it is.
    fn neighbour(&mut self, first: u64, old: Option<u64>, from: &Backing) -> u64 {
        // What can't be found is another page's, which is not worth a read, and may be damaged.
        let before = first.checked_sub(1).and_then(|before| self.block_of(before).ok().flatten());
        let near = before.map(|b| b + 1).or(old).filter(|b| from.in_pool(*b));
        near.unwrap_or_else(|| {
            let (zone, pool) = (from.geometry().zone(), from.geometry().pool());
            zone.end + first.min(pool.end - zone.end - 1)
        })
    }

    /// Map and log learn of blocks that were written. Nothing is changed before all that is needed is in memory.
    fn publish(&mut self, parts: &[Part], granted: &Granted, new: &[Entry]) -> Result<(), Halt> {
        let old = &mut vec![Entry::UNMAPPED; new.len()][..];
        let mut rest = &mut *old;
        for part in parts {
            let (own, after) = rest.split_at_mut(part.count());
            for id in part.leaves() {
                self.forest.page(id)?;
            }
            self.lookup(part.blocks.start, own)?;
            rest = after;
        }
        let before = old.iter().filter_map(Entry::data).filter(|block| self.space.has(*block));
        let mut last = None;
        for block in granted.runs.iter().flat_map(|run| [run.start, run.end - 1]).chain(before) {
            let page = block / BITS as u64;
            // Neighbours have the same.
            if last.replace(page) != Some(page) {
                self.forest.page(bitmap(page))?;
            }
        }
        let lbas = parts.iter().flat_map(|part| part.blocks.clone());
        for (lba, (old, new)) in lbas.zip(old.iter().zip(new)) {
            self.release_data(lba, old, false)?;
            self.log.append(Record { lba, entry: *new });
        }
        for run in &granted.runs {
            self.space.take(run.clone(), &mut self.forest)?;
        }
        self.mapped += new.len() as u64;
        let mut rest = new;
        for part in parts {
            let (own, after) = rest.split_at(part.count());
            self.set_entries(part.blocks.start, own)?;
            rest = after;
        }
        self.log.redeem(new.len() as u64);
        Ok(())
    }

    /// The map's entry for `lba` becomes `new`, and the log hears of it.
    pub(super) fn enter(&mut self, lba: u64, new: Entry) -> Result<(), Halt> {
        self.set_entries(lba, &[new])?;
        self.log.append(Record { lba, entry: new });
        Ok(())
    }

    /// The map's entries for the blocks from `first` on become these.
    fn set_entries(&mut self, first: u64, new: &[Entry]) -> Result<(), Halt> {
        let mut done = 0;
        while done < new.len() {
            let (id, start) = leaf(first + done as u64);
            let page = self.forest.page_mut(id)?;
            let count = (ENTRIES - start).min(new.len() - done);
            for (i, entry) in new[done..done + count].iter().enumerate() {
                set_entry(page, start + i, *entry);
            }
            done += count;
        }
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

/// Encrypts the blocks of a group and writes them where they go; returns their entries.
fn seal_and_put(
    parts: &[Part],
    granted: &Granted,
    blocks: &mut [Block],
    from: &Backing,
) -> Result<Vec<Entry>, VolumeError> {
    let mut entries = Vec::with_capacity(blocks.len());
    let mut sources = parts.iter().flat_map(|part| part.blocks.clone().zip((0..).map(|i| part.plain.of(i))));
    let (mut generations, mut places) = (granted.generation.., granted.places());
    let mut lots = blocks.chunks_mut(from.lot(blocks.len()));
    from.write_lots(|| {
        let Some(blocks) = lots.next() else { return Ok(None) };
        let done = entries.len();
        from.with_keys(|_, key| {
            let mut batch = Vec::with_capacity(blocks.len());
            let numbered = blocks.iter_mut().zip(generations.by_ref()).zip(sources.by_ref());
            let seal = |((block, generation), (lba, plain))| Seal { lba, generation, plain, block, tag: [0; MAC] };
            batch.extend(numbered.map(seal));
            key.seal_blocks(&mut batch);
            let entry = |(seal, physical): (&Seal, u64)| Entry {
                physical,
                generation: seal.generation,
                key: key.id,
                tag: seal.tag,
            };
            entries.extend(batch.iter().zip(places.by_ref()).map(entry));
            Ok(())
        })?;
        let (mut runs, mut rest) = (Vec::new(), &*blocks);
        for run in entries[done..].chunk_by(|a: &Entry, b| a.physical + 1 == b.physical) {
            let (own, after) = rest.split_at(run.len());
            runs.push((run[0].physical * BLOCK as u64, own.as_flattened()));
            rest = after;
        }
        Ok(Some(runs))
    })?;
    Ok(entries)
}
