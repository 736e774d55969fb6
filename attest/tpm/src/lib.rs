//! TPM access for the host's TPM service: the only package that links a TPM library (tss-esapi over libtss2 3.2).
//!
//! | module | what it holds |
//! | --- | --- |
//! | [`Tpm`] | a connection, and what needs no key: PCRs, lockout, flushing what a dead client left |
//! | [`EkKind`], [`EkChoice`] | endorsement keys, their certificates and templates in NV |
//! | [`HostTpm`] | EK, AK and wrap key, and the commands on them |
//! | [`TpmError`] | what can go wrong, told apart by what somebody can do about it |

mod connection;
mod ek;
mod error;
#[doc(hidden)]
pub mod fuzz;
mod host;
mod quiet;
mod template;

pub use connection::{Lockout, Tpm};
pub use ek::{EkChoice, EkKind, EkKindError};
pub use error::TpmError;
pub use host::{BootCount, CertifiedKey, HostTpm, Quote, Signed, TpmIdentity};
pub use quiet::silence_library;
