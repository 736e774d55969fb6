//! The host's clock held against its TPM's: leases count by CLOCK_BOOTTIME, and a host whose clock goes slowly stretches them.

use crate::tpm::ClockInfo;

/// How much faster the TPM's clock may go than the host's before nobody believes the host: half again. A TPM's clock is no
/// chronometer, its rate can be adjusted, and a sound host's clock is at most slewed. What is renewed at half of its lease is
/// found out before the lease is over by the TPM's clock.
const RATIO: (u64, u64) = (3, 2);

/// What the TPM's clock may be ahead beside that, in milliseconds: it may count in coarse steps.
const STEP_MS: u64 = 2_000;

/// The TPM's clock as a quote told it, between two readings of the host's.
#[derive(Clone, Copy, Debug)]
pub(super) struct Reading {
    /// CLOCK_BOOTTIME before the quote was asked for, in milliseconds.
    pub(super) before_ms: u64,
    /// CLOCK_BOOTTIME when it had come, in milliseconds.
    pub(super) after_ms: u64,
    /// The TPM's.
    pub(super) tpm: ClockInfo,
}

impl Reading {
    /// Whether the host's clock kept up with the TPM's since `earlier`. Nothing can be said across a reset or a resume of the TPM.
    pub(super) fn kept_up_since(&self, earlier: &Self) -> bool {
        let boot = |reading: &Self| (reading.tpm.reset_count, reading.tpm.restart_count);
        let host_ms = self.after_ms.saturating_sub(earlier.before_ms);
        let tpm_ms = self.tpm.clock.saturating_sub(earlier.tpm.clock);
        boot(self) != boot(earlier) || tpm_ms <= (host_ms.saturating_mul(RATIO.0) / RATIO.1).saturating_add(STEP_MS)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reading(host_ms: u64, clock: u64) -> Reading {
        let tpm = ClockInfo { clock, reset_count: 7, restart_count: 1, safe: true };
        Reading { before_ms: host_ms, after_ms: host_ms + 20, tpm }
    }

    #[test]
    fn attack_29_a_host_whose_clock_goes_slowly_is_found_out() {
        let first = reading(5_000, 900_000);
        assert!(reading(1_805_000, 2_700_000).kept_up_since(&first), "the same rate");
        assert!(reading(1_805_000, 3_400_000).kept_up_since(&first), "a TPM that is badly adjusted");
        assert!(!reading(905_000, 2_700_000).kept_up_since(&first), "a host at half speed");
        assert!(reading(5_100, 902_000).kept_up_since(&first), "a coarse step");
        assert!(!reading(5_100, 960_000).kept_up_since(&first));
    }

    #[test]
    fn a_tpm_that_stood_still_or_began_anew_says_nothing_of_the_host() {
        let first = reading(5_000, 900_000);
        assert!(reading(1_805_000, 900_000).kept_up_since(&first));
        assert!(reading(1_805_000, 10).kept_up_since(&first));
        let mut resumed = reading(5_100, 9_000_000);
        resumed.tpm.restart_count += 1;
        assert!(resumed.kept_up_since(&first));
    }
}
