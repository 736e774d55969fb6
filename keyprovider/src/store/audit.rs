//! The audit log: one chain of events per customer, appended in the transaction that does what the event says.

use super::{StoreError, digest, number, time_column};
use policy::audit::{Actor, AuditEvent, AuditKind};
use policy::{AttestationId, CustomerId, Digest, HostId, InstanceNumber, VmId, VolumeId};
use sqlx::SqliteConnection;
use std::collections::BTreeMap;

/// The longest value of a detail, in bytes; longer ones are cut.
const DETAIL_LIMIT: usize = 1024;

/// An event before it has its place in the log.
#[derive(Debug, Clone)]
pub struct Draft {
    customer: CustomerId,
    actor: Actor,
    kind: AuditKind,
    vm: Option<VmId>,
    instance: Option<InstanceNumber>,
    host: Option<HostId>,
    volume: Option<VolumeId>,
    attestation: Option<AttestationId>,
    details: BTreeMap<String, String>,
}

/// An event in its place.
#[derive(Debug, Clone)]
pub struct Logged {
    /// Its position.
    pub sequence: u64,
    /// Its JSON bytes.
    pub event: Vec<u8>,
    /// SHA-256 of them.
    pub digest: Digest,
}

impl Draft {
    /// An event of `customer`'s log.
    pub fn new(customer: &CustomerId, actor: Actor, kind: AuditKind) -> Self {
        Self {
            customer: customer.clone(),
            actor,
            kind,
            vm: None,
            instance: None,
            host: None,
            volume: None,
            attestation: None,
            details: BTreeMap::new(),
        }
    }

    /// Makes it an event of another kind.
    pub fn kind(mut self, kind: AuditKind) -> Self {
        self.kind = kind;
        self
    }

    /// Names the VM.
    pub fn vm(mut self, vm: &VmId) -> Self {
        self.vm = Some(vm.clone());
        self
    }

    /// Names the instance.
    pub fn instance(mut self, instance: InstanceNumber) -> Self {
        self.instance = Some(instance);
        self
    }

    /// Names the host.
    pub fn host(mut self, host: HostId) -> Self {
        self.host = Some(host);
        self
    }

    /// Names the volume.
    pub fn volume(mut self, volume: VolumeId) -> Self {
        self.volume = Some(volume);
        self
    }

    /// Names the attestation.
    pub fn attestation(mut self, attestation: AttestationId) -> Self {
        self.attestation = Some(attestation);
        self
    }

    /// Adds a detail; never a secret.
    pub fn detail(mut self, name: impl Into<String>, value: impl ToString) -> Self {
        let mut value = value.to_string();
        if value.len() > DETAIL_LIMIT {
            let cut = (0..=DETAIL_LIMIT).rev().find(|at| value.is_char_boundary(*at)).unwrap_or(0);
            value.truncate(cut);
        }
        self.details.insert(name.into(), value);
        self
    }
}

/// Appends `draft` to its customer's log.
pub async fn append(c: &mut SqliteConnection, now_us: u64, draft: Draft) -> Result<Logged, StoreError> {
    let last: Option<(i64, Vec<u8>)> =
        sqlx::query_as("SELECT sequence, digest FROM audit WHERE customer = ? ORDER BY sequence DESC LIMIT 1")
            .bind(draft.customer.as_str())
            .fetch_optional(&mut *c)
            .await?;
    let (sequence, previous) = match last {
        Some((sequence, bytes)) => (number(sequence) + 1, digest(&bytes, "digest of an audit event")?),
        None => (1, Digest::of(b"")),
    };
    let event = AuditEvent {
        sequence,
        previous,
        time_us: now_us,
        customer: draft.customer,
        actor: draft.actor,
        kind: draft.kind,
        vm: draft.vm,
        instance: draft.instance,
        host: draft.host,
        volume: draft.volume,
        attestation: draft.attestation,
        details: draft.details,
    };
    let bytes = serde_json::to_vec(&event).map_err(|_| StoreError::Damaged("audit event"))?;
    let digest = Digest::of(&bytes);
    sqlx::query("INSERT INTO audit (customer, sequence, event, digest) VALUES (?, ?, ?, ?)")
        .bind(event.customer.as_str())
        .bind(time_column(sequence))
        .bind(&bytes)
        .bind(&digest.as_bytes()[..])
        .execute(c)
        .await?;
    Ok(Logged { sequence, event: bytes, digest })
}

/// Events from position `from` on, at most `limit`, as their JSON bytes.
pub async fn list(
    c: &mut SqliteConnection,
    customer: &CustomerId,
    from: u64,
    limit: u32,
) -> Result<Vec<Vec<u8>>, StoreError> {
    let rows: Vec<(Vec<u8>,)> =
        sqlx::query_as("SELECT event FROM audit WHERE customer = ? AND sequence >= ? ORDER BY sequence LIMIT ?")
            .bind(customer.as_str())
            .bind(time_column(from))
            .bind(limit)
            .fetch_all(c)
            .await?;
    Ok(rows.into_iter().map(|r| r.0).collect())
}
