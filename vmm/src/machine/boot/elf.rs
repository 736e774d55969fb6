//! ELF kernels: which segments go where, and the PVH note. Every number comes from outside and is checked here.

use super::feed::{HEAD_MAX, Piece};
use super::{BootError, Kernel, Plan};
use crate::machine::layout::{COMMAND_LINE_MAX, HOLE, KERNEL};
use crate::machine::vcpu::Entry;

pub(super) const MAGIC: [u8; 4] = *b"\x7fELF";
const CLASS_64_LITTLE: [u8; 3] = [2, 1, 1];
const TYPE_EXECUTABLE: u16 = 2;
const TYPE_DYNAMIC: u16 = 3;
const MACHINE_X86_64: u16 = 62;
const SEGMENT_LOAD: u32 = 1;
const SEGMENT_NOTE: u32 = 4;
const HEADER_SIZE: usize = 64;
const SEGMENT_SIZE: usize = 56;
const SEGMENTS_MAX: usize = 64;
const NOTES_MAX: u64 = 64 << 10;
const PVH_NOTE: u32 = 18;
const PVH_NAME: &[u8] = b"Xen\0";

/// What is wrong with an ELF kernel.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum ElfError {
    /// Class, byte order, version, type or machine.
    #[error("it is no 64-bit x86 executable")]
    Kind,
    /// Program headers missing, too many, or too far into the file.
    #[error("its program headers do not lie in its first {} KiB, or there are none or more than {}", HEAD_MAX >> 10, SEGMENTS_MAX)]
    Headers,
    /// A segment that is larger in the file than in memory, or that wraps.
    #[error("segment {0} makes no sense")]
    Segment(usize),
    /// A segment where firmware tables lie, or beyond the end of memory.
    #[error("segment {index} lies at {address:#x}, outside of the guest's memory from {KERNEL:#x} to {end:#x}")]
    Place {
        /// Which.
        index: usize,
        /// Where it wants to lie.
        address: u64,
        /// Where memory ends.
        end: u64,
    },
    /// Two segments in one place.
    #[error("segment {0} overlaps another")]
    Overlap(usize),
    /// An entry that is not loaded.
    #[error("its entry {0:#x} lies in no loaded segment")]
    Entry(u64),
    /// Notes that are too large or cut off.
    #[error("its notes are damaged")]
    Notes,
}

struct Segment {
    kind: u32,
    from: u64,
    to: u64,
    file_size: u64,
    memory_size: u64,
}

/// Where the segments of the file that begins with `head` go, in a guest whose low memory ends at `low_end`.
pub(super) fn plan(head: &[u8], low_end: u64) -> Result<Plan, BootError> {
    let header: &[u8; HEADER_SIZE] = head.first_chunk().ok_or(ElfError::Kind)?;
    let kind = u16_at(header, 16);
    let right_kind = header[..4] == MAGIC
        && header[4..7] == CLASS_64_LITTLE
        && (kind == TYPE_EXECUTABLE || kind == TYPE_DYNAMIC)
        && u16_at(header, 18) == MACHINE_X86_64;
    if !right_kind {
        return Err(ElfError::Kind.into());
    }
    let segments = segments(head, header)?;
    let mut pieces: Vec<(Piece, u64)> = vec![];
    for (index, segment) in segments.iter().enumerate().filter(|(_, s)| s.kind == SEGMENT_LOAD && s.memory_size > 0) {
        let end = place(index, segment, low_end)?;
        if pieces.iter().any(|(other, other_end)| segment.to < *other_end && other.to < end) {
            return Err(ElfError::Overlap(index).into());
        }
        pieces.push((Piece { from: segment.from, length: segment.file_size, to: segment.to }, end));
    }
    let end = pieces.iter().map(|(_, end)| *end).max().unwrap_or(KERNEL);
    let pieces: Vec<Piece> = pieces.into_iter().map(|(piece, _)| piece).collect();
    let entry = u64_at(header, 24);
    if !pieces.iter().any(|piece| piece.holds(entry)) {
        return Err(ElfError::Entry(entry).into());
    }
    let notes = notes(&segments)?;
    let kernel =
        Kernel { entry: Entry::Linux64(entry), end, initrd_max: HOLE - 1, cmdline_max: COMMAND_LINE_MAX, setup: None };
    Ok(Plan { pieces, notes, kernel })
}

/// The PVH entry in the content of a note segment, if there is one (Xen's `elfnote.h`, XEN_ELFNOTE_PHYS32_ENTRY).
pub(super) fn pvh_entry(mut notes: &[u8]) -> Result<Option<u32>, ElfError> {
    while !notes.is_empty() {
        let header: &[u8; 12] = notes.first_chunk().ok_or(ElfError::Notes)?;
        let (name_size, size) = (u32_at(header, 0) as usize, u32_at(header, 4) as usize);
        let name = notes.get(12..).and_then(|rest| rest.get(..name_size)).ok_or(ElfError::Notes)?;
        let body = 12 + name_size.next_multiple_of(4);
        let content = notes.get(body..).and_then(|rest| rest.get(..size)).ok_or(ElfError::Notes)?;
        if name == PVH_NAME && u32_at(header, 8) == PVH_NOTE {
            // Linux writes four or eight bytes; the address has 32 bits either way.
            let (low, high) = content.split_first_chunk().ok_or(ElfError::Notes)?;
            let fits = high.iter().all(|byte| *byte == 0);
            return if fits { Ok(Some(u32::from_le_bytes(*low))) } else { Err(ElfError::Notes) };
        }
        notes = notes.get(body + size.next_multiple_of(4)..).unwrap_or_default();
    }
    Ok(None)
}

fn segments(head: &[u8], header: &[u8; HEADER_SIZE]) -> Result<Vec<Segment>, ElfError> {
    let (at, size, count) = (u64_at(header, 32), u16_at(header, 54), u16_at(header, 56));
    if usize::from(size) != SEGMENT_SIZE || !(1..=SEGMENTS_MAX).contains(&usize::from(count)) {
        return Err(ElfError::Headers);
    }
    let table = usize::try_from(at).ok().and_then(|at| head.get(at..)).ok_or(ElfError::Headers)?;
    let table = table.get(..SEGMENT_SIZE * usize::from(count)).ok_or(ElfError::Headers)?;
    let segment = |entry: &[u8]| Segment {
        kind: u32_at(entry, 0),
        from: u64_at(entry, 8),
        to: u64_at(entry, 24),
        file_size: u64_at(entry, 32),
        memory_size: u64_at(entry, 40),
    };
    Ok(table.chunks_exact(SEGMENT_SIZE).map(segment).collect())
}

/// The end of a segment that lies where a kernel may.
fn place(index: usize, segment: &Segment, low_end: u64) -> Result<u64, ElfError> {
    let wraps = segment.from.checked_add(segment.file_size).is_none();
    if segment.file_size > segment.memory_size || wraps {
        return Err(ElfError::Segment(index));
    }
    let end = segment.to.checked_add(segment.memory_size);
    match end {
        Some(end) if segment.to >= KERNEL && end <= low_end => Ok(end),
        _ => Err(ElfError::Place { index, address: segment.to, end: low_end }),
    }
}

/// The note segments: kernels have one, other linkers make several.
fn notes(segments: &[Segment]) -> Result<Vec<(u64, usize)>, ElfError> {
    let notes = segments.iter().filter(|s| s.kind == SEGMENT_NOTE);
    let total = notes.clone().try_fold(0, |total: u64, s| total.checked_add(s.file_size));
    total.filter(|total| *total <= NOTES_MAX).ok_or(ElfError::Notes)?;
    Ok(notes.map(|s| (s.from, s.file_size as usize)).collect())
}

// The callers' slices are of fixed size, larger than any of these offsets.

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from(u16_at(bytes, at)) | u32::from(u16_at(bytes, at + 2)) << 16
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from(u32_at(bytes, at)) | u64::from(u32_at(bytes, at + 4)) << 32
}
