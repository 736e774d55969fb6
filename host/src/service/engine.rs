//! The one thread that owns TPM, logs, PCR 14 and wrap key. Requests come one after the other.

use super::ima::ImaLog;
use super::layers::Layers;
use super::peers::Registration;
use super::refusal::Refusal;
use crate::runtime::{IdentityFile, RuntimeDir, RuntimeError, State, read_bounded};
use attest::eventlog::{LogError, Replay, firmware};
use attest::protocol::LOG_LIMIT;
use attest::service::{Answer, Identity, VmRequest, WrapKey};
use attest::tcti::Tcti;
use attest::tpm::{Public, WRAP_PCRS, check_ek, policy_pcr_digest};
use attest_tpm::{BootCount, EkChoice, HostTpm, TpmError, TpmIdentity};
use policy::instance::EarlierPeer;
use policy::reference::LAYER_PCR;
use policy::{Base64Url, Digest, HostId};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// Owner of the TPM.
pub(super) struct Engine {
    tcti: Tcti,
    tpm: Option<HostTpm>,
    identity: TpmIdentity,
    pub(super) boot: BootCount,
    pub(super) host: HostId,
    pub(super) firmware_log: Vec<u8>,
    pub(super) layers: Layers,
    pub(super) ima: ImaLog,
    wrap: Option<Wrap>,
}

/// The wrap key, and the PCR values under which it lives.
#[derive(Clone)]
pub(super) struct Wrap {
    pub(super) key: WrapKey,
    pub(super) name: Vec<u8>,
    pub(super) pcrs: BTreeMap<u8, Digest>,
}

/// Where logs are: what the caller said, else what the last service wrote down, else where Linux has them.
#[derive(Clone, Debug, Default)]
pub struct LogPaths {
    /// The firmware's event log.
    pub firmware: Option<PathBuf>,
    /// IMA's log, binary.
    pub ima: Option<PathBuf>,
}

/// An engine that can't start.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// The TPM.
    #[error(transparent)]
    Tpm(#[from] TpmError),
    /// The folder.
    #[error(transparent)]
    Runtime(#[from] RuntimeError),
    /// The endorsement key is of a kind that nobody would accept.
    #[error("the TPM's endorsement key can't be used: {0}")]
    Ek(String),
    /// The firmware's log.
    #[error("the firmware log {0} can't be read: {1}")]
    FirmwareLog(PathBuf, #[source] std::io::Error),
    /// The firmware's log.
    #[error("the firmware log can't be used: {0}")]
    FirmwareEvents(#[from] LogError),
    /// The layer log or the wrap key.
    #[error("{0}")]
    Refused(String),
}

impl Engine {
    /// Opens TPM and logs, and makes the wrap key where the layer log is sealed. Says also whether VM processes may live
    /// that an earlier service of this boot knew.
    pub(super) fn start(
        tcti: &Tcti,
        choice: EkChoice,
        dir: &RuntimeDir,
        paths: &LogPaths,
    ) -> Result<(Self, State), EngineError> {
        let before = dir.state()?;
        let firmware_path = paths.firmware.clone().or_else(|| before.as_ref().and_then(|s| s.firmware_log.clone()));
        let ima = paths.ima.clone().or_else(|| before.as_ref().and_then(|s| s.ima_log.clone()));
        let firmware_log = read_firmware_log(firmware_path.as_deref())?;
        let firmware = replay(&firmware_log)?;
        let mut tpm = HostTpm::open(tcti, choice)?;
        let identity = tpm.identity().clone();
        let host = host_id(&identity)?;
        let boot = tpm.boot();
        let same_boot = before.as_ref().is_some_and(|s| s.is_of(&host, boot));
        let state = State {
            version: 1,
            host,
            reset_count: boot.reset,
            restart_count: boot.restart,
            peers: same_boot && before.is_some_and(|s| s.peers),
            firmware_log: firmware_path,
            ima_log: ima.clone(),
        };
        if !same_boot {
            Layers::forget(&dir.layer_log()).map_err(|e| EngineError::Refused(e.to_string()))?;
        }
        let layers = Layers::load(dir.layer_log(), firmware.value(LAYER_PCR), tpm.tpm())
            .map_err(|e| EngineError::Refused(e.to_string()))?;
        dir.keep_state(&state)?;
        dir.keep_identity(&IdentityFile {
            host,
            ek_kind: identity.ek_kind.to_string(),
            ek_certificate: identity.ek_certificate.clone().map(Base64Url),
            ek_public: identity.ek_public.clone().into(),
        })?;
        warn_of_lockout(&mut tpm);
        let mut engine = Self {
            tcti: tcti.clone(),
            tpm: Some(tpm),
            identity,
            boot,
            host,
            firmware_log,
            layers,
            ima: ImaLog::new(ima, firmware.pcrs),
            wrap: None,
        };
        engine.make_wrap_key().map_err(|r| EngineError::Refused(r.reason))?;
        Ok((engine, state))
    }

    /// TPM2_Shutdown, where the TPM still answers.
    pub(super) fn shut_down(mut self) {
        if let Some(Err(error)) = self.tpm.take().map(HostTpm::shut_down) {
            super::note(&format!("TPM2_Shutdown failed: {error}"));
        }
    }

    /// Serves a VM process, which is what `vm` says, whatever it says itself.
    pub(super) fn serve_vm(&mut self, request: &VmRequest, vm: &Registration, earlier: EarlierPeer) -> Answer {
        let answer = match request {
            // Known by heart; but who asks will want a quote next, at the price of a nonce, and is told here if the TPM is away.
            VmRequest::Identity => self.with_tpm(|engine, _| Ok(engine.identify())),
            VmRequest::Activate { blob, secret } => self.activate(blob, secret),
            VmRequest::CertifyWrapKey => self.wrap().map(|w| Answer::WrapKey(w.key)),
            VmRequest::Ecdh { point } => self.ecdh(point),
            VmRequest::Quote { .. } => self.quote(request, vm, earlier),
        };
        answer.unwrap_or_else(Refusal::answer)
    }

    /// Does ahead what the next request needs; called when an answer is out.
    pub(super) fn rest(&mut self) {
        let armed = self.tpm.as_mut().map(HostTpm::arm);
        if armed.is_some_and(|done| done.is_err_and(|e| e.spoils_connection())) {
            self.tpm = None;
        }
    }

    /// Measures a layer: its record, then PCR 14. No VM gets keys until the log is sealed again. A layer that is refused
    /// changes nothing.
    pub(super) fn extend(&mut self, layer: &str, version: &str, digest: &Digest) -> Answer {
        let done = self.with_tpm(|engine, tpm| {
            let done = engine.layers.extend(tpm.tpm(), layer, version, digest).map_err(Refusal::from);
            if engine.layers.check().is_err() {
                engine.wrap = None;
            }
            done
        });
        done.map_or_else(Refusal::answer, |()| Answer::Done)
    }

    /// Seals the layer log and makes the wrap key under the new values.
    pub(super) fn reseal(&mut self) -> Answer {
        let sealed = self.with_tpm(|engine, tpm| engine.layers.seal(tpm.tpm()).map_err(Refusal::from));
        sealed.and_then(|()| self.make_wrap_key()).map_or_else(Refusal::answer, |()| Answer::Done)
    }

    /// Runs `f` on the TPM, which is opened again where its connection broke before; once, so that a TPM that is away
    /// costs each request one attempt.
    pub(super) fn with_tpm<T>(
        &mut self,
        f: impl FnOnce(&mut Self, &mut HostTpm) -> Result<T, Refusal>,
    ) -> Result<T, Refusal> {
        let mut tpm = match self.tpm.take() {
            Some(tpm) => tpm,
            None => self.reopen()?,
        };
        let result = f(self, &mut tpm);
        if !result.as_ref().is_err_and(|r| r.broken) {
            self.tpm = Some(tpm);
        }
        result
    }

    /// The wrap key, made now where the TPM did not make it when the log was sealed.
    pub(super) fn wrap(&mut self) -> Result<Wrap, Refusal> {
        self.layers.check().map_err(Refusal::from)?;
        if let Some(wrap) = &self.wrap {
            return Ok(wrap.clone());
        }
        let wrap = self.with_tpm(|engine, tpm| wrap_key(tpm, &engine.layers))?;
        self.wrap = Some(wrap.clone());
        Ok(wrap)
    }

    fn reopen(&mut self) -> Result<HostTpm, Refusal> {
        let mut tpm = HostTpm::reopen(&self.tcti, &self.identity, self.boot)?;
        if self.wrap.is_some() {
            self.wrap = Some(wrap_key(&mut tpm, &self.layers)?);
        }
        Ok(tpm)
    }

    /// Makes the wrap key where the layer log is sealed.
    fn make_wrap_key(&mut self) -> Result<(), Refusal> {
        if self.layers.check().is_ok() { self.wrap().map(drop) } else { Ok(()) }
    }

    fn identify(&self) -> Answer {
        Answer::Identity(Identity {
            host: self.host,
            ek_certificate: self.identity.ek_certificate.clone().map(Base64Url),
            ek_public: self.identity.ek_public.clone().into(),
            ak_public: self.identity.ak_public.clone().into(),
        })
    }

    fn activate(&mut self, blob: &[u8], secret: &[u8]) -> Result<Answer, Refusal> {
        let opened = self.with_tpm(|_, tpm| tpm.activate(blob, secret).map_err(Refusal::from))?;
        Ok(Answer::Activated { secret: opened.into() })
    }

    fn ecdh(&mut self, point: &[u8]) -> Result<Answer, Refusal> {
        let point: &[u8; 65] = point.try_into().map_err(|_| Refusal::from(TpmError::WrongPoint))?;
        if !attest::tpm::public::is_p256_point(point) {
            return Err(TpmError::WrongPoint.into());
        }
        self.wrap()?;
        let shared = self.with_tpm(|_, tpm| tpm.ecdh(point).map_err(Refusal::from))?;
        Ok(Answer::Shared { point: shared[..].into() })
    }
}

/// Makes the wrap key under values that the layer log explains.
fn wrap_key(tpm: &mut HostTpm, layers: &Layers) -> Result<Wrap, Refusal> {
    for _ in 0..WRAP_ATTEMPTS {
        let pcrs = tpm.tpm().pcr_read(&WRAP_PCRS)?;
        if pcrs.get(&LAYER_PCR) != Some(&layers.replayed()) {
            return Err(Refusal::never("PCR 14 is not what the layer log says: reboot the host"));
        }
        let made = tpm.make_wrap_key()?;
        let public = Public::parse(&made.public).map_err(|_| TpmError::Answer("TPM2_CreatePrimary"))?;
        if public.auth_policy == policy_pcr_digest(&WRAP_PCRS, &pcrs).as_bytes() {
            let key = WrapKey {
                public: made.public.into(),
                certify: made.certification.attest.into(),
                signature: made.certification.signature.into(),
            };
            return Ok(Wrap { key, name: public.name().0, pcrs });
        }
    }
    Err(TpmError::PcrsMoving.into())
}

/// The host's identity; a certificate that is another key's would fool nobody, but is told here already.
fn host_id(identity: &TpmIdentity) -> Result<HostId, EngineError> {
    let public = Public::parse(&identity.ek_public).map_err(|e| EngineError::Ek(e.to_string()))?;
    check_ek(&public).map_err(|e| EngineError::Ek(e.to_string()))?;
    let spki = public.spki();
    if let Some(certificate) = &identity.ek_certificate
        && !certificate.windows(spki.len()).any(|w| w == spki)
    {
        return Err(TpmError::ForeignCertificate.into());
    }
    Ok(public.host_id())
}

fn read_firmware_log(path: Option<&Path>) -> Result<Vec<u8>, EngineError> {
    let chosen = path.unwrap_or(Path::new(LINUX_FIRMWARE_LOG));
    match read_bounded(chosen, LOG_LIMIT) {
        Ok(bytes) => Ok(bytes),
        Err(e) if path.is_none() && e.kind() == std::io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(e) => Err(EngineError::FirmwareLog(chosen.to_owned(), e)),
    }
}

/// PCRs after the firmware's log; a machine without one is for a TPM that nobody measured into.
fn replay(firmware_log: &[u8]) -> Result<Replay, EngineError> {
    if firmware_log.is_empty() { Ok(Replay::default()) } else { Ok(firmware::replay(firmware_log)?) }
}

fn warn_of_lockout(tpm: &mut HostTpm) {
    match tpm.tpm().lockout() {
        Ok(l) if l.locked => super::note(
            "the TPM is in dictionary-attack lockout; attestation goes on, but somebody guessed a password: find out who",
        ),
        Ok(l) if l.counter > 0 => {
            super::note(&format!("the TPM counts {} failed authorizations of {}", l.counter, l.limit));
        }
        Ok(_) => {}
        Err(e) => super::note(&e.to_string()),
    }
}

/// Where Linux has the firmware's log.
const LINUX_FIRMWARE_LOG: &str = "/sys/kernel/security/tpm0/binary_bios_measurements";

/// PCRs of the wrap key move once, when layers are measured; not many times while one is made.
const WRAP_ATTEMPTS: u32 = 4;
