//! Bringing a backup back to life. What it can't know is voided or raised, so that nothing is ever given out twice:
//!
//! - answers and holders go; leases of instances in the backup are void: none of them may renew;
//! - each VM's instance numbers go on above the stored one and the time of the restore in microseconds, and it waits for the
//!   longest lease that any policy can give, when an instance that the backup never saw has surely lost its own (or for `vm
//!   confirm`);
//! - each volume gets a new key id for new writes, its open numbers are raised, and its anchor waits for `volume confirm`: also
//!   one that the backup does not have, for the volume may have been filled since.

use super::{StoreError, meta, number, provider_key, set_meta, time_column, volumes};
use crate::clock::Clock;
use crate::keystore::{KeyLabel, KeyStore};
use crate::store::audit::{Draft, append};
use policy::audit::{Actor, AuditKind};
use policy::{InstanceNumber, LeaseTerms};
use sqlx::SqliteConnection;
use sqlx::sqlite::{SqliteConnectOptions, SqliteJournalMode, SqlitePoolOptions, SqliteSynchronous};
use std::path::Path;

/// How far open numbers are raised: more openings than a volume sees between two backups. A backup older than that is still
/// safe, for new writes have a new key; such a volume needs `volume confirm --anchor`.
const OPENINGS: u64 = 65_536;

/// What a restore did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Restored {
    /// Volumes that wait for a confirmation.
    pub volumes: u64,
    /// VMs that wait.
    pub vms: u64,
    /// The least instance number from now on.
    pub floor: u64,
}

/// Makes the backup in `path` one that a provider can serve from.
pub async fn prepare(path: &Path, keys: &dyn KeyStore) -> Result<Restored, StoreError> {
    let options = SqliteConnectOptions::new()
        .filename(path)
        .create_if_missing(false)
        .journal_mode(SqliteJournalMode::Delete)
        .synchronous(SqliteSynchronous::Full)
        .foreign_keys(true);
    let pool = SqlitePoolOptions::new().max_connections(1).connect_with(options).await?;
    // A backup may be older than this program.
    super::SCHEMA.run(&pool).await?;
    let mut tx = pool.begin_with("BEGIN IMMEDIATE").await?;
    let checked: (String,) = sqlx::query_as("PRAGMA integrity_check").fetch_one(&mut *tx).await?;
    if checked.0 != "ok" || meta(&mut tx, "backup").await?.is_none() {
        return Err(StoreError::Damaged("file that is no whole backup: it"));
    }
    // The wrong master key must show now, not at the first release.
    let (wrapped, _) = provider_key(&mut tx, "audit").await?;
    keys.unwrap(KeyLabel::Provider("audit"), &wrapped)?;
    let restored = rewrite(&mut tx).await?;
    tx.commit().await?;
    pool.close().await;
    Ok(restored)
}

async fn rewrite(c: &mut SqliteConnection) -> Result<Restored, StoreError> {
    let now_us = Clock::start(super::latest_us(c).await?).now_us();
    let stored: (Option<i64>,) = sqlx::query_as("SELECT max(number) FROM instances").fetch_one(&mut *c).await?;
    let floor = now_us.max(number(stored.0.unwrap_or(0)) + 1);
    InstanceNumber::try_from(floor).map_err(|_| StoreError::Exhausted("the instance counter"))?;
    sqlx::query("DELETE FROM answers").execute(&mut *c).await?;
    sqlx::query("DELETE FROM holders").execute(&mut *c).await?;
    sqlx::query("DELETE FROM ima").execute(&mut *c).await?;
    // No lease of the backup is worth anything: an instance it knows starts anew or not at all.
    sqlx::query("UPDATE instances SET revoked = 1 WHERE ended = 0").execute(&mut *c).await?;
    set_meta(c, "instance-floor", &floor.to_string()).await?;
    let (mut all_vms, mut all_volumes) = (0, 0);
    // A policy that the backup does not have may have given longer leases than those that it has.
    let until_us = now_us + u64::from(LeaseTerms::LONGEST_SECONDS) * 1_001_000 + crate::attestation::LEASE_MARGIN_US;
    for (customer, _) in super::people::customers(c).await? {
        let done = sqlx::query(
            "UPDATE vms SET instance_floor = max(instance_floor, ?), unconfirmed_until_us = ? WHERE customer = ?",
        )
        .bind(time_column(floor))
        .bind(time_column(until_us))
        .bind(customer.as_str())
        .execute(&mut *c)
        .await?;
        let vms = done.rows_affected();
        for volume in volumes::list(c, &customer).await? {
            volumes::new_write_key(c, &volume).await?;
            volumes::raise_open(c, &volume, volume.next_open + OPENINGS).await?;
        }
        let done = sqlx::query("UPDATE volumes SET unconfirmed = 1 WHERE customer = ?")
            .bind(customer.as_str())
            .execute(&mut *c)
            .await?;
        let raised = done.rows_affected();
        let draft = Draft::new(&customer, Actor::Provider, AuditKind::ProviderRestored)
            .detail("instance_floor", floor)
            .detail("vms", vms)
            .detail("volumes", raised);
        append(c, now_us, draft).await?;
        all_vms += vms;
        all_volumes += raised;
    }
    sqlx::query("DELETE FROM meta WHERE name = 'backup'").execute(&mut *c).await?;
    Ok(Restored { volumes: all_volumes, vms: all_vms, floor })
}
