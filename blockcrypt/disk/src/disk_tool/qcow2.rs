//! qcow2 images: what is read of one here, and what `qemu-img` sees of it.
//!
//! An image may name other files: one that it builds on, one that holds its data. Whoever wrote it would have its reader read those to
//! him. So only an image that stands by itself is taken; and `qemu-img` is given no path, but sees the file that was opened over NBD,
//! with the header that was looked at, whatever is written to the file meanwhile.

use super::image::ImageError;
use super::open_for_reading;
use super::qemu::QemuError;
use super::qemu_lock::keep_writers_away;
use fealty_disk::{Disk, Fault};
use rustix::fs::{FileType, SeekFrom, fstat, seek};
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

const SECTOR: usize = 512;
/// Bytes of the header that say what an image is (QEMU's docs/interop/qcow2.txt).
const HEADER: usize = 104;
const MAGIC: &[u8] = b"QFI\xfb";
/// The incompatible feature "external data file".
const DATA_FILE: u64 = 1 << 2;

/// A qcow2 image that stands by itself, for `qemu-img` to read.
#[derive(Debug)]
pub(crate) struct Qcow2 {
    path: PathBuf,
    file: File,
    /// Bytes of the file.
    length: u64,
    /// Its first sector, as it was looked at.
    head: [u8; SECTOR],
    /// Bytes that the guest sees.
    pub(crate) size: u64,
    failed: Mutex<Option<io::Error>>,
}

impl Qcow2 {
    pub(crate) fn open(path: &Path) -> Result<Self, QemuError> {
        let failed = |e| QemuError::Image(ImageError::Read(path.to_owned(), e));
        let file = open_for_reading(path).map_err(|e| ImageError::Open(path.to_owned(), e))?;
        match FileType::from_raw_mode(fstat(&file).map_err(|e| failed(e.into()))?.st_mode) {
            FileType::RegularFile | FileType::BlockDevice => {}
            _ => return Err(ImageError::Kind(path.to_owned()).into()),
        }
        if !keep_writers_away(&file).map_err(failed)? {
            return Err(QemuError::Busy(path.to_owned()));
        }
        let length = seek(&file, SeekFrom::End(0)).map_err(|e| failed(e.into()))?;
        let mut head = [0; SECTOR];
        let known = usize::try_from(length).unwrap_or(SECTOR).min(SECTOR);
        file.read_exact_at(&mut head[..known], 0).map_err(failed)?;
        let size = guest_size(&head[..known], path)?;
        Ok(Self { path: path.to_owned(), file, length, head, size, failed: Mutex::default() })
    }

    /// Why it could not be read, if it could not.
    pub(crate) fn into_failure(self) -> Option<ImageError> {
        let failed = self.failed.into_inner().unwrap_or_else(PoisonError::into_inner);
        failed.map(|error| ImageError::Read(self.path, error))
    }

    fn fill(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        // It is offered in whole sectors, and may end within one.
        let there = usize::try_from(self.length.saturating_sub(offset)).unwrap_or(usize::MAX).min(buffer.len());
        let (data, behind) = buffer.split_at_mut(there);
        self.file.read_exact_at(data, offset)?;
        behind.fill(0);
        if offset < SECTOR as u64 {
            // Requests are sectors: it is all of the first one.
            data.iter_mut().zip(&self.head).for_each(|(byte, looked_at)| *byte = *looked_at);
        }
        Ok(())
    }
}

/// The size of an image with this header.
fn guest_size(head: &[u8], path: &Path) -> Result<u64, QemuError> {
    let header: &[u8; HEADER] = head.first_chunk().ok_or_else(|| QemuError::Format(path.to_owned()))?;
    let u64_at = |at| u64::from_be_bytes(std::array::from_fn(|i| header[at + i]));
    let version = u32::from_be_bytes(std::array::from_fn(|i| header[4 + i]));
    if !header.starts_with(MAGIC) || !(2..=3).contains(&version) {
        return Err(QemuError::Format(path.to_owned()));
    }
    let (backing, features) = (u64_at(8), if version > 2 { u64_at(72) } else { 0 });
    if backing != 0 || features & DATA_FILE != 0 {
        return Err(QemuError::Part(path.to_owned()));
    }
    Ok(u64_at(24) / SECTOR as u64 * SECTOR as u64)
}

impl Disk for Qcow2 {
    fn size(&self) -> u64 {
        self.length.next_multiple_of(SECTOR as u64)
    }

    fn read_only(&self) -> bool {
        true
    }

    fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<(), Fault> {
        self.fill(offset, buffer).map_err(|error| {
            self.failed.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
            Fault::Io
        })
    }

    fn write(&self, _: u64, _: &[u8]) -> Result<(), Fault> {
        Err(Fault::ReadOnly)
    }

    fn flush(&self) -> Result<(), Fault> {
        Ok(())
    }

    fn discard(&self, _: u64, _: u64) -> Result<(), Fault> {
        Err(Fault::ReadOnly)
    }

    fn write_zeroes(&self, _: u64, _: u64, _: bool) -> Result<(), Fault> {
        Err(Fault::ReadOnly)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn header(version: u32, backing: u64, features: u64) -> [u8; 1000] {
        let mut bytes = [0x55; 1000];
        bytes[..4].copy_from_slice(MAGIC);
        bytes[4..8].copy_from_slice(&version.to_be_bytes());
        bytes[8..16].copy_from_slice(&backing.to_be_bytes());
        bytes[24..32].copy_from_slice(&(4096_u64 + 7).to_be_bytes());
        bytes[72..80].copy_from_slice(&features.to_be_bytes());
        bytes
    }

    fn open(bytes: &[u8]) -> (tempfile::NamedTempFile, Result<Qcow2, QemuError>) {
        let mut file = tempfile::NamedTempFile::new().expect("a file");
        file.write_all(bytes).expect("written");
        let opened = Qcow2::open(file.path());
        (file, opened)
    }

    #[test]
    fn only_an_image_that_stands_by_itself_is_taken() {
        for (bytes, good) in [(header(3, 0, 1 << 3), true), (header(2, 0, u64::MAX), true), (header(3, 0, 0), true)] {
            assert_eq!(open(&bytes).1.is_ok_and(|image| image.size == 4096), good);
        }
        for bytes in [header(3, 200, 0), header(2, 200, 0), header(3, 0, DATA_FILE | 1)] {
            assert!(matches!(open(&bytes).1, Err(QemuError::Part(_))));
        }
        for bytes in [&header(1, 0, 0)[..], &header(4, 0, 0), &header(3, 0, 0)[..HEADER - 1], &[0; 4096], b""] {
            assert!(matches!(open(bytes).1, Err(QemuError::Format(_))));
        }
        assert!(matches!(Qcow2::open(Path::new("/")), Err(QemuError::Image(_))));
    }

    #[test]
    fn whatever_is_written_to_it_its_header_is_the_one_that_was_looked_at() {
        let good = header(3, 0, 0);
        let (file, image) = open(&good);
        let image = image.expect("an image");
        assert_eq!(image.size(), 1024);
        file.as_file().write_all_at(&[0xee; 1000], 0).expect("written");
        let mut found = [9; 1024];
        image.read(0, &mut found).expect("read");
        assert!(found[..512] == good[..512] && found[512..1000] == [0xee; 488] && found[1000..] == [0; 24]);
        image.read(512, &mut found[..512]).expect("read");
        assert!(found[..488] == [0xee; 488] && found[488..512] == [0; 24]);
        file.as_file().set_len(600).expect("shortened");
        assert!(matches!(image.read(512, &mut found[..512]), Err(Fault::Io)));
        assert!(image.write(0, &found).is_err() && image.into_failure().is_some());
    }
}
