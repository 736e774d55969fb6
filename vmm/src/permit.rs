//! Leave to start vCPUs: rule 1, no keys, no boot. Not a check, a type.

use attest::flow::{Established, FlowError, OpenedRelease};
use attest::protocol::KeyName;
use attest::vmfile::{VmFile, VmFileError};
use policy::Operation;
use policy::config::{PlainConfig, VmConfig};

/// Leave to start vCPUs, once. It is made from keys that a provider released together with its leave to run, or from
/// the plain configuration of an unprotected VM; there is no other way to one.
pub struct StartPermit(());

/// Why released keys permit no start.
#[derive(Debug, thiserror::Error)]
pub enum PermitError {
    /// They answer another operation.
    #[error("the key provider released keys for {0}, not for a start")]
    Operation(Operation),
    /// The key of this VM file is not among them.
    #[error("the key provider released no key of this VM file")]
    NoKey,
    /// The sealed part does not open, or not under this header.
    #[error(transparent)]
    File(#[from] VmFileError),
    /// The audit log's receipt, or the signature of the policy, is not good.
    #[error(transparent)]
    NotTheCustomers(FlowError),
}

impl StartPermit {
    /// Leave for an unprotected VM. Its configuration has no field that could name a customer, key, volume or network.
    pub fn from_plain(_config: &PlainConfig) -> Self {
        Self(())
    }

    /// Leave that comes with released keys, what the file sealed, and what later releases must fit: the keys must answer a
    /// power-on, open the file's sealed part under the very header that was used, stand in the audit log that the sealed part
    /// names, and be permitted by a policy that its policy key signed.
    pub fn from_release(opened: &OpenedRelease, file: &VmFile) -> Result<(Self, VmConfig, Established), PermitError> {
        let operation = opened.release.operation.operation;
        if operation != Operation::PowerOn {
            return Err(PermitError::Operation(operation));
        }
        let key = opened.key(KeyName::VmFile(file.header.key_id)).ok_or(PermitError::NoKey)?;
        let config = file.open(key)?;
        let established = opened.establish(&config.trust).map_err(PermitError::NotTheCustomers)?;
        Ok((Self(()), config, established))
    }
}
