//! Parsed policies, kept by customer: parsing takes a thread and milliseconds, a decision microseconds.

use crate::server::problem::chain;
use crate::store::StoreError;
use crate::store::documents::{self, Policy};
use crate::store::people::{self, Customer};
use aws_lc_rs::signature::{ED25519, UnparsedPublicKey};
use policy::document::{PolicyDocument, PolicyStatement, Settings};
use policy::{CustomerId, Digest};
use policy_cedar::CedarPolicy;
use sqlx::SqliteConnection;
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

/// Policies by customer, each with the digest of the document that it was read from.
#[derive(Default)]
pub struct RulesCache(Mutex<HashMap<CustomerId, (Digest, Arc<Rules>)>>);

/// Why a document is no policy of a customer's.
#[derive(Debug, thiserror::Error)]
pub enum NotHis {
    /// It can't be read.
    #[error("the policy: {0}")]
    Unreadable(String),
    /// Another key signed it, or none.
    #[error("the policy is not signed by {0}'s policy key")]
    Signature(CustomerId),
    /// It names another customer.
    #[error("the policy is {0}'s, not {1}'s")]
    Customer(CustomerId, CustomerId),
}

impl Rules {
    /// Reads a document that must be signed by the customer, and his.
    pub fn read(document: &str, signature: &[u8], customer: &Customer) -> Result<Self, NotHis> {
        let statement = PolicyStatement::of(document).map_err(|e| NotHis::Unreadable(chain(&e)))?;
        UnparsedPublicKey::new(&ED25519, customer.policy_key)
            .verify(&statement.signed_bytes(), signature)
            .map_err(|_| NotHis::Signature(customer.id.clone()))?;
        let parsed = PolicyDocument::parse(document).map_err(|e| NotHis::Unreadable(chain(&e)))?;
        let cedar = CedarPolicy::parse(&parsed.rules).map_err(|e| NotHis::Unreadable(chain(&e)))?;
        if parsed.settings.customer != customer.id {
            return Err(NotHis::Customer(parsed.settings.customer, customer.id.clone()));
        }
        Ok(Self { version: parsed.settings.version, settings: parsed.settings, cedar })
    }
}

impl RulesCache {
    /// The policy in force and its rules; where there is none that can be used, why.
    pub async fn in_force(
        &self,
        c: &mut SqliteConnection,
        customer: &CustomerId,
    ) -> Result<Result<(Policy, Arc<Rules>), String>, StoreError> {
        let Some(policy) = documents::policy(c, customer).await? else {
            return Ok(Err("the customer has no policy".into()));
        };
        if let Some(rules) = self.kept(customer, &policy) {
            return Ok(Ok((policy, rules)));
        }
        let Some(customer) = people::customer(c, customer).await? else {
            return Ok(Err("there is no such customer".into()));
        };
        let read = self.read(&customer, &policy).map_err(|why| format!("the customer's policy can't be used: {why}"));
        Ok(read.map(|rules| (policy, rules)))
    }

    /// What [`Self::read`] made of this very document before.
    fn kept(&self, customer: &CustomerId, policy: &Policy) -> Option<Arc<Rules>> {
        let digest = Digest::of(policy.document.as_bytes());
        let all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        all.get(customer).filter(|(of, rules)| *of == digest && rules.version == policy.version).map(|(_, r)| r.clone())
    }

    /// Whoever can write to the database can't write the customer's signature, so that is asked for again here, not only when the
    /// policy was set.
    fn read(&self, customer: &Customer, policy: &Policy) -> Result<Arc<Rules>, String> {
        let rules = Rules::read(&policy.document, &policy.signature, customer).map_err(|e| e.to_string())?;
        if rules.version != policy.version {
            return Err(format!("version {} is stored as version {}", rules.version, policy.version));
        }
        let rules = Arc::new(rules);
        let digest = Digest::of(policy.document.as_bytes());
        self.0.lock().unwrap_or_else(PoisonError::into_inner).insert(customer.id.clone(), (digest, rules.clone()));
        Ok(rules)
    }
}
