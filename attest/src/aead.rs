//! AES-256-GCM and HKDF-SHA256 over keys in locked memory: the one place where this crate and the key provider touch cipher
//! state. Key schedules live on the stack of one call and are wiped with it; the contexts of a C library would keep them on its
//! heap.

use aes_gcm::aead::{AeadInOut, KeyInit};
use aes_gcm::{Aes256Gcm, Key, Nonce, Tag};
use hmac::{Hmac, Mac};
use secretmem::{Secret, SecretBox, SecretError, wipe, wiping_stack};
use sha2::Sha256;

/// Length of a tag in bytes.
pub const TAG: usize = 16;

/// A ciphertext that is not what was sealed, under this key, nonce and associated data; or a plaintext longer than GCM
/// takes (2^36 bytes), which none of our formats reaches.
#[derive(Debug, PartialEq, Eq)]
pub struct Tampered;

/// An expanded key.
pub struct Cipher(SecretBox<Aes256Gcm>);

impl Cipher {
    /// Expands `key` in locked memory.
    pub fn new(key: &[u8; 32]) -> Result<Self, SecretError> {
        wiping_stack(|| SecretBox::try_new_with(|slot| Ok(slot.write(expanded(key))))).map(Self)
    }

    /// Encrypts `buffer` in place and gives the tag.
    pub fn seal(&self, nonce: &[u8; 12], aad: &[u8], buffer: &mut [u8]) -> Result<[u8; TAG], Tampered> {
        wiping_stack(|| {
            let tag = self.0.expose().encrypt_inout_detached(&Nonce::from(*nonce), aad, buffer.into());
            tag.map(Into::into).map_err(|_| Tampered)
        })
    }

    /// Checks the tag, then decrypts `buffer` in place.
    pub fn open(&self, nonce: &[u8; 12], aad: &[u8], buffer: &mut [u8], tag: &[u8; TAG]) -> Result<(), Tampered> {
        wiping_stack(|| {
            let opened =
                self.0.expose().decrypt_inout_detached(&Nonce::from(*nonce), aad, buffer.into(), &Tag::from(*tag));
            opened.map_err(|_| Tampered)
        })
    }
}

fn expanded(key: &[u8; 32]) -> Aes256Gcm {
    let mut copy = Key::<Aes256Gcm>::from(*key);
    let cipher = Aes256Gcm::new(&copy);
    wipe(&mut copy);
    cipher
}

/// HKDF-Extract (RFC 5869, 2.2): the parts of the input key material one after the other. A salt is at most 64 bytes.
pub(crate) fn extract(salt: &[u8], material: &[&[u8]]) -> Result<Secret<32>, SecretError> {
    mac(salt, material)
}

/// HKDF-Expand (RFC 5869, 2.3) of one block, 32 bytes; whoever needs fewer takes the first.
pub(crate) fn expand(key: &Secret<32>, info: &[&[u8]]) -> Result<Secret<32>, SecretError> {
    mac(key.expose(), &[info, &[&[1]]].concat())
}

/// HMAC-SHA256 of `parts` under `key`, at most 64 bytes, which HMAC fills up with zeros.
fn mac(key: &[u8], parts: &[&[u8]]) -> Result<Secret<32>, SecretError> {
    let mut out = Secret::zeroed()?;
    wiping_stack(|| {
        let mut block = [0; 64];
        block[..key.len()].copy_from_slice(key);
        let mut mac = Hmac::<Sha256>::new(&block.into());
        wipe(&mut block);
        parts.iter().for_each(|part| mac.update(part));
        let mut result: [u8; 32] = mac.finalize().into_bytes().into();
        out.expose_mut().copy_from_slice(&result);
        wipe(&mut result);
    });
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;
    use aws_lc_rs::aead::{AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey};

    #[test]
    fn the_cipher_agrees_with_another_library() {
        let (key, nonce, aad) = ([7; 32], [9; 12], b"header");
        let mut ours = *b"some plaintext that spans more than one block";
        let tag = Cipher::new(&key).expect("memory").seal(&nonce, aad, &mut ours).expect("sealed");
        let theirs = LessSafeKey::new(UnboundKey::new(&AES_256_GCM, &key).expect("key"));
        let mut both = [&ours[..], &tag].concat();
        let nonce = Nonce::assume_unique_for_key(nonce);
        let plain = theirs.open_in_place(nonce, Aad::from(aad), &mut both).expect("opens");
        assert_eq!(plain, b"some plaintext that spans more than one block");
    }

    #[test]
    fn a_changed_bit_is_noticed_wherever_it_is() {
        let cipher = Cipher::new(&[7; 32]).expect("memory");
        let mut sealed = *b"text";
        let tag = cipher.seal(&[0; 12], b"aad", &mut sealed).expect("sealed");
        let open = |nonce, aad: &[u8], mut text: [u8; 4], tag| cipher.open(&nonce, aad, &mut text, &tag);
        assert_eq!(open([0; 12], b"aad", sealed, tag), Ok(()));
        assert_eq!(open([1; 12], b"aad", sealed, tag), Err(Tampered));
        assert_eq!(open([0; 12], b"aax", sealed, tag), Err(Tampered));
        assert_eq!(open([0; 12], b"aad", [sealed[0] ^ 1, 0, 0, 0], tag), Err(Tampered));
        assert_eq!(open([0; 12], b"aad", sealed, [0; 16]), Err(Tampered));
    }

    #[test]
    fn key_derivation_agrees_with_the_hkdf_crate() {
        for salt in [&b""[..], &[5; 32]] {
            let prk = extract(salt, &[b"some ", b"material"]).expect("memory");
            let okm = expand(&prk, &[b"in", b"fo"]).expect("memory");
            let mut expected = [0; 32];
            let oracle = hkdf::Hkdf::<Sha256>::new(Some(salt), b"some material");
            oracle.expand(b"info", &mut expected).expect("length");
            assert_eq!(okm.expose(), &expected);
        }
    }
}
