//! Inventories: clouds and the TPMs of their hosts.

use super::{Answer, Created, conflict, done, tell};
use crate::api::{CloudView, Done, HostView, NewCloud, NewHost};
use crate::provider::Provider;
use crate::server::body::{At, DOCUMENT, Json as Body};
use crate::server::gate::Caller;
use crate::server::problem::Refusal;
use crate::store::audit::{Draft, append};
use crate::store::inventory::{self, Cloud, CloudKind, Enrolled, Host};
use crate::store::people;
use attest::protocol::ProblemType;
use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use policy::audit::AuditKind;
use policy::{CloudId, CustomerId, Digest, HostId};
use std::sync::Arc;

/// Every cloud.
pub async fn list(State(provider): State<Arc<Provider>>) -> Answer<Vec<CloudView>> {
    let mut reader = provider.db.read().await?;
    let all = inventory::clouds(&mut reader).await?;
    Ok(Json(all.into_iter().map(|(cloud, kind, hosts)| CloudView { cloud, kind, hosts }).collect()))
}

/// Creates a cloud.
pub async fn create(
    State(provider): State<Arc<Provider>>,
    caller: Caller,
    Body(new): Body<NewCloud, DOCUMENT>,
) -> Created<CloudView> {
    if !new.roots.trim().is_empty() {
        crate::attestation::ek::roots(&new.roots)?;
    }
    let cloud = Cloud { id: new.cloud, kind: new.kind, roots: new.roots };
    let now_us = provider.clock.now_us();
    let mut tx = provider.db.write().await?;
    if !inventory::create_cloud(&mut tx, &cloud).await? {
        return Err(conflict(format!("there is a cloud {} already", cloud.id)));
    }
    let draft = |customer: &CustomerId| {
        Draft::new(customer, caller.actor(), AuditKind::CloudCreated)
            .detail("cloud", &cloud.id)
            .detail("kind", cloud.kind.name())
            .detail("roots", Digest::of(cloud.roots.as_bytes()))
    };
    tell(&mut tx, now_us, None, draft).await?;
    tx.commit().await?;
    Ok((StatusCode::CREATED, Json(CloudView { cloud: cloud.id, kind: cloud.kind, hosts: 0 })))
}

/// Hosts of a cloud.
pub async fn hosts(State(provider): State<Arc<Provider>>, At(id): At<CloudId>) -> Answer<Vec<HostView>> {
    let mut reader = provider.db.read().await?;
    let cloud = found(inventory::cloud(&mut reader, &id).await?, &id)?;
    Ok(Json(inventory::hosts(&mut reader, &id).await?.into_iter().map(|host| view(host, &cloud)).collect()))
}

/// Enters a host into an inventory.
pub async fn enroll(
    State(provider): State<Arc<Provider>>,
    caller: Caller,
    At(id): At<CloudId>,
    Body(new): Body<NewHost>,
) -> Created<HostView> {
    if let Some(name) = &new.name
        && (name.is_empty() || name.len() > 64 || name.contains(char::is_control))
    {
        return Err(Refusal::new(ProblemType::BadRequest, "a host's name is 1 to 64 characters"));
    }
    let now_us = provider.clock.now_us();
    let mut tx = provider.db.write().await?;
    let cloud = found(inventory::cloud(&mut tx, &id).await?, &id)?;
    let (host, certificate) = match (&new.certificate, &new.ek_public) {
        (Some(certificate), None) => {
            (crate::attestation::ek::enroll(&cloud, certificate, now_us)?, Some(certificate.to_vec()))
        }
        (None, Some(public)) => (pinned(public)?, None),
        _ => {
            let what = "a host is enrolled by its certificate or by its endorsement key, one of the two";
            return Err(Refusal::new(ProblemType::BadRequest, what));
        }
    };
    let host = Host { id: host, cloud: id.clone(), name: new.name, certificate };
    match inventory::enroll(&mut tx, &host, now_us).await? {
        Enrolled::Conflict => {
            return Err(conflict(format!("host {} or its name is enrolled already, otherwise", host.id))
                .hint("a host's identity never changes: a new TPM is a new host under a new name"));
        }
        Enrolled::Already => return Ok((StatusCode::OK, Json(view(host, &cloud)))),
        Enrolled::New => {}
    }
    for customer in people::customers_of_cloud(&mut tx, &id).await? {
        let draft = Draft::new(&customer, caller.actor(), AuditKind::HostEnrolled)
            .host(host.id)
            .detail("cloud", &id)
            .detail("kind", cloud.kind.name())
            .detail("pinned", host.certificate.is_none());
        append(&mut tx, now_us, draft).await?;
    }
    tx.commit().await?;
    Ok((StatusCode::CREATED, Json(view(host, &cloud))))
}

/// Takes a host out of an inventory: no VM starts on it, and no lease is renewed there, from now on.
pub async fn remove(
    State(provider): State<Arc<Provider>>,
    caller: Caller,
    At((id, host)): At<(CloudId, HostId)>,
) -> Answer<Done> {
    let now_us = provider.clock.now_us();
    let mut tx = provider.db.write().await?;
    if !inventory::remove(&mut tx, &id, &host).await? {
        return Err(Refusal::missing(format!("host {host} in cloud {id}")));
    }
    for customer in people::customers_of_cloud(&mut tx, &id).await? {
        let draft = Draft::new(&customer, caller.actor(), AuditKind::HostRemoved).host(host).detail("cloud", &id);
        append(&mut tx, now_us, draft).await?;
    }
    tx.commit().await?;
    done()
}

fn found(cloud: Option<Cloud>, id: &CloudId) -> Result<Cloud, Refusal> {
    cloud.ok_or_else(|| Refusal::missing(format!("cloud {id}")))
}

fn view(host: Host, cloud: &Cloud) -> HostView {
    HostView {
        host: host.id,
        cloud: host.cloud,
        name: host.name,
        pinned: host.certificate.is_none(),
        lab: cloud.kind == CloudKind::Lab,
    }
}

/// The host of a pinned key: a TPM's public area, or a SubjectPublicKeyInfo.
fn pinned(bytes: &[u8]) -> Result<HostId, Refusal> {
    let public = attest::tpm::Public::parse(bytes).or_else(|_| attest::tpm::Public::parse_sized(bytes));
    match public {
        Ok(public) => {
            attest::tpm::check_ek(&public).map_err(|e| Refusal::unreadable("not an endorsement key", &e))?;
            Ok(public.host_id())
        }
        // Hashed as it is: a key that no TPM has matches no host.
        Err(_) if bytes.starts_with(&[0x30]) && (64..=1024).contains(&bytes.len()) => Ok(HostId(Digest::of(bytes))),
        Err(error) => Err(Refusal::unreadable("not a TPM's public area or a SubjectPublicKeyInfo", &error)),
    }
}
