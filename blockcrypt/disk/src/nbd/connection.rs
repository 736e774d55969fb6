//! One client in transmission: requests in, replies out, in whatever order they are done.
//!
//! A connection has one thread, which reads a batch of requests and performs it. Where that may take long, it leaves the stream
//! to another thread first, so that what is slow (a disk, a FLUSH) keeps nothing waiting, and several processors share the work
//! of one client. Where requests take microseconds it goes on alone: waking a thread would cost more.

use super::Export;
use super::handshake::Agreed;
use super::intake::{BATCH, Batch, Intake, PIECE, Source, Taken};
use super::wire::{Command, Errno, Request, chunk, chunk_error, simple};
use crate::Disk;
use rustix::net::{RecvFlags, recv};
use std::io::{self, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread::{self, Scope};
use std::time::{Duration, Instant};

/// Threads of a connection.
const THREADS: usize = 16;
/// Bytes of replies that wait for the end of their batch.
const WAITING: usize = 256 << 10;
/// From this time for a request on, in microseconds, waking a thread is worth it.
const SLOW: u32 = 60;

/// A client after its handshake.
pub(super) struct Connection<'a> {
    stream: &'a UnixStream,
    disk: &'a dyn Disk,
    export: &'a Export,
    structured: bool,
    /// Whose turn it is to read.
    turn: Mutex<Intake>,
    /// Whose turn it is to write.
    outgoing: Mutex<()>,
    threads: AtomicUsize,
    /// Threads that wait for their turn to read.
    idle: AtomicUsize,
    /// What a request takes, in microseconds: a moving average.
    pace: AtomicU32,
}

impl<'a> Connection<'a> {
    pub(super) fn new(stream: &'a UnixStream, disk: &'a dyn Disk, export: &'a Export, agreed: Agreed) -> Self {
        Self {
            stream,
            disk,
            export,
            structured: agreed.structured,
            turn: Mutex::default(),
            outgoing: Mutex::new(()),
            threads: AtomicUsize::new(1),
            idle: AtomicUsize::new(0),
            pace: AtomicU32::new(0),
        }
    }

    /// Serves until the client leaves, or its stream is shut down for reading; then everything that it sent is done.
    pub(super) fn run(&self) {
        thread::scope(|scope| self.work(scope));
    }

    fn work<'scope>(&'scope self, scope: &'scope Scope<'scope, '_>) {
        let (mut batch, mut out) = (Batch::new(), Vec::new());
        let mut turn = self.turn();
        while !turn.over {
            let slow = self.pace.load(Ordering::Relaxed) >= SLOW;
            match turn.take(&self.stream, &mut batch, if slow { 1 } else { BATCH }) {
                Taken::Long(request) if self.in_chunks(&request) => {
                    drop(turn);
                    self.invite(scope);
                    self.long_read(&request, &mut out);
                    turn = self.turn();
                }
                // Its payload is in the stream, or its reply needs much memory: one at a time.
                Taken::Long(request) => self.long(&request, &mut turn, &mut batch, &mut out),
                Taken::Requests if slow || batch.more || batch.is_heavy() || batch.is_large() => {
                    turn.over |= batch.is_last();
                    let over = turn.over;
                    drop(turn);
                    if !over {
                        self.invite(scope);
                    }
                    self.perform(&batch, &mut out);
                    turn = self.turn();
                }
                Taken::Requests => {
                    turn.over |= batch.is_last();
                    self.perform(&batch, &mut out);
                }
            }
        }
    }

    fn turn(&self) -> MutexGuard<'_, Intake> {
        self.idle.fetch_add(1, Ordering::Relaxed);
        let turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        self.idle.fetch_sub(1, Ordering::Relaxed);
        turn
    }

    /// Sees to it that somebody reads on. Without memory for a thread this one does, later.
    fn invite<'scope>(&'scope self, scope: &'scope Scope<'scope, '_>) {
        if self.idle.load(Ordering::Relaxed) > 0 || self.threads.load(Ordering::Relaxed) >= THREADS {
            return;
        }
        self.threads.fetch_add(1, Ordering::Relaxed);
        let thread = thread::Builder::new().name("nbd".to_owned());
        if thread.spawn_scoped(scope, || self.work(scope)).is_err() {
            self.threads.fetch_sub(1, Ordering::Relaxed);
        }
    }

    fn perform(&self, batch: &Batch, out: &mut Vec<u8>) {
        let begun = Instant::now();
        let (count, heavy) = (batch.requests().len(), batch.is_heavy());
        for (request, payload) in batch.requests() {
            if request.is_heavy() {
                // Those before it don't wait for it.
                self.send(out);
            }
            self.answer(request, payload, out);
            if out.len() >= WAITING {
                self.send(out);
            }
        }
        self.send(out);
        if count > 0 && !heavy {
            self.learn(begun.elapsed() / count as u32);
        }
    }

    fn learn(&self, time: Duration) {
        let time = u32::try_from(time.as_micros()).unwrap_or(u32::MAX).min(1 << 20);
        let pace = self.pace.load(Ordering::Relaxed);
        self.pace.store((pace * 7 + time) / 8, Ordering::Relaxed);
    }

    fn answer(&self, request: &Request, payload: &[u8], out: &mut Vec<u8>) {
        let done = match request.command(self.export) {
            Ok(Command::Disconnect) => return,
            Ok(Command::Read { offset, length, .. }) => return self.read(request, offset, length, out),
            Ok(Command::Write { offset, fua }) => self.changed(self.disk.write(offset, payload), fua),
            Ok(Command::Trim { offset, length, fua }) => self.changed(self.disk.discard(offset, length.into()), fua),
            Ok(Command::Zeroes { offset, length, may_unmap, fua }) => {
                self.changed(self.disk.write_zeroes(offset, length.into(), may_unmap), fua)
            }
            Ok(Command::Flush) => self.disk.flush().map_err(Errno::from),
            Err(errno) => Err(errno),
        };
        self.reply(request, done.err(), out);
    }

    fn changed(&self, done: Result<(), crate::Fault>, fua: bool) -> Result<(), Errno> {
        done.and_then(|()| if fua { self.disk.flush() } else { Ok(()) }).map_err(Errno::from)
    }

    /// The data goes straight behind its header. What did not verify goes nowhere.
    fn read(&self, request: &Request, offset: u64, length: u32, out: &mut Vec<u8>) {
        let begin = out.len();
        if self.structured {
            out.extend(chunk(request.cookie, offset, length, true));
        } else {
            out.extend(simple(request.cookie, None));
        }
        let data = out.len();
        out.resize(data + length as usize, 0);
        if let Err(fault) = self.disk.read(offset, &mut out[data..]) {
            out.truncate(begin);
            self.reply(request, Some(fault.into()), out);
        }
    }

    fn reply(&self, request: &Request, error: Option<Errno>, out: &mut Vec<u8>) {
        match error {
            Some(error) if self.structured && request.is_read() => out.extend(chunk_error(request.cookie, error)),
            _ => out.extend(simple(request.cookie, error)),
        }
    }

    /// Whether a long reply may go out in pieces.
    fn in_chunks(&self, request: &Request) -> bool {
        self.structured && matches!(request.command(self.export), Ok(Command::Read { whole: false, .. }))
    }

    fn long_read(&self, request: &Request, out: &mut Vec<u8>) {
        let Ok(Command::Read { offset, length, .. }) = request.command(self.export) else { return };
        let mut done = 0;
        while done < length {
            let (at, piece) = (offset + u64::from(done), (length - done).min(PIECE as u32));
            done += piece;
            out.extend(chunk(request.cookie, at, piece, done == length));
            let data = out.len();
            out.resize(data + piece as usize, 0);
            if let Err(fault) = self.disk.read(at, &mut out[data..]) {
                out.clear();
                self.reply(request, Some(fault.into()), out);
                done = length;
            }
            self.send(out);
        }
    }

    /// A request that is too long for a batch, and whose reply can't be cut.
    fn long(&self, request: &Request, turn: &mut Intake, batch: &mut Batch, out: &mut Vec<u8>) {
        match request.command(self.export) {
            Ok(Command::Write { offset, fua }) => {
                let mut written = Ok(());
                let whole = self.pieces(request, turn, batch, |done, piece| {
                    // After an error the rest is only taken out of the way.
                    written = written.and_then(|()| self.disk.write(offset + u64::from(done), piece));
                });
                if whole {
                    self.reply(request, self.changed(written, fua).err(), out);
                }
            }
            Err(errno) => {
                if self.pieces(request, turn, batch, |_, _| {}) {
                    self.reply(request, Some(errno), out);
                }
            }
            Ok(_) => self.answer(request, &[], out),
        }
        self.send(out);
        *out = Vec::new();
    }

    /// Takes in the payload in pieces, with their offsets; whether all of it came.
    fn pieces(&self, request: &Request, turn: &mut Intake, batch: &mut Batch, mut f: impl FnMut(u32, &[u8])) -> bool {
        let length = request.payload();
        let mut done = 0;
        while done < length {
            let piece = batch.room((length - done).min(PIECE as u32) as usize);
            if !turn.payload(&self.stream, piece) {
                return false;
            }
            f(done, piece);
            done += piece.len() as u32;
        }
        true
    }

    /// Sends what there is. A client that is not there to take it has nothing more to ask either.
    fn send(&self, out: &mut Vec<u8>) {
        if out.is_empty() {
            return;
        }
        let sent = {
            let _turn = self.outgoing.lock().unwrap_or_else(PoisonError::into_inner);
            let mut stream = self.stream;
            stream.write_all(out)
        };
        if sent.is_err() {
            let _ = self.stream.shutdown(Shutdown::Both);
        }
        out.clear();
    }
}

impl Source for &UnixStream {
    fn receive(&self, into: &mut [u8], wait: bool) -> io::Result<usize> {
        let flags = if wait { RecvFlags::empty() } else { RecvFlags::DONTWAIT };
        let (_, received) = recv(self, into, flags)?;
        Ok(received)
    }
}
