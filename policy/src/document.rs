//! The customer's policy document: one text, settings on top, Cedar rules below, signed as a whole by the customer's
//! policy key:
//!
//! ```text
//! {
//!   "version": 3, "customer": "acme",
//!   "lease": { "seconds": 3600, "quiesce_seconds": 10 }
//! }
//! ---
//! permit (principal, action == Action::"vm.power-on", resource);
//! ```

use crate::encoding::{Base64Url, Digest};
use crate::id::CustomerId;
use crate::lease::{LeaseError, LeaseTerms};
use serde::{Deserialize, Serialize};

/// The longest policy document, in bytes.
pub const DOCUMENT_LIMIT: usize = 256 * 1024;

/// A policy document, split but its rules not yet parsed.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PolicyDocument {
    /// The settings.
    pub settings: Settings,
    /// Cedar rules, as text.
    pub rules: String,
}

/// The settings on top of a policy document.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    /// Rising with each document; the provider never goes back.
    pub version: u64,
    /// Whose policy it is.
    pub customer: CustomerId,
    /// Terms of every lease.
    pub lease: LeaseTerms,
    /// Whether a host must run with `kernel.yama.ptrace_scope=3`; a demonstration waives it, visibly.
    #[serde(default = "yes")]
    pub require_ptrace_closed: bool,
    /// Whether a host must keep keys in memfd_secret pages.
    #[serde(default = "yes")]
    pub require_memfd_secret: bool,
    /// Seconds that a VM may run while its reports can't be delivered: 1 to 604800.
    #[serde(default = "an_hour")]
    pub unreported_seconds: u32,
}

fn yes() -> bool {
    true
}

fn an_hour() -> u32 {
    3600
}

/// A document that is none.
#[derive(Debug, thiserror::Error)]
pub enum DocumentError {
    /// Too long.
    #[error("a policy document is at most {DOCUMENT_LIMIT} bytes")]
    Length,
    /// No separator.
    #[error("a policy document is settings (JSON), a line '---', and Cedar rules")]
    Shape,
    /// Settings that can't be read.
    #[error("the policy's settings can't be read")]
    Settings(#[source] serde_json::Error),
    /// Terms that can't be kept.
    #[error("the policy's lease can't be kept")]
    Lease(#[source] LeaseError),
    /// A number out of range.
    #[error("unreported_seconds is 1 to 604800")]
    Unreported,
}

impl PolicyDocument {
    /// Reads a document.
    pub fn parse(text: &str) -> Result<Self, DocumentError> {
        if text.len() > DOCUMENT_LIMIT {
            return Err(DocumentError::Length);
        }
        let (head, rules) = text.split_once("\n---\n").ok_or(DocumentError::Shape)?;
        let settings: Settings = serde_json::from_str(head).map_err(DocumentError::Settings)?;
        settings.lease.check().map_err(DocumentError::Lease)?;
        if !(1..=604_800).contains(&settings.unreported_seconds) {
            return Err(DocumentError::Unreported);
        }
        Ok(Self { settings, rules: rules.to_owned() })
    }
}

/// What a customer says of a policy document, and signs: which version of whose policy it is, and its digest. Whoever holds the
/// policy key's public half can tell with it that a policy is the customer's, without the document.
///
/// ```text
/// fealty policy v2
/// CUSTOMER
/// VERSION
/// SHA-256 of the document, hex
/// ```
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PolicyStatement {
    /// Whose policy.
    pub customer: CustomerId,
    /// Its version.
    pub version: u64,
    /// SHA-256 of the document's text.
    pub document: Digest,
}

impl PolicyStatement {
    /// The statement that a document makes of itself.
    ///
    /// # Errors
    /// Where the text is no policy document.
    pub fn of(text: &str) -> Result<Self, DocumentError> {
        let Settings { version, customer, .. } = PolicyDocument::parse(text)?.settings;
        Ok(Self { customer, version, document: Digest::of(text.as_bytes()) })
    }

    /// The bytes that the customer's Ed25519 policy key signs.
    pub fn signed_bytes(&self) -> Vec<u8> {
        format!("fealty policy v2\n{}\n{}\n{}\n", self.customer, self.version, self.document).into_bytes()
    }
}

/// A policy in force, as a release names it.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PolicyInForce {
    /// Its version.
    pub version: u64,
    /// SHA-256 of its document.
    pub document: Digest,
    /// The customer's Ed25519 signature over the [`PolicyStatement`], 64 bytes.
    pub signature: Base64Url,
}

impl PolicyInForce {
    /// What the customer must have signed.
    pub fn statement(&self, customer: &CustomerId) -> PolicyStatement {
        PolicyStatement { customer: customer.clone(), version: self.version, document: self.document }
    }
}

/// What a host says of itself that no PCR holds; bound into the quote. Claims of the VM process: worth what the measured
/// layers are worth.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Claims {
    /// How keys are kept.
    pub key_memory: KeyMemory,
    /// `kernel.yama.ptrace_scope`, where the kernel has it.
    pub ptrace_scope: Option<u8>,
}

/// How a process keeps keys.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum KeyMemory {
    /// memfd_secret pages.
    MemfdSecret,
    /// Locked pages left out of core dumps.
    Mlock,
}

/// Claims that the settings don't accept.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum ClaimsError {
    /// Root may trace VM processes.
    #[error("the host lets root trace processes (kernel.yama.ptrace_scope is not 3)")]
    Ptrace,
    /// Keys lie in ordinary locked memory.
    #[error(
        "the host's kernel offers no memfd_secret (before Linux 6.5 it needs secretmem.enable=1 on its command line)"
    )]
    KeyMemory,
}

impl Settings {
    /// Whether a host with these claims may get keys.
    pub fn judge(&self, claims: &Claims) -> Result<(), ClaimsError> {
        if self.require_ptrace_closed && claims.ptrace_scope != Some(3) {
            return Err(ClaimsError::Ptrace);
        }
        if self.require_memfd_secret && claims.key_memory != KeyMemory::MemfdSecret {
            return Err(ClaimsError::KeyMemory);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = "{\"version\":1,\"customer\":\"acme\",\"lease\":{\"seconds\":60,\"quiesce_seconds\":10}}\n---\n";

    #[test]
    fn strictness_is_the_default() {
        let document = PolicyDocument::parse(GOOD).expect("good");
        let claims = |key_memory, ptrace_scope| Claims { key_memory, ptrace_scope };
        let judge = |c| document.settings.judge(&c);
        assert_eq!(judge(claims(KeyMemory::MemfdSecret, Some(3))), Ok(()));
        assert_eq!(judge(claims(KeyMemory::MemfdSecret, None)), Err(ClaimsError::Ptrace));
        assert_eq!(judge(claims(KeyMemory::Mlock, Some(3))), Err(ClaimsError::KeyMemory));
    }

    #[test]
    fn a_statement_names_owner_version_and_text() {
        let statement = PolicyStatement::of(GOOD).expect("good");
        let digest = Digest::of(GOOD.as_bytes());
        assert_eq!(statement.signed_bytes(), format!("fealty policy v2\nacme\n1\n{digest}\n").into_bytes());
        let other = PolicyStatement::of(&format!("{GOOD} ")).expect("good");
        assert_ne!(other.signed_bytes(), statement.signed_bytes(), "every byte of the text counts");
        let stated = PolicyInForce { version: 1, document: digest, signature: vec![0; 64].into() };
        assert_eq!(stated.statement(&statement.customer), statement);
    }

    #[test]
    fn unknown_settings_are_refused() {
        assert!(PolicyDocument::parse(&GOOD.replacen('{', "{\"x\":1,", 1)).is_err());
        assert!(PolicyDocument::parse("{}").is_err());
    }
}
