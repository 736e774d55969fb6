//! The volume's signatures over a map in memory: replaced by the engine.
#![allow(missing_docs)]
use crate::{Anchors, Events, Store, VolumeError};
use policy::disk::VolumeGrant;
use policy::{KeyId, VolumeAnchor, VolumeId};
use secretmem::Secret;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

/// A key-encryption key.
pub struct Kek {
    id: KeyId,
    #[allow(dead_code)]
    key: Secret<32>,
}

impl Kek {
    pub fn new(id: KeyId, key: Secret<32>) -> Self {
        Self { id, key }
    }
    pub fn id(&self) -> KeyId {
        self.id
    }
}

#[derive(Clone, Copy, Default)]
pub struct OpenOptions {
    pub read_only: bool,
}

#[derive(Clone, Debug, serde::Serialize)]
pub struct VolumeInfo {
    pub volume: VolumeId,
    pub size: u64,
}

pub struct Volume {
    id: VolumeId,
    size: u64,
    sectors: Mutex<BTreeMap<u64, [u8; 512]>>,
    anchor: Option<VolumeAnchor>,
    keys: Mutex<bool>,
}

impl Volume {
    pub fn create(
        _store: impl Store + 'static,
        size: u64,
        grant: &VolumeGrant,
        _kek: &Kek,
        _anchors: Arc<dyn Anchors>,
        _events: Arc<dyn Events>,
    ) -> Result<Self, VolumeError> {
        Ok(Self { id: grant.volume, size, sectors: Mutex::default(), anchor: grant.anchor.clone(), keys: Mutex::new(true) })
    }
    pub fn open(
        store: impl Store + 'static,
        grant: &VolumeGrant,
        kek: &Kek,
        _options: OpenOptions,
        anchors: Arc<dyn Anchors>,
        events: Arc<dyn Events>,
    ) -> Result<Self, VolumeError> {
        let size = store.len().map_err(VolumeError::store("be read"))?;
        Self::create(store, size, grant, kek, anchors, events)
    }
    pub fn size(&self) -> u64 {
        self.size
    }
    pub fn id(&self) -> VolumeId {
        self.id
    }
    pub fn info(&self) -> VolumeInfo {
        VolumeInfo { volume: self.id, size: self.size }
    }
    fn check(&self) -> Result<(), VolumeError> {
        if *self.keys.lock().expect("lock") { Ok(()) } else { Err(VolumeError::NoKeys) }
    }
    pub fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<(), VolumeError> {
        self.check()?;
        let sectors = self.sectors.lock().expect("lock");
        for (i, sector) in buffer.chunks_mut(512).enumerate() {
            match sectors.get(&(offset / 512 + i as u64)) {
                Some(bytes) => sector.copy_from_slice(bytes),
                None => sector.fill(0),
            }
        }
        Ok(())
    }
    pub fn write(&self, offset: u64, data: &[u8]) -> Result<(), VolumeError> {
        self.check()?;
        let mut sectors = self.sectors.lock().expect("lock");
        for (i, sector) in data.as_chunks::<512>().0.iter().enumerate() {
            sectors.insert(offset / 512 + i as u64, *sector);
        }
        Ok(())
    }
    pub fn flush(&self) -> Result<(), VolumeError> {
        self.check()
    }
    pub fn checkpoint(&self) -> Result<(), VolumeError> {
        self.check()
    }
    pub fn close(&self) -> Result<VolumeAnchor, VolumeError> {
        self.check()?;
        self.anchor.clone().ok_or(VolumeError::NoAnchor)
    }
    pub fn wipe_keys(&self) {
        *self.keys.lock().expect("lock") = false;
    }
    pub fn put_back_keys(&self, _kek: &Kek) -> Result<(), VolumeError> {
        *self.keys.lock().expect("lock") = true;
        Ok(())
    }
}
