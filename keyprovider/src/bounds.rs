//! Bounds on what one party writes in a minute. Without them, anybody who can reach the provider could fill the customers'
//! audit logs with his refusals, and a tenant with his reports.

use std::cmp::Ordering;
use std::collections::HashMap;
use std::hash::Hash;
use std::sync::{Mutex, PoisonError};

/// Parties that are counted apart; strangers may name any.
const PARTIES: usize = 10_000;

const MINUTE_US: u64 = 60_000_000;

/// Whether a party may do one more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Allowance {
    /// Yes.
    Yes,
    /// No, and this is the first time in this minute.
    Spent,
    /// No.
    No,
}

/// So many a minute for each party.
#[derive(Debug)]
pub struct PerMinute<K> {
    limit: u32,
    counts: Mutex<HashMap<K, (u64, u32)>>,
}

impl<K: Eq + Hash + Clone> PerMinute<K> {
    /// At most `limit` a minute.
    pub fn new(limit: u32) -> Self {
        Self { limit, counts: Mutex::default() }
    }

    /// Whether this party may do one more.
    pub fn allow(&self, party: &K, now_us: u64) -> Allowance {
        let mut all = self.counts.lock().unwrap_or_else(PoisonError::into_inner);
        if all.len() >= PARTIES {
            all.retain(|_, (since, _)| now_us.saturating_sub(*since) < MINUTE_US);
        }
        if all.len() >= PARTIES && !all.contains_key(party) {
            return Allowance::No;
        }
        let (since, count) = all.entry(party.clone()).or_insert((now_us, 0));
        if now_us.saturating_sub(*since) >= MINUTE_US {
            (*since, *count) = (now_us, 0);
        }
        *count = count.saturating_add(1);
        match (*count).cmp(&self.limit.saturating_add(1)) {
            Ordering::Less => Allowance::Yes,
            Ordering::Equal => Allowance::Spent,
            Ordering::Greater => Allowance::No,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attack_39_nobody_fills_a_log() {
        let all = PerMinute::new(7);
        let allowed =
            |party: &str, now| (0..1000).filter(|_| all.allow(&party.to_owned(), now) == Allowance::Yes).count();
        assert_eq!(allowed("acme", 5), 7);
        assert_eq!(allowed("other", 5), 7);
        assert_eq!(allowed("acme", 4 + MINUTE_US), 0);
        assert_eq!(allowed("acme", 5 + MINUTE_US), 7);
    }

    #[test]
    fn the_end_of_an_allowance_is_said_once_a_minute() {
        let all = PerMinute::new(2);
        let said = |now| [(); 5].map(|()| all.allow(&1, now));
        use Allowance::{No, Spent, Yes};
        assert_eq!(said(5), [Yes, Yes, Spent, No, No]);
        assert_eq!(said(5 + MINUTE_US), [Yes, Yes, Spent, No, No]);
    }

    #[test]
    fn many_names_take_no_more_memory_than_few() {
        let all = PerMinute::new(1);
        let allowed = (0..2 * PARTIES).filter(|n| all.allow(n, 5) == Allowance::Yes).count();
        assert_eq!(allowed, PARTIES);
    }
}
