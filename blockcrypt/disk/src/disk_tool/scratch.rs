//! Files that nobody finds, and parts of a device: what a measurement writes to, and leaves nothing of.

use super::size::Bytes;
use blockcrypt::{FileStore, Next, Ready, Store};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Why there is nothing to write to.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ScratchError {
    #[error("{0} is neither a folder nor a block device")]
    Kind(PathBuf),
    #[error("a measurement takes 16M to 1T, a multiple of 1M; not {0} bytes")]
    Size(u64),
    #[error("{path} has {}, but this takes {}; give a smaller --size", Bytes(*.room), Bytes(*.wanted))]
    Small { path: PathBuf, room: u64, wanted: u64 },
    #[error("no scratch file can be made in {0}")]
    File(PathBuf, #[source] io::Error),
    #[error("{0} failed")]
    Io(PathBuf, #[source] io::Error),
}

/// A file in `folder` that has no name, and goes with this process whatever ends it.
pub(crate) fn unnamed(folder: &Path) -> Result<File, ScratchError> {
    let failed = |error| ScratchError::File(folder.to_owned(), error);
    let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
    match rustix::fs::open(folder, flags, Mode::RUSR | Mode::WUSR) {
        Ok(file) => Ok(file.into()),
        // Some file systems know no such thing.
        Err(Errno::OPNOTSUPP | Errno::ISDIR | Errno::INVAL) => renounced(folder).map_err(failed),
        Err(error) => Err(failed(error.into())),
    }
}

/// A file whose name is removed at once.
fn renounced(folder: &Path) -> io::Result<File> {
    let path = folder.join(format!(".fealty-disk.{}", std::process::id()));
    let file = OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(&path)?;
    fs::remove_file(&path)?;
    Ok(file)
}

/// Makes the first `bytes` of a device, which held a volume, hold none: its superblocks, at both ends, are zero.
pub(crate) fn wipe(store: &FileStore, bytes: u64) -> io::Result<()> {
    // A device that can't discard keeps blocks that no key opens.
    let _ = store.punch(0, bytes);
    let zeroes = vec![0; 64 << 10];
    let end = zeroes.len() as u64;
    store.write_at(&zeroes, 0)?;
    store.write_at(&zeroes, bytes.saturating_sub(end))?;
    store.sync_data()
}

/// A part of a device.
pub(crate) struct Part {
    store: Arc<FileStore>,
    start: u64,
    bytes: u64,
}

impl Part {
    pub(crate) fn new(store: Arc<FileStore>, start: u64, bytes: u64) -> Self {
        Self { store, start, bytes }
    }

    /// Where `offset` lies in the device, if the `length` bytes behind it are all in this part.
    fn place(&self, offset: u64, length: usize) -> io::Result<u64> {
        let end = offset.checked_add(length as u64).filter(|end| *end <= self.bytes);
        end.map(|_| self.start + offset).ok_or_else(|| io::ErrorKind::UnexpectedEof.into())
    }

    fn placed<'a>(&self, parts: &[(u64, &'a [u8])]) -> io::Result<Vec<(u64, &'a [u8])>> {
        parts.iter().map(|(offset, bytes)| Ok((self.place(*offset, bytes.len())?, *bytes))).collect()
    }
}

impl Store for Part {
    fn len(&self) -> io::Result<u64> {
        Ok(self.bytes)
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        self.store.read_at(buffer, self.place(offset, buffer.len())?)
    }

    fn read_many_at(&self, parts: &mut [(u64, &mut [u8])]) -> io::Result<()> {
        let ends = [parts.len()];
        self.read_lots_at(parts, &ends, &mut |_| {})
    }

    fn overlaps(&self) -> bool {
        self.store.overlaps()
    }

    fn read_lots_at(&self, parts: &mut [(u64, &mut [u8])], ends: &[usize], ready: &mut Ready) -> io::Result<()> {
        for (offset, buffer) in &mut *parts {
            *offset = self.place(*offset, buffer.len())?;
        }
        self.store.read_lots_at(parts, ends, ready)
    }

    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.store.write_at(bytes, self.place(offset, bytes.len())?)
    }

    fn write_many_at(&self, parts: &[(u64, &[u8])]) -> io::Result<()> {
        self.store.write_many_at(&self.placed(parts)?)
    }

    fn write_lots_at<'a>(&self, next: &mut Next<'a, '_>) -> io::Result<()> {
        let mut outside = Ok(());
        let done = self.store.write_lots_at(&mut || self.placed(&next()?).map_err(|error| outside = Err(error)).ok());
        outside.and(done)
    }

    fn sync_data(&self) -> io::Result<()> {
        self.store.sync_data()
    }

    fn set_len(&self, bytes: u64) -> io::Result<()> {
        if bytes <= self.bytes { Ok(()) } else { Err(io::ErrorKind::StorageFull.into()) }
    }

    fn punch(&self, offset: u64, bytes: u64) -> io::Result<()> {
        let length = usize::try_from(bytes).map_err(|_| io::ErrorKind::UnexpectedEof)?;
        self.store.punch(self.place(offset, length)?, bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_scratch_file_has_no_name() {
        let folder = tempfile::tempdir().expect("a folder");
        for file in [unnamed(folder.path()).expect("made"), renounced(folder.path()).expect("made")] {
            file.set_len(4096).expect("usable");
            assert_eq!(fs::read_dir(folder.path()).expect("a folder").count(), 0);
        }
        assert!(matches!(unnamed(&folder.path().join("none")), Err(ScratchError::File(..))));
    }

    #[test]
    fn a_part_reaches_nothing_else() {
        let file = tempfile::tempfile().expect("a file");
        file.set_len(16384).expect("longer");
        let store = Arc::new(FileStore::exclusive(file).expect("locked"));
        let (one, two) = (Part::new(store.clone(), 0, 8192), Part::new(store.clone(), 8192, 4096));
        one.write_at(&[1; 8192], 0).expect("within");
        two.write_many_at(&[(0, &[2; 2048]), (2048, &[3; 2048])]).expect("within");
        for (offset, length) in [(1, 4096), (4096, 1), (u64::MAX, 1)] {
            assert!(
                two.write_at(&vec![9; length], offset).is_err() && two.read_at(&mut vec![9; length], offset).is_err()
            );
            assert!(
                two.write_many_at(&[(offset, &vec![9; length])]).is_err() && two.punch(offset, length as u64).is_err()
            );
            let nines = vec![9; length];
            let mut lots = vec![vec![(offset, &nines[..])]];
            assert!(two.write_lots_at(&mut || lots.pop()).is_err());
        }
        assert!(two.set_len(4096).is_ok() && two.set_len(4097).is_err());
        let mut found = vec![0; 16384];
        store.read_at(&mut found, 0).expect("read");
        assert_eq!((found[8191], found[8192], found[12287], found[12288]), (1, 2, 3, 0));
        let mut part = [0; 1];
        two.read_many_at(&mut [(4095, &mut part)]).expect("within");
        assert_eq!(part, [3]);
    }
}
