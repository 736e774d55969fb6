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

mod sealing;

pub(crate) use sealing::{Open, Seal};

use crate::VolumeError;
use crate::crypto::{Engines, MacKey, Message, Xts, wipe_registers};
use crate::format::log::MAC_AT as LOG_MAC_AT;
use crate::format::slot::Slot;
use crate::format::superblock::{MAC_AT as SUPERBLOCK_MAC_AT, suite_bytes};
use crate::format::{Block, MAC};
use aes_gcm::Aes256Gcm;
use aes_gcm::aead::{AeadInOut, KeyInit as _, Nonce, Tag};
use hkdf::Hkdf;
use hmac::{Hmac, Mac};
use policy::disk::{CipherSuite, VolumeGrant};
use policy::{CustomerId, KeyId, VolumeId};
use secretmem::{Secret, SecretBox, SecretError, wiping_stack};
use sha2::Sha256;
use subtle::ConstantTimeEq;

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
        let damaged =
            |_| VolumeError::Damaged(format!("the slot of key {} does not open under the key that it names", slot.key));
        opened.map_err(damaged)?;
        Ok(master)
    }

    /// A customer's slot with its master wrapped under `new` instead.
    pub(crate) fn rewrap(&self, slot: &Slot, customer: &CustomerId, new: &Kek) -> Result<Slot, VolumeError> {
        let wrapped = new.wrap(&self.unwrap(slot, customer)?, slot.key, slot.origin, customer)?;
        Ok(Slot { written: slot.written, ..wrapped })
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
    xts: Xts,
    data: MacKey,
    map: MacKey,
    log: Hmac<Sha256>,
    superblock: Hmac<Sha256>,
}

impl VolumeKey {
    pub(crate) fn expand(id: KeyId, origin: VolumeId, master: &Secret<32>) -> Result<Self, VolumeError> {
        Self::expand_with(Engines::best(), id, origin, master)
    }

    /// For computing with `engines`.
    pub(crate) fn expand_with(
        engines: Engines,
        id: KeyId,
        origin: VolumeId,
        master: &Secret<32>,
    ) -> Result<Self, VolumeError> {
        let mut parts = Secret::<{ 64 + 4 * 32 }>::zeroed()?;
        let derived = wiping_stack(|| {
            let hkdf = Hkdf::<Sha256>::new(Some(&origin.0), master.expose());
            let (xts, macs) = parts.expose_mut().split_at_mut(64);
            let mut outputs = vec![(&b"xts"[..], xts)];
            outputs.extend([&b"data"[..], b"map", b"log", b"superblock"].into_iter().zip(macs.chunks_exact_mut(32)));
            outputs.into_iter().try_for_each(|(name, out)| hkdf.expand_multi_info(&[b"fealty volume 1 ", name], out))
        });
        derived.map_err(|_| VolumeError::WrongKey)?;
        let [data_half, tweak_half, macs @ ..] = parts.expose().as_chunks::<32>().0 else {
            return Err(VolumeError::WrongKey);
        };
        let [data, map, log, superblock] = macs else { return Err(VolumeError::WrongKey) };
        // FIPS 140 asks that the halves differ; for honest randomness this never happens.
        if bool::from(data_half.ct_eq(tweak_half)) {
            return Err(VolumeError::WrongKey);
        }
        let schedules = wiping_stack(|| {
            let made = SecretBox::try_new_with(|place| {
                let mac = |key: &[u8; 32]| Hmac::<Sha256>::new_from_slice(key).map_err(|_| SecretError::Length(32));
                Ok::<_, SecretError>(place.write(Schedules {
                    xts: Xts::new(engines.aes, data_half, tweak_half),
                    data: MacKey::new(engines.sha, data),
                    map: MacKey::new(engines.sha, map),
                    log: mac(log)?,
                    superblock: mac(superblock)?,
                }))
            });
            wipe_registers();
            made
        })?;
        Ok(Self { id, origin, schedules })
    }

    /// The MAC of a page of any tree, header included.
    pub(crate) fn page_mac(&self, page: &Block) -> [u8; MAC] {
        let mut macs = [[0; MAC]];
        self.page_macs(&[page], &mut macs);
        macs[0]
    }

    /// The MACs of several pages, as many as `macs` has.
    pub(crate) fn page_macs(&self, pages: &[&Block], macs: &mut [[u8; MAC]]) {
        let messages: Vec<Message> = pages.iter().map(|page| Message { head: &[2], body: *page }).collect();
        self.schedules.expose().map.tags(&messages, macs);
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

    /// Forgets all but the newest, the current one first.
    pub(crate) fn keep_newest(&mut self, count: usize) {
        self.0.truncate(count);
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
pub(crate) mod tests {
    use super::*;

    pub(crate) fn key(id: u64, origin: u8) -> VolumeKey {
        let master = Secret::copy_of(&[7; 32]).expect("room");
        VolumeKey::expand(KeyId(id), VolumeId([origin; 16]), &master).expect("a key")
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
