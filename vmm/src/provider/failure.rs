//! What an attestation's failure means for the exit code.

use crate::exit::{Exit, Failure};
use attest::client::ClientError;
use attest::flow::FlowError;
use attest::protocol::ProblemType;

/// The failure of an attestation, as this program ends with it.
pub fn failure(error: &FlowError) -> Failure {
    let exit = match error {
        FlowError::Provider(error) => client_exit(error),
        FlowError::Service(_) | FlowError::Tpm(_) => Exit::Tpm,
        FlowError::Bundle(_) | FlowError::Mismatch(_) | FlowError::Receipt(_) => Exit::WrongProvider,
        FlowError::Lease(_) | FlowError::Late | FlowError::SlowClock => Exit::Lease,
        FlowError::Memory(_) | FlowError::Host(_) => Exit::Host,
        FlowError::Parameters(_) | FlowError::GivenUp => Exit::Internal,
    };
    Failure::of(exit, error)
}

fn client_exit(error: &ClientError) -> Exit {
    match error {
        ClientError::Refused(_) if error.problem() == Some(ProblemType::Unavailable) => Exit::Unreachable,
        ClientError::Refused(_) => Exit::Refused,
        ClientError::Unreachable { .. } => Exit::Unreachable,
        ClientError::WrongProvider { .. } | ClientError::BadAnswer { .. } | ClientError::WrongAuthority => {
            Exit::WrongProvider
        }
        ClientError::Setup(_) => Exit::Host,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use attest::protocol::Problem;

    fn refused(kind: ProblemType) -> FlowError {
        let problem = Problem { kind: kind.urn(), title: "no".into(), status: 403, detail: None };
        FlowError::Provider(ClientError::Refused(Box::new(problem)))
    }

    #[test]
    fn scripts_can_tell_a_refusal_from_a_provider_that_is_away_or_wrong() {
        assert_eq!(failure(&refused(ProblemType::PolicyRefuses)).exit, Exit::Refused);
        assert_eq!(failure(&refused(ProblemType::Unavailable)).exit, Exit::Unreachable);
        let (url, reason) = (String::from("https://a:1"), String::from("x"));
        let wrong = FlowError::Provider(ClientError::WrongProvider { url, reason });
        assert_eq!(failure(&wrong).exit, Exit::WrongProvider);
        assert_eq!(failure(&FlowError::Mismatch("x")).exit, Exit::WrongProvider);
    }
}
