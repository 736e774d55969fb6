//! When the next try is due: doubling pauses with jitter, so that a thousand VM processes whose provider comes back don't
//! all ask in the same moment.

use policy::LeaseTerms;

/// The longest pause between two tries, in milliseconds.
const LONGEST: u64 = 60_000;

/// Pauses between tries.
pub(super) struct Backoff {
    first: u64,
    longest: u64,
    pause: u64,
}

impl Backoff {
    /// Pauses for the renewal of a lease: short enough that several tries fit before its end.
    pub(super) fn for_lease(terms: &LeaseTerms) -> Self {
        let first = (terms.end_ms() / 40).clamp(100, 5_000);
        Self { first, longest: (terms.end_ms() / 8).clamp(first, LONGEST), pause: first }
    }

    /// Pauses between tries to deliver a report.
    pub(super) fn for_reports() -> Self {
        Self { first: 250, longest: 10_000, pause: 250 }
    }

    /// Milliseconds until the next try; `random` is any number.
    pub(super) fn next(&mut self, random: u32) -> u64 {
        let pause = self.pause;
        self.pause = (pause * 2).min(self.longest);
        // Between three quarters and five quarters.
        pause * (768 + u64::from(random % 512)) / 1024
    }

    /// It worked.
    pub(super) fn reset(&mut self) {
        self.pause = self.first;
    }
}

/// A random number for the jitter; a constant where the kernel gives none, which costs nothing but the spread.
pub(super) fn jitter() -> u32 {
    getrandom::u32().unwrap_or(256)
}

#[cfg(test)]
mod tests {
    use super::*;
    use policy::lease::OnExpiry;

    #[test]
    fn several_tries_fit_between_half_time_and_the_end() {
        for seconds in [2, 4, 60, 3600, 604_800] {
            let terms = LeaseTerms { seconds, quiesce_seconds: 0, on_expiry: OnExpiry::Pause };
            let mut backoff = Backoff::for_lease(&terms);
            let (mut at, mut tries) = (terms.renew_ms(), 0);
            while at < terms.end_ms() {
                at += backoff.next(511);
                tries += 1;
            }
            assert!(tries >= 4, "{seconds} s: {tries}");
        }
    }

    #[test]
    fn pauses_grow_to_their_bound_and_start_anew() {
        let mut backoff = Backoff::for_reports();
        let pauses: Vec<_> = (0..9).map(|_| backoff.next(256)).collect();
        assert_eq!((pauses[0], pauses[1], pauses[8]), (250, 500, 10_000));
        backoff.reset();
        assert_eq!(backoff.next(256), 250);
    }
}
