//! VMs, their files, their instances, and what restricted operations left behind.

use super::{StoreError, digest, key_column, key_id, label, number, time_column};
use policy::instance::LastInstance;
use policy::operation::Operation;
use policy::{AnchorMode, AttestationId, CustomerId, Digest, HostId, InstanceNumber, KeyId, VmId, VolumeId};
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

/// One life of a VM in one process.
#[derive(Debug, Clone)]
pub struct Instance {
    /// Whose VM.
    pub customer: CustomerId,
    /// Which VM.
    pub vm: VmId,
    /// The number.
    pub number: InstanceNumber,
    /// SHA-256 of the process's client key.
    pub client_key: Digest,
    /// Where it runs.
    pub host: HostId,
    /// Name of the attestation key it attested with.
    pub ak: Vec<u8>,
    /// The boot it runs in: the TPM's resetCount.
    pub reset_count: u32,
    /// The VM file it started with.
    pub file: Digest,
    /// When its keys were first released, by the provider's clock.
    pub started_us: u64,
    /// When its lease ends by the provider's clock.
    pub lease_end_us: u64,
    /// How long that lease lasted when it was given.
    pub lease_us: u64,
    /// Whether its end report came.
    pub ended: bool,
    /// Whether the customer took its leave to run.
    pub revoked: bool,
    /// The last report's number.
    pub report_sequence: u64,
    /// Its digest.
    pub report_digest: Digest,
    /// The number of the first report beyond a gap that was logged already.
    pub gap_at: u64,
}

impl Instance {
    /// What the decision on the next instance needs to know of this one.
    pub fn as_last(&self, lease_past: bool) -> LastInstance {
        LastInstance {
            number: self.number,
            ended: self.ended,
            host: self.host,
            reset_count: self.reset_count,
            lease_past,
        }
    }
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

#[derive(sqlx::FromRow)]
struct InstanceRow {
    customer: String,
    vm: String,
    number: i64,
    client_key: Vec<u8>,
    host: Vec<u8>,
    ak: Vec<u8>,
    reset_count: i64,
    file: Vec<u8>,
    started_us: i64,
    lease_end_us: i64,
    lease_us: i64,
    ended: bool,
    revoked: bool,
    report_sequence: i64,
    report_digest: Vec<u8>,
    gap_at: i64,
}

impl InstanceRow {
    fn read(self) -> Result<Instance, StoreError> {
        Ok(Instance {
            customer: label(&self.customer, "customer")?,
            vm: label(&self.vm, "VM")?,
            number: instance_number(self.number)?,
            client_key: digest(&self.client_key, "client key")?,
            host: HostId(digest(&self.host, "host")?),
            ak: self.ak,
            reset_count: u32::try_from(self.reset_count).map_err(|_| StoreError::Damaged("resetCount"))?,
            file: digest(&self.file, "VM file's digest")?,
            started_us: number(self.started_us),
            lease_end_us: number(self.lease_end_us),
            lease_us: number(self.lease_us),
            ended: self.ended,
            revoked: self.revoked,
            report_sequence: number(self.report_sequence),
            report_digest: digest(&self.report_digest, "digest of a report")?,
            gap_at: number(self.gap_at),
        })
    }
}

/// The newest instance of a VM.
pub async fn last_instance(
    c: &mut SqliteConnection,
    customer: &CustomerId,
    vm: &VmId,
) -> Result<Option<Instance>, StoreError> {
    let row: Option<InstanceRow> =
        sqlx::query_as("SELECT * FROM instances WHERE customer = ? AND vm = ? ORDER BY number DESC LIMIT 1")
            .bind(customer.as_str())
            .bind(vm.as_str())
            .fetch_optional(c)
            .await?;
    row.map(InstanceRow::read).transpose()
}

/// The newest instance that has this client key.
pub async fn instance_by_key(c: &mut SqliteConnection, client_key: &Digest) -> Result<Option<Instance>, StoreError> {
    let row: Option<InstanceRow> =
        sqlx::query_as("SELECT * FROM instances WHERE client_key = ? ORDER BY number DESC LIMIT 1")
            .bind(&client_key.as_bytes()[..])
            .fetch_optional(c)
            .await?;
    row.map(InstanceRow::read).transpose()
}

/// Records a new instance.
pub async fn add_instance(c: &mut SqliteConnection, i: &Instance) -> Result<(), StoreError> {
    sqlx::query(
        "INSERT INTO instances (customer, vm, number, client_key, host, ak, reset_count, file, started_us, lease_end_us, lease_us,
                                report_sequence, report_digest) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
    )
    .bind(i.customer.as_str())
    .bind(i.vm.as_str())
    .bind(time_column(i.number.get()))
    .bind(&i.client_key.as_bytes()[..])
    .bind(&i.host.0.as_bytes()[..])
    .bind(&i.ak)
    .bind(i64::from(i.reset_count))
    .bind(&i.file.as_bytes()[..])
    .bind(time_column(i.started_us))
    .bind(time_column(i.lease_end_us))
    .bind(time_column(i.lease_us))
    .bind(time_column(i.report_sequence))
    .bind(&i.report_digest.as_bytes()[..])
    .execute(c)
    .await?;
    Ok(())
}

/// Writes back what changes while an instance lives: lease, end, revocation, reports.
pub async fn update_instance(c: &mut SqliteConnection, i: &Instance) -> Result<(), StoreError> {
    sqlx::query(
        "UPDATE instances SET lease_end_us = ?, lease_us = ?, ended = ?, revoked = ?, report_sequence = ?, report_digest = ?, gap_at = ?
         WHERE customer = ? AND vm = ? AND number = ?",
    )
    .bind(time_column(i.lease_end_us))
    .bind(time_column(i.lease_us))
    .bind(i.ended)
    .bind(i.revoked)
    .bind(time_column(i.report_sequence))
    .bind(&i.report_digest.as_bytes()[..])
    .bind(time_column(i.gap_at))
    .bind(i.customer.as_str())
    .bind(i.vm.as_str())
    .bind(time_column(i.number.get()))
    .execute(c)
    .await?;
    Ok(())
}

/// Has every lease begin anew at `now_us`, when a provider starts: its wall clock may be ahead, so that leases look past that are
/// not. Those that were past at `latest_us` already, by a clock that ran since they were given, stay past.
pub async fn lengthen_leases(c: &mut SqliteConnection, latest_us: u64, now_us: u64) -> Result<(), StoreError> {
    let past = time_column(latest_us.saturating_sub(crate::attestation::LEASE_MARGIN_US));
    type Row = (String, String, i64, i64);
    let lengthened: Vec<Row> = sqlx::query_as(
        "UPDATE instances SET lease_end_us = max(lease_end_us, ?1 + lease_us) WHERE ended = 0 AND lease_end_us > ?2
         RETURNING customer, vm, number, lease_end_us",
    )
    .bind(time_column(now_us))
    .bind(past)
    .fetch_all(&mut *c)
    .await?;
    for (customer, vm, number_of, end) in lengthened {
        let (customer, vm) = (label(&customer, "customer")?, label(&vm, "VM")?);
        super::volumes::extend_all(c, &customer, &vm, instance_number(number_of)?, number(end)).await?;
    }
    let session_us = u64::from(crate::admin::volumes::SESSION_SECONDS) * 1_000_000;
    sqlx::query("UPDATE holders SET until_us = max(until_us, ?) WHERE session IS NOT NULL AND until_us > ?")
        .bind(time_column(now_us + session_us))
        .bind(past)
        .execute(c)
        .await?;
    Ok(())
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

fn instance_number(column: i64) -> Result<InstanceNumber, StoreError> {
    InstanceNumber::try_from(number(column)).map_err(|_| StoreError::Damaged("instance number"))
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
