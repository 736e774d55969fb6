//! What a console carried.

use serde::Serialize;
use std::sync::atomic::{AtomicU64, Ordering};

/// Counters of the console since the machine started.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize)]
pub struct ConsoleCounters {
    /// Bytes from the guest that somebody took.
    pub output_bytes: u64,
    /// Bytes from the guest that nobody took.
    pub lost_bytes: u64,
    /// Bytes for the guest.
    pub input_bytes: u64,
    /// How often the driver broke the rules and the device needed a reset.
    pub breaks: u64,
}

/// The same, as the worker counts.
#[derive(Default)]
pub(super) struct Tally {
    pub(super) output_bytes: AtomicU64,
    pub(super) lost_bytes: AtomicU64,
    pub(super) input_bytes: AtomicU64,
}

impl Tally {
    pub(super) fn add(counter: &AtomicU64, value: usize) {
        counter.fetch_add(value as u64, Ordering::Relaxed);
    }

    pub(super) fn snapshot(&self, breaks: u64) -> ConsoleCounters {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        ConsoleCounters {
            output_bytes: get(&self.output_bytes),
            lost_bytes: get(&self.lost_bytes),
            input_bytes: get(&self.input_bytes),
            breaks,
        }
    }
}
