//! Volumes: their key-encryption keys, anchors and open numbers, and who holds them.

use super::{StoreError, key_column, key_id, label, new_key_id, number, time_column};
use policy::disk::VolumeOperation;
use policy::{CustomerId, Digest, InstanceNumber, KeyId, OpenNumber, VmId, VolumeAnchor, VolumeId};
use sqlx::SqliteConnection;

/// A volume.
#[derive(Debug, Clone)]
pub struct Volume {
    /// Its id.
    pub id: VolumeId,
    /// Whose it is.
    pub customer: CustomerId,
    /// What the customer calls it.
    pub name: String,
    /// Its key-encryption key's id.
    pub kek_id: KeyId,
    /// Its key-encryption key, wrapped.
    pub kek_wrapped: Vec<u8>,
    /// The id for new writes, once one was issued.
    pub key_id: Option<KeyId>,
    /// The number of its next opening.
    pub next_open: u64,
    /// Its newest anchor.
    pub anchor: Option<VolumeAnchor>,
    /// Whether an administrator has to confirm the anchor first.
    pub unconfirmed: bool,
    /// Its size in bytes, as whoever held it last said: the customer's tool, or an instance under which it grew.
    pub size: Option<u64>,
    /// Whether its keys are retired: there is no key-encryption key any more.
    pub retired: bool,
    /// The key id of a rekey that has not come to its end.
    pub rekey: Option<KeyId>,
    /// The key-encryption key of a rewrap, and its wrapped form, until an anchor names it.
    pub next_kek: Option<(KeyId, Vec<u8>)>,
}

/// Who holds a volume.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum HolderKind {
    /// An instance of a VM.
    Instance(VmId, InstanceNumber),
    /// A session of the customer's tool.
    Session([u8; 16]),
}

/// A volume's holder.
#[derive(Debug, Clone)]
pub struct Holder {
    /// Who.
    pub kind: HolderKind,
    /// SHA-256 of its client key.
    pub client_key: Digest,
    /// The number of this opening.
    pub open_number: OpenNumber,
    /// When its lease ends.
    pub until_us: u64,
    /// What it was permitted and has not told the outcome of.
    pub operation: Option<VolumeOperation>,
}

#[derive(sqlx::FromRow)]
struct VolumeRow {
    id: Vec<u8>,
    customer: String,
    name: String,
    kek_id: i64,
    kek_wrapped: Vec<u8>,
    key_id: Option<i64>,
    next_open: i64,
    anchor: Option<Vec<u8>>,
    unconfirmed: bool,
    size: Option<i64>,
    retired_us: Option<i64>,
    rekey_key_id: Option<i64>,
    next_kek_id: Option<i64>,
    next_kek_wrapped: Option<Vec<u8>>,
}

macro_rules! select {
    ($rest:literal) => {
        concat!(
            "SELECT id, customer, name, kek_id, kek_wrapped, key_id, next_open, anchor, unconfirmed, size, retired_us, ",
            "rekey_key_id, next_kek_id, next_kek_wrapped FROM volumes ",
            $rest
        )
    };
}

fn read(row: VolumeRow) -> Result<Volume, StoreError> {
    let anchor = |a: Vec<u8>| VolumeAnchor::from_bytes(&a).map_err(|_| StoreError::Damaged("volume anchor"));
    Ok(Volume {
        id: VolumeId(row.id.try_into().map_err(|_| StoreError::Damaged("volume id"))?),
        customer: label(&row.customer, "customer")?,
        name: row.name,
        kek_id: key_id(row.kek_id),
        kek_wrapped: row.kek_wrapped,
        key_id: row.key_id.map(key_id),
        next_open: number(row.next_open),
        anchor: row.anchor.map(anchor).transpose()?,
        unconfirmed: row.unconfirmed,
        size: row.size.map(number),
        retired: row.retired_us.is_some(),
        rekey: row.rekey_key_id.map(key_id),
        next_kek: row.next_kek_id.map(key_id).zip(row.next_kek_wrapped),
    })
}

/// Creates a volume; false where the customer has one of that name.
pub async fn create(c: &mut SqliteConnection, volume: &Volume, now_us: u64) -> Result<bool, StoreError> {
    let done = sqlx::query(
        "INSERT OR IGNORE INTO volumes (id, customer, name, kek_id, kek_wrapped, created_us) VALUES (?, ?, ?, ?, ?, ?)",
    )
    .bind(&volume.id.0[..])
    .bind(volume.customer.as_str())
    .bind(&volume.name)
    .bind(key_column(volume.kek_id))
    .bind(&volume.kek_wrapped)
    .bind(time_column(now_us))
    .execute(c)
    .await?;
    Ok(done.rows_affected() == 1)
}

/// A customer's volume by id.
pub async fn by_id(
    c: &mut SqliteConnection,
    customer: &CustomerId,
    id: &VolumeId,
) -> Result<Option<Volume>, StoreError> {
    let row: Option<VolumeRow> = sqlx::query_as(select!("WHERE customer = ? AND id = ?"))
        .bind(customer.as_str())
        .bind(&id.0[..])
        .fetch_optional(c)
        .await?;
    row.map(read).transpose()
}

/// A customer's volume by name.
pub async fn by_name(
    c: &mut SqliteConnection,
    customer: &CustomerId,
    name: &str,
) -> Result<Option<Volume>, StoreError> {
    let row: Option<VolumeRow> = sqlx::query_as(select!("WHERE customer = ? AND name = ?"))
        .bind(customer.as_str())
        .bind(name)
        .fetch_optional(c)
        .await?;
    row.map(read).transpose()
}

/// Every volume of a customer.
pub async fn list(c: &mut SqliteConnection, customer: &CustomerId) -> Result<Vec<Volume>, StoreError> {
    let rows: Vec<VolumeRow> =
        sqlx::query_as(select!("WHERE customer = ? ORDER BY name")).bind(customer.as_str()).fetch_all(c).await?;
    rows.into_iter().map(read).collect()
}

/// Takes the next open number of a volume. It is spent when the transaction commits, whatever becomes of the opening.
pub async fn next_open(c: &mut SqliteConnection, volume: &Volume) -> Result<OpenNumber, StoreError> {
    let issued: (i64,) =
        sqlx::query_as("UPDATE volumes SET next_open = next_open + 1 WHERE id = ? RETURNING next_open - 1")
            .bind(&volume.id.0[..])
            .fetch_one(c)
            .await?;
    OpenNumber::try_from(number(issued.0)).map_err(|_| StoreError::Exhausted("the volume's open number"))
}

/// Raises the next open number above `least`.
pub async fn raise_open(c: &mut SqliteConnection, volume: &Volume, least: u64) -> Result<(), StoreError> {
    sqlx::query("UPDATE volumes SET next_open = max(next_open, ?) WHERE id = ?")
        .bind(time_column(least))
        .bind(&volume.id.0[..])
        .execute(c)
        .await?;
    Ok(())
}

/// Issues a fresh key id for new writes.
pub async fn new_write_key(c: &mut SqliteConnection, volume: &Volume) -> Result<KeyId, StoreError> {
    let id = new_key_id(c).await?;
    sqlx::query("UPDATE volumes SET key_id = ? WHERE id = ?")
        .bind(key_column(id))
        .bind(&volume.id.0[..])
        .execute(c)
        .await?;
    Ok(id)
}

/// Keeps a newer anchor.
pub async fn set_anchor(c: &mut SqliteConnection, volume: &VolumeId, anchor: &VolumeAnchor) -> Result<(), StoreError> {
    sqlx::query("UPDATE volumes SET anchor = ? WHERE id = ?")
        .bind(&anchor.as_bytes()[..])
        .bind(&volume.0[..])
        .execute(c)
        .await?;
    Ok(())
}

/// Issues the key id of a rekey, which is the one for new writes from now on.
pub async fn begin_rekey(c: &mut SqliteConnection, volume: &Volume) -> Result<KeyId, StoreError> {
    let id = new_write_key(c, volume).await?;
    sqlx::query("UPDATE volumes SET rekey_key_id = key_id WHERE id = ?").bind(&volume.id.0[..]).execute(c).await?;
    Ok(id)
}

/// A rekey came to its end: the next one gets a key id of its own.
pub async fn end_rekey(c: &mut SqliteConnection, volume: &VolumeId) -> Result<(), StoreError> {
    sqlx::query("UPDATE volumes SET rekey_key_id = NULL WHERE id = ?").bind(&volume.0[..]).execute(c).await?;
    Ok(())
}

/// New writes stay under `key`: the id of a rekey was never used.
pub async fn give_up_rekey(c: &mut SqliteConnection, volume: &VolumeId, key: KeyId) -> Result<(), StoreError> {
    sqlx::query("UPDATE volumes SET key_id = ?, rekey_key_id = NULL WHERE id = ?")
        .bind(key_column(key))
        .bind(&volume.0[..])
        .execute(c)
        .await?;
    Ok(())
}

/// Keeps the key-encryption key that a rewrap is given, beside the one so far.
pub async fn begin_rewrap(
    c: &mut SqliteConnection,
    volume: &VolumeId,
    kek: KeyId,
    wrapped: &[u8],
) -> Result<(), StoreError> {
    sqlx::query("UPDATE volumes SET next_kek_id = ?, next_kek_wrapped = ? WHERE id = ?")
        .bind(key_column(kek))
        .bind(wrapped)
        .bind(&volume.0[..])
        .execute(c)
        .await?;
    Ok(())
}

/// An anchor names the next key-encryption key: it takes the place of the one so far, which is gone.
pub async fn end_rewrap(c: &mut SqliteConnection, volume: &VolumeId) -> Result<(), StoreError> {
    sqlx::query(
        "UPDATE volumes SET kek_id = next_kek_id, kek_wrapped = next_kek_wrapped, next_kek_id = NULL,
         next_kek_wrapped = NULL WHERE id = ? AND next_kek_id IS NOT NULL",
    )
    .bind(&volume.0[..])
    .execute(c)
    .await?;
    Ok(())
}

/// Destroys a volume's key-encryption keys, for good.
pub async fn retire(c: &mut SqliteConnection, volume: &VolumeId, now_us: u64) -> Result<(), StoreError> {
    sqlx::query(
        "UPDATE volumes SET retired_us = ?, kek_wrapped = X'', next_kek_id = NULL, next_kek_wrapped = NULL WHERE id = ?",
    )
    .bind(time_column(now_us))
    .bind(&volume.0[..])
    .execute(c)
    .await?;
    Ok(())
}

/// Keeps a volume's size, in bytes.
pub async fn set_size(c: &mut SqliteConnection, volume: &VolumeId, bytes: u64) -> Result<(), StoreError> {
    sqlx::query("UPDATE volumes SET size = ? WHERE id = ?")
        .bind(time_column(bytes))
        .bind(&volume.0[..])
        .execute(c)
        .await?;
    Ok(())
}

/// Takes note that an administrator confirmed the anchor.
pub async fn confirm(c: &mut SqliteConnection, volume: &Volume) -> Result<(), StoreError> {
    sqlx::query("UPDATE volumes SET unconfirmed = 0 WHERE id = ?").bind(&volume.id.0[..]).execute(c).await?;
    Ok(())
}

/// Who holds a volume, also where its lease is past.
pub async fn holder(c: &mut SqliteConnection, volume: &VolumeId) -> Result<Option<Holder>, StoreError> {
    type Row = (Option<String>, Option<i64>, Option<Vec<u8>>, Vec<u8>, i64, i64, Option<String>);
    let row: Option<Row> = sqlx::query_as(
        "SELECT vm, instance, session, client_key, open_number, until_us, operation FROM holders WHERE volume = ?",
    )
    .bind(&volume.0[..])
    .fetch_optional(c)
    .await?;
    row.map(|(vm, instance, session, client_key, open, until, operation)| {
        let kind = match (vm, instance, session) {
            (Some(vm), Some(instance), None) => {
                let number = InstanceNumber::try_from(number(instance));
                HolderKind::Instance(label(&vm, "VM")?, number.map_err(|_| StoreError::Damaged("instance number"))?)
            }
            (None, None, Some(session)) => {
                HolderKind::Session(session.try_into().map_err(|_| StoreError::Damaged("session id"))?)
            }
            _ => return Err(StoreError::Damaged("holder")),
        };
        Ok(Holder {
            kind,
            client_key: super::digest(&client_key, "client key")?,
            open_number: OpenNumber::try_from(number(open)).map_err(|_| StoreError::Damaged("open number"))?,
            until_us: number(until),
            operation: operation.map(|name| label(&name, "operation on a volume")).transpose()?,
        })
    })
    .transpose()
}

/// Gives a volume to a holder, in place of whoever had it.
pub async fn hold(c: &mut SqliteConnection, volume: &VolumeId, holder: &Holder) -> Result<(), StoreError> {
    let (vm, instance, session) = match &holder.kind {
        HolderKind::Instance(vm, number) => (Some(vm.as_str()), Some(time_column(number.get())), None),
        HolderKind::Session(id) => (None, None, Some(&id[..])),
    };
    sqlx::query(
        "INSERT OR REPLACE INTO holders (volume, vm, instance, session, client_key, open_number, until_us, operation)
         VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
    )
    .bind(&volume.0[..])
    .bind(vm)
    .bind(instance)
    .bind(session)
    .bind(&holder.client_key.as_bytes()[..])
    .bind(i64::from(holder.open_number.get()))
    .bind(time_column(holder.until_us))
    .bind(holder.operation.map(VolumeOperation::name))
    .execute(c)
    .await?;
    Ok(())
}

/// Frees a volume.
pub async fn free(c: &mut SqliteConnection, volume: &VolumeId) -> Result<(), StoreError> {
    sqlx::query("DELETE FROM holders WHERE volume = ?").bind(&volume.0[..]).execute(c).await?;
    Ok(())
}

/// Frees every volume that an instance of this VM holds.
pub async fn free_all(c: &mut SqliteConnection, customer: &CustomerId, vm: &VmId) -> Result<(), StoreError> {
    sqlx::query("DELETE FROM holders WHERE vm = ? AND volume IN (SELECT id FROM volumes WHERE customer = ?)")
        .bind(vm.as_str())
        .bind(customer.as_str())
        .execute(c)
        .await?;
    Ok(())
}

/// Extends the lease of every volume that this instance holds.
pub async fn extend_all(
    c: &mut SqliteConnection,
    customer: &CustomerId,
    vm: &VmId,
    instance: InstanceNumber,
    until_us: u64,
) -> Result<(), StoreError> {
    sqlx::query(
        "UPDATE holders SET until_us = max(until_us, ?)
         WHERE vm = ? AND instance = ? AND volume IN (SELECT id FROM volumes WHERE customer = ?)",
    )
    .bind(time_column(until_us))
    .bind(vm.as_str())
    .bind(time_column(instance.get()))
    .bind(customer.as_str())
    .execute(c)
    .await?;
    Ok(())
}
