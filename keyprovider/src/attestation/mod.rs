//! The way of a key, from a host's first question to its bundle:
//!
//! ```text
//! ask        customer, VM, EK in an inventory of the customer? known AK? a nonce, or a nonce and a credential
//! prove      room for the announced length; nonce consumed; activation; then verdict and release, in a task that the client
//!            can't cut short
//! verdict    signature, nonce, H, PCR digest = replayed logs (attest::verify)
//! release    in one transaction: layers known, claims, current file, policy, no other instance, volumes free;
//!            instance and open numbers issued, holders set, event appended, bundle sealed, answer kept; then commit
//! ```

pub mod challenge;
pub mod ek;
pub mod lanes;
pub mod release;
pub mod rules;
pub mod verdict;

use crate::bounds::Allowance;
use crate::provider::{Provider, Refused};
use crate::server::body::{At, Json as Body, SMALL, length, parse, read};
use crate::server::gate::Caller;
use crate::server::problem::Refusal;
use crate::store::audit::{Draft, append};
use crate::store::instances::{self, Instance};
use crate::store::vms;
use crate::store::{StoreError, answers, documents, inventory, people};
use attest::protocol::{
    AttestationRequest, Challenge as Answer, Evidence, Opinion, PROTOCOL_VERSION, ProblemType, REQUEST_LIMIT,
};
use attest::tpm::{Name, Public, check_ak, check_ek, make_credential};
use axum::Json;
use axum::body::Body as HttpBody;
use axum::extract::{Request, State};
use axum::http::{Response, StatusCode, header};
use axum::response::IntoResponse;
use challenge::{Challenge, ImaStart, NONCE_US, Taken};
use lanes::Lane;
use policy::audit::{Actor, AuditKind};
use policy::operation::Operation;
use policy::{AttestationId, CustomerId, Digest, HostId, Nonce, OperationClass, ReferenceValues, VmId};
use secretmem::Secret;
use sqlx::SqliteConnection;
use std::sync::Arc;
use tokio::sync::watch;

/// How long after a lease's end, by the provider's clock, its instance counts as gone. Leases are counted a thousandth
/// longer here than they are given, for the sake of slow clocks.
pub const LEASE_MARGIN_US: u64 = 2_000_000;

/// An IMA log of which so many bytes were read is not sent again from its start for a power-on.
const LONG_IMA: u64 = 1 << 20;

/// Asks for a nonce.
pub async fn ask(
    State(provider): State<Arc<Provider>>,
    caller: Caller,
    At(vm): At<VmId>,
    Body(request): Body<AttestationRequest, SMALL>,
) -> Result<(StatusCode, Json<Answer>), Refusal> {
    let customer = request.customer.clone();
    let operation = request.operation.operation;
    let host = host_of(&request);
    match challenge_for(&provider, &caller, &vm, request).await {
        Ok(answer) => Ok((StatusCode::CREATED, Json(answer))),
        Err(refusal) => {
            if tells(refusal.kind) {
                let draft = Draft::new(&customer, Actor::Stranger, AuditKind::AttestationRefused)
                    .vm(&vm)
                    .detail("operation", operation)
                    .detail("endorsement_key", host.map_or("unreadable".into(), |h| h.to_string()))
                    .detail("address", caller.address);
                log(&provider, &customer, because(draft, &refusal), None).await;
            }
            Err(refusal)
        }
    }
}

/// Takes evidence and answers with keys.
pub async fn prove(
    State(provider): State<Arc<Provider>>,
    caller: Caller,
    At((vm, id)): At<(VmId, AttestationId)>,
    request: Request,
) -> Result<Response<HttpBody>, Refusal> {
    answer_to(provider, caller, vm, id, request, Wanted::Keys).await
}

/// Takes evidence and says what it would be answered with. The nonce is used up; nothing is released.
pub async fn examine(
    State(provider): State<Arc<Provider>>,
    caller: Caller,
    At((vm, id)): At<(VmId, AttestationId)>,
    request: Request,
) -> Result<Response<HttpBody>, Refusal> {
    answer_to(provider, caller, vm, id, request, Wanted::Opinion).await
}

/// What evidence is sent for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wanted {
    /// Keys.
    Keys,
    /// To know whether there would be keys.
    Opinion,
}

async fn answer_to(
    provider: Arc<Provider>,
    caller: Caller,
    vm: VmId,
    id: AttestationId,
    request: Request,
    wanted: Wanted,
) -> Result<Response<HttpBody>, Refusal> {
    let lane = match provider.challenges.lane(&id, &caller.key, &vm, provider.clock.now_us()) {
        Some(lane) => lane,
        None => kept_answer(&provider, &caller, &id).await?.map(|_| Lane::Instance(caller.key)).ok_or_else(stale)?,
    };
    let length = length(&request, REQUEST_LIMIT)?;
    let full = || Refusal::new(ProblemType::Unavailable, "there is too much evidence at once").hint("try again");
    let place = provider.lanes.enter(lane, length).await.ok_or_else(full)?;
    let bytes = read(request, REQUEST_LIMIT).await?;
    // The same bytes for the other purpose are another request.
    let digest = Digest::of_fields(if wanted == Wanted::Keys { "evidence" } else { "opinion" }, &[&bytes]);
    let mut answer = match provider.challenges.take(&id, &caller.key, &digest, provider.clock.now_us()) {
        Taken::Wait(answer) => {
            drop(place);
            answer
        }
        Taken::Judge(challenge, sender) => {
            let answer = sender.subscribe();
            // A task of its own: a client that hangs up can't stop a decision half way. It keeps the place: what waits to be
            // judged is megabytes too.
            let judged = judge(provider.clone(), lane, challenge, bytes, digest, wanted, sender);
            tokio::spawn(async move {
                judged.await;
                drop(place);
            });
            answer
        }
        // Keys were released already, perhaps a moment ago, perhaps by a provider that ran before this one.
        Taken::Unknown => {
            let kept = kept_answer(&provider, &caller, &id).await?;
            return kept.filter(|k| k.evidence == digest).map(|k| json(k.body)).ok_or_else(stale);
        }
        Taken::Stale => return Err(stale()),
    };
    let answer = answer.wait_for(Option::is_some).await.map_err(|_| unavailable())?.clone();
    answer.unwrap_or_else(|| Err(unavailable())).map(|body| json(body.to_vec()))
}

async fn judge(
    provider: Arc<Provider>,
    lane: Lane,
    challenge: Box<Challenge>,
    bytes: Vec<u8>,
    digest: Digest,
    wanted: Wanted,
    sender: watch::Sender<Option<challenge::Answer>>,
) {
    let draft = Draft::new(&challenge.customer, Actor::Stranger, AuditKind::AttestationRefused)
        .vm(&challenge.vm)
        .host(challenge.host)
        .attestation(challenge.id)
        .detail("operation", challenge.operation.operation)
        .detail("address", challenge.address);
    let restricted = challenge.operation.operation.class() == OperationClass::Restricted;
    let (id, customer, vm) = (challenge.id, challenge.customer.clone(), challenge.vm.clone());
    let answer = match provider.lanes.judge(lane).await {
        Some(_turn) => decide(&provider, *challenge, bytes, digest, wanted).await,
        None => Err(unavailable()),
    };
    let answer = match (wanted, answer) {
        (Wanted::Keys, Ok(body)) => Ok(body),
        (Wanted::Keys, Err(refusal)) => {
            let by_policy = refusal.kind == ProblemType::PolicyRefuses;
            let draft = if by_policy && restricted { draft.kind(AuditKind::OperationRefused) } else { draft };
            log(&provider, &customer, because(draft, &refusal), by_policy.then_some(&vm)).await;
            Err(refusal)
        }
        (Wanted::Opinion, Err(refusal)) if !tells(refusal.kind) => Err(refusal),
        (Wanted::Opinion, decided) => {
            let draft = draft.kind(AuditKind::AttestationExamined).detail("would_release", decided.is_ok());
            let problem = decided.err();
            let draft = problem.iter().fold(draft, because);
            log(&provider, &customer, draft, None).await;
            let opinion = Opinion { would_release: problem.is_none(), problem: problem.map(|p| p.document()) };
            serde_json::to_vec(&opinion).map_err(|_| unavailable())
        }
    };
    let released = wanted == Wanted::Keys && answer.is_ok();
    sender.send_replace(Some(answer.map(Arc::new)));
    if released {
        // From here on the database has the answer.
        provider.challenges.forget(&id);
    }
}

async fn decide(
    provider: &Arc<Provider>,
    challenge: Challenge,
    bytes: Vec<u8>,
    digest: Digest,
    wanted: Wanted,
) -> Result<Vec<u8>, Refusal> {
    let pin = provider.pin;
    // Megabytes of JSON, replays and signatures: not on the threads that serve connections.
    let judged = tokio::task::spawn_blocking(move || {
        let evidence = read_evidence(&challenge, &bytes)?;
        let verified = verdict::verify(&challenge, &evidence, &pin);
        Ok::<_, Refusal>((challenge, evidence, verified))
    });
    let (challenge, evidence, verified) = judged.await.map_err(|_| unavailable())??;
    // Only of evidence that this host's TPM signed for this request: whoever merely asks must not undo what was read.
    if verified.as_ref().is_err_and(|r| r.kind == ProblemType::BadLog) && verdict::may_be_ima(&challenge) {
        let mut tx = provider.db.write().await?;
        inventory::forget_ima(&mut tx, &challenge.customer, &challenge.host, &challenge.ak_name).await?;
        tx.commit().await?;
        return verified.map(|_| Vec::new()).map_err(|r| r.hint("attest again: the whole IMA log will be asked for"));
    }
    release::release(provider, &challenge, &evidence, verified?, digest, wanted).await
}

fn read_evidence(challenge: &Challenge, bytes: &[u8]) -> Result<Evidence, Refusal> {
    let evidence: Evidence = parse(bytes)?;
    if evidence.version != PROTOCOL_VERSION || evidence.operation != challenge.operation {
        return Err(Refusal::new(ProblemType::BadRequest, "the evidence is for another operation or protocol version"));
    }
    activated(challenge, &evidence)?;
    Ok(evidence)
}

/// Whether the AK was proved to live beside the EK: by the record, or by the credential's secret.
fn activated(challenge: &Challenge, evidence: &Evidence) -> Result<(), Refusal> {
    let Some(secret) = &challenge.secret else { return Ok(()) };
    let not = |why: &str| Refusal::new(ProblemType::NotActivated, why.to_owned());
    let given = evidence.activation.as_ref().ok_or_else(|| not("the credential was not activated"))?;
    if bool::from(subtle::ConstantTimeEq::ct_eq(&given[..], &secret.expose()[..])) {
        Ok(())
    } else {
        Err(not("the credential was not activated by this host's TPM"))
    }
}

async fn challenge_for(
    provider: &Provider,
    caller: &Caller,
    vm: &VmId,
    request: AttestationRequest,
) -> Result<Answer, Refusal> {
    let bad = |why: &str| Refusal::new(ProblemType::BadRequest, why.to_owned());
    if request.version != PROTOCOL_VERSION {
        return Err(bad("this provider speaks version 1 of the protocol"));
    }
    if request.vm != *vm {
        return Err(bad("the path names another VM than the body"));
    }
    request.operation.check().map_err(|e| Refusal::unreadable("the operation can't be read", &e))?;
    let operation = request.operation.operation;
    if operation.class() == OperationClass::Free {
        return Err(bad("this operation needs no attestation: it is done, and reported"));
    }
    let ek = Public::parse(&request.ek_public).map_err(|e| Refusal::unreadable("the endorsement key", &e))?;
    let ak = Public::parse(&request.ak_public).map_err(|e| Refusal::unreadable("the attestation key", &e))?;
    let now_us = provider.clock.now_us();
    let mut reader = provider.db.read().await?;
    // The inventory decides which host this is, and whose: nothing in the message can.
    let known = people::customer(&mut reader, &request.customer).await?;
    let found = inventory::host_for(&mut reader, &request.customer, &ek.host_id()).await?;
    let (Some(customer), Some((host, cloud))) = (known, found) else {
        return Err(Refusal::new(ProblemType::UnknownTpm, format!("the TPM {} is in no inventory", ek.host_id()))
            .hint("have the customer enroll it: fealty-keys cloud enroll CLOUD --certificate FILE"));
    };
    ek::check(&customer, &cloud, &host, &request, now_us)?;
    let unfit = |e: attest::tpm::KeyError| Refusal::new(ProblemType::BadEvidence, e.to_string());
    check_ek(&ek).map_err(unfit)?;
    check_ak(&ak).map_err(unfit)?;
    let found = vms::find(&mut reader, &request.customer, vm).await?;
    found.ok_or_else(|| Refusal::missing(format!("VM {vm} of {}", request.customer)))?;
    if operation != Operation::PowerOn {
        let instance = asks_for_itself(&mut reader, &caller.key, &request.customer, vm).await?;
        still_leased(operation, &instance, now_us)?;
    }
    confirmed(&mut reader, &request.customer).await?;
    let reference = documents::reference(&mut reader, &request.customer).await?;
    let (reference_version, reference) = reference
        .ok_or_else(|| Refusal::new(ProblemType::UntrustedPlatform, "the customer has set no reference values"))?;
    let reference: ReferenceValues =
        serde_json::from_str(&reference).map_err(|_| StoreError::Damaged("set of reference values"))?;
    let Name(ak_name) = ak.name();
    let recorded = inventory::ak(&mut reader, &host.id, &ak_name).await?;
    let ima = match reference.ima {
        false => None,
        true => {
            let mark = inventory::ima(&mut reader, &request.customer, &host.id, &ak_name).await?;
            let mark = mark.filter(|m| m.reference == reference_version);
            let mark = mark.filter(|m| operation != Operation::PowerOn || m.state.offset >= LONG_IMA);
            Some(mark.map_or(ImaStart { reset_count: None, state: attest::eventlog::ima::ImaState::START }, |m| {
                ImaStart { reset_count: Some(m.reset_count), state: m.state }
            }))
        }
    };
    let (mut id, mut nonce) = ([0; 16], [0; 32]);
    getrandom::fill(&mut id).and_then(|()| getrandom::fill(&mut nonce)).map_err(|_| StoreError::Random)?;
    let (secret, credential) = match &recorded {
        Some(_) => (None, None),
        None => {
            let secret = Secret::<32>::random().map_err(crate::keystore::KeyStoreError::from)?;
            let credential = make_credential(&ek, &ak.name(), secret.expose());
            let credential =
                credential.map_err(|e| Refusal::unreadable("no credential can be made for this TPM", &e))?;
            (Some(secret), Some(credential))
        }
    };
    let challenge = Challenge {
        id: AttestationId(id),
        nonce: Nonce(nonce),
        customer: request.customer,
        vm: vm.clone(),
        operation: request.operation,
        client_key: caller.key,
        host: host.id,
        ak_public: recorded.unwrap_or_else(|| request.ak_public.to_vec()),
        ak_name,
        secret,
        pcrs: reference.selection(),
        reference: reference_version,
        ima,
        until_us: now_us + NONCE_US,
        address: caller.address,
    };
    let answer = Answer {
        id: challenge.id,
        nonce: challenge.nonce,
        host: challenge.host,
        pcrs: challenge.pcrs.clone(),
        ima_offset: challenge.ima.map(|i| i.state.offset),
        credential,
    };
    provider.challenges.add(challenge, now_us)?;
    Ok(answer)
}

/// Everything but a power-on is asked for by the newest instance, with the client key it started with.
async fn asks_for_itself(
    c: &mut SqliteConnection,
    client_key: &Digest,
    customer: &CustomerId,
    vm: &VmId,
) -> Result<Instance, Refusal> {
    let last = instances::last_instance(c, customer, vm).await?;
    match last {
        Some(last) if last.client_key == *client_key => {
            let gone = |why: &str| Refusal::new(ProblemType::OldInstance, format!("instance {} {why}", last.number));
            if last.ended {
                return Err(gone("has reported its end"));
            }
            if last.revoked {
                return Err(gone("was revoked by the customer"));
            }
            Ok(last)
        }
        _ => Err(Refusal::new(ProblemType::OldInstance, format!("this client is not the newest instance of VM {vm}"))),
    }
}

/// After a restore, what the customer took away may be back: nothing is released until somebody has looked.
pub async fn confirmed(c: &mut SqliteConnection, customer: &CustomerId) -> Result<(), Refusal> {
    if !people::unconfirmed(c, customer).await? {
        return Ok(());
    }
    let what =
        "the provider was restored, and nobody has confirmed yet which policy, reference values and hosts came back";
    Err(Refusal::new(ProblemType::PolicyRefuses, what)
        .hint(format!("see: fealty-keys audit list {customer}; then: fealty-keys customer confirm {customer}")))
}

/// An instance whose lease is over has wiped its keys and asks for them anew. One that would still renew it counts time slower than
/// the provider, which is how a host's clock stretches a lease.
fn still_leased(operation: Operation, instance: &Instance, now_us: u64) -> Result<(), Refusal> {
    if operation != Operation::Renew || !lease_past(instance, now_us) {
        return Ok(());
    }
    let late = now_us.saturating_sub(instance.lease_end_us) / 1_000_000;
    let what = format!("the lease of instance {} ended {late} s ago, and its host does not know it", instance.number);
    Err(Refusal::new(ProblemType::PolicyRefuses, what)
        .hint("the host's clock runs slow, or the request was held up; the instance gets keys by vm.resume-keys"))
}

/// What an instance is doing, for people.
pub fn instance_state(instance: &Instance, now_us: u64) -> &'static str {
    if instance.ended {
        "ended"
    } else if lease_past(instance, now_us) {
        "lease-past"
    } else if instance.revoked {
        "revoked"
    } else {
        "running"
    }
}

/// Whether an instance's lease and the margin after it are past.
pub fn lease_past(instance: &Instance, now_us: u64) -> bool {
    now_us >= instance.lease_end_us.saturating_add(LEASE_MARGIN_US)
}

fn host_of(request: &AttestationRequest) -> Option<HostId> {
    Public::parse(&request.ek_public).ok().map(|p| p.host_id())
}

/// Refusals that the customer should read of. What is malformed or too much is noise that anybody can make.
fn tells(kind: ProblemType) -> bool {
    !matches!(kind, ProblemType::BadRequest | ProblemType::TooMuch | ProblemType::Unavailable | ProblemType::StaleNonce)
}

fn because(draft: Draft, refusal: &Refusal) -> Draft {
    let kind = serde_json::to_value(refusal.kind).ok().and_then(|v| v.as_str().map(str::to_owned));
    draft.detail("problem", kind.unwrap_or_default()).detail("reason", &refusal.title)
}

/// Writes to the customer's log what was not granted; `counted` names the VM where it counts among the operations asked for. Only
/// a verified host gets that far, so that its refusals have an allowance which strangers can't use up.
async fn log(provider: &Provider, customer: &CustomerId, draft: Draft, counted: Option<&VmId>) {
    let logged = async {
        let now_us = provider.clock.now_us();
        // Strangers may name any customer: those that are none cost no write.
        let known = people::customer(&mut *provider.db.read().await?, customer).await?.is_some();
        let party = (customer.clone(), if counted.is_some() { Refused::Verified } else { Refused::Stranger });
        let allowance = if known { provider.refusals.allow(&party, now_us) } else { Allowance::No };
        if counted.is_none() && allowance == Allowance::No {
            return Ok(());
        }
        let mut tx = provider.db.write().await?;
        match allowance {
            Allowance::Yes => append(&mut tx, now_us, draft).await.map(drop)?,
            Allowance::Spent => {
                let draft = draft.detail("unlogged", "more is refused in this minute than is logged");
                append(&mut tx, now_us, draft).await.map(drop)?;
            }
            Allowance::No => {}
        }
        if let Some(vm) = counted {
            vms::count_asked(&mut tx, customer, vm, now_us).await?;
        }
        tx.commit().await.map_err(StoreError::from)
    };
    if let Err(error) = logged.await {
        tracing::error!("a refusal was not logged: {}", crate::server::problem::chain(&error));
    }
}

async fn kept_answer(
    provider: &Provider,
    caller: &Caller,
    id: &AttestationId,
) -> Result<Option<answers::Answer>, Refusal> {
    let mut reader = provider.db.read().await?;
    let kept = answers::find(&mut reader, id, provider.clock.now_us()).await?;
    Ok(kept.filter(|k| k.client_key == caller.key))
}

fn json(body: Vec<u8>) -> Response<HttpBody> {
    ([(header::CONTENT_TYPE, "application/json")], body).into_response()
}

fn stale() -> Refusal {
    Refusal::new(ProblemType::StaleNonce, "this attestation is unknown, used, or older than a minute")
        .hint("begin a new attestation")
}

fn unavailable() -> Refusal {
    Refusal::new(ProblemType::Unavailable, "the key provider can't decide this just now")
}
