//! How long released keys live, and what happens then. Times are milliseconds of a boot-time clock, which counts while
//! the host sleeps; the caller reads it.

use serde::{Deserialize, Serialize};

/// What happens to a VM whose lease ends.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum OnExpiry {
    /// It stays paused, without keys, until they are put back.
    #[default]
    Pause,
    /// It is powered off.
    PowerOff,
}

/// The terms under which keys are released.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LeaseTerms {
    /// Length in seconds from the moment the process asked for the nonce: 2 to 604800.
    pub seconds: u32,
    /// How many seconds before the end the VM is quiesced: less than `seconds`.
    pub quiesce_seconds: u32,
    /// What happens at the end.
    #[serde(default)]
    pub on_expiry: OnExpiry,
}

/// Terms that can't be kept.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum LeaseError {
    /// Too short or long.
    #[error("a lease lasts 2 to 604800 seconds, not {0}")]
    Length(u32),
    /// No time left to run.
    #[error("a lease of {0} s can't be quiesced {1} s before its end")]
    Quiesce(u32, u32),
}

/// Where a lease stands at one moment.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum LeasePhase {
    /// Keys may be used.
    Fresh,
    /// Keys may be used; it is time to renew.
    Renew,
    /// The VM must be paused and its volumes flushed.
    Quiesce,
    /// Keys must be wiped.
    Ended,
}

impl LeaseTerms {
    /// The longest lease.
    pub const LONGEST_SECONDS: u32 = 604_800;

    /// Checks the ranges.
    pub fn check(&self) -> Result<(), LeaseError> {
        if !(2..=Self::LONGEST_SECONDS).contains(&self.seconds) {
            return Err(LeaseError::Length(self.seconds));
        }
        if self.quiesce_seconds >= self.seconds {
            return Err(LeaseError::Quiesce(self.seconds, self.quiesce_seconds));
        }
        Ok(())
    }

    /// The phase at `now_ms` of a lease asked for at `asked_ms`. A clock that reads earlier than it was asked is
    /// broken: the lease counts as ended.
    pub fn phase(&self, asked_ms: u64, now_ms: u64) -> LeasePhase {
        let Some(age) = now_ms.checked_sub(asked_ms) else { return LeasePhase::Ended };
        if age >= self.end_ms() {
            LeasePhase::Ended
        } else if age >= self.quiesce_ms() {
            LeasePhase::Quiesce
        } else if age >= self.renew_ms() {
            LeasePhase::Renew
        } else {
            LeasePhase::Fresh
        }
    }

    /// Milliseconds from asking to the end.
    pub fn end_ms(&self) -> u64 {
        u64::from(self.seconds) * 1000
    }

    /// Milliseconds from asking to quiescing.
    pub fn quiesce_ms(&self) -> u64 {
        u64::from(self.seconds.saturating_sub(self.quiesce_seconds)) * 1000
    }

    /// Milliseconds from asking to the first try to renew: half the lease, and before quiescing.
    pub fn renew_ms(&self) -> u64 {
        (self.end_ms() / 2).min(self.quiesce_ms())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lease_goes_through_its_phases_in_order() {
        let terms = LeaseTerms { seconds: 60, quiesce_seconds: 10, on_expiry: OnExpiry::Pause };
        assert_eq!(terms.check(), Ok(()));
        let phases: Vec<_> = [1000, 31_000, 51_000, 61_000, 999].map(|now| terms.phase(1000, now)).into();
        use LeasePhase::*;
        assert_eq!(phases, [Fresh, Renew, Quiesce, Ended, Ended]);
    }

    #[test]
    fn terms_that_leave_no_time_are_refused() {
        let terms = |seconds, quiesce_seconds| LeaseTerms { seconds, quiesce_seconds, on_expiry: OnExpiry::Pause };
        assert!(terms(1, 0).check().is_err());
        assert!(terms(10, 10).check().is_err());
        assert!(terms(604_801, 10).check().is_err());
    }
}
