//! The provider's two certificate authorities: one that VM files pin and that signs the server's certificate, one that
//! signs administrators' certificates. Neither signs for the other's purpose, and hosts have no certificates at all.

use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, PublicKeyData, SerialNumber, SignatureAlgorithm,
};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, SubjectPublicKeyInfoDer};
use secretmem::SecretBuf;
use std::time::Duration;

/// How long an authority's certificate is good.
const AUTHORITY_DAYS: u64 = 30 * 365;

/// How long the server's certificate is good; a new one is made at each start and each day.
const SERVER_DAYS: u64 = 90;

/// How long an administrator's certificate is good.
const ADMIN_DAYS: u64 = 2 * 365;

/// Why a certificate can't be made.
#[derive(Debug, thiserror::Error)]
pub enum AuthorityError {
    /// The library says no.
    #[error("a certificate can't be made")]
    Make(#[from] rcgen::Error),
    /// A key that is none.
    #[error("not a P-256 public key")]
    PublicKey,
    /// No memory for keys.
    #[error("no protected memory for keys")]
    Memory(#[from] secretmem::SecretError),
}

/// A certificate authority that can sign.
pub struct Authority {
    certificate: CertificateDer<'static>,
    issuer: Issuer<'static, KeyPair>,
}

/// A certificate with its private key.
pub struct Identity {
    /// The certificate.
    pub certificate: CertificateDer<'static>,
    /// PKCS#8, DER.
    pub key: PrivateKeyDer<'static>,
}

impl Authority {
    /// A new authority called `name`; the key comes back beside it to be wrapped.
    pub fn create(name: &str, now_us: u64) -> Result<(Self, SecretBuf), AuthorityError> {
        let key = KeyPair::generate()?;
        let secret = SecretBuf::take(&mut key.serialize_der())?;
        let mut params = params_of(name);
        set_validity(&mut params, now_us, AUTHORITY_DAYS);
        let certificate = params.self_signed(&key)?.der().clone();
        Ok((Self { certificate, issuer: Issuer::new(params, key) }, secret))
    }

    /// The authority called `name` with this certificate and PKCS#8 key.
    pub fn open(name: &str, certificate: &[u8], key: &SecretBuf) -> Result<Self, AuthorityError> {
        let key = KeyPair::try_from(key.expose())?;
        Ok(Self { certificate: certificate.to_vec().into(), issuer: Issuer::new(params_of(name), key) })
    }

    /// Its certificate.
    pub fn certificate(&self) -> &CertificateDer<'static> {
        &self.certificate
    }

    /// A fresh key and certificate for the server called `names` (DNS names and IP addresses).
    pub fn server(&self, names: &[String], now_us: u64) -> Result<Identity, AuthorityError> {
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::new(names.to_vec())?;
        params.distinguished_name = name_of("fealty key provider");
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        params.use_authority_key_identifier_extension = true;
        finish(&mut params, now_us, SERVER_DAYS);
        let certificate = params.signed_by(&key, &self.issuer)?.der().clone();
        let key = PrivateKeyDer::from(PrivatePkcs8KeyDer::from(key.serialize_der()));
        Ok(Identity { certificate, key })
    }

    /// A certificate for administrator `name`, whose P-256 public key (SubjectPublicKeyInfo, DER) is `spki`.
    pub fn admin(&self, name: &str, spki: &[u8], now_us: u64) -> Result<CertificateDer<'static>, AuthorityError> {
        let key = P256Public::parse(spki)?;
        let mut params = CertificateParams::default();
        params.distinguished_name = name_of(name);
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        params.use_authority_key_identifier_extension = true;
        finish(&mut params, now_us, ADMIN_DAYS);
        Ok(params.signed_by(&key, &self.issuer)?.der().clone())
    }
}

/// SubjectPublicKeyInfo (DER) of a certificate's key; `None` where the certificate can't be read.
pub fn spki_of(certificate: &CertificateDer<'_>) -> Option<SubjectPublicKeyInfoDer<'static>> {
    webpki::EndEntityCert::try_from(certificate).ok().map(|c| c.subject_public_key_info())
}

/// `der` in PEM.
pub fn pem(label: &str, der: &[u8]) -> String {
    use base64::Engine;
    let text = base64::engine::general_purpose::STANDARD.encode(der);
    let lines: Vec<&str> = text.as_bytes().chunks(64).filter_map(|c| std::str::from_utf8(c).ok()).collect();
    format!("-----BEGIN {label}-----\n{}\n-----END {label}-----\n", lines.join("\n"))
}

fn params_of(name: &str) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = name_of(name);
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params
}

fn name_of(name: &str) -> DistinguishedName {
    let mut distinguished = DistinguishedName::new();
    distinguished.push(DnType::CommonName, name);
    distinguished
}

fn finish(params: &mut CertificateParams, now_us: u64, days: u64) {
    set_validity(params, now_us, days);
    let mut serial = [0; 16];
    // A serial number is a label here; where the kernel fails, rcgen derives one from the key.
    if getrandom::fill(&mut serial).is_ok() {
        serial[0] &= 0x7f;
        params.serial_number = Some(SerialNumber::from_slice(&serial));
    }
}

fn set_validity(params: &mut CertificateParams, now_us: u64, days: u64) {
    let epoch = rcgen::date_time_ymd(1970, 1, 1);
    let now = Duration::from_micros(now_us);
    // An hour back: the clocks of hosts differ.
    params.not_before = epoch + now.saturating_sub(Duration::from_secs(3600));
    params.not_after = epoch + now + Duration::from_secs(days * 86_400);
}

/// A P-256 public key as an uncompressed point (SEC 1, 2.3.3).
struct P256Public([u8; 65]);

impl P256Public {
    /// DER before the point in a P-256 SubjectPublicKeyInfo (RFC 5480).
    const PREFIX: [u8; 26] = [
        0x30, 0x59, 0x30, 0x13, 0x06, 0x07, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x02, 0x01, 0x06, 0x08, 0x2a, 0x86, 0x48,
        0xce, 0x3d, 0x03, 0x01, 0x07, 0x03, 0x42, 0x00,
    ];

    fn parse(spki: &[u8]) -> Result<Self, AuthorityError> {
        let point = spki.strip_prefix(&Self::PREFIX[..]).ok_or(AuthorityError::PublicKey)?;
        let point: [u8; 65] = point.try_into().map_err(|_| AuthorityError::PublicKey)?;
        if point[0] == 4 { Ok(Self(point)) } else { Err(AuthorityError::PublicKey) }
    }
}

impl PublicKeyData for P256Public {
    fn der_bytes(&self) -> &[u8] {
        &self.0
    }

    fn algorithm(&self) -> &'static SignatureAlgorithm {
        &rcgen::PKCS_ECDSA_P256_SHA256
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustls_pki_types::UnixTime;

    const NOW: u64 = 1_800_000_000_000_000;

    fn good(authority: &Authority, certificate: &CertificateDer<'_>, usage: webpki::KeyUsage) -> bool {
        let anchor = webpki::anchor_from_trusted_cert(authority.certificate()).expect("an anchor");
        let end = webpki::EndEntityCert::try_from(certificate).expect("a certificate");
        let time = UnixTime::since_unix_epoch(Duration::from_micros(NOW));
        end.verify_for_usage(webpki::ALL_VERIFICATION_ALGS, &[anchor], &[], time, usage, None, None).is_ok()
    }

    #[test]
    fn attack_31_each_authority_signs_for_its_purpose_only() {
        let (ca, secret) = Authority::create("fealty provider", NOW).expect("made");
        let (admins, _) = Authority::create("fealty administrators", NOW).expect("made");
        let again = Authority::open("fealty provider", ca.certificate(), &secret).expect("opens");
        let server = again.server(&["localhost".into(), "127.0.0.1".into()], NOW).expect("signed");
        let key = KeyPair::generate().expect("a key");
        let admin = admins.admin("ann", &rcgen::PublicKeyData::subject_public_key_info(&key), NOW).expect("signed");
        assert!(good(&ca, &server.certificate, webpki::KeyUsage::server_auth()));
        assert!(!good(&ca, &server.certificate, webpki::KeyUsage::client_auth()));
        assert!(!good(&admins, &server.certificate, webpki::KeyUsage::server_auth()));
        assert!(good(&admins, &admin, webpki::KeyUsage::client_auth()));
        assert!(!good(&admins, &admin, webpki::KeyUsage::server_auth()));
        assert!(!good(&ca, &admin, webpki::KeyUsage::client_auth()));
    }

    #[test]
    fn only_p256_keys_are_signed() {
        let (ca, _) = Authority::create("fealty administrators", NOW).expect("made");
        assert!(ca.admin("x", &[0; 91], NOW).is_err());
        assert!(ca.admin("x", b"", NOW).is_err());
    }
}
