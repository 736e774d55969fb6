//! Customers, and what they say: reference values, policy; and what they read: the audit log.

use super::{Answer, Created, conflict, customer, done};
use crate::api::{
    AuditPage, ConfirmCustomer, CustomerView, Done, NewCustomer, ReferenceView, SignedPolicy, TrustView, VersionView,
};
use crate::attestation::rules::{NotHis, Rules};
use crate::provider::Provider;
use crate::server::body::{Asked, At, DOCUMENT, Json as Body};
use crate::server::gate::Caller;
use crate::server::problem::Refusal;
use crate::store::audit::{self, Draft, append};
use crate::store::documents::{self, Policy};
use crate::store::inventory::{self, CloudKind};
use crate::store::people::{self, Customer};
use attest::protocol::ProblemType;
use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use policy::audit::AuditKind;
use policy::{Base64Url, CloudId, CustomerId, Digest, ReferenceValues};
use serde::Deserialize;
use std::sync::Arc;

/// The most audit events in one answer.
const PAGE: u32 = 200;

/// Every customer.
pub async fn list(State(provider): State<Arc<Provider>>) -> Answer<Vec<CustomerView>> {
    let mut reader = provider.db.read().await?;
    let all = people::customers(&mut reader).await?;
    Ok(Json(all.into_iter().map(|(customer, lab)| CustomerView { customer, lab }).collect()))
}

/// Creates a customer.
pub async fn create(
    State(provider): State<Arc<Provider>>,
    caller: Caller,
    Body(new): Body<NewCustomer>,
) -> Created<TrustView> {
    let key: [u8; 32] = new.policy_key[..]
        .try_into()
        .map_err(|_| Refusal::new(ProblemType::BadRequest, "policy_key is not an Ed25519 public key of 32 bytes"))?;
    let customer = Customer { id: new.customer, lab: new.lab, policy_key: key };
    let now_us = provider.clock.now_us();
    let mut tx = provider.db.write().await?;
    if !people::create_customer(&mut tx, &customer, now_us).await? {
        return Err(conflict(format!("there is a customer {} already", customer.id)));
    }
    let draft = Draft::new(&customer.id, caller.actor(), AuditKind::CustomerCreated)
        .detail("lab", customer.lab)
        .detail("policy_key", &new.policy_key);
    append(&mut tx, now_us, draft).await?;
    tx.commit().await?;
    Ok((StatusCode::CREATED, Json(provider.trust(&customer, 0))))
}

/// A customer's trust roots.
pub async fn show(State(provider): State<Arc<Provider>>, At(id): At<CustomerId>) -> Answer<TrustView> {
    let mut reader = provider.db.read().await?;
    let customer = customer(&mut reader, &id).await?;
    let in_force = documents::policy(&mut reader, &id).await?.map_or(0, |p| p.version);
    Ok(Json(provider.trust(&customer, in_force)))
}

/// After a restore: an administrator states which policy and reference values should be in force, and that he has seen who and
/// what came back.
pub async fn confirm(
    State(provider): State<Arc<Provider>>,
    caller: Caller,
    At(id): At<CustomerId>,
    Body(said): Body<ConfirmCustomer>,
) -> Answer<Done> {
    let now_us = provider.clock.now_us();
    let mut tx = provider.db.write().await?;
    customer(&mut tx, &id).await?;
    if !people::unconfirmed(&mut tx, &id).await? {
        return Err(conflict(format!("customer {id} waits for no confirmation")));
    }
    let policy = documents::policy(&mut tx, &id).await?.map_or(0, |p| p.version);
    let reference = documents::reference(&mut tx, &id).await?.map_or(0, |(version, _)| version);
    if (said.policy, said.reference) != (policy, reference) {
        let what = format!("policy version {policy} and reference values version {reference} of {id} are in force");
        return Err(conflict(what).hint("set newer ones where these are not the last that you set, then confirm those"));
    }
    people::set_unconfirmed(&mut tx, &id, false).await?;
    let draft = Draft::new(&id, caller.actor(), AuditKind::RestoreConfirmed)
        .detail("policy", policy)
        .detail("reference", reference);
    append(&mut tx, now_us, draft).await?;
    tx.commit().await?;
    done()
}

/// Lets the customer's VMs run in a cloud.
pub async fn allow_cloud(
    State(provider): State<Arc<Provider>>,
    caller: Caller,
    At((id, cloud)): At<(CustomerId, CloudId)>,
) -> Answer<Done> {
    let now_us = provider.clock.now_us();
    let mut tx = provider.db.write().await?;
    let customer = customer(&mut tx, &id).await?;
    let found = inventory::cloud(&mut tx, &cloud).await?;
    let found = found.ok_or_else(|| Refusal::missing(format!("cloud {cloud}")))?;
    if found.kind == CloudKind::Lab && !customer.lab {
        return Err(Refusal::new(ProblemType::Forbidden, format!("cloud {cloud} is a laboratory; {id} is not"))
            .hint("software TPMs prove nothing: only a customer created with --lab may use them"));
    }
    people::allow_cloud(&mut tx, &id, &cloud).await?;
    let hosts = inventory::hosts(&mut tx, &cloud).await?.len();
    let draft = Draft::new(&id, caller.actor(), AuditKind::HostEnrolled)
        .detail("cloud", &cloud)
        .detail("kind", found.kind.name())
        .detail("hosts", hosts);
    append(&mut tx, now_us, draft).await?;
    tx.commit().await?;
    done()
}

/// The reference values in force.
pub async fn reference(State(provider): State<Arc<Provider>>, At(id): At<CustomerId>) -> Answer<ReferenceView> {
    let mut reader = provider.db.read().await?;
    customer(&mut reader, &id).await?;
    let found = documents::reference(&mut reader, &id).await?;
    let (version, document) = found.ok_or_else(|| Refusal::missing(format!("reference values of {id}")))?;
    let values =
        serde_json::from_str(&document).map_err(|_| crate::store::StoreError::Damaged("set of reference values"))?;
    Ok(Json(ReferenceView { version, values }))
}

/// Puts new reference values in force.
pub async fn set_reference(
    State(provider): State<Arc<Provider>>,
    caller: Caller,
    At(id): At<CustomerId>,
    Body(values): Body<ReferenceValues, DOCUMENT>,
) -> Answer<VersionView> {
    values.check().map_err(|e| Refusal::unreadable("the reference values can't be used", &e))?;
    let document =
        serde_json::to_string(&values).map_err(|e| Refusal::unreadable("the reference values can't be kept", &e))?;
    let now_us = provider.clock.now_us();
    let mut tx = provider.db.write().await?;
    customer(&mut tx, &id).await?;
    let version = documents::set_reference(&mut tx, &id, &document, now_us).await?;
    let draft = Draft::new(&id, caller.actor(), AuditKind::ReferenceSet)
        .detail("version", version)
        .detail("digest", Digest::of(document.as_bytes()));
    append(&mut tx, now_us, draft).await?;
    tx.commit().await?;
    Ok(Json(VersionView { version }))
}

/// The policy in force.
pub async fn policy(State(provider): State<Arc<Provider>>, At(id): At<CustomerId>) -> Answer<SignedPolicy> {
    let mut reader = provider.db.read().await?;
    customer(&mut reader, &id).await?;
    let found = documents::policy(&mut reader, &id).await?;
    let policy = found.ok_or_else(|| Refusal::missing(format!("policy of {id}")))?;
    Ok(Json(SignedPolicy { document: policy.document, signature: policy.signature.into() }))
}

/// Puts a policy in force: signed by the customer, well-formed, and newer than the one in force.
pub async fn set_policy(
    State(provider): State<Arc<Provider>>,
    caller: Caller,
    At(id): At<CustomerId>,
    Body(signed): Body<SignedPolicy, DOCUMENT>,
) -> Answer<VersionView> {
    let mut reader = provider.db.read().await?;
    let customer = customer(&mut reader, &id).await?;
    drop(reader);
    let (document, signature) = (signed.document.clone(), signed.signature.0.clone());
    let read = tokio::task::spawn_blocking(move || Rules::read(&document, &signature, &customer)).await;
    let read = read.unwrap_or_else(|_| Err(NotHis::Unreadable("it broke the parser".into())));
    let rules = read.map_err(|error| match error {
        NotHis::Signature(_) => Refusal::new(ProblemType::Forbidden, error.to_string())
            .hint("sign it with the key that `customer create --policy-key` made"),
        _ => Refusal::new(ProblemType::BadRequest, error.to_string()),
    })?;
    let now_us = provider.clock.now_us();
    let mut tx = provider.db.write().await?;
    let in_force = documents::policy(&mut tx, &id).await?.map_or(0, |p| p.version);
    let version = rules.version;
    if version <= in_force {
        return Err(conflict(format!("policy version {version} is not above {in_force}, which is in force")));
    }
    let policy = Policy { version, document: signed.document, signature: signed.signature.0 };
    documents::set_policy(&mut tx, &id, &policy, now_us).await?;
    let draft = Draft::new(&id, caller.actor(), AuditKind::PolicySet)
        .detail("version", version)
        .detail("digest", Digest::of(policy.document.as_bytes()))
        .detail("require_ptrace_closed", rules.settings.require_ptrace_closed)
        .detail("require_memfd_secret", rules.settings.require_memfd_secret);
    append(&mut tx, now_us, draft).await?;
    tx.commit().await?;
    Ok(Json(VersionView { version }))
}

/// Which part of the audit log.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Range {
    #[serde(default)]
    from: u64,
    #[serde(default)]
    limit: Option<u32>,
}

/// A part of the audit log.
pub async fn audit(
    State(provider): State<Arc<Provider>>,
    At(id): At<CustomerId>,
    Asked(range): Asked<Range>,
) -> Answer<AuditPage> {
    let mut reader = provider.db.read().await?;
    customer(&mut reader, &id).await?;
    let limit = range.limit.unwrap_or(PAGE).min(PAGE);
    let events = audit::list(&mut reader, &id, range.from, limit).await?;
    Ok(Json(AuditPage { events: events.into_iter().map(Base64Url).collect() }))
}
