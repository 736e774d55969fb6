//! Before the sandbox closes: who is to be talked to, and what this process says of itself.

use super::Contacts;
use crate::exit::{Exit, Failure};
use crate::registrar::Registrar;
use crate::run::Host;
use crate::steps::Steps;
use attest::client::ProviderClient;
use attest::flow::Attester;
use attest::service::Client;
use attest::vmfile::VmFile;
use policy::document::{Claims, KeyMemory};
use secretmem::Protection;
use std::sync::mpsc::Receiver;

/// The longest CA certificate file, in bytes.
const CA_LIMIT: u64 = 64 * 1024;

/// What the provider's thread begins with. It prepares its client, which takes as long as the registration does, and then
/// waits for it: for the process's end of the socket pair, and for who makes another one should that service end.
pub fn contacts(
    file: &VmFile,
    host: &Host,
    registered: Receiver<(Client, Registrar)>,
    steps: Steps,
) -> Result<Contacts, Failure> {
    let authority = host.provider_ca.as_deref().map(read_authority).transpose()?;
    let (header, digest) = (file.header.clone(), file.digest);
    let attester = move || {
        let provider = ProviderClient::new(&header, authority).map_err(|e| super::failure(&e.into()))?;
        let claims = claims()?;
        let (service, mut registrar) = registered.recv().map_err(|_| super::gone())?;
        let reconnect = Box::new(move || {
            registrar.again().inspect(|_| steps.step("tpm-service", "it had ended; another one serves this VM"))
        });
        Attester::new(service, reconnect, provider, header, digest, &claims).map_err(|e| super::failure(&e))
    };
    Ok(Contacts { attester: Box::new(attester) })
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
