//! What the customer's people may do. The gate has admitted them already; every act that changes something (a session's renewal
//! apart) is written to the customer's audit log in the transaction that does it; acts that concern every customer, to all logs.

pub mod admins;
pub mod backups;
pub mod clouds;
pub mod customers;
pub mod operations;
pub mod streams;
pub mod vms;
pub mod volumes;

use crate::api::{Done, KeyRequest, SealedKey, key_info};
use crate::server::problem::Refusal;
use crate::store::StoreError;
use crate::store::audit::{Draft, append};
use crate::store::people::{self, Customer};
use attest::protocol::ProblemType;
use axum::Json;
use axum::http::StatusCode;
use policy::{CustomerId, KeyId};
use secretmem::Secret;
use sqlx::SqliteConnection;

/// What a handler answers.
pub type Answer<T> = Result<Json<T>, Refusal>;

/// What a handler that makes something answers.
pub type Created<T> = Result<(StatusCode, Json<T>), Refusal>;

/// Appends what `draft` makes to the log of `customer`, or, where there is none, of every customer.
async fn tell(
    c: &mut SqliteConnection,
    now_us: u64,
    customer: Option<&CustomerId>,
    draft: impl Fn(&CustomerId) -> Draft,
) -> Result<(), StoreError> {
    let customers = match customer {
        Some(customer) => vec![customer.clone()],
        None => people::customers(c).await?.into_iter().map(|(id, _)| id).collect(),
    };
    for customer in &customers {
        append(c, now_us, draft(customer)).await?;
    }
    Ok(())
}

fn done() -> Answer<Done> {
    Ok(Json(Done { done: true }))
}

async fn customer(c: &mut SqliteConnection, id: &CustomerId) -> Result<Customer, Refusal> {
    people::customer(c, id).await?.ok_or_else(|| Refusal::missing(format!("customer {id}")))
}

fn conflict(what: impl std::fmt::Display) -> Refusal {
    Refusal::new(ProblemType::Conflict, what.to_string())
}

/// Seals a key to the tool that asked for it.
fn seal(
    request: &KeyRequest,
    customer: &CustomerId,
    what: &str,
    id: KeyId,
    key: &Secret<32>,
) -> Result<SealedKey, Refusal> {
    let bad = |_| Refusal::new(ProblemType::BadRequest, "public is not an X25519 public key of 32 bytes");
    let public: [u8; 32] = request.public[..].try_into().map_err(bad)?;
    let info = key_info(customer, what, id);
    let sealed = attest::hpke::seal_x25519(&public, info.as_bytes(), b"", key.expose());
    let sealed = sealed.map_err(|e| Refusal::unreadable("the key can't be sealed to this public key", &e))?;
    Ok(SealedKey { key_id: id, sealed: sealed.into() })
}
