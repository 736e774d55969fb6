//! Rate limits of a device: token buckets for bytes and for operations, as Cloud Hypervisor's and Firecracker's
//! `rate_limiter` has them.
//!
//! A bucket holds up to `size` tokens and regains as many in each `refill` time. Work is let through while there is a token at
//! all, and may leave a debt: so a request larger than the bucket is slow, not impossible, and over time no more than the rate
//! goes through.

use super::sync::lock;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// One bucket's size and speed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Rate {
    /// Tokens (bytes or operations) that it holds, and regains in each refill time: 1 to 2^50.
    pub size: u64,
    /// Tokens beside those at the start, once: up to 2^50.
    pub one_time_burst: u64,
    /// The time in which it fills: 1 ms to 1 h.
    pub refill: Duration,
}

/// The limits of one device; what is `None` is not limited.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct RateLimits {
    /// Bytes.
    pub bandwidth: Option<Rate>,
    /// Operations.
    pub operations: Option<Rate>,
}

/// Both buckets of one device, for all its queues.
pub struct RateLimiter {
    buckets: Option<Mutex<Buckets>>,
    /// How often something had to wait.
    held: AtomicU64,
}

struct Buckets {
    bandwidth: Option<Bucket>,
    operations: Option<Bucket>,
}

struct Bucket {
    rate: Rate,
    /// Tokens; a debt where negative.
    level: i128,
    burst: u64,
    /// Up to when tokens were regained.
    at: Instant,
}

impl RateLimiter {
    /// Full buckets. Where nothing is limited, asking costs nothing.
    pub fn new(limits: RateLimits) -> Self {
        let now = Instant::now();
        let limited = limits != RateLimits::default();
        let bucket = |rate: Option<Rate>| rate.map(|rate| Bucket::new(rate, now));
        let buckets = || Buckets { bandwidth: bucket(limits.bandwidth), operations: bucket(limits.operations) };
        Self { buckets: limited.then(|| Mutex::new(buckets())), held: AtomicU64::new(0) }
    }

    /// Lets one operation of `bytes` bytes through; or says after what time to ask again. Of two answers the second is not
    /// forgotten: who waits must ask again, and may find that another queue was faster.
    pub fn admit(&self, bytes: u64) -> Result<(), Duration> {
        self.buckets.as_ref().map_or(Ok(()), |_| self.admit_at(bytes, Instant::now()))
    }

    /// How often an operation was held up.
    pub fn held(&self) -> u64 {
        self.held.load(Ordering::Relaxed)
    }

    fn admit_at(&self, bytes: u64, now: Instant) -> Result<(), Duration> {
        let Some(buckets) = &self.buckets else { return Ok(()) };
        let mut buckets = lock(buckets);
        let Buckets { bandwidth, operations } = &mut *buckets;
        let mut both = [(bandwidth.as_mut(), bytes), (operations.as_mut(), 1)];
        let wait = both.iter_mut().filter_map(|(bucket, _)| bucket.as_mut().and_then(|b| b.wait(now))).max();
        if let Some(wait) = wait {
            self.held.fetch_add(1, Ordering::Relaxed);
            return Err(wait);
        }
        both.into_iter().for_each(|(bucket, cost)| {
            if let Some(bucket) = bucket {
                bucket.take(cost);
            }
        });
        Ok(())
    }
}

impl Bucket {
    fn new(rate: Rate, now: Instant) -> Self {
        Self { rate, level: i128::from(rate.size), burst: rate.one_time_burst, at: now }
    }

    /// Regains what time brought; then, how long there will be no token, if there is none.
    fn wait(&mut self, now: Instant) -> Option<Duration> {
        let (size, refill) = (u128::from(self.rate.size.max(1)), self.rate.refill.as_nanos().max(1));
        let passed = now.saturating_duration_since(self.at).as_nanos();
        let regained = passed.saturating_mul(size) / refill;
        let full = i128::from(self.rate.size);
        self.level = self.level.saturating_add(i128::try_from(regained).unwrap_or(i128::MAX)).min(full);
        if self.level == full {
            self.at = now;
        } else {
            // Only the time that made whole tokens is used up, so that none is lost by asking often.
            self.at += nanos(regained * refill / size);
        }
        if self.burst > 0 || self.level > 0 {
            return None;
        }
        let missing = u128::try_from(1 - self.level).unwrap_or(0);
        let needed = missing.saturating_mul(refill).div_ceil(size);
        Some(nanos(needed).saturating_sub(now.saturating_duration_since(self.at)))
    }

    fn take(&mut self, cost: u64) {
        let burst = self.burst.min(cost);
        self.burst -= burst;
        self.level = self.level.saturating_sub(i128::from(cost - burst));
    }
}

fn nanos(count: u128) -> Duration {
    Duration::from_nanos(u64::try_from(count).unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn rate(size: u64, one_time_burst: u64, ms: u64) -> Option<Rate> {
        Some(Rate { size, one_time_burst, refill: Duration::from_millis(ms) })
    }

    #[test]
    fn what_is_not_limited_goes_through() {
        let limiter = RateLimiter::new(RateLimits::default());
        for _ in 0..1000 {
            assert_eq!(limiter.admit(u64::MAX), Ok(()));
        }
        assert_eq!(limiter.held(), 0);
    }

    #[test]
    fn both_buckets_count_and_the_burst_comes_first() {
        let limits = RateLimits { bandwidth: rate(1000, 500, 100), operations: rate(3, 0, 1000) };
        let limiter = RateLimiter::new(limits);
        let now = Instant::now();
        assert_eq!(limiter.admit_at(500, now), Ok(()), "the burst");
        assert_eq!(limiter.admit_at(999, now), Ok(()));
        assert_eq!(limiter.admit_at(2001, now), Ok(()), "one token is left, and a debt of 2000 begins");
        let wait = limiter.admit_at(1, now).expect_err("neither bytes nor operations are left");
        assert_eq!(wait, nanos(333_333_334), "the longer of the two");
        assert_eq!(limiter.admit_at(1, now + Duration::from_millis(200)).err().map(|w| w.as_millis()), Some(133));
        assert_eq!(limiter.admit_at(1, now + Duration::from_millis(334)), Ok(()));
        assert_eq!(limiter.held(), 2);
    }

    proptest! {
        /// Whoever asks, waits and asks again gets through at the second time; and never more than the burst, a full bucket, the
        /// rate, and one last request together.
        #[test]
        fn over_time_no_more_than_the_rate_goes_through(
            size in 1_u64..5000, burst in 0_u64..5000, ms in 1_u64..2000,
            costs in prop::collection::vec((0_u64..20_000, 0_u64..50_000_000), 1..60),
        ) {
            let limiter = RateLimiter::new(RateLimits { bandwidth: rate(size, burst, ms), operations: None });
            let start = Instant::now();
            let (mut now, mut sum, mut last) = (start, 0_u128, 0);
            for (cost, pause) in costs {
                now += Duration::from_nanos(pause);
                if let Err(wait) = limiter.admit_at(cost, now) {
                    prop_assert!(wait > Duration::ZERO);
                    now += wait;
                    prop_assert_eq!(limiter.admit_at(cost, now), Ok(()), "after the wait that was named");
                }
                (sum, last) = (sum + u128::from(cost), cost);
                let refilled = (now - start).as_nanos() * u128::from(size) / u128::from(ms * 1_000_000) + 1;
                prop_assert!(sum <= u128::from(burst + size + last) + refilled);
            }
            let _ = last;
        }
    }
}
