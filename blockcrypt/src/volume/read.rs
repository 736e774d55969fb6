//! Reads. Blocks are looked up under the lock; the rest is done without it: a block that was reused meanwhile fails its tag and is
//! looked up again.

use super::batch::{Group, LARGE, Piece, cut, lead};
use super::shared::Shared;
use crate::VolumeError;
use crate::format::page::Entry;
use crate::format::{BLOCK, Block, zero_block};
use crate::keys::Open;
use std::ops::Range;

/// How a request went.
pub(super) type Done = Result<(), VolumeError>;

/// Neighbouring blocks that are read whole.
struct Span<'a> {
    request: usize,
    first: u64,
    blocks: &'a mut [Block],
}

/// A block of which a request wants a part.
struct Edge<'a> {
    request: usize,
    lba: u64,
    start: usize,
    part: &'a mut [u8],
    block: Box<Block>,
}

impl Shared {
    pub(super) fn check_request(&self, offset: u64, length: u64) -> Done {
        self.ready()?;
        let size = self.backing.geometry().size;
        let inside = offset.checked_add(length).is_some_and(|end| end <= size);
        if !inside || !offset.is_multiple_of(512) || !length.is_multiple_of(512) {
            return Err(VolumeError::Request { offset, length });
        }
        Ok(())
    }

    pub(super) fn read_many(&self, requests: &mut [(u64, &mut [u8])]) -> Vec<Done> {
        let check = |(offset, buffer): &(u64, &mut [u8])| self.check_request(*offset, buffer.len() as u64);
        let mut done: Vec<Done> = requests.iter().map(check).collect();
        let mut group = Group::new(requests.len(), LARGE);
        for (request, (offset, buffer)) in requests.iter_mut().enumerate() {
            if done[request].is_err() {
                continue;
            }
            let mut rest = &mut **buffer;
            for (offset, length) in cut(*offset, rest.len(), LARGE) {
                let (data, after) = rest.split_at_mut(length);
                rest = after;
                group.add(Piece { request, offset, data }, |pieces| self.read_group(pieces, &mut done));
            }
        }
        group.end(|pieces| self.read_group(pieces, &mut done));
        for ((_, buffer), _) in requests.iter_mut().zip(&done).filter(|(_, done)| done.is_err()) {
            buffer.fill(0);
        }
        done
    }

    /// Whole blocks are read where they are wanted, those that are cut by a request's edges beside.
    fn read_group(&self, pieces: &mut Vec<Piece<&mut [u8]>>, done: &mut [Done]) {
        let (mut spans, mut edges) = (Vec::with_capacity(pieces.len()), Vec::new());
        for Piece { request, offset, data } in pieces.drain(..).filter(|piece| done[piece.request].is_ok()) {
            let (start, filled) = lead(offset, data.len());
            let (part, rest) = data.split_at_mut(filled);
            let (blocks, tail) = rest.as_chunks_mut();
            let mut first = offset / BLOCK as u64;
            if !part.is_empty() {
                edges.push(Edge { request, lba: first, start, part, block: zero_block() });
                first += 1;
            }
            if !tail.is_empty() {
                let lba = first + blocks.len() as u64;
                edges.push(Edge { request, lba, start: 0, part: tail, block: zero_block() });
            }
            if !blocks.is_empty() {
                spans.push(Span { request, first, blocks });
            }
        }
        for Edge { request, lba, block, .. } in &mut edges {
            spans.push(Span { request: *request, first: *lba, blocks: std::slice::from_mut(block) });
        }
        self.read_spans(&mut spans, done);
        for Edge { start, part, block, .. } in edges {
            part.copy_from_slice(&block[start..start + part.len()]);
        }
    }

    /// Reads spans together; each alone, where one of them can't be.
    fn read_spans(&self, spans: &mut [Span], done: &mut [Done]) {
        let Err(error) = self.try_spans(spans, done) else { return };
        match spans {
            [span] => done[span.request] = Err(error),
            several => several.iter_mut().for_each(|span| self.read_spans(std::slice::from_mut(span), done)),
        }
    }

    /// Reads spans of [`LARGE`] blocks at most, in all. A block that is bad is its request's matter.
    fn try_spans(&self, spans: &mut [Span], done: &mut [Done]) -> Result<(), VolumeError> {
        let entries = &mut vec![Entry::UNMAPPED; spans.iter().map(|span| span.blocks.len()).sum()][..];
        self.with_core(|core| {
            let mut rest = &mut *entries;
            for span in &*spans {
                let (own, after) = rest.split_at_mut(span.blocks.len());
                core.lookup(span.first, own)?;
                rest = after;
            }
            Ok(())
        })?;
        for mut at in self.fetch_and_open(entries, spans)? {
            let entry = entries[at];
            for span in &mut *spans {
                let Some(block) = span.blocks.get_mut(at) else {
                    at -= span.blocks.len();
                    continue;
                };
                if done[span.request].is_ok() {
                    done[span.request] = self.read_again(span.first + at as u64, entry, block);
                }
                break;
            }
        }
        Ok(())
    }

    /// Reads blocks from the store, neighbours as one, and opens them by lots; returns the numbers of those that do not verify.
    fn fetch_and_open(&self, entries: &[Entry], spans: &mut [Span]) -> Result<Vec<usize>, VolumeError> {
        let (pool, lot) = (self.backing.geometry().pool(), self.backing.lot(entries.len()));
        let mut found = Found::default();
        let mut rest = entries;
        for span in &mut *spans {
            let (own, after) = rest.split_at(span.blocks.len());
            found.add(entries.len() - rest.len(), own, span, &pool, lot);
            rest = after;
        }
        found.end();
        let Found { mut runs, of, ends, mut bad, .. } = found;
        if runs.is_empty() {
            return Ok(bad);
        }
        let mut of = &of[..];
        self.backing.read_lots(&mut runs, &ends, |runs| {
            let (own, after) = of.split_at(runs.len());
            of = after;
            self.backing.with_keys(|ring, _| {
                let blocks = runs.iter_mut().flat_map(|(_, run)| run.as_chunks_mut().0);
                let numbers = own.iter().flat_map(|(numbers, lba)| numbers.clone().zip(*lba..));
                let mut batch: Vec<Open> = Vec::with_capacity(lot);
                batch.extend(numbers.clone().zip(blocks).map(|((i, lba), block)| Open {
                    lba,
                    entry: &entries[i],
                    block,
                    good: false,
                }));
                if !ring.open_blocks(&mut batch) {
                    bad.extend(numbers.zip(&batch).filter(|(_, open)| !open.good).map(|((i, _), _)| i));
                }
                Ok(())
            })
        })?;
        Ok(bad)
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
            let mut span = Span { request: 0, first: lba, blocks: std::slice::from_mut(block) };
            if self.fetch_and_open(&now, std::slice::from_mut(&mut span))?.is_empty() {
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

    /// The plain text of at most [`LARGE`] neighbouring blocks. After [`VolumeError::Integrity`] those before the bad one hold theirs.
    pub(super) fn read_blocks(&self, first: u64, blocks: &mut [Block]) -> Result<(), VolumeError> {
        let mut done = [Ok(())];
        self.read_spans(&mut [Span { request: 0, first, blocks }], &mut done);
        let [done] = done;
        done
    }
}

/// What is to be read from the store.
#[derive(Default)]
struct Found<'a> {
    /// From which offset, and where to: neighbours in the store as one, but for the end of a lot.
    runs: Vec<(u64, &'a mut [u8])>,
    /// Of each run, the numbers of its blocks, and the first one's LBA.
    of: Vec<(Range<usize>, u64)>,
    /// Before which runs lots end.
    ends: Vec<usize>,
    /// Blocks of the lot that has not ended.
    filled: usize,
    /// Blocks that can't be read: they lie nowhere, or nowhere where data may lie.
    bad: Vec<usize>,
}

impl<'a> Found<'a> {
    /// Adds a span, whose first block has number `at`; what is not mapped is zero. Lots have so many blocks at most.
    fn add(&mut self, mut at: usize, mut entries: &[Entry], span: &'a mut Span, pool: &Range<u64>, lot: usize) {
        let (mut lba, mut blocks) = (span.first, &mut *span.blocks);
        while !entries.is_empty() {
            let run = run_length(entries).min(lot - self.filled);
            let (part, rest) = blocks.split_at_mut(run);
            let numbers = at..at + run;
            match entries[0].data() {
                Some(first) if pool.contains(&first) && pool.contains(&(first + run as u64 - 1)) => {
                    self.runs.push((first * BLOCK as u64, part.as_flattened_mut()));
                    self.of.push((numbers, lba));
                    self.filled += run;
                    if self.filled == lot {
                        self.end();
                    }
                }
                _ => {
                    part.as_flattened_mut().fill(0);
                    let mapped = entries[0].physical != 0;
                    self.bad.extend(numbers.filter(|_| mapped));
                }
            }
            (entries, blocks, lba, at) = (&entries[run..], rest, lba + run as u64, at + run);
        }
    }

    /// A lot ends here.
    fn end(&mut self) {
        if self.filled > 0 {
            self.ends.push(self.runs.len());
        }
        self.filled = 0;
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
