//! What an attestation can't do without, each alone: the TPM's commands, and one TLS request.

use super::BenchError;
use crate::firmware::Boot;
use crate::swtpm::Swtpm;
use attest_tpm::{EkChoice, HostTpm};
use policy::Digest;
use rustls::pki_types::{CertificateDer, ServerName, pem::PemObject};
use rustls::{ClientConfig, ClientConnection, RootCertStore, Stream};
use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

/// PCRs of a quote: the firmware's, and the host's layers.
const PCRS: [u8; 9] = [0, 1, 2, 3, 4, 5, 6, 7, 14];

/// A software TPM of its own, in the state in which the TPM service keeps the host's: keys loaded, wrap key made.
pub(super) struct TpmAlone {
    tpm: HostTpm,
    /// A point on the curve for ECDH: the wrap key's own.
    point: [u8; 65],
    _swtpm: Swtpm,
    _folder: tempfile::TempDir,
}

impl TpmAlone {
    /// Starts it.
    pub(super) fn start() -> Result<Self, BenchError> {
        let failed = |error: &dyn std::fmt::Display| BenchError::Tpm(error.to_string());
        let folder = tempfile::tempdir().map_err(|e| failed(&e))?;
        let swtpm = Swtpm::start(folder.path());
        let tcti = swtpm.tcti().parse().map_err(|e| failed(&e))?;
        Boot::default().play(&tcti).map_err(|e| failed(&e))?;
        let mut tpm = HostTpm::open(&tcti, EkChoice::default()).map_err(|e| failed(&e))?;
        let key = tpm.make_wrap_key().map_err(|e| failed(&e))?;
        let point = attest::tpm::Public::parse(&key.public)
            .ok()
            .and_then(|public| public.p256_point())
            .ok_or_else(|| failed(&"its wrap key is no P-256 key"))?;
        Ok(Self { tpm, point, _swtpm: swtpm, _folder: folder })
    }

    /// A quote and an ECDH, which is what each attestation needs: milliseconds. The wrap key's policy is satisfied before, as the TPM
    /// service does it. By libtss2 as it is: the TPM service spares it most of its time (`host/src/openssl.rs`).
    pub(super) fn commands(&mut self) -> Result<f64, BenchError> {
        let failed = |error: attest_tpm::TpmError| BenchError::Tpm(error.to_string());
        self.tpm.arm().map_err(failed)?;
        let began = Instant::now();
        self.tpm.quote(&Digest([7; 32]), &PCRS).map_err(failed)?;
        self.tpm.ecdh(&self.point).map_err(failed)?;
        Ok(began.elapsed().as_secs_f64() * 1e3)
    }
}

/// A plain TLS client of the key provider.
pub(super) struct TlsAlone {
    config: Arc<ClientConfig>,
    /// `host:port`.
    address: String,
}

impl TlsAlone {
    /// For the provider at `url`, whose CA's certificate is in the PEM file `ca`.
    pub(super) fn new(url: &str, ca: &Path) -> Result<Self, BenchError> {
        let failed = |error: &dyn std::fmt::Display| BenchError::Tls(error.to_string());
        let mut roots = RootCertStore::empty();
        roots.add(CertificateDer::from_pem_file(ca).map_err(|e| failed(&e))?).map_err(|e| failed(&e))?;
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let config = ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(|e| failed(&e))?
            .with_root_certificates(roots)
            .with_no_client_auth();
        let address = url.trim_start_matches("https://").trim_end_matches('/').to_owned();
        Ok(Self { config: Arc::new(config), address })
    }

    /// Connects, sends one request and reads the answer's head, whatever it says: milliseconds. Sessions are not resumed, because a VM
    /// process is always a new client.
    pub(super) fn request(&self) -> Result<f64, BenchError> {
        let failed = |error: &dyn std::fmt::Display| BenchError::Tls(error.to_string());
        let mut config = ClientConfig::clone(&self.config);
        config.resumption = rustls::client::Resumption::disabled();
        let host = self.address.split(':').next().unwrap_or_default().to_owned();
        let name = ServerName::try_from(host).map_err(|e| failed(&e))?;

        let began = Instant::now();
        let mut socket = TcpStream::connect(&self.address).map_err(|e| failed(&e))?;
        socket.set_nodelay(true).map_err(|e| failed(&e))?;
        let mut connection = ClientConnection::new(Arc::new(config), name).map_err(|e| failed(&e))?;
        let mut stream = Stream::new(&mut connection, &mut socket);
        let request = format!("GET /v1/none HTTP/1.1\r\nHost: {}\r\nConnection: close\r\n\r\n", self.address);
        stream.write_all(request.as_bytes()).map_err(|e| failed(&e))?;
        let mut head = [0; 12];
        stream.read_exact(&mut head).map_err(|e| failed(&e))?;
        let ms = began.elapsed().as_secs_f64() * 1e3;
        if head.starts_with(b"HTTP/1.1 ") { Ok(ms) } else { Err(failed(&"it does not speak HTTP/1.1")) }
    }
}
