//! What a running VM process may do beside attesting: report, and move its volumes' anchors forward. Its client key is who
//! it is; the path only repeats that. Whatever an older instance sends is refused.

use crate::bounds::{Allowance, PerMinute};
use crate::provider::Provider;
use crate::server::body::{At, Json, Raw, SMALL, parse};
use crate::server::gate::Caller;
use crate::server::problem::Refusal;
use crate::store::audit::{Draft, append};
use crate::store::instances::{self, Instance};
use crate::store::vms;
use crate::store::volumes::{self, Holder, HolderKind, Volume};
use attest::protocol::{AnchorUpdate, ProblemType};
use axum::extract::State;
use axum::http::StatusCode;
use policy::anchor::AnchorStep;
use policy::audit::{Actor, AuditKind};
use policy::operation::Operation;
use policy::report::{Report, ReportEvent, Resized};
use policy::{Digest, InstanceNumber, VmId, VolumeAnchor};
use sqlx::SqliteConnection;
use std::sync::Arc;

/// The longest text of a report, in bytes.
const TEXT: usize = 512;

/// Takes one report.
pub async fn report(
    State(provider): State<Arc<Provider>>,
    caller: Caller,
    At((vm, number)): At<(VmId, InstanceNumber)>,
    Raw(body): Raw<SMALL>,
) -> Result<StatusCode, Refusal> {
    let report: Report = parse(&body)?;
    check_text(&report.event)?;
    let digest = Digest::of(&body);
    let now_us = provider.clock.now_us();
    bounded(&provider, (&provider.reports, "reports"), &caller, &vm, number, now_us).await?;
    let mut tx = provider.db.write().await?;
    let mut instance = running(&mut tx, &caller, &vm, number).await?;
    if report.sequence == instance.report_sequence && digest == instance.report_digest {
        return Ok(StatusCode::NO_CONTENT);
    }
    if instance.ended {
        return Err(Refusal::new(ProblemType::OldInstance, format!("instance {number} has reported its end")));
    }
    if report.sequence != instance.report_sequence + 1 || report.previous != instance.report_digest {
        let refusal = Refusal::new(
            ProblemType::ReportGap,
            format!("report {} does not continue the chain after report {}", report.sequence, instance.report_sequence),
        );
        // Each gap is told once, not once for each retry.
        if instance.gap_at != instance.report_sequence + 1 {
            let draft = of_instance(&instance, AuditKind::ReportGap)
                .detail("expected", instance.report_sequence + 1)
                .detail("received", report.sequence);
            append(&mut tx, now_us, draft).await?;
            instance.gap_at = instance.report_sequence + 1;
            instances::update_instance(&mut tx, &instance).await?;
            tx.commit().await?;
        }
        return Err(refusal);
    }
    instance.report_sequence = report.sequence;
    instance.report_digest = digest;
    let outcome = match &report.event {
        ReportEvent::Outcome { attestation, operation, done, detail, .. } => {
            if *done && *operation == Operation::CoreDump {
                vms::set_stream_tag(&mut tx, &instance, attestation, detail).await?;
            }
            Some(vms::close_permit(&mut tx, &instance, attestation, *operation).await?)
        }
        _ => None,
    };
    append(&mut tx, now_us, draft_of(&instance, &report, digest, outcome)).await?;
    if let ReportEvent::Outcome { operation: Operation::ResizeDisk, resized: Some(resized), .. } = &report.event
        && outcome == Some(true)
    {
        grown(&mut tx, &instance, resized, now_us).await?;
    }
    if matches!(report.event, ReportEvent::Ended { .. }) {
        instance.ended = true;
        volumes::free_all(&mut tx, &instance.customer, &vm).await?;
        missing_outcomes(&mut tx, &instance, now_us).await?;
    }
    instances::update_instance(&mut tx, &instance).await?;
    tx.commit().await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Keeps a newer anchor of a volume that the instance holds.
pub async fn anchor(
    State(provider): State<Arc<Provider>>,
    caller: Caller,
    At((vm, number)): At<(VmId, InstanceNumber)>,
    Json(update): Json<AnchorUpdate>,
) -> Result<StatusCode, Refusal> {
    let now_us = provider.clock.now_us();
    bounded(&provider, (&provider.anchors, "anchors"), &caller, &vm, number, now_us).await?;
    let mut tx = provider.db.write().await?;
    let instance = running(&mut tx, &caller, &vm, number).await?;
    let kind = HolderKind::Instance(vm, number);
    let draft = of_instance(&instance, AuditKind::VolumeAnchored);
    let rewrapped =
        keep_anchor(&mut tx, &instance.customer, &kind, &update.anchor, update.closed, draft, now_us).await?;
    tx.commit().await?;
    if rewrapped {
        provider.db.truncate_log().await;
    }
    Ok(StatusCode::NO_CONTENT)
}

/// Keeps an anchor for the volume's holder: only forward, only by the open number that the holder was given. What happens
/// at open and close is logged with `draft`. Says whether a key-encryption key is gone with it: then the log is to be emptied.
pub async fn keep_anchor(
    c: &mut SqliteConnection,
    customer: &policy::CustomerId,
    kind: &HolderKind,
    anchor: &VolumeAnchor,
    closed: bool,
    draft: Draft,
    now_us: u64,
) -> Result<bool, Refusal> {
    let id = anchor.volume();
    let held = || Refusal::new(ProblemType::VolumeHeld, format!("volume {id} is not held by this client"));
    let volume = volumes::by_id(c, customer, &id).await?.filter(|v| !v.retired).ok_or_else(held)?;
    let holder = volumes::holder(c, &id).await?;
    let Some(holder) = holder.filter(|h| h.kind == *kind) else {
        // An answer to a closing anchor can get lost: the same anchor again is no harm.
        return if volume.anchor.as_ref() == Some(anchor) { Ok(false) } else { Err(held()) };
    };
    check_step(&volume.anchor, anchor, &holder)?;
    check_key(&volume, anchor)?;
    let opened = volume.anchor.as_ref().is_none_or(|old| old.writer() != anchor.writer());
    let rewrapped = move_anchor(c, &volume, anchor, &draft, now_us).await?;
    if closed {
        volumes::free(c, &id).await?;
    }
    if opened || closed {
        let draft = draft
            .volume(id)
            .detail("at", if closed { "close" } else { "open" })
            .detail("open_number", anchor.writer())
            .detail("anchor", policy::Base64Url::from(&anchor.as_bytes()[..]));
        append(c, now_us, draft).await?;
    }
    Ok(rewrapped)
}

/// Keeps an anchor that was found to be a later one. The first that names the key-encryption key of a rewrap puts that in the
/// place of the one before; says whether this is that one.
pub async fn move_anchor(
    c: &mut SqliteConnection,
    volume: &Volume,
    anchor: &VolumeAnchor,
    draft: &Draft,
    now_us: u64,
) -> Result<bool, Refusal> {
    let next = volume.next_kek.as_ref().map(|(id, _)| *id);
    let rewrapped = match anchor.kek_id() {
        Some(kek) if kek != volume.kek_id && Some(kek) == next => Some(kek),
        Some(kek) if kek != volume.kek_id => {
            let why = format!("the anchor's key slots are wrapped under key {kek}, which this provider does not have");
            return Err(Refusal::new(ProblemType::AnchorBackward, why).hint("restore a newer backup of the provider"));
        }
        None if volume.anchor.as_ref().is_some_and(|old| old.kek_id().is_some()) => {
            let why = "the anchor does not say which key wraps its key slots, and the one before did";
            return Err(Refusal::new(ProblemType::AnchorBackward, why.to_owned()));
        }
        _ => None,
    };
    volumes::set_anchor(c, &volume.id, anchor).await?;
    if let Some(kek) = rewrapped {
        volumes::end_rewrap(c, &volume.id).await?;
        let draft = draft.clone().kind(AuditKind::VolumeRewrapped).volume(volume.id);
        append(c, now_us, draft.detail("old_kek", volume.kek_id).detail("kek", kek)).await?;
    }
    Ok(rewrapped.is_some())
}

/// Keeps the size of a volume that was made larger under the instance that holds it. Of a volume that it does not hold, or where more is
/// known already, what it says stands in the report's event alone.
async fn grown(c: &mut SqliteConnection, instance: &Instance, resized: &Resized, now_us: u64) -> Result<(), Refusal> {
    let volume = volumes::by_id(c, &instance.customer, &resized.volume).await?;
    let holder = volumes::holder(c, &resized.volume).await?;
    let held = holder.is_some_and(|h| h.kind == HolderKind::Instance(instance.vm.clone(), instance.number));
    let bytes = resized.size.bytes();
    match volume.filter(|volume| held && volume.size.is_none_or(|known| known < bytes)) {
        Some(volume) => keep_size(c, &volume, bytes, of_instance(instance, AuditKind::VolumeResized), now_us).await,
        None => Ok(()),
    }
}

/// Keeps the size of a volume, in bytes; logged with `draft` where it is another one than so far.
pub async fn keep_size(
    c: &mut SqliteConnection,
    volume: &Volume,
    bytes: u64,
    draft: Draft,
    now_us: u64,
) -> Result<(), Refusal> {
    if volume.size == Some(bytes) {
        return Ok(());
    }
    volumes::set_size(c, &volume.id, bytes).await?;
    let before = volume.size.map_or("unknown".to_owned(), |bytes| bytes.to_string());
    append(c, now_us, draft.volume(volume.id).detail("before", before).detail("size", bytes)).await?;
    Ok(())
}

fn check_step(old: &Option<VolumeAnchor>, new: &VolumeAnchor, holder: &Holder) -> Result<(), Refusal> {
    let backward = |why: &str| Refusal::new(ProblemType::AnchorBackward, why.to_owned());
    if new.writer() != holder.open_number {
        return Err(backward("the anchor was written under another open number than this holder's"));
    }
    match old.as_ref().map(|old| old.step(new)) {
        None | Some(AnchorStep::Same | AnchorStep::Forward) => Ok(()),
        Some(AnchorStep::Backward) => Err(backward("the anchor is older than the one that is kept")),
        Some(AnchorStep::Foreign) => Err(backward("the anchor is another volume's")),
    }
}

/// New writes are sealed under the key whose id this provider issued for them, or under the one so far: nobody rekeys unasked.
fn check_key(volume: &Volume, new: &VolumeAnchor) -> Result<(), Refusal> {
    let id = new.key_id();
    if volume.key_id == Some(id) || volume.anchor.as_ref().map(VolumeAnchor::key_id) == Some(id) {
        return Ok(());
    }
    let why = format!("the anchor names key {id} for new writes, which this provider did not issue for them");
    Err(Refusal::new(ProblemType::AnchorBackward, why))
}

/// Counts what an instance writes, before it takes the one place where something is written. Strangers are turned away
/// uncounted: keys that anybody can make would use up the room for those that count.
async fn bounded(
    provider: &Provider,
    (written, what): (&PerMinute<Digest>, &str),
    caller: &Caller,
    vm: &VmId,
    number: InstanceNumber,
    now_us: u64,
) -> Result<(), Refusal> {
    let mut reader = provider.db.read().await?;
    running(&mut reader, caller, vm, number).await?;
    if written.allow(&caller.key, now_us) == Allowance::Yes {
        return Ok(());
    }
    Err(Refusal::new(ProblemType::TooMuch, format!("too many {what} in a minute")).hint("send it again later"))
}

/// The instance that asks, if it is the newest of its VM.
async fn running(
    c: &mut SqliteConnection,
    caller: &Caller,
    vm: &VmId,
    number: InstanceNumber,
) -> Result<Instance, Refusal> {
    let unknown = || Refusal::new(ProblemType::Forbidden, "this client key belongs to no instance of this VM");
    let instance = instances::instance_by_key(c, &caller.key).await?.filter(|i| i.vm == *vm).ok_or_else(unknown)?;
    let newest = instances::last_instance(c, &instance.customer, vm).await?.map(|i| i.number);
    if instance.number != number || newest != Some(number) {
        return Err(Refusal::new(ProblemType::OldInstance, format!("instance {number} is not the newest of VM {vm}")));
    }
    Ok(instance)
}

/// Tells of permitted operations whose outcome never came.
pub async fn missing_outcomes(c: &mut SqliteConnection, instance: &Instance, now_us: u64) -> Result<(), Refusal> {
    for (attestation, number, operation) in vms::take_open_permits(c, &instance.customer, &instance.vm).await? {
        let draft = Draft::new(&instance.customer, Actor::Provider, AuditKind::ReportGap)
            .vm(&instance.vm)
            .instance(number)
            .host(instance.host)
            .attestation(attestation)
            .detail("missing", format!("the outcome of {operation}"));
        append(c, now_us, draft).await?;
    }
    Ok(())
}

/// Tells that an instance is gone without having reported its end: it was killed, or its report was kept back.
pub async fn missing_end(c: &mut SqliteConnection, instance: &Instance, now_us: u64) -> Result<(), Refusal> {
    let draft = Draft::new(&instance.customer, Actor::Provider, AuditKind::ReportGap)
        .vm(&instance.vm)
        .instance(instance.number)
        .host(instance.host)
        .detail("missing", "its end");
    append(c, now_us, draft).await?;
    Ok(())
}

fn of_instance(instance: &Instance, kind: AuditKind) -> Draft {
    Draft::new(&instance.customer, Actor::Instance, kind).vm(&instance.vm).instance(instance.number).host(instance.host)
}

fn draft_of(instance: &Instance, report: &Report, digest: Digest, permitted: Option<bool>) -> Draft {
    let draft = of_instance(instance, AuditKind::Report)
        .detail("report", report.sequence)
        .detail("digest", digest)
        .detail("boottime_ms", report.boottime_ms);
    match &report.event {
        ReportEvent::Runs => draft.detail("what", "runs"),
        ReportEvent::Operation { operation } => draft.detail("what", "operation").detail("operation", operation),
        ReportEvent::Outcome { attestation, operation, done, detail, resized } => {
            let draft = draft
                .attestation(*attestation)
                .detail("what", "outcome")
                .detail("operation", operation)
                .detail("done", done)
                .detail("permitted", permitted.unwrap_or(false))
                .detail("detail", detail);
            match resized {
                Some(Resized { volume, size }) => draft.volume(*volume).detail("size", size.bytes()),
                None => draft,
            }
        }
        ReportEvent::Quiesced => draft.detail("what", "quiesced"),
        ReportEvent::KeysWiped => draft.detail("what", "keys-wiped"),
        ReportEvent::KeysBack => draft.detail("what", "keys-back"),
        ReportEvent::DiskIntegrity { volume, lba, physical, reason } => {
            let number = |n: &Option<u64>| n.map_or("unknown".to_owned(), |n| n.to_string());
            draft
                .volume(*volume)
                .detail("what", "disk-integrity")
                .detail("lba", number(lba))
                .detail("physical", number(physical))
                .detail("reason", reason)
        }
        ReportEvent::Ended { reason, detail } => {
            let reason = serde_json::to_value(reason).ok().and_then(|v| v.as_str().map(str::to_owned));
            draft.detail("what", "ended").detail("reason", reason.unwrap_or_default()).detail("detail", detail)
        }
    }
}

fn check_text(event: &ReportEvent) -> Result<(), Refusal> {
    let text = match event {
        ReportEvent::Outcome { detail, .. } | ReportEvent::Ended { detail, .. } => detail,
        ReportEvent::DiskIntegrity { reason, .. } => reason,
        _ => return Ok(()),
    };
    if text.len() > TEXT {
        return Err(Refusal::new(ProblemType::BadRequest, format!("a report's text is at most {TEXT} bytes")));
    }
    Ok(())
}
