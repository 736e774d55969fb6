//! VMs and their files. The provider makes the key of each sealing; the tool seals and says what came out; from then on that
//! file and no other gets keys.

use super::{Answer, Created, conflict, customer, done, seal};
use crate::api::{Done, InstanceView, KeyRequest, NewVm, SealedFile, SealedKey, VmView};
use crate::attestation::instance_state;
use crate::keystore::KeyLabel;
use crate::provider::Provider;
use crate::server::body::{At, Json as Body};
use crate::server::gate::Caller;
use crate::server::problem::Refusal;
use crate::store::audit::{Draft, append};
use crate::store::instances;
use crate::store::vms::{self, Vm};
use crate::store::{self, new_key_id, volumes};
use attest::protocol::ProblemType;
use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use policy::audit::AuditKind;
use policy::{CustomerId, Digest, InstanceNumber, VmId};
use secretmem::Secret;
use sqlx::SqliteConnection;
use std::sync::Arc;

type VmPath = At<(CustomerId, VmId)>;

/// Every VM of a customer.
pub async fn list(State(provider): State<Arc<Provider>>, At(id): At<CustomerId>) -> Answer<Vec<VmView>> {
    let now_us = provider.clock.now_us();
    let mut reader = provider.db.read().await?;
    customer(&mut reader, &id).await?;
    let mut views = Vec::new();
    for vm in vms::list(&mut reader, &id).await? {
        let found = vms::find(&mut reader, &id, &vm).await?.ok_or_else(|| Refusal::missing(format!("VM {vm}")))?;
        let instance = instances::last_instance(&mut reader, &id, &vm).await?;
        let waits = found.unconfirmed_until_us > now_us;
        views.push(VmView {
            vm,
            current_file: found.current_file,
            instance: instance.map(|i| InstanceView {
                number: i.number,
                host: i.host,
                state: instance_state(&i, now_us).to_owned(),
                lease_end_us: i.lease_end_us,
                reports: i.report_sequence,
            }),
            unconfirmed_until_us: waits.then_some(found.unconfirmed_until_us),
        });
    }
    Ok(Json(views))
}

/// Creates a VM.
pub async fn create(
    State(provider): State<Arc<Provider>>,
    caller: Caller,
    At(id): At<CustomerId>,
    Body(new): Body<NewVm>,
) -> Created<Done> {
    let now_us = provider.clock.now_us();
    let mut tx = provider.db.write().await?;
    customer(&mut tx, &id).await?;
    // After a restore a VM of this name may have lived before: its numbers go on above that.
    let floor = store::meta(&mut tx, "instance-floor").await?.and_then(|n| n.parse().ok()).unwrap_or(1u64);
    let floor = InstanceNumber::try_from(floor).map_err(|_| store::StoreError::Damaged("instance floor"))?;
    if !vms::create(&mut tx, &id, &new.vm, floor).await? {
        return Err(conflict(format!("{id} has a VM {} already", new.vm)));
    }
    append(&mut tx, now_us, Draft::new(&id, caller.actor(), AuditKind::VmCreated).vm(&new.vm)).await?;
    tx.commit().await?;
    Ok((StatusCode::CREATED, Json(Done { done: true })))
}

/// Makes the key of a sealing.
pub async fn new_key(
    State(provider): State<Arc<Provider>>,
    caller: Caller,
    At((id, vm)): VmPath,
    Body(request): Body<KeyRequest>,
) -> Created<SealedKey> {
    let now_us = provider.clock.now_us();
    let mut tx = provider.db.write().await?;
    find(&mut tx, &id, &vm).await?;
    let key_id = new_key_id(&mut tx).await?;
    let key = Secret::<32>::random().map_err(crate::keystore::KeyStoreError::from)?;
    let wrapped = provider.keys.wrap(KeyLabel::VmFile(&id, &vm, key_id), key.expose())?;
    vms::add_file_key(&mut tx, &id, &vm, key_id, &wrapped, now_us).await?;
    let sealed = seal(&request, &id, vm.as_str(), key_id, &key)?;
    let draft = Draft::new(&id, caller.actor(), AuditKind::VmFileKeyCreated).vm(&vm).detail("key_id", key_id);
    append(&mut tx, now_us, draft).await?;
    tx.commit().await?;
    Ok((StatusCode::CREATED, Json(sealed)))
}

/// Takes what was sealed, and makes it the current file.
pub async fn set_file(
    State(provider): State<Arc<Provider>>,
    caller: Caller,
    At((id, vm)): VmPath,
    Body(sealed): Body<SealedFile>,
) -> Answer<Done> {
    let now_us = provider.clock.now_us();
    let mut tx = provider.db.write().await?;
    find(&mut tx, &id, &vm).await?;
    if sealed.disks.len() > 16 {
        return Err(Refusal::new(ProblemType::BadRequest, "a VM has at most 16 disks"));
    }
    for disk in &sealed.disks {
        if volumes::by_id(&mut tx, &id, &disk.volume).await?.is_none() {
            return Err(Refusal::missing(format!("volume {} of {id}", disk.volume)));
        }
    }
    if !vms::set_file(&mut tx, &id, &vm, sealed.key_id, &sealed.digest, &sealed.disks).await? {
        return Err(conflict(format!("key {} of VM {vm} is unknown or has sealed a file already", sealed.key_id)));
    }
    vms::make_current(&mut tx, &id, &vm, &sealed.digest).await?;
    let draft = Draft::new(&id, caller.actor(), AuditKind::VmFileCurrent)
        .vm(&vm)
        .detail("file", sealed.digest)
        .detail("key_id", sealed.key_id);
    append(&mut tx, now_us, draft).await?;
    tx.commit().await?;
    done()
}

type FilePath = At<(CustomerId, VmId, Digest)>;

/// Hands out the key of a file, to show or edit it.
pub async fn open_file(
    State(provider): State<Arc<Provider>>,
    caller: Caller,
    At((id, vm, digest)): FilePath,
    Body(request): Body<KeyRequest>,
) -> Answer<SealedKey> {
    let now_us = provider.clock.now_us();
    let mut tx = provider.db.write().await?;
    let file = vms::file(&mut tx, &id, &vm, &digest).await?;
    let file = file.ok_or_else(|| Refusal::missing(format!("VM file {digest} of VM {vm}")))?;
    let key = provider.keys.unwrap_32(KeyLabel::VmFile(&id, &vm, file.key_id), &file.wrapped)?;
    let sealed = seal(&request, &id, vm.as_str(), file.key_id, &key)?;
    let draft = Draft::new(&id, caller.actor(), AuditKind::VmFileOpened).vm(&vm).detail("file", digest);
    append(&mut tx, now_us, draft).await?;
    tx.commit().await?;
    Ok(Json(sealed))
}

/// Makes an older file current again.
pub async fn back(
    State(provider): State<Arc<Provider>>,
    caller: Caller,
    At((id, vm, digest)): FilePath,
) -> Answer<Done> {
    let now_us = provider.clock.now_us();
    let mut tx = provider.db.write().await?;
    let before = find(&mut tx, &id, &vm).await?.current_file;
    if vms::file(&mut tx, &id, &vm, &digest).await?.is_none() {
        return Err(Refusal::missing(format!("VM file {digest} of VM {vm}"))
            .hint("only a file that this provider made the key of can be current"));
    }
    vms::make_current(&mut tx, &id, &vm, &digest).await?;
    let draft = Draft::new(&id, caller.actor(), AuditKind::VmFileBack)
        .vm(&vm)
        .detail("file", digest)
        .detail("before", before.map_or("none".into(), |d| d.to_string()));
    append(&mut tx, now_us, draft).await?;
    tx.commit().await?;
    done()
}

/// Takes the newest instance's leave to run: it gets no more leases.
pub async fn revoke(State(provider): State<Arc<Provider>>, caller: Caller, At((id, vm)): VmPath) -> Answer<Done> {
    let now_us = provider.clock.now_us();
    let mut tx = provider.db.write().await?;
    find(&mut tx, &id, &vm).await?;
    let instance = instances::last_instance(&mut tx, &id, &vm).await?;
    let mut instance = instance.ok_or_else(|| Refusal::missing(format!("instance of VM {vm}")))?;
    instance.revoked = true;
    instances::update_instance(&mut tx, &instance).await?;
    let draft = Draft::new(&id, caller.actor(), AuditKind::InstanceRevoked)
        .vm(&vm)
        .instance(instance.number)
        .host(instance.host)
        .detail("lease_end_us", instance.lease_end_us);
    append(&mut tx, now_us, draft).await?;
    tx.commit().await?;
    done()
}

/// After a restore: an administrator vouches that no instance from before it runs. Nothing is to be vouched for once the VM no
/// longer waits: what runs then was started by this provider.
pub async fn confirm(State(provider): State<Arc<Provider>>, caller: Caller, At((id, vm)): VmPath) -> Answer<Done> {
    let now_us = provider.clock.now_us();
    let mut tx = provider.db.write().await?;
    if now_us >= find(&mut tx, &id, &vm).await?.unconfirmed_until_us {
        return Err(conflict(format!("VM {vm} waits for no confirmation")));
    }
    vms::confirm(&mut tx, &id, &vm).await?;
    let draft = Draft::new(&id, caller.actor(), AuditKind::AnchorConfirmed)
        .vm(&vm)
        .detail("confirmed", "no instance from before the restore runs");
    append(&mut tx, now_us, draft).await?;
    tx.commit().await?;
    done()
}

async fn find(c: &mut SqliteConnection, id: &CustomerId, vm: &VmId) -> Result<Vm, Refusal> {
    vms::find(c, id, vm).await?.ok_or_else(|| Refusal::missing(format!("VM {vm} of {id}")))
}
