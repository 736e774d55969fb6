//! Keys of sealed streams: core dumps.

use super::{Answer, customer, seal};
use crate::api::{KeyRequest, SealedKey, StreamView};
use crate::keystore::KeyLabel;
use crate::provider::Provider;
use crate::server::body::{At, Json as Body};
use crate::server::gate::Caller;
use crate::server::problem::Refusal;
use crate::store::audit::{Draft, append};
use crate::store::vms;
use axum::Json;
use axum::extract::State;
use policy::audit::AuditKind;
use policy::{CustomerId, KeyId};
use std::sync::Arc;

/// Sealed streams of a customer, newest first.
pub async fn list(State(provider): State<Arc<Provider>>, At(id): At<CustomerId>) -> Answer<Vec<StreamView>> {
    let mut reader = provider.db.read().await?;
    customer(&mut reader, &id).await?;
    let view = |s: vms::Stream| StreamView {
        key_id: s.key_id,
        vm: s.vm,
        instance: s.instance,
        created_us: s.created_us,
        tag: s.tag,
    };
    Ok(Json(vms::streams(&mut reader, &id).await?.into_iter().map(view).collect()))
}

/// Hands out the key of a core dump.
pub async fn open(
    State(provider): State<Arc<Provider>>,
    caller: Caller,
    At((id, key_id)): At<(CustomerId, KeyId)>,
    Body(request): Body<KeyRequest>,
) -> Answer<SealedKey> {
    let now_us = provider.clock.now_us();
    let mut tx = provider.db.write().await?;
    customer(&mut tx, &id).await?;
    let found = vms::streams(&mut tx, &id).await?.into_iter().find(|s| s.key_id == key_id);
    let stream = found.ok_or_else(|| Refusal::missing(format!("sealed stream {key_id} of {id}")))?;
    let key = provider.keys.unwrap_32(KeyLabel::Stream(&id, &stream.vm, key_id), &stream.wrapped)?;
    let sealed = seal(&request, &id, stream.vm.as_str(), key_id, &key)?;
    let draft = Draft::new(&id, caller.actor(), AuditKind::DumpOpened)
        .vm(&stream.vm)
        .instance(stream.instance)
        .detail("key_id", key_id);
    append(&mut tx, now_us, draft).await?;
    tx.commit().await?;
    Ok(Json(sealed))
}
