//! Bounds on what one party writes in a minute. Without them, anybody who can reach the provider could fill the customers'
//! audit logs with his refusals, and a tenant with his reports.

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
    /// No, and this is said for the first time in a minute.
    Spent,
    /// No.
    No,
}

/// So many a minute for each party: as many at once, and then one whenever its time has come, so that whoever goes on all the while is
/// slowed down and never stopped for long.
#[derive(Debug)]
pub struct PerMinute<K> {
    /// Microseconds that one takes up of a minute.
    cost_us: u64,
    accounts: Mutex<HashMap<K, Account>>,
}

#[derive(Debug, Default)]
struct Account {
    /// When what was done is paid for, up to a minute ahead.
    paid_us: u64,
    /// When it was last said that nothing is left.
    said_us: Option<u64>,
}

impl Account {
    fn said_lately(&self, now_us: u64) -> bool {
        self.said_us.is_some_and(|said| now_us.saturating_sub(said) < MINUTE_US)
    }
}

impl<K: Eq + Hash + Clone> PerMinute<K> {
    /// At most `limit` a minute in the long run, 1 to 60 million.
    pub fn new(limit: u32) -> Self {
        Self { cost_us: MINUTE_US / u64::from(limit), accounts: Mutex::default() }
    }

    /// Whether this party may do one more.
    pub fn allow(&self, party: &K, now_us: u64) -> Allowance {
        let mut all = self.accounts.lock().unwrap_or_else(PoisonError::into_inner);
        if all.len() >= PARTIES {
            all.retain(|_, account| account.paid_us > now_us || account.said_lately(now_us));
        }
        if all.len() >= PARTIES && !all.contains_key(party) {
            return Allowance::No;
        }
        let account = all.entry(party.clone()).or_default();
        let most_us = now_us.saturating_add(MINUTE_US);
        // Of a clock that was set back nobody suffers for longer.
        account.paid_us = account.paid_us.clamp(now_us, most_us);
        let paid_us = account.paid_us.saturating_add(self.cost_us);
        if paid_us <= most_us {
            account.paid_us = paid_us;
            Allowance::Yes
        } else if account.said_lately(now_us) {
            Allowance::No
        } else {
            account.said_us = Some(now_us);
            Allowance::Spent
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
        assert_eq!(allowed("acme", 5), 0);
        assert_eq!(allowed("acme", 5 + MINUTE_US), 7);
        assert_eq!(allowed("acme", 5 + 9 * MINUTE_US), 7);
        // A clock that was set back gives nothing away, and takes nothing for long.
        assert_eq!(allowed("acme", 5), 0);
        assert_eq!(allowed("acme", 5 + MINUTE_US), 7);
    }

    #[test]
    fn whoever_goes_on_all_the_while_is_slowed_down_and_not_stopped() {
        let all = PerMinute::new(60);
        let second = MINUTE_US / 60;
        let allowed = |now| (0..1000).filter(|_| all.allow(&1, now) == Allowance::Yes).count();
        assert_eq!(allowed(0), 60);
        for n in 1..500 {
            assert_eq!(allowed(n * second - 1), 0);
            assert_eq!(allowed(n * second), 1);
        }
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
