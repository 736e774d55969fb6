//! The provider's side of a volume, in memory.

use blockcrypt::{AnchorRefused, Anchors, Events, Kek, OpenOptions, Store, Volume, VolumeError};
use policy::disk::{CipherSuite, VolumeGrant};
use policy::{AnchorMode, KeyId, OpenNumber, VolumeAnchor, VolumeId};
use secretmem::Secret;
use std::sync::{Arc, Mutex, PoisonError};

/// One volume's keys and anchor.
pub struct Keeper {
    volume: VolumeId,
    kek: Secret<32>,
    /// The open number given out last, and the anchor.
    held: Mutex<(u32, Option<VolumeAnchor>)>,
}

impl Keeper {
    /// One of a volume that does not exist yet.
    ///
    /// # Errors
    /// No memory for keys.
    pub fn new() -> Result<Arc<Self>, VolumeError> {
        Ok(Arc::new(Self { volume: VolumeId::random(), kek: Secret::random()?, held: Mutex::default() }))
    }

    /// Makes the volume.
    ///
    /// # Errors
    /// The engine's.
    pub fn create(self: &Arc<Self>, store: impl Store + 'static, size: u64) -> Result<Volume, VolumeError> {
        Volume::create(store, size, &self.grant()?, &self.kek()?, self.clone(), self.clone())
    }

    /// Opens it.
    ///
    /// # Errors
    /// The engine's.
    pub fn open(self: &Arc<Self>, store: impl Store + 'static) -> Result<Volume, VolumeError> {
        Volume::open(store, &self.grant()?, &self.kek()?, OpenOptions::default(), self.clone(), self.clone())
    }

    fn kek(&self) -> Result<Kek, VolumeError> {
        Ok(Kek::new(KeyId(1), Secret::copy_of(self.kek.expose())?))
    }

    fn grant(&self) -> Result<VolumeGrant, VolumeError> {
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        held.0 += 1;
        Ok(VolumeGrant {
            volume: self.volume,
            customer: "bench".parse().map_err(|_| VolumeError::Grant("the customer's name"))?,
            cipher: CipherSuite::Aes256XtsHmacSha256,
            kek_id: KeyId(1),
            key_id: KeyId(2),
            open_number: OpenNumber::try_from(u64::from(held.0)).map_err(|_| VolumeError::Grant("the open number"))?,
            anchor: held.1.clone(),
            anchor_mode: AnchorMode::Interval,
        })
    }
}

impl Anchors for Keeper {
    fn keep(&self, anchor: &VolumeAnchor) -> Result<(), AnchorRefused> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner).1 = Some(anchor.clone());
        Ok(())
    }
}

impl Events for Keeper {
    /// The request that met it fails too.
    fn integrity(&self, _: Option<u64>, _: Option<u64>, _: &str) {}

    fn note(&self, _: &str) {}
}
