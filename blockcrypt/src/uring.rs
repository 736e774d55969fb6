//! Several transfers under way at once, for a store that is used past the page cache: a disk that has all of them in hand does them in
//! little more time than one.
#![allow(unsafe_code)]

use io_uring::types::Fd;
use io_uring::{IoUring, opcode, squeue};
use rustix::io::Errno;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::process::abort;

/// Transfers under way at once, at most.
const DEPTH: usize = 64;

/// An io_uring, empty between calls.
pub(crate) struct Ring(IoUring);

impl Ring {
    pub(crate) fn new() -> io::Result<Self> {
        IoUring::new(DEPTH as u32).map(Self)
    }

    /// Fills each part from its offset, as `read_exact_at` does.
    pub(crate) fn read(&mut self, file: &File, parts: &mut [(u64, &mut [u8])]) -> io::Result<()> {
        let fd = Fd(file.as_raw_fd());
        let mut done = Ok(());
        for parts in parts.chunks_mut(DEPTH) {
            let begin = |(offset, buffer): &mut (u64, &mut [u8])| {
                opcode::Read::new(fd, buffer.as_mut_ptr(), length(buffer)).offset(*offset).build()
            };
            // SAFETY: each entry is of its part's buffer, which is borrowed for writing until this returns, and no longer than it.
            let results = unsafe { self.run(parts.iter_mut().map(begin)) };
            for ((offset, buffer), result) in parts.iter_mut().zip(results) {
                let rest = |moved: usize| file.read_exact_at(&mut buffer[moved..], *offset + moved as u64);
                done = done.and(finished(result).and_then(rest));
            }
        }
        done
    }

    /// Writes each part at its offset, as `write_all_at` does.
    pub(crate) fn write(&mut self, file: &File, parts: &[(u64, &[u8])]) -> io::Result<()> {
        let fd = Fd(file.as_raw_fd());
        let mut done = Ok(());
        for parts in parts.chunks(DEPTH) {
            let begin = |(offset, bytes): &(u64, &[u8])| {
                opcode::Write::new(fd, bytes.as_ptr(), length(bytes)).offset(*offset).build()
            };
            // SAFETY: each entry is of its part's bytes, which are borrowed until this returns, and no longer than they.
            let results = unsafe { self.run(parts.iter().map(begin)) };
            for ((offset, bytes), result) in parts.iter().zip(results) {
                let rest = |moved: usize| file.write_all_at(&bytes[moved..], *offset + moved as u64);
                done = done.and(finished(result).and_then(rest));
            }
        }
        done
    }

    /// Does [`DEPTH`] transfers at most, and says of each what the kernel answered: bytes, or an error below zero. Nothing of them is under
    /// way any more when this returns.
    ///
    /// # Safety
    /// What the entries point to must be good for their transfer until this returns.
    unsafe fn run(&mut self, entries: impl Iterator<Item = squeue::Entry>) -> [i32; DEPTH] {
        // What did not even begin is done the other way.
        let mut results = [0; DEPTH];
        let mut left = 0;
        for (i, entry) in entries.enumerate() {
            // SAFETY: the caller says so.
            if unsafe { self.0.submission().push(&entry.user_data(i as u64)) }.is_err() {
                break;
            }
            left += 1;
        }
        while left > 0 {
            match self.0.submit_and_wait(left) {
                Ok(_) => {}
                Err(error) if [Errno::INTR, Errno::AGAIN, Errno::BUSY].contains(&errno(&error)) => {}
                // Memory that was lent to the kernel can't be taken back: there is no way on.
                Err(_) => abort(),
            }
            for completion in self.0.completion() {
                if let Some(result) = results.get_mut(completion.user_data() as usize) {
                    *result = completion.result();
                    left -= 1;
                }
            }
        }
        results
    }
}

/// The most that one transfer moves; the rest is done the other way.
fn length(bytes: &[u8]) -> u32 {
    bytes.len().min(1 << 30) as u32
}

/// Bytes that were moved. What can be asked for again is.
fn finished(result: i32) -> io::Result<usize> {
    match usize::try_from(result) {
        Ok(moved) => Ok(moved),
        Err(_) if [Errno::INTR, Errno::AGAIN].map(Errno::raw_os_error).contains(&-result) => Ok(0),
        Err(_) => Err(io::Error::from_raw_os_error(-result)),
    }
}

fn errno(error: &io::Error) -> Errno {
    Errno::from_io_error(error).unwrap_or(Errno::IO)
}
