//! A queue served through a [`DiskRing`]: all its requests are under way together, and each is answered when it is done, in
//! whatever order. The guest waits for what must be in order (5.2.6.2): a FLUSH covers the writes that it has been told of.
//!
//! Guest memory is read and written by the kernel itself, without a copy in between.

use super::request::{Command, DATA_AT, Extent, Request, STATUS_IOERR, STATUS_OK, STATUS_UNSUPPORTED};
use super::uring::{Completion, DiskRing};
use super::worker::{Desk, Pace};
use crate::lease::LeaseGate;
use crate::machine::virtio::{Chain, RingError, Seat, Turn, Virtqueue};
use std::time::Duration;

/// How often an operation that the kernel interrupted is begun again.
const TRIES: u32 = 100;
const HOLE: i32 = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
const ZEROES: i32 = libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE;

/// The requests of one queue that are under way.
struct Flights<'a> {
    desk: &'a Desk,
    gate: &'a LeaseGate,
    ring: DiskRing,
    /// By slot.
    all: Vec<Option<Flight>>,
    free: Vec<usize>,
    /// Chains for requests to come, so that none is allocated anew.
    spare: Vec<Chain>,
}

/// A request under way.
struct Flight {
    chain: Chain,
    request: Request,
    /// The range in hand, of a request that has several.
    extent: usize,
    /// Bytes done of a transfer.
    done: u64,
    way: Way,
    tries: u32,
    /// Whether it is done and only made durable yet: for a driver that does not flush.
    syncing: bool,
}

/// How zeroes are made: what a store can't do is done the next way.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Way {
    Hole,
    Range,
}

/// Serves one queue until the seat says that it is over.
pub(super) fn work(seat: &Seat<Virtqueue>, desk: &Desk, gate: &LeaseGate, ring: DiskRing) {
    if let Err(error) = ring.enable() {
        // The ring was made for this thread; a kernel that takes it back is none to go on with.
        panic!("the disk's io_uring can't be enabled: {error}");
    }
    let mut flights = Flights::new(desk, gate, ring);
    let mut session = None;
    loop {
        let wait = match seat.turn(&mut session, flights.ring.in_hand() > 0) {
            Turn::End => return,
            Turn::Serve(queue) if !queue.is_broken() => flights.admit(queue),
            Turn::Serve(_) | Turn::Rest | Turn::Drain => None,
        };
        if let Err(error) = flights.ring.wait(wait) {
            panic!("the disk's io_uring does not answer: {error}");
        }
        flights.reap(session.as_mut());
    }
}

impl<'a> Flights<'a> {
    fn new(desk: &'a Desk, gate: &'a LeaseGate, ring: DiskRing) -> Self {
        let depth = ring.depth();
        let all = (0..depth).map(|_| None).collect();
        Self { desk, gate, ring, all, free: (0..depth).rev().collect(), spare: vec![] }
    }

    /// Begins as many requests as there are and may be; gives the time after which to look again, where there is one. A queue
    /// that breaks has told its driver: what is under way is finished, and nothing follows.
    fn admit(&mut self, queue: &mut Virtqueue) -> Option<Duration> {
        self.try_admit(queue).unwrap_or(None)
    }

    fn try_admit(&mut self, queue: &mut Virtqueue) -> Result<Option<Duration>, RingError> {
        let facts = self.desk.facts();
        let mut answered = 0;
        queue.hush()?;
        let wait = loop {
            // Requests that need no disk take no slot: a driver that sends them for ever must not keep the seat from being asked.
            if answered > self.all.len() {
                break Some(Duration::ZERO);
            }
            // Each completion looks here again.
            let Some(slot) = self.free.last().copied() else { break None };
            let mut chain = self.spare.pop().unwrap_or_default();
            if !queue.next(&mut chain)? {
                self.spare.push(chain);
                if queue.listen()? {
                    continue;
                }
                break None;
            }
            let Some(request) = Request::parse(&facts, &chain, queue.memory()) else { return Err(queue.give_up()) };
            if let Some(pace) = self.desk.hold(&request, self.gate) {
                queue.put_back(&chain);
                self.spare.push(chain);
                break match pace {
                    Pace::Keys => None,
                    Pace::Rate(wait) => Some(wait),
                };
            }
            if let Some(status) = request.answer_at_once(&facts, &chain, queue.memory()) {
                self.answer(queue, &request, chain, status)?;
                answered += 1;
                continue;
            }
            self.free.pop();
            self.all[slot] = Some(Flight::new(chain, request));
            if let Some(status) = self.launch(slot, queue) {
                self.land(slot, status, Some(queue))?;
                answered += 1;
            }
        };
        if answered > 0 {
            queue.signal()?;
        }
        Ok(wait)
    }

    /// Takes what was completed. Without a queue, or with a broken one, nobody is told.
    fn reap(&mut self, mut queue: Option<&mut Virtqueue>) {
        let mut told = false;
        while let Some(completion) = self.ring.completed() {
            told = true;
            // The error was told to the driver when it was found.
            let _ = self.take(completion, queue.as_deref_mut());
        }
        if let Some(queue) = queue.filter(|queue| told && !queue.is_broken()) {
            let _ = queue.signal();
        }
    }

    fn take(&mut self, completion: Completion, queue: Option<&mut Virtqueue>) -> Result<(), RingError> {
        let Completion { slot, result } = completion;
        let Some(flight) = self.all[slot].as_mut() else { return Ok(()) };
        let mut status = flight.step(result);
        if status == Some(STATUS_OK) && !flight.syncing && flight.request.changes() && self.desk.write_through() {
            flight.syncing = true;
            status = None;
        }
        let Some(queue) = queue else { return self.land(slot, STATUS_IOERR, None) };
        if status.is_none() {
            status = self.launch(slot, queue);
        }
        status.map_or(Ok(()), |status| self.land(slot, status, Some(queue)))
    }

    /// Begins the next operation of a request; its status where there is none.
    fn launch(&mut self, slot: usize, queue: &Virtqueue) -> Option<u8> {
        let (ring, flight) = (&mut self.ring, self.all[slot].as_mut()?);
        let begun = match &flight.request.command {
            _ if flight.syncing => ring.sync(slot),
            Command::Read { offset, length } => {
                let span = flight.done..*length;
                ring.read(slot, offset + flight.done, queue.memory(), &flight.chain.writable, span)
            }
            Command::Write { offset, length } => {
                let span = DATA_AT + flight.done..DATA_AT + length;
                ring.write(slot, offset + flight.done, queue.memory(), &flight.chain.readable, span)
            }
            Command::Flush => ring.sync(slot),
            Command::Discard(_) | Command::WriteZeroes(_) => {
                let Some(extent) = flight.next_extent() else { return Some(STATUS_OK) };
                match flight.way {
                    Way::Hole => ring.allocate(slot, HOLE, extent.offset, extent.length),
                    Way::Range => ring.allocate(slot, ZEROES, extent.offset, extent.length),
                }
            }
            Command::GetId | Command::Refuse(_) => false,
        };
        (!begun).then_some(STATUS_IOERR)
    }

    /// A request is over: answers it where somebody is there, and frees its slot.
    fn land(&mut self, slot: usize, status: u8, queue: Option<&mut Virtqueue>) -> Result<(), RingError> {
        let Some(flight) = self.all[slot].take() else { return Ok(()) };
        self.free.push(slot);
        match queue.filter(|queue| !queue.is_broken()) {
            Some(queue) => self.answer(queue, &flight.request, flight.chain, status),
            None => Ok(()),
        }
    }

    fn answer(&mut self, queue: &mut Virtqueue, request: &Request, chain: Chain, status: u8) -> Result<(), RingError> {
        let written = request.finish(status, &chain, queue.memory(), &self.desk.tally);
        let done = match written {
            Some(written) => queue.complete(&chain, written),
            None => Err(queue.give_up()),
        };
        self.spare.push(chain);
        done
    }
}

impl Flight {
    fn new(chain: Chain, request: Request) -> Self {
        let mut flight = Self { chain, request, extent: 0, done: 0, way: Way::Hole, tries: 0, syncing: false };
        flight.way = flight.first_way();
        flight
    }

    fn extents(&self) -> &[Extent] {
        match &self.request.command {
            Command::Discard(extents) | Command::WriteZeroes(extents) => extents,
            _ => &[],
        }
    }

    /// The range in hand; empty ones need nothing.
    fn next_extent(&mut self) -> Option<Extent> {
        while self.extents().get(self.extent).is_some_and(|extent| extent.length == 0) {
            self.next();
        }
        self.extents().get(self.extent).copied()
    }

    fn next(&mut self) {
        (self.extent, self.done) = (self.extent + 1, 0);
        self.way = self.first_way();
    }

    fn first_way(&self) -> Way {
        let keeps = |extent: &Extent| matches!(self.request.command, Command::WriteZeroes(_)) && !extent.unmap;
        if self.extents().get(self.extent).is_some_and(keeps) { Way::Range } else { Way::Hole }
    }

    /// Takes the result of an operation: the request's status, or none where there is more to do.
    fn step(&mut self, result: Result<u64, i32>) -> Option<u8> {
        let again = matches!(result, Err(libc::EINTR | libc::EAGAIN));
        if again && self.tries < TRIES {
            self.tries += 1;
            return None;
        }
        if self.syncing {
            return Some(if result.is_ok() { STATUS_OK } else { STATUS_IOERR });
        }
        match (&self.request.command, result) {
            (Command::Read { length, .. } | Command::Write { length, .. }, Ok(bytes)) if bytes > 0 => {
                self.done += bytes;
                (self.done >= *length).then_some(STATUS_OK)
            }
            (Command::Flush, Ok(_)) => Some(STATUS_OK),
            (Command::Discard(_) | Command::WriteZeroes(_), Ok(_)) => self.step_extent(),
            // A store that can't, or not at this place, loses nothing by it.
            (Command::Discard(_), Err(libc::EOPNOTSUPP | libc::EINVAL)) => self.step_extent(),
            (Command::WriteZeroes(_), Err(libc::EOPNOTSUPP | libc::EINVAL)) if self.way == Way::Hole => {
                self.way = Way::Range;
                None
            }
            // The guest then writes them itself: requests of its own, which a pause waits for and a rate limit counts.
            (Command::WriteZeroes(_), Err(libc::EOPNOTSUPP | libc::EINVAL)) => Some(STATUS_UNSUPPORTED),
            _ => Some(STATUS_IOERR),
        }
    }

    fn step_extent(&mut self) -> Option<u8> {
        self.next();
        (self.next_extent().is_none()).then_some(STATUS_OK)
    }
}

#[cfg(test)]
#[path = "flights_tests.rs"]
mod tests;
