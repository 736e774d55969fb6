//! What can be done to a VM, and which of it needs the customer (the table of operations in ARCHITECTURE.md).

use crate::encoding::Digest;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fmt;

/// An operation on a VM, by the name it has in the API, in policies and in the audit log.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
pub enum Operation {
    /// Start the VM: a new instance.
    #[serde(rename = "vm.power-on")]
    PowerOn,
    /// Renew the lease of the running instance.
    #[serde(rename = "vm.renew")]
    Renew,
    /// Put keys back into an instance that its lease or a directive paused.
    #[serde(rename = "vm.resume-keys")]
    ResumeKeys,
    /// Ask what the VM is and does.
    #[serde(rename = "vm.info")]
    Info,
    /// Pause on the operator's order.
    #[serde(rename = "vm.pause")]
    Pause,
    /// Resume after the operator's own pause.
    #[serde(rename = "vm.resume")]
    Resume,
    /// Press the power button.
    #[serde(rename = "vm.power-button")]
    PowerButton,
    /// End the VM.
    #[serde(rename = "vm.shutdown")]
    Shutdown,
    /// Write the guest's memory and vCPU state to a sealed stream that only the customer opens.
    #[serde(rename = "vm.coredump")]
    CoreDump,
    /// Make a volume larger under the running guest.
    #[serde(rename = "vm.resize-disk")]
    ResizeDisk,
}

/// How an operation is decided.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum OperationClass {
    /// Done at once, reported as the policy says.
    Free,
    /// Needs a fresh attestation; its answer carries the VM's keys.
    Attested,
    /// Needs a fresh attestation and the policy's permission; logged before and after.
    Restricted,
}

impl Operation {
    /// Every operation.
    pub const ALL: [Self; 10] = [
        Self::PowerOn,
        Self::Renew,
        Self::ResumeKeys,
        Self::Info,
        Self::Pause,
        Self::Resume,
        Self::PowerButton,
        Self::Shutdown,
        Self::CoreDump,
        Self::ResizeDisk,
    ];

    /// How it is decided.
    pub fn class(self) -> OperationClass {
        match self {
            Self::Info | Self::Pause | Self::Resume | Self::PowerButton | Self::Shutdown => OperationClass::Free,
            Self::PowerOn | Self::Renew | Self::ResumeKeys => OperationClass::Attested,
            Self::CoreDump | Self::ResizeDisk => OperationClass::Restricted,
        }
    }

    /// Its name, as in JSON.
    pub fn name(self) -> &'static str {
        match self {
            Self::PowerOn => "vm.power-on",
            Self::Renew => "vm.renew",
            Self::ResumeKeys => "vm.resume-keys",
            Self::Info => "vm.info",
            Self::Pause => "vm.pause",
            Self::Resume => "vm.resume",
            Self::PowerButton => "vm.power-button",
            Self::Shutdown => "vm.shutdown",
            Self::CoreDump => "vm.coredump",
            Self::ResizeDisk => "vm.resize-disk",
        }
    }
}

impl fmt::Display for Operation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// An operation with its parameters, as the attestation that asks for it names them.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OperationRequest {
    /// What is to be done.
    pub operation: Operation,
    /// Its parameters, by name; empty for most. At most 16; names are 1 to 256 of `a-z`, `0-9`, `_`, `-`, values at most 256
    /// bytes (see [`Self::check`]).
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub parameters: BTreeMap<String, String>,
}

/// More or other parameters than an operation may have.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error(
    "an operation has at most 16 parameters: names of a-z, 0-9, '_' and '-', names and values of at most 256 bytes"
)]
pub struct ParameterError;

impl OperationRequest {
    /// An operation without parameters.
    pub fn plain(operation: Operation) -> Self {
        Self { operation, parameters: BTreeMap::new() }
    }

    /// Checks the bounds on parameters.
    pub fn check(&self) -> Result<(), ParameterError> {
        check_parameters(&self.parameters)
    }

    /// The digest that the quote binds: the name, then each parameter's name and value in order.
    pub fn digest(&self) -> Digest {
        let mut fields: Vec<&[u8]> = vec![self.operation.name().as_bytes()];
        for (name, value) in &self.parameters {
            fields.push(name.as_bytes());
            fields.push(value.as_bytes());
        }
        Digest::of_fields("fealty operation v1", &fields)
    }
}

pub(crate) fn check_parameters(parameters: &BTreeMap<String, String>) -> Result<(), ParameterError> {
    // Whoever asks chooses the names, and people read them in the audit log.
    let plain = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || matches!(b, b'_' | b'-');
    let good = |name: &String| (1..=256).contains(&name.len()) && name.bytes().all(plain);
    let fits = parameters.len() <= 16 && parameters.iter().all(|(name, value)| good(name) && value.len() <= 256);
    if fits { Ok(()) } else { Err(ParameterError) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn json_names_are_the_names() {
        for operation in Operation::ALL {
            assert_eq!(serde_json::to_value(operation).ok(), Some(operation.name().into()));
        }
    }

    #[test]
    fn what_weakens_or_changes_a_vm_is_restricted() {
        for operation in [Operation::CoreDump, Operation::ResizeDisk] {
            assert_eq!(operation.class(), OperationClass::Restricted);
        }
    }

    #[test]
    fn parameters_are_bounded() {
        let mut request = OperationRequest::plain(Operation::CoreDump);
        assert_eq!(request.check(), Ok(()));
        request.parameters.insert("memory_mib-2".into(), "x".repeat(256));
        assert_eq!(request.check(), Ok(()));
        request.parameters.insert("a".into(), "x".repeat(257));
        assert_eq!(request.check(), Err(ParameterError));
        for name in ["", "A", "a b", "a=b", "a\n", "\u{1b}[2J", "\u{e4}", &"a".repeat(257)] {
            request.parameters = [(name.to_owned(), String::new())].into();
            assert_eq!(request.check(), Err(ParameterError), "{name:?}");
        }
    }
}
