//! Backups: a consistent copy of the database, fetched in chunks. Every key in it is wrapped; the master key is not in it.

use super::{Answer, Created, done, tell};
use crate::api::{BackupView, Done};
use crate::provider::Provider;
use crate::server::body::At;
use crate::server::gate::Caller;
use crate::server::problem::Refusal;
use crate::store::StoreError;
use crate::store::audit::Draft;
use attest::protocol::ProblemType;
use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use policy::audit::AuditKind;
use policy::{CustomerId, Digest};
use sha2::Digest as _;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::sync::Arc;

/// Bytes of a chunk.
pub const CHUNK: u64 = 128 * 1024;

/// The most backups that wait.
const WAITING: usize = 4;

/// Makes a backup.
pub async fn create(State(provider): State<Arc<Provider>>, caller: Caller) -> Created<BackupView> {
    let folder = folder(&provider);
    std::fs::create_dir_all(&folder).map_err(failed)?;
    std::fs::set_permissions(&folder, std::fs::Permissions::from_mode(0o700)).map_err(failed)?;
    if std::fs::read_dir(&folder).map_err(failed)?.count() >= WAITING {
        return Err(Refusal::new(ProblemType::TooMuch, "too many backups wait to be fetched")
            .hint("remove what is left in the provider's folder backups"));
    }
    let mut random = [0; 16];
    getrandom::fill(&mut random).map_err(|_| StoreError::Random)?;
    let id = hex::encode(random);
    let path = folder.join(&id);
    let copied = provider.db.copy_to(&path).await;
    let measured = match copied {
        Ok(()) => tokio::task::spawn_blocking({
            let path = path.clone();
            move || measure(&path)
        })
        .await
        .unwrap_or_else(|e| Err(std::io::Error::other(e))),
        Err(error) => {
            let _ = std::fs::remove_file(&path);
            return Err(error.into());
        }
    };
    let (length, digest) = measured.map_err(failed)?;
    let now_us = provider.clock.now_us();
    let mut tx = provider.db.write().await?;
    let draft = |customer: &CustomerId| {
        Draft::new(customer, caller.actor(), AuditKind::BackupCreated).detail("length", length).detail("digest", digest)
    };
    tell(&mut tx, now_us, None, draft).await?;
    tx.commit().await?;
    tracing::info!("a backup of {length} bytes was made by {:?}", caller.actor());
    Ok((StatusCode::CREATED, Json(BackupView { id, length, digest, chunk: CHUNK })))
}

/// One chunk of it.
pub async fn chunk(
    State(provider): State<Arc<Provider>>,
    At((id, chunk)): At<(String, u32)>,
) -> Result<Vec<u8>, Refusal> {
    let path = path(&provider, &id)?;
    let read = tokio::task::spawn_blocking(move || {
        let mut file = File::open(path)?;
        file.seek(SeekFrom::Start(u64::from(chunk) * CHUNK))?;
        let mut bytes = Vec::new();
        file.take(CHUNK).read_to_end(&mut bytes)?;
        Ok(bytes)
    });
    read.await.unwrap_or_else(|e| Err(std::io::Error::other(e))).map_err(failed)
}

/// Removes it.
pub async fn remove(State(provider): State<Arc<Provider>>, At(id): At<String>) -> Answer<Done> {
    std::fs::remove_file(path(&provider, &id)?).map_err(failed)?;
    done()
}

/// Removes what an earlier process left.
pub fn clear(provider: &Provider) {
    let _ = std::fs::remove_dir_all(folder(provider));
}

fn folder(provider: &Provider) -> PathBuf {
    provider.dir.join("backups")
}

fn path(provider: &Provider, id: &str) -> Result<PathBuf, Refusal> {
    let path = folder(provider).join(id);
    let good = id.len() == 32 && id.bytes().all(|b| b.is_ascii_hexdigit()) && path.is_file();
    if good { Ok(path) } else { Err(Refusal::missing("such backup")) }
}

fn measure(path: &std::path::Path) -> std::io::Result<(u64, Digest)> {
    let mut file = File::open(path)?;
    let mut hash = sha2::Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    let mut length = 0;
    loop {
        let n = file.read(&mut buffer)?;
        if n == 0 {
            return Ok((length, Digest(hash.finalize().into())));
        }
        hash.update(&buffer[..n]);
        length += n as u64;
    }
}

fn failed(error: std::io::Error) -> Refusal {
    tracing::error!("a backup failed: {error}");
    Refusal::new(ProblemType::Unavailable, "the backup can't be made or read just now")
}
