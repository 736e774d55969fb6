//! What is due when, as a state machine without a clock of its own.

use policy::LeaseTerms;
use policy::lease::LeasePhase;

/// Something that must be done now.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Due {
    /// Pause the machine, flush and checkpoint its volumes.
    Quiesce,
    /// Wipe the keys, whatever the store does.
    Wipe,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Stage {
    Runs,
    Quiesced,
    Wiped,
}

/// Where the lease of a running instance stands. Times are milliseconds of CLOCK_BOOTTIME.
#[derive(Debug)]
pub struct LeaseClock {
    terms: LeaseTerms,
    asked_ms: u64,
    stage: Stage,
}

impl LeaseClock {
    /// A lease asked for at `asked_ms`.
    pub fn new(terms: LeaseTerms, asked_ms: u64) -> Self {
        Self { terms, asked_ms, stage: Stage::Runs }
    }

    /// What is due at `now_ms`: each thing once, in order.
    pub fn due(&mut self, now_ms: u64) -> Option<Due> {
        match (self.terms.phase(self.asked_ms, now_ms), self.stage) {
            (LeasePhase::Quiesce | LeasePhase::Ended, Stage::Runs) => {
                self.stage = Stage::Quiesced;
                Some(Due::Quiesce)
            }
            (LeasePhase::Ended, Stage::Quiesced) => {
                self.stage = Stage::Wiped;
                Some(Due::Wipe)
            }
            _ => None,
        }
    }

    /// When to ask [`due`](Self::due) again; `None` once nothing more can be due.
    pub fn next_ms(&self) -> Option<u64> {
        match self.stage {
            Stage::Runs => Some(self.quiesce_ms()),
            Stage::Quiesced => Some(self.end_ms()),
            Stage::Wiped => None,
        }
    }

    /// A renewal that was asked for at `asked_ms` came at `now_ms`: false, and nothing changes, where it came after its own
    /// end or begins before the present lease.
    pub fn renew(&mut self, terms: LeaseTerms, asked_ms: u64, now_ms: u64) -> bool {
        let fresh = matches!(terms.phase(asked_ms, now_ms), LeasePhase::Fresh | LeasePhase::Renew);
        if !fresh || asked_ms < self.asked_ms {
            return false;
        }
        *self = Self::new(terms, asked_ms);
        true
    }

    /// Whether the keys are gone.
    pub fn wiped(&self) -> bool {
        self.stage == Stage::Wiped
    }

    /// When the machine must rest.
    pub fn quiesce_ms(&self) -> u64 {
        self.asked_ms.saturating_add(self.terms.quiesce_ms())
    }

    /// When the keys must go.
    pub fn end_ms(&self) -> u64 {
        self.asked_ms.saturating_add(self.terms.end_ms())
    }

    /// The terms.
    pub fn terms(&self) -> &LeaseTerms {
        &self.terms
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use policy::lease::OnExpiry;

    const TERMS: LeaseTerms = LeaseTerms { seconds: 60, quiesce_seconds: 10, on_expiry: OnExpiry::Pause };

    #[test]
    fn a_lease_that_is_not_renewed_quiesces_then_wipes_once_each() {
        let mut clock = LeaseClock::new(TERMS, 1_000);
        assert_eq!((clock.due(50_999), clock.next_ms()), (None, Some(51_000)));
        assert_eq!((clock.due(51_000), clock.due(51_001)), (Some(Due::Quiesce), None));
        assert_eq!((clock.due(61_000), clock.due(99_000)), (Some(Due::Wipe), None));
        assert!(clock.wiped() && clock.next_ms().is_none());
    }

    #[test]
    fn attack_29_a_host_that_slept_over_both_moments_does_both() {
        let mut clock = LeaseClock::new(TERMS, 1_000);
        assert_eq!(
            [clock.due(900_000), clock.due(900_000), clock.due(900_000)],
            [Some(Due::Quiesce), Some(Due::Wipe), None]
        );
    }

    #[test]
    fn attack_29_a_clock_that_runs_backward_ends_the_lease() {
        let mut clock = LeaseClock::new(TERMS, 1_000);
        assert_eq!([clock.due(999), clock.due(999)], [Some(Due::Quiesce), Some(Due::Wipe)]);
    }

    #[test]
    fn attack_28_a_renewal_that_comes_after_its_own_end_is_discarded() {
        let mut clock = LeaseClock::new(TERMS, 1_000);
        assert!(!clock.renew(TERMS, 31_000, 91_000));
        assert!(!clock.renew(TERMS, 31_000, 85_000), "no time left to run");
        assert!(!clock.renew(TERMS, 500, 900), "older than the present one");
        assert!(clock.renew(TERMS, 31_000, 32_000));
        assert_eq!(clock.next_ms(), Some(81_000));
    }

    #[test]
    fn keys_put_back_start_a_new_lease() {
        let mut clock = LeaseClock::new(TERMS, 1_000);
        while clock.due(70_000).is_some() {}
        assert!(clock.wiped());
        assert!(clock.renew(TERMS, 70_500, 71_000));
        assert!(!clock.wiped() && clock.due(71_000).is_none());
    }
}
