//! The database: SQLite in WAL mode with synchronous FULL. One connection writes, in transactions that take the write
//! lock at once; a commit that has returned survives a power cut. Functions of the submodules take a connection, so that a
//! whole decision (numbers, holders, audit events) is one transaction.

pub mod answers;
pub mod audit;
pub mod documents;
pub mod instances;
pub mod inventory;
pub mod people;
pub mod restore;
pub mod vms;
pub mod volumes;

use crate::keystore::KeyStoreError;
use policy::{Digest, KeyId};
use sqlx::sqlite::{SqliteConnectOptions, SqliteJournalMode, SqlitePool, SqlitePoolOptions, SqliteSynchronous};
use sqlx::{Sqlite, SqliteConnection, Transaction};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// What can go wrong with the database.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// SQLite says no.
    #[error("the database can't be used")]
    Database(#[from] sqlx::Error),
    /// The schema can't be brought up to date.
    #[error("the database's schema is not this program's")]
    Schema(#[from] sqlx::migrate::MigrateError),
    /// A value that this program would not have written.
    #[error("the database holds a {0} that can't be one")]
    Damaged(&'static str),
    /// A key can't be wrapped or unwrapped.
    #[error("a key can't be used")]
    Key(#[from] KeyStoreError),
    /// No random numbers.
    #[error("the kernel gives no random numbers")]
    Random,
    /// A file that is only a copy.
    #[error("{0} is a backup: bring it back with `fealty-keys restore`, which voids what may be out of date")]
    Backup(PathBuf),
    /// Nobody of that name.
    #[error("the backup knows no administrator {0}")]
    NoAdmin(String),
    /// A counter at its end.
    #[error("{0} has no numbers left")]
    Exhausted(&'static str),
}

/// The schema, one step a file.
static SCHEMA: sqlx::migrate::Migrator = sqlx::migrate!("./migrations");

/// The database of one provider.
#[derive(Debug, Clone)]
pub struct Database {
    writer: SqlitePool,
    readers: SqlitePool,
}

/// A transaction that holds the write lock.
pub type Write = Transaction<'static, Sqlite>;

/// How often the log is asked to be emptied: each time SQLite waits for whoever is in the way, for as long as `busy_timeout`.
const TRIES: u32 = 3;

impl Database {
    /// Opens the database in `path`, made where `create` says so, and brings its schema up to date.
    pub async fn open(path: &Path, create: bool) -> Result<Self, StoreError> {
        let options = SqliteConnectOptions::new()
            .filename(path)
            .create_if_missing(create)
            .journal_mode(SqliteJournalMode::Wal)
            .synchronous(SqliteSynchronous::Full)
            .foreign_keys(true)
            .pragma("trusted_schema", "OFF")
            .pragma("secure_delete", "ON")
            .busy_timeout(Duration::from_secs(10));
        let writer = SqlitePoolOptions::new()
            .max_connections(1)
            .acquire_timeout(Duration::from_secs(30))
            // A connection to a file does not go stale: no question whether it still stands before each use.
            .test_before_acquire(false)
            .connect_with(options.clone())
            .await?;
        SCHEMA.run(&writer).await?;
        let readers = SqlitePoolOptions::new()
            .max_connections(4)
            .acquire_timeout(Duration::from_secs(30))
            .test_before_acquire(false)
            .connect_with(options.read_only(true).create_if_missing(false))
            .await?;
        let database = Self { writer, readers };
        let mut reader = database.read().await?;
        let backup = meta(&mut reader, "backup").await?.is_some();
        drop(reader);
        if backup {
            // A log left beside it would be in the way of the restore that this asks for.
            database.close().await;
            return Err(StoreError::Backup(path.to_owned()));
        }
        // A killed provider may have destroyed a key that its log still has.
        database.truncate_log().await;
        Ok(database)
    }

    /// Starts a transaction that writes; commit it, or nothing happened.
    pub async fn write(&self) -> Result<Write, StoreError> {
        Ok(self.writer.begin_with("BEGIN IMMEDIATE").await?)
    }

    /// A connection that only reads.
    pub async fn read(&self) -> Result<sqlx::pool::PoolConnection<Sqlite>, StoreError> {
        Ok(self.readers.acquire().await?)
    }

    /// Writes a consistent copy of the database to `path`, marked so that no provider serves from it as it is.
    pub async fn copy_to(&self, path: &Path) -> Result<(), StoreError> {
        let mut reader = self.read().await?;
        sqlx::query("VACUUM INTO ?").bind(path.to_string_lossy().into_owned()).execute(&mut *reader).await?;
        drop(reader);
        let options = SqliteConnectOptions::new()
            .filename(path)
            .journal_mode(SqliteJournalMode::Delete)
            .synchronous(SqliteSynchronous::Full);
        let copy = SqlitePoolOptions::new().max_connections(1).connect_with(options).await?;
        let mut connection = copy.acquire().await?;
        set_meta(&mut connection, "backup", "yes").await?;
        drop(connection);
        copy.close().await;
        Ok(())
    }

    /// Empties the write-ahead log into the database, so that a key that was just destroyed is not there either. Waits for readers; where
    /// one stays all the while, the next key that is destroyed takes this one along, or the next start.
    pub async fn truncate_log(&self) {
        for _ in 0..TRIES {
            // SQLite, "PRAGMA wal_checkpoint": a row of whether a reader or writer was in the way, and two numbers of pages. SQLite itself
            // waits for them as long as it waits for locks.
            let row: Result<(i64, i64, i64), _> =
                sqlx::query_as("PRAGMA wal_checkpoint(TRUNCATE)").fetch_one(&self.writer).await;
            match row {
                Ok((0, _, _)) => return,
                Ok(_) => {}
                Err(error) => {
                    tracing::warn!("the write-ahead log could not be emptied: {error}");
                    return;
                }
            }
        }
        tracing::warn!(
            "the write-ahead log could not be emptied: a reader, perhaps a backup, is in the way. It may hold a key that was destroyed: \
             restart the provider when that is done"
        );
    }

    /// Closes every connection.
    pub async fn close(&self) {
        self.readers.close().await;
        self.writer.close().await;
    }
}

/// A setting of the provider.
pub async fn meta(c: &mut SqliteConnection, name: &str) -> Result<Option<String>, StoreError> {
    let row: Option<(String,)> =
        sqlx::query_as("SELECT value FROM meta WHERE name = ?").bind(name).fetch_optional(c).await?;
    Ok(row.map(|r| r.0))
}

/// Sets it.
pub async fn set_meta(c: &mut SqliteConnection, name: &str, value: &str) -> Result<(), StoreError> {
    sqlx::query("INSERT INTO meta (name, value) VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET value = excluded.value")
        .bind(name)
        .bind(value)
        .execute(c)
        .await?;
    Ok(())
}

/// The latest time that anything in the database was recorded at: whatever is done is in a customer's log.
pub async fn latest_us(c: &mut SqliteConnection) -> Result<u64, StoreError> {
    let row: (Option<i64>,) = sqlx::query_as(
        "SELECT max(json_extract(CAST(event AS TEXT), '$.time_us')) FROM audit
         WHERE (customer, sequence) IN (SELECT customer, max(sequence) FROM audit GROUP BY customer)",
    )
    .fetch_one(c)
    .await?;
    Ok(number(row.0.unwrap_or(0)))
}

/// A fresh key id, never given out before.
pub async fn new_key_id(c: &mut SqliteConnection) -> Result<KeyId, StoreError> {
    loop {
        let mut bytes = [0; 8];
        getrandom::fill(&mut bytes).map_err(|_| StoreError::Random)?;
        let id = KeyId(u64::from_be_bytes(bytes));
        let done = sqlx::query("INSERT OR IGNORE INTO key_ids (id) VALUES (?)")
            .bind(key_column(id))
            .execute(&mut *c)
            .await?
            .rows_affected();
        if done == 1 {
            return Ok(id);
        }
    }
}

/// One of the provider's own keys: its wrapped form and its public part.
pub async fn provider_key(c: &mut SqliteConnection, name: &str) -> Result<(Vec<u8>, Vec<u8>), StoreError> {
    sqlx::query_as("SELECT wrapped, public FROM provider_keys WHERE name = ?")
        .bind(name)
        .fetch_optional(c)
        .await?
        .ok_or(StoreError::Damaged("set of provider keys"))
}

/// Keeps one.
pub async fn add_provider_key(
    c: &mut SqliteConnection,
    name: &str,
    wrapped: &[u8],
    public: &[u8],
) -> Result<(), StoreError> {
    sqlx::query("INSERT INTO provider_keys (name, wrapped, public) VALUES (?, ?, ?)")
        .bind(name)
        .bind(wrapped)
        .bind(public)
        .execute(c)
        .await?;
    Ok(())
}

pub(crate) fn key_column(id: KeyId) -> i64 {
    i64::from_be_bytes(id.0.to_be_bytes())
}

pub(crate) fn key_id(column: i64) -> KeyId {
    KeyId(u64::from_be_bytes(column.to_be_bytes()))
}

pub(crate) fn time_column(time_us: u64) -> i64 {
    i64::try_from(time_us).unwrap_or(i64::MAX)
}

pub(crate) fn number(column: i64) -> u64 {
    u64::try_from(column).unwrap_or(0)
}

pub(crate) fn digest(bytes: &[u8], what: &'static str) -> Result<Digest, StoreError> {
    bytes.try_into().map(Digest).map_err(|_| StoreError::Damaged(what))
}

pub(crate) fn label<T: std::str::FromStr>(text: &str, what: &'static str) -> Result<T, StoreError> {
    text.parse().map_err(|_| StoreError::Damaged(what))
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn set(database: &Database, value: &str) {
        let mut tx = database.write().await.expect("begins");
        set_meta(&mut tx, "something", value).await.expect("set");
        tx.commit().await.expect("committed");
    }

    #[tokio::test]
    async fn a_killed_provider_s_log_is_emptied_at_the_next_start() {
        let folder = tempfile::tempdir().expect("a folder");
        let (path, log) = (folder.path().join("a.db"), folder.path().join("a.db-wal"));
        let database = Database::open(&path, true).await.expect("made");
        set(&database, "before").await;
        // What a killed process leaves.
        std::fs::copy(&path, folder.path().join("b.db")).expect("copied");
        std::fs::copy(&log, folder.path().join("b.db-wal")).expect("copied");
        let left = folder.path().join("b.db-wal");
        assert!(std::fs::metadata(&left).expect("there").len() > 0);
        let opened = Database::open(&folder.path().join("b.db"), false).await.expect("opens");
        assert_eq!(std::fs::metadata(&left).expect("there").len(), 0);
        let mut reader = opened.read().await.expect("reads");
        assert_eq!(meta(&mut reader, "something").await.expect("read").as_deref(), Some("before"));
    }

    #[tokio::test]
    async fn a_log_is_emptied_when_its_reader_is_done() {
        let folder = tempfile::tempdir().expect("a folder");
        let (path, log) = (folder.path().join("a.db"), folder.path().join("a.db-wal"));
        let database = Database::open(&path, true).await.expect("made");
        // Less patience than the reader has.
        sqlx::query("PRAGMA busy_timeout = 1").execute(&database.writer).await.expect("set");
        let mut reader = database.read().await.expect("reads");
        sqlx::query("BEGIN").execute(&mut *reader).await.expect("begins");
        assert!(meta(&mut reader, "something").await.expect("read").is_none());
        set(&database, "after").await;
        database.truncate_log().await;
        assert!(std::fs::metadata(&log).expect("there").len() > 0, "the reader needs what was before");
        sqlx::query("COMMIT").execute(&mut *reader).await.expect("ends");
        database.truncate_log().await;
        assert_eq!(std::fs::metadata(&log).expect("there").len(), 0);
    }
}
