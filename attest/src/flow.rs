//! The VM process's side of an attestation, from the question for a nonce to keys in locked memory. What comes back of a
//! provider is held against what this process itself knows: nothing is taken from the answer's word.

mod clocks;
mod opened;

pub use opened::{Established, OpenedRelease};

use crate::bundle::{self, BundleError, BundleKey};
use crate::client::{ClientError, ProviderClient};
use crate::note::NoteError;
use crate::protocol::{
    AttestationRequest, Challenge, Evidence, KeyName, Opinion, PROTOCOL_VERSION, ProblemType, Release, Released,
};
use crate::qualify::Qualified;
use crate::service::{Client, Identity, Quoted, ServiceError, VmRequest};
use crate::tpm::{Attest, Public, TpmError};
use clocks::Reading;
use policy::audit::{AuditEvent, AuditKind};
use policy::document::Claims;
use policy::lease::{LeaseError, LeasePhase};
use policy::operation::{OperationRequest, ParameterError};
use policy::{Digest, InstanceNumber, Operation, VmHeader};
use secretmem::SecretError;
use std::time::{Duration, Instant};

/// How often what the TPM service calls passing is tried again.
const TRIES: u32 = 5;

/// Why there are no keys.
#[derive(Debug, thiserror::Error)]
pub enum FlowError {
    /// The provider refused, or could not be talked to.
    #[error(transparent)]
    Provider(#[from] ClientError),
    /// The host's TPM service did.
    #[error(transparent)]
    Service(#[from] ServiceError),
    /// The service gave something that is no TPM structure.
    #[error("the host's TPM service gave something unreadable")]
    Tpm(#[from] TpmError),
    /// The bundle is not for this process on this host.
    #[error(transparent)]
    Bundle(#[from] BundleError),
    /// The answer contradicts what this process knows.
    #[error("the key provider's answer does not fit the question: {0}")]
    Mismatch(&'static str),
    /// The audit log's receipt is not good.
    #[error("the audit log's receipt for these keys is not good")]
    Receipt(#[from] NoteError),
    /// Terms that can't be kept.
    #[error("the lease's terms can't be kept")]
    Lease(#[from] LeaseError),
    /// Keys that came too late.
    #[error("the keys arrived after the end of their lease; try again")]
    Late,
    /// Parameters that no operation has.
    #[error(transparent)]
    Parameters(#[from] ParameterError),
    /// A host that would keep keys for longer than their lease.
    #[error("this host's clock goes more slowly than its TPM's: it can't keep a lease's time")]
    SlowClock,
    /// Whoever follows did not want evidence to leave.
    #[error("the attestation was given up before evidence left")]
    GivenUp,
    /// No locked memory.
    #[error(transparent)]
    Memory(#[from] SecretError),
    /// The boot-time clock can't be read, or a document can't be written: never on a sound system.
    #[error("this host is not sound: {0}")]
    Host(&'static str),
}

impl FlowError {
    /// The problem's stable type, where the provider refused.
    pub fn problem(&self) -> Option<ProblemType> {
        match self {
            Self::Provider(error) => error.problem(),
            _ => None,
        }
    }
}

/// One step that was done.
#[derive(Debug, Clone)]
pub struct Step {
    /// Its name: `identity`, `challenge`, `activate`, `quote`, `evidence`, `open`.
    pub name: &'static str,
    /// What it gave, for people.
    pub detail: String,
    /// How long it took.
    pub took: Duration,
}

/// Follows an attestation: a closure that takes steps, or more than that.
pub trait Follow {
    /// A step was done.
    fn done(&mut self, step: Step);

    /// Whether evidence may leave that keys are released for; asked at the last moment. From then on keys may be released.
    fn may_send(&mut self) -> bool {
        true
    }
}

impl<F: FnMut(Step)> Follow for F {
    fn done(&mut self, step: Step) {
        self(step);
    }
}

/// What was sent, and what the provider would do, for `fealty attest --dry-run`.
#[derive(Debug)]
pub struct Examined {
    /// The provider's challenge.
    pub challenge: Challenge,
    /// The evidence.
    pub evidence: Evidence,
    /// H, the quote's qualifying data.
    pub qualified: Digest,
    /// What the provider thinks.
    pub opinion: Opinion,
}

/// Has this process registered with the TPM service that serves now: gives the process's end of the new socket pair.
pub type Reconnect = Box<dyn FnMut() -> Result<Client, ServiceError> + Send>;

/// Attests for one VM process, again and again with the same client key.
pub struct Attester {
    service: Client,
    reconnect: Reconnect,
    provider: ProviderClient,
    header: VmHeader,
    vm_file: Digest,
    claims: Vec<u8>,
    identity: Option<Identity>,
    established: Option<Established>,
    released: Option<InstanceNumber>,
    clocks: Option<Reading>,
}

/// A question and everything that its answer must fit.
struct Asked {
    challenge: Challenge,
    evidence: Evidence,
    /// H.
    qualified: Digest,
    bundle_key: BundleKey,
    wrap_public: Public,
    asked_ms: u64,
}

impl Attester {
    /// An attester of the process whose VM file has this header and digest. `service` is the process's registered socket;
    /// `reconnect` gives another one once that is of no more use.
    ///
    /// # Errors
    /// `Host`, which no claims can bring about.
    pub fn new(
        service: Client,
        reconnect: Reconnect,
        provider: ProviderClient,
        header: VmHeader,
        vm_file: Digest,
        claims: &Claims,
    ) -> Result<Self, FlowError> {
        let claims = serde_json::to_vec(claims).map_err(|_| FlowError::Host("claims can't be written"))?;
        let (identity, established, released, clocks) = (None, None, None, None);
        Ok(Self { service, reconnect, provider, header, vm_file, claims, identity, established, released, clocks })
    }

    /// The client, for reports and anchors.
    pub fn provider(&mut self) -> &mut ProviderClient {
        &mut self.provider
    }

    /// The instance that the provider last released keys to, as far as its answers could be read: also where [`attest`](Self::attest)
    /// failed after that. The provider's word alone; reporting the instance's end is what it is good for.
    pub fn released(&self) -> Option<InstanceNumber> {
        self.released
    }

    /// From now on releases must fit the instance that was started.
    pub fn establish(&mut self, established: Established) {
        self.established = Some(established);
    }

    /// Proves this host's software and gets the keys for `request`. `follower` is told each step as it is done. The first is a power-on,
    /// whose receipt and policy the caller checks ([`OpenedRelease::establish`]), because the trust roots are among what it opens;
    /// those of later ones are checked here.
    ///
    /// # Errors
    /// Every [`FlowError`].
    pub fn attest(
        &mut self,
        request: &OperationRequest,
        follower: &mut dyn Follow,
    ) -> Result<OpenedRelease, FlowError> {
        if (request.operation == Operation::PowerOn) != self.established.is_none() {
            return Err(FlowError::Mismatch("a power-on comes first, and once"));
        }
        let attested = self.attest_once(request, follower);
        if let Err(FlowError::Service(_)) = &attested {
            self.identity = None;
        }
        attested
    }

    fn attest_once(
        &mut self,
        request: &OperationRequest,
        follower: &mut dyn Follow,
    ) -> Result<OpenedRelease, FlowError> {
        let asked = self.ask(request, follower)?;
        if !follower.may_send() {
            return Err(FlowError::GivenUp);
        }
        let start = Instant::now();
        let released = self.provider.evidence(&asked.challenge.id, &asked.evidence)?;
        self.released = bundle::parse(&released.release).map(|release| release.instance).ok().or(self.released);
        follower.done(step("evidence", start, "accepted".into()));
        let start = Instant::now();
        let opened = self.open(&asked, &released)?;
        if let Some(established) = &mut self.established {
            established.accept(&opened)?;
        }
        follower.done(step("open", start, format!("{} keys in locked memory", opened.keys.len())));
        Ok(opened)
    }

    /// Gathers evidence as for `request` and asks the provider what it thinks of it, without asking for keys.
    ///
    /// # Errors
    /// As [`attest`](Self::attest); a provider that would refuse the evidence is no error, but one that refuses the challenge is.
    pub fn examine(&mut self, request: &OperationRequest, follower: &mut dyn Follow) -> Result<Examined, FlowError> {
        let Asked { challenge, evidence, qualified, .. } = self.ask(request, follower)?;
        let start = Instant::now();
        let opinion = self.provider.opinion(&challenge.id, &evidence)?;
        follower.done(step("opinion", start, if opinion.would_release { "yes" } else { "no" }.into()));
        Ok(Examined { challenge, evidence, qualified, opinion })
    }

    /// Asks the service before the provider: where it does not serve, no nonce is spent on finding that out.
    fn ask(&mut self, request: &OperationRequest, follower: &mut dyn Follow) -> Result<Asked, FlowError> {
        request.check()?;
        let start = Instant::now();
        let identity = self.identity()?;
        follower.done(step("identity", start, format!("host {}", identity.host)));

        // The lease counts from before the question, so that no delay of the network makes it longer.
        let asked_ms = boottime_ms()?;
        let start = Instant::now();
        let challenge = self.provider.challenge(&AttestationRequest {
            version: PROTOCOL_VERSION,
            customer: self.header.customer.clone(),
            vm: self.header.vm.clone(),
            operation: request.clone(),
            ek_certificate: identity.ek_certificate.clone(),
            ek_public: identity.ek_public.clone(),
            ak_public: identity.ak_public.clone(),
        })?;
        if challenge.host != identity.host {
            return Err(FlowError::Mismatch("the challenge is for another host"));
        }
        follower.done(step("challenge", start, format!("PCRs {:?}", challenge.pcrs)));

        let activation = match &challenge.credential {
            None => None,
            Some(credential) => {
                let start = Instant::now();
                let secret = patiently(|| self.service.activate(credential))?;
                follower.done(step("activate", start, "the AK lives beside the EK".into()));
                Some(secret.into())
            }
        };

        let start = Instant::now();
        let bundle_key = BundleKey::generate()?;
        let before_ms = boottime_ms()?;
        let quoted = self.quote(&challenge, request, &bundle_key)?;
        self.compare_clocks(before_ms, &quoted)?;
        follower.done(step("quote", start, format!("earlier peer: {:?}", quoted.earlier_peer)));
        let wrap_public = Public::parse(&quoted.wrap_key.public)?;
        let qualified = self.qualified(&identity, &challenge, request, &bundle_key, &quoted, &wrap_public);
        let evidence = Evidence {
            version: PROTOCOL_VERSION,
            vm_file: self.vm_file,
            operation: request.clone(),
            activation,
            bundle_key: bundle_key.public()[..].into(),
            quote: quoted.quote,
            quote_signature: quoted.signature,
            pcr_values: quoted.pcr_values,
            wrap_public: quoted.wrap_key.public,
            wrap_certify: quoted.wrap_key.certify,
            wrap_signature: quoted.wrap_key.signature,
            earlier_peer: quoted.earlier_peer,
            firmware_log: quoted.firmware_log,
            layer_log: quoted.layer_log,
            ima_log: quoted.ima_log,
            ima_offset: quoted.ima_offset,
            claims: self.claims.clone().into(),
        };
        Ok(Asked { challenge, evidence, qualified, bundle_key, wrap_public, asked_ms })
    }

    /// The host's identity, by a service that serves: one that ended, or failed last time, is asked for it anew.
    fn identity(&mut self) -> Result<Identity, FlowError> {
        if !self.service.is_of_use() {
            self.identity = None;
            self.service = (self.reconnect)()?;
        }
        if let Some(identity) = &self.identity {
            return Ok(identity.clone());
        }
        let identity = patiently(|| self.service.identity())?;
        self.identity = Some(identity.clone());
        Ok(identity)
    }

    fn quote(
        &mut self,
        challenge: &Challenge,
        request: &OperationRequest,
        bundle_key: &BundleKey,
    ) -> Result<Quoted, FlowError> {
        let request = VmRequest::Quote {
            nonce: challenge.nonce,
            attestation: challenge.id,
            operation: request.clone(),
            bundle_key: bundle_key.public()[..].into(),
            client_key: self.provider.client_key(),
            pin: self.header.pin,
            pcrs: challenge.pcrs.clone(),
            ima_offset: challenge.ima_offset,
            claims: self.claims.clone().into(),
        };
        Ok(patiently(|| self.service.quote(&request))?)
    }

    fn compare_clocks(&mut self, before_ms: u64, quoted: &Quoted) -> Result<(), FlowError> {
        let reading = Reading { before_ms, after_ms: boottime_ms()?, tpm: Attest::parse(&quoted.quote)?.clock };
        // A reading that was found wanting is not kept: measured from it, the next try would look well.
        if self.clocks.is_some_and(|earlier| !reading.kept_up_since(&earlier)) {
            return Err(FlowError::SlowClock);
        }
        self.clocks = Some(reading);
        Ok(())
    }

    fn qualified(
        &self,
        identity: &Identity,
        challenge: &Challenge,
        request: &OperationRequest,
        bundle_key: &BundleKey,
        quoted: &Quoted,
        wrap_public: &Public,
    ) -> Digest {
        Qualified {
            nonce: &challenge.nonce,
            attestation: &challenge.id,
            host: &identity.host,
            customer: &self.header.customer,
            vm: &self.header.vm,
            vm_file: &self.vm_file,
            operation: request,
            bundle_key: bundle_key.public(),
            client_key: &self.provider.client_key(),
            wrap_key_name: &wrap_public.name().0,
            earlier_peer: quoted.earlier_peer,
            firmware_log: &quoted.firmware_log,
            layer_log: &quoted.layer_log,
            ima_log: &quoted.ima_log,
            ima_offset: quoted.ima_offset,
            pin: &self.header.pin,
            claims: &self.claims,
        }
        .digest()
    }

    fn open(&mut self, asked: &Asked, released: &Released) -> Result<OpenedRelease, FlowError> {
        let outer = bundle::open(&released.release, &released.sealed, &asked.bundle_key, &asked.wrap_public)?;
        let release = outer.release().clone();
        self.check_release(asked, &release)?;
        check_event(released, &release)?;
        let mut shared = patiently(|| self.service.ecdh(outer.point()))?;
        let keys = outer.finish(&mut shared)?;
        if release.lease.phase(asked.asked_ms, boottime_ms()?) == LeasePhase::Ended {
            return Err(FlowError::Late);
        }
        let (event, receipt) = (released.event.0.clone(), released.receipt.clone());
        Ok(OpenedRelease { release, keys, asked_ms: asked.asked_ms, event, receipt })
    }

    fn check_release(&self, asked: &Asked, release: &Release) -> Result<(), FlowError> {
        let Asked { challenge, evidence, qualified, .. } = asked;
        let checks = [
            (release.version == PROTOCOL_VERSION, "another version"),
            (release.customer == self.header.customer, "another customer"),
            (release.vm == self.header.vm, "another VM"),
            (release.attestation == challenge.id, "another attestation"),
            (release.qualified == *qualified, "another quote"),
            (release.host == challenge.host, "another host"),
            (release.operation == evidence.operation, "another operation"),
            (release.keys.iter().all(|k| names_something(k, release)), "a key for nothing"),
        ];
        match checks.iter().find(|(good, _)| !good) {
            Some((_, what)) => Err(FlowError::Mismatch(what)),
            None => Ok(release.lease.check()?),
        }
    }
}

fn names_something(key: &KeyName, release: &Release) -> bool {
    match key {
        KeyName::Volume(at) => *at < release.volumes.len(),
        KeyName::VmFile(_) | KeyName::Stream(_) => true,
    }
}

/// The event that the receipt names must tell of this release: by its digest, which covers H, lease, open numbers and anchors.
fn check_event(released: &Released, release: &Release) -> Result<(), FlowError> {
    let event: AuditEvent =
        serde_json::from_slice(&released.event).map_err(|_| FlowError::Mismatch("an unreadable audit event"))?;
    let detail = |name: &str, value: &dyn ToString| event.details.get(name) == Some(&value.to_string());
    let good = event.kind == AuditKind::KeysReleased
        && event.customer == release.customer
        && event.vm.as_ref() == Some(&release.vm)
        && event.instance == Some(release.instance)
        && event.host == Some(release.host)
        && event.attestation == Some(release.attestation)
        && detail("qualified", &release.qualified)
        && detail("release", &Digest::of(&released.release));
    if good { Ok(()) } else { Err(FlowError::Mismatch("an audit event of something else")) }
}

/// Tries again, a little later each time, while the service says that it may help.
fn patiently<T>(mut ask: impl FnMut() -> Result<T, ServiceError>) -> Result<T, ServiceError> {
    for tried in 1..TRIES {
        match ask() {
            Err(ServiceError::Refused { again: true, .. }) => {
                std::thread::sleep(Duration::from_millis(20 << tried));
            }
            other => return other,
        }
    }
    ask()
}

fn step(name: &'static str, start: Instant, detail: String) -> Step {
    Step { name, detail, took: start.elapsed() }
}

/// Milliseconds of CLOCK_BOOTTIME, which counts while the host sleeps (clock_gettime(2)).
///
/// # Errors
/// [`FlowError::Host`] where it is before its own start.
pub fn boottime_ms() -> Result<u64, FlowError> {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    let ms = |t: rustix::time::Timespec| {
        let seconds = u64::try_from(t.tv_sec).ok()?.checked_mul(1000)?;
        seconds.checked_add(u64::try_from(t.tv_nsec).ok()? / 1_000_000)
    };
    ms(now).ok_or(FlowError::Host("its boot-time clock is before zero"))
}

#[cfg(test)]
mod scene;
#[cfg(test)]
mod tests;
