//! Who lets the VM run. Several may hold it at once, each for a reason of its own; it runs when none does.

use crate::lease::LeaseGate;
use crate::machine::Running;
use std::sync::{Arc, Mutex, PoisonError};

/// Why a VM is held.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum Hold {
    /// The operator paused it.
    Operator = 1,
    /// Its lease nears its end, or has ended.
    Lease = 2,
    /// Its reports could not be delivered for too long.
    Reports = 4,
    /// Its memory is being written to a core dump.
    Dump = 8,
}

impl Hold {
    const ALL: [(Self, &'static str); 4] = [
        (Self::Operator, "paused by the operator"),
        (Self::Lease, "paused until its lease is renewed"),
        (Self::Reports, "paused until its reports are delivered"),
        (Self::Dump, "paused for a core dump"),
    ];
}

/// Pauses and resumes the machine. Shared between the watching thread and the control socket.
pub struct Helm {
    running: Running,
    gate: Arc<LeaseGate>,
    holds: Mutex<u8>,
}

impl Helm {
    /// The helm of a machine that runs.
    pub fn new(running: Running, gate: Arc<LeaseGate>) -> Self {
        Self { running, gate, holds: Mutex::new(0) }
    }

    /// The machine.
    pub fn running(&self) -> &Running {
        &self.running
    }

    /// The lease.
    pub fn gate(&self) -> &LeaseGate {
        &self.gate
    }

    /// Holds the VM; returns when no vCPU runs. False where it was held for this reason already.
    pub fn hold(&self, why: Hold) -> bool {
        let mut holds = self.holds.lock().unwrap_or_else(PoisonError::into_inner);
        let before = *holds;
        *holds |= why as u8;
        if before == 0 {
            self.running.pause();
        }
        before & why as u8 == 0
    }

    /// Takes one reason away, and lets the VM run if none is left: also a VM that was not held, but whose vCPUs found the
    /// gate closed for a moment. False where it was not held for this reason.
    pub fn release(&self, why: Hold) -> bool {
        let mut holds = self.holds.lock().unwrap_or_else(PoisonError::into_inner);
        let before = *holds;
        *holds &= !(why as u8);
        if *holds == 0 {
            self.running.resume();
        }
        before & why as u8 != 0
    }

    /// Whether it is held, and why: "running", or the reasons.
    pub fn state(&self) -> (bool, String) {
        let holds = *self.holds.lock().unwrap_or_else(PoisonError::into_inner);
        let reasons: Vec<_> = Hold::ALL.iter().filter(|(h, _)| holds & *h as u8 != 0).map(|(_, text)| *text).collect();
        if reasons.is_empty() { (false, "running".into()) } else { (true, reasons.join(", ")) }
    }
}
