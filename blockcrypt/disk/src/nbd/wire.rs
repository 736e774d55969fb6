//! The protocol's messages: all numbers big-endian.

use super::Export;
use crate::Fault;

/// Bytes of a request without its payload.
pub(super) const REQUEST: usize = 28;
/// The longest read or write, as the block-size information says. In bytes.
pub(super) const LONGEST: u32 = 32 << 20;
/// Requests are made of these, in bytes.
pub(super) const SECTOR: u32 = 512;
/// Requests had better be made of these, in bytes.
pub(super) const PREFERRED: u32 = 4096;

const REQUEST_MAGIC: u32 = 0x2560_9513;
const SIMPLE_MAGIC: u32 = 0x6744_6698;
const CHUNK_MAGIC: u32 = 0x668e_33ef;

/// Bytes of a simple reply's header.
pub(super) const SIMPLE: usize = 16;
/// Bytes of a structured reply's header and of the offset behind it.
pub(super) const CHUNK: usize = 20 + 8;

const CHUNK_DONE: u16 = 1;
const CHUNK_DATA: u16 = 1;
const CHUNK_ERROR: u16 = (1 << 15) | 1;

const READ: u16 = 0;
const WRITE: u16 = 1;
const DISCONNECT: u16 = 2;
const FLUSH: u16 = 3;
const TRIM: u16 = 4;
const WRITE_ZEROES: u16 = 6;

const FUA: u16 = 1;
const NO_HOLE: u16 = 2;
const DONT_FRAGMENT: u16 = 4;

/// A request as it came: nothing about it is known but that it is one.
///
/// ```text
/// 0x25609513 u32 │ flags u16 │ type u16 │ cookie u64 │ offset u64 │ length u32 │ payload of a write
/// ```
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Request {
    flags: u16,
    kind: u16,
    /// Names it in its reply.
    pub(super) cookie: u64,
    offset: u64,
    length: u32,
}

/// What is asked for: within the export, in whole sectors, and allowed there.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Command {
    Read { offset: u64, length: u32, whole: bool },
    Write { offset: u64, fua: bool },
    Flush,
    Trim { offset: u64, length: u32, fua: bool },
    Zeroes { offset: u64, length: u32, may_unmap: bool, fua: bool },
    Disconnect,
}

/// Errors as the protocol numbers them.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u32)]
pub(crate) enum Errno {
    NotPermitted = 1,
    Io = 5,
    Invalid = 22,
    NoSpace = 28,
    Shutdown = 108,
}

/// What came is no request: nothing after it can be understood.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("what came is no NBD request")]
pub(crate) struct NoRequest;

impl Request {
    pub(crate) fn parse(bytes: &[u8; REQUEST]) -> Result<Self, NoRequest> {
        let mut at = 0;
        if u32::from_be_bytes(take(bytes, &mut at)) != REQUEST_MAGIC {
            return Err(NoRequest);
        }
        Ok(Self {
            flags: u16::from_be_bytes(take(bytes, &mut at)),
            kind: u16::from_be_bytes(take(bytes, &mut at)),
            cookie: u64::from_be_bytes(take(bytes, &mut at)),
            offset: u64::from_be_bytes(take(bytes, &mut at)),
            length: u32::from_be_bytes(take(bytes, &mut at)),
        })
    }

    /// Bytes that follow it, whether it is allowed or not.
    pub(crate) fn payload(&self) -> u32 {
        if self.kind == WRITE { self.length } else { 0 }
    }

    /// Bytes that its reply holds, if it succeeds.
    pub(super) fn answer(&self) -> u32 {
        if self.kind == READ { self.length } else { 0 }
    }

    /// Whether its reply has chunks where that was agreed on.
    pub(super) fn is_read(&self) -> bool {
        self.kind == READ
    }

    /// Whether it is known to take long, so that no other should wait behind it.
    pub(super) fn is_heavy(&self) -> bool {
        matches!(self.kind, FLUSH | TRIM | WRITE_ZEROES) || self.flags & FUA != 0
    }

    pub(super) fn is_last(&self) -> bool {
        self.kind == DISCONNECT
    }

    /// What it asks of `export`, or why that can't be.
    pub(crate) fn command(&self, export: &Export) -> Result<Command, Errno> {
        let Self { offset, length, .. } = *self;
        let fua = self.flags & FUA != 0;
        match self.kind {
            READ => {
                self.only(DONT_FRAGMENT)?;
                self.within(export, LONGEST, Errno::Invalid)?;
                Ok(Command::Read { offset, length, whole: self.flags & DONT_FRAGMENT != 0 })
            }
            WRITE => {
                self.changes(export, 0, LONGEST)?;
                Ok(Command::Write { offset, fua })
            }
            FLUSH => {
                self.only(0)?;
                if (offset, length) == (0, 0) { Ok(Command::Flush) } else { Err(Errno::Invalid) }
            }
            TRIM => {
                self.changes(export, 0, u32::MAX)?;
                Ok(Command::Trim { offset, length, fua })
            }
            WRITE_ZEROES => {
                self.changes(export, NO_HOLE, u32::MAX)?;
                Ok(Command::Zeroes { offset, length, may_unmap: self.flags & NO_HOLE == 0, fua })
            }
            DISCONNECT => Ok(Command::Disconnect),
            _ => Err(Errno::Invalid),
        }
    }

    fn changes(&self, export: &Export, flags: u16, longest: u32) -> Result<(), Errno> {
        self.only(flags)?;
        if export.read_only {
            return Err(Errno::NotPermitted);
        }
        self.within(export, longest, Errno::NoSpace)
    }

    /// An error if it has other flags. FUA is good with every command, where it means anything or not.
    fn only(&self, flags: u16) -> Result<(), Errno> {
        if self.flags & !(flags | FUA) == 0 { Ok(()) } else { Err(Errno::Invalid) }
    }

    fn within(&self, export: &Export, longest: u32, beyond: Errno) -> Result<(), Errno> {
        let sectors = self.offset.is_multiple_of(SECTOR.into()) && self.length.is_multiple_of(SECTOR);
        if !sectors || self.length == 0 || self.length > longest {
            return Err(Errno::Invalid);
        }
        match self.offset.checked_add(self.length.into()) {
            Some(end) if end <= export.size => Ok(()),
            _ => Err(beyond),
        }
    }
}

impl From<Fault> for Errno {
    fn from(fault: Fault) -> Self {
        match fault {
            Fault::Io => Self::Io,
            Fault::Full => Self::NoSpace,
            Fault::ReadOnly => Self::NotPermitted,
            Fault::Request => Self::Invalid,
            Fault::Gone => Self::Shutdown,
        }
    }
}

/// The header of a simple reply:
///
/// ```text
/// 0x67446698 u32 │ error u32 │ cookie u64 │ data of a read without error
/// ```
pub(super) fn simple(cookie: u64, error: Option<Errno>) -> [u8; SIMPLE] {
    let mut out = [0; SIMPLE];
    out[..4].copy_from_slice(&SIMPLE_MAGIC.to_be_bytes());
    out[4..8].copy_from_slice(&error.map_or(0, |e| e as u32).to_be_bytes());
    out[8..].copy_from_slice(&cookie.to_be_bytes());
    out
}

/// The header of a chunk with `length` bytes of data from `offset` on:
///
/// ```text
/// 0x668e33ef u32 │ flags u16 │ type u16 │ cookie u64 │ length u32 │ offset u64 │ data
/// ```
pub(super) fn chunk(cookie: u64, offset: u64, length: u32, last: bool) -> [u8; CHUNK] {
    let mut out = [0; CHUNK];
    let flags = if last { CHUNK_DONE } else { 0 };
    out[..20].copy_from_slice(&chunk_header(flags, CHUNK_DATA, cookie, length + 8));
    out[20..].copy_from_slice(&offset.to_be_bytes());
    out
}

/// The chunk that ends a reply with an error, and with no message:
///
/// ```text
/// 0x668e33ef u32 │ flags u16 │ type u16 │ cookie u64 │ 6 u32 │ error u32 │ 0 u16
/// ```
pub(super) fn chunk_error(cookie: u64, error: Errno) -> [u8; 26] {
    let mut out = [0; 26];
    out[..20].copy_from_slice(&chunk_header(CHUNK_DONE, CHUNK_ERROR, cookie, 6));
    out[20..24].copy_from_slice(&(error as u32).to_be_bytes());
    out
}

fn chunk_header(flags: u16, kind: u16, cookie: u64, length: u32) -> [u8; 20] {
    let mut out = [0; 20];
    out[..4].copy_from_slice(&CHUNK_MAGIC.to_be_bytes());
    out[4..6].copy_from_slice(&flags.to_be_bytes());
    out[6..8].copy_from_slice(&kind.to_be_bytes());
    out[8..16].copy_from_slice(&cookie.to_be_bytes());
    out[16..].copy_from_slice(&length.to_be_bytes());
    out
}

fn take<const N: usize>(bytes: &[u8; REQUEST], at: &mut usize) -> [u8; N] {
    let mut out = [0; N];
    out.copy_from_slice(&bytes[*at..*at + N]);
    *at += N;
    out
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// A request's bytes.
    pub(crate) fn request(kind: u16, flags: u16, cookie: u64, offset: u64, length: u32) -> Vec<u8> {
        let mut out = REQUEST_MAGIC.to_be_bytes().to_vec();
        out.extend(flags.to_be_bytes());
        out.extend(kind.to_be_bytes());
        out.extend(cookie.to_be_bytes());
        out.extend(offset.to_be_bytes());
        out.extend(length.to_be_bytes());
        out
    }

    fn command(kind: u16, flags: u16, offset: u64, length: u32, read_only: bool) -> Result<Command, Errno> {
        let bytes = request(kind, flags, 7, offset, length);
        let request = Request::parse(bytes.as_slice().try_into().expect("whole")).expect("a request");
        request.command(&Export { size: 1 << 20, read_only, description: String::new() })
    }

    #[test]
    fn what_is_asked_for_is_understood() {
        assert_eq!(command(READ, 0, 512, 1024, true), Ok(Command::Read { offset: 512, length: 1024, whole: false }));
        assert_eq!(command(WRITE, FUA, 0, 512, false), Ok(Command::Write { offset: 0, fua: true }));
        assert_eq!(command(FLUSH, 0, 0, 0, false), Ok(Command::Flush));
        let trim = Command::Trim { offset: 0, length: 1 << 20, fua: false };
        assert_eq!(command(TRIM, 0, 0, 1 << 20, false), Ok(trim));
        let zeroes = Command::Zeroes { offset: 4096, length: 4096, may_unmap: false, fua: false };
        assert_eq!(command(WRITE_ZEROES, NO_HOLE, 4096, 4096, false), Ok(zeroes));
        assert_eq!(command(DISCONNECT, 0, 1, 1, false), Ok(Command::Disconnect));
    }

    #[test]
    fn what_can_not_be_is_an_error_of_its_own() {
        for (kind, flags, offset, length, errno) in [
            (READ, 0, 1 << 20, 512, Errno::Invalid),
            (READ, 0, u64::MAX - 511, 512, Errno::Invalid),
            (READ, 0, 1, 512, Errno::Invalid),
            (READ, 0, 0, 511, Errno::Invalid),
            (READ, 0, 0, 0, Errno::Invalid),
            (READ, NO_HOLE, 0, 512, Errno::Invalid),
            (READ, 0, 0, LONGEST + 512, Errno::Invalid),
            (WRITE, 0, (1 << 20) - 512, 1024, Errno::NoSpace),
            (WRITE, DONT_FRAGMENT, 0, 512, Errno::Invalid),
            (WRITE, 0, 0, u32::MAX, Errno::Invalid),
            (TRIM, 0, 0, u32::MAX - 511, Errno::NoSpace),
            (WRITE_ZEROES, 1 << 15, 0, 512, Errno::Invalid),
            (FLUSH, 0, 0, 512, Errno::Invalid),
            (FLUSH, NO_HOLE, 0, 0, Errno::Invalid),
            (5, 0, 0, 512, Errno::Invalid),
            (7, 0, 0, 512, Errno::Invalid),
            (u16::MAX, 0, 0, 512, Errno::Invalid),
        ] {
            assert_eq!(command(kind, flags, offset, length, false), Err(errno), "{kind} {flags} {offset} {length}");
        }
        for kind in [WRITE, TRIM, WRITE_ZEROES] {
            assert_eq!(command(kind, 0, 0, 512, true), Err(Errno::NotPermitted));
        }
    }

    #[test]
    fn what_is_no_request_is_told_from_one() {
        let mut bytes = request(READ, 0, 1, 0, 512);
        bytes[0] ^= 1;
        assert_eq!(Request::parse(bytes.as_slice().try_into().expect("whole")), Err(NoRequest));
    }
}
