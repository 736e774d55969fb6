//! What the guest sees of its clock chip: an index port and a data port. It has the time and no more: no alarm, no interrupt, no
//! memory. Its time is the host's, in UTC, and what the guest writes changes nothing: a chip without state is right after every
//! pause and everywhere.

use policy::calendar::date;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

const INDEX: u16 = 0;
const DATA: u16 = 1;
/// Bit 7 of the index port masks NMIs, which nobody sends here.
const INDEX_MASK: u8 = 0x7f;

const SECONDS: u8 = 0;
const MINUTES: u8 = 2;
const HOURS: u8 = 4;
const WEEKDAY: u8 = 6;
const DAY: u8 = 7;
const MONTH: u8 = 8;
const YEAR: u8 = 9;
const REGISTER_A: u8 = 10;
const REGISTER_B: u8 = 11;
const REGISTER_D: u8 = 13;
/// No update is in progress; the usual divider and rate.
const DIVIDER: u8 = 0x26;
/// Binary-coded decimals, 24 hours, no interrupt.
const HOURS_24: u8 = 1 << 1;
/// The battery is good.
const VALID: u8 = 1 << 7;

const DAY_SECONDS: u64 = 86_400;

/// The chip.
#[derive(Default)]
pub(crate) struct Rtc {
    index: AtomicU8,
}

impl Rtc {
    /// A byte from port `at` (0 or 1).
    pub(crate) fn read(&self, at: u16) -> u8 {
        match at {
            DATA => register(self.index.load(Ordering::Relaxed), now()),
            // The index can't be read.
            _ => 0xff,
        }
    }

    /// A byte to port `at`.
    pub(crate) fn write(&self, at: u16, value: u8) {
        if at == INDEX {
            self.index.store(value & INDEX_MASK, Ordering::Relaxed);
        }
    }
}

/// Seconds since 1970; 0 on a host whose clock is before that.
fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

/// Register `index` at `now`, in seconds since 1970.
fn register(index: u8, now: u64) -> u8 {
    let (days, second) = (now / DAY_SECONDS, now % DAY_SECONDS);
    let (year, month, day) = date(days);
    match index {
        SECONDS => decimal(second % 60),
        MINUTES => decimal(second / 60 % 60),
        HOURS => decimal(second / 3600),
        // Sunday is 1; 1970 began on a Thursday.
        WEEKDAY => decimal((days + 4) % 7 + 1),
        DAY => decimal(day),
        MONTH => decimal(month),
        YEAR => decimal(year % 100),
        REGISTER_A => DIVIDER,
        REGISTER_B => HOURS_24,
        REGISTER_D => VALID,
        _ => 0,
    }
}

/// Two digits, one a nibble.
fn decimal(number: u64) -> u8 {
    (number / 10 % 10 * 16 + number % 10) as u8
}

#[cfg(test)]
mod tests {
    use super::*;

    fn time(now: u64) -> [u8; 7] {
        [YEAR, MONTH, DAY, WEEKDAY, HOURS, MINUTES, SECONDS].map(|index| register(index, now))
    }

    #[test]
    fn the_time_is_told_in_decimals() {
        assert_eq!(time(0), [0x70, 1, 1, 5, 0, 0, 0]);
        assert_eq!(time(951_825_599), [0, 2, 0x29, 3, 0x11, 0x59, 0x59]);
        assert_eq!(time(1_795_714_815), [0x26, 0x11, 0x26, 5, 0x17, 0x40, 0x15]);
        assert_eq!(time(4_107_542_400), [0, 3, 1, 2, 0, 0, 0], "2100 has no leap day");
        assert_eq!(time(u64::MAX).len(), 7, "no time is too late");
    }

    #[test]
    fn the_chip_says_that_it_is_ready_and_goes_its_own_way() {
        let rtc = Rtc::default();
        let get = |index: u8| {
            rtc.write(0, index | 0x80);
            rtc.read(1)
        };
        assert_eq!([10, 11, 12, 13, 14, 0x7f].map(get), [0x26, 2, 0, 0x80, 0, 0]);
        assert_eq!(rtc.read(0), 0xff);
        let year = get(YEAR);
        rtc.write(1, !year);
        assert_eq!(get(YEAR), year);
    }
}
