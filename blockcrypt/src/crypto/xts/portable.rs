//! AES-256-XTS with the `aes` crate, which is constant-time on every processor, many blocks at a time.

use super::{TWEAKS, double};
use aes::Aes256;
use aes::cipher::{Array, BlockCipherDecrypt, BlockCipherEncrypt, KeyInit as _};

/// Both keys of XTS, expanded. Lives in secret memory only.
pub(crate) struct Schedule {
    data: Aes256,
    tweak: Aes256,
}

impl Schedule {
    /// Expands the data key and the tweak key.
    pub(crate) fn new(data: &[u8; 32], tweak: &[u8; 32]) -> Self {
        Self { data: Aes256::new(data.into()), tweak: Aes256::new(tweak.into()) }
    }

    /// The first tweak of each unit: its number, encrypted.
    pub(crate) fn tweaks(&self, numbers: &[u128; TWEAKS]) -> [u128; TWEAKS] {
        let mut blocks = numbers.map(|number| Array::from(number.to_le_bytes()));
        self.tweak.encrypt_blocks(&mut blocks);
        blocks.map(|block| u128::from_le_bytes(block.into()))
    }

    /// Encrypts `from`, which is as long as `data`, into `data`; without `from` in place.
    pub(crate) fn encrypt(&self, tweak: u128, from: Option<&[[u8; 256]]>, data: &mut [[u8; 256]]) {
        if let Some(from) = from {
            data.copy_from_slice(from);
        }
        let blocks = data.as_flattened_mut().as_chunks_mut().0;
        whiten(tweak, blocks);
        self.data.encrypt_blocks(Array::cast_slice_from_core_mut(blocks));
        whiten(tweak, blocks);
    }

    /// Decrypts in place.
    pub(crate) fn decrypt(&self, tweak: u128, data: &mut [[u8; 256]]) {
        let blocks = data.as_flattened_mut().as_chunks_mut().0;
        whiten(tweak, blocks);
        self.data.decrypt_blocks(Array::cast_slice_from_core_mut(blocks));
        whiten(tweak, blocks);
    }
}

/// Adds to each block its tweak.
fn whiten(mut tweak: u128, blocks: &mut [[u8; 16]]) {
    for block in blocks {
        *block = (u128::from_le_bytes(*block) ^ tweak).to_le_bytes();
        tweak = double(tweak);
    }
}
