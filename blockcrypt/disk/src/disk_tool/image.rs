//! The raw image that an import reads: from a file or a device at places, from a pipe in order.

use super::blocks::BLOCK;
use super::size::Bytes;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{FileType, OFlags, SeekFrom, fcntl_getfl, fcntl_setfl, fstat, seek};
use rustix::io::Errno;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

const SECTOR: u64 = 512;

/// Why an image can't be read.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ImageError {
    #[error("image {0} can't be opened")]
    Open(PathBuf, #[source] io::Error),
    #[error("image {0} is a pipe, whose size is not known; give --size")]
    NoSize(PathBuf),
    #[error("image {0} is neither a file, a block device nor a pipe")]
    Kind(PathBuf),
    #[error("image {path} is empty; use create for an empty volume")]
    Empty { path: PathBuf },
    #[error("image {path} has {size} bytes, which is no multiple of {SECTOR}; give --size {}", size.next_multiple_of(SECTOR))]
    Uneven { path: PathBuf, size: u64 },
    #[error("image {path} has {} ({image} bytes), more than --size {wanted}", Bytes(*.image))]
    Larger { path: PathBuf, image: u64, wanted: u64 },
    #[error("image {path} ended after {got} of {wanted} bytes; is what makes it whole?")]
    Short { path: PathBuf, got: u64, wanted: u64 },
    #[error("image {path} goes on after the {wanted} bytes of --size; give its whole size")]
    Long { path: PathBuf, wanted: u64 },
    #[error("image {0} can't be read")]
    Read(PathBuf, #[source] io::Error),
    #[error("{path} has {room} bytes, but the volume has {wanted}; export to something larger")]
    NoRoom { path: PathBuf, room: u64, wanted: u64 },
    #[error("{0} can't be written")]
    Write(PathBuf, #[source] io::Error),
}

/// An image, read once from front to back.
#[derive(Debug)]
pub(crate) struct Image {
    path: PathBuf,
    file: File,
    /// Whether it can be read at places.
    seekable: bool,
    /// Its own bytes.
    size: u64,
    /// The bytes of the volume to be made of it.
    volume: u64,
    at: u64,
}

impl Image {
    /// The image at `path` (`-`: standard input), for a volume of `wanted` bytes, or of as many as the image has.
    pub(crate) fn open(path: &Path, wanted: Option<u64>) -> Result<Self, ImageError> {
        let named = |e| ImageError::Open(path.to_owned(), e);
        let file = match path.as_os_str().as_encoded_bytes() {
            b"-" => io::stdin().as_fd().try_clone_to_owned().map(File::from).map_err(named)?,
            _ => open(path).map_err(named)?,
        };
        let stat = fstat(&file).map_err(|e| named(e.into()))?;
        let own = match FileType::from_raw_mode(stat.st_mode) {
            _ if path.as_os_str() == "-" => None,
            FileType::RegularFile => Some(u64::try_from(stat.st_size).unwrap_or(0)),
            FileType::BlockDevice => Some(seek(&file, SeekFrom::End(0)).map_err(|e| named(e.into()))?),
            FileType::Fifo | FileType::CharacterDevice | FileType::Socket => None,
            _ => return Err(ImageError::Kind(path.to_owned())),
        };
        let path = path.to_owned();
        let Some(size) = own else {
            let size = wanted.ok_or_else(|| ImageError::NoSize(path.clone()))?;
            return Ok(Self { path, file, seekable: false, size, volume: size, at: 0 });
        };
        if size == 0 {
            return Err(ImageError::Empty { path });
        }
        let volume = wanted.unwrap_or(size);
        match () {
            () if volume < size => Err(ImageError::Larger { path, image: size, wanted: volume }),
            () if !volume.is_multiple_of(SECTOR) => Err(ImageError::Uneven { path, size: volume }),
            () => Ok(Self { path, file, seekable: true, size, volume, at: 0 }),
        }
    }

    /// Bytes of the volume to be made of it.
    pub(crate) fn volume_size(&self) -> u64 {
        self.volume
    }

    /// Whether reading never waits for somebody else.
    pub(crate) fn is_seekable(&self) -> bool {
        self.seekable
    }

    /// Reads the next piece into `buffer`; both are whole sectors. Holes of a file are passed over. Where it belongs and how many bytes it
    /// has; `None` at the end. A piece begins at a multiple of the block size.
    pub(crate) fn next(&mut self, buffer: &mut [u8]) -> Result<Option<(u64, usize)>, ImageError> {
        if self.seekable {
            self.at = self.data_from(self.at);
        }
        if self.at >= self.size {
            return self.end().map(|()| None);
        }
        let at = self.at;
        let length = usize::try_from(self.size - at).unwrap_or(usize::MAX).min(buffer.len());
        self.fill(at, &mut buffer[..length])?;
        self.at += length as u64;
        let whole = length.next_multiple_of(SECTOR as usize);
        buffer[length..whole].fill(0);
        Ok(Some((at, whole)))
    }

    /// The first block at or after `at` that the file system says holds data.
    fn data_from(&self, at: u64) -> u64 {
        match seek(&self.file, SeekFrom::Data(at)) {
            Ok(data) => (data.max(at) / BLOCK as u64) * BLOCK as u64,
            Err(Errno::NXIO) => self.size,
            Err(_) => at,
        }
        .max(at)
    }

    fn fill(&mut self, at: u64, buffer: &mut [u8]) -> Result<(), ImageError> {
        let read = if self.seekable {
            read_whole(buffer, |rest, done| self.file.read_at(rest, at + done))
        } else {
            if at == 0 {
                self.wait_for_writer();
            }
            let mut file = &self.file;
            read_whole(buffer, |rest, _| file.read(rest))
        };
        match read {
            Ok(n) if n == buffer.len() => Ok(()),
            Ok(n) => Err(ImageError::Short { path: self.path.clone(), got: at + n as u64, wanted: self.size }),
            Err(error) => Err(ImageError::Read(self.path.clone(), error)),
        }
    }

    /// A named pipe that nobody writes to yet has not ended.
    fn wait_for_writer(&self) {
        while let Err(Errno::INTR) = poll(&mut [PollFd::new(&self.file, PollFlags::IN)], None) {}
    }

    /// A pipe must end where `--size` says.
    fn end(&mut self) -> Result<(), ImageError> {
        if self.seekable {
            return Ok(());
        }
        let mut file = &self.file;
        match read_whole(&mut [0], |rest, _| file.read(rest)) {
            Ok(0) => Ok(()),
            Ok(_) => Err(ImageError::Long { path: self.path.clone(), wanted: self.size }),
            Err(error) => Err(ImageError::Read(self.path.clone(), error)),
        }
    }
}

impl AsFd for Image {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// The file at `path`, for reading. One that is a pipe is waited for only where it is read: what comes between need not wait.
fn open(path: &Path) -> io::Result<File> {
    let file = File::options().read(true).custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY).open(path)?;
    fcntl_setfl(&file, fcntl_getfl(&file)? - OFlags::NONBLOCK)?;
    Ok(file)
}

/// Reads until `buffer` is full or nothing more comes; how many bytes came.
fn read_whole(buffer: &mut [u8], mut read: impl FnMut(&mut [u8], u64) -> io::Result<usize>) -> io::Result<usize> {
    let mut done = 0;
    while done < buffer.len() {
        match read(&mut buffer[done..], done as u64) {
            Ok(0) => break,
            Ok(n) => done += n,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(done)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk_tool::blocks::PIECE;
    use std::io::Write;

    fn file(content: &[u8]) -> tempfile::NamedTempFile {
        let mut file = tempfile::NamedTempFile::new().expect("a file");
        file.write_all(content).expect("written");
        file
    }

    fn all(image: &mut Image) -> Result<Vec<u8>, ImageError> {
        let mut out = vec![0; usize::try_from(image.volume_size()).expect("small")];
        let mut buffer = vec![0xee; PIECE];
        while let Some((at, length)) = image.next(&mut buffer)? {
            out[at as usize..at as usize + length].copy_from_slice(&buffer[..length]);
        }
        Ok(out)
    }

    #[test]
    fn a_file_is_read_to_its_end_and_padded() {
        let content: Vec<u8> = (0..PIECE + 700).map(|i| i as u8 | 1).collect();
        let file = file(&content);
        assert!(matches!(Image::open(file.path(), None), Err(ImageError::Uneven { .. })));
        assert!(matches!(Image::open(file.path(), Some(512)), Err(ImageError::Larger { .. })));
        let wanted = PIECE as u64 + 8192;
        let mut image = Image::open(file.path(), Some(wanted)).expect("opens");
        let read = all(&mut image).expect("reads");
        assert!(read[..content.len()] == content && read[content.len()..].iter().all(|b| *b == 0));
        assert_eq!(read.len() as u64, wanted);
    }

    #[test]
    fn holes_are_passed_over() {
        let file = tempfile::NamedTempFile::new().expect("a file");
        file.as_file().set_len(1 << 40).expect("sparse");
        file.as_file().write_all_at(b"data", (1 << 39) + 5).expect("written");
        let mut image = Image::open(file.path(), None).expect("opens");
        let mut buffer = vec![0; PIECE];
        let mut seen = 0;
        while let Some((at, length)) = image.next(&mut buffer).expect("reads") {
            assert!(at.is_multiple_of(BLOCK as u64));
            seen += buffer[..length].windows(4).filter(|w| w == b"data").count();
        }
        assert_eq!(seen, 1);
    }

    #[test]
    fn a_pipe_gives_exactly_its_size() {
        let pipe = |content: &[u8], size: u64| {
            let (from, mut to) = io::pipe().expect("a pipe");
            to.write_all(content).expect("fits");
            drop(to);
            let file = File::from(std::os::fd::OwnedFd::from(from));
            all(&mut Image { path: "-".into(), file, seekable: false, size, volume: size, at: 0 })
        };
        assert_eq!(pipe(&[7; 1024], 1024).expect("good"), [7; 1024]);
        assert!(matches!(pipe(&[7; 1023], 1024), Err(ImageError::Short { got: 1023, .. })));
        assert!(matches!(pipe(&[7; 1025], 1024), Err(ImageError::Long { .. })));
    }

    #[test]
    fn what_is_no_image_is_refused() {
        let folder = tempfile::tempdir().expect("a folder");
        assert!(matches!(Image::open(folder.path(), None), Err(ImageError::Kind(_))));
        assert!(matches!(Image::open(&folder.path().join("none"), None), Err(ImageError::Open(..))));
        assert!(matches!(Image::open(file(b"").path(), None), Err(ImageError::Empty { .. })));
        assert!(matches!(Image::open(Path::new("/dev/zero"), None), Err(ImageError::NoSize(_))));
    }
}
