//! Blocks of data, sealed and opened many at a time: one is alone only where a request is.
//!
//! ```text
//! tag = HMAC-SHA256(head, ciphertext)
//!
//! head   0   1       8                  24    32           40       48
//!        1   zeroes  origin's UUID      LBA   generation   key id
//! ```
//!
//! A block that is read is verified and decrypted where it lies, which must be private memory: whoever could change it
//! between the two would choose what is decrypted.

use super::{KeyRing, VolumeKey};
use crate::crypto::{BATCH, Message, TWEAKS};
use crate::format::page::Entry;
use crate::format::{Block, MAC};
use std::array::from_fn;
use subtle::ConstantTimeEq;

/// Bytes of a tag's head.
const HEAD: usize = 48;
const _: () = assert!(BATCH <= TWEAKS && HEAD <= Message::HEAD);

/// A block to be sealed.
pub(crate) struct Seal<'a> {
    pub(crate) lba: u64,
    /// Used once under its key, whatever fails.
    pub(crate) generation: u64,
    /// The plain text, where `block` does not hold it: saves a copy.
    pub(crate) plain: Option<&'a Block>,
    /// Becomes the ciphertext.
    pub(crate) block: &'a mut Block,
    /// Becomes the tag.
    pub(crate) tag: [u8; MAC],
}

/// A block to be verified or opened.
pub(crate) struct Open<'a> {
    pub(crate) lba: u64,
    pub(crate) entry: &'a Entry,
    /// The ciphertext; becomes the plain text if it verifies, and stays as it is otherwise.
    pub(crate) block: &'a mut Block,
    /// Becomes whether it is what the entry names.
    pub(crate) good: bool,
}

impl VolumeKey {
    /// Encrypts and tags each block.
    pub(crate) fn seal_blocks(&self, batch: &mut [Seal]) {
        let schedules = self.schedules.expose();
        for group in batch.chunks_mut(BATCH) {
            let tweaks = self.tweaks(group.iter().map(|block| block.generation));
            for (seal, tweak) in group.iter_mut().zip(tweaks) {
                schedules.xts.encrypt(tweak, seal.plain, seal.block);
            }
            let tags = self.tags(group.iter().map(|seal| (seal.lba, seal.generation, &*seal.block)));
            for (seal, tag) in group.iter_mut().zip(tags) {
                seal.tag = tag;
            }
        }
    }

    /// Half of the work on up to [`BATCH`] blocks, for benchmarks.
    pub(crate) fn part(&self, encrypt: bool, blocks: &mut [Block]) {
        if encrypt {
            let tweaks = self.tweaks(0..BATCH as u64);
            blocks
                .iter_mut()
                .zip(tweaks)
                .for_each(|(block, tweak)| self.schedules.expose().xts.encrypt(tweak, None, block));
        } else {
            std::hint::black_box(self.tags(blocks.iter().map(|block| (0, 0, block))));
        }
    }

    /// Verifies [`BATCH`] blocks at most, all of this key.
    fn verify_group(&self, group: &mut [&mut Open]) {
        let tags = self.tags(group.iter().map(|open| (open.lba, open.entry.generation, &*open.block)));
        for (open, tag) in group.iter_mut().zip(tags) {
            open.good = tag.ct_eq(&open.entry.tag).into();
        }
    }

    /// Decrypts those of [`BATCH`] blocks at most that verified.
    fn decrypt_group(&self, group: &mut [&mut Open]) {
        let tweaks = self.tweaks(group.iter().map(|open| open.entry.generation));
        for (open, tweak) in group.iter_mut().zip(tweaks).filter(|(open, _)| open.good) {
            self.schedules.expose().xts.decrypt(tweak, open.block);
        }
    }

    /// The encrypted tweaks of up to [`BATCH`] blocks: the generation, little-endian, zero-extended (IEEE 1619, 5.1).
    fn tweaks(&self, generations: impl Iterator<Item = u64>) -> [u128; TWEAKS] {
        let mut numbers = [0; TWEAKS];
        for (number, generation) in numbers.iter_mut().zip(generations) {
            *number = generation.into();
        }
        self.schedules.expose().xts.tweaks(&numbers)
    }

    /// The tags of up to [`BATCH`] blocks: LBA, generation, ciphertext.
    fn tags<'a>(&self, blocks: impl Iterator<Item = (u64, u64, &'a Block)>) -> [[u8; MAC]; BATCH] {
        let (mut heads, mut bodies, mut count) = ([[0; HEAD]; BATCH], [&[][..]; BATCH], 0);
        for ((lba, generation, block), (head, body)) in blocks.zip(heads.iter_mut().zip(&mut bodies)) {
            head[0] = 1;
            head[8..24].copy_from_slice(&self.origin.0);
            head[24..32].copy_from_slice(&lba.to_le_bytes());
            head[32..40].copy_from_slice(&generation.to_le_bytes());
            head[40..48].copy_from_slice(&self.id.0.to_le_bytes());
            *body = block;
            count += 1;
        }
        let messages: [Message; BATCH] = from_fn(|i| Message { head: &heads[i], body: bodies[i] });
        let mut tags = [[0; MAC]; BATCH];
        self.schedules.expose().data.tags(&messages[..count], &mut tags[..count]);
        tags
    }
}

impl KeyRing {
    /// Says of each block whether it verifies; true if all do.
    pub(crate) fn verify_blocks(&self, batch: &mut [Open]) -> bool {
        batch.iter_mut().for_each(|open| open.good = false);
        self.by_key(batch, VolumeKey::verify_group);
        batch.iter().all(|open| open.good)
    }

    /// Verifies all blocks, and only then decrypts those that verify; true if all do.
    pub(crate) fn open_blocks(&self, batch: &mut [Open]) -> bool {
        let good = self.verify_blocks(batch);
        self.by_key(batch, VolumeKey::decrypt_group);
        good
    }

    fn by_key(&self, batch: &mut [Open], each: impl Fn(&VolumeKey, &mut [&mut Open])) {
        for key in &self.0 {
            let mut mine: Vec<&mut Open> = batch.iter_mut().filter(|open| open.entry.key == key.id).collect();
            mine.chunks_mut(BATCH).for_each(|group| each(key, group));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::crypto::{AesEngine, Engines, ShaEngine};
    use crate::format::BLOCK;
    use crate::keys::tests::key;
    use aes::Aes256;
    use aes::cipher::KeyInit as _;
    use hkdf::Hkdf;
    use hmac::{Hmac, Mac as _};
    use policy::{KeyId, VolumeId};
    use proptest::prelude::*;
    use secretmem::Secret;
    use sha2::Sha256;
    use xts_mode::Xts128;

    fn sealed(key: &VolumeKey) -> (Entry, Box<Block>) {
        let mut block = Box::new([0x55; BLOCK]);
        let mut batch = [Seal { lba: 3, generation: 4, plain: None, block: &mut block, tag: [0; MAC] }];
        key.seal_blocks(&mut batch);
        let tag = batch[0].tag;
        (Entry { physical: 9, generation: 4, key: key.id, tag }, block)
    }

    #[test]
    fn a_sealed_block_opens_only_as_what_it_was_sealed_for() {
        let (entry, block) = sealed(&key(1, 1));
        let opens = |key: VolumeKey, lba, entry: &Entry, block: &Block| {
            let mut copy = Box::new(*block);
            let ring = KeyRing::of(key);
            let verifies = ring.verify_blocks(&mut [Open { lba, entry, block: &mut copy, good: true }]);
            assert!(*copy == *block, "only looked at");
            let good = ring.open_blocks(&mut [Open { lba, entry, block: &mut copy, good: false }]);
            assert_eq!((good, good), (verifies, *copy == [0x55; BLOCK]));
            assert!(good || *copy == *block, "what fails is left alone");
            good
        };
        assert!(opens(key(1, 1), 3, &entry, &block));
        assert!(!opens(key(1, 1), 2, &entry, &block));
        assert!(!opens(key(1, 1), 3, &Entry { generation: 5, ..entry }, &block));
        assert!(!opens(key(2, 1), 3, &entry, &block));
        assert!(!opens(key(2, 1), 3, &Entry { key: KeyId(2), ..entry }, &block));
        assert!(!opens(key(1, 2), 3, &entry, &block));
        let mut flipped = block.clone();
        flipped[4095] ^= 1;
        assert!(!opens(key(1, 1), 3, &entry, &flipped));
    }

    #[test]
    fn the_derivation_is_fixed() {
        // Computed apart from this code: HKDF and HMAC with Python's hmac and hashlib, XTS with OpenSSL's EVP_aes_256_xts.
        let (entry, block) = sealed(&key(1, 1));
        assert_eq!(hex::encode(&block[..16]), "9d190708fa663e481580da8579a9c0b0");
        assert_eq!(hex::encode(entry.tag), "5983970e20f1c351cf4ffb750fa006b41b9a5b693c64f03892a8d85f5c6174cf");
    }

    /// What the format says a sealed block is, with the crates that do one thing at a time.
    fn oracle(lba: u64, generation: u64, mut block: Block) -> (Block, [u8; MAC]) {
        let hkdf = Hkdf::<Sha256>::new(Some(&[1; 16]), &[7; 32]);
        let (mut xts, mut mac) = ([0; 64], [0; 32]);
        hkdf.expand(b"fealty volume 1 xts", &mut xts).expect("a length that HKDF gives");
        hkdf.expand(b"fealty volume 1 data", &mut mac).expect("a length that HKDF gives");
        let cipher = |half: &[u8]| Aes256::new_from_slice(half).expect("32 bytes");
        let tweak = u128::from(generation).to_le_bytes().into();
        Xts128::new(cipher(&xts[..32]), cipher(&xts[32..])).encrypt_sector(&mut block, tweak);
        let head = [&[1, 0, 0, 0, 0, 0, 0, 0][..], &[1; 16], &lba.to_le_bytes(), &generation.to_le_bytes()].concat();
        let mac = Hmac::<Sha256>::new_from_slice(&mac).expect("any length").chain_update(head);
        (block, mac.chain_update(1_u64.to_le_bytes()).chain_update(block).finalize().into_bytes().into())
    }

    fn all_engines() -> Vec<Engines> {
        let with = |aes| ShaEngine::all().into_iter().map(move |sha| Engines { aes, sha });
        AesEngine::all().into_iter().flat_map(with).collect()
    }

    fn key_with(engines: Engines) -> VolumeKey {
        let master = Secret::copy_of(&[7; 32]).expect("room");
        VolumeKey::expand_with(engines, KeyId(1), VolumeId([1; 16]), &master).expect("a key")
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(12))]
        #[test]
        fn batches_are_sealed_as_the_format_says_and_open_again(
            of in prop::collection::vec((any::<u64>(), any::<u64>(), any::<u8>(), any::<bool>()), 1..40),
            shift in 0_usize..64, broken in any::<prop::sample::Index>(), at in 0..BLOCK
        ) {
            let plain: Vec<Block> = of.iter().map(|(lba, _, byte, _)| from_fn(|i| byte ^ (i as u64 ^ lba) as u8)).collect();
            let expected: Vec<_> = of.iter().zip(&plain).map(|((l, g, ..), p)| oracle(*l, *g, *p)).collect();
            for engines in all_engines() {
                let ring = KeyRing::of(key_with(engines));
                let name = format!("{}, {}", engines.aes.name(), engines.sha.name());
                let mut space = vec![0; shift + of.len() * BLOCK];
                let blocks = space[shift..].as_chunks_mut::<BLOCK>().0;
                let mut batch: Vec<Seal> = blocks.iter_mut().zip(&plain).zip(&of).map(|((block, plain), of)| {
                    if !of.3 {
                        *block = *plain;
                    }
                    Seal { lba: of.0, generation: of.1, plain: of.3.then_some(plain), block, tag: [0; MAC] }
                }).collect();
                ring.current().expect("a key").seal_blocks(&mut batch);
                for (seal, (block, tag)) in batch.iter().zip(&expected) {
                    prop_assert!(seal.block == block && seal.tag == *tag, "{}", name);
                }
                let entry = |of: &(u64, u64, u8, bool), tag| Entry { physical: 9, generation: of.1, key: KeyId(1), tag };
                let entries: Vec<Entry> = of.iter().zip(&expected).map(|(of, (_, tag))| entry(of, *tag)).collect();
                let broken = broken.index(of.len());
                for bad in [false, true] {
                    let mut space = space.clone();
                    let blocks = space[shift..].as_chunks_mut::<BLOCK>().0;
                    blocks[broken][at] ^= u8::from(bad);
                    let as_stored = blocks[broken];
                    let open = |((block, of), entry): ((_, &(u64, _, _, _)), _)| Open { lba: of.0, entry, block, good: true };
                    let mut batch: Vec<Open> = blocks.iter_mut().zip(&of).zip(&entries).map(open).collect();
                    prop_assert_eq!(ring.open_blocks(&mut batch), !bad, "{}", name);
                    for (i, (open, plain)) in batch.iter().zip(&plain).enumerate() {
                        let spoilt = bad && i == broken;
                        prop_assert!(open.good != spoilt && *open.block == if spoilt { as_stored } else { *plain }, "{}", name);
                    }
                }
            }
        }
    }

    #[test]
    fn a_batch_of_several_keys_opens_each_block_with_its_own() {
        let (mut ring, strange) = (KeyRing::of(key(1, 1)), key(3, 1));
        ring.add(key(2, 5));
        let mut blocks: Vec<(Entry, Box<Block>)> =
            (0..50).map(|i| sealed([&ring.0[0], &ring.0[1], &strange][i % 3])).collect();
        let mut batch: Vec<Open> =
            blocks.iter_mut().map(|(entry, block)| Open { lba: 3, entry, block, good: false }).collect();
        assert!(!ring.open_blocks(&mut batch));
        for (i, open) in batch.iter().enumerate() {
            assert_eq!((open.good, *open.block == [0x55; BLOCK]), (i % 3 < 2, i % 3 < 2));
        }
    }
}
