//! From a stream of bytes to batches of whole requests.
//!
//! A system call takes in as many requests as are there, so that a client with many in flight costs few of them.

use super::wire::{REQUEST, Request};
use std::io::{self, ErrorKind};
use std::ops::Range;

/// Bytes that are taken in at once: a batch of writes of 4 KiB.
const ROOM: usize = 144 << 10;
/// The longest payload of a request that shares a batch.
const SHARED: usize = 64 << 10;
/// The longest payload that is taken in as a whole; longer ones are taken in pieces of this.
pub(super) const PIECE: usize = 2 << 20;
/// Requests in a batch, at most: twice as many as a volume hashes at once.
pub(super) const BATCH: usize = 32;

/// Where bytes come from.
pub(super) trait Source {
    /// Reads what is there, at least a byte if it is to `wait`; 0 at the end; [`ErrorKind::WouldBlock`] if nothing is there.
    fn receive(&self, into: &mut [u8], wait: bool) -> io::Result<usize>;
}

/// What of the stream belongs to no batch yet.
#[derive(Default)]
pub(super) struct Intake {
    /// The beginning of the next requests.
    rest: Vec<u8>,
    /// No more comes.
    pub(super) over: bool,
}

/// Requests that came together. The buffer is used again and again.
pub(super) struct Batch {
    bytes: Vec<u8>,
    requests: Vec<(Request, Range<usize>)>,
    /// More had come than it took.
    pub(super) more: bool,
}

/// What there is to do.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Taken {
    /// The requests in the batch, perhaps none.
    Requests,
    /// A write whose payload is too long for a batch: it is still in the stream.
    Long(Request),
}

impl Intake {
    /// Waits for requests, and takes as many as came, `limit` at most. A heavy one is the last of its batch.
    pub(super) fn take(&mut self, from: &impl Source, batch: &mut Batch, limit: usize) -> Taken {
        let mut cut = Cut { at: 0, filled: batch.begin(&self.rest) };
        self.rest.clear();
        let mut taken = Taken::Requests;
        loop {
            match cut.next(batch, limit) {
                Next::Enough => break,
                Next::Long(request) => {
                    taken = Taken::Long(request);
                    break;
                }
                Next::NoRequest => {
                    self.over = true;
                    cut.at = cut.filled;
                    break;
                }
                // Nothing is half there, so nothing is worth another call.
                Next::Needs(_) if cut.at == cut.filled && !batch.requests.is_empty() => break,
                Next::Needs(bytes) => match self.more(from, batch, &mut cut, bytes) {
                    true => {}
                    false => break,
                },
            }
        }
        batch.more = cut.at < cut.filled;
        self.rest.extend_from_slice(&batch.bytes[cut.at..cut.filled]);
        taken
    }

    /// Fills `piece` with the payload that comes next; whether it came.
    pub(super) fn payload(&mut self, from: &impl Source, piece: &mut [u8]) -> bool {
        let known = self.rest.len().min(piece.len());
        piece[..known].copy_from_slice(&self.rest[..known]);
        self.rest.drain(..known);
        let mut filled = known;
        while filled < piece.len() {
            match from.receive(&mut piece[filled..], true) {
                Ok(n @ 1..) => filled += n,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                _ => {
                    self.over = true;
                    return false;
                }
            }
        }
        true
    }

    /// Takes in more behind `cut.filled`, so that `bytes` find room from `cut.at` on; whether any came.
    fn more(&mut self, from: &impl Source, batch: &mut Batch, cut: &mut Cut, bytes: usize) -> bool {
        // What is complete does not wait for what is not.
        let wait = batch.requests.is_empty();
        if batch.bytes.len() < cut.at + bytes {
            batch.bytes.resize(cut.at + bytes, 0);
        }
        loop {
            match from.receive(&mut batch.bytes[cut.filled..], wait) {
                Ok(n @ 1..) => {
                    cut.filled += n;
                    return true;
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock && !wait => return false,
                _ => {
                    // What came of the next request is not one.
                    self.over = true;
                    cut.at = cut.filled;
                    return false;
                }
            }
        }
    }
}

impl Batch {
    pub(super) fn new() -> Self {
        Self { bytes: vec![0; ROOM], requests: Vec::with_capacity(BATCH), more: false }
    }

    pub(super) fn requests(&self) -> impl ExactSizeIterator<Item = (&Request, &[u8])> {
        self.requests.iter().map(|(request, payload)| (request, &self.bytes[payload.clone()]))
    }

    /// Whether another request may be a long time behind these.
    pub(super) fn is_heavy(&self) -> bool {
        self.requests.last().is_some_and(|(request, _)| request.is_heavy())
    }

    /// Whether they move so many bytes that another thread is worth waking.
    pub(super) fn is_large(&self) -> bool {
        self.requests.iter().any(|(request, _)| request.payload().max(request.answer()) as usize > SHARED)
    }

    /// Whether the client said goodbye behind these.
    pub(super) fn is_last(&self) -> bool {
        self.requests.last().is_some_and(|(request, _)| request.is_last())
    }

    /// Room for a piece of a payload, in the place of the requests.
    pub(super) fn room(&mut self, bytes: usize) -> &mut [u8] {
        self.requests.clear();
        if self.bytes.len() < bytes {
            self.bytes.resize(bytes, 0);
        }
        &mut self.bytes[..bytes]
    }

    fn begin(&mut self, rest: &[u8]) -> usize {
        self.requests.clear();
        if self.bytes.len() < rest.len() {
            self.bytes.resize(rest.len(), 0);
        }
        self.bytes[..rest.len()].copy_from_slice(rest);
        rest.len()
    }
}

/// How far a batch's bytes are cut into requests.
struct Cut {
    at: usize,
    filled: usize,
}

enum Next {
    /// No more for this batch.
    Enough,
    /// This many bytes from the cut on are needed.
    Needs(usize),
    Long(Request),
    NoRequest,
}

impl Cut {
    /// Cuts off whole requests until something else comes.
    fn next(&mut self, batch: &mut Batch, limit: usize) -> Next {
        loop {
            if batch.requests.len() >= limit || batch.is_heavy() || batch.is_last() {
                return Next::Enough;
            }
            let Some(header) = batch.bytes[self.at..self.filled].first_chunk::<REQUEST>() else {
                return Next::Needs(REQUEST);
            };
            let Ok(request) = Request::parse(header) else { return Next::NoRequest };
            let payload = request.payload() as usize;
            let alone = payload.max(request.answer() as usize) > PIECE;
            if (alone || payload > SHARED) && !batch.requests.is_empty() {
                return Next::Enough;
            }
            if alone {
                self.at += REQUEST;
                return Next::Long(request);
            }
            if self.filled - self.at < REQUEST + payload {
                return Next::Needs(REQUEST + payload);
            }
            let begin = self.at + REQUEST;
            self.at = begin + payload;
            batch.requests.push((request, begin..self.at));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::wire::tests::request;
    use super::*;
    use proptest::prelude::*;
    use std::cell::RefCell;

    /// Bytes that come in pieces of given sizes, with pauses between them.
    struct Pieces {
        bytes: Vec<u8>,
        state: RefCell<(usize, Vec<usize>)>,
    }

    impl Source for Pieces {
        fn receive(&self, into: &mut [u8], wait: bool) -> io::Result<usize> {
            let (at, sizes) = &mut *self.state.borrow_mut();
            let size = sizes.pop().unwrap_or(usize::MAX);
            if size == 0 && !wait {
                return Err(ErrorKind::WouldBlock.into());
            }
            let n = size.max(1).min(into.len()).min(self.bytes.len() - *at);
            into[..n].copy_from_slice(&self.bytes[*at..*at + n]);
            *at += n;
            Ok(n)
        }
    }

    const WRITE: u16 = 1;
    const KINDS: [u16; 5] = [0, WRITE, 3, 4, 9];

    proptest! {
        /// However the stream is cut up, the same requests come out, in order.
        #[test]
        fn the_same_requests_come_out(
            asked in proptest::collection::vec((0_usize..5, 0_u32..6000, any::<u64>()), 0..40),
            long in proptest::option::of(0_usize..40),
            sizes in proptest::collection::vec(0_usize..20_000, 0..80),
            limit in 1_usize..=BATCH,
            lost in 0_usize..10,
        ) {
            let mut bytes = Vec::new();
            let mut expected = Vec::new();
            for (i, (kind, length, cookie)) in asked.into_iter().enumerate() {
                let kind = KINDS[kind];
                let length = if long == Some(i) { PIECE as u32 + 512 } else { length };
                bytes.extend(request(kind, 0, cookie, 7, length));
                let payload: Vec<u8> = (0..length).map(|b| b as u8 ^ cookie as u8).collect();
                let payload = if kind == WRITE { payload } else { Vec::new() };
                bytes.extend(&payload);
                expected.push((cookie, payload));
            }
            if lost > 0 && !bytes.is_empty() {
                bytes.truncate(bytes.len() - lost.min(bytes.len()));
                expected.pop();
            }
            let source = Pieces { bytes, state: RefCell::new((0, sizes)) };
            let (mut intake, mut batch, mut got) = (Intake::default(), Batch::new(), Vec::new());
            while !intake.over {
                match intake.take(&source, &mut batch, limit) {
                    Taken::Requests => {
                        prop_assert!(batch.requests().len() <= limit);
                        let cut = batch.requests().take(limit - 1).any(|(r, _)| r.is_heavy());
                        prop_assert!(!cut || batch.is_heavy());
                        got.extend(batch.requests().map(|(r, payload)| (r.cookie, payload.to_vec())));
                    }
                    Taken::Long(request) => {
                        let mut payload = vec![0; request.payload() as usize];
                        if intake.payload(&source, &mut payload) {
                            got.push((request.cookie, payload));
                        }
                    }
                }
            }
            prop_assert!(got == expected);
        }
    }

    #[test]
    fn what_is_no_request_ends_it_after_those_before() {
        let bytes = [request(0, 0, 1, 0, 512), vec![0; 28], request(0, 0, 2, 0, 512)].concat();
        let source = Pieces { bytes, state: RefCell::new((0, vec![])) };
        let (mut intake, mut batch) = (Intake::default(), Batch::new());
        assert_eq!(intake.take(&source, &mut batch, BATCH), Taken::Requests);
        assert!(intake.over && batch.requests().map(|(r, _)| r.cookie).eq([1]));
    }
}
