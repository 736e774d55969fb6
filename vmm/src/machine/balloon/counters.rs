//! What a balloon did.

use serde::Serialize;
use std::sync::atomic::{AtomicU64, Ordering};

/// Counters of the balloon since the machine started.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize)]
pub struct BalloonCounters {
    /// Pages of 4096 bytes that the guest put into the balloon.
    pub inflated_pages: u64,
    /// Pages that it took out again.
    pub deflated_pages: u64,
    /// Bytes of free pages that it reported.
    pub reported_bytes: u64,
    /// Bytes that the host did not take back.
    pub kept_bytes: u64,
    /// How often the driver broke the rules and the device needed a reset.
    pub breaks: u64,
}

/// The same, as the worker counts.
#[derive(Default)]
pub(super) struct Tally {
    pub(super) inflated_pages: AtomicU64,
    pub(super) deflated_pages: AtomicU64,
    pub(super) reported_bytes: AtomicU64,
    pub(super) kept_bytes: AtomicU64,
}

impl Tally {
    pub(super) fn add(counter: &AtomicU64, value: u64) {
        counter.fetch_add(value, Ordering::Relaxed);
    }

    pub(super) fn snapshot(&self, breaks: u64) -> BalloonCounters {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        BalloonCounters {
            inflated_pages: get(&self.inflated_pages),
            deflated_pages: get(&self.deflated_pages),
            reported_bytes: get(&self.reported_bytes),
            kept_bytes: get(&self.kept_bytes),
            breaks,
        }
    }
}
