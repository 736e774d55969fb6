//! What can go wrong with a TPM, told apart by what somebody can do about it.

use attest::tcti::TctiError;
use tss_esapi::constants::response_code::{Tss2ResponseCode, Tss2ResponseCodeKind as Kind};

/// A TPM that did not do what it was asked.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum TpmError {
    /// Its name can't be used.
    #[error(transparent)]
    Tcti(#[from] TctiError),
    /// It can't be reached, or the connection broke.
    #[error("the TPM can't be reached ({0}): is it there, and is no other program connected to it?")]
    Away(String),
    /// Nobody sent TPM2_Startup.
    #[error("the TPM was not started: firmware has not run on this machine")]
    NotStarted,
    /// TPM_RC_FAILURE.
    #[error(
        "the TPM is in failure mode and does nothing more: reset the machine, replace the TPM if that does not help"
    )]
    FailureMode,
    /// TPM_RC_LOCKOUT.
    #[error(
        "the TPM is in dictionary-attack lockout: wait for its recovery time, or clear it with the lockout authorization"
    )]
    LockedOut,
    /// TPM_RC_OBJECT_MEMORY and its like.
    #[error("the TPM holds too many objects or sessions of other programs: end those that use it")]
    Full,
    /// PCRs of another bank only.
    #[error("the TPM's SHA-256 bank of PCRs is not active: switch it on in the firmware's setup")]
    NoSha256,
    /// A hierarchy is disabled or has an authorization value.
    #[error("the TPM's {0} hierarchy is disabled or has a password: clear that in the firmware's setup")]
    Hierarchy(&'static str),
    /// TPM_RC_POLICY_FAIL: PCRs are not those of the key's policy.
    #[error("PCRs changed since the wrap key was made: attest again")]
    PcrsChanged,
    /// TPM_RC_PCR_CHANGED over and over.
    #[error("PCRs keep changing while they are used: try again")]
    PcrsMoving,
    /// The credential is for another EK or another AK.
    #[error("the credential was not made for this TPM's endorsement key and this attestation key")]
    WrongCredential,
    /// The point is not on the curve.
    #[error("the point does not lie on P-256")]
    WrongPoint,
    /// No EK of the wanted kind.
    #[error("the TPM has no certificate of an endorsement key of kind {0}")]
    NoEk(String),
    /// The certificate in NV is another key's.
    #[error("the endorsement key certificate in the TPM does not belong to its endorsement key")]
    ForeignCertificate,
    /// An endorsement key after a template of its maker's own.
    #[error("the endorsement key's policy is none of the TCG's profiles: choose another one with --ek")]
    ForeignPolicy,
    /// The TPM was reset while we were at work.
    #[error("the TPM was reset while this host runs: reboot the host")]
    Reset,
    /// The TPM was exchanged while we were at work.
    #[error("another TPM answers than before: reboot the host")]
    Exchanged,
    /// What the TPM answered makes no sense.
    #[error("the TPM's answer to {0} can't be read")]
    Answer(&'static str),
    /// Anything else.
    #[error("the TPM refused {command} (0x{code:03x}: {text})")]
    Refused {
        /// The command, by its name in TPM 2.0 part 3.
        command: &'static str,
        /// The response code (TPM 2.0 part 2, 6.6).
        code: u32,
        /// In words.
        text: String,
    },
}

impl TpmError {
    /// Whether the connection should be closed and opened anew, because it broke or its keys and sessions may be gone.
    pub fn spoils_connection(&self) -> bool {
        !matches!(
            self,
            Self::PcrsChanged | Self::PcrsMoving | Self::WrongCredential | Self::WrongPoint | Self::LockedOut
        )
    }

    /// Whether the same request may succeed later.
    pub fn is_passing(&self) -> bool {
        matches!(self, Self::Away(_) | Self::PcrsMoving | Self::Full)
    }

    /// The error of `command`, which failed with `error`.
    pub(crate) fn of(command: &'static str, error: tss_esapi::Error) -> Self {
        let tss_esapi::Error::Tss2Error(code) = error else { return Self::Answer(command) };
        let raw = raw_code(code);
        if raw & LAYERS != 0 {
            return match raw & LAYERS {
                TCTI_LAYER => Self::Away(format!("{command}: 0x{raw:x}")),
                _ => Self::Answer(command),
            };
        }
        match code.kind() {
            Some(Kind::Initialize) => Self::NotStarted,
            Some(Kind::Failure) => Self::FailureMode,
            Some(Kind::Lockout) => Self::LockedOut,
            Some(Kind::ObjectMemory | Kind::SessionMemory | Kind::ObjectHandles | Kind::SessionHandles) => Self::Full,
            Some(Kind::PolicyFail) => Self::PcrsChanged,
            Some(Kind::PcrChanged) => Self::PcrsMoving,
            Some(Kind::EccPoint) => Self::WrongPoint,
            _ => Self::Refused { command, code: raw, text: code.to_string() },
        }
    }
}

/// Bits of a response code that name the layer of the software stack it comes from; none for the TPM itself.
const LAYERS: u32 = 0xffff_0000;

/// TSS2_TCTI_RC_LAYER.
const TCTI_LAYER: u32 = 10 << 16;

/// The library hides the number but prints it.
fn raw_code(code: Tss2ResponseCode) -> u32 {
    let text = match code {
        Tss2ResponseCode::Success => return 0,
        Tss2ResponseCode::FormatZero(code) => code.to_string(),
        Tss2ResponseCode::FormatOne(code) => code.to_string(),
    };
    text.rsplit_once("0x").and_then(|(_, hex)| u32::from_str_radix(hex, 16).ok()).unwrap_or(u32::MAX)
}
