//! One pass over a file: every byte is shown to whoever hashes it, and those that belong somewhere go there.

use super::{BootError, IMAGE_MAX};
use crate::machine::memory::GuestRam;
use std::fs::File;
use std::os::unix::fs::FileExt;
use vm_memory::{Bytes, GuestAddress};

/// As much of a file's beginning as headers may lie in.
pub(super) const HEAD_MAX: usize = 64 << 10;

/// A part of the file and where in the guest it goes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Piece {
    /// Offset in the file.
    pub(super) from: u64,
    /// Bytes.
    pub(super) length: u64,
    /// Guest address.
    pub(super) to: u64,
}

impl Piece {
    /// Whether guest address `at` is one that this piece fills.
    pub(super) fn holds(&self, at: u64) -> bool {
        at.checked_sub(self.to).is_some_and(|offset| offset < self.length)
    }
}

/// A file that is being read.
pub(super) struct Feed<'a> {
    what: &'static str,
    file: &'a File,
    length: u64,
    buffer: Box<[u8]>,
    /// How much of the buffer holds the file's beginning.
    filled: usize,
}

impl<'a> Feed<'a> {
    pub(super) fn open(what: &'static str, file: &'a File) -> Result<Self, BootError> {
        let length = file.metadata().map_err(|source| BootError::Read { what, source })?.len();
        if length > IMAGE_MAX {
            return Err(BootError::Huge { what });
        }
        Ok(Self { what, file, length, buffer: vec![0; HEAD_MAX].into(), filled: 0 })
    }

    /// Its length when it was opened; a file that turns out shorter is an error, what is beyond is not read.
    pub(super) fn length(&self) -> u64 {
        self.length
    }

    /// Up to `count` bytes of its beginning. They are poured from the same buffer later.
    pub(super) fn head(&mut self, count: usize) -> Result<&[u8], BootError> {
        let count = count.min(self.buffer.len()).min(usize::try_from(self.length).unwrap_or(usize::MAX));
        self.fill(0, count)?;
        self.filled = count;
        Ok(&self.buffer[..count])
    }

    /// Copies `pieces` into the guest and gives back the parts called `notes` (offset, length). `see` gets each byte of the file
    /// once and in order, also those that go nowhere: the very bytes that are copied.
    pub(super) fn pour(
        mut self,
        pieces: &[Piece],
        notes: &[(u64, usize)],
        ram: &GuestRam,
        mut see: impl FnMut(&[u8]),
    ) -> Result<Vec<Vec<u8>>, BootError> {
        let parts = pieces.iter().map(|p| (p.from, p.length)).chain(notes.iter().map(|n| (n.0, n.1 as u64)));
        let inside = |(from, length): (u64, u64)| from.checked_add(length).is_some_and(|end| end <= self.length);
        if !parts.into_iter().all(inside) {
            return Err(BootError::Short);
        }
        let mut kept: Vec<_> = notes.iter().map(|(_, length)| vec![0; *length]).collect();
        let mut at = 0;
        while at < self.length {
            let size = HEAD_MAX.min(usize::try_from(self.length - at).unwrap_or(usize::MAX));
            if at > 0 || self.filled < size {
                self.fill(at, size)?;
            }
            let chunk = &self.buffer[..size];
            see(chunk);
            for piece in pieces {
                if let Some((skip, part)) = overlap(at, chunk, piece.from, piece.length) {
                    ram.write_slice(part, GuestAddress(piece.to + skip))
                        .map_err(|_| BootError::Memory { what: self.what, memory: piece.to })?;
                }
            }
            for (kept, (from, length)) in kept.iter_mut().zip(notes) {
                if let Some((skip, part)) = overlap(at, chunk, *from, *length as u64) {
                    kept[skip as usize..skip as usize + part.len()].copy_from_slice(part);
                }
            }
            at += size as u64;
        }
        Ok(kept)
    }

    fn fill(&mut self, at: u64, count: usize) -> Result<(), BootError> {
        let what = self.what;
        self.file.read_exact_at(&mut self.buffer[..count], at).map_err(|source| BootError::Read { what, source })
    }
}

/// The part of `chunk` (which lies at `at`) that falls into `length` bytes at `from`, and its offset from `from`.
fn overlap(at: u64, chunk: &[u8], from: u64, length: u64) -> Option<(u64, &[u8])> {
    let start = from.max(at);
    let end = from.saturating_add(length).min(at + chunk.len() as u64);
    (start < end).then(|| (start - from, &chunk[(start - at) as usize..(end - at) as usize]))
}
