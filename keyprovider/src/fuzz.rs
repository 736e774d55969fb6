//! Everything that is parsed here from outside, for fuzzers: no input may panic, hang or take unbounded memory.

use crate::api;
use crate::authority::spki_of;
use crate::client::{Profile, from_pem};
use crate::server::body::parse;
use attest::protocol::{AnchorUpdate, AttestationRequest, Evidence};
use policy::report::Report;
use rustls_pki_types::CertificateDer;

/// Bodies of every route.
pub fn fuzz_bodies(data: &[u8]) {
    let _ = parse::<AttestationRequest>(data);
    let _ = parse::<Evidence>(data);
    let _ = parse::<Report>(data);
    let _ = parse::<AnchorUpdate>(data);
    let _ = parse::<api::NewCustomer>(data);
    let _ = parse::<api::NewCloud>(data).map(|new| crate::attestation::ek::roots(&new.roots));
    let _ = parse::<api::NewHost>(data);
    let _ = parse::<api::SignedPolicy>(data);
    let _ = parse::<policy::ReferenceValues>(data).map(|values| values.check());
    let _ = parse::<api::SealedFile>(data);
    let _ = parse::<api::KeyRequest>(data);
    let _ = parse::<api::NewVolume>(data);
    let _ = parse::<api::ConfirmVolume>(data);
    let _ = parse::<api::ConfirmCustomer>(data);
    let _ = parse::<api::SessionAnchor>(data);
    let _ = parse::<api::SessionEvent>(data);
    let _ = parse::<api::NewAdmin>(data);
}

/// Answers and files that the tool reads.
pub fn fuzz_tool(data: &[u8]) {
    let _ = parse::<api::SessionView>(data);
    let _ = parse::<api::SealedKey>(data);
    let _ = parse::<api::AuditPage>(data);
    let _ = parse::<api::VmView>(data);
    let _ = parse::<Profile>(data);
    let _ = parse::<policy::disk::ToolMessage>(data);
    if let Ok(text) = std::str::from_utf8(data) {
        let _ = from_pem(text);
        let _ = crate::attestation::ek::roots(text);
    }
}

/// Certificates that clients show.
pub fn fuzz_certificate(data: &[u8]) {
    let certificate = CertificateDer::from(data);
    let _ = spki_of(&certificate);
    let _ = attest::ek::host_id(data);
}
