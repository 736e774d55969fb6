//! TLS of the server: version 1.3 alone, X25519MLKEM768 first. Any well-formed client certificate is taken, but its key
//! must sign the handshake: it names the client and authorises nothing by itself. No session is resumed, so each
//! connection proves possession anew.

use crate::authority::{Authority, AuthorityError, Identity, spki_of};
use policy::Digest;
use rustls::client::danger::HandshakeSignatureValid;
use rustls::crypto::CryptoProvider;
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{ClientHello, NoServerSessionStorage, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use rustls::{CertificateError, DigitallySignedStruct, DistinguishedName, Error, ServerConfig, SignatureScheme};
use rustls_pki_types::{CertificateDer, UnixTime};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

/// The most certificates a client may send.
const CHAIN_LIMIT: usize = 4;

/// Why TLS can't be set up.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// No certificate.
    #[error("the server's certificate can't be made")]
    Certificate(#[from] AuthorityError),
    /// The library says no.
    #[error("TLS can't be set up")]
    Config(#[from] Error),
}

/// The server's certificate, replaced each day while connections go on.
#[derive(Debug)]
pub struct ServerIdentity(RwLock<Arc<CertifiedKey>>);

impl ServerIdentity {
    /// A certificate for `names` from `authority`.
    pub fn new(authority: &Authority, names: &[String], now_us: u64) -> Result<Arc<Self>, TlsError> {
        Ok(Arc::new(Self(RwLock::new(certified(authority, names, now_us)?))))
    }

    /// Replaces it.
    pub fn renew(&self, authority: &Authority, names: &[String], now_us: u64) -> Result<(), TlsError> {
        let fresh = certified(authority, names, now_us)?;
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = fresh;
        Ok(())
    }
}

impl ResolvesServerCert for ServerIdentity {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.0.read().unwrap_or_else(PoisonError::into_inner).clone())
    }
}

fn certified(authority: &Authority, names: &[String], now_us: u64) -> Result<Arc<CertifiedKey>, TlsError> {
    let Identity { certificate, key } = authority.server(names, now_us)?;
    // The authority's own certificate goes along: VM files pin its key, and hosts have no other copy.
    let chain = vec![certificate, authority.certificate().clone()];
    Ok(Arc::new(CertifiedKey::from_der(chain, key, &crypto())?))
}

/// The configuration of every connection.
pub fn config(identity: Arc<ServerIdentity>) -> Result<Arc<ServerConfig>, TlsError> {
    let crypto = Arc::new(crypto());
    let mut config = ServerConfig::builder_with_provider(crypto.clone())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_client_cert_verifier(Arc::new(AnyKey(crypto)))
        .with_cert_resolver(identity);
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    config.send_tls13_tickets = 0;
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.max_early_data_size = 0;
    Ok(Arc::new(config))
}

fn crypto() -> CryptoProvider {
    rustls::crypto::aws_lc_rs::default_provider()
}

/// SHA-256 of the key in the client's certificate, and whether `admins` signed it for a client and it is in its time.
pub fn identify(chain: Option<&[CertificateDer<'_>]>, admins: &Authority, now_us: u64) -> (Option<Digest>, bool) {
    let Some([end, rest @ ..]) = chain else { return (None, false) };
    let Some(spki) = spki_of(end) else { return (None, false) };
    let key = Digest::of(&spki);
    let admin = webpki::EndEntityCert::try_from(end).is_ok_and(|certificate| {
        let anchor = webpki::anchor_from_trusted_cert(admins.certificate());
        let time = UnixTime::since_unix_epoch(Duration::from_micros(now_us));
        let usage = webpki::KeyUsage::client_auth();
        anchor.is_ok_and(|anchor| {
            let algorithms = webpki::ALL_VERIFICATION_ALGS;
            certificate.verify_for_usage(algorithms, &[anchor], rest, time, usage, None, None).is_ok()
        })
    });
    (Some(key), admin)
}

/// Takes any certificate whose key signs the handshake.
#[derive(Debug)]
struct AnyKey(Arc<CryptoProvider>);

impl ClientCertVerifier for AnyKey {
    fn client_auth_mandatory(&self) -> bool {
        // A client without one is told so by a problem document: the gate refuses it.
        false
    }

    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        end: &CertificateDer<'_>,
        rest: &[CertificateDer<'_>],
        _: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        let readable = webpki::EndEntityCert::try_from(end).is_ok();
        if readable && rest.len() < CHAIN_LIMIT {
            Ok(ClientCertVerified::assertion())
        } else {
            Err(Error::InvalidCertificate(CertificateError::BadEncoding))
        }
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(Error::General("TLS 1.3 only".into()))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let algorithms = &self.0.signature_verification_algorithms;
        rustls::crypto::verify_tls13_signature(message, certificate, signature, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}
