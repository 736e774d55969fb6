//! Several transfers under way at once, for a store that is used past the page cache: a disk that has all of them in hand does them in
//! little more time than one.
#![allow(unsafe_code)]

use super::{Next, Ready};
use io_uring::types::Fd;
use io_uring::{IoUring, opcode, squeue};
use rustix::io::Errno;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::process::abort;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Transfers under way at once, at most.
const DEPTH: usize = 64;

/// As many rings as there were calls at the same time; none where the kernel gives none.
pub(super) struct Rings(Mutex<Option<Vec<Ring>>>);

impl Rings {
    /// They are made when they are needed.
    pub(super) fn new() -> Self {
        Self(Mutex::new(Some(vec![])))
    }

    /// As if the kernel gave none.
    #[cfg(test)]
    pub(super) fn none() -> Self {
        Self(Mutex::new(None))
    }

    /// Whether there are any to be had, as far as is known.
    pub(super) fn any(&self) -> bool {
        self.held().is_some()
    }

    /// Does `f` with a ring of its own, if there is one to be had.
    pub(super) fn with_one(&self, f: impl FnOnce(&mut Ring) -> io::Result<()>) -> Option<io::Result<()>> {
        let idle = self.held().as_mut()?.pop();
        let mut ring = match idle.map_or_else(Ring::new, Ok) {
            Ok(ring) => ring,
            Err(_) => {
                *self.held() = None;
                return None;
            }
        };
        let done = f(&mut ring);
        if let Some(rings) = self.held().as_mut() {
            rings.push(ring);
        }
        Some(done)
    }

    fn held(&self) -> MutexGuard<'_, Option<Vec<Ring>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// An io_uring, empty between calls.
pub(super) struct Ring(IoUring);

impl Ring {
    fn new() -> io::Result<Self> {
        IoUring::new(DEPTH as u32).map(Self)
    }

    /// Fills each part from its offset, as `read_exact_at` does. `ready` is given the parts of a lot as soon as they are filled, while
    /// those of later lots are still under way; a lot goes from the end of the one before it to its own in `ends`, the last of which is
    /// the number of parts. After an error no later lot is given.
    pub(super) fn read(
        &mut self,
        file: &File,
        parts: &mut [(u64, &mut [u8])],
        ends: &[usize],
        ready: &mut Ready,
    ) -> io::Result<()> {
        let fd = Fd(file.as_raw_fd());
        let mut flight = Flight::new(&mut self.0, parts.len());
        for (offset, buffer) in &mut *parts {
            let entry = opcode::Read::new(fd, buffer.as_mut_ptr(), length(buffer)).offset(*offset).build();
            // SAFETY: the entry is of its part's buffer, and no longer than it. The buffer is borrowed for writing until this returns, and
            // used by nobody before its transfer has ended.
            unsafe { flight.begin(entry) };
        }
        flight.submit();
        let (mut start, mut rest) = (0, parts);
        for end in ends {
            let (own, after) = std::mem::take(&mut rest).split_at_mut(end - start);
            for ((offset, buffer), number) in own.iter_mut().zip(start..) {
                let moved = finished(flight.result(number))?;
                file.read_exact_at(&mut buffer[moved..], *offset + moved as u64)?;
            }
            ready(own);
            (start, rest) = (*end, after);
        }
        Ok(())
    }

    /// Writes each part at its offset, as `write_all_at` does. Parts come from `next`, which is asked for more while those that it gave
    /// before are under way, until it has none.
    pub(super) fn write<'a>(&mut self, file: &File, next: &mut Next<'a, '_>) -> io::Result<()> {
        let fd = Fd(file.as_raw_fd());
        let mut parts: Vec<(u64, &'a [u8])> = Vec::new();
        let mut flight = Flight::new(&mut self.0, DEPTH);
        while let Some(lot) = next() {
            for (offset, bytes) in &lot {
                let entry = opcode::Write::new(fd, bytes.as_ptr(), length(bytes)).offset(*offset).build();
                // SAFETY: the entry is of its part's bytes, and no longer than they. They are borrowed for longer than this call.
                unsafe { flight.begin(entry) };
            }
            flight.submit();
            parts.extend(lot);
        }
        let mut done = Ok(());
        for (number, (offset, bytes)) in parts.iter().enumerate() {
            let rest = |moved: usize| file.write_all_at(&bytes[moved..], *offset + moved as u64);
            done = done.and(finished(flight.result(number)).and_then(rest));
        }
        done
    }
}

/// Transfers that were begun. None of them is under way any more when this is gone, whatever the caller does meanwhile.
struct Flight<'a> {
    ring: &'a mut IoUring,
    /// Of each transfer, what the kernel answered: bytes, or an error below zero.
    results: Vec<Option<i32>>,
    /// Transfers without an answer.
    under_way: usize,
}

impl<'a> Flight<'a> {
    fn new(ring: &'a mut IoUring, about: usize) -> Self {
        Self { ring, results: Vec::with_capacity(about), under_way: 0 }
    }

    /// Begins a transfer, the next in number, at the latest with [`submit`](Self::submit).
    ///
    /// # Safety
    /// What `entry` points to must be good for its transfer until that has a result, or this is dropped.
    unsafe fn begin(&mut self, entry: squeue::Entry) {
        while self.under_way >= DEPTH {
            self.wait();
        }
        let entry = entry.user_data(self.results.len() as u64);
        // SAFETY: the caller says so; this waits for it before it is gone.
        let begun = unsafe { self.ring.submission().push(&entry) }.is_ok();
        // What did not even begin is done the other way: nothing of it was moved.
        self.results.push(if begun { None } else { Some(0) });
        self.under_way += usize::from(begun);
    }

    /// Hands what was begun to the kernel, without waiting for it. Where the kernel does not take it now, it does with the next call.
    fn submit(&mut self) {
        let _ = self.ring.submit();
        self.collect();
    }

    /// Waits until a transfer has its answer.
    fn result(&mut self, number: usize) -> i32 {
        loop {
            match self.results.get(number) {
                Some(Some(result)) => return *result,
                Some(None) => self.wait(),
                None => return 0,
            }
        }
    }

    /// Waits until at least one more transfer has its answer.
    fn wait(&mut self) {
        match self.ring.submit_and_wait(1) {
            Ok(_) => {}
            Err(error) if [Errno::INTR, Errno::AGAIN, Errno::BUSY].contains(&errno(&error)) => {}
            // Memory that was lent to the kernel can't be taken back: there is no way on.
            Err(_) => abort(),
        }
        self.collect();
    }

    fn collect(&mut self) {
        for completion in self.ring.completion() {
            if let Some(result @ None) = self.results.get_mut(completion.user_data() as usize) {
                *result = Some(completion.result());
                self.under_way -= 1;
            }
        }
    }
}

impl Drop for Flight<'_> {
    fn drop(&mut self) {
        while self.under_way > 0 {
            self.wait();
        }
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
