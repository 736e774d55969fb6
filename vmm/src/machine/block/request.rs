//! One request of the guest, from its buffers to its status (virtio 1.3, 5.2.6): what is asked, the same for every engine, and
//! the answer. [`Server`] is the engine that does one thing after the other.

use super::counters::Tally;
use super::disk::{Disk, DiskError};
use crate::machine::memory::GuestRam;
use crate::machine::virtio::Chain;

/// The guest's sectors.
pub(super) const SECTOR: u64 = 512;
/// Requests are copied in pieces of this many bytes, and those that are served together have no more, so that no guest can make the
/// buffer larger.
pub(super) const PIECE: usize = 256 << 10;
/// Ranges in one request to discard or to zero.
pub(super) const EXTENTS_MAX: u32 = 32;
/// Sectors in each of them: 1 GiB.
pub(super) const EXTENT_SECTORS_MAX: u32 = 1 << 21;

const HEADER: u64 = 16;
const EXTENT: u64 = 16;
const TYPE_IN: u32 = 0;
const TYPE_OUT: u32 = 1;
const TYPE_FLUSH: u32 = 4;
const TYPE_GET_ID: u32 = 8;
const TYPE_DISCARD: u32 = 11;
const TYPE_WRITE_ZEROES: u32 = 13;
const FLAG_UNMAP: u32 = 1;
pub(super) const STATUS_OK: u8 = 0;
pub(super) const STATUS_IOERR: u8 = 1;
pub(super) const STATUS_UNSUPPORTED: u8 = 2;

/// What requests are judged by.
#[derive(Clone, Copy, Debug)]
pub(super) struct Facts {
    /// Bytes that the guest sees: whole sectors.
    pub(super) size: u64,
    pub(super) read_only: bool,
    /// Whether DISCARD and WRITE_ZEROES were offered.
    pub(super) can_discard: bool,
    pub(super) id: [u8; 20],
}

/// A request, inside the disk's bounds.
#[derive(PartialEq, Eq, Debug)]
pub(super) struct Request {
    pub(super) command: Command,
    /// Where the status goes: the last byte of what the device may write.
    status_at: u64,
}

/// What the guest wants.
#[derive(PartialEq, Eq, Debug)]
pub(super) enum Command {
    Read {
        offset: u64,
        length: u64,
    },
    Write {
        offset: u64,
        length: u64,
    },
    Flush,
    /// The content is of no use any more.
    Discard(Vec<Extent>),
    /// From now on this reads as zeroes.
    WriteZeroes(Vec<Extent>),
    GetId,
    /// Nothing that is done: its status.
    Refuse(u8),
}

/// A range of bytes, whole sectors inside the disk.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Extent {
    pub(super) offset: u64,
    pub(super) length: u64,
    /// Whether zeroes may become a hole.
    pub(super) unmap: bool,
}

impl Request {
    /// What `chain` asks for. None where there is no header, or no room for a status: that driver is broken.
    pub(super) fn parse(facts: &Facts, chain: &Chain, memory: &GuestRam) -> Option<Self> {
        let mut header = [0; HEADER as usize];
        let status_at = chain.writable_length().checked_sub(1)?;
        if !chain.copy_in(memory, 0, &mut header) {
            return None;
        }
        let [t0, t1, t2, t3, _, _, _, _, sector @ ..] = header;
        let (sector, out) = (u64::from_le_bytes(sector), chain.readable_length() - HEADER);
        let kind = u32::from_le_bytes([t0, t1, t2, t3]);
        let command = match kind {
            TYPE_IN => facts.locate(sector, status_at).map(|offset| Command::Read { offset, length: status_at }),
            TYPE_OUT if facts.read_only => Err(STATUS_IOERR),
            TYPE_OUT => facts.locate(sector, out).map(|offset| Command::Write { offset, length: out }),
            TYPE_FLUSH => Ok(Command::Flush),
            TYPE_GET_ID => Ok(Command::GetId),
            TYPE_DISCARD | TYPE_WRITE_ZEROES if !facts.can_discard => Err(STATUS_UNSUPPORTED),
            TYPE_DISCARD => facts.extents(chain, memory, out, 0).map(Command::Discard),
            TYPE_WRITE_ZEROES => facts.extents(chain, memory, out, FLAG_UNMAP).map(Command::WriteZeroes),
            _ => Err(STATUS_UNSUPPORTED),
        };
        Some(Self { command: command.unwrap_or_else(Command::Refuse), status_at })
    }

    /// Whether it changes the disk.
    pub(super) fn changes(&self) -> bool {
        matches!(self.command, Command::Write { .. } | Command::Discard(_) | Command::WriteZeroes(_))
    }

    /// Bytes that it moves in memory that it shares with others; none where it is served alone.
    pub(super) fn shared(&self) -> Option<usize> {
        match self.command {
            Command::Read { length, .. } | Command::Write { length, .. } => {
                usize::try_from(length).ok().filter(|length| (1..=PIECE).contains(length))
            }
            _ => None,
        }
    }

    /// Bytes that count for a rate limit.
    pub(super) fn bytes(&self) -> u64 {
        match &self.command {
            Command::Read { length, .. } | Command::Write { length, .. } => *length,
            // Nothing is moved, as far as the host knows how.
            _ => 0,
        }
    }

    /// Answers what needs no disk: its status.
    pub(super) fn answer_at_once(&self, facts: &Facts, chain: &Chain, memory: &GuestRam) -> Option<u8> {
        match self.command {
            Command::GetId => {
                let length = usize::try_from(self.status_at).unwrap_or(usize::MAX).min(facts.id.len());
                Some(if chain.copy_out(memory, 0, &facts.id[..length]) { STATUS_OK } else { STATUS_IOERR })
            }
            Command::Refuse(status) => Some(status),
            Command::Read { length: 0, .. } | Command::Write { length: 0, .. } => Some(STATUS_OK),
            _ => None,
        }
    }

    /// Writes the status and counts; gives the bytes that were written in all. None where the status can't be written.
    pub(super) fn finish(&self, status: u8, chain: &Chain, memory: &GuestRam, tally: &Tally) -> Option<u32> {
        if status == STATUS_OK {
            tally.done(&self.command);
        } else {
            Tally::add(&tally.errors, 1);
        }
        let written = chain.copy_out(memory, self.status_at, &[status]);
        written.then(|| u32::try_from(self.status_at + 1).unwrap_or(u32::MAX))
    }
}

impl Facts {
    /// What requests to `disk` are judged by now.
    pub(super) fn of(disk: &dyn Disk, read_only: bool, id: [u8; 20]) -> Self {
        let size = disk.size() / SECTOR * SECTOR;
        Self { size, read_only, can_discard: !read_only && disk.can_discard(), id }
    }

    /// The byte offset of whole sectors inside the disk.
    fn locate(&self, sector: u64, length: u64) -> Result<u64, u8> {
        let offset = sector.checked_mul(SECTOR).ok_or(STATUS_IOERR)?;
        let inside = offset.checked_add(length).is_some_and(|to| to <= self.size);
        if inside && length.is_multiple_of(SECTOR) { Ok(offset) } else { Err(STATUS_IOERR) }
    }

    /// The ranges of a discard or a write of zeroes, with no flags but `flags` (5.2.6.1).
    fn extents(&self, chain: &Chain, memory: &GuestRam, bytes: u64, flags: u32) -> Result<Vec<Extent>, u8> {
        let count = bytes / EXTENT;
        if !bytes.is_multiple_of(EXTENT) || !(1..=u64::from(EXTENTS_MAX)).contains(&count) {
            return Err(STATUS_IOERR);
        }
        let extent = |index| {
            let mut data = [0; EXTENT as usize];
            if !chain.copy_in(memory, HEADER + EXTENT * index, &mut data) {
                return Err(STATUS_IOERR);
            }
            self.extent(&data, flags)
        };
        (0..count).map(extent).collect()
    }

    fn extent(&self, data: &[u8; EXTENT as usize], allowed: u32) -> Result<Extent, u8> {
        let [s0, s1, s2, s3, s4, s5, s6, s7, n0, n1, n2, n3, f0, f1, f2, f3] = *data;
        let sector = u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]);
        let (count, flags) = (u32::from_le_bytes([n0, n1, n2, n3]), u32::from_le_bytes([f0, f1, f2, f3]));
        if flags & !allowed != 0 {
            return Err(STATUS_UNSUPPORTED);
        }
        if count > EXTENT_SECTORS_MAX {
            return Err(STATUS_IOERR);
        }
        let length = u64::from(count) * SECTOR;
        Ok(Extent { offset: self.locate(sector, length)?, length, unmap: flags & FLAG_UNMAP != 0 })
    }
}

/// How a request ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Outcome {
    /// The status is written; this many bytes in all.
    Done(u32),
    /// Nothing is written, because it can't be done now: it must stay in the queue.
    Parked,
    /// The driver is broken.
    Malformed,
}

/// Serves requests of one disk with one buffer: those together that fit it, others one after the other.
pub(super) struct Server<'a> {
    pub(super) disk: &'a dyn Disk,
    pub(super) tally: &'a Tally,
    /// Whether what is answered must be durable.
    pub(super) write_through: bool,
    /// Asked before each piece.
    pub(super) may_submit: &'a dyn Fn() -> bool,
}

impl Server<'_> {
    /// Serves requests that share the buffer, [`PIECE`] bytes in all, writes together and then reads: how each ended, in order. None
    /// where a single one can't be done now: then nothing is answered, and all stay in the queue, to be done again.
    pub(super) fn serve_together(
        &self,
        asked: &[(Chain, Request)],
        memory: &GuestRam,
        buffer: &mut Vec<u8>,
    ) -> Option<Vec<Outcome>> {
        let mut done: Vec<Result<(), Failure>> = asked.iter().map(|_| Err(Failure::Io)).collect();
        let bytes = asked.iter().filter_map(|(_, request)| request.shared()).sum();
        self.write_together(asked, memory, room(buffer, bytes), &mut done).ok()?;
        self.read_together(asked, memory, room(buffer, bytes), &mut done).ok()?;
        let statuses = done.into_iter().map(status).collect::<Option<Vec<_>>>()?;
        let mut outcomes = Vec::with_capacity(asked.len());
        for ((chain, request), status) in asked.iter().zip(statuses) {
            let answered = request.finish(status, chain, memory, self.tally);
            outcomes.push(answered.map_or(Outcome::Malformed, Outcome::Done));
        }
        Some(outcomes)
    }

    fn write_together(
        &self,
        asked: &[(Chain, Request)],
        memory: &GuestRam,
        mut room: &mut [u8],
        done: &mut [Result<(), Failure>],
    ) -> Result<(), Failure> {
        let (mut whose, mut writes) = (vec![], vec![]);
        for (i, (chain, request)) in asked.iter().enumerate() {
            let (Command::Write { offset, .. }, Some(length)) = (&request.command, request.shared()) else { continue };
            let (data, rest) = room.split_at_mut(length);
            room = rest;
            if chain.copy_in(memory, HEADER, data) {
                writes.push((*offset, &*data));
                whose.push(i);
            }
        }
        if writes.is_empty() {
            return Ok(());
        }
        self.gate()?;
        for (i, written) in whose.iter().zip(self.disk.write_many(&writes)) {
            done[*i] = written.map_err(Failure::from);
        }
        if self.write_through && whose.iter().any(|i| done[*i].is_ok()) {
            self.gate()?;
            if let Err(failure) = self.disk.flush().map_err(Failure::from) {
                whose.iter().for_each(|i| done[*i] = Err(failure));
            }
        }
        Ok(())
    }

    fn read_together(
        &self,
        asked: &[(Chain, Request)],
        memory: &GuestRam,
        mut room: &mut [u8],
        done: &mut [Result<(), Failure>],
    ) -> Result<(), Failure> {
        let (mut whose, mut reads) = (vec![], vec![]);
        for (i, (_, request)) in asked.iter().enumerate() {
            let (Command::Read { offset, .. }, Some(length)) = (&request.command, request.shared()) else { continue };
            let (data, rest) = room.split_at_mut(length);
            room = rest;
            reads.push((*offset, data));
            whose.push(i);
        }
        if reads.is_empty() {
            return Ok(());
        }
        self.gate()?;
        let all = self.disk.read_many(&mut reads);
        for ((i, (_, data)), read) in whose.into_iter().zip(reads).zip(all) {
            let copied = |()| asked[i].0.copy_out(memory, 0, data).then_some(()).ok_or(Failure::Io);
            done[i] = read.map_err(Failure::from).and_then(copied);
        }
        Ok(())
    }

    /// Serves the request in `chain`, alone.
    pub(super) fn serve(
        &self,
        request: &Request,
        facts: &Facts,
        chain: &Chain,
        memory: &GuestRam,
        buffer: &mut Vec<u8>,
    ) -> Outcome {
        let at_once = request.answer_at_once(facts, chain, memory);
        let Some(status) = at_once.or_else(|| status(self.execute(request, chain, memory, buffer))) else {
            return Outcome::Parked;
        };
        request.finish(status, chain, memory, self.tally).map_or(Outcome::Malformed, Outcome::Done)
    }

    fn execute(
        &self,
        request: &Request,
        chain: &Chain,
        memory: &GuestRam,
        buffer: &mut Vec<u8>,
    ) -> Result<(), Failure> {
        match &request.command {
            Command::Read { offset, length } => {
                for (at, size) in pieces(*length) {
                    let piece = room(buffer, size);
                    self.gate()?;
                    self.disk.read(offset + at, piece)?;
                    chain.copy_out(memory, at, piece).then_some(()).ok_or(Failure::Io)?;
                }
            }
            Command::Write { offset, length } => {
                for (at, size) in pieces(*length) {
                    let piece = room(buffer, size);
                    chain.copy_in(memory, HEADER + at, piece).then_some(()).ok_or(Failure::Io)?;
                    self.gate()?;
                    self.disk.write(offset + at, piece)?;
                }
            }
            Command::Flush => {
                self.gate()?;
                self.disk.flush()?;
            }
            Command::Discard(extents) => {
                for extent in extents {
                    self.gate()?;
                    self.disk.discard(extent.offset, extent.length)?;
                }
            }
            Command::WriteZeroes(extents) => {
                for extent in extents {
                    self.gate()?;
                    self.disk.write_zeroes(extent.offset, extent.length, extent.unmap)?;
                }
            }
            Command::GetId | Command::Refuse(_) => {}
        }
        if self.write_through && request.changes() {
            self.gate()?;
            self.disk.flush()?;
        }
        Ok(())
    }

    fn gate(&self) -> Result<(), Failure> {
        (self.may_submit)().then_some(()).ok_or(Failure::NotNow)
    }
}

#[derive(Clone, Copy)]
enum Failure {
    NotNow,
    Unsupported,
    Io,
}

impl From<DiskError> for Failure {
    fn from(error: DiskError) -> Self {
        match error {
            DiskError::NotNow => Self::NotNow,
            DiskError::Unsupported => Self::Unsupported,
            DiskError::Io(_) => Self::Io,
        }
    }
}

/// The status of a request that is done; none where it can't be done now.
fn status(done: Result<(), Failure>) -> Option<u8> {
    match done {
        Ok(()) => Some(STATUS_OK),
        Err(Failure::NotNow) => None,
        Err(Failure::Unsupported) => Some(STATUS_UNSUPPORTED),
        Err(Failure::Io) => Some(STATUS_IOERR),
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

/// Bytes of the header, before what a write brings.
pub(super) const DATA_AT: u64 = HEADER;

#[cfg(test)]
#[path = "request_tests.rs"]
mod tests;
