//! A request that is refused: one line, and whether to ask again.

use super::ima::ImaError;
use super::layers::LayerError;
use attest::service::Answer;
use attest_tpm::TpmError;

/// Why a request was refused.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Refusal {
    pub(super) reason: String,
    /// Whether the same request may succeed later.
    pub(super) again: bool,
    /// Whether the connection to the TPM is of no more use.
    pub(super) broken: bool,
}

impl Refusal {
    /// One that will not change.
    pub(super) fn never(reason: impl Into<String>) -> Self {
        Self { reason: reason.into(), again: false, broken: false }
    }

    /// One that may pass.
    pub(super) fn for_now(reason: impl Into<String>) -> Self {
        Self { reason: reason.into(), again: true, broken: false }
    }

    /// As the asker gets it.
    pub(super) fn answer(self) -> Answer {
        Answer::Refused { reason: self.reason, again: self.again }
    }
}

impl From<TpmError> for Refusal {
    fn from(error: TpmError) -> Self {
        Self { reason: error.to_string(), again: error.is_passing(), broken: error.spoils_connection() }
    }
}

impl From<LayerError> for Refusal {
    fn from(error: LayerError) -> Self {
        match error {
            LayerError::Tpm(error) => error.into(),
            other => Self::never(other.to_string()),
        }
    }
}

impl From<ImaError> for Refusal {
    fn from(error: ImaError) -> Self {
        Self::never(error.to_string())
    }
}
