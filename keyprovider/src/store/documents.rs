//! What the customer says: reference values and policies, every version kept, the highest in force.

use super::{StoreError, number, time_column};
use policy::document::PolicyInForce;
use policy::{CustomerId, Digest};
use sqlx::SqliteConnection;

/// A policy in force.
#[derive(Debug, Clone)]
pub struct Policy {
    /// Its version.
    pub version: u64,
    /// The document, as signed.
    pub document: String,
    /// The customer's Ed25519 signature.
    pub signature: Vec<u8>,
}

impl Policy {
    /// As a release names it.
    pub fn in_force(&self) -> PolicyInForce {
        let document = Digest::of(self.document.as_bytes());
        PolicyInForce { version: self.version, document, signature: self.signature.clone().into() }
    }
}

/// The reference values in force: version and document.
pub async fn reference(c: &mut SqliteConnection, customer: &CustomerId) -> Result<Option<(u64, String)>, StoreError> {
    let row: Option<(i64, String)> = sqlx::query_as(
        "SELECT version, document FROM reference_values WHERE customer = ? ORDER BY version DESC LIMIT 1",
    )
    .bind(customer.as_str())
    .fetch_optional(c)
    .await?;
    Ok(row.map(|(version, document)| (number(version), document)))
}

/// Puts new reference values in force and returns their version.
pub async fn set_reference(
    c: &mut SqliteConnection,
    customer: &CustomerId,
    document: &str,
    now_us: u64,
) -> Result<u64, StoreError> {
    let version = reference(c, customer).await?.map_or(0, |(v, _)| v) + 1;
    sqlx::query("INSERT INTO reference_values (customer, version, document, set_us) VALUES (?, ?, ?, ?)")
        .bind(customer.as_str())
        .bind(time_column(version))
        .bind(document)
        .bind(time_column(now_us))
        .execute(c)
        .await?;
    Ok(version)
}

/// The policy in force.
pub async fn policy(c: &mut SqliteConnection, customer: &CustomerId) -> Result<Option<Policy>, StoreError> {
    let row: Option<(i64, String, Vec<u8>)> = sqlx::query_as(
        "SELECT version, document, signature FROM policies WHERE customer = ? ORDER BY version DESC LIMIT 1",
    )
    .bind(customer.as_str())
    .fetch_optional(c)
    .await?;
    Ok(row.map(|(version, document, signature)| Policy { version: number(version), document, signature }))
}

/// Puts a policy in force; its version must have been checked to be higher than the one in force.
pub async fn set_policy(
    c: &mut SqliteConnection,
    customer: &CustomerId,
    policy: &Policy,
    now_us: u64,
) -> Result<(), StoreError> {
    sqlx::query("INSERT INTO policies (customer, version, document, signature, set_us) VALUES (?, ?, ?, ?, ?)")
        .bind(customer.as_str())
        .bind(time_column(policy.version))
        .bind(&policy.document)
        .bind(&policy.signature)
        .bind(time_column(now_us))
        .execute(c)
        .await?;
    Ok(())
}
