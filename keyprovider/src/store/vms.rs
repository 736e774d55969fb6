//! VMs, their files, and what restricted operations left behind.

use super::instances::{Instance, instance_number};
use super::{StoreError, digest, key_column, key_id, label, number, time_column};
use policy::operation::Operation;
use policy::{AnchorMode, AttestationId, CustomerId, Digest, InstanceNumber, KeyId, VmId, VolumeId};
use serde::{Deserialize, Serialize};
use sqlx::SqliteConnection;

/// A VM.
#[derive(Debug, Clone)]
pub struct Vm {
    /// Digest of the current VM file, once one was sealed.
    pub current_file: Option<Digest>,
    /// The least number its next instance may get.
    pub instance_floor: InstanceNumber,
    /// Until then an instance that a restored database never saw may run; 0 for never restored.
    pub unconfirmed_until_us: u64,
}

/// A sealing of a VM file.
#[derive(Debug, Clone)]
pub struct VmFile {
    /// The key's id.
    pub key_id: KeyId,
    /// The key, wrapped.
    pub wrapped: Vec<u8>,
    /// The volumes that its configuration names.
    pub disks: Vec<FileDisk>,
}

/// A volume that a VM file names.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FileDisk {
    /// The volume.
    pub volume: VolumeId,
    /// How its anchor is kept.
    pub anchor_mode: AnchorMode,
}

/// Creates a VM; false where one of that name exists.
pub async fn create(
    c: &mut SqliteConnection,
    customer: &CustomerId,
    vm: &VmId,
    floor: InstanceNumber,
) -> Result<bool, StoreError> {
    let done = sqlx::query("INSERT OR IGNORE INTO vms (customer, id, instance_floor) VALUES (?, ?, ?)")
        .bind(customer.as_str())
        .bind(vm.as_str())
        .bind(time_column(floor.get()))
        .execute(c)
        .await?;
    Ok(done.rows_affected() == 1)
}

/// A VM by name.
pub async fn find(c: &mut SqliteConnection, customer: &CustomerId, vm: &VmId) -> Result<Option<Vm>, StoreError> {
    let row: Option<(Option<Vec<u8>>, i64, i64)> = sqlx::query_as(
        "SELECT current_file, instance_floor, unconfirmed_until_us FROM vms WHERE customer = ? AND id = ?",
    )
    .bind(customer.as_str())
    .bind(vm.as_str())
    .fetch_optional(c)
    .await?;
    row.map(|(file, floor, until)| {
        Ok(Vm {
            current_file: file.map(|f| digest(&f, "VM file's digest")).transpose()?,
            instance_floor: instance_number(floor)?,
            unconfirmed_until_us: number(until),
        })
    })
    .transpose()
}

/// Every VM of a customer.
pub async fn list(c: &mut SqliteConnection, customer: &CustomerId) -> Result<Vec<VmId>, StoreError> {
    let rows: Vec<(String,)> = sqlx::query_as("SELECT id FROM vms WHERE customer = ? ORDER BY id")
        .bind(customer.as_str())
        .fetch_all(c)
        .await?;
    rows.iter().map(|(id,)| label(id, "VM")).collect()
}

/// An administrator vouches that no instance from before a restore runs any more: those have numbers below the floor.
pub async fn confirm(c: &mut SqliteConnection, customer: &CustomerId, vm: &VmId) -> Result<(), StoreError> {
    for statement in [
        "UPDATE vms SET unconfirmed_until_us = 0 WHERE customer = ?1 AND id = ?2",
        "UPDATE instances SET ended = 1 WHERE customer = ?1 AND vm = ?2
         AND number < (SELECT instance_floor FROM vms WHERE customer = ?1 AND id = ?2)",
    ] {
        sqlx::query(statement).bind(customer.as_str()).bind(vm.as_str()).execute(&mut *c).await?;
    }
    Ok(())
}

/// Keeps the key of a sealing that is about to be made.
pub async fn add_file_key(
    c: &mut SqliteConnection,
    customer: &CustomerId,
    vm: &VmId,
    id: KeyId,
    wrapped: &[u8],
    now_us: u64,
) -> Result<(), StoreError> {
    sqlx::query("INSERT INTO vm_files (customer, vm, key_id, wrapped, sealed_us) VALUES (?, ?, ?, ?, ?)")
        .bind(customer.as_str())
        .bind(vm.as_str())
        .bind(key_column(id))
        .bind(wrapped)
        .bind(time_column(now_us))
        .execute(c)
        .await?;
    Ok(())
}

/// Records what a key sealed: once for each key. False where the key is unknown or has sealed already.
pub async fn set_file(
    c: &mut SqliteConnection,
    customer: &CustomerId,
    vm: &VmId,
    id: KeyId,
    file: &Digest,
    disks: &[FileDisk],
) -> Result<bool, StoreError> {
    let disks = serde_json::to_string(disks).map_err(|_| StoreError::Damaged("list of disks"))?;
    let done = sqlx::query(
        "UPDATE vm_files SET digest = ?, disks = ? WHERE customer = ? AND vm = ? AND key_id = ? AND digest IS NULL",
    )
    .bind(&file.as_bytes()[..])
    .bind(disks)
    .bind(customer.as_str())
    .bind(vm.as_str())
    .bind(key_column(id))
    .execute(c)
    .await?;
    Ok(done.rows_affected() == 1)
}

/// Makes a file the current one.
pub async fn make_current(
    c: &mut SqliteConnection,
    customer: &CustomerId,
    vm: &VmId,
    file: &Digest,
) -> Result<(), StoreError> {
    sqlx::query("UPDATE vms SET current_file = ? WHERE customer = ? AND id = ?")
        .bind(&file.as_bytes()[..])
        .bind(customer.as_str())
        .bind(vm.as_str())
        .execute(c)
        .await?;
    Ok(())
}

/// A sealed file of a VM by its digest.
pub async fn file(
    c: &mut SqliteConnection,
    customer: &CustomerId,
    vm: &VmId,
    file: &Digest,
) -> Result<Option<VmFile>, StoreError> {
    let row: Option<(i64, Vec<u8>, String)> =
        sqlx::query_as("SELECT key_id, wrapped, disks FROM vm_files WHERE customer = ? AND vm = ? AND digest = ?")
            .bind(customer.as_str())
            .bind(vm.as_str())
            .bind(&file.as_bytes()[..])
            .fetch_optional(c)
            .await?;
    row.map(|(id, wrapped, disks)| {
        let disks = serde_json::from_str(&disks).map_err(|_| StoreError::Damaged("list of disks"))?;
        Ok(VmFile { key_id: key_id(id), wrapped, disks })
    })
    .transpose()
}

/// Records a permitted restricted operation.
pub async fn add_permit(
    c: &mut SqliteConnection,
    i: &Instance,
    attestation: &AttestationId,
    operation: Operation,
) -> Result<(), StoreError> {
    sqlx::query("INSERT INTO permits (attestation, customer, vm, instance, operation) VALUES (?, ?, ?, ?, ?)")
        .bind(&attestation.0[..])
        .bind(i.customer.as_str())
        .bind(i.vm.as_str())
        .bind(time_column(i.number.get()))
        .bind(operation.name())
        .execute(c)
        .await?;
    Ok(())
}

/// Records the outcome of one; false where this instance has no such permit without an outcome.
pub async fn close_permit(
    c: &mut SqliteConnection,
    i: &Instance,
    attestation: &AttestationId,
    operation: Operation,
) -> Result<bool, StoreError> {
    let done = sqlx::query(
        "UPDATE permits SET outcome = 1 WHERE attestation = ? AND customer = ? AND vm = ? AND instance = ?
         AND operation = ? AND outcome = 0",
    )
    .bind(&attestation.0[..])
    .bind(i.customer.as_str())
    .bind(i.vm.as_str())
    .bind(time_column(i.number.get()))
    .bind(operation.name())
    .execute(c)
    .await?;
    Ok(done.rows_affected() == 1)
}

/// Permitted operations of a VM whose outcome never came; each is told once.
pub async fn take_open_permits(
    c: &mut SqliteConnection,
    customer: &CustomerId,
    vm: &VmId,
) -> Result<Vec<(AttestationId, InstanceNumber, String)>, StoreError> {
    let rows: Vec<(Vec<u8>, i64, String)> = sqlx::query_as(
        "UPDATE permits SET outcome = 2 WHERE customer = ? AND vm = ? AND outcome = 0
         RETURNING attestation, instance, operation",
    )
    .bind(customer.as_str())
    .bind(vm.as_str())
    .fetch_all(c)
    .await?;
    rows.into_iter()
        .map(|(attestation, instance, operation)| {
            let attestation = attestation.try_into().map_err(|_| StoreError::Damaged("attestation id"))?;
            Ok((AttestationId(attestation), instance_number(instance)?, operation))
        })
        .collect()
}

/// A sealed stream, as far as the provider knows it.
#[derive(Debug, Clone)]
pub struct Stream {
    /// Its key's id.
    pub key_id: KeyId,
    /// The VM that wrote it.
    pub vm: VmId,
    /// The instance.
    pub instance: InstanceNumber,
    /// Its key, wrapped.
    pub wrapped: Vec<u8>,
    /// When the key was made.
    pub created_us: u64,
    /// Its final tag in hex, once reported.
    pub tag: Option<String>,
}

/// Keeps the key of a sealed stream.
pub async fn add_stream_key(
    c: &mut SqliteConnection,
    i: &Instance,
    attestation: &AttestationId,
    id: KeyId,
    wrapped: &[u8],
    now_us: u64,
) -> Result<(), StoreError> {
    sqlx::query(
        "INSERT INTO stream_keys (key_id, customer, vm, instance, attestation, wrapped, created_us)
         VALUES (?, ?, ?, ?, ?, ?, ?)",
    )
    .bind(key_column(id))
    .bind(i.customer.as_str())
    .bind(i.vm.as_str())
    .bind(time_column(i.number.get()))
    .bind(&attestation.0[..])
    .bind(wrapped)
    .bind(time_column(now_us))
    .execute(c)
    .await?;
    Ok(())
}

/// Remembers the final tag of the stream that this attestation permitted to this instance, and to no other.
pub async fn set_stream_tag(
    c: &mut SqliteConnection,
    i: &Instance,
    attestation: &AttestationId,
    tag: &str,
) -> Result<(), StoreError> {
    sqlx::query(
        "UPDATE stream_keys SET tag = ? WHERE attestation = ? AND customer = ? AND vm = ? AND instance = ?
         AND tag IS NULL",
    )
    .bind(tag)
    .bind(&attestation.0[..])
    .bind(i.customer.as_str())
    .bind(i.vm.as_str())
    .bind(time_column(i.number.get()))
    .execute(c)
    .await?;
    Ok(())
}

/// Every sealed stream of a customer, newest first.
pub async fn streams(c: &mut SqliteConnection, customer: &CustomerId) -> Result<Vec<Stream>, StoreError> {
    type Row = (i64, String, i64, Vec<u8>, i64, Option<String>);
    let rows: Vec<Row> = sqlx::query_as(
        "SELECT key_id, vm, instance, wrapped, created_us, tag FROM stream_keys WHERE customer = ?
         ORDER BY created_us DESC LIMIT 1000",
    )
    .bind(customer.as_str())
    .fetch_all(c)
    .await?;
    rows.into_iter()
        .map(|(id, vm, instance, wrapped, created, tag)| {
            let instance = instance_number(instance)?;
            let (vm, created_us) = (label(&vm, "VM")?, number(created));
            Ok(Stream { key_id: key_id(id), vm, instance, wrapped, created_us, tag })
        })
        .collect()
}

/// Counts the operations asked for with a VM in the last hour, and adds this one.
pub async fn count_asked(
    c: &mut SqliteConnection,
    customer: &CustomerId,
    vm: &VmId,
    now_us: u64,
) -> Result<u64, StoreError> {
    let hour_ago = time_column(now_us.saturating_sub(3_600_000_000));
    sqlx::query("DELETE FROM asked WHERE customer = ? AND vm = ? AND time_us < ?")
        .bind(customer.as_str())
        .bind(vm.as_str())
        .bind(hour_ago)
        .execute(&mut *c)
        .await?;
    let before: (i64,) = sqlx::query_as("SELECT count(*) FROM asked WHERE customer = ? AND vm = ?")
        .bind(customer.as_str())
        .bind(vm.as_str())
        .fetch_one(&mut *c)
        .await?;
    sqlx::query("INSERT INTO asked (customer, vm, time_us) VALUES (?, ?, ?)")
        .bind(customer.as_str())
        .bind(vm.as_str())
        .bind(time_column(now_us))
        .execute(c)
        .await?;
    Ok(number(before.0))
}
