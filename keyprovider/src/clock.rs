//! The provider's clock. Wall time is read once, at the start; from then on the boot-time clock counts, so that nobody who
//! steps the wall clock ends or stretches a lease. A start never lies before the newest event of any audit log; and since wall
//! time may be ahead, leases begin anew with it (`store::instances::lengthen_leases`).

use rustix::time::{ClockId, clock_gettime};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Microseconds since 1970 UTC, never going back while the process lives.
#[derive(Debug)]
pub struct Clock {
    start_us: u64,
    start_boot_us: u64,
}

impl Clock {
    /// A clock that starts at the wall time, or at `floor_us` where that is later.
    pub fn start(floor_us: u64) -> Self {
        let wall = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO);
        let wall_us = u64::try_from(wall.as_micros()).unwrap_or(u64::MAX);
        Self { start_us: wall_us.max(floor_us), start_boot_us: boot_us() }
    }

    /// Now, in microseconds since 1970 UTC.
    pub fn now_us(&self) -> u64 {
        self.start_us.saturating_add(boot_us().saturating_sub(self.start_boot_us))
    }
}

fn boot_us() -> u64 {
    let now = clock_gettime(ClockId::Boottime);
    u64::try_from(now.tv_sec).unwrap_or(0) * 1_000_000 + u64::try_from(now.tv_nsec).unwrap_or(0) / 1000
}

/// `time_us` as people read it: `2026-01-31 23:59:58Z`.
pub fn utc(time_us: u64) -> String {
    let seconds = time_us / 1_000_000;
    let (days, rest) = (seconds / 86_400, seconds % 86_400);
    let (year, month, day) = policy::calendar::date(days);
    format!("{year:04}-{month:02}-{day:02} {:02}:{:02}:{:02}Z", rest / 3600, rest / 60 % 60, rest % 60)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_those_of_the_calendar() {
        assert_eq!(utc(0), "1970-01-01 00:00:00Z");
        assert_eq!(utc(951_782_399_000_000), "2000-02-28 23:59:59Z");
        assert_eq!(utc(951_782_400_000_000), "2000-02-29 00:00:00Z");
        assert_eq!(utc(1_767_225_599_999_999), "2025-12-31 23:59:59Z");
    }

    #[test]
    fn a_clock_never_starts_before_what_was_recorded() {
        let far = 9_000_000_000_000_000;
        assert!(Clock::start(far).now_us() >= far);
        assert!(Clock::start(0).now_us() > 1_700_000_000_000_000);
    }
}
