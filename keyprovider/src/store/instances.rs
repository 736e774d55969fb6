//! The instances of VMs: their lives, leases and reports.

use super::{StoreError, digest, label, number, time_column};
use policy::instance::LastInstance;
use policy::{CustomerId, Digest, HostId, InstanceNumber, VmId};
use sqlx::SqliteConnection;

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
    // And whoever waits since a restore, waits for a lease that the backup never saw.
    sqlx::query("UPDATE vms SET unconfirmed_until_us = max(unconfirmed_until_us, ?) WHERE unconfirmed_until_us > ?")
        .bind(time_column(super::restore::wait_until(now_us)))
        .bind(past)
        .execute(&mut *c)
        .await?;
    let session_us = u64::from(crate::admin::volumes::SESSION_SECONDS) * 1_000_000;
    sqlx::query("UPDATE holders SET until_us = max(until_us, ?) WHERE session IS NOT NULL AND until_us > ?")
        .bind(time_column(now_us + session_us))
        .bind(past)
        .execute(c)
        .await?;
    Ok(())
}

pub(super) fn instance_number(column: i64) -> Result<InstanceNumber, StoreError> {
    InstanceNumber::try_from(number(column)).map_err(|_| StoreError::Damaged("instance number"))
}
