//! One connection to a TPM: what needs no key.

use crate::error::TpmError;
use attest::tcti::{Tcti, TctiError};
use policy::Digest;
use std::collections::BTreeMap;
use std::str::FromStr;
use tss_esapi::constants::{CapabilityType, PropertyTag, StartupType};
use tss_esapi::handles::{ObjectHandle, PcrHandle, TpmHandle};
use tss_esapi::interface_types::algorithm::HashingAlgorithm;
use tss_esapi::interface_types::session_handles::AuthSession;
use tss_esapi::structures::{CapabilityData, DigestValues, PcrSelectionList, PcrSlot};
use tss_esapi::tcti_ldr::{DeviceConfig, NetworkTPMConfig, TctiNameConf};

/// A TPM that answers. Objects and sessions that it loads are flushed when it is dropped.
pub struct Tpm {
    pub(crate) context: tss_esapi::Context,
}

/// The state of the TPM's protection against guessing (TPM 2.0 part 1, 19.8).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Lockout {
    /// Failed authorizations and unclean stops since the last recovery.
    pub counter: u32,
    /// How many lead to lockout.
    pub limit: u32,
    /// Whether it is locked out now.
    pub locked: bool,
}

impl Tpm {
    /// Connects, makes sure that the TPM works, and flushes objects and sessions that a dead client left. Only whoever
    /// holds the one lock of this TPM may call it. Waits without a bound where another client is connected to a software
    /// TPM, which serves one at a time.
    pub fn open(tcti: &Tcti) -> Result<Self, TpmError> {
        let mut tpm = Self::connect(tcti)?;
        tpm.permanent()?;
        if !tcti.has_resource_manager() {
            tpm.flush_leftovers()?;
        }
        Ok(tpm)
    }

    /// Connects, and does what firmware does first: TPM2_Startup(CLEAR). Flushes nothing. A TPM that was started already stays as it is.
    pub fn start_up(tcti: &Tcti) -> Result<Self, TpmError> {
        let mut tpm = Self::connect(tcti)?;
        tpm.context.startup(StartupType::Clear).map_err(|e| TpmError::of("TPM2_Startup", e))?;
        Ok(tpm)
    }

    fn connect(tcti: &Tcti) -> Result<Self, TpmError> {
        let context = tss_esapi::Context::new(library_name(tcti)?).map_err(|_| TpmError::Away(tcti.to_string()))?;
        Ok(Self { context })
    }

    /// Values of PCRs, SHA-256 bank. PCRs that the bank lacks are an error.
    pub fn pcr_read(&mut self, pcrs: &[u8]) -> Result<BTreeMap<u8, Digest>, TpmError> {
        let mut values = BTreeMap::new();
        for chunk in pcrs.chunks(PCRS_PER_READ) {
            let list = selection(chunk)?;
            let (_, _, digests) =
                self.without_sessions(|c| c.pcr_read(list)).map_err(|e| TpmError::of("TPM2_PCR_Read", e))?;
            if digests.len() != chunk.len() {
                return Err(TpmError::NoSha256);
            }
            for (pcr, digest) in chunk.iter().zip(digests.value()) {
                let value = digest.value().try_into().map_err(|_| TpmError::Answer("TPM2_PCR_Read"))?;
                values.insert(*pcr, Digest(value));
            }
        }
        Ok(values)
    }

    /// Extends `pcr` with `digest`, SHA-256 bank only: no other bank is ever quoted.
    pub fn pcr_extend(&mut self, pcr: u8, digest: &Digest) -> Result<(), TpmError> {
        let name = "TPM2_PCR_Extend";
        let handle = PcrHandle::try_from(u32::from(pcr)).map_err(|e| TpmError::of(name, e))?;
        let mut values = DigestValues::new();
        let bytes = digest.as_bytes().to_vec().try_into().map_err(|e| TpmError::of(name, e))?;
        values.set(HashingAlgorithm::Sha256, bytes);
        self.context
            .execute_with_session(Some(AuthSession::Password), |c| c.pcr_extend(handle, values))
            .map_err(|e| TpmError::of(name, e))
    }

    /// How near the TPM is to lockout.
    pub fn lockout(&mut self) -> Result<Lockout, TpmError> {
        let permanent = self.permanent()?;
        let counter = self.property(PropertyTag::LockoutCounter)?;
        let limit = self.property(PropertyTag::MaxAuthFail)?;
        Ok(Lockout { counter, limit, locked: permanent & PERMANENT_IN_LOCKOUT != 0 })
    }

    /// Objects and sessions that the TPM holds just now: transient objects, loaded and saved sessions.
    pub fn loaded(&mut self) -> Result<usize, TpmError> {
        let mut count = 0;
        for first in HANDLE_RANGES {
            count += self.handles(first)?.len();
        }
        Ok(count)
    }

    /// TPM2_Shutdown(CLEAR), so that the TPM does not count the next start as unclean; then the connection is closed.
    pub fn shut_down(mut self) -> Result<(), TpmError> {
        self.without_sessions(|c| c.shutdown(StartupType::Clear)).map_err(|e| TpmError::of("TPM2_Shutdown", e))
    }

    /// TPM_PT_PERMANENT (TPM 2.0 part 2, 8.6); the first command of a connection, so it also finds out whether the TPM works.
    fn permanent(&mut self) -> Result<u32, TpmError> {
        self.property(PropertyTag::Permanent)
    }

    pub(crate) fn property(&mut self, tag: PropertyTag) -> Result<u32, TpmError> {
        let name = "TPM2_GetCapability";
        let (data, _) = self
            .without_sessions(|c| c.get_capability(CapabilityType::TpmProperties, tag.into(), 1))
            .map_err(|e| TpmError::of(name, e))?;
        let CapabilityData::TpmProperties(list) = data else { return Err(TpmError::Answer(name)) };
        list.into_iter().find(|p| p.property() == tag).map(|p| p.value()).ok_or(TpmError::Answer(name))
    }

    fn flush_leftovers(&mut self) -> Result<(), TpmError> {
        for first in HANDLE_RANGES {
            for handle in self.handles(first)? {
                self.flush_foreign(handle)?;
            }
        }
        Ok(())
    }

    fn flush_foreign(&mut self, handle: TpmHandle) -> Result<(), TpmError> {
        let object =
            self.without_sessions(|c| c.tr_from_tpm_public(handle)).map_err(|e| TpmError::of("TPM2_ReadPublic", e))?;
        match self.context.flush_context(object) {
            // The library believes that policy sessions can't be flushed, but says so only after it flushed one.
            Ok(()) | Err(tss_esapi::Error::WrapperError(tss_esapi::WrapperErrorKind::InvalidHandleState)) => Ok(()),
            Err(e) => Err(TpmError::of("TPM2_FlushContext", e)),
        }
    }

    fn handles(&mut self, first: u32) -> Result<Vec<TpmHandle>, TpmError> {
        let name = "TPM2_GetCapability";
        let (data, _) = self
            .without_sessions(|c| c.get_capability(CapabilityType::Handles, first, HANDLES_AT_ONCE))
            .map_err(|e| TpmError::of(name, e))?;
        let CapabilityData::Handles(list) = data else { return Err(TpmError::Answer(name)) };
        Ok(list.into_inner())
    }

    /// Whether there is such an NV index.
    pub(crate) fn has_nv_index(&mut self, index: u32) -> Result<bool, TpmError> {
        let name = "TPM2_GetCapability";
        let (data, _) = self
            .without_sessions(|c| c.get_capability(CapabilityType::Handles, index, 1))
            .map_err(|e| TpmError::of(name, e))?;
        let CapabilityData::Handles(list) = data else { return Err(TpmError::Answer(name)) };
        Ok(list.into_inner().first().is_some_and(|h| u32::from(*h) == index))
    }

    pub(crate) fn flush(&mut self, handle: impl Into<ObjectHandle>) -> Result<(), TpmError> {
        self.context.flush_context(handle.into()).map_err(|e| TpmError::of("TPM2_FlushContext", e))
    }

    pub(crate) fn without_sessions<T>(&mut self, f: impl FnOnce(&mut tss_esapi::Context) -> T) -> T {
        self.context.execute_without_session(f)
    }
}

impl std::fmt::Debug for Tpm {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("a TPM")
    }
}

/// The TPM's name in the library's form.
pub(crate) fn library_name(tcti: &Tcti) -> Result<TctiNameConf, TctiError> {
    match tcti {
        Tcti::Device(path) => {
            let path = path.to_str().ok_or(TctiError::Path)?;
            DeviceConfig::from_str(path).map(TctiNameConf::Device).map_err(|_| TctiError::Path)
        }
        Tcti::Swtpm { host, port } => NetworkTPMConfig::from_str(&format!("host={host},port={port}"))
            .map(TctiNameConf::Swtpm)
            .map_err(|_| TctiError::Swtpm),
    }
}

/// A selection of PCRs in the SHA-256 bank.
pub(crate) fn selection(pcrs: &[u8]) -> Result<PcrSelectionList, TpmError> {
    let slots: Result<Vec<PcrSlot>, _> =
        pcrs.iter().map(|p| PcrSlot::try_from(1_u32.checked_shl(u32::from(*p)).unwrap_or(0))).collect();
    let slots = slots.map_err(|e| TpmError::of("PCR selection", e))?;
    PcrSelectionList::builder()
        .with_selection(HashingAlgorithm::Sha256, &slots)
        .build()
        .map_err(|e| TpmError::of("PCR selection", e))
}

/// TPM2_PCR_Read answers with at most this many (TPML_DIGEST).
const PCRS_PER_READ: usize = 8;

/// TPMA_PERMANENT.inLockout.
const PERMANENT_IN_LOCKOUT: u32 = 1 << 9;

/// Where handles of transient objects, loaded sessions and saved sessions begin (TPM 2.0 part 2, 7.5).
const HANDLE_RANGES: [u32; 3] = [0x8000_0000, 0x0200_0000, 0x0300_0000];

/// More than any TPM holds.
const HANDLES_AT_ONCE: u32 = 254;
