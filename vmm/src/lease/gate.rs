//! The lease as the machine sees it: a gate that vCPUs and disk threads ask, and that closes by the clock alone.

use std::sync::atomic::{AtomicU64, Ordering};

/// Whether vCPUs may run and disks may submit, by the boot-time clock (which counts while the host sleeps).
///
/// Asked before every vCPU entry and every submission, so that a lease ends also where the thread that watches it hangs.
pub struct LeaseGate {
    quiesce_ms: AtomicU64,
    end_ms: AtomicU64,
}

impl LeaseGate {
    /// A gate that is closed until [`open_until`](Self::open_until).
    pub fn closed() -> Self {
        Self { quiesce_ms: AtomicU64::new(0), end_ms: AtomicU64::new(0) }
    }

    /// A gate that never closes: for unprotected VMs.
    pub fn unlimited() -> Self {
        Self { quiesce_ms: AtomicU64::new(u64::MAX), end_ms: AtomicU64::new(u64::MAX) }
    }

    /// Opens the gate: vCPUs may run until `quiesce_ms`, disks may submit until `end_ms`, in milliseconds of CLOCK_BOOTTIME.
    pub fn open_until(&self, quiesce_ms: u64, end_ms: u64) {
        self.end_ms.store(end_ms, Ordering::SeqCst);
        self.quiesce_ms.store(quiesce_ms.min(end_ms), Ordering::SeqCst);
    }

    /// Closes the gate now.
    pub fn close(&self) {
        self.quiesce_ms.store(0, Ordering::SeqCst);
        self.end_ms.store(0, Ordering::SeqCst);
    }

    /// Whether vCPUs may run.
    pub fn may_run(&self) -> bool {
        before(self.quiesce_ms.load(Ordering::SeqCst))
    }

    /// Whether requests may be submitted: false once the keys are, or should be, wiped.
    pub fn may_submit(&self) -> bool {
        before(self.end_ms.load(Ordering::SeqCst))
    }
}

fn before(limit_ms: u64) -> bool {
    limit_ms == u64::MAX || boottime_ms() < limit_ms
}

/// Milliseconds of CLOCK_BOOTTIME.
pub fn boottime_ms() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    let seconds = u64::try_from(now.tv_sec).unwrap_or(u64::MAX);
    let millis = u64::try_from(now.tv_nsec).unwrap_or(0) / 1_000_000;
    seconds.saturating_mul(1000).saturating_add(millis)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_gate_closes_by_the_clock_alone() {
        let gate = LeaseGate::closed();
        assert!(!gate.may_run() && !gate.may_submit());
        let now = boottime_ms();
        gate.open_until(now + 3_600_000, now + 7_200_000);
        assert!(gate.may_run() && gate.may_submit());
        gate.open_until(now, now + 7_200_000);
        assert!(!gate.may_run() && gate.may_submit());
        gate.open_until(now + 7_200_000, now);
        assert!(!gate.may_run() && !gate.may_submit());
        assert!(LeaseGate::unlimited().may_run());
    }
}
