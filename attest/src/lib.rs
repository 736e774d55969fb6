//! Both ends of attestation.
//!
//! A host's evidence travels as [`protocol`] says, is made with the answers of the host's TPM service ([`service`]), is
//! judged by [`verify`], and is answered by a key bundle ([`bundle`]) that only that VM process on that host opens.
//!
//! | module | what it holds |
//! | --- | --- |
//! | [`protocol`] | bodies of the provider's HTTP API as VM processes use it |
//! | [`service`] | messages of the host's TPM service, and its client |
//! | [`qualify`] | H, the qualifying data of a quote: one canonical encoding for both ends |
pub mod eventlog;
pub mod protocol;
pub mod qualify;
pub mod service;
pub mod tpm;
