//! What a network card did.

use serde::Serialize;
use std::sync::atomic::{AtomicU64, Ordering};

/// Counters of one card since the machine started. Bytes are those of Ethernet frames.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize)]
pub struct NetCounters {
    /// Frames from the guest that were sent.
    pub tx_frames: u64,
    /// Their bytes.
    pub tx_bytes: u64,
    /// Frames from the guest that made no sense.
    pub tx_malformed: u64,
    /// Frames from the guest that the host did not take.
    pub tx_dropped: u64,
    /// How often a frame from the guest had to wait for the rate limit.
    pub tx_throttled: u64,
    /// Frames that the guest got.
    pub rx_frames: u64,
    /// Their bytes.
    pub rx_bytes: u64,
    /// Frames for others than the guest.
    pub rx_filtered: u64,
    /// Frames that did not fit what the driver takes.
    pub rx_dropped: u64,
    /// How often frames for the guest had to wait for the rate limit.
    pub rx_throttled: u64,
    /// How often the driver broke the rules and the device needed a reset.
    pub breaks: u64,
}

/// The same, as the worker counts.
#[derive(Default)]
pub(super) struct Tally {
    pub(super) tx_frames: AtomicU64,
    pub(super) tx_bytes: AtomicU64,
    pub(super) tx_malformed: AtomicU64,
    pub(super) tx_dropped: AtomicU64,
    pub(super) tx_throttled: AtomicU64,
    pub(super) rx_frames: AtomicU64,
    pub(super) rx_bytes: AtomicU64,
    pub(super) rx_filtered: AtomicU64,
    pub(super) rx_dropped: AtomicU64,
    pub(super) rx_throttled: AtomicU64,
}

impl Tally {
    pub(super) fn add(counter: &AtomicU64, value: u64) {
        counter.fetch_add(value, Ordering::Relaxed);
    }

    pub(super) fn snapshot(&self, breaks: u64) -> NetCounters {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        NetCounters {
            tx_frames: get(&self.tx_frames),
            tx_bytes: get(&self.tx_bytes),
            tx_malformed: get(&self.tx_malformed),
            tx_dropped: get(&self.tx_dropped),
            tx_throttled: get(&self.tx_throttled),
            rx_frames: get(&self.rx_frames),
            rx_bytes: get(&self.rx_bytes),
            rx_filtered: get(&self.rx_filtered),
            rx_dropped: get(&self.rx_dropped),
            rx_throttled: get(&self.rx_throttled),
            breaks,
        }
    }
}
