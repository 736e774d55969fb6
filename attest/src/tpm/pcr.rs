//! PCR selections (part 2, 10.6 and 10.9.7), composites, and the policy of the wrap key.

use super::public::HashAlg;
use super::wire::{Reader, TpmError, Writer};
use policy::Digest;
use sha2::{Digest as _, Sha256};
use std::collections::BTreeMap;

/// The PCRs under which a host's wrap key lives: the boot PCRs and that of the layers. Never PCR 10, which moves while
/// the host runs.
pub const WRAP_PCRS: [u8; 9] = [0, 1, 2, 3, 4, 5, 6, 7, 14];

/// The number of PCRs of a PC Client TPM.
pub const PCR_COUNT: u8 = 24;

const CC_POLICY_PCR: u32 = 0x0000_017f;

/// TPMS_PCR_SELECTION: PCRs of one bank.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Selection {
    /// TPM_ALG_ID of the bank.
    pub bank: u16,
    /// The bit map as sent, PCR 0 in bit 0 of the first byte.
    pub map: Vec<u8>,
}

impl Selection {
    /// PCRs of the SHA-256 bank, as everyone writes it: three bytes.
    pub fn sha256(pcrs: &[u8]) -> Self {
        let mut map = vec![0; 3];
        for pcr in pcrs.iter().filter(|p| **p < PCR_COUNT) {
            map[usize::from(pcr / 8)] |= 1 << (pcr % 8);
        }
        Self { bank: HashAlg::Sha256.id(), map }
    }

    /// Whether it is the SHA-256 bank with exactly these PCRs.
    pub fn is_sha256_of(&self, pcrs: &[u8]) -> bool {
        *self == Self::sha256(pcrs)
    }

    pub(super) fn read_list(reader: &mut Reader<'_>) -> Result<Vec<Self>, TpmError> {
        let count = reader.u32("PCR selection count")?;
        if count > 16 {
            return Err(TpmError::Unsupported("PCR selection count", count));
        }
        (0..count).map(|_| Self::read(reader)).collect()
    }

    fn read(reader: &mut Reader<'_>) -> Result<Self, TpmError> {
        let bank = reader.u16("PCR bank")?;
        let length = reader.u8("PCR selection length")?;
        Ok(Self { bank, map: reader.take(length.into(), "PCR selection")?.to_vec() })
    }

    pub(super) fn write_list(writer: Writer, list: &[Self]) -> Writer {
        let count = u32::try_from(list.len()).unwrap_or(u32::MAX);
        list.iter().fold(writer.u32(count), |w, s| {
            w.u16(s.bank).u8(u8::try_from(s.map.len()).unwrap_or(u8::MAX)).bytes(&s.map)
        })
    }
}

/// The digest that TPM2_Quote and TPM2_PolicyPCR compute over `pcrs` (rising): SHA-256 of their values, one after the
/// other. A PCR that `values` lacks counts as zero.
pub fn composite(pcrs: &[u8], values: &BTreeMap<u8, Digest>) -> Digest {
    let mut hash = Sha256::new();
    for pcr in pcrs {
        hash.update(values.get(pcr).unwrap_or(&Digest([0; 32])).as_bytes());
    }
    Digest(hash.finalize().into())
}

/// The authPolicy of a key whose only policy is TPM2_PolicyPCR over `pcrs` (rising) of the SHA-256 bank (part 3, 23.7).
pub fn policy_pcr_digest(pcrs: &[u8], values: &BTreeMap<u8, Digest>) -> Digest {
    let command = Writer::new().bytes(&[0; 32]).u32(CC_POLICY_PCR);
    let selected = Selection::write_list(command, &[Selection::sha256(pcrs)]);
    Digest::of(&selected.bytes(composite(pcrs, values).as_bytes()).finish())
}

/// `value` extended with `digest` (part 1, 11.4.8).
pub fn extend(value: &Digest, digest: &Digest) -> Digest {
    let mut hash = Sha256::new();
    hash.update(value.as_bytes());
    hash.update(digest.as_bytes());
    Digest(hash.finalize().into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_selection_is_a_bit_map() {
        assert_eq!(Selection::sha256(&[0, 7, 14, 23]).map, [0x81, 0x40, 0x80]);
        assert!(Selection::sha256(&[0, 14]).is_sha256_of(&[0, 14]));
        assert!(!Selection::sha256(&[0, 14]).is_sha256_of(&[0]));
    }
}
