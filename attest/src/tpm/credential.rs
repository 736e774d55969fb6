//! TPM2_MakeCredential in software (part 1, section 24; part 1, annexes B.10.3 and C.6.1): a secret that only the TPM
//! with this endorsement key opens, and only for the attestation key of this name.

use super::public::{Curve, HashAlg, Name, Public, PublicKey, Symmetric, padded};
use super::wire::{TpmError, Writer};
use crate::protocol::Credential;
use aws_lc_rs::agreement::{PrivateKey, UnparsedPublicKey, agree};
use aws_lc_rs::cipher::{AES_128, AES_256, EncryptingKey, EncryptionContext, UnboundCipherKey};
use aws_lc_rs::iv::FixedLength;
use aws_lc_rs::rsa::{OAEP_SHA256_MGF1SHA256, OAEP_SHA384_MGF1SHA384, OaepPublicEncryptingKey, PublicEncryptingKey};
use aws_lc_rs::{digest, hmac};
use zeroize::Zeroizing;

const LABEL: &[u8] = b"IDENTITY\0";

/// A credential for the attestation key named `ak_name`, holding `secret` (1 to 32 bytes), to be opened by the TPM whose
/// endorsement key is `ek` (RSA, P-256 or P-384; see [`super::check_ek`]).
pub fn make_credential(ek: &Public, ak_name: &Name, secret: &[u8]) -> Result<Credential, TpmError> {
    if secret.is_empty() || secret.len() > 32 {
        return Err(TpmError::Length("credential secret"));
    }
    let Symmetric::AesCfb(bits) = ek.symmetric else { return Err(TpmError::Key("storage")) };
    let (seed, encrypted_seed) = share_seed(ek)?;
    let storage = kdfa(ek.name_alg, &seed, b"STORAGE", &ak_name.0, &[], bits);
    let mut identity = Writer::new().sized(secret).finish();
    encrypt_cfb(&storage, &mut identity)?;
    let integrity_key = kdfa(ek.name_alg, &seed, b"INTEGRITY", &[], &[], ek.name_alg.length() as u16 * 8);
    let integrity = hmac_of(ek.name_alg, &integrity_key, &[&identity, &ak_name.0]);
    let object = Writer::new().sized(integrity.as_ref()).bytes(&identity).finish();
    Ok(Credential {
        blob: Writer::new().sized(&object).finish().into(),
        secret: Writer::new().sized(&encrypted_seed).finish().into(),
    })
}

/// KDFa (part 1, 11.4.10.2): `bits` of key from `key`. `label` without its terminating zero.
pub fn kdfa(hash: HashAlg, key: &[u8], label: &[u8], u: &[u8], v: &[u8], bits: u16) -> Zeroizing<Vec<u8>> {
    expand(usize::from(bits) / 8, |counter| {
        let parts: [&[u8]; 6] = [&counter.to_be_bytes(), label, &[0], u, v, &u32::from(bits).to_be_bytes()];
        Zeroizing::new(hmac_of(hash, key, &parts).as_ref().to_vec())
    })
}

/// KDFe (part 1, 11.4.10.3): `bits` of key from an ECDH x coordinate. `label` without its terminating zero.
pub fn kdfe(hash: HashAlg, z: &[u8], label: &[u8], u: &[u8], v: &[u8], bits: u16) -> Zeroizing<Vec<u8>> {
    expand(usize::from(bits) / 8, |counter| {
        let mut context = digest::Context::new(hash.algorithm());
        let parts: [&[u8]; 6] = [&counter.to_be_bytes(), z, label, &[0], u, v];
        parts.iter().for_each(|part| context.update(part));
        Zeroizing::new(context.finish().as_ref().to_vec())
    })
}

fn expand(length: usize, block: impl Fn(u32) -> Zeroizing<Vec<u8>>) -> Zeroizing<Vec<u8>> {
    let mut out = Zeroizing::new(Vec::with_capacity(length + 64));
    for counter in 1.. {
        if out.len() >= length {
            break;
        }
        out.extend_from_slice(&block(counter));
    }
    out.truncate(length);
    out
}

fn hmac_of(hash: HashAlg, key: &[u8], parts: &[&[u8]]) -> hmac::Tag {
    let algorithm = match hash {
        HashAlg::Sha256 => hmac::HMAC_SHA256,
        HashAlg::Sha384 => hmac::HMAC_SHA384,
    };
    let mut context = hmac::Context::with_key(&hmac::Key::new(algorithm, key));
    parts.iter().for_each(|part| context.update(part));
    context.sign()
}

/// A fresh seed, and that seed encrypted to the endorsement key.
fn share_seed(ek: &Public) -> Result<(Zeroizing<Vec<u8>>, Vec<u8>), TpmError> {
    match &ek.key {
        PublicKey::Rsa { .. } => share_seed_rsa(ek),
        PublicKey::Ecc { curve, x, .. } => share_seed_ecc(ek, *curve, x),
    }
}

fn share_seed_rsa(ek: &Public) -> Result<(Zeroizing<Vec<u8>>, Vec<u8>), TpmError> {
    let mut seed = Zeroizing::new(vec![0; ek.name_alg.length()]);
    getrandom::fill(&mut seed).map_err(|_| TpmError::Crypto("the random generator"))?;
    let oaep = match ek.name_alg {
        HashAlg::Sha256 => &OAEP_SHA256_MGF1SHA256,
        HashAlg::Sha384 => &OAEP_SHA384_MGF1SHA384,
    };
    let key = PublicEncryptingKey::from_der(&ek.spki()).map_err(|_| TpmError::Key("RSA"))?;
    let key = OaepPublicEncryptingKey::new(key).map_err(|_| TpmError::Key("RSA"))?;
    let mut sealed = vec![0; key.ciphertext_size()];
    let length =
        key.encrypt(oaep, &seed, &mut sealed, Some(LABEL)).map_err(|_| TpmError::Crypto("RSA encryption"))?.len();
    sealed.truncate(length);
    Ok((seed, sealed))
}

fn share_seed_ecc(ek: &Public, curve: Curve, ek_x: &[u8]) -> Result<(Zeroizing<Vec<u8>>, Vec<u8>), TpmError> {
    let algorithm = match curve {
        Curve::P256 => &aws_lc_rs::agreement::ECDH_P256,
        Curve::P384 => &aws_lc_rs::agreement::ECDH_P384,
    };
    let failed = TpmError::Crypto("key agreement");
    let ephemeral = PrivateKey::generate(algorithm).map_err(|_| TpmError::Crypto("key agreement"))?;
    let own = ephemeral.compute_public_key().map_err(|_| TpmError::Crypto("key agreement"))?;
    let (x, y) = own.as_ref()[1..].split_at(curve.length());
    let peer = ek.point().ok_or(TpmError::Key("elliptic curve"))?;
    let bits = ek.name_alg.length() as u16 * 8;
    let seed = agree(&ephemeral, UnparsedPublicKey::new(algorithm, &peer), failed, |z| {
        let z = Zeroizing::new(padded(z, curve.length()).ok_or(TpmError::Crypto("key agreement"))?);
        Ok(kdfe(ek.name_alg, &z, b"IDENTITY", x, ek_x, bits))
    })?;
    Ok((seed, Writer::new().sized(x).sized(y).finish()))
}

fn encrypt_cfb(key: &[u8], bytes: &mut [u8]) -> Result<(), TpmError> {
    let failed = |_| TpmError::Crypto("AES");
    let algorithm = if key.len() == 16 { &AES_128 } else { &AES_256 };
    let key = EncryptingKey::cfb128(UnboundCipherKey::new(algorithm, key).map_err(failed)?).map_err(failed)?;
    // The IV is zero by the specification: each key is used once.
    let iv = EncryptionContext::Iv128(FixedLength::from([0; 16]));
    key.less_safe_encrypt(bytes, iv).map(drop).map_err(failed)
}

#[cfg(test)]
mod tests {
    use super::super::public::Scheme;
    use super::super::public::attribute as a;
    use super::*;

    /// A software endorsement key: opens what [`make_credential`] made, by the specification's recipe read backward.
    fn open(ek: &PrivateKey, ek_x: &[u8], ak_name: &Name, credential: &Credential) -> Option<Vec<u8>> {
        let secret = &credential.secret[2..];
        let (x, y) = (&secret[2..34], &secret[36..68]);
        let peer = [&[4], x, y].concat();
        let seed = agree(ek, UnparsedPublicKey::new(&aws_lc_rs::agreement::ECDH_P256, &peer), (), |z| {
            Ok(kdfe(HashAlg::Sha256, z, b"IDENTITY", x, ek_x, 256))
        })
        .ok()?;
        let (integrity, identity) = (&credential.blob[4..36], &credential.blob[36..]);
        let key = kdfa(HashAlg::Sha256, &seed, b"INTEGRITY", &[], &[], 256);
        let expected = hmac_of(HashAlg::Sha256, &key, &[identity, &ak_name.0]);
        if expected.as_ref() != integrity {
            return None;
        }
        let storage = kdfa(HashAlg::Sha256, &seed, b"STORAGE", &ak_name.0, &[], 128);
        let key = aws_lc_rs::cipher::DecryptingKey::cfb128(UnboundCipherKey::new(&AES_128, &storage).ok()?).ok()?;
        let mut out = identity.to_vec();
        let iv = aws_lc_rs::cipher::DecryptionContext::Iv128(FixedLength::from([0; 16]));
        let plain = key.decrypt(&mut out, iv).ok()?;
        Some(plain[2..].to_vec())
    }

    #[test]
    fn attack_05_a_credential_opens_for_one_ak_name_only() {
        let ek = PrivateKey::generate(&aws_lc_rs::agreement::ECDH_P256).expect("random");
        let point: [u8; 65] = ek.compute_public_key().expect("public").as_ref().try_into().expect("65 bytes");
        let public = Public::ecc(a::DECRYPT, &[], Symmetric::AesCfb(128), Scheme::None, &point).expect("good");
        let name = Name(vec![1; 34]);
        let credential = make_credential(&public, &name, b"secret").expect("made");
        assert_eq!(open(&ek, &point[1..33], &name, &credential), Some(b"secret".to_vec()));
        assert_eq!(open(&ek, &point[1..33], &Name(vec![2; 34]), &credential), None);
        let other = PrivateKey::generate(&aws_lc_rs::agreement::ECDH_P256).expect("random");
        assert_eq!(open(&other, &point[1..33], &name, &credential), None);
    }

    #[test]
    fn kdfs_make_as_many_bits_as_asked() {
        for bits in [128, 256, 384, 520] {
            let a = kdfa(HashAlg::Sha256, b"k", b"L", b"u", b"v", bits);
            assert_eq!(a.len(), usize::from(bits) / 8);
            assert_ne!(a[..16], kdfe(HashAlg::Sha256, b"k", b"L", b"u", b"v", bits)[..16]);
        }
    }

    #[test]
    fn secrets_have_a_length() {
        let ek = PrivateKey::generate(&aws_lc_rs::agreement::ECDH_P256).expect("random");
        let point: [u8; 65] = ek.compute_public_key().expect("public").as_ref().try_into().expect("65 bytes");
        let public = Public::ecc(a::DECRYPT, &[], Symmetric::AesCfb(128), Scheme::None, &point).expect("good");
        for length in [0, 33] {
            assert!(make_credential(&public, &Name(vec![1; 34]), &vec![0; length]).is_err());
        }
    }
}
