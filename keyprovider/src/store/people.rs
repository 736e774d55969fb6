//! Customers and administrators.

use super::{StoreError, digest, label, time_column};
use policy::{CloudId, CustomerId, Digest};
use serde::{Deserialize, Serialize};
use sqlx::SqliteConnection;

/// A customer.
#[derive(Debug, Clone)]
pub struct Customer {
    /// Its name.
    pub id: CustomerId,
    /// Whether hosts with software TPMs may serve it.
    pub lab: bool,
    /// Ed25519 public key that signs its policies.
    pub policy_key: [u8; 32],
}

/// What an administrator may do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Role {
    /// Everything.
    Admin,
    /// Read, and nothing else.
    Auditor,
}

impl Role {
    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Admin => "admin",
            Self::Auditor => "auditor",
        }
    }
}

/// An administrator.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Admin {
    /// Name, as in the audit log.
    pub name: String,
    /// Role.
    pub role: Role,
    /// The only customer it may deal with; none means all.
    pub customer: Option<CustomerId>,
}

/// Creates a customer; false where one of that name exists.
pub async fn create_customer(c: &mut SqliteConnection, customer: &Customer, now_us: u64) -> Result<bool, StoreError> {
    let done = sqlx::query("INSERT OR IGNORE INTO customers (id, lab, policy_key, created_us) VALUES (?, ?, ?, ?)")
        .bind(customer.id.as_str())
        .bind(customer.lab)
        .bind(&customer.policy_key[..])
        .bind(time_column(now_us))
        .execute(c)
        .await?;
    Ok(done.rows_affected() == 1)
}

/// A customer by name.
pub async fn customer(c: &mut SqliteConnection, id: &CustomerId) -> Result<Option<Customer>, StoreError> {
    let row: Option<(bool, Vec<u8>)> = sqlx::query_as("SELECT lab, policy_key FROM customers WHERE id = ?")
        .bind(id.as_str())
        .fetch_optional(c)
        .await?;
    row.map(|(lab, key)| {
        let policy_key = key.try_into().map_err(|_| StoreError::Damaged("policy key"))?;
        Ok(Customer { id: id.clone(), lab, policy_key })
    })
    .transpose()
}

/// Every customer.
pub async fn customers(c: &mut SqliteConnection) -> Result<Vec<(CustomerId, bool)>, StoreError> {
    let rows: Vec<(String, bool)> = sqlx::query_as("SELECT id, lab FROM customers ORDER BY id").fetch_all(c).await?;
    rows.into_iter().map(|(id, lab)| Ok((label(&id, "customer")?, lab))).collect()
}

/// Whether nobody has confirmed yet what a restore brought back for a customer.
pub async fn unconfirmed(c: &mut SqliteConnection, id: &CustomerId) -> Result<bool, StoreError> {
    let row: Option<(bool,)> =
        sqlx::query_as("SELECT unconfirmed FROM customers WHERE id = ?").bind(id.as_str()).fetch_optional(c).await?;
    Ok(row.is_some_and(|r| r.0))
}

/// Takes note that it waits for that, or no longer.
pub async fn set_unconfirmed(c: &mut SqliteConnection, id: &CustomerId, unconfirmed: bool) -> Result<(), StoreError> {
    sqlx::query("UPDATE customers SET unconfirmed = ? WHERE id = ?")
        .bind(unconfirmed)
        .bind(id.as_str())
        .execute(c)
        .await?;
    Ok(())
}

/// Lets a customer's VMs run in a cloud.
pub async fn allow_cloud(c: &mut SqliteConnection, customer: &CustomerId, cloud: &CloudId) -> Result<(), StoreError> {
    sqlx::query("INSERT OR IGNORE INTO customer_clouds (customer, cloud) VALUES (?, ?)")
        .bind(customer.as_str())
        .bind(cloud.as_str())
        .execute(c)
        .await?;
    Ok(())
}

/// Customers whose VMs may run in a cloud.
pub async fn customers_of_cloud(c: &mut SqliteConnection, cloud: &CloudId) -> Result<Vec<CustomerId>, StoreError> {
    let rows: Vec<(String,)> = sqlx::query_as("SELECT customer FROM customer_clouds WHERE cloud = ? ORDER BY customer")
        .bind(cloud.as_str())
        .fetch_all(c)
        .await?;
    rows.iter().map(|(id,)| label(id, "customer")).collect()
}

/// Registers an administrator; false where name or key is taken.
pub async fn add_admin(c: &mut SqliteConnection, admin: &Admin, key: &Digest, now_us: u64) -> Result<bool, StoreError> {
    let done =
        sqlx::query("INSERT OR IGNORE INTO admins (name, key, role, customer, created_us) VALUES (?, ?, ?, ?, ?)")
            .bind(&admin.name)
            .bind(&key.as_bytes()[..])
            .bind(admin.role.name())
            .bind(admin.customer.as_ref().map(CustomerId::as_str))
            .bind(time_column(now_us))
            .execute(c)
            .await?;
    Ok(done.rows_affected() == 1)
}

/// The administrator with this key, unless revoked.
pub async fn admin_by_key(c: &mut SqliteConnection, key: &Digest) -> Result<Option<Admin>, StoreError> {
    let row: Option<(String, String, Option<String>)> =
        sqlx::query_as("SELECT name, role, customer FROM admins WHERE key = ? AND revoked = 0")
            .bind(&key.as_bytes()[..])
            .fetch_optional(c)
            .await?;
    row.map(|(name, role, customer)| read_admin(name, &role, customer.as_deref())).transpose()
}

/// Every administrator: the record, its key, whether it is revoked.
pub async fn admins(c: &mut SqliteConnection) -> Result<Vec<(Admin, Digest, bool)>, StoreError> {
    type Row = (String, String, Option<String>, Vec<u8>, bool);
    let rows: Vec<Row> =
        sqlx::query_as("SELECT name, role, customer, key, revoked FROM admins ORDER BY name").fetch_all(c).await?;
    rows.into_iter()
        .map(|(name, role, customer, key, revoked)| {
            Ok((read_admin(name, &role, customer.as_deref())?, digest(&key, "administrator's key")?, revoked))
        })
        .collect()
}

/// Revokes an administrator.
pub async fn revoke_admin(c: &mut SqliteConnection, name: &str) -> Result<(), StoreError> {
    sqlx::query("UPDATE admins SET revoked = 1 WHERE name = ?").bind(name).execute(c).await?;
    Ok(())
}

fn read_admin(name: String, role: &str, customer: Option<&str>) -> Result<Admin, StoreError> {
    let role = match role {
        "admin" => Role::Admin,
        "auditor" => Role::Auditor,
        _ => return Err(StoreError::Damaged("role")),
    };
    Ok(Admin { name, role, customer: customer.map(|t| label(t, "customer")).transpose()? })
}
