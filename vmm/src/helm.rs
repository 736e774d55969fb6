//! Who lets the VM run. Several may hold it at once, each for a reason of its own; it runs when none does.

use crate::lease::LeaseGate;
use crate::machine::Running;
use std::sync::atomic::{AtomicU8, Ordering};
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
    /// Why it is held, changed by who has the turn. Looked at without waiting for a turn, which lasts as long as a store makes a pause last.
    holds: AtomicU8,
    turn: Mutex<()>,
    /// Told before the machine pauses, and before it goes on, whether it is to stand still.
    still: Still,
}

/// Who wants to know whether the machine is to stand still.
pub type Still = Box<dyn Fn(bool) + Send + Sync>;

impl Helm {
    /// The helm of a machine that runs. `still` has whoever serves its requests give back those that wait for the provider, so that a pause
    /// does not.
    pub fn new(running: Running, gate: Arc<LeaseGate>, still: Still) -> Self {
        Self { running, gate, holds: AtomicU8::new(0), turn: Mutex::new(()), still }
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
        let _turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        let before = self.holds.fetch_or(why as u8, Ordering::SeqCst);
        if before == 0 {
            (self.still)(true);
            self.running.pause();
        }
        before & why as u8 == 0
    }

    /// Takes one reason away, and lets the VM run if none is left: also a VM that was not held, but whose vCPUs found the
    /// gate closed for a moment. False where it was not held for this reason.
    pub fn release(&self, why: Hold) -> bool {
        let _turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        let before = self.holds.fetch_and(!(why as u8), Ordering::SeqCst);
        if before & !(why as u8) == 0 {
            (self.still)(false);
            self.running.resume();
        }
        before & why as u8 != 0
    }

    /// Whether it is held, and why: "running", or the reasons. Waits for nobody.
    pub fn state(&self) -> (bool, String) {
        let holds = self.holds.load(Ordering::SeqCst);
        let reasons: Vec<_> = Hold::ALL.iter().filter(|(h, _)| holds & *h as u8 != 0).map(|(_, text)| *text).collect();
        if reasons.is_empty() { (false, "running".into()) } else { (true, reasons.join(", ")) }
    }
}
