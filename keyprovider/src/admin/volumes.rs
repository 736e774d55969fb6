//! Volumes, and the sessions in which the customer's tool holds one.

use super::{Answer, Created, conflict, customer, done, seal};
use crate::api::{
    ConfirmVolume, Done, KeyRequest, NewVolume, SessionAnchor, SessionEnd, SessionEvent, SessionSize, SessionView,
    VolumeView,
};
use crate::attestation::{LEASE_MARGIN_US, confirmed};
use crate::instance::{keep_anchor, keep_size, move_anchor};
use crate::keystore::KeyLabel;
use crate::provider::Provider;
use crate::server::body::{At, Json as Body};
use crate::server::gate::Caller;
use crate::server::problem::Refusal;
use crate::store::audit::{Draft, append};
use crate::store::volumes::{self, Holder, HolderKind, Volume};
use crate::store::{StoreError, new_key_id};
use attest::protocol::ProblemType;
use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use policy::anchor::AnchorStep;
use policy::audit::{Actor, AuditKind};
use policy::disk::{CipherSuite, VolumeGrant};
use policy::{AnchorMode, Base64Url, CustomerId, KeyId, VolumeAnchor, VolumeId};
use secretmem::Secret;
use sqlx::SqliteConnection;
use std::sync::Arc;

/// How long a session lasts without a renewal, in seconds.
pub const SESSION_SECONDS: u32 = 120;

/// The longest text of an event, in bytes.
const TEXT: usize = 512;

/// Every volume of a customer.
pub async fn list(State(provider): State<Arc<Provider>>, At(id): At<CustomerId>) -> Answer<Vec<VolumeView>> {
    let now_us = provider.clock.now_us();
    let mut reader = provider.db.read().await?;
    customer(&mut reader, &id).await?;
    let mut views = Vec::new();
    for volume in volumes::list(&mut reader, &id).await? {
        let holder = volumes::holder(&mut reader, &volume.id).await?.filter(|h| holds(h, now_us));
        views.push(view(volume, holder.as_ref()));
    }
    Ok(Json(views))
}

/// Creates a volume: its id and its key-encryption key.
pub async fn create(
    State(provider): State<Arc<Provider>>,
    caller: Caller,
    At(id): At<CustomerId>,
    Body(new): Body<NewVolume>,
) -> Created<VolumeView> {
    let now_us = provider.clock.now_us();
    let mut tx = provider.db.write().await?;
    customer(&mut tx, &id).await?;
    let volume = make(&provider, &mut tx, &caller, &id, &new.name, now_us).await?;
    tx.commit().await?;
    Ok((StatusCode::CREATED, Json(view(volume, None))))
}

/// A new volume in the database: its id, its name, its key-encryption key.
pub(super) async fn make(
    provider: &Provider,
    c: &mut SqliteConnection,
    caller: &Caller,
    id: &CustomerId,
    name: &str,
    now_us: u64,
) -> Result<Volume, Refusal> {
    if name.parse::<policy::VmId>().is_err() {
        let what = "a volume's name is 1 to 63 of a-z, 0-9 and '-', neither first nor last '-'";
        return Err(Refusal::new(ProblemType::BadRequest, what));
    }
    let volume_id = VolumeId::random();
    let (kek_id, kek_wrapped) = new_kek(provider, c, id, &volume_id).await?;
    let volume = Volume {
        id: volume_id,
        customer: id.clone(),
        name: name.to_owned(),
        kek_id,
        kek_wrapped,
        key_id: None,
        next_open: 1,
        anchor: None,
        unconfirmed: false,
        size: None,
        retired: false,
        rekey: None,
        next_kek: None,
    };
    if !volumes::create(c, &volume, now_us).await? {
        return Err(conflict(format!("{id} has a volume {name} already")));
    }
    let draft = Draft::new(id, caller.actor(), AuditKind::VolumeCreated).volume(volume.id).detail("name", name);
    append(c, now_us, draft).await?;
    Ok(volume)
}

/// A fresh key-encryption key: its id, and its wrapped form.
pub(super) async fn new_kek(
    provider: &Provider,
    c: &mut SqliteConnection,
    customer: &CustomerId,
    volume: &VolumeId,
) -> Result<(KeyId, Vec<u8>), Refusal> {
    let id = new_key_id(c).await?;
    let key = Secret::<32>::random().map_err(crate::keystore::KeyStoreError::from)?;
    Ok((id, provider.keys.wrap(KeyLabel::Volume(customer, volume, id), key.expose())?))
}

/// Confirms a volume's anchor after a restore, or moves it forward to what the volume itself shows.
pub async fn confirm(
    State(provider): State<Arc<Provider>>,
    caller: Caller,
    At((id, name)): At<(CustomerId, String)>,
    Body(request): Body<ConfirmVolume>,
) -> Answer<VolumeView> {
    let now_us = provider.clock.now_us();
    let mut tx = provider.db.write().await?;
    let volume = find(&mut tx, &id, &name).await?;
    if !volume.unconfirmed {
        return Err(conflict(format!("volume {name} waits for no confirmation")));
    }
    let mut rewrapped = false;
    if let Some(anchor) = &request.anchor {
        let forward = volume.anchor.as_ref().map_or(anchor.volume() == volume.id, |old| {
            matches!(old.step(anchor), AnchorStep::Same | AnchorStep::Forward)
        });
        if !forward {
            return Err(Refusal::new(
                ProblemType::AnchorBackward,
                "the anchor is older than the kept one, or another's",
            ));
        }
        let draft = Draft::new(&id, caller.actor(), AuditKind::AnchorConfirmed);
        rewrapped = move_anchor(&mut tx, &volume, anchor, &draft, now_us).await?;
        volumes::raise_open(&mut tx, &volume, u64::from(anchor.writer()) + 1).await?;
    }
    volumes::confirm(&mut tx, &volume).await?;
    let kept = request.anchor.as_ref().or(volume.anchor.as_ref());
    let draft = Draft::new(&id, caller.actor(), AuditKind::AnchorConfirmed)
        .volume(volume.id)
        .detail("moved", request.anchor.is_some())
        .detail("anchor", kept.map_or("none".into(), text_of));
    append(&mut tx, now_us, draft).await?;
    let volume = find(&mut tx, &id, &name).await?;
    tx.commit().await?;
    if rewrapped {
        provider.db.truncate_log().await;
    }
    Ok(Json(view(volume, None)))
}

/// Gives a volume to the tool for a while: open number, anchor, and the key sealed to it.
pub async fn open(
    State(provider): State<Arc<Provider>>,
    caller: Caller,
    At((id, name)): At<(CustomerId, String)>,
    Body(request): Body<KeyRequest>,
) -> Created<SessionView> {
    let now_us = provider.clock.now_us();
    let mut tx = provider.db.write().await?;
    let volume = find(&mut tx, &id, &name).await?;
    let view = start(&provider, &mut tx, &caller, &volume, &request, now_us).await?;
    tx.commit().await?;
    Ok((StatusCode::CREATED, Json(view)))
}

/// A new session with a volume that is free.
pub(super) async fn start(
    provider: &Provider,
    c: &mut SqliteConnection,
    caller: &Caller,
    volume: &Volume,
    request: &KeyRequest,
    now_us: u64,
) -> Result<SessionView, Refusal> {
    confirmed(c, &volume.customer).await?;
    let mut session = [0; 16];
    getrandom::fill(&mut session).map_err(|_| StoreError::Random)?;
    let (id, until_us) = (&volume.customer, now_us + u64::from(SESSION_SECONDS) * 1_000_000);
    let kind = HolderKind::Session(session);
    let grant = grant(c, volume, AnchorMode::Close, kind, caller.key, until_us, now_us).await?;
    let key = provider.keys.unwrap_32(KeyLabel::Volume(id, &volume.id, volume.kek_id), &volume.kek_wrapped)?;
    let key = seal(request, id, &volume.name, volume.kek_id, &key)?;
    let draft = Draft::new(id, caller.actor(), AuditKind::VolumeSession)
        .volume(volume.id)
        .detail("session", Base64Url::from(&session[..]))
        .detail("open_number", grant.open_number)
        .detail("anchor", grant.anchor.as_ref().map_or("none".into(), text_of));
    append(c, now_us, draft).await?;
    Ok(SessionView { session: session[..].into(), grant, key, seconds: SESSION_SECONDS, size: volume.size })
}

/// Gives a volume to a holder: checks that it is free, takes an open number, and says what the engine needs.
pub async fn grant(
    c: &mut SqliteConnection,
    volume: &Volume,
    anchor_mode: AnchorMode,
    kind: HolderKind,
    client_key: policy::Digest,
    until_us: u64,
    now_us: u64,
) -> Result<VolumeGrant, Refusal> {
    let name = &volume.name;
    let held = |what: String| Refusal::new(ProblemType::VolumeHeld, what);
    if volume.retired {
        return Err(Refusal::new(ProblemType::NotFound, format!("the keys of volume {name} are retired, for good"))
            .hint("destroy what is left of its file: fealty-disk erase FILE --force"));
    }
    if volume.unconfirmed {
        return Err(held(format!("the provider was restored, and nobody has confirmed volume {name}'s anchor yet"))
            .hint(format!("run: fealty-keys volume confirm {} {name}", volume.customer)));
    }
    if let Some(holder) = volumes::holder(c, &volume.id).await? {
        if holds(&holder, now_us) {
            return Err(held_by(name, &holder));
        }
        missing_outcome(c, volume, &holder, Actor::Provider, "its session was lost", now_us).await?;
    }
    // An id is the volume's once an anchor names it; until then each opening gets a fresh one, so that no id ever names two
    // masters.
    let anchored = volume.anchor.as_ref().map(VolumeAnchor::key_id);
    let key_id = match (volume.key_id, anchored) {
        (Some(id), Some(anchored)) if id == anchored => id,
        // A rekey that never came to its anchor: nobody else gets its id, and new writes stay under the key that they had.
        (Some(id), Some(anchored)) if volume.rekey == Some(id) => {
            volumes::give_up_rekey(c, &volume.id, anchored).await?;
            anchored
        }
        _ => volumes::new_write_key(c, volume).await?,
    };
    let open_number = volumes::next_open(c, volume).await?;
    let holder = Holder { kind, client_key, open_number, until_us, operation: None };
    volumes::hold(c, &volume.id, &holder).await?;
    Ok(VolumeGrant {
        volume: volume.id,
        customer: volume.customer.clone(),
        cipher: CipherSuite::Aes256XtsHmacSha256,
        kek_id: volume.kek_id,
        key_id,
        open_number,
        anchor: volume.anchor.clone(),
        anchor_mode,
    })
}

/// Tells of a permitted operation whose outcome never came.
async fn missing_outcome(
    c: &mut SqliteConnection,
    volume: &Volume,
    holder: &Holder,
    actor: Actor,
    why: &str,
    now_us: u64,
) -> Result<(), Refusal> {
    if let Some(operation) = holder.operation {
        let draft = Draft::new(&volume.customer, actor, AuditKind::OperationEnded)
            .volume(volume.id)
            .detail("operation", operation)
            .detail("done", "not said")
            .detail("detail", why);
        append(c, now_us, draft).await?;
    }
    Ok(())
}

pub(super) type SessionPath = At<(CustomerId, String, String)>;

/// Keeps a newer anchor for a session.
pub async fn anchor(
    State(provider): State<Arc<Provider>>,
    caller: Caller,
    At(path): SessionPath,
    Body(update): Body<SessionAnchor>,
) -> Answer<Done> {
    let now_us = provider.clock.now_us();
    let mut tx = provider.db.write().await?;
    let (volume, holder) = session(&mut tx, &caller, &path).await?;
    if update.anchor.volume() != volume.id {
        return Err(Refusal::new(ProblemType::AnchorBackward, "the anchor is another volume's"));
    }
    let draft = Draft::new(&volume.customer, caller.actor(), AuditKind::VolumeAnchored);
    let rewrapped = keep_anchor(&mut tx, &volume.customer, &holder.kind, &update.anchor, false, draft, now_us).await?;
    tx.commit().await?;
    if rewrapped {
        provider.db.truncate_log().await;
    }
    done()
}

/// Writes down what the engine noticed.
pub async fn event(
    State(provider): State<Arc<Provider>>,
    caller: Caller,
    At(path): SessionPath,
    Body(event): Body<SessionEvent>,
) -> Answer<Done> {
    check_text(&event.text)?;
    let now_us = provider.clock.now_us();
    let mut tx = provider.db.write().await?;
    let (volume, _) = session(&mut tx, &caller, &path).await?;
    let draft = Draft::new(&volume.customer, caller.actor(), AuditKind::VolumeEvent)
        .volume(volume.id)
        .detail("text", event.text);
    append(&mut tx, now_us, draft).await?;
    tx.commit().await?;
    done()
}

/// Learns a volume's size.
pub async fn size(
    State(provider): State<Arc<Provider>>,
    caller: Caller,
    At(path): SessionPath,
    Body(size): Body<SessionSize>,
) -> Answer<Done> {
    let now_us = provider.clock.now_us();
    let mut tx = provider.db.write().await?;
    let (volume, _) = session(&mut tx, &caller, &path).await?;
    let draft = Draft::new(&volume.customer, caller.actor(), AuditKind::VolumeResized);
    keep_size(&mut tx, &volume, size.bytes, draft, now_us).await?;
    tx.commit().await?;
    done()
}

/// Extends a session.
pub async fn renew(State(provider): State<Arc<Provider>>, caller: Caller, At(path): SessionPath) -> Answer<Done> {
    let now_us = provider.clock.now_us();
    let mut tx = provider.db.write().await?;
    let (volume, mut holder) = session(&mut tx, &caller, &path).await?;
    holder.until_us = now_us + u64::from(SESSION_SECONDS) * 1_000_000;
    volumes::hold(&mut tx, &volume.id, &holder).await?;
    tx.commit().await?;
    done()
}

/// Ends a session and frees the volume.
pub async fn end(
    State(provider): State<Arc<Provider>>,
    caller: Caller,
    At(path): SessionPath,
    Body(end): Body<SessionEnd>,
) -> Answer<Done> {
    check_text(&end.outcome)?;
    let now_us = provider.clock.now_us();
    let mut tx = provider.db.write().await?;
    let (volume, holder) = session(&mut tx, &caller, &path).await?;
    missing_outcome(&mut tx, &volume, &holder, caller.actor(), &end.outcome, now_us).await?;
    volumes::free(&mut tx, &volume.id).await?;
    let draft = Draft::new(&volume.customer, caller.actor(), AuditKind::VolumeSessionEnded)
        .volume(volume.id)
        .detail("session", &path.2)
        .detail("outcome", end.outcome)
        .detail("anchor", volume.anchor.as_ref().map_or("none".into(), text_of));
    append(&mut tx, now_us, draft).await?;
    tx.commit().await?;
    done()
}

/// The session of a path, if it is the caller's and still holds the volume.
pub(super) async fn session(
    c: &mut SqliteConnection,
    caller: &Caller,
    (id, name, session): &(CustomerId, String, String),
) -> Result<(Volume, Holder), Refusal> {
    let ended = || Refusal::new(ProblemType::VolumeHeld, format!("this session no longer holds volume {name}"));
    let wanted: [u8; 16] = Base64Url::parse(session).and_then(|s| s.0.try_into().ok()).ok_or_else(ended)?;
    let volume = find(c, id, name).await?;
    let holder = volumes::holder(c, &volume.id).await?.ok_or_else(ended)?;
    if holder.kind == HolderKind::Session(wanted) && holder.client_key == caller.key {
        Ok((volume, holder))
    } else {
        Err(ended())
    }
}

pub(super) async fn find(c: &mut SqliteConnection, id: &CustomerId, name: &str) -> Result<Volume, Refusal> {
    volumes::by_name(c, id, name).await?.ok_or_else(|| Refusal::missing(format!("volume {name} of {id}")))
}

/// Whether a holder's lease, with the margin after it, still counts.
pub fn holds(holder: &Holder, now_us: u64) -> bool {
    now_us < holder.until_us.saturating_add(LEASE_MARGIN_US)
}

/// The refusal of what needs a volume that somebody holds.
pub fn held_by(name: &str, holder: &Holder) -> Refusal {
    Refusal::new(ProblemType::VolumeHeld, format!("volume {name} is held by {}", holder_name(holder)))
        .hint("stop that where it runs; if it is gone, its hold ends with its lease: try again then")
}

/// A holder in a message.
pub fn holder_name(holder: &Holder) -> String {
    match &holder.kind {
        HolderKind::Instance(vm, number) => format!("instance {number} of VM {vm}"),
        HolderKind::Session(_) => "a session of the customer's tool".to_owned(),
    }
}

pub(super) fn view(volume: Volume, holder: Option<&Holder>) -> VolumeView {
    VolumeView {
        name: volume.name,
        volume: volume.id,
        writer: volume.anchor.as_ref().map(VolumeAnchor::writer),
        anchor: volume.anchor,
        held_by: holder.map(holder_name),
        unconfirmed: volume.unconfirmed,
        size: volume.size,
        retired: volume.retired,
    }
}

pub(super) fn text_of(anchor: &VolumeAnchor) -> String {
    Base64Url::from(&anchor.as_bytes()[..]).to_string()
}

pub(super) fn check_text(text: &str) -> Result<(), Refusal> {
    if text.len() > TEXT {
        return Err(Refusal::new(ProblemType::BadRequest, format!("a text is at most {TEXT} bytes")));
    }
    Ok(())
}
