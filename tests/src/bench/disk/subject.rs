//! The files that the benchmark's subjects lie in, and the subject that only it has: the same crypto in a loop.

use crate::bench::BenchError;
use blockcrypt::FileStore;
use blockcrypt::bench::{Ciphers, Sealed};
use fealty_disk::bench::{MeasureError, Plain, Subject};
use std::cell::RefCell;
use std::fs::File;
use std::path::Path;

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

/// The same crypto and the same store, and nothing else: no map, no log, no freshness. All requests of a size hold the same
/// bytes and are sealed as the same blocks, so that any can be read again; small and large ones lie in halves of their own.
pub(super) struct Loop {
    raw: Plain<FileStore>,
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
        let alike = Self { raw: Plain::new(store_with(path, direct)?, 2 * size)?, size, ciphers, small, large };
        let data = [0x5a; 4096];
        (0..size / 4096).try_for_each(|i| alike.write(&[(i * 4096, &data)]))?;
        Ok(alike)
    }

    fn place(&self, offset: u64, bytes: usize) -> (u64, &[Sealed]) {
        if bytes == 4096 { (self.size + offset, &self.small) } else { (offset, &self.large) }
    }
}

impl Subject for Loop {
    fn read(&self, parts: &mut [(u64, &mut [u8])]) -> Result<(), MeasureError> {
        let mut sealed = Vec::with_capacity(parts.len());
        for (offset, buffer) in &mut *parts {
            let (place, blocks) = self.place(*offset, buffer.len());
            *offset = place;
            sealed.push(blocks);
        }
        self.raw.read(parts)?;
        let mut opened = sealed.iter().zip(parts).map(|(sealed, (_, buffer))| self.ciphers.open(sealed, buffer));
        if opened.all(|good| good) { Ok(()) } else { Err(MeasureError::Unequal("the loop's blocks")) }
    }

    fn write(&self, parts: &[(u64, &[u8])]) -> Result<(), MeasureError> {
        CIPHERTEXT.with_borrow_mut(|ciphertext| {
            let start = grow(ciphertext, parts.iter().map(|(_, data)| data.len()).sum());
            let mut rest = &mut ciphertext[start..];
            let mut sealed = Vec::with_capacity(parts.len());
            for (offset, data) in parts {
                let (own, after) = std::mem::take(&mut rest).split_at_mut(data.len());
                self.ciphers.seal(Some(data), own).map_err(MeasureError::volume("seal"))?;
                sealed.push((self.place(*offset, data.len()).0, &*own));
                rest = after;
            }
            self.raw.write(&sealed)
        })
    }

    fn flush(&self) -> Result<(), MeasureError> {
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
