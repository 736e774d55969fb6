//! What a disk did.

use super::request::Command;
use serde::Serialize;
use std::sync::atomic::{AtomicU64, Ordering};

/// Counters of one disk since the machine started.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize)]
pub struct BlockCounters {
    /// Requests to read that were done.
    pub reads: u64,
    /// Bytes read.
    pub read_bytes: u64,
    /// Requests to write that were done.
    pub writes: u64,
    /// Bytes written.
    pub written_bytes: u64,
    /// Flushes that were done.
    pub flushes: u64,
    /// Requests to discard that were done.
    pub discards: u64,
    /// Requests to write zeroes that were done.
    pub write_zeroes: u64,
    /// Requests that failed, by the disk or because they made no sense.
    pub errors: u64,
    /// How often a request had to wait for keys.
    pub parked: u64,
    /// How often a request had to wait for the disk's rate limit.
    pub held: u64,
    /// How often the driver broke the rules and the device needed a reset.
    pub breaks: u64,
}

/// The same, as the workers count; `held` and `breaks` are counted elsewhere.
#[derive(Default)]
pub(super) struct Tally {
    pub(super) reads: AtomicU64,
    pub(super) read_bytes: AtomicU64,
    pub(super) writes: AtomicU64,
    pub(super) written_bytes: AtomicU64,
    pub(super) flushes: AtomicU64,
    pub(super) discards: AtomicU64,
    pub(super) write_zeroes: AtomicU64,
    pub(super) errors: AtomicU64,
    pub(super) parked: AtomicU64,
}

impl Tally {
    pub(super) fn add(counter: &AtomicU64, value: u64) {
        counter.fetch_add(value, Ordering::Relaxed);
    }

    /// Counts a request that was done.
    pub(super) fn done(&self, command: &Command) {
        match command {
            Command::Read { length, .. } => {
                Self::add(&self.reads, 1);
                Self::add(&self.read_bytes, *length);
            }
            Command::Write { length, .. } => {
                Self::add(&self.writes, 1);
                Self::add(&self.written_bytes, *length);
            }
            Command::Flush => Self::add(&self.flushes, 1),
            Command::Discard(_) => Self::add(&self.discards, 1),
            Command::WriteZeroes(_) => Self::add(&self.write_zeroes, 1),
            Command::GetId | Command::Refuse(_) => {}
        }
    }

    pub(super) fn snapshot(&self) -> BlockCounters {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        BlockCounters {
            reads: get(&self.reads),
            read_bytes: get(&self.read_bytes),
            writes: get(&self.writes),
            written_bytes: get(&self.written_bytes),
            flushes: get(&self.flushes),
            discards: get(&self.discards),
            write_zeroes: get(&self.write_zeroes),
            errors: get(&self.errors),
            parked: get(&self.parked),
            held: 0,
            breaks: 0,
        }
    }
}
