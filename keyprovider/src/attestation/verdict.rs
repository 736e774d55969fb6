//! Evidence against what was asked: the signature, H, the PCRs and the logs. What comes out is what a quote by the activated
//! key vouches for; whether the customer wants it is decided in [`super::release`].

use super::challenge::Challenge;
use crate::server::problem::{Refusal, chain};
use attest::protocol::{Evidence, ProblemType};
use attest::verify::{Expected, VerifiedEvidence};
use policy::Digest;

/// Verifies evidence against its challenge.
pub fn verify(challenge: &Challenge, evidence: &Evidence, pin: &Digest) -> Result<VerifiedEvidence, Refusal> {
    let expected = Expected {
        nonce: &challenge.nonce,
        attestation: &challenge.id,
        host: &challenge.host,
        customer: &challenge.customer,
        vm: &challenge.vm,
        operation: &challenge.operation,
        client_key: &challenge.client_key,
        pin,
        pcrs: &challenge.pcrs,
        ak_public: &challenge.ak_public,
        ima: challenge.ima.map(|ima| ima.state),
    };
    let verified = attest::verify::verify(evidence, &expected).map_err(|e| Refusal::new(e.problem(), chain(&e)))?;
    match challenge.ima.and_then(|ima| ima.reset_count) {
        // A host that was reset sends its log whole; a part continues a log of the same boot or none.
        Some(boot) if boot != verified.clock.reset_count && evidence.ima_offset != 0 => {
            Err(Refusal::new(ProblemType::BadLog, "the host was reset since its IMA log was last read"))
        }
        _ => Ok(verified),
    }
}

/// Whether a refusal for a bad log may come from an IMA log that was asked for from its middle: then the next one is asked for whole.
pub fn may_be_ima(challenge: &Challenge) -> bool {
    challenge.ima.is_some_and(|ima| ima.state.offset > 0)
}
