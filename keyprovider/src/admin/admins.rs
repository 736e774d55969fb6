//! Administrators: registered by name, role and key; a certificate alone opens nothing.

use super::{Answer, Created, conflict, done, tell};
use crate::api::{AdminCertificate, AdminView, Done, NewAdmin};
use crate::authority::AuthorityError;
use crate::provider::Provider;
use crate::server::body::{At, Json as Body};
use crate::server::gate::Caller;
use crate::server::problem::Refusal;
use crate::store::audit::Draft;
use crate::store::people::{self, Admin};
use attest::protocol::ProblemType;
use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use policy::audit::{Actor, AuditKind};
use policy::{CustomerId, Digest};
use std::sync::Arc;

/// Every administrator.
pub async fn list(State(provider): State<Arc<Provider>>) -> Answer<Vec<AdminView>> {
    let mut reader = provider.db.read().await?;
    let all = people::admins(&mut reader).await?;
    let view = |(admin, key, revoked): (Admin, Digest, bool)| AdminView {
        name: admin.name,
        role: admin.role,
        customer: admin.customer,
        key,
        revoked,
    };
    Ok(Json(all.into_iter().map(view).collect()))
}

/// Registers an administrator and signs its certificate.
pub async fn create(
    State(provider): State<Arc<Provider>>,
    caller: Caller,
    Body(new): Body<NewAdmin>,
) -> Created<AdminCertificate> {
    let made = register(&provider, caller.actor(), new).await?;
    tracing::info!("administrator {} was made by {:?}", made.0, caller.actor());
    Ok((StatusCode::CREATED, Json(made.1)))
}

/// The same, for the first one, whom nobody admits.
pub async fn register(provider: &Provider, actor: Actor, new: NewAdmin) -> Result<(String, AdminCertificate), Refusal> {
    let allowed = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-' | b'@');
    if !(1..=64).contains(&new.name.len()) || !new.name.bytes().all(allowed) {
        let what = "an administrator's name is 1 to 64 letters, digits, '.', '_', '-' and '@'";
        return Err(Refusal::new(ProblemType::BadRequest, what));
    }
    let now_us = provider.clock.now_us();
    let certificate = provider.admin_authority.admin(&new.name, &new.public, now_us).map_err(|error| match error {
        AuthorityError::PublicKey => Refusal::unreadable("public", &error),
        other => {
            tracing::error!("{}", crate::server::problem::chain(&other));
            Refusal::new(ProblemType::Unavailable, "the certificate can't be made")
        }
    })?;
    let mut tx = provider.db.write().await?;
    if let Some(customer) = &new.customer {
        super::customer(&mut tx, customer).await?;
    }
    let admin = Admin { name: new.name, role: new.role, customer: new.customer };
    if !people::add_admin(&mut tx, &admin, &Digest::of(&new.public), now_us).await? {
        return Err(conflict(format!("there is an administrator {} already, or one with this key", admin.name)));
    }
    let draft = |customer: &CustomerId| {
        Draft::new(customer, actor.clone(), AuditKind::AdminCreated)
            .detail("name", &admin.name)
            .detail("role", admin.role.name())
            .detail("key", Digest::of(&new.public))
            .detail("scope", admin.customer.as_ref().map_or("all customers", CustomerId::as_str))
    };
    tell(&mut tx, now_us, admin.customer.as_ref(), draft).await?;
    tx.commit().await?;
    Ok((admin.name, AdminCertificate { certificate: certificate.to_vec().into() }))
}

/// Revokes an administrator.
pub async fn revoke(State(provider): State<Arc<Provider>>, caller: Caller, At(name): At<String>) -> Answer<Done> {
    if caller.admin.as_ref().is_some_and(|a| a.name == name) {
        return Err(conflict("nobody revokes himself: the last administrator would be gone"));
    }
    let now_us = provider.clock.now_us();
    let mut tx = provider.db.write().await?;
    let admins = people::admins(&mut tx).await?;
    let found = admins.into_iter().find(|(admin, ..)| admin.name == name);
    let (admin, key, _) = found.ok_or_else(|| Refusal::missing(format!("administrator {name}")))?;
    people::revoke_admin(&mut tx, &name).await?;
    let draft = |customer: &CustomerId| {
        Draft::new(customer, caller.actor(), AuditKind::AdminRevoked).detail("name", &name).detail("key", key)
    };
    tell(&mut tx, now_us, admin.customer.as_ref(), draft).await?;
    tx.commit().await?;
    tracing::info!("administrator {name} was revoked by {:?}", caller.actor());
    done()
}
