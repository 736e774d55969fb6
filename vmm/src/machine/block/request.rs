//! One request of the guest, from its buffers to its status (virtio 1.3, 5.2.6).

use super::counters::Tally;
use super::disk::{Disk, DiskError};
use crate::machine::memory::GuestRam;
use crate::machine::virtio::Chain;

/// The guest's sectors.
pub(super) const SECTOR: u64 = 512;
/// Requests are served in pieces of this many bytes, so that no guest can make the buffer larger.
pub(super) const PIECE: usize = 256 << 10;

const HEADER: u64 = 16;
const TYPE_IN: u32 = 0;
const TYPE_OUT: u32 = 1;
const TYPE_FLUSH: u32 = 4;
const TYPE_GET_ID: u32 = 8;
const STATUS_OK: u8 = 0;
const STATUS_IOERR: u8 = 1;
const STATUS_UNSUPPORTED: u8 = 2;

/// What the guest wants.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Command {
    Read { offset: u64, length: u64 },
    Write { offset: u64, length: u64 },
    Flush,
    GetId { length: u64 },
    Unsupported,
    Senseless,
}

/// How a request ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Outcome {
    /// The status is written; this many bytes in all.
    Done(u32),
    /// Nothing is written, because there are no keys: it must stay in the queue.
    Parked,
    /// There is no header, or no room for a status: the driver is broken.
    Malformed,
}

/// Serves requests of one disk with one buffer.
pub(super) struct Server<'a> {
    pub(super) disk: &'a dyn Disk,
    pub(super) read_only: bool,
    pub(super) tally: &'a Tally,
    /// Asked before each piece.
    pub(super) may_submit: &'a dyn Fn() -> bool,
}

impl Server<'_> {
    /// Serves the request in `chain`.
    pub(super) fn serve(&self, chain: &Chain, memory: &GuestRam, buffer: &mut Vec<u8>) -> Outcome {
        let mut header = [0; HEADER as usize];
        let Some(status_at) = chain.writable_length().checked_sub(1) else { return Outcome::Malformed };
        if !chain.copy_in(memory, 0, &mut header) {
            return Outcome::Malformed;
        }
        let command = self.parse(&header, chain.readable_length() - HEADER, status_at);
        let status = match self.execute(command, chain, memory, buffer) {
            Ok(()) => STATUS_OK,
            Err(Failure::NoKeys) => return Outcome::Parked,
            Err(Failure::Unsupported) => STATUS_UNSUPPORTED,
            Err(Failure::Io) => STATUS_IOERR,
        };
        if status != STATUS_OK {
            Tally::add(&self.tally.errors, 1);
        }
        if !chain.copy_out(memory, status_at, &[status]) {
            return Outcome::Malformed;
        }
        Outcome::Done(u32::try_from(status_at + 1).unwrap_or(u32::MAX))
    }

    /// `out` bytes came with the header, `room` bytes can be returned before the status.
    fn parse(&self, header: &[u8; HEADER as usize], out: u64, room: u64) -> Command {
        let [t0, t1, t2, t3, _, _, _, _, sector @ ..] = *header;
        let sector = u64::from_le_bytes(sector);
        match u32::from_le_bytes([t0, t1, t2, t3]) {
            TYPE_IN => {
                self.locate(sector, room).map_or(Command::Senseless, |offset| Command::Read { offset, length: room })
            }
            TYPE_OUT if self.read_only => Command::Senseless,
            TYPE_OUT => {
                self.locate(sector, out).map_or(Command::Senseless, |offset| Command::Write { offset, length: out })
            }
            TYPE_FLUSH => Command::Flush,
            TYPE_GET_ID => Command::GetId { length: room },
            _ => Command::Unsupported,
        }
    }

    /// The byte offset of whole sectors inside the disk.
    fn locate(&self, sector: u64, length: u64) -> Option<u64> {
        let end = self.disk.size() / SECTOR * SECTOR;
        let offset = sector.checked_mul(SECTOR)?;
        let inside = offset.checked_add(length).is_some_and(|to| to <= end);
        (inside && length.is_multiple_of(SECTOR)).then_some(offset)
    }

    fn execute(&self, command: Command, chain: &Chain, memory: &GuestRam, buffer: &mut Vec<u8>) -> Result<(), Failure> {
        match command {
            Command::Read { offset, length } => {
                for (at, size) in pieces(length) {
                    let piece = room(buffer, size);
                    self.gate()?;
                    self.disk.read(offset + at, piece)?;
                    chain.copy_out(memory, at, piece).then_some(()).ok_or(Failure::Io)?;
                }
                Tally::add(&self.tally.reads, 1);
                Tally::add(&self.tally.read_bytes, length);
            }
            Command::Write { offset, length } => {
                for (at, size) in pieces(length) {
                    let piece = room(buffer, size);
                    chain.copy_in(memory, HEADER + at, piece).then_some(()).ok_or(Failure::Io)?;
                    self.gate()?;
                    self.disk.write(offset + at, piece)?;
                }
                Tally::add(&self.tally.writes, 1);
                Tally::add(&self.tally.written_bytes, length);
            }
            Command::Flush => {
                self.gate()?;
                self.disk.flush()?;
                Tally::add(&self.tally.flushes, 1);
            }
            Command::GetId { length } => {
                let id = self.disk.id();
                let length = usize::try_from(length).unwrap_or(usize::MAX).min(id.len());
                chain.copy_out(memory, 0, &id[..length]).then_some(()).ok_or(Failure::Io)?;
            }
            Command::Unsupported => return Err(Failure::Unsupported),
            Command::Senseless => return Err(Failure::Io),
        }
        Ok(())
    }

    fn gate(&self) -> Result<(), Failure> {
        (self.may_submit)().then_some(()).ok_or(Failure::NoKeys)
    }
}

enum Failure {
    NoKeys,
    Unsupported,
    Io,
}

impl From<DiskError> for Failure {
    fn from(error: DiskError) -> Self {
        match error {
            DiskError::NoKeys => Self::NoKeys,
            DiskError::Io(_) => Self::Io,
        }
    }
}

/// `length` bytes as (start, size) of its pieces.
fn pieces(length: u64) -> impl Iterator<Item = (u64, usize)> {
    (0..length).step_by(PIECE).map(move |at| (at, (length - at).min(PIECE as u64) as usize))
}

/// `size` bytes of the buffer, which grows to what a guest's requests need and no further than [`PIECE`].
fn room(buffer: &mut Vec<u8>, size: usize) -> &mut [u8] {
    if buffer.len() < size {
        buffer.resize(size, 0);
    }
    &mut buffer[..size]
}

#[cfg(test)]
#[path = "request_tests.rs"]
mod tests;
