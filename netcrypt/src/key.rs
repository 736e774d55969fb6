//! A session's secret into the key of one direction.
//!
//! HKDF-Expand (RFC 5869, SHA-256) of the secret with the info
//!
//! ```text
//! "fealty net v1 key"  sender (1: initiator, 2: responder)  phase  network id (u16 BE)  key id (u32 BE)
//! ```
//!
//! gives 36 bytes: the AES-256 key, then the salt.

use crate::packet::{Header, PacketNumber, TAG};
use aes_gcm::aead::inout::InOutBuf;
use aes_gcm::{AeadInOut, Aes256Gcm, KeyInit, Nonce, Tag};
use hkdf::Hkdf;
use secretmem::{Secret, SecretBox, SecretError, wiping_stack};
use sha2::Sha256;

/// Which end of a session: the one that began it, or the other.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Role {
    /// Began the session.
    Initiator,
    /// Answered.
    Responder,
}

/// What a key is for; stands in the header of every packet under it, and in the key's derivation.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Binding {
    /// The virtual network.
    pub network: u16,
    /// Which of the session's successive keys, modulo 256.
    pub phase: u8,
    /// The receiver's name for the session.
    pub key_id: u32,
}

/// Why there is no key.
#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    /// No locked memory.
    #[error("no memory for a network key")]
    Memory(#[from] SecretError),
    /// The cipher refused what was derived, which its length excludes.
    #[error("a network key could not be derived")]
    Derive,
}

/// The key of one direction: the cipher with its expanded key, and the salt, in secret pages.
pub(crate) struct DirectionKey {
    cipher: SecretBox<Aes256Gcm>,
    salt: Secret<4>,
    binding: Binding,
}

/// A tag that did not verify.
pub(crate) struct Forged;

impl Binding {
    /// The header of packet `number` under this key.
    pub(crate) fn header(self, number: PacketNumber) -> Header {
        Header { phase: self.phase, network: self.network, key_id: self.key_id, number }
    }
}

impl DirectionKey {
    /// The key for what `sender` sends.
    pub(crate) fn derive(session: &Secret<32>, sender: Role, binding: Binding) -> Result<Self, KeyError> {
        let mut material = Secret::<36>::zeroed()?;
        wiping_stack(|| {
            let hkdf = Hkdf::<Sha256>::from_prk(session.expose()).map_err(|_| KeyError::Derive)?;
            hkdf.expand(&info(sender, binding), material.expose_mut()).map_err(|_| KeyError::Derive)
        })?;
        let (key, salt) = material.expose().split_at(32);
        let cipher = wiping_stack(|| {
            SecretBox::try_new_with(|slot| {
                Aes256Gcm::new_from_slice(key).map(|cipher| slot.write(cipher)).map_err(|_| KeyError::Derive)
            })
        })?;
        let mut own_salt = Secret::zeroed()?;
        own_salt.expose_mut().copy_from_slice(salt);
        Ok(Self { cipher, salt: own_salt, binding })
    }

    pub(crate) fn binding(&self) -> Binding {
        self.binding
    }

    /// Encrypts `text` in place; its tag. `number` was never used under this key.
    pub(crate) fn encrypt(&self, number: PacketNumber, header: &[u8], text: &mut [u8]) -> Option<[u8; TAG]> {
        let nonce = self.nonce(number);
        let seal = || self.cipher.expose().encrypt_inout_detached(&nonce, header, InOutBuf::from(text));
        wiping_stack(seal).ok().map(Into::into)
    }

    /// Decrypts `text` in place; leaves it as it is if the tag does not verify.
    pub(crate) fn decrypt(
        &self,
        number: PacketNumber,
        header: &[u8],
        text: &mut [u8],
        tag: &[u8; TAG],
    ) -> Result<(), Forged> {
        let (nonce, tag) = (self.nonce(number), Tag::from(*tag));
        let open = || self.cipher.expose().decrypt_inout_detached(&nonce, header, InOutBuf::from(text), &tag);
        wiping_stack(open).map_err(|_| Forged)
    }

    fn nonce(&self, number: PacketNumber) -> Nonce<aes_gcm::aead::consts::U12> {
        let mut nonce = [0; 12];
        nonce[..4].copy_from_slice(self.salt.expose());
        nonce[4..].copy_from_slice(&number.to_bytes());
        nonce.into()
    }
}

fn info(sender: Role, binding: Binding) -> [u8; 25] {
    let mut info = *b"fealty net v1 key\0\0\0\0\0\0\0\0";
    info[17] = match sender {
        Role::Initiator => 1,
        Role::Responder => 2,
    };
    info[18] = binding.phase;
    info[19..21].copy_from_slice(&binding.network.to_be_bytes());
    info[21..].copy_from_slice(&binding.key_id.to_be_bytes());
    info
}
