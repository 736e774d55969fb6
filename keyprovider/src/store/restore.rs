//! Bringing a backup back to life. What it can't know is voided or raised, so that nothing is ever given out twice:
//!
//! - what was taken away since (an older policy, a revoked digest, a removed host, an administrator) is back: nothing is
//!   released for a customer until somebody confirms the versions, and the log names who and what it is;
//! - answers and holders go; leases of instances in the backup are void: none of them may renew;
//! - each VM's instance numbers go on above the stored one and the time of the restore in microseconds, and it waits for the
//!   longest lease that any policy can give, when an instance that the backup never saw has surely lost its own (or for `vm
//!   confirm`);
//! - each volume gets a new key id for new writes, its open numbers are raised, and its anchor waits for `volume confirm`: also
//!   one that the backup does not have, for the volume may have been filled since.

use super::people::{self, Admin};
use super::{StoreError, documents, meta, number, provider_key, set_meta, time_column, vms, volumes};
use crate::clock::Clock;
use crate::keystore::{KeyLabel, KeyStore};
use crate::store::audit::{Draft, append};
use policy::audit::{Actor, AuditKind};
use policy::{CustomerId, InstanceNumber, LeaseTerms};
use sqlx::SqliteConnection;
use sqlx::sqlite::{SqliteConnectOptions, SqliteJournalMode, SqlitePoolOptions, SqliteSynchronous};
use std::path::Path;

/// How far open numbers are raised: more openings than a volume sees between two backups. A backup older than that is still
/// safe, for new writes have a new key; such a volume needs `volume confirm --anchor`.
const OPENINGS: u64 = 65_536;

/// What a restore did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Restored {
    /// Customers that wait for a confirmation.
    pub customers: u64,
    /// Volumes that wait for a confirmation.
    pub volumes: u64,
    /// VMs that wait.
    pub vms: u64,
    /// The least instance number from now on.
    pub floor: u64,
    /// Who is an administrator or auditor again, by name.
    pub admins: Vec<String>,
}

/// Makes the backup in `path` one that a provider can serve from, where the administrators in `revoke` are revoked.
pub async fn prepare(path: &Path, keys: &dyn KeyStore, revoke: &[String]) -> Result<Restored, StoreError> {
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
    let restored = rewrite(&mut tx, revoke).await?;
    tx.commit().await?;
    pool.close().await;
    Ok(restored)
}

/// When every lease is past that was given before `now_us`. A policy that the backup does not have may have given longer ones than
/// those that it has.
pub(super) fn wait_until(now_us: u64) -> u64 {
    now_us + u64::from(LeaseTerms::LONGEST_SECONDS) * 1_001_000 + crate::attestation::LEASE_MARGIN_US
}

async fn rewrite(c: &mut SqliteConnection, revoke: &[String]) -> Result<Restored, StoreError> {
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
    let known = people::admins(c).await?;
    for name in revoke {
        if !known.iter().any(|(admin, ..)| admin.name == *name) {
            return Err(StoreError::NoAdmin(name.clone()));
        }
        people::revoke_admin(c, name).await?;
    }
    let admins: Vec<Admin> =
        people::admins(c).await?.into_iter().filter_map(|(admin, _, revoked)| (!revoked).then_some(admin)).collect();
    let (mut all_customers, mut all_vms, mut all_volumes) = (0, 0, 0);
    let until_us = wait_until(now_us);
    for (customer, _) in people::customers(c).await? {
        people::set_unconfirmed(c, &customer, true).await?;
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
        let draft = brought_back(c, &customer, &admins, draft).await?;
        append(c, now_us, draft).await?;
        all_customers += 1;
        all_vms += vms;
        all_volumes += raised;
    }
    sqlx::query("DELETE FROM meta WHERE name = 'backup'").execute(&mut *c).await?;
    let admins = admins.into_iter().map(|admin| admin.name).collect();
    Ok(Restored { customers: all_customers, volumes: all_volumes, vms: all_vms, floor, admins })
}

/// What a customer may have taken away since the backup, and has again.
async fn brought_back(
    c: &mut SqliteConnection,
    customer: &CustomerId,
    admins: &[Admin],
    draft: Draft,
) -> Result<Draft, StoreError> {
    let policy = documents::policy(c, customer).await?.map_or(0, |p| p.version);
    let reference = documents::reference(c, customer).await?.map_or(0, |(version, _)| version);
    let of_customer = admins.iter().filter(|a| a.customer.as_ref().is_none_or(|of| of == customer));
    let names: Vec<String> = of_customer.map(|a| format!("{} ({})", a.name, a.role.name())).collect();
    let mut draft = draft.detail("policy", policy).detail("reference", reference).detail("admins", names.join(", "));
    let clouds: Vec<(String, i64)> = sqlx::query_as(
        "SELECT cloud, (SELECT count(*) FROM hosts WHERE hosts.cloud = customer_clouds.cloud) FROM customer_clouds
         WHERE customer = ?",
    )
    .bind(customer.as_str())
    .fetch_all(&mut *c)
    .await?;
    for (cloud, hosts) in clouds {
        draft = draft.detail(format!("hosts.{cloud}"), hosts);
    }
    for vm in vms::list(c, customer).await? {
        let file = vms::find(c, customer, &vm).await?.and_then(|found| found.current_file);
        draft = draft.detail(format!("vm_file.{vm}"), file.map_or("none".to_owned(), |f| f.to_string()));
    }
    Ok(draft)
}
