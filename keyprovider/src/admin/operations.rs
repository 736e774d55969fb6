//! Operations on volumes that need the customer's permission by name: asked for by a session, logged before and after.
//!
//! What the provider does itself when it permits one:
//!
//! - a rekey gets a key id, which is the one for new writes from then on; one that was cut off goes on with the id it had, once an
//!   anchor names it;
//! - a rewrap gets a key-encryption key. The one so far stays until an anchor names the new one: so whatever is cut off where, the
//!   provider has the key that opens the anchored state, and a rewrap that is begun again gets the same one;
//! - a clone gets a volume of its own and a session with it; one of that name that was never filled is taken;
//! - an erasure retires the keys at once: what is left of it, the slots, can be destroyed by anybody and without a key.

use super::volumes::{SessionPath, check_text, find, held_by, holds, make, new_kek, session, start, view};
use super::{Answer, conflict, done, seal};
use crate::api::{Done, KeyRequest, SealedKey, SessionOperation, SessionOutcome, SessionPermit, VolumeView};
use crate::attestation::confirmed;
use crate::keystore::KeyLabel;
use crate::provider::Provider;
use crate::server::body::{At, Json as Body};
use crate::server::gate::Caller;
use crate::server::problem::Refusal;
use crate::store::Write;
use crate::store::audit::{Draft, append};
use crate::store::volumes::{self, HolderKind, Volume};
use attest::protocol::ProblemType;
use axum::Json;
use axum::extract::State;
use policy::audit::AuditKind;
use policy::disk::{VolumeOperation, VolumeRequest};
use policy::{Base64Url, CustomerId, KeyId, VolumeAnchor};
use policy_cedar::{Verdict, VolumeQuestion};
use sqlx::SqliteConnection;
use std::sync::Arc;

/// Decides whether a session may do an operation.
pub async fn begin(
    State(provider): State<Arc<Provider>>,
    caller: Caller,
    At(path): SessionPath,
    Body(asked): Body<SessionOperation>,
) -> Answer<SessionPermit> {
    let SessionOperation { request, key } = asked;
    request.check().map_err(|e| Refusal::unreadable("the operation can't be read", &e))?;
    let now_us = provider.clock.now_us();
    let mut tx = provider.db.write().await?;
    let (volume, mut holder) = session(&mut tx, &caller, &path).await?;
    // The same once more: its answer was lost.
    let again = holder.operation == Some(request.operation);
    if let Some(open) = holder.operation.filter(|open| *open != request.operation) {
        return Err(conflict(format!("this session has begun {open} and not said how it ended")));
    }
    let (mut tx, draft) = allowed(&provider, tx, &caller, &volume, &request, now_us).await?;
    holder.operation = Some(request.operation);
    volumes::hold(&mut tx, &volume.id, &holder).await?;
    let (permit, draft) = match request.operation {
        VolumeOperation::Revert | VolumeOperation::Erase => (SessionPermit::Plain, draft),
        VolumeOperation::Rekey => {
            let id = rekey(&mut tx, &volume).await?;
            (SessionPermit::Key(id), draft.detail("key_id", id))
        }
        VolumeOperation::Rewrap => {
            let sealed = rewrap(&provider, &mut tx, &volume, &key).await?;
            let draft = draft.detail("kek", sealed.key_id);
            (SessionPermit::Kek(sealed), draft)
        }
        VolumeOperation::Clone => {
            let target = target(&provider, &mut tx, &caller, &volume, &request, now_us).await?;
            if again {
                end_lost(&mut tx, &caller, &target, now_us).await?;
            }
            let session = Box::new(start(&provider, &mut tx, &caller, &target, &key, now_us).await?);
            (SessionPermit::Clone { name: target.name, session }, draft.detail("clone", target.id))
        }
    };
    append(&mut tx, now_us, draft).await?;
    if request.operation != VolumeOperation::Erase {
        tx.commit().await?;
        return Ok(Json(permit));
    }
    destroy(&mut tx, &caller, &volume, now_us).await?;
    tx.commit().await?;
    provider.db.truncate_log().await;
    Ok(Json(permit))
}

/// Writes down how an operation ended. Once more, where the answer was lost, it is nothing.
pub async fn ended(
    State(provider): State<Arc<Provider>>,
    caller: Caller,
    At(path): SessionPath,
    Body(outcome): Body<SessionOutcome>,
) -> Answer<Done> {
    check_text(&outcome.detail)?;
    let now_us = provider.clock.now_us();
    let mut tx = provider.db.write().await?;
    let (volume, mut holder) = session(&mut tx, &caller, &path).await?;
    let Some(operation) = holder.operation.take() else { return done() };
    volumes::hold(&mut tx, &volume.id, &holder).await?;
    if operation == VolumeOperation::Rekey && outcome.done {
        volumes::end_rekey(&mut tx, &volume.id).await?;
    }
    let draft = Draft::new(&volume.customer, caller.actor(), AuditKind::OperationEnded)
        .volume(volume.id)
        .detail("operation", operation)
        .detail("done", outcome.done)
        .detail("detail", outcome.detail);
    append(&mut tx, now_us, draft).await?;
    tx.commit().await?;
    done()
}

/// Retires the keys of a volume whose file is gone, or out of reach.
pub async fn retire(
    State(provider): State<Arc<Provider>>,
    caller: Caller,
    At((id, name)): At<(CustomerId, String)>,
) -> Answer<VolumeView> {
    let now_us = provider.clock.now_us();
    let mut tx = provider.db.write().await?;
    let volume = find(&mut tx, &id, &name).await?;
    if volume.retired {
        return Err(conflict(format!("the keys of volume {name} are retired already")));
    }
    if volume.unconfirmed {
        return Err(conflict(format!(
            "the provider was restored, and nobody has confirmed volume {name}'s anchor yet"
        ))
        .hint(format!("run: fealty-keys volume confirm {id} {name}")));
    }
    if let Some(holder) = volumes::holder(&mut tx, &volume.id).await?.filter(|h| holds(h, now_us)) {
        return Err(held_by(&name, &holder));
    }
    let request = VolumeRequest::plain(VolumeOperation::Erase);
    let (mut tx, draft) = allowed(&provider, tx, &caller, &volume, &request, now_us).await?;
    append(&mut tx, now_us, draft).await?;
    destroy(&mut tx, &caller, &volume, now_us).await?;
    let volume = find(&mut tx, &id, &name).await?;
    tx.commit().await?;
    provider.db.truncate_log().await;
    Ok(Json(view(volume, None)))
}

/// Goes on if the customer's policy permits it, with the event's draft; a refusal is logged.
async fn allowed(
    provider: &Provider,
    mut tx: Write,
    caller: &Caller,
    volume: &Volume,
    request: &VolumeRequest,
    now_us: u64,
) -> Result<(Write, Draft), Refusal> {
    let draft = |kind| {
        let draft =
            Draft::new(&volume.customer, caller.actor(), kind).volume(volume.id).detail("operation", request.operation);
        request.parameters.iter().fold(draft, |draft, (name, value)| draft.detail(format!("parameter.{name}"), value))
    };
    confirmed(&mut tx, &volume.customer).await?;
    match decide(provider, &mut tx, caller, volume, request, now_us).await? {
        Verdict::Permit { rules } => Ok((tx, draft(AuditKind::OperationPermitted).detail("rules", rules.join(", ")))),
        Verdict::Refuse { reason } => {
            append(&mut tx, now_us, draft(AuditKind::OperationRefused).detail("reason", &reason)).await?;
            tx.commit().await?;
            let hint = format!(
                "a rule has to name it: permit (principal, action == Action::\"{}\", resource);",
                request.operation
            );
            Err(Refusal::new(ProblemType::PolicyRefuses, reason).hint(hint))
        }
    }
}

async fn decide(
    provider: &Provider,
    c: &mut SqliteConnection,
    caller: &Caller,
    volume: &Volume,
    request: &VolumeRequest,
    now_us: u64,
) -> Result<Verdict, Refusal> {
    let refuse = |reason: String| Ok(Verdict::Refuse { reason });
    let rules = match provider.rules.in_force(c, &volume.customer).await? {
        Ok((_, rules)) => rules,
        Err(why) => return refuse(why),
    };
    let Some(administrator) = &caller.admin else { return refuse("no administrator asks".into()) };
    Ok(rules.cedar.decide_volume(&VolumeQuestion {
        administrator: &administrator.name,
        customer: volume.customer.clone(),
        volume: &volume.name,
        operation: request.operation,
        time_unix_s: now_us / 1_000_000,
        parameters: &request.parameters,
    }))
}

async fn rekey(c: &mut SqliteConnection, volume: &Volume) -> Result<KeyId, Refusal> {
    let anchored = volume.anchor.as_ref().map(VolumeAnchor::key_id);
    match volume.rekey {
        Some(id) if volume.key_id == Some(id) && anchored == Some(id) => Ok(id),
        _ => Ok(volumes::begin_rekey(c, volume).await?),
    }
}

async fn rewrap(
    provider: &Provider,
    c: &mut SqliteConnection,
    volume: &Volume,
    request: &KeyRequest,
) -> Result<SealedKey, Refusal> {
    let (id, wrapped) = match &volume.next_kek {
        Some(begun) => begun.clone(),
        None => {
            let (id, wrapped) = new_kek(provider, c, &volume.customer, &volume.id).await?;
            volumes::begin_rewrap(c, &volume.id, id, &wrapped).await?;
            (id, wrapped)
        }
    };
    let key = provider.keys.unwrap_32(KeyLabel::Volume(&volume.customer, &volume.id, id), &wrapped)?;
    seal(request, &volume.customer, &volume.name, id, &key)
}

/// The volume that is to be a clone: a new one, or one that nobody ever filled.
async fn target(
    provider: &Provider,
    c: &mut SqliteConnection,
    caller: &Caller,
    source: &Volume,
    request: &VolumeRequest,
    now_us: u64,
) -> Result<Volume, Refusal> {
    let missing = || Refusal::new(ProblemType::BadRequest, "a clone needs the parameter name");
    let name = request.parameters.get("name").ok_or_else(missing)?;
    match volumes::by_name(c, &source.customer, name).await? {
        Some(found) if found.anchor.is_some() || found.retired => {
            Err(conflict(format!("{} has a volume {name} already", source.customer))
                .hint("give the clone another name"))
        }
        Some(found) => Ok(found),
        None => make(provider, c, caller, &source.customer, name, now_us).await,
    }
}

/// Ends the session of a clone that the caller was given in an answer that never came, for the next one to take its place.
async fn end_lost(c: &mut SqliteConnection, caller: &Caller, target: &Volume, now_us: u64) -> Result<(), Refusal> {
    let Some(holder) = volumes::holder(c, &target.id).await?.filter(|h| h.client_key == caller.key) else {
        return Ok(());
    };
    let HolderKind::Session(session) = holder.kind else { return Ok(()) };
    volumes::free(c, &target.id).await?;
    let draft = Draft::new(&target.customer, caller.actor(), AuditKind::VolumeSessionEnded)
        .volume(target.id)
        .detail("session", Base64Url::from(&session[..]))
        .detail("outcome", "the answer that gave it was lost")
        .detail("anchor", "none");
    append(c, now_us, draft).await?;
    Ok(())
}

async fn destroy(c: &mut SqliteConnection, caller: &Caller, volume: &Volume, now_us: u64) -> Result<(), Refusal> {
    volumes::retire(c, &volume.id, now_us).await?;
    let draft = Draft::new(&volume.customer, caller.actor(), AuditKind::VolumeRetired)
        .volume(volume.id)
        .detail("kek", volume.kek_id)
        .detail("anchor", volume.anchor.as_ref().map_or("none".into(), super::volumes::text_of));
    append(c, now_us, draft).await?;
    Ok(())
}
