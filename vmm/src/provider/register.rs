//! Before the sandbox closes: this process is registered with the host's TPM service, and says what it is.

use super::Contacts;
use crate::exit::{Exit, Failure};
use crate::run::Host;
use attest::client::ProviderClient;
use attest::flow::Attester;
use attest::service::{Client, Registering, spawn_or_join};
use attest::vmfile::VmFile;
use policy::document::{Claims, KeyMemory};
use secretmem::Protection;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::mpsc::Receiver;

/// The longest CA certificate file, in bytes.
const CA_LIMIT: u64 = 64 * 1024;

/// What the provider's thread begins with. It prepares its client, which takes as long as the registration does, and then
/// waits for it: for the process's end of the socket pair.
pub fn contacts(file: &VmFile, host: &Host, registered: Receiver<Client>) -> Result<Contacts, Failure> {
    let authority = host.provider_ca.as_deref().map(read_authority).transpose()?;
    let (header, digest) = (file.header.clone(), file.digest);
    let attester = move || {
        let provider = ProviderClient::new(&header, authority).map_err(|e| super::failure(&e.into()))?;
        let claims = claims()?;
        let service = registered.recv().map_err(|_| super::gone())?;
        Attester::new(service, provider, header, digest, &claims).map_err(|e| super::failure(&e))
    };
    Ok(Contacts { attester: Box::new(attester) })
}

/// A registration under way: the TPM service works on it while this process prepares itself.
pub struct Registration {
    asked: Registering,
    client: Client,
}

/// Joins or starts the TPM service, and asks it to register this process for the VM of `file`; and who the host is, which will be
/// the first question.
pub fn register(file: &VmFile, host: &Host) -> Result<Registration, Failure> {
    let control = spawn_or_join(&host.tcti, host.runtime_dir.as_deref(), &service_program()?).map_err(|e| tpm(&e))?;
    let (ours, theirs) = UnixStream::pair().map_err(|e| tpm(&e))?;
    let own = rustix::process::getpid();
    let pidfd = rustix::process::pidfd_open(own, rustix::process::PidfdFlags::empty()).map_err(|e| tpm(&e))?;
    let mut client = Client::new(ours);
    client.ask_identity().map_err(|e| tpm(&e))?;
    let VmFile { header, digest, .. } = file;
    let asked = control.register(&header.customer, &header.vm, *digest, theirs.as_fd(), pidfd.as_fd());
    Ok(Registration { asked: asked.map_err(|e| tpm(&e))?, client })
}

impl Registration {
    /// This process's end of the socket pair, once the service serves the other.
    pub fn done(self) -> Result<Client, Failure> {
        self.asked.done().map_err(|e| tpm(&e))?;
        Ok(self.client)
    }
}

fn tpm(error: &(dyn std::error::Error + 'static)) -> Failure {
    Failure::of(Exit::Tpm, error)
}

/// `fealty-host`, which lies beside this program.
fn service_program() -> Result<PathBuf, Failure> {
    let own =
        std::env::current_exe().map_err(|e| Failure::new(Exit::Host, format!("cannot find this program: {e}")))?;
    Ok(own.with_file_name("fealty-host"))
}

/// What this process says of how it keeps keys; the policy decides what that is worth.
fn claims() -> Result<Claims, Failure> {
    let key_memory = match secretmem::protection().map_err(|e| Failure::of(Exit::Host, &e))? {
        Protection::MemfdSecret => KeyMemory::MemfdSecret,
        Protection::Mlock => KeyMemory::Mlock,
    };
    let scope = std::fs::read_to_string("/proc/sys/kernel/yama/ptrace_scope").ok();
    Ok(Claims { key_memory, ptrace_scope: scope.and_then(|text| text.trim().parse().ok()) })
}

/// A certificate in DER, or the first one in PEM.
fn read_authority(path: &std::path::Path) -> Result<Vec<u8>, Failure> {
    let bytes = crate::run::read_file(path, CA_LIMIT)?;
    let bad = || Failure::new(Exit::File, format!("{} holds no certificate", path.display()));
    if bytes.first() == Some(&0x30) {
        return Ok(bytes);
    }
    let text = std::str::from_utf8(&bytes).map_err(|_| bad())?;
    pem_certificate(text).ok_or_else(bad)
}

fn pem_certificate(text: &str) -> Option<Vec<u8>> {
    let (_, rest) = text.split_once("-----BEGIN CERTIFICATE-----")?;
    let (body, _) = rest.split_once("-----END CERTIFICATE-----")?;
    let compact: String = body.split_whitespace().collect();
    // base64url without padding is what the vocabulary reads; the alphabets differ in two characters.
    let compact = compact.trim_end_matches('=').replace('+', "-").replace('/', "_");
    policy::Base64Url::parse(&compact).map(|bytes| bytes.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn certificates_are_read_in_both_forms() {
        let pem = "x\n-----BEGIN CERTIFICATE-----\nMAP7\n/w==\n-----END CERTIFICATE-----\n";
        assert_eq!(pem_certificate(pem), Some(vec![0x30, 0x03, 0xfb, 0xff]));
        assert_eq!(pem_certificate("MAP7"), None);
    }
}
