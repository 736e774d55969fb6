//! TPMS_ATTEST (part 2, 10.12.12) and TPMT_SIGNATURE (part 2, 11.3.4).

use super::pcr::Selection;
use super::public::{Curve, HashAlg, Name, Public, PublicKey, padded};
use super::wire::{Reader, TpmError, Writer};
use aws_lc_rs::signature::{ECDSA_P256_SHA256_FIXED, UnparsedPublicKey};
use serde::{Deserialize, Serialize};

const GENERATED: u32 = 0xff54_4347;
const ATTEST_CERTIFY: u16 = 0x8017;
const ATTEST_QUOTE: u16 = 0x8018;
const ALG_ECDSA: u16 = 0x0018;

/// TPMS_CLOCK_INFO (part 2, 10.11.1).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct ClockInfo {
    /// Milliseconds while powered, non-volatile.
    pub clock: u64,
    /// TPM Resets since the owner cleared it.
    pub reset_count: u32,
    /// Restarts and resumes since the last reset.
    pub restart_count: u32,
    /// Whether `clock` has not been repeated.
    pub safe: bool,
}

/// What an attestation attests.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Attested {
    /// TPMS_QUOTE_INFO.
    Quote {
        /// The selected PCRs, bank by bank.
        selection: Vec<Selection>,
        /// Digest over their values.
        pcr_digest: Vec<u8>,
    },
    /// TPMS_CERTIFY_INFO.
    Certify {
        /// The key's name.
        name: Name,
        /// Its qualified name, which says its hierarchy.
        qualified_name: Name,
    },
}

/// A parsed TPMS_ATTEST: its magic was right. Not yet believed: see [`Signature::verify`].
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Attest {
    /// Qualified name of the signing key.
    pub qualified_signer: Name,
    /// Qualifying data.
    pub extra_data: Vec<u8>,
    /// Clock and counters.
    pub clock: ClockInfo,
    /// Vendor's firmware version.
    pub firmware_version: u64,
    /// The statement.
    pub attested: Attested,
}

impl Attest {
    /// Reads a TPMS_ATTEST that fills `bytes`.
    pub fn parse(bytes: &[u8]) -> Result<Self, TpmError> {
        let mut reader = Reader::new(bytes);
        if reader.u32("magic")? != GENERATED {
            return Err(TpmError::Magic);
        }
        let kind = reader.u16("attestation type")?;
        let qualified_signer = Name(reader.sized("qualified signer")?.to_vec());
        let extra_data = reader.sized("qualifying data")?.to_vec();
        let clock = ClockInfo {
            clock: reader.u64("clock")?,
            reset_count: reader.u32("reset count")?,
            restart_count: reader.u32("restart count")?,
            safe: match reader.u8("clock safety")? {
                0 => false,
                1 => true,
                other => return Err(TpmError::Unsupported("clock safety", other.into())),
            },
        };
        let firmware_version = reader.u64("firmware version")?;
        let attested = match kind {
            ATTEST_QUOTE => Attested::Quote {
                selection: Selection::read_list(&mut reader)?,
                pcr_digest: reader.sized("PCR digest")?.to_vec(),
            },
            ATTEST_CERTIFY => Attested::Certify {
                name: Name(reader.sized("name")?.to_vec()),
                qualified_name: Name(reader.sized("qualified name")?.to_vec()),
            },
            other => return Err(TpmError::Unsupported("attestation type", other.into())),
        };
        reader.end()?;
        Ok(Self { qualified_signer, extra_data, clock, firmware_version, attested })
    }

    /// The structure as a TPM writes it: for software TPM keys in tests.
    pub fn to_bytes(&self) -> Vec<u8> {
        let kind = match self.attested {
            Attested::Quote { .. } => ATTEST_QUOTE,
            Attested::Certify { .. } => ATTEST_CERTIFY,
        };
        let writer = Writer::new()
            .u32(GENERATED)
            .u16(kind)
            .sized(&self.qualified_signer.0)
            .sized(&self.extra_data)
            .u64(self.clock.clock)
            .u32(self.clock.reset_count)
            .u32(self.clock.restart_count)
            .u8(self.clock.safe.into())
            .u64(self.firmware_version);
        match &self.attested {
            Attested::Quote { selection, pcr_digest } => Selection::write_list(writer, selection).sized(pcr_digest),
            Attested::Certify { name, qualified_name } => writer.sized(&name.0).sized(&qualified_name.0),
        }
        .finish()
    }
}

/// A TPMT_SIGNATURE: ECDSA with SHA-256 on P-256, the only kind an AK of ours makes.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Signature {
    /// r and s, 32 bytes each.
    fixed: [u8; 64],
}

impl Signature {
    /// Reads a TPMT_SIGNATURE that fills `bytes`.
    pub fn parse(bytes: &[u8]) -> Result<Self, TpmError> {
        let mut reader = Reader::new(bytes);
        match reader.u16("signature algorithm")? {
            ALG_ECDSA => {}
            other => return Err(TpmError::Unsupported("signature algorithm", other.into())),
        }
        match HashAlg::from_id(reader.u16("signature hash")?)? {
            HashAlg::Sha256 => {}
            other => return Err(TpmError::Unsupported("signature hash", other.id().into())),
        }
        let mut fixed = [0; 64];
        for half in fixed.chunks_exact_mut(32) {
            let number = padded(reader.sized("signature value")?, 32).ok_or(TpmError::Length("signature value"))?;
            half.copy_from_slice(&number);
        }
        reader.end()?;
        Ok(Self { fixed })
    }

    /// A signature of r and s, 32 bytes each.
    pub fn from_fixed(fixed: [u8; 64]) -> Self {
        Self { fixed }
    }

    /// The structure as a TPM writes it.
    pub fn to_bytes(&self) -> Vec<u8> {
        let writer = Writer::new().u16(ALG_ECDSA).u16(HashAlg::Sha256.id());
        writer.sized(&self.fixed[..32]).sized(&self.fixed[32..]).finish()
    }

    /// Checks it over `message`, the bytes of the TPMS_ATTEST called `what` in the error, by the AK.
    pub fn verify(&self, ak: &Public, message: &[u8], what: &'static str) -> Result<(), TpmError> {
        let PublicKey::Ecc { curve: Curve::P256, .. } = ak.key else { return Err(TpmError::Signature(what)) };
        let point = ak.point().ok_or(TpmError::Signature(what))?;
        UnparsedPublicKey::new(&ECDSA_P256_SHA256_FIXED, &point)
            .verify(message, &self.fixed)
            .map_err(|_| TpmError::Signature(what))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn quote() -> Attest {
        Attest {
            qualified_signer: Name(vec![0, 11, 1, 2]),
            extra_data: vec![3; 32],
            clock: ClockInfo { clock: 1, reset_count: 2, restart_count: 3, safe: true },
            firmware_version: 4,
            attested: Attested::Quote { selection: vec![Selection::sha256(&[0, 14])], pcr_digest: vec![5; 32] },
        }
    }

    #[test]
    fn what_is_written_reads_back() {
        let certify = Attested::Certify { name: Name(vec![6; 34]), qualified_name: Name(vec![7; 34]) };
        for attest in [quote(), Attest { attested: certify, ..quote() }] {
            assert_eq!(Attest::parse(&attest.to_bytes()), Ok(attest));
        }
    }

    #[test]
    fn attack_06_what_no_tpm_generated_is_refused() {
        let mut bytes = quote().to_bytes();
        bytes[0] ^= 1;
        assert_eq!(Attest::parse(&bytes), Err(TpmError::Magic));
        let mut bytes = quote().to_bytes();
        bytes[5] = 0x14; // TPM_ST_ATTEST_COMMAND_AUDIT
        assert!(matches!(Attest::parse(&bytes), Err(TpmError::Unsupported("attestation type", _))));
    }

    #[test]
    fn attack_15_signatures_of_other_kinds_are_not_read() {
        let good = Signature::from_fixed([1; 64]).to_bytes();
        assert!(Signature::parse(&good).is_ok());
        for (at, value) in [(1, 0x14), (3, 0x04), (3, 0x0c)] {
            let mut bad = good.clone();
            bad[at] = value;
            assert!(Signature::parse(&bad).is_err(), "{at} {value}");
        }
    }

    proptest! {
        #[test]
        fn no_bytes_make_the_parsers_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = Attest::parse(&bytes);
            let _ = Signature::parse(&bytes);
            let _ = Public::parse(&bytes);
        }

        #[test]
        fn a_cut_quote_is_no_quote(keep in 0..130_usize) {
            let bytes = quote().to_bytes();
            prop_assume!(keep < bytes.len());
            prop_assert!(Attest::parse(&bytes[..keep]).is_err());
        }
    }
}
