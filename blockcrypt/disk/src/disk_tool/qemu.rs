//! Images that are not raw, by `qemu-img`: it reads and writes them, and sees the volume's plain text over NBD on a socket that is
//! its standard input, which nobody else has. Nothing of it lies in a file on the way. An image that it reads, it sees over NBD too, on
//! its standard output.

use super::blocks::filled;
use super::holder::Holder;
use super::image::ImageError;
use super::progress::Progress;
use super::qcow2::Qcow2;
use super::salvage::Reader;
use blockcrypt::{Volume, VolumeError};
use fealty_disk::{Disk, Fault, nbd};
use rustix::event::{PollFd, PollFlags, poll};
use std::ffi::OsStr;
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;

/// The volume as `qemu-img` names it: NBD on its descriptor 0.
const VOLUME: &str = "driver=nbd,server.type=fd,server.str=0";
/// An image as `qemu-img` names it: on its descriptor 1, with nothing below it.
const IMAGE: &str =
    r#"json:{"driver":"qcow2","file":{"driver":"nbd","server":{"type":"fd","str":"1"}},"backing":null}"#;
/// Bytes of a complaint that are read.
const COMPLAINT: u64 = 8192;

/// Why `qemu-img` came to nothing.
#[derive(Debug, thiserror::Error)]
pub(crate) enum QemuError {
    #[error("qemu-img can't be run; install it (on Debian the package qemu-utils), or use a raw image")]
    Missing(#[source] io::Error),
    #[error("qemu-img can't be run")]
    Run(#[source] io::Error),
    #[error("qemu-img failed: {0}")]
    Failed(String),
    #[error("{0} can't be found")]
    NotFound(PathBuf, #[source] io::Error),
    #[error(transparent)]
    Image(#[from] ImageError),
    #[error("another program writes to {0}; stop that one first")]
    Busy(PathBuf),
    #[error("{0} is no qcow2 image of version 2 or 3")]
    Format(PathBuf),
    #[error(
        "{0} is only a part of an image: its data lies in another file; make one image of both first (qemu-img convert)"
    )]
    Part(PathBuf),
}

/// Writes the content of `image` to a new volume; how many bytes of data that were.
pub(crate) fn import(
    image: Qcow2,
    volume: &Volume,
    holder: &Holder,
    progress: &mut Progress,
) -> Result<u64, ConvertError> {
    let words = ["--target-image-opts", "--target-is-zero", "-n", "-m", "8", "-W", IMAGE, VOLUME];
    let moved = convert(&Reader::strict(volume), Some(&image), holder, progress, words.iter().map(OsStr::new));
    // What went wrong with the image says more than what qemu-img made of it.
    match (moved, image.into_failure()) {
        (Err(ConvertError::Qemu(_)), Some(error)) => Err(QemuError::Image(error).into()),
        (moved, _) => Ok(moved?.written),
    }
}

/// Writes a volume's content to a qcow2 image at `path`, which exists; how many bytes of it were not zero.
pub(crate) fn export(
    reader: &Reader<'_>,
    path: &Path,
    holder: &Holder,
    progress: &mut Progress,
) -> Result<u64, ConvertError> {
    // An absolute path is a path; others may be URLs to qemu-img.
    let path = std::fs::canonicalize(path).map_err(|e| QemuError::NotFound(path.to_owned(), e))?;
    let from = ["--image-opts", "-m", "8", "-W", "-O", "qcow2", VOLUME];
    Ok(convert(reader, None, holder, progress, from.iter().map(OsStr::new).chain([path.as_os_str()]))?.read)
}

/// Why a conversion came to nothing.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ConvertError {
    #[error(transparent)]
    Qemu(#[from] QemuError),
    #[error(transparent)]
    Volume(#[from] VolumeError),
}

/// Bytes of data that were moved.
struct Moved {
    read: u64,
    written: u64,
}

/// Runs `qemu-img convert` with the volume as its descriptor 0, and an image as its descriptor 1 if there is one.
fn convert<'a>(
    reader: &Reader<'_>,
    image: Option<&Qcow2>,
    holder: &Holder,
    progress: &mut Progress,
    words: impl Iterator<Item = &'a OsStr>,
) -> Result<Moved, ConvertError> {
    let (ours, theirs) = UnixStream::pair().map_err(QemuError::Run)?;
    let mut command = Command::new("qemu-img");
    command.arg("convert").args(words).stdin(OwnedFd::from(theirs)).stdout(Stdio::null()).stderr(Stdio::piped());
    let mut source = None;
    if let Some(image) = image {
        let (ours, theirs) = UnixStream::pair().map_err(QemuError::Run)?;
        command.stdout(OwnedFd::from(theirs));
        source = Some((image, ours));
    }
    let mut child = command.spawn().map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => QemuError::Missing(error),
        _ => QemuError::Run(error),
    })?;
    // It holds our copies of its descriptors.
    drop(command);
    let lent = Counted {
        reader,
        volume: reader.volume,
        read: AtomicU64::new(0),
        written: AtomicU64::new(0),
        reached: Mutex::new((progress, 0)),
        failed: Mutex::new(None),
    };
    let attended = attend(&lent, ours, source, &mut child, holder);
    // Where it is not attended to, it has lost its disk, and ends.
    let status = child.wait().map_err(QemuError::Run)?;
    let complaint = attended.map_err(QemuError::Run)?;
    // What went wrong with the volume says more than what qemu-img made of it.
    if let Some(error) = lent.failed.into_inner().unwrap_or_else(PoisonError::into_inner) {
        return Err(error.into());
    }
    if !status.success() {
        return Err(failed(&complaint).into());
    }
    Ok(Moved { read: lent.read.into_inner(), written: lent.written.into_inner() })
}

/// Serves until the child has no more to ask, or the holder leaves; what the child complained about. An error where the system has no
/// threads or descriptors for that.
fn attend(
    lent: &Counted<'_>,
    stream: UnixStream,
    source: Option<(&Qcow2, UnixStream)>,
    child: &mut Child,
    holder: &Holder,
) -> io::Result<Vec<u8>> {
    let mut complaint = Vec::new();
    let mut errors = child.stderr.take();
    let (over, done) = io::pipe()?;
    let thread = || thread::Builder::new().name("qemu-img".to_owned());
    thread::scope(|scope| {
        // Whoever returns early drops what the others wait for: `done`, and with the streams the child's last words.
        let (done, stream) = (done, stream);
        thread().spawn_scoped(scope, || {
            let mut fds = [PollFd::new(holder, PollFlags::RDHUP), PollFd::new(&over, PollFlags::RDHUP)];
            while matches!(poll(&mut fds, None), Err(rustix::io::Errno::INTR)) {}
            if !fds[0].revents().is_empty() {
                let _ = child.kill();
            }
        })?;
        thread().spawn_scoped(scope, || {
            if let Some(errors) = &mut errors {
                let _ = errors.take(COMPLAINT).read_to_end(&mut complaint);
            }
        })?;
        if let Some((image, stream)) = source {
            thread().spawn_scoped(scope, move || nbd::attend(image, "an image", stream))?;
        }
        nbd::attend(lent, "a volume", stream);
        drop(done);
        Ok::<_, io::Error>(())
    })?;
    Ok(complaint)
}

fn failed(complaint: &[u8]) -> QemuError {
    let text = String::from_utf8_lossy(complaint);
    let line = text.lines().next().unwrap_or("it does not say why");
    QemuError::Failed(line.trim_start_matches("qemu-img: ").to_owned())
}

/// A volume whose first failure is remembered.
struct Counted<'a> {
    reader: &'a Reader<'a>,
    volume: &'a Volume,
    read: AtomicU64,
    written: AtomicU64,
    /// How far the work has come.
    reached: Mutex<(&'a mut Progress, u64)>,
    failed: Mutex<Option<VolumeError>>,
}

impl Counted<'_> {
    /// A request before `end` is done.
    fn reach(&self, end: u64) {
        let mut reached = self.reached.lock().unwrap_or_else(PoisonError::into_inner);
        let (progress, before) = &mut *reached;
        *before = end.max(*before);
        progress.at(*before);
    }

    fn count_read(&self, offset: u64, buffer: &[u8]) {
        let data: u64 = filled(buffer).map(|(_, run)| run.len() as u64).sum();
        self.read.fetch_add(data, Ordering::Relaxed);
        self.reach(offset + buffer.len() as u64);
    }

    fn count_written(&self, offset: u64, data: &[u8]) {
        self.written.fetch_add(data.len() as u64, Ordering::Relaxed);
        self.reach(offset + data.len() as u64);
    }

    fn told(&self, done: Result<(), VolumeError>) -> Result<(), Fault> {
        done.map_err(|error| {
            let fault = Fault::from(&error);
            self.failed.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
            fault
        })
    }
}

impl Disk for Counted<'_> {
    fn size(&self) -> u64 {
        self.volume.size()
    }

    fn read_only(&self) -> bool {
        self.volume.read_only()
    }

    fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<(), Fault> {
        let read = self.reader.read(offset, buffer);
        self.count_read(offset, buffer);
        self.told(read)
    }

    fn write(&self, offset: u64, data: &[u8]) -> Result<(), Fault> {
        self.count_written(offset, data);
        self.told(self.volume.write(offset, data))
    }

    fn read_many(&self, requests: &mut [(u64, &mut [u8])]) -> Vec<Result<(), Fault>> {
        let read = self.reader.read_many(requests);
        requests.iter().for_each(|(offset, buffer)| self.count_read(*offset, buffer));
        read.into_iter().map(|done| self.told(done)).collect()
    }

    fn write_many(&self, requests: &[(u64, &[u8])]) -> Vec<Result<(), Fault>> {
        requests.iter().for_each(|(offset, data)| self.count_written(*offset, data));
        self.volume.write_many(requests).into_iter().map(|done| self.told(done)).collect()
    }

    fn flush(&self) -> Result<(), Fault> {
        self.told(self.volume.flush())
    }

    fn discard(&self, offset: u64, length: u64) -> Result<(), Fault> {
        self.told(self.volume.discard(offset, length))
    }

    fn write_zeroes(&self, offset: u64, length: u64, may_unmap: bool) -> Result<(), Fault> {
        self.told(self.volume.write_zeroes(offset, length, may_unmap))
    }
}
