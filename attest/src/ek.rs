//! Endorsement key certificates: whether a TPM's maker vouches for it (TCG EK Credential Profile 2.5).

use crate::der;
use crate::tpm::public::PublicKey;
use crate::tpm::{KeyError, Public, check_ek};
use policy::{Digest, HostId};
use rustls_pki_types::{CertificateDer, SignatureVerificationAlgorithm, UnixTime};
use webpki::{EndEntityCert, KeyUsage, anchor_from_trusted_cert, aws_lc_rs as algorithms};

/// tcg-kp-EKCertificate, 2.23.133.8.1, as the content of its DER encoding.
const EK_CERTIFICATE_OID: &[u8] = &[0x67, 0x81, 0x05, 0x08, 0x01];

/// The longest certificate, in bytes.
pub const CERTIFICATE_LIMIT: usize = 8 * 1024;

/// An endorsement key that nobody vouches for.
#[derive(Debug, thiserror::Error)]
pub enum EkError {
    /// Not a certificate.
    #[error("the endorsement key's certificate can't be read")]
    Unreadable,
    /// For another key.
    #[error("the endorsement key's certificate is for another key than the one presented")]
    OtherKey,
    /// Attributes or algorithm.
    #[error(transparent)]
    Key(#[from] KeyError),
    /// A modulus with the fingerprint of CVE-2017-15361.
    #[error("the endorsement key was made by a broken generator (ROCA, CVE-2017-15361)")]
    Roca,
    /// A root that can't be used.
    #[error("root certificate {0} of the inventory can't be read or is not valid now")]
    Root(usize),
    /// No roots at all.
    #[error("the inventory has no root certificates")]
    NoRoots,
    /// No chain.
    #[error("the endorsement key's certificate does not chain to the inventory's roots: {0}")]
    Chain(webpki::Error),
}

/// Checks that `certificate` (DER) is of the key `ek_public`, and chains at `now` to one of `roots` (DER). Each certificate of
/// `roots` is a trust anchor; those that are not self-signed may also be the links between. Roots that are out of date are
/// refused, not passed over. Gives the host's identity.
pub fn check(
    certificate: &[u8],
    ek_public: &Public,
    roots: &[CertificateDer<'_>],
    now: UnixTime,
) -> Result<HostId, EkError> {
    check_key(ek_public)?;
    let host = check_certificate(certificate, roots, now)?;
    if host == ek_public.host_id() { Ok(host) } else { Err(EkError::OtherKey) }
}

/// The same for whoever has the certificate and not yet the key: what an inventory asks at enrolment.
pub fn check_certificate(certificate: &[u8], roots: &[CertificateDer<'_>], now: UnixTime) -> Result<HostId, EkError> {
    if certificate.len() > CERTIFICATE_LIMIT {
        return Err(EkError::Unreadable);
    }
    let der = CertificateDer::from(certificate);
    let certificate = EndEntityCert::try_from(&der).map_err(|_| EkError::Unreadable)?;
    if roots.is_empty() {
        return Err(EkError::NoRoots);
    }
    let mut anchors = Vec::with_capacity(roots.len());
    for (index, root) in roots.iter().enumerate() {
        if !der::is_valid_at(root, now) {
            return Err(EkError::Root(index));
        }
        anchors.push(anchor_from_trusted_cert(root).map_err(|_| EkError::Root(index))?);
    }
    let usage = KeyUsage::required_if_present(EK_CERTIFICATE_OID);
    certificate.verify_for_usage(SIGNATURES, &anchors, roots, now, usage, None, None).map_err(EkError::Chain)?;
    Ok(HostId(Digest::of(certificate.subject_public_key_info().as_ref())))
}

/// What is asked of every endorsement key, also of one that is pinned without a certificate: its attributes, and that it is
/// not a ROCA key.
pub fn check_key(ek_public: &Public) -> Result<(), EkError> {
    check_ek(ek_public)?;
    match &ek_public.key {
        PublicKey::Rsa { modulus, .. } if is_roca(modulus) => Err(EkError::Roca),
        _ => Ok(()),
    }
}

/// The host identity that a certificate (DER) stands for: SHA-256 of its SubjectPublicKeyInfo.
pub fn host_id(certificate: &[u8]) -> Result<HostId, EkError> {
    let der = CertificateDer::from(certificate);
    let certificate = EndEntityCert::try_from(&der).map_err(|_| EkError::Unreadable)?;
    Ok(HostId(Digest::of(certificate.subject_public_key_info().as_ref())))
}

/// Signatures that makers' CAs use; SHA-1 is not among them.
const SIGNATURES: &[&dyn SignatureVerificationAlgorithm] = &[
    algorithms::ECDSA_P256_SHA256,
    algorithms::ECDSA_P256_SHA384,
    algorithms::ECDSA_P384_SHA256,
    algorithms::ECDSA_P384_SHA384,
    algorithms::ECDSA_P521_SHA512,
    algorithms::RSA_PKCS1_2048_8192_SHA256,
    algorithms::RSA_PKCS1_2048_8192_SHA384,
    algorithms::RSA_PKCS1_2048_8192_SHA512,
    algorithms::RSA_PKCS1_3072_8192_SHA384,
    algorithms::RSA_PSS_2048_8192_SHA256_LEGACY_KEY,
    algorithms::RSA_PSS_2048_8192_SHA384_LEGACY_KEY,
    algorithms::RSA_PSS_2048_8192_SHA512_LEGACY_KEY,
];

/// Whether a modulus (big-endian) has the fingerprint of the Infineon library: modulo each of these primes it is a power of
/// 65537 (Nemec et al., "The Return of Coppersmith's Attack", section 2.2). One modulus in 2^27 has it by chance.
pub fn is_roca(modulus: &[u8]) -> bool {
    const PRIMES: [u32; 17] = [11, 13, 17, 19, 37, 53, 61, 71, 73, 79, 97, 103, 107, 109, 127, 151, 157];
    PRIMES.iter().all(|prime| {
        let residue = modulus.iter().fold(0, |n, byte| (n * 256 + u32::from(*byte)) % prime);
        let mut power = 1;
        (0..*prime).any(|_| {
            power = power * 65_537 % prime;
            power == residue
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{SoftEk, moment};

    #[test]
    fn a_certificate_of_a_known_maker_is_accepted() {
        let ek = SoftEk::new();
        let checked = check(&ek.certificate, &ek.public, std::slice::from_ref(&ek.root), moment());
        assert_eq!(checked.ok(), Some(ek.public.host_id()));
        assert_eq!(host_id(&ek.certificate).ok(), Some(ek.public.host_id()));
    }

    #[test]
    fn attack_08_a_certificate_of_another_ca_or_of_an_expired_one_is_refused() {
        let (ek, other) = (SoftEk::new(), SoftEk::new());
        let by_other = check(&ek.certificate, &ek.public, std::slice::from_ref(&other.root), moment());
        assert!(matches!(by_other, Err(EkError::Chain(_))), "{by_other:?}");
        let none = check(&ek.certificate, &ek.public, &[], moment());
        assert!(matches!(none, Err(EkError::NoRoots)));
        let century =
            UnixTime::since_unix_epoch(std::time::Duration::from_secs(moment().as_secs() + 100 * 365 * 86_400));
        let late = check(&ek.certificate, &ek.public, std::slice::from_ref(&ek.root), century);
        assert!(matches!(late, Err(EkError::Root(0))), "{late:?}");
    }

    #[test]
    fn attack_04_a_certificate_of_another_key_is_refused() {
        let (ek, other) = (SoftEk::new(), SoftEk::new());
        let swapped = check(&other.certificate, &ek.public, std::slice::from_ref(&other.root), moment());
        assert!(matches!(swapped, Err(EkError::OtherKey)));
        let garbage = check(b"no certificate", &ek.public, std::slice::from_ref(&ek.root), moment());
        assert!(matches!(garbage, Err(EkError::Unreadable)));
    }

    #[test]
    fn attack_24_a_roca_modulus_is_known_by_its_fingerprint() {
        // 65537^a mod M, the shape of such primes; their products have it too.
        let mut value: Vec<u8> = vec![1];
        for _ in 0..9 {
            value = times_65537(&value);
        }
        assert!(is_roca(&value));
        value[0] ^= 2;
        assert!(!is_roca(&value));
        let modulus = match &crate::testing::rsa_public().key {
            PublicKey::Rsa { modulus, .. } => modulus.clone(),
            PublicKey::Ecc { .. } => vec![],
        };
        assert!(modulus.len() == 256 && !is_roca(&modulus));
    }

    fn times_65537(value: &[u8]) -> Vec<u8> {
        // value * 65537 = (value << 16) + value
        let mut shifted = value.to_vec();
        shifted.extend([0, 0]);
        let mut carry = 0;
        for (at, byte) in shifted.iter_mut().rev().enumerate() {
            let add = value.len().checked_sub(at + 1).map_or(0, |n| u32::from(value[n]));
            let sum = u32::from(*byte) + add + carry;
            *byte = sum as u8;
            carry = sum >> 8;
        }
        if carry > 0 {
            shifted.insert(0, carry as u8);
        }
        shifted
    }
}
