//! A store in memory.

use super::Store;
use std::io;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Bytes in memory, gone with it: for tests.
#[derive(Default)]
pub struct MemoryStore(Mutex<Vec<u8>>);

impl MemoryStore {
    /// A store that holds `bytes`.
    pub fn of(bytes: Vec<u8>) -> Self {
        Self(Mutex::new(bytes))
    }

    /// What it holds now.
    pub fn bytes(&self) -> Vec<u8> {
        self.held().clone()
    }

    fn held(&self) -> MutexGuard<'_, Vec<u8>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Store for MemoryStore {
    fn len(&self) -> io::Result<u64> {
        Ok(self.held().len() as u64)
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        let held = self.held();
        buffer.copy_from_slice(held.get(range(offset, buffer.len())).ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }

    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        let mut held = self.held();
        held.get_mut(range(offset, bytes.len())).ok_or(io::ErrorKind::StorageFull)?.copy_from_slice(bytes);
        Ok(())
    }

    fn sync_data(&self) -> io::Result<()> {
        Ok(())
    }

    fn set_len(&self, bytes: u64) -> io::Result<()> {
        self.held().resize(usize::try_from(bytes).map_err(|_| io::ErrorKind::StorageFull)?, 0);
        Ok(())
    }
}

fn range(offset: u64, length: usize) -> std::ops::Range<usize> {
    let start = usize::try_from(offset).unwrap_or(usize::MAX);
    start..start.saturating_add(length)
}
