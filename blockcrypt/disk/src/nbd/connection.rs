//! One client in transmission: requests in, replies out, in whatever order they are done.
//!
//! A connection has one thread, which reads a batch of requests and performs it: its reads together, its writes together. Where that may take long, it leaves the stream
//! to another thread first, so that what is slow (a disk, a FLUSH) keeps nothing waiting, and several processors share the work
//! of one client. Where requests take microseconds it goes on alone: waking a thread would cost more.

use super::Export;
use super::answers::Answers;
use super::handshake::Agreed;
use super::intake::{BATCH, Batch, Intake, PIECE, Source, Taken};
use super::wire::{Command, Errno, Request, chunk, chunk_error, simple};
use crate::{Disk, Fault};
use rustix::net::{RecvFlags, recv};
use std::io;
use std::net::Shutdown;
use std::ops::Range;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread::{self, Scope};
use std::time::{Duration, Instant};

/// Threads of a connection.
const THREADS: usize = 16;
/// Bytes of replies that wait for each other.
const WAITING: usize = 256 << 10;
/// From this time for a request on, in microseconds, waking a thread is worth it.
const SLOW: u32 = 60;

/// A request and its payload.
type Asked<'a> = (&'a Request, &'a [u8]);

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
        let (mut batch, mut out) = (Batch::new(), Answers::default());
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

    fn perform(&self, batch: &Batch, out: &mut Answers) {
        let begun = Instant::now();
        let all: Vec<Asked> = batch.requests().collect();
        let heavy = batch.is_heavy();
        // Those before it don't wait for it.
        let (light, last) = all.split_at(all.len() - usize::from(heavy));
        let mut rest = light;
        while !rest.is_empty() {
            let (together, after) = rest.split_at(fitting(rest));
            self.answer(together, out);
            self.send(out);
            rest = after;
        }
        if heavy {
            self.answer(last, out);
            self.send(out);
        } else if !all.is_empty() {
            self.learn(begun.elapsed() / all.len() as u32);
        }
    }

    fn learn(&self, time: Duration) {
        let time = u32::try_from(time.as_micros()).unwrap_or(u32::MAX).min(1 << 20);
        let pace = self.pace.load(Ordering::Relaxed);
        self.pace.store((pace * 7 + time) / 8, Ordering::Relaxed);
    }

    /// Does what is asked for, its writes as one and then its reads, and answers in order.
    fn answer(&self, asked: &[Asked], out: &mut Answers) {
        let commands: Vec<_> = asked.iter().map(|(request, _)| request.command(self.export)).collect();
        let mut written = self.write_together(&commands, asked).into_iter();
        let mut read = self.read_together(&commands, out).into_iter();
        let mut at = 0;
        for (command, (request, payload)) in commands.into_iter().zip(asked) {
            let done = match command {
                Ok(Command::Disconnect) => continue,
                Ok(Command::Read { offset, length, .. }) => {
                    let data = at..at + length as usize;
                    at = data.end;
                    match read.next().unwrap_or(Err(Fault::Io)) {
                        Ok(()) => {
                            self.reply_data(request, offset, data, out);
                            continue;
                        }
                        Err(fault) => Err(fault.into()),
                    }
                }
                Ok(Command::Write { fua: false, .. }) => written.next().unwrap_or(Err(Fault::Io)).map_err(Errno::from),
                Ok(command) => self.perform_alone(command, payload),
                Err(errno) => Err(errno),
            };
            self.reply(request, done.err(), out);
        }
    }

    fn write_together(&self, commands: &[Result<Command, Errno>], asked: &[Asked]) -> Vec<Result<(), Fault>> {
        let mut writes = Vec::new();
        for (command, (_, payload)) in commands.iter().zip(asked) {
            if let Ok(Command::Write { offset, fua: false }) = command {
                writes.push((*offset, *payload));
            }
        }
        if writes.is_empty() { vec![] } else { self.disk.write_many(&writes) }
    }

    /// Their data lies one behind the other in the room for it.
    fn read_together(&self, commands: &[Result<Command, Errno>], out: &mut Answers) -> Vec<Result<(), Fault>> {
        let reads = commands.iter().filter_map(|command| match command {
            Ok(Command::Read { offset, length, .. }) => Some((*offset, *length as usize)),
            _ => None,
        });
        let mut room = out.room(reads.clone().map(|(_, length)| length).sum());
        let mut wanted = Vec::new();
        for (offset, length) in reads {
            let (data, rest) = room.split_at_mut(length);
            wanted.push((offset, data));
            room = rest;
        }
        if wanted.is_empty() { vec![] } else { self.disk.read_many(&mut wanted) }
    }

    /// What is neither a read nor a write that others share.
    fn perform_alone(&self, command: Command, payload: &[u8]) -> Result<(), Errno> {
        match command {
            Command::Write { offset, fua } => self.changed(self.disk.write(offset, payload), fua),
            Command::Trim { offset, length, fua } => self.changed(self.disk.discard(offset, length.into()), fua),
            Command::Zeroes { offset, length, may_unmap, fua } => {
                self.changed(self.disk.write_zeroes(offset, length.into(), may_unmap), fua)
            }
            Command::Flush => self.disk.flush().map_err(Errno::from),
            Command::Read { .. } | Command::Disconnect => Err(Errno::Invalid),
        }
    }

    fn changed(&self, done: Result<(), Fault>, fua: bool) -> Result<(), Errno> {
        done.and_then(|()| if fua { self.disk.flush() } else { Ok(()) }).map_err(Errno::from)
    }

    /// The data goes straight behind its header. What did not verify goes nowhere.
    fn reply_data(&self, request: &Request, offset: u64, data: Range<usize>, out: &mut Answers) {
        if self.structured {
            out.add_data(&chunk(request.cookie, offset, data.len() as u32, true), data);
        } else {
            out.add_data(&simple(request.cookie, None), data);
        }
    }

    fn reply(&self, request: &Request, error: Option<Errno>, out: &mut Answers) {
        match error {
            Some(error) if self.structured && request.is_read() => out.add(&chunk_error(request.cookie, error)),
            _ => out.add(&simple(request.cookie, error)),
        }
    }

    /// Whether a long reply may go out in pieces.
    fn in_chunks(&self, request: &Request) -> bool {
        self.structured && matches!(request.command(self.export), Ok(Command::Read { whole: false, .. }))
    }

    fn long_read(&self, request: &Request, out: &mut Answers) {
        let Ok(Command::Read { offset, length, .. }) = request.command(self.export) else { return };
        let mut done = 0;
        while done < length {
            let (at, piece) = (offset + u64::from(done), (length - done).min(PIECE as u32));
            done += piece;
            match self.disk.read(at, out.room(piece as usize)) {
                Ok(()) => out.add_data(&chunk(request.cookie, at, piece, done == length), 0..piece as usize),
                Err(fault) => {
                    self.reply(request, Some(fault.into()), out);
                    done = length;
                }
            }
            self.send(out);
        }
    }

    /// A request that is too long for a batch, and whose reply can't be cut.
    fn long(&self, request: &Request, turn: &mut Intake, batch: &mut Batch, out: &mut Answers) {
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
            Ok(_) => self.answer(&[(request, &[])], out),
        }
        self.send(out);
        out.shrink();
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
    fn send(&self, out: &mut Answers) {
        if out.is_empty() {
            return;
        }
        let sent = {
            let _turn = self.outgoing.lock().unwrap_or_else(PoisonError::into_inner);
            let mut stream = self.stream;
            out.send(&mut stream)
        };
        if sent.is_err() {
            let _ = self.stream.shutdown(Shutdown::Both);
        }
    }
}

/// How many of the first requests are answered together: one at least, and no more data than [`WAITING`] unless one alone has more.
fn fitting(asked: &[Asked]) -> usize {
    let mut bytes = 0;
    let fits = |(request, _): &&Asked| {
        bytes += request.answer() as usize;
        bytes <= WAITING
    };
    asked.iter().take_while(fits).count().max(1)
}

impl Source for &UnixStream {
    fn receive(&self, into: &mut [u8], wait: bool) -> io::Result<usize> {
        let flags = if wait { RecvFlags::empty() } else { RecvFlags::DONTWAIT };
        let (_, received) = recv(self, into, flags)?;
        Ok(received)
    }
}
