//! Quotes. Everything that the quote says beside the asker's nonce and keys is the service's own knowledge.

use super::engine::{Engine, Wrap};
use super::ima::ImaPart;
use super::peers::Registration;
use super::refusal::Refusal;
use attest::qualify::Qualified;
use attest::service::{Answer, Quoted, VmRequest};
use attest::tpm::pcr::{PCR_COUNT, composite};
use attest_tpm::{HostTpm, Quote, TpmError};
use policy::Digest;
use policy::instance::EarlierPeer;
use policy::reference::IMA_PCR;
use std::collections::BTreeMap;
use std::time::Duration;

impl Engine {
    /// Serves [`VmRequest::Quote`].
    pub(super) fn quote(
        &mut self,
        request: &VmRequest,
        vm: &Registration,
        earlier_peer: EarlierPeer,
    ) -> Result<Answer, Refusal> {
        let VmRequest::Quote { nonce, attestation, operation, bundle_key, client_key, pin, pcrs, ima_offset, claims } =
            request
        else {
            return Err(Refusal::never("not a request for a quote"));
        };
        check_pcrs(pcrs)?;
        operation.check().map_err(|e| Refusal::never(e.to_string()))?;
        let bundle_key = bundle_key.0.as_slice().try_into().map_err(|_| Refusal::never("a bundle key is 32 bytes"))?;
        let wrap = self.wrap()?;
        for attempt in 0..ATTEMPTS {
            let ima = self.ima.part(*ima_offset)?;
            let h = Qualified {
                nonce,
                attestation,
                host: &self.host,
                customer: &vm.customer,
                vm: &vm.vm,
                vm_file: &vm.vm_file,
                operation,
                bundle_key,
                client_key,
                wrap_key_name: &wrap.name,
                earlier_peer,
                firmware_log: &self.firmware_log,
                layer_log: self.layers.bytes(),
                ima_log: &ima.bytes,
                ima_offset: ima.offset,
                pin,
                claims,
            }
            .digest();
            let (expected, quote) = self.with_tpm(|engine, tpm| {
                let expected = expected_values(tpm, pcrs, &wrap, &ima)?;
                let quote = tpm.quote(&h, pcrs)?;
                if quote.boot == engine.boot { Ok((expected, quote)) } else { Err(TpmError::Reset.into()) }
            })?;
            if composite(pcrs, &expected) == quote.pcr_digest {
                let values = pcrs.iter().filter_map(|p| expected.get(p).copied()).collect();
                return Ok(self.quoted(quote, values, wrap, earlier_peer, ima));
            }
            self.with_tpm(|_, tpm| explain(tpm, pcrs, &expected))?;
            std::thread::sleep(PAUSE * attempt);
        }
        Err(Refusal::for_now("PCRs move faster than they can be quoted: try again"))
    }

    fn quoted(
        &self,
        quote: Quote,
        pcr_values: Vec<Digest>,
        wrap: Wrap,
        earlier_peer: EarlierPeer,
        ima: ImaPart,
    ) -> Answer {
        Answer::Quoted(Box::new(Quoted {
            quote: quote.signed.attest.into(),
            signature: quote.signed.signature.into(),
            wrap_key: wrap.key,
            pcr_values,
            earlier_peer,
            firmware_log: self.firmware_log.clone().into(),
            layer_log: self.layers.bytes().into(),
            ima_log: ima.bytes.into(),
            ima_offset: ima.offset,
        }))
    }
}

fn check_pcrs(pcrs: &[u8]) -> Result<(), Refusal> {
    let rising = pcrs.is_sorted_by(|a, b| a < b);
    if pcrs.is_empty() || !rising || pcrs.iter().any(|p| *p >= PCR_COUNT) {
        return Err(Refusal::never("PCRs to quote are rising numbers from 0 to 23, at least one"));
    }
    Ok(())
}

/// What the PCRs should be: as the wrap key's policy has them, PCR 10 as IMA's log replays, others as the TPM says.
fn expected_values(
    tpm: &mut HostTpm,
    pcrs: &[u8],
    wrap: &Wrap,
    ima: &ImaPart,
) -> Result<BTreeMap<u8, Digest>, TpmError> {
    let mut values = wrap.pcrs.clone();
    if let Some(value) = ima.pcr {
        values.insert(IMA_PCR, value);
    }
    let others: Vec<u8> = pcrs.iter().copied().filter(|p| !values.contains_key(p)).collect();
    if !others.is_empty() {
        values.extend(tpm.tpm().pcr_read(&others)?);
    }
    Ok(values)
}

/// A quote over other values than expected: passes where only PCR 10 may have moved.
fn explain(tpm: &mut HostTpm, pcrs: &[u8], expected: &BTreeMap<u8, Digest>) -> Result<(), Refusal> {
    let now = tpm.tpm().pcr_read(pcrs)?;
    match now.iter().find(|(pcr, value)| **pcr != IMA_PCR && expected.get(pcr) != Some(value)) {
        Some((pcr, _)) if attest::tpm::WRAP_PCRS.contains(pcr) => {
            Err(Refusal::never(format!("PCR {pcr} was extended behind the TPM service's back: reboot the host")))
        }
        _ => Ok(()),
    }
}

/// How often a quote is taken again because IMA measured something in between.
const ATTEMPTS: u32 = 8;

/// Grows with each attempt.
const PAUSE: Duration = Duration::from_millis(2);
