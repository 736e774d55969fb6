//! Clouds, their hosts, and what is remembered of a host: activated attestation keys, and how far its IMA log was read.

use super::{StoreError, digest, label, number, time_column};
use attest::eventlog::ima::ImaState;
use policy::{CloudId, CustomerId, HostId};
use serde::{Deserialize, Serialize};
use sqlx::SqliteConnection;

/// What kind of TPMs an inventory holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum CloudKind {
    /// Software TPMs of a laboratory: for customers that were created as lab, and no others.
    Lab,
    /// TPMs whose makers vouch for them.
    Maker,
}

impl CloudKind {
    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Lab => "lab",
            Self::Maker => "maker",
        }
    }

    fn parse(text: &str) -> Result<Self, StoreError> {
        match text {
            "lab" => Ok(Self::Lab),
            "maker" => Ok(Self::Maker),
            _ => Err(StoreError::Damaged("kind of cloud")),
        }
    }
}

/// A cloud.
#[derive(Debug, Clone)]
pub struct Cloud {
    /// Its name.
    pub id: CloudId,
    /// Its kind.
    pub kind: CloudKind,
    /// Certificates of the TPM makers' authorities, PEM.
    pub roots: String,
}

/// A host of an inventory.
#[derive(Debug, Clone)]
pub struct Host {
    /// SHA-256 of its endorsement key.
    pub id: HostId,
    /// Where it stands.
    pub cloud: CloudId,
    /// What the cloud calls it.
    pub name: Option<String>,
    /// The endorsement key's certificate, DER; none where the key itself is pinned.
    pub certificate: Option<Vec<u8>>,
}

/// What became of an enrolment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Enrolled {
    /// It is new.
    New,
    /// The same host stands there already.
    Already,
    /// The host stands in another inventory, or the name belongs to another TPM.
    Conflict,
}

/// How far a host's IMA log was read for a customer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImaMark {
    /// The version of the reference values that judged it.
    pub reference: u64,
    /// The boot: the TPM's resetCount.
    pub reset_count: u32,
    /// Bytes read, and PCR 10 after them.
    pub state: ImaState,
}

/// Creates a cloud; false where one of that name exists.
pub async fn create_cloud(c: &mut SqliteConnection, cloud: &Cloud) -> Result<bool, StoreError> {
    let done = sqlx::query("INSERT OR IGNORE INTO clouds (id, kind, roots) VALUES (?, ?, ?)")
        .bind(cloud.id.as_str())
        .bind(cloud.kind.name())
        .bind(&cloud.roots)
        .execute(c)
        .await?;
    Ok(done.rows_affected() == 1)
}

/// A cloud by name.
pub async fn cloud(c: &mut SqliteConnection, id: &CloudId) -> Result<Option<Cloud>, StoreError> {
    let row: Option<(String, String)> =
        sqlx::query_as("SELECT kind, roots FROM clouds WHERE id = ?").bind(id.as_str()).fetch_optional(c).await?;
    row.map(|(kind, roots)| Ok(Cloud { id: id.clone(), kind: CloudKind::parse(&kind)?, roots })).transpose()
}

/// Every cloud, with how many hosts it has.
pub async fn clouds(c: &mut SqliteConnection) -> Result<Vec<(CloudId, CloudKind, u64)>, StoreError> {
    let rows: Vec<(String, String, i64)> = sqlx::query_as(
        "SELECT id, kind, (SELECT count(*) FROM hosts WHERE hosts.cloud = clouds.id) FROM clouds ORDER BY id",
    )
    .fetch_all(c)
    .await?;
    rows.into_iter()
        .map(|(id, kind, hosts)| Ok((label(&id, "cloud")?, CloudKind::parse(&kind)?, number(hosts))))
        .collect()
}

/// Enters a host into an inventory. What stands there is never changed.
pub async fn enroll(c: &mut SqliteConnection, host: &Host, now_us: u64) -> Result<Enrolled, StoreError> {
    let done =
        sqlx::query("INSERT OR IGNORE INTO hosts (id, cloud, name, certificate, enrolled_us) VALUES (?, ?, ?, ?, ?)")
            .bind(&host.id.0.as_bytes()[..])
            .bind(host.cloud.as_str())
            .bind(host.name.as_deref())
            .bind(host.certificate.as_deref())
            .bind(time_column(now_us))
            .execute(&mut *c)
            .await?;
    if done.rows_affected() == 1 {
        return Ok(Enrolled::New);
    }
    let same = self::host(c, &host.id).await?.is_some_and(|h| {
        h.cloud == host.cloud && (host.name.is_none() || h.name == host.name) && h.certificate == host.certificate
    });
    Ok(if same { Enrolled::Already } else { Enrolled::Conflict })
}

/// Takes a host out of an inventory, with its attestation keys; false where it does not stand there.
pub async fn remove(c: &mut SqliteConnection, cloud: &CloudId, id: &HostId) -> Result<bool, StoreError> {
    if host(c, id).await?.is_none_or(|h| h.cloud != *cloud) {
        return Ok(false);
    }
    for statement in
        ["DELETE FROM aks WHERE host = ?", "DELETE FROM ima WHERE host = ?", "DELETE FROM hosts WHERE id = ?"]
    {
        sqlx::query(statement).bind(&id.0.as_bytes()[..]).execute(&mut *c).await?;
    }
    Ok(true)
}

/// A host by its id.
pub async fn host(c: &mut SqliteConnection, id: &HostId) -> Result<Option<Host>, StoreError> {
    let row: Option<(String, Option<String>, Option<Vec<u8>>)> =
        sqlx::query_as("SELECT cloud, name, certificate FROM hosts WHERE id = ?")
            .bind(&id.0.as_bytes()[..])
            .fetch_optional(c)
            .await?;
    row.map(|(cloud, name, certificate)| Ok(Host { id: *id, cloud: label(&cloud, "cloud")?, name, certificate }))
        .transpose()
}

/// Hosts of a cloud.
pub async fn hosts(c: &mut SqliteConnection, cloud: &CloudId) -> Result<Vec<Host>, StoreError> {
    type Row = (Vec<u8>, Option<String>, Option<Vec<u8>>);
    let rows: Vec<Row> = sqlx::query_as("SELECT id, name, certificate FROM hosts WHERE cloud = ? ORDER BY id")
        .bind(cloud.as_str())
        .fetch_all(c)
        .await?;
    rows.into_iter()
        .map(|(id, name, certificate)| {
            Ok(Host { id: HostId(digest(&id, "host")?), cloud: cloud.clone(), name, certificate })
        })
        .collect()
}

/// The host and its cloud, where the customer's VMs may run on it: the inventory decides, not the message.
pub async fn host_for(
    c: &mut SqliteConnection,
    customer: &CustomerId,
    id: &HostId,
) -> Result<Option<(Host, Cloud)>, StoreError> {
    type Row = (String, Option<String>, Option<Vec<u8>>, String, String);
    let row: Option<Row> = sqlx::query_as(
        "SELECT hosts.cloud, hosts.name, hosts.certificate, clouds.kind, clouds.roots FROM hosts
         JOIN customer_clouds ON customer_clouds.cloud = hosts.cloud AND customer_clouds.customer = ?
         JOIN clouds ON clouds.id = hosts.cloud WHERE hosts.id = ?",
    )
    .bind(customer.as_str())
    .bind(&id.0.as_bytes()[..])
    .fetch_optional(c)
    .await?;
    row.map(|(cloud, name, certificate, kind, roots)| {
        let cloud = Cloud { id: label(&cloud, "cloud")?, kind: CloudKind::parse(&kind)?, roots };
        Ok((Host { id: *id, cloud: cloud.id.clone(), name, certificate }, cloud))
    })
    .transpose()
}

/// The activated attestation key of that name beside that host's endorsement key: its TPMT_PUBLIC as recorded.
pub async fn ak(c: &mut SqliteConnection, host: &HostId, name: &[u8]) -> Result<Option<Vec<u8>>, StoreError> {
    let row: Option<(Vec<u8>,)> = sqlx::query_as("SELECT public FROM aks WHERE host = ? AND name = ?")
        .bind(&host.0.as_bytes()[..])
        .bind(name)
        .fetch_optional(c)
        .await?;
    Ok(row.map(|r| r.0))
}

/// Remembers an attestation key that was proved to live beside that host's endorsement key.
pub async fn add_ak(
    c: &mut SqliteConnection,
    host: &HostId,
    name: &[u8],
    public: &[u8],
    now_us: u64,
) -> Result<(), StoreError> {
    sqlx::query("INSERT OR IGNORE INTO aks (host, name, public, activated_us) VALUES (?, ?, ?, ?)")
        .bind(&host.0.as_bytes()[..])
        .bind(name)
        .bind(public)
        .bind(time_column(now_us))
        .execute(c)
        .await?;
    Ok(())
}

/// How far the IMA log of a host was read for a customer.
pub async fn ima(
    c: &mut SqliteConnection,
    customer: &CustomerId,
    host: &HostId,
    ak: &[u8],
) -> Result<Option<ImaMark>, StoreError> {
    let row: Option<(i64, i64, i64, Vec<u8>)> = sqlx::query_as(
        "SELECT reference, reset_count, log_offset, pcr FROM ima WHERE customer = ? AND host = ? AND ak = ?",
    )
    .bind(customer.as_str())
    .bind(&host.0.as_bytes()[..])
    .bind(ak)
    .fetch_optional(c)
    .await?;
    row.map(|(reference, reset_count, offset, pcr)| {
        let reset_count = u32::try_from(reset_count).map_err(|_| StoreError::Damaged("resetCount"))?;
        let state = ImaState { offset: number(offset), pcr: digest(&pcr, "PCR value")? };
        Ok(ImaMark { reference: number(reference), reset_count, state })
    })
    .transpose()
}

/// Remembers it.
pub async fn set_ima(
    c: &mut SqliteConnection,
    customer: &CustomerId,
    host: &HostId,
    ak: &[u8],
    mark: &ImaMark,
) -> Result<(), StoreError> {
    sqlx::query(
        "INSERT OR REPLACE INTO ima (customer, host, ak, reference, reset_count, log_offset, pcr)
         VALUES (?, ?, ?, ?, ?, ?, ?)",
    )
    .bind(customer.as_str())
    .bind(&host.0.as_bytes()[..])
    .bind(ak)
    .bind(time_column(mark.reference))
    .bind(i64::from(mark.reset_count))
    .bind(time_column(mark.state.offset))
    .bind(&mark.state.pcr.as_bytes()[..])
    .execute(c)
    .await?;
    Ok(())
}

/// Forgets it: the next attestation sends the whole log.
pub async fn forget_ima(
    c: &mut SqliteConnection,
    customer: &CustomerId,
    host: &HostId,
    ak: &[u8],
) -> Result<(), StoreError> {
    sqlx::query("DELETE FROM ima WHERE customer = ? AND host = ? AND ak = ?")
        .bind(customer.as_str())
        .bind(&host.0.as_bytes()[..])
        .bind(ak)
        .execute(c)
        .await?;
    Ok(())
}
