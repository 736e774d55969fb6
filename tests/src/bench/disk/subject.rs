//! What stores the benchmark's blocks in this process.

use super::keeper::Keeper;
use crate::bench::BenchError;
use blockcrypt::bench::{Ciphers, Sealed};
use blockcrypt::{FileStore, Store, Volume};
use std::cell::RefCell;
use std::fs::File;
use std::path::Path;

/// Takes requests from several threads.
pub(super) trait Subject: Sync {
    fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<(), BenchError>;
    fn write(&self, offset: u64, data: &[u8]) -> Result<(), BenchError>;
    fn flush(&self) -> Result<(), BenchError>;
    /// Gets ready for requests of `bytes` from this thread.
    fn warm(&self, _bytes: usize) {}
}

/// Writes all of it, once.
pub(super) fn fill(subject: &dyn Subject, size: u64) -> Result<(), BenchError> {
    let data = vec![0x5a; 1 << 20];
    (0..size >> 20).try_for_each(|i| subject.write(i << 20, &data))?;
    subject.flush()
}

/// Past the page cache, if `direct`.
pub(super) fn store_with(path: &Path, direct: bool) -> Result<FileStore, BenchError> {
    let store = store(path)?;
    if direct { store.direct().map_err(BenchError::volume("use O_DIRECT")) } else { Ok(store) }
}

pub(super) fn store(path: &Path) -> Result<FileStore, BenchError> {
    let mut options = File::options();
    options.read(true).write(true).create(true).truncate(false);
    let file = options.open(path).map_err(|error| BenchError::Io(path.to_owned(), error))?;
    FileStore::exclusive(file).map_err(BenchError::volume("lock a file"))
}

/// A volume, half of which is used: as most are. Its blocks move into the other half, for which the store has room already.
pub(super) struct Fealty(Volume);

impl Fealty {
    pub(super) fn new(path: &Path, size: u64, direct: bool) -> Result<Self, BenchError> {
        let keeper = Keeper::new().map_err(BenchError::volume("make a key"))?;
        let volume = keeper.create(store_with(path, direct)?, 2 * size).map_err(BenchError::volume("make a volume"))?;
        let fealty = Self(volume);
        fill(&fealty, 2 * size)?;
        fealty.0.write_zeroes(size, size, false).map_err(BenchError::volume("write zeroes"))?;
        fealty.flush()?;
        Ok(fealty)
    }
}

impl Subject for Fealty {
    fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<(), BenchError> {
        self.0.read(offset, buffer).map_err(BenchError::volume("read"))
    }

    fn write(&self, offset: u64, data: &[u8]) -> Result<(), BenchError> {
        self.0.write(offset, data).map_err(BenchError::volume("write"))
    }

    fn flush(&self) -> Result<(), BenchError> {
        self.0.flush().map_err(BenchError::volume("flush"))
    }
}

/// The same store, in place and without crypto.
pub(super) struct Raw(FileStore);

impl Raw {
    pub(super) fn new(path: &Path, size: u64, direct: bool) -> Result<Self, BenchError> {
        let raw = store_with(path, direct)?;
        raw.set_len(size).map_err(|error| BenchError::Io(path.to_owned(), error))?;
        Ok(Self(raw))
    }
}

impl Subject for Raw {
    fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<(), BenchError> {
        self.0.read_at(buffer, offset).map_err(|error| BenchError::Io("reading".into(), error))
    }

    fn write(&self, offset: u64, data: &[u8]) -> Result<(), BenchError> {
        self.0.write_at(data, offset).map_err(|error| BenchError::Io("writing".into(), error))
    }

    fn flush(&self) -> Result<(), BenchError> {
        self.0.sync_data().map_err(|error| BenchError::Io("flushing".into(), error))
    }
}

/// The same crypto and the same store, and nothing else: no map, no log, no freshness. All requests of a size hold the same
/// bytes and are sealed as the same blocks, so that any can be read again; small and large ones lie in halves of their own.
pub(super) struct Loop {
    raw: Raw,
    size: u64,
    ciphers: Ciphers,
    small: Vec<Sealed>,
    large: Vec<Sealed>,
}

thread_local! {
    static CIPHERTEXT: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

impl Loop {
    pub(super) fn new(path: &Path, size: u64, direct: bool) -> Result<Self, BenchError> {
        let ciphers = Ciphers::best().map_err(BenchError::volume("expand a key"))?;
        let seal = |bytes| ciphers.seal(None, &mut vec![0x5a; bytes]).map_err(BenchError::volume("seal"));
        let (small, large) = (seal(4096)?, seal(1 << 20)?);
        let alike = Self { raw: Raw::new(path, 2 * size, direct)?, size, ciphers, small, large };
        let data = [0x5a; 4096];
        (0..size / 4096).try_for_each(|i| alike.write(i * 4096, &data))?;
        Ok(alike)
    }

    fn place(&self, offset: u64, bytes: usize) -> (u64, &[Sealed]) {
        if bytes == 4096 { (self.size + offset, &self.small) } else { (offset, &self.large) }
    }
}

impl Subject for Loop {
    fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<(), BenchError> {
        let (place, sealed) = self.place(offset, buffer.len());
        self.raw.read(place, buffer)?;
        if self.ciphers.open(sealed, buffer) { Ok(()) } else { Err(BenchError::Unequal("the loop's blocks")) }
    }

    fn write(&self, offset: u64, data: &[u8]) -> Result<(), BenchError> {
        CIPHERTEXT.with_borrow_mut(|ciphertext| {
            let start = grow(ciphertext, data.len());
            let ciphertext = &mut ciphertext[start..start + data.len()];
            self.ciphers.seal(Some(data), ciphertext).map_err(BenchError::volume("seal"))?;
            self.raw.write(self.place(offset, data.len()).0, ciphertext)
        })
    }

    fn flush(&self) -> Result<(), BenchError> {
        self.raw.flush()
    }

    fn warm(&self, bytes: usize) {
        CIPHERTEXT.with_borrow_mut(|ciphertext| grow(ciphertext, bytes));
    }
}

/// Makes room for `bytes` that begin where a page does; where that is.
fn grow(memory: &mut Vec<u8>, bytes: usize) -> usize {
    if memory.len() < bytes + 4096 {
        memory.resize(bytes + 4096, 0);
    }
    memory.as_ptr().align_offset(4096)
}
