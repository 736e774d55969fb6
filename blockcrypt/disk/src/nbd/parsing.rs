//! What a client says, without a client and without a disk: for fuzzing.

use super::Export;
use super::handshake::negotiate;
use super::intake::{BATCH, Batch, Intake, PIECE, Source, Taken};
use super::wire::{Command, Request};
use std::cell::Cell;
use std::io::{self, Read, Write};

/// Says `said` to the handshake.
pub(crate) fn handshake(said: &[u8], export: &Export) {
    let mut answers = 0;
    let _ = negotiate(&mut Client { said, answers: &mut answers }, export);
    // At most a few replies for each of a bounded number of options.
    assert!(answers < 1 << 20);
}

/// Takes in `said` in pieces whose sizes it determines itself.
pub(crate) fn requests(said: &[u8], export: &Export) {
    let source = Pieces { said, at: Cell::new(0) };
    let (mut intake, mut batch, mut bytes) = (Intake::default(), Batch::new(), 0);
    let limit = 1 + said.len() % BATCH;
    while !intake.over {
        match intake.take(&source, &mut batch, limit) {
            Taken::Requests => {
                assert!(batch.requests().len() <= limit);
                for (request, payload) in batch.requests() {
                    assert!(payload.len() == request.payload() as usize);
                    bytes += payload.len();
                    check(request, export);
                }
            }
            Taken::Long(request) => {
                check(&request, export);
                let piece = batch.room((request.payload() as usize).min(PIECE));
                if intake.payload(&source, piece) {
                    bytes += piece.len();
                }
            }
        }
    }
    assert!(bytes <= said.len());
}

/// What is let through can be done.
fn check(request: &Request, export: &Export) {
    let inside = |offset: u64, length: u32| {
        assert!(length > 0 && offset.is_multiple_of(512) && length.is_multiple_of(512));
        assert!(offset.checked_add(length.into()).is_some_and(|end| end <= export.size));
    };
    match request.command(export) {
        Ok(Command::Read { offset, length, .. }) => {
            assert!(length <= 32 << 20);
            inside(offset, length);
        }
        Ok(Command::Write { offset, .. }) => {
            assert!(!export.read_only && request.payload() <= 32 << 20);
            inside(offset, request.payload());
        }
        Ok(Command::Trim { offset, length, .. } | Command::Zeroes { offset, length, .. }) => {
            assert!(!export.read_only);
            inside(offset, length);
        }
        Ok(Command::Flush | Command::Disconnect) | Err(_) => {}
    }
}

struct Client<'a> {
    said: &'a [u8],
    answers: &'a mut usize,
}

impl Read for Client<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.said.read(buffer)
    }
}

impl Write for Client<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        *self.answers += bytes.len();
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

struct Pieces<'a> {
    said: &'a [u8],
    at: Cell<usize>,
}

impl Source for Pieces<'_> {
    fn receive(&self, into: &mut [u8], wait: bool) -> io::Result<usize> {
        let rest = &self.said[self.at.get()..];
        let size = rest.first().map_or(0, |byte| usize::from(*byte) * 3);
        if size == 0 && !wait {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        let n = size.max(1).min(into.len()).min(rest.len());
        into[..n].copy_from_slice(&rest[..n]);
        self.at.set(self.at.get() + n);
        Ok(n)
    }
}
