//! Endorsement keys against an inventory: chains to the makers' roots, and the wall between laboratories and customers.

use crate::server::problem::{Refusal, chain};
use crate::store::inventory::{Cloud, CloudKind, Host};
use crate::store::people::Customer;
use attest::protocol::{AttestationRequest, ProblemType};
use attest::tpm::Public;
use policy::HostId;
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, UnixTime};
use std::time::Duration;

/// The most roots of a cloud.
const ROOTS: usize = 256;

/// The certificates in a PEM text: 1 to 256.
pub fn roots(text: &str) -> Result<Vec<CertificateDer<'static>>, Refusal> {
    let bad = |why: &str| Refusal::new(ProblemType::BadRequest, format!("the roots: {why}"));
    let read = CertificateDer::pem_slice_iter(text.as_bytes()).take(ROOTS + 1).collect::<Result<Vec<_>, _>>();
    let roots = read.map_err(|_| bad("not certificates in PEM"))?;
    if !(1..=ROOTS).contains(&roots.len()) {
        return Err(bad("there must be 1 to 256 certificates"));
    }
    if roots.iter().any(|root| webpki::anchor_from_trusted_cert(root).is_err()) {
        return Err(bad("a certificate can't be read"));
    }
    Ok(roots)
}

/// Whether a certificate may enter a cloud's inventory; gives the host.
pub fn enroll(cloud: &Cloud, certificate: &[u8], now_us: u64) -> Result<HostId, Refusal> {
    if cloud.roots.trim().is_empty() {
        return Err(unknown(format!("cloud {} has no roots, so only keys can be pinned in it", cloud.id)));
    }
    attest::ek::check_certificate(certificate, &roots(&cloud.roots)?, time(now_us)).map_err(|e| unknown(chain(&e)))
}

/// Whether this host may serve this customer, and its endorsement key is still vouched for. The enrolled certificate is
/// judged; one in the request must be for the same key.
pub fn check(
    customer: &Customer,
    cloud: &Cloud,
    host: &Host,
    request: &AttestationRequest,
    now_us: u64,
) -> Result<(), Refusal> {
    if cloud.kind == CloudKind::Lab && !customer.lab {
        return Err(unknown(format!(
            "the TPM {} is a laboratory's, and {} is no laboratory customer",
            host.id, customer.id
        )));
    }
    let public = Public::parse(&request.ek_public).map_err(|e| unknown(chain(&e)))?;
    if let Some(sent) = &request.ek_certificate
        && attest::ek::host_id(sent).map_err(|e| unknown(chain(&e)))? != host.id
    {
        return Err(unknown("the endorsement key's certificate is for another key".into()));
    }
    match &host.certificate {
        None => attest::ek::check_key(&public).map_err(|e| unknown(chain(&e))),
        Some(certificate) => {
            let roots = roots(&cloud.roots)?;
            let checked = attest::ek::check(certificate, &public, &roots, time(now_us));
            checked.map(drop).map_err(|e| unknown(chain(&e)))
        }
    }
}

fn unknown(why: String) -> Refusal {
    Refusal::new(ProblemType::UnknownTpm, why)
}

fn time(now_us: u64) -> UnixTime {
    UnixTime::since_unix_epoch(Duration::from_micros(now_us))
}
