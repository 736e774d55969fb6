//! What the sockets carried.

use serde::Serialize;
use std::sync::atomic::{AtomicU64, Ordering};

/// Counters of the device since the machine started.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize)]
pub struct VsockCounters {
    /// Connections that both ends agreed on.
    pub connections: u64,
    /// Connections that an end refused, or that an end broke.
    pub resets: u64,
    /// Bytes from the guest.
    pub output_bytes: u64,
    /// Bytes for the guest.
    pub input_bytes: u64,
    /// How often the driver broke the rules and the device needed a reset.
    pub breaks: u64,
}

/// The same, as the worker counts.
#[derive(Default)]
pub(super) struct Tally {
    pub(super) connections: AtomicU64,
    pub(super) resets: AtomicU64,
    pub(super) output_bytes: AtomicU64,
    pub(super) input_bytes: AtomicU64,
}

impl Tally {
    pub(super) fn add(counter: &AtomicU64, value: usize) {
        counter.fetch_add(value as u64, Ordering::Relaxed);
    }

    pub(super) fn snapshot(&self, breaks: u64) -> VsockCounters {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        VsockCounters {
            connections: get(&self.connections),
            resets: get(&self.resets),
            output_bytes: get(&self.output_bytes),
            input_bytes: get(&self.input_bytes),
            breaks,
        }
    }
}
