//! A bound on what refused strangers write into a customer's audit log: so many events a minute, no more. Without it,
//! anybody who can reach the provider could fill its disk.

use policy::CustomerId;
use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

/// Refusals logged for a customer in one minute.
const PER_MINUTE: u32 = 120;

/// Customers that are counted apart; strangers may name any.
const CUSTOMERS: usize = 10_000;

const MINUTE_US: u64 = 60_000_000;

/// Refusals of the last minute, by customer.
#[derive(Debug, Default)]
pub struct Refusals(Mutex<HashMap<CustomerId, (u64, u32)>>);

impl Refusals {
    /// Whether one more may be logged.
    pub fn allow(&self, customer: &CustomerId, now_us: u64) -> bool {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if all.len() >= CUSTOMERS {
            all.retain(|_, (since, _)| now_us.saturating_sub(*since) < MINUTE_US);
        }
        if all.len() >= CUSTOMERS && !all.contains_key(customer) {
            return false;
        }
        let (since, count) = all.entry(customer.clone()).or_insert((now_us, 0));
        if now_us.saturating_sub(*since) >= MINUTE_US {
            (*since, *count) = (now_us, 0);
        }
        *count += 1;
        if *count == PER_MINUTE {
            tracing::warn!(
                "more than {PER_MINUTE} refusals a minute for {customer}: the rest of this minute is not logged"
            );
        }
        *count <= PER_MINUTE
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strangers_fill_no_log() {
        let all = Refusals::default();
        let acme = "acme".parse().expect("label");
        let allowed = |now| (0..1000).filter(|_| all.allow(&acme, now)).count();
        assert_eq!(allowed(5), PER_MINUTE as usize);
        assert_eq!(allowed(5 + MINUTE_US), PER_MINUTE as usize);
    }
}
