//! What the keys of a host must be. Each rule closes a way to forge evidence; ATTACKS names are in the tests.

use super::public::{Curve, HashAlg, Public, PublicKey, Scheme, Symmetric, attribute as a};
use policy::Digest;
use subtle::ConstantTimeEq;

/// A key that can't play its part.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum KeyError {
    /// Wrong algorithm, curve, hash or scheme.
    #[error("the {0} is not {1}")]
    Kind(&'static str, &'static str),
    /// Attribute bits that must be set.
    #[error("the {0} lacks the attribute {1}")]
    Lacks(&'static str, &'static str),
    /// Attribute bits that must be clear.
    #[error("the {0} has the attribute {1}, which it must not have")]
    Has(&'static str, &'static str),
    /// The wrong policy.
    #[error("the {0}'s policy is not PolicyPCR over the boot PCRs and PCR 14 as the logs replay them")]
    Policy(&'static str),
}

const NAMES: [(u32, &str); 10] = [
    (a::FIXED_TPM, "fixedTPM"),
    (a::ST_CLEAR, "stClear"),
    (a::FIXED_PARENT, "fixedParent"),
    (a::SENSITIVE_DATA_ORIGIN, "sensitiveDataOrigin"),
    (a::USER_WITH_AUTH, "userWithAuth"),
    (a::ADMIN_WITH_POLICY, "adminWithPolicy"),
    (a::ENCRYPTED_DUPLICATION, "encryptedDuplication"),
    (a::RESTRICTED, "restricted"),
    (a::DECRYPT, "decrypt"),
    (a::SIGN, "sign"),
];

const MADE_AND_KEPT_INSIDE: u32 = a::FIXED_TPM | a::FIXED_PARENT | a::SENSITIVE_DATA_ORIGIN;

/// An attestation key: signs only what its TPM made (restricted), ECDSA on P-256 with SHA-256, born and kept there.
pub fn check_ak(public: &Public) -> Result<(), KeyError> {
    const WHAT: &str = "attestation key";
    let p256 = matches!(public.key, PublicKey::Ecc { curve: Curve::P256, .. });
    let kind = p256
        && public.name_alg == HashAlg::Sha256
        && public.scheme == Scheme::Ecdsa(HashAlg::Sha256)
        && public.symmetric == Symmetric::None;
    if !kind {
        return Err(KeyError::Kind(WHAT, "an ECDSA key on P-256 with SHA-256"));
    }
    demand(WHAT, public, MADE_AND_KEPT_INSIDE | a::RESTRICTED | a::SIGN, a::DECRYPT)
}

/// An endorsement key: a restricted decryption key, RSA from 2048 bits, P-256 or P-384, born and kept in its TPM.
pub fn check_ek(public: &Public) -> Result<(), KeyError> {
    const WHAT: &str = "endorsement key";
    if public.symmetric == Symmetric::None || public.scheme != Scheme::None {
        return Err(KeyError::Kind(WHAT, "a storage key with AES"));
    }
    demand(WHAT, public, MADE_AND_KEPT_INSIDE | a::RESTRICTED | a::DECRYPT, a::SIGN)
}

/// A host's wrap key: P-256, decrypts only, and only by a policy, which is PolicyPCR with the digest `policy`.
pub fn check_wrap_key(public: &Public, policy: &Digest) -> Result<(), KeyError> {
    const WHAT: &str = "wrap key";
    let p256 = matches!(public.key, PublicKey::Ecc { curve: Curve::P256, .. });
    let kind = p256
        && public.name_alg == HashAlg::Sha256
        && matches!(public.scheme, Scheme::None | Scheme::Ecdh(HashAlg::Sha256))
        && public.symmetric == Symmetric::None;
    if !kind {
        return Err(KeyError::Kind(WHAT, "an ECDH key on P-256 with SHA-256"));
    }
    let never = a::SIGN | a::RESTRICTED | a::USER_WITH_AUTH | a::ADMIN_WITH_POLICY;
    demand(WHAT, public, MADE_AND_KEPT_INSIDE | a::DECRYPT, never)?;
    if bool::from(public.auth_policy.ct_eq(policy.as_bytes())) { Ok(()) } else { Err(KeyError::Policy(WHAT)) }
}

fn demand(what: &'static str, public: &Public, set: u32, clear: u32) -> Result<(), KeyError> {
    for (bit, name) in NAMES {
        if set & bit != 0 && !public.has(bit) {
            return Err(KeyError::Lacks(what, name));
        }
        if clear & bit != 0 && public.has(bit) {
            return Err(KeyError::Has(what, name));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use aws_lc_rs::signature::{ECDSA_P256_SHA256_ASN1_SIGNING, EcdsaKeyPair, KeyPair};

    fn point() -> [u8; 65] {
        let pair = EcdsaKeyPair::generate(&ECDSA_P256_SHA256_ASN1_SIGNING).expect("random");
        pair.public_key().as_ref().try_into().expect("65 bytes")
    }

    fn key(attributes: u32, policy: &[u8], symmetric: Symmetric, scheme: Scheme) -> Public {
        Public::ecc(attributes, policy, symmetric, scheme, &point()).expect("good")
    }

    const AK: u32 = MADE_AND_KEPT_INSIDE | a::RESTRICTED | a::SIGN | a::USER_WITH_AUTH | a::NO_DA;
    const ECDSA: Scheme = Scheme::Ecdsa(HashAlg::Sha256);

    #[test]
    fn attack_05_06_an_ak_lacking_any_attribute_is_refused() {
        assert_eq!(check_ak(&key(AK, &[], Symmetric::None, ECDSA)), Ok(()));
        for bit in [a::FIXED_TPM, a::FIXED_PARENT, a::SENSITIVE_DATA_ORIGIN, a::RESTRICTED, a::SIGN] {
            assert!(matches!(check_ak(&key(AK & !bit, &[], Symmetric::None, ECDSA)), Err(KeyError::Lacks(..))));
        }
        let both = key(AK | a::DECRYPT, &[], Symmetric::None, ECDSA);
        assert_eq!(check_ak(&both), Err(KeyError::Has("attestation key", "decrypt")));
    }

    #[test]
    fn attack_15_an_ak_of_another_kind_is_refused() {
        for (symmetric, scheme) in [
            (Symmetric::None, Scheme::None),
            (Symmetric::None, Scheme::Ecdh(HashAlg::Sha256)),
            (Symmetric::None, Scheme::Ecdsa(HashAlg::Sha384)),
            (Symmetric::AesCfb(128), ECDSA),
        ] {
            assert!(matches!(check_ak(&key(AK, &[], symmetric, scheme)), Err(KeyError::Kind(..))));
        }
    }

    #[test]
    fn an_ek_is_a_storage_key() {
        let ek = MADE_AND_KEPT_INSIDE | a::RESTRICTED | a::DECRYPT | a::ADMIN_WITH_POLICY;
        assert_eq!(check_ek(&key(ek, &[1; 32], Symmetric::AesCfb(128), Scheme::None)), Ok(()));
        assert!(check_ek(&key(ek, &[1; 32], Symmetric::None, Scheme::None)).is_err());
        for bit in [a::FIXED_TPM, a::FIXED_PARENT, a::SENSITIVE_DATA_ORIGIN, a::RESTRICTED, a::DECRYPT] {
            assert!(check_ek(&key(ek & !bit, &[1; 32], Symmetric::AesCfb(128), Scheme::None)).is_err());
        }
    }

    #[test]
    fn attack_25_51_a_wrap_key_only_decrypts_and_only_by_its_policy() {
        let policy = Digest([9; 32]);
        let wrap = MADE_AND_KEPT_INSIDE | a::DECRYPT | a::NO_DA;
        let judge =
            |attributes, auth: &[u8]| check_wrap_key(&key(attributes, auth, Symmetric::None, Scheme::None), &policy);
        assert_eq!(judge(wrap, &[9; 32]), Ok(()));
        assert_eq!(judge(wrap, &[8; 32]), Err(KeyError::Policy("wrap key")));
        assert_eq!(judge(wrap, &[]), Err(KeyError::Policy("wrap key")));
        for bit in [a::USER_WITH_AUTH, a::ADMIN_WITH_POLICY, a::SIGN, a::RESTRICTED] {
            assert!(matches!(judge(wrap | bit, &[9; 32]), Err(KeyError::Has(..))), "{bit:x}");
        }
        for bit in [a::FIXED_TPM, a::FIXED_PARENT, a::SENSITIVE_DATA_ORIGIN, a::DECRYPT] {
            assert!(matches!(judge(wrap & !bit, &[9; 32]), Err(KeyError::Lacks(..))), "{bit:x}");
        }
    }
}
