//! What wakes the sockets, and the switchboard that connects the guest's packets with the host's clients.

use super::connection::{BUFFER, Connection, Input};
use super::counters::Tally;
use super::greeting::{Greeting, Heard, Silent};
use super::packet::{HEADER, HOST_CID, Header, Op, SHUTDOWN_RECEIVE, SHUTDOWN_SEND, STREAM};
use crate::machine::virtio::{Chain, RingError, Serve, Session, Virtqueue};
use rustix::event::{PollFd, PollFlags};
use rustix::net::{RecvFlags, SendFlags, SocketFlags, accept_with, recv, send};
use std::collections::{BTreeMap, VecDeque};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::time::Duration;

const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;

/// Streams at the same time; more are refused.
const CONNECTIONS_MAX: usize = 64;
/// Clients that wait for a connection of the guest.
const WAITING_MAX: usize = 64;
/// Clients that have not said what they want; more are not let in.
const SILENT_MAX: usize = 16;
/// Answers that wait for the guest's buffers; while they are so many, nothing more is taken from the guest.
const ANSWERS_MAX: usize = 128;
/// Packets of one queue in one piece of work.
const BATCH: usize = 32;
/// The first port of the host that a client gets.
const FIRST_PORT: u32 = 1 << 30;

/// Port of the host, port of the guest.
type Ends = (u32, u32);

/// All streams of one guest, on their thread.
pub(super) struct Switchboard {
    tally: Arc<Tally>,
    cid: u64,
    listener: Option<UnixListener>,
    silent: Vec<Silent>,
    waiting: Vec<(u32, OwnedFd)>,
    connections: BTreeMap<Ends, Connection>,
    /// Headers without data, for the guest.
    answers: VecDeque<Header>,
    next_port: u32,
    /// Whose turn was last.
    last: Ends,
    chain: Chain,
    /// A buffer of the driver's, for the next packet.
    room: Option<Chain>,
    spare: Option<Chain>,
    buffer: Vec<u8>,
}

impl Switchboard {
    /// The switchboard of the guest with address `cid`, for clients of `listener`.
    pub(super) fn new(tally: Arc<Tally>, cid: u64, listener: Option<UnixListener>) -> Self {
        Self {
            tally,
            cid,
            listener,
            silent: vec![],
            waiting: vec![],
            connections: BTreeMap::new(),
            answers: VecDeque::new(),
            next_port: FIRST_PORT,
            last: (0, 0),
            chain: Chain::default(),
            room: None,
            spare: None,
            buffer: vec![0; HEADER + BUFFER as usize],
        }
    }

    /// Lets clients in and hears what they want.
    fn greet(&mut self) {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        while let Some(listener) = &self.listener
            && self.silent.len() < SILENT_MAX
            && let Ok(client) = accept_with(listener, flags)
        {
            self.silent.push(Silent::new(client));
        }
        for mut silent in std::mem::take(&mut self.silent) {
            match silent.hear() {
                Heard::NotYet => self.silent.push(silent),
                Heard::Nonsense => {}
                Heard::Greeting(Greeting::Connect(port)) => self.connect(port, silent.client),
                Heard::Greeting(Greeting::Listen(port)) => self.let_wait(port, silent.client),
            }
        }
    }

    /// From now on `client` waits for a connection of the guest to `port`.
    pub(super) fn let_wait(&mut self, port: u32, client: OwnedFd) {
        self.waiting.retain(|(_, client)| !hung_up(client));
        if self.waiting.len() < WAITING_MAX {
            self.waiting.push((port, client));
        }
    }

    /// Asks the guest for a connection to its port.
    fn connect(&mut self, port: u32, client: OwnedFd) {
        if self.connections.len() >= CONNECTIONS_MAX || self.answers.len() >= ANSWERS_MAX {
            return;
        }
        // At most so many are taken, so that one of them is free.
        let candidates = (0..=CONNECTIONS_MAX as u32).map(|n| FIRST_PORT | self.next_port.wrapping_add(n));
        let Some(ours) = candidates.into_iter().find(|ours| !self.connections.contains_key(&(*ours, port))) else {
            return;
        };
        self.next_port = ours.wrapping_add(1);
        self.connections.insert((ours, port), Connection::new(client));
        self.answer((ours, port), Op::Request, 0);
    }

    /// Queues a packet without data for the guest's end of a stream.
    fn answer(&mut self, ends: Ends, op: Op, flags: u32) {
        let header = self.header(ends, op, flags, 0);
        self.answers.push_back(header);
    }

    fn header(&mut self, (ours, theirs): Ends, op: Op, flags: u32, len: u32) -> Header {
        let connection = self.connections.get_mut(&(ours, theirs));
        let fwd_cnt = connection.map_or(0, |connection| {
            connection.has_told();
            connection.forwarded
        });
        Header {
            src_cid: HOST_CID,
            dst_cid: self.cid,
            src_port: ours,
            dst_port: theirs,
            len,
            kind: STREAM,
            op: Some(op),
            flags,
            buf_alloc: BUFFER,
            fwd_cnt,
        }
    }

    /// Ends a stream at once, for both ends.
    fn reset(&mut self, ends: Ends) {
        Tally::add(&self.tally.resets, 1);
        self.end(ends);
    }

    /// Ends a stream; this is also how a guest hears that its end came to an orderly one (5.10.6.6).
    fn end(&mut self, ends: Ends) {
        self.connections.remove(&ends);
        self.answer(ends, Op::Reset, 0);
    }

    /// Takes packets from the guest; true if there may be more.
    fn take(&mut self, queue: &mut Virtqueue) -> Result<bool, RingError> {
        queue.hush()?;
        for _ in 0..BATCH {
            // What is taken may need an answer, and a stream that ends another one.
            if self.answers.len() + 2 > ANSWERS_MAX {
                queue.signal()?;
                return Ok(false);
            }
            if !queue.next(&mut self.chain)? {
                queue.signal()?;
                return queue.listen();
            }
            self.open_packet(queue)?;
            queue.complete(&self.chain, 0)?;
        }
        queue.signal()?;
        Ok(true)
    }

    /// Reads the packet in the chain. One that is no packet breaks the device; one that is not to the host from this guest is
    /// forgotten.
    fn open_packet(&mut self, queue: &Virtqueue) -> Result<(), RingError> {
        let length = self.chain.readable_length();
        let mut bytes = [0; HEADER];
        if !self.chain.writable.is_empty() || !self.chain.copy_in(queue.memory(), 0, &mut bytes) {
            return Err(queue.give_up());
        }
        let header = Header::parse(&bytes);
        if u64::from(header.len) > length - HEADER as u64 {
            return Err(queue.give_up());
        }
        if header.src_cid != self.cid || header.dst_cid != HOST_CID {
            return Ok(());
        }
        let ends = (header.dst_port, header.src_port);
        let op = header.op.filter(|_| header.kind == STREAM);
        if op == Some(Op::Data) && self.connections.get(&ends).is_some_and(|c| header.len <= c.room()) {
            // No room is larger than the buffer.
            let mut data = std::mem::take(&mut self.buffer);
            let part = &mut data[..header.len as usize];
            let read = self.chain.copy_in(queue.memory(), HEADER as u64, part);
            if read {
                self.obey(ends, &header, op, part);
            }
            self.buffer = data;
            return if read { Ok(()) } else { Err(queue.give_up()) };
        }
        self.obey(ends, &header, op, &[]);
        Ok(())
    }

    /// Does what a packet asks for. `data` is what it carries, if the stream has room for that.
    fn obey(&mut self, ends: Ends, header: &Header, op: Option<Op>, data: &[u8]) {
        let Some(connection) = self.connections.get_mut(&ends) else {
            match op {
                Some(Op::Request) => self.accept(ends, header),
                Some(Op::Reset) => {}
                _ => self.reset(ends),
            }
            return;
        };
        (connection.peer_buffer, connection.peer_forwarded) = (header.buf_alloc, header.fwd_cnt);
        let open = connection.open;
        let done = match op {
            Some(Op::Response) if !open => {
                connection.open = true;
                Tally::add(&self.tally.connections, 1);
                told(&connection.client, ends.0)
            }
            Some(Op::Data) if open && !connection.guest_sends_no_more && data.len() == header.len as usize => {
                Tally::add(&self.tally.output_bytes, data.len());
                connection.push(data).is_ok()
            }
            Some(Op::Shutdown) if open => {
                connection.guest_sends_no_more |= header.flags & SHUTDOWN_SEND != 0;
                connection.guest_receives_no_more |= header.flags & SHUTDOWN_RECEIVE != 0;
                connection.flush().is_ok()
            }
            Some(Op::CreditUpdate) if open => true,
            Some(Op::CreditRequest) if open => {
                self.answer(ends, Op::CreditUpdate, 0);
                true
            }
            Some(Op::Reset) => {
                self.connections.remove(&ends);
                Tally::add(&self.tally.resets, 1);
                return;
            }
            _ => false,
        };
        self.settle(ends, done);
    }

    /// Connects the guest with a client that waits for this.
    fn accept(&mut self, ends: Ends, header: &Header) {
        self.waiting.retain(|(_, client)| !hung_up(client));
        let place = self.waiting.iter().position(|(port, _)| *port == ends.0);
        let Some(place) = place.filter(|_| self.connections.len() < CONNECTIONS_MAX) else { return self.reset(ends) };
        let (_, client) = self.waiting.remove(place);
        let mut connection = Connection::new(client);
        connection.open = true;
        (connection.peer_buffer, connection.peer_forwarded) = (header.buf_alloc, header.fwd_cnt);
        let good = told(&connection.client, ends.1);
        self.connections.insert(ends, connection);
        if !good {
            return self.reset(ends);
        }
        Tally::add(&self.tally.connections, 1);
        self.answer(ends, Op::Response, 0);
    }

    /// After something was done to a stream: it goes on, owes the guest something, or is over.
    fn settle(&mut self, ends: Ends, good: bool) {
        let Some(connection) = self.connections.get_mut(&ends) else { return };
        if !good {
            self.reset(ends);
        } else if connection.is_over() {
            self.end(ends);
        } else if connection.owes_credit() {
            self.answer(ends, Op::CreditUpdate, 0);
        }
    }

    /// Gives packets to the guest; true if there may be more.
    fn give(&mut self, queue: &mut Virtqueue) -> Result<bool, RingError> {
        queue.hush()?;
        for _ in 0..BATCH {
            if self.room.is_none() {
                let mut chain = self.spare.take().unwrap_or_default();
                if !queue.next(&mut chain)? {
                    self.spare = Some(chain);
                    queue.signal()?;
                    return queue.listen();
                }
                if !chain.readable.is_empty() || chain.writable_length() <= HEADER as u64 {
                    return Err(queue.give_up());
                }
                self.room = Some(chain);
            }
            let room = self.room.as_ref().map_or(0, Chain::writable_length);
            let Some(length) = self.next_packet(room) else {
                queue.signal()?;
                return Ok(false);
            };
            let Some(chain) = self.room.take() else { return Ok(false) };
            if !chain.copy_out(queue.memory(), 0, &self.buffer[..length]) {
                return Err(queue.give_up());
            }
            queue.complete(&chain, length as u32)?;
            self.spare = Some(chain);
        }
        queue.signal()?;
        Ok(true)
    }

    /// Puts the next packet for the guest, of at most `room` bytes, into the buffer: an answer, or what a client sends.
    fn next_packet(&mut self, room: u64) -> Option<usize> {
        if self.answers.is_empty() {
            self.read_client(room);
        }
        let header = self.answers.pop_front()?;
        self.buffer[..HEADER].copy_from_slice(&header.bytes());
        Some(HEADER + header.len as usize)
    }

    /// Reads from the next client that has something, behind the place of the header; queues what the guest is to get.
    fn read_client(&mut self, room: u64) {
        let behind: Vec<Ends> = self.connections.keys().copied().collect();
        let start = behind.partition_point(|ends| *ends <= self.last);
        let end = usize::try_from(room).unwrap_or(usize::MAX).min(self.buffer.len());
        for ends in behind[start..].iter().chain(&behind[..start]).copied() {
            let Some(connection) = self.connections.get_mut(&ends) else { continue };
            match connection.read(&mut self.buffer[HEADER..end]) {
                Ok(Input::Nothing) => continue,
                Ok(Input::Bytes(length)) => {
                    Tally::add(&self.tally.input_bytes, length);
                    let header = self.header(ends, Op::Data, 0, length as u32);
                    self.answers.push_back(header);
                }
                Ok(Input::End) => self.answer(ends, Op::Shutdown, SHUTDOWN_SEND),
                Err(_) => self.reset(ends),
            }
            self.last = ends;
            return;
        }
    }

    /// Passes on to clients what they did not take before.
    fn flush(&mut self) {
        let full: Vec<Ends> = self.connections.iter().filter(|(_, c)| c.is_full()).map(|(ends, _)| *ends).collect();
        for ends in full {
            if self.answers.len() >= ANSWERS_MAX {
                return;
            }
            let done = self.connections.get_mut(&ends).is_some_and(|connection| connection.flush().is_ok());
            self.settle(ends, done);
        }
    }
}

impl Serve for Switchboard {
    fn begin(&mut self, _session: &mut Session) {
        // Streams end with the driver that knew them; whoever waits goes on waiting.
        self.connections.clear();
        self.answers.clear();
        self.spare = self.room.take().or(self.spare.take());
    }

    fn serve(&mut self, session: &mut Session) -> Result<bool, RingError> {
        self.greet();
        self.flush();
        let mut more = false;
        if let Some(Some(queue)) = session.queues.get_mut(TRANSMIT) {
            more |= self.take(queue)?;
        }
        let full = self.answers.len() + 2 > ANSWERS_MAX;
        if let Some(Some(queue)) = session.queues.get_mut(RECEIVE) {
            more |= self.give(queue)?;
        }
        // Answers that went made room for what was left in the queue.
        Ok(more || full && self.answers.len() + 2 <= ANSWERS_MAX)
    }

    fn interest<'a>(&'a self, descriptors: &mut Vec<PollFd<'a>>) -> Option<Duration> {
        if let Some(listener) = self.listener.as_ref().filter(|_| self.silent.len() < SILENT_MAX) {
            descriptors.push(PollFd::new(listener, PollFlags::IN));
        }
        descriptors.extend(self.silent.iter().map(|silent| PollFd::new(&silent.client, PollFlags::IN)));
        for connection in self.connections.values() {
            let mut flags = PollFlags::empty();
            flags.set(PollFlags::IN, self.room.is_some() && connection.listens());
            // What a client would take now makes an answer; without room for one, the guest's next buffer wakes this thread.
            flags.set(PollFlags::OUT, connection.is_full() && self.answers.len() < ANSWERS_MAX);
            if !flags.is_empty() {
                descriptors.push(PollFd::new(&connection.client, flags));
            }
        }
        None
    }
}

/// Tells a client that it is connected; false if it is gone.
fn told(client: &OwnedFd, port: u32) -> bool {
    let line = format!("OK {port}\n");
    // The first bytes on this socket: there is room for them.
    matches!(send(client, line.as_bytes(), SendFlags::NOSIGNAL), Ok(length) if length == line.len())
}

fn hung_up(client: &OwnedFd) -> bool {
    matches!(recv(client, &mut [0][..], RecvFlags::PEEK), Ok((0, _)))
}

#[cfg(test)]
#[path = "worker_tests.rs"]
mod tests;
