//! What the benchmark's blocks are stored by.

use super::MeasureError;
use super::keeper::Keeper;
use blockcrypt::{Store, Volume};

/// Takes requests from several threads, several at a time.
pub trait Subject: Sync {
    /// Fills each part from its offset.
    ///
    /// # Errors
    /// It could not.
    fn read(&self, parts: &mut [(u64, &mut [u8])]) -> Result<(), MeasureError>;
    /// Writes each part at its offset.
    ///
    /// # Errors
    /// It could not.
    fn write(&self, parts: &[(u64, &[u8])]) -> Result<(), MeasureError>;
    /// Makes what was written durable.
    ///
    /// # Errors
    /// It could not.
    fn flush(&self) -> Result<(), MeasureError>;
    /// Gets ready for requests of `bytes` from this thread.
    fn warm(&self, _bytes: usize) {}
    /// Returns when it does nothing any more that nobody waits for.
    fn rest(&self) {}
}

/// Writes all `size` bytes of it, once; `heard` is told of how many bytes each time.
///
/// # Errors
/// The subject's.
pub fn fill(subject: &dyn Subject, size: u64, heard: &mut dyn FnMut(u64)) -> Result<(), MeasureError> {
    let data = vec![0x5a; 1 << 20];
    for i in 0..size >> 20 {
        subject.write(&[(i << 20, &data)])?;
        heard(1 << 20);
    }
    subject.flush()
}

/// A volume, half of which is used: as most are. Its blocks move into the other half, for which the store has room already.
pub struct HalfFull(Volume);

impl HalfFull {
    /// Makes one with `size` bytes that are used, in `store`.
    ///
    /// # Errors
    /// The store has no room for twice as much, or fails.
    pub fn new(store: impl Store + 'static, size: u64, heard: &mut dyn FnMut(u64)) -> Result<Self, MeasureError> {
        let keeper = Keeper::new().map_err(MeasureError::volume("get a key"))?;
        let volume = keeper.create(store, 2 * size).map_err(MeasureError::volume("be made"))?;
        let volume = Self(volume);
        fill(&volume, 2 * size, heard)?;
        volume.0.write_zeroes(size, size, false).map_err(MeasureError::volume("write zeroes"))?;
        volume.flush()?;
        Ok(volume)
    }
}

impl Subject for HalfFull {
    fn read(&self, parts: &mut [(u64, &mut [u8])]) -> Result<(), MeasureError> {
        self.0.read_many(parts).into_iter().try_for_each(|done| done.map_err(MeasureError::volume("read")))
    }

    fn write(&self, parts: &[(u64, &[u8])]) -> Result<(), MeasureError> {
        self.0.write_many(parts).into_iter().try_for_each(|done| done.map_err(MeasureError::volume("write")))
    }

    fn flush(&self) -> Result<(), MeasureError> {
        self.0.flush().map_err(MeasureError::volume("flush"))
    }

    fn rest(&self) {
        self.0.rest();
    }
}

/// The same store, in place and without crypto.
pub struct Plain<S>(S);

impl<S: Store> Plain<S> {
    /// One of `size` bytes.
    ///
    /// # Errors
    /// The store has no room for as many.
    pub fn new(store: S, size: u64) -> Result<Self, MeasureError> {
        store.set_len(size).map_err(|error| MeasureError::Plain("be made", error))?;
        Ok(Self(store))
    }
}

impl<S: Store> Subject for Plain<S> {
    fn read(&self, parts: &mut [(u64, &mut [u8])]) -> Result<(), MeasureError> {
        self.0.read_many_at(parts).map_err(|error| MeasureError::Plain("read", error))
    }

    fn write(&self, parts: &[(u64, &[u8])]) -> Result<(), MeasureError> {
        self.0.write_many_at(parts).map_err(|error| MeasureError::Plain("write", error))
    }

    fn flush(&self) -> Result<(), MeasureError> {
        self.0.sync_data().map_err(|error| MeasureError::Plain("flush", error))
    }
}
