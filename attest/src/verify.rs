//! Verification of evidence: what a host must have proved before anybody asks whether its software is trusted.
//!
//! There is one way in, [`verify`], and it takes everything that the evidence is held against: the nonce, the activated
//! attestation key, the operation. What comes out, [`VerifiedEvidence`], can't be made otherwise. Whether the software is
//! known is then [`policy::ReferenceValues::judge`]'s to say, and whether the VM may start the policy's.

use crate::eventlog::{LogError, Replay, firmware, ima, ima::ImaState, layer};
use crate::protocol::{Evidence, PROTOCOL_VERSION, ProblemType};
use crate::qualify::Qualified;
use crate::tpm::attested::{Attested, ClockInfo};
use crate::tpm::pcr::composite;
use crate::tpm::public::hierarchy;
use crate::tpm::{Attest, KeyError, Public, Signature, TpmError, WRAP_PCRS};
use crate::tpm::{check_ak, check_wrap_key, policy_pcr_digest};
use policy::document::Claims;
use policy::instance::EarlierPeer;
use policy::operation::OperationRequest;
use policy::reference::{FirmwareVersion, IMA_PCR, PlatformState};
use policy::{AttestationId, CustomerId, Digest, HostId, Nonce, VmId};
use std::collections::BTreeMap;
use subtle::ConstantTimeEq;

#[cfg(test)]
mod tests;

/// What evidence is held against. All of it is the provider's own knowledge; nothing comes from the message.
#[derive(Clone, Copy, Debug)]
pub struct Expected<'a> {
    /// The nonce, already consumed.
    pub nonce: &'a Nonce,
    /// The attestation it belongs to.
    pub attestation: &'a AttestationId,
    /// The host, by its EK.
    pub host: &'a HostId,
    /// The customer of the request's path and POST.
    pub customer: &'a CustomerId,
    /// The VM, likewise.
    pub vm: &'a VmId,
    /// The operation of the POST.
    pub operation: &'a OperationRequest,
    /// SHA-256 of the SubjectPublicKeyInfo of the TLS client key.
    pub client_key: &'a Digest,
    /// The provider's own pin.
    pub pin: &'a Digest,
    /// The PCRs that were asked for, rising.
    pub pcrs: &'a [u8],
    /// TPMT_PUBLIC of the attestation key: the record that was activated for this EK, never the message's.
    pub ak_public: &'a [u8],
    /// How far this AK's IMA log was replayed (from the start: [`ImaState::START`]); none where no IMA log was asked for. Evidence
    /// with the whole log, from offset 0, is taken as well.
    pub ima: Option<ImaState>,
}

/// Evidence that holds. Only [`verify`] makes one.
#[derive(Clone, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub struct VerifiedEvidence {
    /// What the host runs, as far as the logs prove it.
    pub state: PlatformState,
    /// The TPM's clock and counters, by the quote.
    pub clock: ClockInfo,
    /// The wrap key, certified, alive only in the state that was quoted.
    pub wrap_key: Public,
    /// The VM process's bundle key: X25519.
    pub bundle_key: [u8; 32],
    /// SHA-256 of the VM file with which the process was started.
    pub vm_file: Digest,
    /// What the VM process says of the host.
    pub claims: Claims,
    /// The TPM service's word on earlier peers.
    pub earlier_peer: EarlierPeer,
    /// H.
    pub qualified: Digest,
    /// Where the next IMA log continues.
    pub ima: Option<ImaState>,
}

/// Why evidence does not hold.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum VerifyError {
    /// Another protocol.
    #[error("evidence of version {0} is not known (this is {PROTOCOL_VERSION})")]
    Version(u32),
    /// The evidence contradicts the request.
    #[error("the evidence names another {0} than the request")]
    Contradiction(&'static str),
    /// A structure or signature.
    #[error("{0}: {1}")]
    Structure(&'static str, #[source] TpmError),
    /// A key.
    #[error(transparent)]
    Key(#[from] KeyError),
    /// The wrong kind of attestation.
    #[error("the {0} is an attestation of another kind")]
    Kind(&'static str),
    /// Signed by a key elsewhere than an AK of ours is.
    #[error("the {0} was not signed by this attestation key in its endorsement hierarchy")]
    Signer(&'static str),
    /// Other qualifying data.
    #[error("the quote is not for this request: nonce, keys, VM file, operation or logs differ")]
    Qualifying,
    /// Other PCRs or another bank.
    #[error("the quote is not over the PCRs that were asked for, in the SHA-256 bank alone")]
    Selection,
    /// Values that the quote does not have.
    #[error("the PCR values sent are not those that were quoted")]
    Values,
    /// A log that can't be read or must not be.
    #[error(transparent)]
    Log(#[from] LogError),
    /// A replay that ends elsewhere.
    #[error("the logs don't replay to the quoted value of PCR {0}")]
    Pcr(u8),
    /// The same, where the host sent no values.
    #[error("the logs don't replay to the quoted PCR values")]
    Composite,
    /// The certification is of another key.
    #[error("the certification is not of the wrap key that was sent")]
    WrapName,
    /// Another hierarchy.
    #[error("the wrap key is not in the NULL hierarchy, so it would outlive a reset")]
    WrapHierarchy,
    /// A certification of another boot.
    #[error("the wrap key was certified before the TPM's last reset or restart")]
    WrapBoot,
    /// An IMA log from elsewhere than where it was asked for.
    #[error("the IMA log does not begin where it was asked for")]
    ImaOffset,
    /// Claims that can't be read.
    #[error("the host's claims can't be read")]
    Claims,
}

impl VerifyError {
    /// The problem type that the refusal bears.
    pub fn problem(&self) -> ProblemType {
        match self {
            Self::Version(_) | Self::Contradiction(_) | Self::Claims => ProblemType::BadRequest,
            Self::Log(LogError::Shell) => ProblemType::UntrustedPlatform,
            Self::Log(_) | Self::Pcr(_) | Self::Composite | Self::ImaOffset => ProblemType::BadLog,
            _ => ProblemType::BadEvidence,
        }
    }
}

/// Verifies evidence: signatures, structure and binding first, then that the logs add up to what was quoted, then that the
/// wrap key lives only in that state.
pub fn verify(evidence: &Evidence, expected: &Expected<'_>) -> Result<VerifiedEvidence, VerifyError> {
    if evidence.version != PROTOCOL_VERSION {
        return Err(VerifyError::Version(evidence.version));
    }
    if evidence.operation != *expected.operation {
        return Err(VerifyError::Contradiction("operation"));
    }
    let bundle_key: [u8; 32] =
        evidence.bundle_key[..].try_into().map_err(|_| VerifyError::Contradiction("kind of bundle key"))?;
    let ak = Public::parse(expected.ak_public).map_err(|e| VerifyError::Structure("attestation key", e))?;
    check_ak(&ak)?;
    let wrap = Public::parse(&evidence.wrap_public).map_err(|e| VerifyError::Structure("wrap key", e))?;

    let quote = signed(&ak, "quote", &evidence.quote, &evidence.quote_signature)?;
    let qualified = qualified(evidence, expected, &bundle_key, &wrap);
    if !bool::from(quote.extra_data.ct_eq(qualified.as_bytes())) {
        return Err(VerifyError::Qualifying);
    }
    let (replay, ima) = replay(evidence, expected)?;
    check_pcrs(&quote, evidence, expected, &replay)?;
    check_wrap(&ak, &wrap, &quote, evidence, &replay)?;

    let pcrs: BTreeMap<u8, Digest> = expected.pcrs.iter().map(|pcr| (*pcr, replay.value(*pcr))).collect();
    let measurements = replay.measurements.into_iter().filter(|m| pcrs.contains_key(&m.pcr)).collect();
    Ok(VerifiedEvidence {
        state: PlatformState { measurements, pcrs, tpm_firmware: FirmwareVersion(quote.firmware_version) },
        clock: quote.clock,
        wrap_key: wrap,
        bundle_key,
        vm_file: evidence.vm_file,
        claims: serde_json::from_slice(&evidence.claims).map_err(|_| VerifyError::Claims)?,
        earlier_peer: evidence.earlier_peer,
        qualified,
        ima,
    })
}

/// An attestation signed by `ak`, which must lie in the endorsement hierarchy: elsewhere a TPM blurs the counters.
fn signed(ak: &Public, what: &'static str, bytes: &[u8], signature: &[u8]) -> Result<Attest, VerifyError> {
    let wrong = |e| VerifyError::Structure(what, e);
    Signature::parse(signature).map_err(wrong)?.verify(ak, bytes, what).map_err(wrong)?;
    let attest = Attest::parse(bytes).map_err(wrong)?;
    if attest.qualified_signer == ak.qualified_name_in(hierarchy::ENDORSEMENT) {
        Ok(attest)
    } else {
        Err(VerifyError::Signer(what))
    }
}

fn qualified(evidence: &Evidence, expected: &Expected<'_>, bundle_key: &[u8; 32], wrap: &Public) -> Digest {
    Qualified {
        nonce: expected.nonce,
        attestation: expected.attestation,
        host: expected.host,
        customer: expected.customer,
        vm: expected.vm,
        vm_file: &evidence.vm_file,
        operation: expected.operation,
        bundle_key,
        client_key: expected.client_key,
        wrap_key_name: &wrap.name().0,
        earlier_peer: evidence.earlier_peer,
        firmware_log: &evidence.firmware_log,
        layer_log: &evidence.layer_log,
        ima_log: &evidence.ima_log,
        ima_offset: evidence.ima_offset,
        pin: expected.pin,
        claims: &evidence.claims,
    }
    .digest()
}

/// Replays the three logs: PCR 14 from the firmware's log first, then the layer log.
fn replay(evidence: &Evidence, expected: &Expected<'_>) -> Result<(Replay, Option<ImaState>), VerifyError> {
    let mut replay = firmware::replay(&evidence.firmware_log)?;
    layer::replay(&evidence.layer_log, &mut replay)?;
    let Some(from) = expected.ima else {
        let none = evidence.ima_log.is_empty() && evidence.ima_offset == 0;
        return if none { Ok((replay, None)) } else { Err(VerifyError::ImaOffset) };
    };
    // From the start is always good: a host that was reset meanwhile has a new log, and a whole one proves more, not less.
    let from = match evidence.ima_offset {
        0 => ImaState::START,
        offset if offset == from.offset => from,
        _ => return Err(VerifyError::ImaOffset),
    };
    let (state, measured) = ima::replay(&evidence.ima_log, from, &replay.pcrs)?;
    replay.pcrs.insert(IMA_PCR, state.pcr);
    replay.measurements.extend(measured);
    Ok((replay, Some(state)))
}

/// The quote is over exactly the asked PCRs, and the logs replay to them.
fn check_pcrs(
    quote: &Attest,
    evidence: &Evidence,
    expected: &Expected<'_>,
    replay: &Replay,
) -> Result<(), VerifyError> {
    let Attested::Quote { selection, pcr_digest } = &quote.attested else { return Err(VerifyError::Kind("quote")) };
    let [only] = &selection[..] else { return Err(VerifyError::Selection) };
    if expected.pcrs.is_empty() || !only.is_sha256_of(expected.pcrs) {
        return Err(VerifyError::Selection);
    }
    let replayed: BTreeMap<u8, Digest> = expected.pcrs.iter().map(|pcr| (*pcr, replay.value(*pcr))).collect();
    if pcr_digest[..] == composite(expected.pcrs, &replayed).as_bytes()[..] {
        return Ok(());
    }
    if evidence.pcr_values.is_empty() {
        return Err(VerifyError::Composite);
    }
    let said: BTreeMap<u8, Digest> = expected.pcrs.iter().copied().zip(evidence.pcr_values.iter().copied()).collect();
    let quoted = evidence.pcr_values.len() == expected.pcrs.len()
        && pcr_digest[..] == composite(expected.pcrs, &said).as_bytes()[..];
    if !quoted {
        return Err(VerifyError::Values);
    }
    let first = said.iter().find(|(pcr, value)| replayed.get(pcr) != Some(value));
    Err(first.map_or(VerifyError::Composite, |(pcr, _)| VerifyError::Pcr(*pcr)))
}

/// The wrap key is certified by the same AK in the same boot, lies in the NULL hierarchy, and works only while the boot PCRs
/// and PCR 14 are as replayed.
fn check_wrap(
    ak: &Public,
    wrap: &Public,
    quote: &Attest,
    evidence: &Evidence,
    replay: &Replay,
) -> Result<(), VerifyError> {
    const WHAT: &str = "wrap key's certification";
    let certify = signed(ak, WHAT, &evidence.wrap_certify, &evidence.wrap_signature)?;
    let Attested::Certify { name, qualified_name } = &certify.attested else { return Err(VerifyError::Kind(WHAT)) };
    if *name != wrap.name() {
        return Err(VerifyError::WrapName);
    }
    if *qualified_name != wrap.qualified_name_in(hierarchy::NULL) {
        return Err(VerifyError::WrapHierarchy);
    }
    let boot = |attest: &Attest| (attest.clock.reset_count, attest.clock.restart_count);
    if boot(&certify) != boot(quote) {
        return Err(VerifyError::WrapBoot);
    }
    let values: BTreeMap<u8, Digest> = WRAP_PCRS.iter().map(|pcr| (*pcr, replay.value(*pcr))).collect();
    Ok(check_wrap_key(wrap, &policy_pcr_digest(&WRAP_PCRS, &values))?)
}
