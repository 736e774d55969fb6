//! The ciphers of data blocks alone, on every path that runs here: what a benchmark compares an engine with.

use crate::VolumeError;
use crate::crypto::{AesEngine, BATCH, Engines, ShaEngine};
use crate::format::page::Entry;
use crate::format::{BLOCK, MAC};
use crate::keys::{KeyRing, Open, Seal, VolumeKey};
use policy::{KeyId, VolumeId};
use secretmem::Secret;

/// A random key, expanded for one pair of paths.
pub struct Ciphers {
    engines: Engines,
    ring: KeyRing,
}

/// What a block was sealed as: to open it again.
pub struct Sealed(Entry);

impl Ciphers {
    /// Those that a volume takes here.
    ///
    /// # Errors
    /// No memory for keys.
    pub fn best() -> Result<Self, VolumeError> {
        Self::with(Engines::best())
    }

    /// Every way to encrypt with the best way to authenticate, then every other way to authenticate with the best way to encrypt.
    ///
    /// # Errors
    /// No memory for keys.
    pub fn all() -> Result<Vec<Self>, VolumeError> {
        let best = Engines::best();
        let by_aes = AesEngine::all().into_iter().map(|aes| Engines { aes, ..best });
        let by_sha = ShaEngine::all().into_iter().skip(1).map(|sha| Engines { sha, ..best });
        by_aes.chain(by_sha).map(Self::with).collect()
    }

    fn with(engines: Engines) -> Result<Self, VolumeError> {
        let key = VolumeKey::expand_with(engines, KeyId(1), VolumeId([1; 16]), &Secret::random()?)?;
        Ok(Self { engines, ring: KeyRing::of(key) })
    }

    /// The paths' names.
    pub fn name(&self) -> String {
        format!("{}, {}", self.engines.aes.name(), self.engines.sha.name())
    }

    /// Encrypts and tags `data`, whole blocks, as logical blocks from 0 on: from `plain`, which is as long, or in place.
    ///
    /// # Errors
    /// There is no key.
    pub fn seal(&self, plain: Option<&[u8]>, data: &mut [u8]) -> Result<Vec<Sealed>, VolumeError> {
        let key = self.ring.current().ok_or(VolumeError::NoKeys)?;
        let mut plain = plain.map(|plain| plain.as_chunks::<BLOCK>().0.iter());
        let blocks = (0..).zip(data.as_chunks_mut::<BLOCK>().0);
        let mut batch: Vec<Seal> = blocks
            .map(|(i, block)| {
                let plain = plain.as_mut().and_then(Iterator::next);
                Seal { lba: i, generation: i, plain, block, tag: [0; MAC] }
            })
            .collect();
        key.seal_blocks(&mut batch);
        let sealed = |seal: Seal| Entry { physical: 1, generation: seal.generation, key: key.id, tag: seal.tag };
        Ok(batch.into_iter().map(sealed).map(Sealed).collect())
    }

    /// Opens what [`seal`](Self::seal) sealed, in place; false if a block does not verify.
    pub fn open(&self, sealed: &[Sealed], data: &mut [u8]) -> bool {
        let blocks = (0..).zip(sealed.iter().zip(data.as_chunks_mut::<BLOCK>().0));
        let mut batch: Vec<Open> =
            blocks.map(|(lba, (sealed, block))| Open { lba, entry: &sealed.0, block, good: false }).collect();
        self.ring.open_blocks(&mut batch)
    }

    /// Encrypts `data` without a tag, or tags it without encrypting: the parts alone.
    pub fn part(&self, encrypt: bool, data: &mut [u8]) {
        for group in data.as_chunks_mut::<BLOCK>().0.chunks_mut(BATCH) {
            if let Some(key) = self.ring.current() {
                key.part(encrypt, group);
            }
        }
    }
}
