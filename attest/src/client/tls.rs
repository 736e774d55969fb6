//! Whom the client trusts: a server whose certificate is valid for the URL's name and chains to the one CA whose key has the
//! pinned digest. No public root, no other protocol than TLS 1.3, no other key exchange than X25519MLKEM768.

use super::{ClientError, ClientIdentity};
use policy::Digest;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, aws_lc_rs, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{CertificateError, ClientConfig, DigitallySignedStruct, SignatureScheme};
use std::sync::Arc;

/// SHA-256 of a certificate's DER SubjectPublicKeyInfo; `None` where the certificate can't be read.
pub fn spki_digest(certificate: &CertificateDer<'_>) -> Option<Digest> {
    let anchor = webpki::anchor_from_trusted_cert(certificate).ok()?;
    Some(Digest::of(&webpki::spki_for_anchor(&anchor)))
}

pub(super) fn client_config(
    pin: Digest,
    authority: Option<Vec<u8>>,
    identity: &ClientIdentity,
) -> Result<Arc<ClientConfig>, ClientError> {
    let setup = |e: rustls::Error| ClientError::Setup(e.to_string());
    let provider = Arc::new(provider());
    let authority = authority.map(CertificateDer::from);
    if authority.as_ref().is_some_and(|given| spki_digest(given) != Some(pin)) {
        return Err(ClientError::WrongAuthority);
    }
    let verifier = Arc::new(PinnedVerifier { pin, authority, provider: provider.clone() });
    let mut config = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(setup)?
        .dangerous()
        .with_custom_certificate_verifier(verifier)
        .with_client_auth_cert(identity.chain.clone(), identity.private.clone_key())
        .map_err(setup)?;
    // The client proves its key anew on each connection; a resumed session would not.
    config.resumption = rustls::client::Resumption::disabled();
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(Arc::new(config))
}

/// The provider of cryptography, cut down to what the protocol uses.
pub fn provider() -> CryptoProvider {
    let mut provider = aws_lc_rs::default_provider();
    provider.kx_groups = vec![aws_lc_rs::kx_group::X25519MLKEM768];
    provider
}

#[derive(Debug)]
struct PinnedVerifier {
    pin: Digest,
    authority: Option<CertificateDer<'static>>,
    provider: Arc<CryptoProvider>,
}

impl PinnedVerifier {
    fn check(
        &self,
        leaf: &CertificateDer<'_>,
        others: &[CertificateDer<'_>],
        name: &ServerName<'_>,
        now: UnixTime,
    ) -> Result<(), rustls::Error> {
        let pinned = |c: &&CertificateDer<'_>| spki_digest(c) == Some(self.pin);
        let authority = others.iter().find(pinned).or(self.authority.as_ref());
        let Some(authority) = authority else {
            return Err(CertificateError::UnknownIssuer.into());
        };
        let bad = |e: webpki::Error| rustls::Error::General(format!("its certificate is refused: {e}"));
        let anchor = webpki::anchor_from_trusted_cert(authority).map_err(bad)?;
        let leaf = webpki::EndEntityCert::try_from(leaf).map_err(bad)?;
        leaf.verify_for_usage(
            self.provider.signature_verification_algorithms.all,
            &[anchor],
            others,
            now,
            webpki::KeyUsage::server_auth(),
            None,
            None,
        )
        .map_err(|e| match e {
            webpki::Error::CertExpired { .. } => CertificateError::Expired.into(),
            webpki::Error::CertNotValidYet { .. } => CertificateError::NotValidYet.into(),
            webpki::Error::UnknownIssuer | webpki::Error::InvalidSignatureForPublicKey => {
                CertificateError::UnknownIssuer.into()
            }
            other => bad(other),
        })?;
        leaf.verify_is_valid_for_subject_name(name).map_err(|_| CertificateError::NotValidForName.into())
    }
}

impl ServerCertVerifier for PinnedVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        self.check(end_entity, intermediates, server_name, now)?;
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(rustls::Error::General("TLS 1.2 is not spoken".into()))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, cert, dss, &self.provider.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}
