//! What a source of random numbers did.

use serde::Serialize;
use std::sync::atomic::{AtomicU64, Ordering};

/// Counters of the source since the machine started.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize)]
pub struct RngCounters {
    /// Requests that were answered.
    pub requests: u64,
    /// Random bytes given.
    pub bytes: u64,
    /// How often a request had to wait because the guest took too much.
    pub throttled: u64,
    /// How often the driver broke the rules and the device needed a reset.
    pub breaks: u64,
}

/// The same, as the worker counts.
#[derive(Default)]
pub(super) struct Tally {
    pub(super) requests: AtomicU64,
    pub(super) bytes: AtomicU64,
    pub(super) throttled: AtomicU64,
}

impl Tally {
    pub(super) fn add(counter: &AtomicU64, value: u64) {
        counter.fetch_add(value, Ordering::Relaxed);
    }

    pub(super) fn snapshot(&self, breaks: u64) -> RngCounters {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        RngCounters { requests: get(&self.requests), bytes: get(&self.bytes), throttled: get(&self.throttled), breaks }
    }
}
