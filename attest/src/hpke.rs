//! HPKE, base mode, single shot (RFC 9180, section 6.1): DHKEM(X25519, HKDF-SHA256) and DHKEM(P-256, HKDF-SHA256), both
//! with HKDF-SHA256 and AES-256-GCM. Written here because the P-256 secret is a TPM's: what the TPM returns is the
//! Diffie-Hellman result, and the rest of the decapsulation follows from it. A sealed message is
//! `enc || ciphertext || tag`.

use crate::aead::{self, Cipher, TAG};
use aws_lc_rs::agreement::{ECDH_P256, PrivateKey, UnparsedPublicKey, agree};
use secretmem::{Secret, SecretBuf, SecretError, wiping_stack};
use x25519_dalek::{PublicKey, StaticSecret};

/// Length of an X25519 encapsulation in bytes.
pub const X25519_ENC: usize = 32;

/// Length of a P-256 encapsulation in bytes: an uncompressed point.
pub const P256_ENC: usize = 65;

const AEAD_AES_256_GCM: u16 = 2;
const KDF_HKDF_SHA256: u16 = 1;

/// A message that can't be sealed or opened.
#[derive(Debug, thiserror::Error)]
pub enum HpkeError {
    /// Shorter than its encapsulation and tag.
    #[error("a sealed message is too short")]
    Length,
    /// A public key that is none, or one whose shared secret is the same for everyone.
    #[error("a public key is not valid")]
    PublicKey,
    /// Made for another key or another purpose, or changed.
    #[error("a sealed message was changed, or is for another key or purpose")]
    Tampered,
    /// No locked memory.
    #[error(transparent)]
    Memory(#[from] SecretError),
}

/// An X25519 key pair whose secret half stays in locked memory.
pub struct X25519Key {
    secret: Secret<32>,
    public: [u8; 32],
}

impl X25519Key {
    /// A fresh one.
    pub fn generate() -> Result<Self, SecretError> {
        Secret::random().map(Self::of)
    }

    fn of(secret: Secret<32>) -> Self {
        let public = wiping_stack(|| PublicKey::from(&StaticSecret::from(*secret.expose())).to_bytes());
        Self { secret, public }
    }

    /// The public half.
    pub fn public(&self) -> &[u8; 32] {
        &self.public
    }

    /// The shared secret with `peer`; `None` for a peer of small order, with whom it is zero.
    fn agree(&self, peer: &[u8; 32]) -> Result<Option<Secret<32>>, SecretError> {
        let mut out = Secret::zeroed()?;
        let good = wiping_stack(|| {
            let shared = StaticSecret::from(*self.secret.expose()).diffie_hellman(&PublicKey::from(*peer));
            out.expose_mut().copy_from_slice(shared.as_bytes());
            shared.was_contributory()
        });
        Ok(good.then_some(out))
    }
}

/// One side of a message under way: a secret shared with the recipient's public key, which depends on nothing that is sealed and so
/// may be made ahead. It seals once.
pub struct Sender {
    kem: Kem,
    shared: Secret<32>,
    enc: Vec<u8>,
}

impl Sender {
    /// To an X25519 public key.
    ///
    /// # Errors
    /// `PublicKey`, `Memory`.
    pub fn x25519(peer: &[u8; X25519_ENC]) -> Result<Self, HpkeError> {
        let ephemeral = X25519Key::generate()?;
        let dh = ephemeral.agree(peer)?.ok_or(HpkeError::PublicKey)?;
        let shared = Kem::X25519.shared_secret(&dh, ephemeral.public(), peer)?;
        Ok(Self { kem: Kem::X25519, shared, enc: ephemeral.public().to_vec() })
    }

    /// To a P-256 public key, an uncompressed point.
    ///
    /// # Errors
    /// `PublicKey`, `Memory`.
    pub fn p256(peer: &[u8; P256_ENC]) -> Result<Self, HpkeError> {
        let failed = |_| HpkeError::PublicKey;
        let ephemeral = PrivateKey::generate(&ECDH_P256).map_err(failed)?;
        let public = ephemeral.compute_public_key().map_err(failed)?;
        let dh = agree(&ephemeral, UnparsedPublicKey::new(&ECDH_P256, peer), HpkeError::PublicKey, |x| {
            let x: &[u8; 32] = x.try_into().map_err(|_| HpkeError::PublicKey)?;
            Ok(Secret::copy_of(x)?)
        })?;
        let shared = Kem::P256.shared_secret(&dh, public.as_ref(), peer)?;
        Ok(Self { kem: Kem::P256, shared, enc: public.as_ref().to_vec() })
    }

    /// Seals `plaintext` (1 byte to 1 MiB).
    ///
    /// # Errors
    /// `Memory`.
    pub fn seal(self, info: &[u8], aad: &[u8], plaintext: &[u8]) -> Result<Vec<u8>, HpkeError> {
        let (key, nonce) = key_schedule(self.kem, AEAD_AES_256_GCM, 32, &self.shared, info)?;
        let mut text = SecretBuf::copy_of(plaintext)?;
        let tag = Cipher::new(key.expose())?.seal(&nonce, aad, text.expose_mut()).map_err(|_| HpkeError::Tampered)?;
        Ok([&self.enc, text.expose(), &tag].concat())
    }
}

/// Seals `plaintext` (1 byte to 1 MiB) to an X25519 public key.
pub fn seal_x25519(peer: &[u8; X25519_ENC], info: &[u8], aad: &[u8], plaintext: &[u8]) -> Result<Vec<u8>, HpkeError> {
    Sender::x25519(peer)?.seal(info, aad, plaintext)
}

/// Opens what [`seal_x25519`] sealed.
pub fn open_x25519(key: &X25519Key, info: &[u8], aad: &[u8], sealed: &[u8]) -> Result<SecretBuf, HpkeError> {
    let (enc, text) = sealed.split_first_chunk::<X25519_ENC>().ok_or(HpkeError::Length)?;
    let dh = key.agree(enc)?.ok_or(HpkeError::PublicKey)?;
    let shared = Kem::X25519.shared_secret(&dh, enc, key.public())?;
    open(Kem::X25519, &shared, info, aad, text)
}

/// Seals `plaintext` (1 byte to 1 MiB) to a P-256 public key, an uncompressed point.
pub fn seal_p256(peer: &[u8; P256_ENC], info: &[u8], aad: &[u8], plaintext: &[u8]) -> Result<Vec<u8>, HpkeError> {
    Sender::p256(peer)?.seal(info, aad, plaintext)
}

/// The encapsulation at the head of what [`seal_p256`] sealed: an uncompressed point on the curve, checked, so that it may
/// be handed to a TPM.
pub fn p256_encapsulation(sealed: &[u8]) -> Result<&[u8; P256_ENC], HpkeError> {
    let (enc, _) = sealed.split_first_chunk::<P256_ENC>().ok_or(HpkeError::Length)?;
    if crate::tpm::public::is_p256_point(enc) { Ok(enc) } else { Err(HpkeError::PublicKey) }
}

/// Opens what [`seal_p256`] sealed to `public`, with the Diffie-Hellman result that the key's owner computed from the
/// encapsulation: the x coordinate of the shared point (RFC 9180, 4.1: SerializePublicKey is not applied to it).
pub fn open_p256(
    shared_x: &Secret<32>,
    public: &[u8; P256_ENC],
    info: &[u8],
    aad: &[u8],
    sealed: &[u8],
) -> Result<SecretBuf, HpkeError> {
    let (enc, text) = sealed.split_first_chunk::<P256_ENC>().ok_or(HpkeError::Length)?;
    let shared = Kem::P256.shared_secret(shared_x, enc, public)?;
    open(Kem::P256, &shared, info, aad, text)
}

#[derive(Clone, Copy)]
enum Kem {
    P256,
    X25519,
}

impl Kem {
    fn id(self) -> u16 {
        match self {
            Self::P256 => 0x0010,
            Self::X25519 => 0x0020,
        }
    }

    /// ExtractAndExpand (RFC 9180, 4.1).
    fn shared_secret(self, dh: &Secret<32>, enc: &[u8], recipient: &[u8]) -> Result<Secret<32>, SecretError> {
        let suite = [b"KEM", &self.id().to_be_bytes()[..]].concat();
        let prk = labeled_extract(&suite, &[], b"eae_prk", dh.expose())?;
        labeled_expand(&suite, &prk, b"shared_secret", &[enc, recipient].concat(), 32)
    }
}

/// KeySchedule (RFC 9180, 5.1), base mode: key and base nonce, which is the first message's nonce. `key_length` is 32 but in
/// the RFC's vectors.
fn key_schedule(
    kem: Kem,
    aead: u16,
    key_length: u16,
    shared: &Secret<32>,
    info: &[u8],
) -> Result<(Secret<32>, [u8; 12]), SecretError> {
    let suite = [b"HPKE", &kem.id().to_be_bytes()[..], &KDF_HKDF_SHA256.to_be_bytes(), &aead.to_be_bytes()].concat();
    let psk_id_hash = labeled_extract(&suite, &[], b"psk_id_hash", &[])?;
    let info_hash = labeled_extract(&suite, &[], b"info_hash", info)?;
    let context = [&[0], &psk_id_hash.expose()[..], info_hash.expose()].concat();
    let secret = labeled_extract(&suite, shared.expose(), b"secret", &[])?;
    let key = labeled_expand(&suite, &secret, b"key", &context, key_length)?;
    let nonce = labeled_expand(&suite, &secret, b"base_nonce", &context, 12)?;
    let mut base = [0; 12];
    base.copy_from_slice(&nonce.expose()[..12]);
    Ok((key, base))
}

fn labeled_extract(suite: &[u8], salt: &[u8], label: &[u8], material: &[u8]) -> Result<Secret<32>, SecretError> {
    aead::extract(salt, &[b"HPKE-v1", suite, label, material])
}

/// LabeledExpand of `length` bytes, at most 32: the first ones of the result.
fn labeled_expand(
    suite: &[u8],
    key: &Secret<32>,
    label: &[u8],
    info: &[u8],
    length: u16,
) -> Result<Secret<32>, SecretError> {
    aead::expand(key, &[&length.to_be_bytes(), b"HPKE-v1", suite, label, info])
}

fn open(kem: Kem, shared: &Secret<32>, info: &[u8], aad: &[u8], sealed: &[u8]) -> Result<SecretBuf, HpkeError> {
    let (text, tag) = sealed.split_last_chunk::<TAG>().ok_or(HpkeError::Length)?;
    if text.is_empty() || text.len() > SecretBuf::MAX {
        return Err(HpkeError::Length);
    }
    let (key, nonce) = key_schedule(kem, AEAD_AES_256_GCM, 32, shared, info)?;
    let mut text = SecretBuf::copy_of(text)?;
    let opened = Cipher::new(key.expose())?.open(&nonce, aad, text.expose_mut(), tag);
    opened.map(|()| text).map_err(|_| HpkeError::Tampered)
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustls::crypto::aws_lc_rs::hpke::{DH_KEM_P256_HKDF_SHA256_AES_256, DH_KEM_X25519_HKDF_SHA256_AES_256};
    use rustls::crypto::hpke::{EncapsulatedSecret, Hpke, HpkePublicKey};

    fn hex<const N: usize>(text: &str) -> [u8; N] {
        hex::decode(text).expect("hex").try_into().expect("length")
    }

    fn secret(text: &str) -> Secret<32> {
        Secret::copy_of(&hex(text)).expect("memory")
    }

    const INFO: &str = "4f6465206f6e2061204772656369616e2055726e";

    #[test]
    fn rfc_9180_a_1_1_x25519() {
        let recipient = X25519Key::of(secret("4612c550263fc8ad58375df3f557aac531d26850903e55a9f23f21d8534e8ac8"));
        assert_eq!(recipient.public, hex("3948cfe0ad1ddb695d780e59077195da6c56506b027329794ab02bca80815c4d"));
        let enc = hex::<32>("37fda3567bdbd628e88668c3c8d7e97d1d1253b6d4ea6d44c150f741f1bf4431");
        let dh = recipient.agree(&enc).expect("memory").expect("contributory");
        let shared = Kem::X25519.shared_secret(&dh, &enc, &recipient.public).expect("memory");
        let expected = "fe0e18c9f024ce43799ae393c7e8fe8fce9d218875e8227b0187c04e7d2ea1fc";
        assert_eq!(shared.expose(), &hex(expected));
        let info = hex::decode(INFO).expect("hex");
        let (key, nonce) = key_schedule(Kem::X25519, 1, 16, &shared, &info).expect("memory");
        assert_eq!(key.expose()[..16], hex::<16>("4531685d41d65f03dc48f6b8302c05b0"));
        assert_eq!(nonce, hex("56d890e5accaaf011cff4b7d"));
    }

    #[test]
    fn rfc_9180_a_3_1_p256() {
        let recipient = hex::<65>(concat!(
            "04fe8c19ce0905191ebc298a9245792531f26f0cece2460639e8bc39cb7f706a826a",
            "779b4cf969b8a0e539c7f62fb3d30ad6aa8f80e30f1d128aafd68a2ce72ea0"
        ));
        let enc = hex::<65>(concat!(
            "04a92719c6195d5085104f469a8b9814d5838ff72b60501e2c4466e5e67b325ac98536",
            "d7b61a1af4b78e5b7f951c0900be863c403ce65c9bfcb9382657222d18c4"
        ));
        let scalar = hex::<32>("f3ce7fdae57e1a310d87f1ebbde6f328be0a99cdbcadf4d6589cf29de4b8ffd2");
        let key = PrivateKey::from_private_key(&ECDH_P256, &scalar).expect("key");
        let dh = agree(&key, UnparsedPublicKey::new(&ECDH_P256, &enc), (), |x| {
            Secret::copy_of(x.try_into().map_err(drop)?).map_err(drop)
        })
        .expect("agrees");
        let shared = Kem::P256.shared_secret(&dh, &enc, &recipient).expect("memory");
        let expected = "c0d26aeab536609a572b07695d933b589dcf363ff9d93c93adea537aeabb8cb8";
        assert_eq!(shared.expose(), &hex(expected));
        let info = hex::decode(INFO).expect("hex");
        let (key, nonce) = key_schedule(Kem::P256, 1, 16, &shared, &info).expect("memory");
        assert_eq!(key.expose()[..16], hex::<16>("868c066ef58aae6dc589b6cfdd18f97e"));
        assert_eq!(nonce, hex("4e0bc5018beba4bf004cca59"));
    }

    #[test]
    fn what_is_sealed_here_opens_in_another_library_and_the_other_way_round() {
        let (info, aad, text) = (b"info", b"aad", b"text");
        let suite: &dyn Hpke = DH_KEM_X25519_HKDF_SHA256_AES_256;
        let (public, private) = suite.generate_key_pair().expect("keys");
        let sealed = seal_x25519(&public.0.try_into().expect("32 bytes"), info, aad, text).expect("sealed");
        let enc = EncapsulatedSecret(sealed[..32].to_vec());
        assert_eq!(suite.open(&enc, info, aad, &sealed[32..], &private).expect("opens"), text);

        let key = X25519Key::generate().expect("memory");
        let (enc, theirs) = suite.seal(info, aad, text, &HpkePublicKey(key.public.to_vec())).expect("sealed");
        let sealed = [enc.0, theirs].concat();
        assert_eq!(open_x25519(&key, info, aad, &sealed).expect("opens").expose(), text);

        let suite: &dyn Hpke = DH_KEM_P256_HKDF_SHA256_AES_256;
        let (public, private) = suite.generate_key_pair().expect("keys");
        let point: [u8; 65] = public.0.try_into().expect("65 bytes");
        let sealed = seal_p256(&point, info, aad, text).expect("sealed");
        let enc = EncapsulatedSecret(sealed[..65].to_vec());
        assert_eq!(suite.open(&enc, info, aad, &sealed[65..], &private).expect("opens"), text);
    }

    #[test]
    fn attack_27_a_message_opens_for_its_key_and_purpose_only() {
        let key = X25519Key::generate().expect("memory");
        let sealed = seal_x25519(key.public(), b"info", b"aad", b"text").expect("sealed");
        let other = X25519Key::generate().expect("memory");
        let open =
            |key: &X25519Key, info: &[u8], aad: &[u8], sealed: &[u8]| open_x25519(key, info, aad, sealed).is_ok();
        assert!(open(&key, b"info", b"aad", &sealed));
        assert!(!open(&other, b"info", b"aad", &sealed));
        assert!(!open(&key, b"infx", b"aad", &sealed));
        assert!(!open(&key, b"info", b"aax", &sealed));
        for at in 0..sealed.len() {
            let mut bad = sealed.clone();
            bad[at] ^= 1;
            assert!(!open(&key, b"info", b"aad", &bad), "{at}");
            assert!(!open(&key, b"info", b"aad", &sealed[..at]), "{at}");
        }
    }

    #[test]
    fn keys_of_small_order_and_points_beside_the_curve_are_refused() {
        assert!(matches!(seal_x25519(&[0; 32], b"", b"", b"x"), Err(HpkeError::PublicKey)));
        let mut point = [4; 65];
        assert!(matches!(seal_p256(&point, b"", b"", b"x"), Err(HpkeError::PublicKey)));
        point[0] = 4;
        assert!(matches!(p256_encapsulation(&point), Err(HpkeError::PublicKey)));
        assert!(matches!(p256_encapsulation(&point[..64]), Err(HpkeError::Length)));
    }
}
