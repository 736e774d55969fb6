//! Answers that hold keys, kept until their nonce's end: a process that lost one asks again with the same bytes and gets
//! the same one, also from a provider that was killed in between.

use super::{StoreError, digest, time_column};
use policy::{AttestationId, Digest};
use sqlx::SqliteConnection;

/// A kept answer.
#[derive(Debug, Clone)]
pub struct Answer {
    /// SHA-256 of the client key it was given to.
    pub client_key: Digest,
    /// SHA-256 of the evidence it answers.
    pub evidence: Digest,
    /// The body.
    pub body: Vec<u8>,
}

/// The answer to an attestation, while its nonce lives.
pub async fn find(
    c: &mut SqliteConnection,
    attestation: &AttestationId,
    now_us: u64,
) -> Result<Option<Answer>, StoreError> {
    let row: Option<(Vec<u8>, Vec<u8>, Vec<u8>)> =
        sqlx::query_as("SELECT client_key, evidence, body FROM answers WHERE attestation = ? AND until_us > ?")
            .bind(&attestation.0[..])
            .bind(time_column(now_us))
            .fetch_optional(c)
            .await?;
    row.map(|(client_key, evidence, body)| {
        let client_key = digest(&client_key, "client key")?;
        Ok(Answer { client_key, evidence: digest(&evidence, "digest of evidence")?, body })
    })
    .transpose()
}

/// Keeps an answer, and drops those whose nonce has ended.
pub async fn keep(
    c: &mut SqliteConnection,
    attestation: &AttestationId,
    answer: &Answer,
    until_us: u64,
    now_us: u64,
) -> Result<(), StoreError> {
    sqlx::query("DELETE FROM answers WHERE until_us <= ?").bind(time_column(now_us)).execute(&mut *c).await?;
    sqlx::query("INSERT INTO answers (attestation, client_key, evidence, body, until_us) VALUES (?, ?, ?, ?, ?)")
        .bind(&attestation.0[..])
        .bind(&answer.client_key.as_bytes()[..])
        .bind(&answer.evidence.as_bytes()[..])
        .bind(&answer.body)
        .bind(time_column(until_us))
        .execute(c)
        .await?;
    Ok(())
}
