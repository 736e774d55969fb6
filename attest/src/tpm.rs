//! TPM 2.0 structures, read and judged without a TPM: what a quote says, what a key may do, and how a credential is made
//! that only one TPM opens. Part and section numbers are those of the TPM 2.0 Library, revision 1.59.
//!
//! | module | what it holds |
//! | --- | --- |
//! | [`wire`] | the big-endian reader and writer everything here shares |
//! | [`public`], `spki` | TPMT_PUBLIC: names, SubjectPublicKeyInfo, host identity |
//! | [`attested`] | TPMS_ATTEST (quote and certification) and TPMT_SIGNATURE |
//! | [`check`] | what the attributes of AK, EK and wrap key must be |
//! | [`credential`] | TPM2_MakeCredential in software |
//! | [`pcr`] | selections, composites and PolicyPCR |

pub mod attested;
pub mod check;
pub mod credential;
pub mod pcr;
pub mod public;
mod spki;
pub mod wire;

pub use attested::{Attest, ClockInfo, Signature};
pub use check::{KeyError, check_ak, check_ek, check_wrap_key};
pub use credential::make_credential;
pub use pcr::{WRAP_PCRS, policy_pcr_digest};
pub use public::{Curve, HashAlg, Name, Public};
pub use wire::TpmError;
