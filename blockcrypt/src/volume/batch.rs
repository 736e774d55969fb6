//! Requests that come together: cut into pieces, and gathered into groups that are worked on as one.

use crate::format::BLOCK;
use std::ops::{Deref, Range};

/// Neighbouring blocks that are written at once, at most: 256 KiB.
pub(super) const CHUNK: u64 = 64;
/// Blocks that are read at once, at most: 1 MiB, for a disk takes little longer for that than for a part. As many are written at once where
/// the store writes while the next ones are sealed; elsewhere a [`CHUNK`], which the processor's cache holds until the store has copied
/// it.
pub(super) const LARGE: u64 = 256;
/// Pieces handled at once: twice as many as there are lanes to hash in. They need a few hundred pages of the map at most.
const PIECES: usize = 32;

/// A part of a request: neighbouring blocks, whole or in part.
pub(super) struct Piece<D> {
    /// The request's number.
    pub(super) request: usize,
    /// Where it begins, in bytes of the volume.
    pub(super) offset: u64,
    pub(super) data: D,
}

impl<D: Deref<Target = [u8]>> Piece<D> {
    pub(super) fn blocks(&self) -> Range<u64> {
        self.offset / BLOCK as u64..self.end().div_ceil(BLOCK as u64)
    }

    pub(super) fn count(&self) -> usize {
        let blocks = self.blocks();
        (blocks.end - blocks.start) as usize
    }

    pub(super) fn end(&self) -> u64 {
        self.offset + self.data.len() as u64
    }
}

/// Bytes before `offset` in its block, and as many of `length` bytes from there on as fill that block up; none where it begins there.
pub(super) fn lead(offset: u64, length: usize) -> (usize, usize) {
    let lead = (offset % BLOCK as u64) as usize;
    (lead, if lead > 0 { length.min(BLOCK - lead) } else { 0 })
}

/// Cuts a request at multiples of `chunk` blocks: where each piece begins, and its bytes.
pub(super) fn cut(offset: u64, length: usize, chunk: u64) -> impl Iterator<Item = (u64, usize)> {
    let size = chunk * BLOCK as u64;
    let end = offset + length as u64;
    let mut at = offset;
    std::iter::from_fn(move || {
        let start = at;
        at = end.min((start / size + 1) * size);
        (start < end).then(|| (start, (at - start) as usize))
    })
}

/// Pieces that are worked on together: so many blocks at most, none of them twice.
pub(super) struct Group<D> {
    pieces: Vec<Piece<D>>,
    blocks: u64,
    most: u64,
}

impl<D: Deref<Target = [u8]>> Group<D> {
    /// For pieces of `requests` requests, `most` blocks at a time.
    pub(super) fn new(requests: usize, most: u64) -> Self {
        Self { pieces: Vec::with_capacity(requests.min(PIECES)), blocks: 0, most }
    }

    /// Adds a piece. Where there is no room for it, `f` is given those before it first.
    pub(super) fn add(&mut self, piece: Piece<D>, f: impl FnOnce(&mut Vec<Piece<D>>)) {
        let (blocks, count) = (piece.blocks(), piece.count() as u64);
        let meets = |other: &Piece<D>| {
            let other = other.blocks();
            blocks.start < other.end && other.start < blocks.end
        };
        if self.pieces.len() >= PIECES || self.blocks + count > self.most || self.pieces.iter().any(meets) {
            self.end(f);
        }
        self.blocks += count;
        self.pieces.push(piece);
    }

    /// Gives `f` what there is.
    pub(super) fn end(&mut self, f: impl FnOnce(&mut Vec<Piece<D>>)) {
        if !self.pieces.is_empty() {
            f(&mut self.pieces);
        }
        self.pieces.clear();
        self.blocks = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// Groups hold all bytes of all requests, in order, and are no larger than they may be.
        #[test]
        fn groups_hold_every_byte_once_and_no_block_twice(
            asked in prop::collection::vec((0_u64..1500, prop_oneof![1_usize..9, 1_usize..1200]), 1..80)
        ) {
            let bytes = vec![0; 1200 * 512];
            let (mut group, mut groups) = (Group::new(asked.len(), CHUNK), Vec::new());
            for (request, (sector, sectors)) in asked.iter().enumerate() {
                let (mut rest, from) = (&bytes[..sectors * 512], sector * 512);
                for (offset, length) in cut(from, rest.len(), CHUNK) {
                    let (data, after) = rest.split_at(length);
                    rest = after;
                    group.add(Piece { request, offset, data }, |pieces| groups.push(std::mem::take(pieces)));
                }
                prop_assert!(rest.is_empty());
            }
            group.end(|pieces| groups.push(std::mem::take(pieces)));
            let mut got: Vec<(u64, u64)> = asked.iter().map(|(sector, _)| (sector * 512, sector * 512)).collect();
            for pieces in &groups {
                let mut blocks: Vec<u64> = pieces.iter().flat_map(Piece::blocks).collect();
                prop_assert!(blocks.len() <= CHUNK as usize && pieces.len() <= PIECES);
                blocks.sort_unstable();
                prop_assert!(blocks.windows(2).all(|pair| pair[0] < pair[1]));
                for piece in pieces {
                    prop_assert_eq!(got[piece.request].1, piece.offset);
                    got[piece.request].1 = piece.end();
                }
            }
            for ((sector, sectors), (_, end)) in asked.iter().zip(got) {
                prop_assert_eq!(end, sector * 512 + *sectors as u64 * 512);
            }
        }
    }
}
