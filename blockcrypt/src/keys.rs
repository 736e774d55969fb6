//! From the key-encryption key to what seals blocks: all of it in secret memory.
//!
//! ```text
//! KEK ── AES-256-GCM ──► slot ► master, 32 bytes
//!                                 │ HKDF-SHA256, salt = origin UUID, info = "fealty volume 1 " + name
//!                                 ├─ "xts"         64 bytes  AES-256-XTS: data key, tweak key
//!                                 ├─ "data"        32 bytes  HMAC of data blocks
//!                                 ├─ "map"         32 bytes  HMAC of pages
//!                                 ├─ "log"         32 bytes  HMAC of log blocks
//!                                 └─ "superblock"  32 bytes  HMAC of superblocks
//! ```
//!
//! Every MAC input has fixed width and begins with a byte that says what it is.

use crate::VolumeError;
use crate::format::log::MAC_AT as LOG_MAC_AT;
use crate::format::page::Entry;
use crate::format::slot::Slot;
use crate::format::superblock::{MAC_AT as SUPERBLOCK_MAC_AT, suite_bytes};
use crate::format::{Block, MAC};
use aes::Aes256;
use aes::cipher::{Array, KeyInit as _};
use aes_gcm::Aes256Gcm;
use aes_gcm::aead::{AeadInOut, Nonce, Tag};
use hkdf::Hkdf;
use hmac::{Hmac, Mac};
use policy::disk::{CipherSuite, VolumeGrant};
use policy::{CustomerId, KeyId, VolumeId};
use secretmem::{Secret, SecretBox, SecretError, wiping_stack};
use sha2::Sha256;
use subtle::ConstantTimeEq;
use xts_mode::Xts128;

/// A key-encryption key as the provider releases it: opens the key slots of one volume.
pub struct Kek {
    id: KeyId,
    key: Secret<32>,
}

impl Kek {
    /// The key `key`, which the provider calls `id`.
    pub fn new(id: KeyId, key: Secret<32>) -> Self {
        Self { id, key }
    }

    /// What the provider calls it.
    pub fn id(&self) -> KeyId {
        self.id
    }

    /// Wraps `master` in a new slot.
    pub(crate) fn wrap(
        &self,
        master: &Secret<32>,
        key: KeyId,
        origin: VolumeId,
        customer: &CustomerId,
    ) -> Result<Slot, VolumeError> {
        let mut nonce = [0; 12];
        getrandom::fill(&mut nonce).map_err(|_| VolumeError::System("random bytes"))?;
        let mut slot = Slot { key, kek: self.id, origin, nonce, wrapped: [0; 32], tag: [0; 16], written: 0 };
        let aad = slot.aad(&suite_bytes(CipherSuite::Aes256XtsHmacSha256), customer.as_str());
        let mut wrapped = Secret::copy_of(master.expose())?;
        let tag = wiping_stack(|| {
            let cipher = Aes256Gcm::new(self.key.expose().into());
            cipher.encrypt_inout_detached(
                &Nonce::<Aes256Gcm>::from(nonce),
                &aad,
                wrapped.expose_mut().as_mut_slice().into(),
            )
        });
        slot.tag = tag.map_err(|_| VolumeError::WrongKey)?.into();
        slot.wrapped = *wrapped.expose();
        Ok(slot)
    }

    fn unwrap(&self, slot: &Slot, customer: &CustomerId) -> Result<Secret<32>, VolumeError> {
        if slot.kek != self.id {
            return Err(VolumeError::WrongKey);
        }
        let aad = slot.aad(&suite_bytes(CipherSuite::Aes256XtsHmacSha256), customer.as_str());
        let mut master = Secret::copy_of(&slot.wrapped)?;
        let opened = wiping_stack(|| {
            let cipher = Aes256Gcm::new(self.key.expose().into());
            let (nonce, tag) = (Nonce::<Aes256Gcm>::from(slot.nonce), Tag::<Aes256Gcm>::from(slot.tag));
            cipher.decrypt_inout_detached(&nonce, &aad, master.expose_mut().as_mut_slice().into(), &tag)
        });
        opened.map_err(|_| VolumeError::WrongKey)?;
        Ok(master)
    }

    /// The expanded keys of `slot`.
    pub(crate) fn open(&self, slot: &Slot, customer: &CustomerId) -> Result<VolumeKey, VolumeError> {
        VolumeKey::expand(slot.key, slot.origin, &self.unwrap(slot, customer)?)
    }

    /// Whether grant and key belong together.
    pub(crate) fn check(&self, grant: &VolumeGrant) -> Result<(), VolumeError> {
        if grant.kek_id == self.id { Ok(()) } else { Err(VolumeError::Grant("it names another key-encryption key")) }
    }
}

/// One volume master, expanded.
pub(crate) struct VolumeKey {
    pub(crate) id: KeyId,
    pub(crate) origin: VolumeId,
    schedules: SecretBox<Schedules>,
}

/// Expanded state: lives in secret pages only.
struct Schedules {
    xts: Xts128<Aes256>,
    data: Hmac<Sha256>,
    map: Hmac<Sha256>,
    log: Hmac<Sha256>,
    superblock: Hmac<Sha256>,
}

impl VolumeKey {
    pub(crate) fn expand(id: KeyId, origin: VolumeId, master: &Secret<32>) -> Result<Self, VolumeError> {
        let mut parts = Secret::<{ 64 + 4 * 32 }>::zeroed()?;
        let derived = wiping_stack(|| {
            let hkdf = Hkdf::<Sha256>::new(Some(&origin.0), master.expose());
            let (xts, macs) = parts.expose_mut().split_at_mut(64);
            let mut outputs = vec![(&b"xts"[..], xts)];
            outputs.extend([&b"data"[..], b"map", b"log", b"superblock"].into_iter().zip(macs.chunks_exact_mut(32)));
            outputs.into_iter().try_for_each(|(name, out)| hkdf.expand_multi_info(&[b"fealty volume 1 ", name], out))
        });
        derived.map_err(|_| VolumeError::WrongKey)?;
        let (xts, macs) = parts.expose().split_at(64);
        let (data_half, tweak_half) = xts.split_at(32);
        // FIPS 140 asks that the halves differ; for honest randomness this never happens.
        if bool::from(data_half.ct_eq(tweak_half)) {
            return Err(VolumeError::WrongKey);
        }
        let schedules = wiping_stack(|| {
            SecretBox::try_new_with(|place| {
                let mac = |i: usize| Hmac::<Sha256>::new_from_slice(&macs[i * 32..][..32]);
                let (Ok(data), Ok(map), Ok(log), Ok(superblock)) = (mac(0), mac(1), mac(2), mac(3)) else {
                    return Err(SecretError::Length(32));
                };
                let (Ok(first), Ok(second)) = (Aes256::new_from_slice(data_half), Aes256::new_from_slice(tweak_half))
                else {
                    return Err(SecretError::Length(32));
                };
                Ok(place.write(Schedules { xts: Xts128::new(first, second), data, map, log, superblock }))
            })
        })?;
        Ok(Self { id, origin, schedules })
    }

    /// Encrypts `block` in place for its logical block and generation; returns its tag.
    pub(crate) fn seal(&self, lba: u64, generation: u64, block: &mut Block) -> [u8; MAC] {
        self.schedules.expose().xts.encrypt_sector(block, tweak(generation));
        self.tag(lba, generation, block).finalize().into_bytes().into()
    }

    /// Whether `block` is the ciphertext that `entry` names for `lba`.
    pub(crate) fn verify(&self, lba: u64, entry: &Entry, block: &Block) -> bool {
        entry.key == self.id && self.tag(lba, entry.generation, block).verify_slice(&entry.tag).is_ok()
    }

    /// Verifies, then decrypts in place; leaves `block` as it is where it does not verify.
    pub(crate) fn open(&self, lba: u64, entry: &Entry, block: &mut Block) -> bool {
        let good = self.verify(lba, entry, block);
        if good {
            self.schedules.expose().xts.decrypt_sector(block, tweak(entry.generation));
        }
        good
    }

    fn tag(&self, lba: u64, generation: u64, ciphertext: &Block) -> Hmac<Sha256> {
        let mut head = [0; 48];
        head[0] = 1;
        head[8..24].copy_from_slice(&self.origin.0);
        head[24..32].copy_from_slice(&lba.to_le_bytes());
        head[32..40].copy_from_slice(&generation.to_le_bytes());
        head[40..48].copy_from_slice(&self.id.0.to_le_bytes());
        self.schedules.expose().data.clone().chain_update(head).chain_update(ciphertext)
    }

    /// The MAC of a page of any tree, header included.
    pub(crate) fn page_mac(&self, page: &Block) -> [u8; MAC] {
        self.schedules.expose().map.clone().chain_update([2]).chain_update(page).finalize().into_bytes().into()
    }

    /// The MAC of a log block that follows the block (or seed) with MAC `previous`; its own MAC's place is left out.
    pub(crate) fn log_mac(&self, uuid: VolumeId, previous: &[u8; MAC], block: &Block) -> [u8; MAC] {
        let mac = self.schedules.expose().log.clone().chain_update([3]).chain_update(uuid.0).chain_update(previous);
        mac.chain_update(&block[..LOG_MAC_AT]).chain_update(&block[LOG_MAC_AT + MAC..]).finalize().into_bytes().into()
    }

    /// What the first log block of a writer follows.
    pub(crate) fn log_seed(&self, uuid: VolumeId, writer: u32, superblock: &[u8; MAC]) -> [u8; MAC] {
        let mac = self.schedules.expose().log.clone().chain_update([5]).chain_update(uuid.0);
        mac.chain_update(writer.to_le_bytes()).chain_update(superblock).finalize().into_bytes().into()
    }

    /// The MAC of a superblock; its own place is left out.
    pub(crate) fn superblock_mac(&self, block: &Block) -> [u8; MAC] {
        let mac = self.schedules.expose().superblock.clone().chain_update([4]);
        mac.chain_update(&block[..SUPERBLOCK_MAC_AT]).finalize().into_bytes().into()
    }
}

/// The generation, little-endian, zero-extended (IEEE 1619, 5.1).
fn tweak(generation: u64) -> Array<u8, aes::cipher::consts::U16> {
    Array::from(u128::from(generation).to_le_bytes())
}

/// All keys of an open volume: the current one first.
pub(crate) struct KeyRing(Vec<VolumeKey>);

impl KeyRing {
    pub(crate) fn open(slots: &[Slot], kek: &Kek, customer: &CustomerId) -> Result<Self, VolumeError> {
        slots.iter().map(|slot| kek.open(slot, customer)).collect::<Result<_, _>>().map(Self)
    }

    pub(crate) fn of(current: VolumeKey) -> Self {
        Self(vec![current])
    }

    /// Adds an older key.
    pub(crate) fn add(&mut self, key: VolumeKey) {
        self.0.push(key);
    }

    /// Makes `key` the current one.
    pub(crate) fn renew(&mut self, key: VolumeKey) {
        self.0.insert(0, key);
    }

    /// The key for new writes.
    pub(crate) fn current(&self) -> Option<&VolumeKey> {
        self.0.first()
    }

    pub(crate) fn find(&self, id: KeyId) -> Option<&VolumeKey> {
        self.0.iter().find(|key| key.id == id)
    }
}

/// Whether two MACs are the same, in constant time.
pub(crate) fn same(a: &[u8; MAC], b: &[u8; MAC]) -> bool {
    a.ct_eq(b).into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::BLOCK;

    fn key(id: u64, origin: u8) -> VolumeKey {
        let master = Secret::copy_of(&[7; 32]).expect("room");
        VolumeKey::expand(KeyId(id), VolumeId([origin; 16]), &master).expect("a key")
    }

    fn sealed(key: &VolumeKey) -> (Entry, Box<Block>) {
        let mut block = Box::new([0x55; BLOCK]);
        let tag = key.seal(3, 4, &mut block);
        (Entry { physical: 9, generation: 4, key: key.id, tag }, block)
    }

    #[test]
    fn a_sealed_block_opens_only_as_what_it_was_sealed_for() {
        let mine = key(1, 1);
        let (entry, block) = sealed(&mine);
        let opens = |key: &VolumeKey, lba, entry: &Entry, block: &Block| {
            let mut copy = Box::new(*block);
            let good = key.open(lba, entry, &mut copy);
            assert_eq!(good, *copy == [0x55; BLOCK]);
            assert!(good || *copy == *block, "what fails is left alone");
            good
        };
        assert!(opens(&mine, 3, &entry, &block));
        assert!(!opens(&mine, 2, &entry, &block));
        assert!(!opens(&mine, 3, &Entry { generation: 5, ..entry }, &block));
        assert!(!opens(&key(2, 1), 3, &Entry { key: KeyId(2), ..entry }, &block));
        assert!(!opens(&key(1, 2), 3, &entry, &block));
        let mut flipped = block.clone();
        flipped[4095] ^= 1;
        assert!(!opens(&mine, 3, &entry, &flipped));
    }

    #[test]
    fn the_derivation_is_fixed() {
        // Computed apart from this code: HKDF and HMAC with Python's hmac and hashlib, XTS with OpenSSL's EVP_aes_256_xts.
        let (entry, block) = sealed(&key(1, 1));
        assert_eq!(hex::encode(&block[..16]), "9d190708fa663e481580da8579a9c0b0");
        assert_eq!(hex::encode(entry.tag), "5983970e20f1c351cf4ffb750fa006b41b9a5b693c64f03892a8d85f5c6174cf");
    }

    #[test]
    fn ieee_1619_vector_10() {
        // XTS-AES-256, data unit ff, 512 bytes: the first and last 16 bytes of the ciphertext.
        let first = hex::decode("2718281828459045235360287471352662497757247093699959574966967627").expect("hex");
        let second = hex::decode("3141592653589793238462643383279502884197169399375105820974944592").expect("hex");
        let (Ok(a), Ok(b)) = (Aes256::new_from_slice(&first), Aes256::new_from_slice(&second)) else { panic!("keys") };
        let mut unit: Vec<u8> = (0..512).map(|i| i as u8).collect();
        Xts128::new(a, b).encrypt_sector(&mut unit, tweak(0xff));
        assert_eq!(hex::encode(&unit[..16]), "1c3b3a102f770386e4836c99e370cf9b");
        assert_eq!(hex::encode(&unit[496..]), "c4f36ffda9fcea70b9c6e693e148c151");
    }

    #[test]
    fn a_slot_opens_with_its_own_key_customer_and_volume_only() {
        let kek = |id, byte| Kek::new(KeyId(id), Secret::copy_of(&[byte; 32]).expect("room"));
        let (acme, other): (CustomerId, CustomerId) = ("acme".parse().expect("id"), "other".parse().expect("id"));
        let master = Secret::random().expect("room");
        let slot = kek(1, 1).wrap(&master, KeyId(5), VolumeId([2; 16]), &acme).expect("wrapped");
        assert_ne!(&slot.wrapped, master.expose());
        assert!(kek(1, 1).unwrap(&slot, &acme).is_ok_and(|m| m.ct_eq(&master)));
        assert!(kek(1, 2).unwrap(&slot, &acme).is_err());
        assert!(kek(2, 1).unwrap(&slot, &acme).is_err());
        assert!(kek(1, 1).unwrap(&slot, &other).is_err());
        for change in [
            Slot { key: KeyId(6), ..slot.clone() },
            Slot { origin: VolumeId([3; 16]), ..slot.clone() },
            Slot { tag: [0; 16], ..slot.clone() },
        ] {
            assert!(kek(1, 1).unwrap(&change, &acme).is_err());
        }
        let counted = Slot { written: 99, ..slot.clone() };
        assert!(kek(1, 1).unwrap(&counted, &acme).is_ok(), "the count is not part of the wrapping");
    }
}
