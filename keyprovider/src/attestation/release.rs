//! From a verified host to released keys, in one transaction. Nothing leaves before its commit has returned: the event is in
//! the audit log, the numbers are spent, the holders are set, and the very answer is kept.

use super::challenge::Challenge;
use super::{Wanted, asks_for_itself, still_leased};
use crate::admin::volumes::{grant, holder_name, holds};
use crate::instance::{missing_end, missing_outcomes};
use crate::keystore::KeyLabel;
use crate::provider::Provider;
use crate::server::problem::Refusal;
use crate::store::audit::{Draft, Logged, append};
use crate::store::instances::{self, Instance};
use crate::store::inventory::{self, Cloud, CloudKind, ImaMark};
use crate::store::vms::{self, FileDisk};
use crate::store::volumes::{self, HolderKind};
use crate::store::{StoreError, answers, documents, new_key_id};
use attest::bundle::{BundleError, Sealer};
use attest::note::Receipt;
use attest::protocol::{Evidence, KeyName, PROTOCOL_VERSION, ProblemType, Release, Released};
use attest::verify::VerifiedEvidence;
use policy::audit::{Actor, AuditKind};
use policy::disk::{CipherSuite, VolumeGrant};
use policy::document::{PolicyInForce, Settings};
use policy::instance::{Candidate, EarlierPeer};
use policy::operation::Operation;
use policy::{Base64Url, Digest, ReferenceValues};
use policy_cedar::{Question, Verdict};
use secretmem::Secret;
use sqlx::SqliteConnection;
use std::sync::Arc;
use tokio::task::JoinHandle;

/// What is handed over: names for the readable part, keys for the sealed one.
#[derive(Default)]
struct Handed {
    volumes: Vec<VolumeGrant>,
    names: Vec<KeyName>,
    keys: Vec<Secret<32>>,
}

/// Decides on a verified host's request, and answers with the body of a [`Released`].
pub async fn release(
    provider: &Arc<Provider>,
    challenge: &Challenge,
    evidence: &Evidence,
    verified: VerifiedEvidence,
    evidence_digest: Digest,
    wanted: Wanted,
) -> Result<Vec<u8>, Refusal> {
    let sealer = sealer(&verified);
    let mut tx = provider.db.write().await?;
    let now_us = provider.clock.now_us();
    let c: &mut SqliteConnection = &mut tx;
    remember_key(c, challenge, now_us).await?;
    let cloud = known_platform(c, challenge, &verified).await?;
    let (settings, policy) = permitted(provider, c, challenge, &verified, &cloud, now_us).await?;
    let mut instance = match challenge.operation.operation {
        Operation::PowerOn => new_instance(c, challenge, evidence, &verified, now_us).await?,
        _ => same_instance(c, challenge, evidence, &verified, now_us).await?,
    };
    // Slow clocks: a lease counts a thousandth longer here than it is given.
    let lease_us = settings.lease.end_ms() * 1001;
    instance.lease_end_us = instance.lease_end_us.max(now_us + lease_us);
    instance.lease_us = instance.lease_end_us - now_us;
    let handed = match challenge.operation.operation {
        Operation::PowerOn => {
            instances::add_instance(c, &instance).await?;
            power_on_keys(provider, c, &instance, now_us).await?
        }
        operation => {
            instances::update_instance(c, &instance).await?;
            volumes::extend_all(c, &instance.customer, &instance.vm, instance.number, instance.lease_end_us).await?;
            match operation {
                Operation::CoreDump => dump_key(provider, c, challenge, &instance, now_us).await?,
                Operation::ResizeDisk => {
                    permit(c, challenge, &instance, now_us, |before| before).await?;
                    same_keys(provider, c, &instance, now_us).await?
                }
                _ => same_keys(provider, c, &instance, now_us).await?,
            }
        }
    };
    let release = Release {
        version: PROTOCOL_VERSION,
        customer: instance.customer.clone(),
        vm: instance.vm.clone(),
        instance: instance.number,
        attestation: challenge.id,
        qualified: verified.qualified,
        host: instance.host,
        lab: cloud.kind == CloudKind::Lab,
        cloud: cloud.id,
        operation: challenge.operation.clone(),
        lease: settings.lease,
        unreported_seconds: settings.unreported_seconds,
        policy,
        volumes: handed.volumes,
        keys: handed.names,
    };
    let release_json = serde_json::to_vec(&release).map_err(|_| StoreError::Damaged("release"))?;
    let logged = append(c, now_us, event_of(&release, &release_json, &instance)).await?;
    let keys: Vec<&Secret<32>> = handed.keys.iter().collect();
    let sealer = sealer.await.map_err(|_| super::unavailable())?.map_err(unsealed)?;
    let body = answer(provider, sealer, &release, release_json, &keys, logged)?;
    let kept = answers::Answer { client_key: challenge.client_key, evidence: evidence_digest, body };
    answers::keep(c, &challenge.id, &kept, challenge.until_us, now_us).await?;
    match wanted {
        Wanted::Keys => tx.commit().await?,
        // Nothing of it happened: neither numbers nor holders nor the event.
        Wanted::Opinion => tx.rollback().await?,
    }
    Ok(kept.body)
}

/// Makes what seals the bundle, beside the transaction: it depends on the verified keys alone.
fn sealer(verified: &VerifiedEvidence) -> JoinHandle<Result<Sealer, BundleError>> {
    let (bundle_key, wrap_key) = (verified.bundle_key, verified.wrap_key.clone());
    tokio::task::spawn_blocking(move || Sealer::new(&bundle_key, &wrap_key))
}

fn unsealed(error: BundleError) -> Refusal {
    Refusal::new(ProblemType::BadEvidence, format!("the bundle can't be sealed: {error}"))
}

/// The attestation key has been proved: by the record it was verified with, or by the credential just now.
async fn remember_key(c: &mut SqliteConnection, challenge: &Challenge, now_us: u64) -> Result<(), Refusal> {
    if challenge.secret.is_some() {
        inventory::add_ak(c, &challenge.host, &challenge.ak_name, &challenge.ak_public, now_us).await?;
    }
    Ok(())
}

/// Whether the host still stands in an inventory of the customer, and everything it runs is known.
async fn known_platform(
    c: &mut SqliteConnection,
    challenge: &Challenge,
    verified: &VerifiedEvidence,
) -> Result<Cloud, Refusal> {
    let found = inventory::host_for(c, &challenge.customer, &challenge.host).await?;
    let (_, cloud) = found
        .ok_or_else(|| Refusal::new(ProblemType::UnknownTpm, "the host was taken out of the customer's inventory"))?;
    let (version, reference) = documents::reference(c, &challenge.customer)
        .await?
        .ok_or_else(|| Refusal::new(ProblemType::UntrustedPlatform, "the customer has set no reference values"))?;
    let reference: ReferenceValues =
        serde_json::from_str(&reference).map_err(|_| StoreError::Damaged("set of reference values"))?;
    reference.judge(&verified.state).map_err(|e| Refusal::new(ProblemType::UntrustedPlatform, e.to_string()))?;
    if let Some(state) = verified.ima {
        // What came before the evidence was judged by the values of when it was asked for.
        if challenge.ima.is_some_and(|ima| ima.state.offset > 0) && challenge.reference != version {
            return Err(Refusal::new(ProblemType::StaleNonce, "the reference values were changed meanwhile")
                .hint("begin a new attestation"));
        }
        let mark = ImaMark { reference: version, reset_count: verified.clock.reset_count, state };
        inventory::set_ima(c, &challenge.customer, &challenge.host, &challenge.ak_name, &mark).await?;
    }
    Ok(cloud)
}

/// Whether the customer's policy lets this host do this now.
async fn permitted(
    provider: &Provider,
    c: &mut SqliteConnection,
    challenge: &Challenge,
    verified: &VerifiedEvidence,
    cloud: &Cloud,
    now_us: u64,
) -> Result<(Settings, PolicyInForce), Refusal> {
    let refuses = |why: String| Refusal::new(ProblemType::PolicyRefuses, why);
    let (policy, rules) = provider.rules.in_force(c, &challenge.customer).await?.map_err(refuses)?;
    rules.settings.judge(&verified.claims).map_err(|e| refuses(e.to_string()))?;
    let operation = challenge.operation.operation;
    let instance = match operation {
        Operation::PowerOn => None,
        _ => instances::last_instance(c, &challenge.customer, &challenge.vm).await?.map(|i| i.number),
    };
    let question = Question {
        host: challenge.host,
        lab: cloud.kind == CloudKind::Lab,
        cloud: cloud.id.clone(),
        customer: challenge.customer.clone(),
        vm: challenge.vm.clone(),
        operation,
        instance,
        time_unix_s: now_us / 1_000_000,
        key_memory: verified.claims.key_memory,
        ptrace_scope: verified.claims.ptrace_scope,
        parameters: &challenge.operation.parameters,
        operations_last_hour: vms::count_asked(c, &challenge.customer, &challenge.vm, now_us).await?,
    };
    match rules.cedar.decide(&question) {
        Verdict::Permit { .. } => Ok((rules.settings.clone(), policy.in_force())),
        Verdict::Refuse { reason } => Err(refuses(reason)),
    }
}

/// A new instance: the current VM file, and no other instance alive.
async fn new_instance(
    c: &mut SqliteConnection,
    challenge: &Challenge,
    evidence: &Evidence,
    verified: &VerifiedEvidence,
    now_us: u64,
) -> Result<Instance, Refusal> {
    let (customer, id) = (&challenge.customer, &challenge.vm);
    let vm = vms::find(c, customer, id).await?.ok_or_else(|| Refusal::missing(format!("VM {id} of {customer}")))?;
    if vm.current_file != Some(evidence.vm_file) {
        return Err(Refusal::new(ProblemType::NotCurrentFile, format!("this is not the current file of VM {id}"))
            .hint("use the newest VM file; going back to an older one is for the customer: fealty-keys vm back FILE"));
    }
    let still = |what: String| Refusal::new(ProblemType::StillRuns, what);
    if now_us < vm.unconfirmed_until_us {
        return Err(still(format!(
            "the provider was restored; until {} an instance of VM {id} that it never saw may run",
            crate::clock::utc(vm.unconfirmed_until_us)
        ))
        .hint(format!("wait, or state that none runs: fealty-keys vm confirm {customer} {id}")));
    }
    let last = instances::last_instance(c, customer, id).await?;
    // The service's word on earlier peers counts for the attestation key it was given with, and for instances that had
    // started when this process asked for its nonce: a quote that was held back knows nothing of one that started since.
    let knows = |last: &Instance| last.ak == challenge.ak_name && challenge.asked_us() >= last.started_us;
    let earlier_peer = if last.as_ref().is_none_or(knows) { verified.earlier_peer } else { EarlierPeer::Unknown };
    let candidate = Candidate { host: challenge.host, reset_count: verified.clock.reset_count, earlier_peer };
    let as_last = last.as_ref().map(|l| l.as_last(super::lease_past(l, now_us)));
    let number = policy::instance::next(as_last.as_ref(), &candidate, vm.instance_floor);
    let number = number.map_err(|e| still(e.to_string()))?;
    // Whatever the last instance held is free: it was just proved to be gone.
    volumes::free_all(c, customer, id).await?;
    if let Some(last) = &last {
        missing_outcomes(c, last, now_us).await?;
        if !last.ended {
            missing_end(c, last, now_us).await?;
        }
    }
    Ok(Instance {
        customer: customer.clone(),
        vm: id.clone(),
        number,
        client_key: challenge.client_key,
        host: challenge.host,
        ak: challenge.ak_name.clone(),
        reset_count: verified.clock.reset_count,
        file: evidence.vm_file,
        started_us: now_us,
        lease_end_us: 0,
        lease_us: 0,
        ended: false,
        revoked: false,
        report_sequence: 0,
        report_digest: policy::report::chain_start(customer, id, number),
        gap_at: 0,
    })
}

/// The same instance: client key, attestation key, boot and VM file as when it started.
async fn same_instance(
    c: &mut SqliteConnection,
    challenge: &Challenge,
    evidence: &Evidence,
    verified: &VerifiedEvidence,
    now_us: u64,
) -> Result<Instance, Refusal> {
    let instance = asks_for_itself(c, &challenge.client_key, &challenge.customer, &challenge.vm).await?;
    // Once more: the evidence may have been held back until the lease was over.
    still_leased(challenge.operation.operation, &instance, now_us)?;
    let same_boot = instance.host == challenge.host
        && instance.ak == challenge.ak_name
        && instance.reset_count == verified.clock.reset_count;
    if !same_boot {
        return Err(Refusal::new(ProblemType::OldInstance, "the instance started in another boot, or on another host"));
    }
    if instance.file != evidence.vm_file {
        return Err(Refusal::new(ProblemType::NotCurrentFile, "the instance started with another VM file"));
    }
    Ok(instance)
}

async fn power_on_keys(
    provider: &Provider,
    c: &mut SqliteConnection,
    instance: &Instance,
    now_us: u64,
) -> Result<Handed, Refusal> {
    let (mut handed, disks) = file_key(provider, c, instance).await?;
    for disk in disks {
        let volume = volumes::by_id(c, &instance.customer, &disk.volume).await?;
        let volume = volume.ok_or_else(|| Refusal::missing(format!("volume {}", disk.volume)))?;
        if volume.anchor.is_none() {
            let what = format!("volume {} was never created to its end: it has no anchor", volume.name);
            return Err(Refusal::new(ProblemType::VolumeHeld, what)
                .hint("fill it first: fealty-keys volume exec CUSTOMER NAME -- fealty-disk import IMAGE VOLUME"));
        }
        let kind = HolderKind::Instance(instance.vm.clone(), instance.number);
        let (key, until) = (instance.client_key, instance.lease_end_us);
        let granted = grant(c, &volume, disk.anchor_mode, kind, key, until, now_us).await?;
        hand_volume(provider, &mut handed, &volume, granted)?;
    }
    Ok(handed)
}

/// The same keys, open numbers and modes again, with the anchors of now.
async fn same_keys(
    provider: &Provider,
    c: &mut SqliteConnection,
    instance: &Instance,
    now_us: u64,
) -> Result<Handed, Refusal> {
    let (mut handed, disks) = file_key(provider, c, instance).await?;
    let own = HolderKind::Instance(instance.vm.clone(), instance.number);
    for disk in disks {
        let volume = volumes::by_id(c, &instance.customer, &disk.volume).await?;
        let volume = volume.ok_or_else(|| Refusal::missing(format!("volume {}", disk.volume)))?;
        let holder = match volumes::holder(c, &volume.id).await? {
            Some(holder) if holder.kind == own => holder,
            Some(other) if holds(&other, now_us) => {
                let what = format!("volume {} went to {}", volume.name, holder_name(&other));
                return Err(Refusal::new(ProblemType::VolumeHeld, what));
            }
            // Closed by the instance itself, or lost after its lease: an open number is never given twice.
            _ => {
                let what = format!("volume {} is no longer held by instance {}", volume.name, instance.number);
                return Err(Refusal::new(ProblemType::VolumeHeld, what).hint("power the VM off and on again"));
            }
        };
        let key_id = volume.key_id.ok_or(StoreError::Damaged("volume without a key id"))?;
        let granted = VolumeGrant {
            volume: volume.id,
            customer: volume.customer.clone(),
            cipher: CipherSuite::Aes256XtsHmacSha256,
            kek_id: volume.kek_id,
            key_id,
            open_number: holder.open_number,
            anchor: volume.anchor.clone(),
            anchor_mode: disk.anchor_mode,
        };
        hand_volume(provider, &mut handed, &volume, granted)?;
    }
    Ok(handed)
}

/// The VM file's key, and the disks that the file names.
async fn file_key(
    provider: &Provider,
    c: &mut SqliteConnection,
    instance: &Instance,
) -> Result<(Handed, Vec<FileDisk>), Refusal> {
    let (customer, vm) = (&instance.customer, &instance.vm);
    let file = vms::file(c, customer, vm, &instance.file).await?.ok_or(StoreError::Damaged("VM file"))?;
    let key = provider.keys.unwrap_32(KeyLabel::VmFile(customer, vm, file.key_id), &file.wrapped)?;
    let handed = Handed { volumes: Vec::new(), names: vec![KeyName::VmFile(file.key_id)], keys: vec![key] };
    Ok((handed, file.disks))
}

fn hand_volume(
    provider: &Provider,
    handed: &mut Handed,
    volume: &volumes::Volume,
    granted: VolumeGrant,
) -> Result<(), Refusal> {
    let label = KeyLabel::Volume(&volume.customer, &volume.id, volume.kek_id);
    handed.keys.push(provider.keys.unwrap_32(label, &volume.kek_wrapped)?);
    handed.names.push(KeyName::Volume(handed.volumes.len()));
    handed.volumes.push(granted);
    Ok(())
}

/// The one-time key of a core dump, kept for the customer.
async fn dump_key(
    provider: &Provider,
    c: &mut SqliteConnection,
    challenge: &Challenge,
    instance: &Instance,
    now_us: u64,
) -> Result<Handed, Refusal> {
    let (customer, vm) = (&instance.customer, &instance.vm);
    let key_id = new_key_id(c).await?;
    let key = Secret::<32>::random().map_err(crate::keystore::KeyStoreError::from)?;
    let wrapped = provider.keys.wrap(KeyLabel::Stream(customer, vm, key_id), key.expose())?;
    vms::add_stream_key(c, instance, &challenge.id, key_id, &wrapped, now_us).await?;
    permit(c, challenge, instance, now_us, |before| before.detail("key_id", key_id)).await?;
    Ok(Handed { volumes: Vec::new(), names: vec![KeyName::Stream(key_id)], keys: vec![key] })
}

/// A restricted operation is permitted: its "before", to which `f` adds, and that its "after" is owed.
async fn permit(
    c: &mut SqliteConnection,
    challenge: &Challenge,
    instance: &Instance,
    now_us: u64,
    f: impl FnOnce(Draft) -> Draft,
) -> Result<(), Refusal> {
    vms::add_permit(c, instance, &challenge.id, challenge.operation.operation).await?;
    let before = Draft::new(&instance.customer, Actor::Instance, AuditKind::OperationPermitted)
        .vm(&instance.vm)
        .instance(instance.number)
        .host(instance.host)
        .attestation(challenge.id)
        .detail("operation", challenge.operation.operation);
    let mut before = f(before);
    for (name, value) in &challenge.operation.parameters {
        before = before.detail(format!("parameter.{name}"), value);
    }
    append(c, now_us, before).await?;
    Ok(())
}

/// The event that the receipt names. It covers all of the release by its digest, and says the parts that people look for.
fn event_of(release: &Release, release_json: &[u8], instance: &Instance) -> Draft {
    let mut draft = Draft::new(&release.customer, Actor::Instance, AuditKind::KeysReleased)
        .vm(&release.vm)
        .instance(release.instance)
        .host(release.host)
        .attestation(release.attestation)
        .detail("operation", release.operation.operation)
        .detail("qualified", release.qualified)
        .detail("vm_file", instance.file)
        .detail("release", Digest::of(release_json))
        .detail("lab", release.lab)
        .detail("cloud", &release.cloud)
        .detail("lease_seconds", release.lease.seconds)
        .detail("lease_quiesce_seconds", release.lease.quiesce_seconds);
    for volume in &release.volumes {
        let anchor = volume.anchor.as_ref().map(|a| Base64Url::from(&a.as_bytes()[..]).to_string());
        let anchor = anchor.unwrap_or_else(|| "-".to_owned());
        draft = draft.detail(format!("volume.{}", volume.volume), format!("{} {anchor}", volume.open_number));
    }
    draft
}

fn answer(
    provider: &Provider,
    sealer: Sealer,
    release: &Release,
    release_json: Vec<u8>,
    keys: &[&Secret<32>],
    logged: Logged,
) -> Result<Vec<u8>, Refusal> {
    let sealed = sealer.seal(&release_json, keys).map_err(unsealed)?;
    let origin = provider.audit_origin(&release.customer);
    let receipt = Receipt { origin, sequence: logged.sequence, event: logged.digest };
    let receipt = receipt.sign(&provider.audit_key.seed).map_err(|_| StoreError::Damaged("audit key"))?;
    let released =
        Released { release: release_json.into(), sealed: sealed.into(), event: logged.event.into(), receipt };
    serde_json::to_vec(&released).map_err(|_| StoreError::Damaged("answer").into())
}
