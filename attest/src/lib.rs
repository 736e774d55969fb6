//! Both ends of attestation.
//!
//! A host's evidence travels as [`protocol`] says, is made with the answers of the host's TPM service ([`service`]), is
//! judged by [`verify`](mod@verify), and is answered by a key bundle ([`bundle`]) that only that VM process on that host opens.
//!
//! | module | what it holds |
//! | --- | --- |
//! | [`protocol`] | bodies of the provider's HTTP API as VM processes use it |
//! | [`client`] | the blocking client: TLS 1.3 to a pinned provider |
//! | [`service`] | messages of the host's TPM service, and its client |
//! | [`tcti`] | how the host's TPM is named |
//! | [`qualify`] | H, the qualifying data of a quote: one canonical encoding for both ends |
//! | [`flow`] | the VM process's side, whole: from the question for a nonce to keys in locked memory |
//! | [`tpm`], [`ek`] | TPM structures, their checks, and endorsement keys with their certificates |
//! | [`eventlog`] | firmware logs, layer logs, IMA logs: read, replayed, made |
//! | [`verify`](mod@verify) | what evidence must prove, every check of it |
//! | [`hpke`], [`bundle`] | the two layers in which keys travel |
//! | [`aead`] | AES-256-GCM over keys in locked memory |
//! | [`note`] | signed notes: receipts of the audit log |
//! | [`vmfile`], [`stream`] | what is sealed at rest and on its way: VM files and streams |

pub mod aead;
pub mod bundle;
pub mod client;
mod der;
pub mod ek;
pub mod eventlog;
pub mod flow;
#[doc(hidden)]
pub mod fuzz;
pub mod hpke;
pub mod note;
pub mod protocol;
pub mod qualify;
pub mod service;
pub mod stream;
pub mod tcti;
pub mod tpm;
pub mod verify;
pub mod vmfile;

#[cfg(test)]
mod testing;
