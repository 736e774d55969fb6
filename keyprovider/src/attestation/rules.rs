//! Parsed policies, kept by customer: parsing takes a thread and milliseconds, a decision microseconds.

use crate::server::problem::chain;
use crate::store::documents::Policy;
use policy::CustomerId;
use policy::document::{PolicyDocument, Settings};
use policy_cedar::CedarPolicy;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

/// A policy that can be asked.
pub struct Rules {
    /// Its version.
    pub version: u64,
    /// Its settings.
    pub settings: Settings,
    /// Its rules.
    pub cedar: CedarPolicy,
}

/// Policies by customer.
#[derive(Default)]
pub struct RulesCache(Mutex<HashMap<CustomerId, Arc<Rules>>>);

impl Rules {
    /// Reads a document; the reason, in one line, where it can't be used.
    pub fn parse(document: &str) -> Result<Self, String> {
        let parsed = PolicyDocument::parse(document).map_err(|e| chain(&e))?;
        let cedar = CedarPolicy::parse(&parsed.rules).map_err(|e| chain(&e))?;
        Ok(Self { version: parsed.settings.version, settings: parsed.settings, cedar })
    }
}

impl RulesCache {
    /// The parsed form of the policy in force.
    pub fn get(&self, customer: &CustomerId, policy: &Policy) -> Result<Arc<Rules>, String> {
        let kept = self.0.lock().unwrap_or_else(PoisonError::into_inner).get(customer).cloned();
        if let Some(rules) = kept.filter(|r| r.version == policy.version) {
            return Ok(rules);
        }
        let rules = Arc::new(Rules::parse(&policy.document)?);
        self.0.lock().unwrap_or_else(PoisonError::into_inner).insert(customer.clone(), rules.clone());
        Ok(rules)
    }
}
