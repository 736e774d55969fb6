//! The client's key and certificate. The key lies in library memory: it authenticates a connection, and opens nothing.

use super::ClientError;
use policy::Digest;
use rcgen::{CertificateParams, KeyPair, PublicKeyData};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};

/// A key and the certificates that present it.
pub struct ClientIdentity {
    pub(super) chain: Vec<CertificateDer<'static>>,
    pub(super) private: PrivateKeyDer<'static>,
    key: Digest,
}

impl ClientIdentity {
    /// A fresh P-256 key with a self-signed certificate: it says nothing but "the same as before".
    ///
    /// # Errors
    /// [`ClientError::Setup`] where the library can't make one.
    pub fn generate() -> Result<Self, ClientError> {
        let setup = |e: rcgen::Error| ClientError::Setup(e.to_string());
        let key = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256).map_err(setup)?;
        let certificate = CertificateParams::default().self_signed(&key).map_err(setup)?;
        let private = PrivatePkcs8KeyDer::from(key.serialize_der()).into();
        let digest = Digest::of(&key.subject_public_key_info());
        Ok(Self { chain: vec![certificate.der().clone()], private, key: digest })
    }

    /// An administrator's identity: certificates (leaf first) and private key in PKCS #8, DER.
    ///
    /// # Errors
    /// [`ClientError::Setup`] where the first certificate can't be read.
    pub fn from_der(chain: Vec<Vec<u8>>, private: Vec<u8>) -> Result<Self, ClientError> {
        let chain: Vec<CertificateDer<'static>> = chain.into_iter().map(CertificateDer::from).collect();
        let key = chain.first().and_then(super::tls::spki_digest);
        let key = key.ok_or_else(|| ClientError::Setup("the client certificate can't be read".into()))?;
        Ok(Self { chain, private: PrivatePkcs8KeyDer::from(private).into(), key })
    }

    /// SHA-256 of the key's DER SubjectPublicKeyInfo.
    pub fn key(&self) -> Digest {
        self.key
    }
}
