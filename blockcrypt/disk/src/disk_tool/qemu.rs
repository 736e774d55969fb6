//! Images that are not raw, by `qemu-img`: it reads and writes them, and sees the volume's plain text over NBD on a socket that is
//! its standard input, which nobody else has. Nothing of it lies in a file on the way.

use super::holder::Holder;
use blockcrypt::{Volume, VolumeError};
use fealty_disk::{Disk, Fault, nbd};
use rustix::event::{PollFd, PollFlags, poll};
use serde::Deserialize;
use std::ffi::OsStr;
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

/// The volume as `qemu-img` names it: NBD on its descriptor 0.
const VOLUME: &str = "driver=nbd,server.type=fd,server.str=0";
/// Bytes of a complaint that are read.
const COMPLAINT: u64 = 8192;

/// Why `qemu-img` came to nothing.
#[derive(Debug, thiserror::Error)]
pub(crate) enum QemuError {
    #[error("qemu-img can't be run; install it (on Debian the package qemu-utils), or use a raw image")]
    Run(#[source] io::Error),
    #[error("qemu-img failed: {0}")]
    Failed(String),
    #[error("{0} can't be found")]
    Image(PathBuf, #[source] io::Error),
    #[error("what qemu-img says of {0} can't be read")]
    Info(PathBuf, #[source] serde_json::Error),
    #[error(
        "{0} is only a part of an image: its data lies in another file; make one image of both first (qemu-img convert)"
    )]
    Part(PathBuf),
}

/// What `qemu-img info` says of an image.
#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Info {
    virtual_size: u64,
    backing_filename: Option<String>,
    format_specific: Option<Specific>,
}

#[derive(Deserialize)]
struct Specific {
    data: Option<Details>,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Details {
    data_file: Option<String>,
}

/// A qcow2 image that stands by itself: naming another file in one is how an image reads what its reader may read.
#[derive(Debug)]
pub(crate) struct Qcow2 {
    path: PathBuf,
    /// Bytes that the guest sees.
    pub(crate) size: u64,
}

impl Qcow2 {
    pub(crate) fn open(path: &Path) -> Result<Self, QemuError> {
        // An absolute path is a path; others may be URLs to qemu-img.
        let absolute = std::fs::canonicalize(path).map_err(|e| QemuError::Image(path.to_owned(), e))?;
        let mut command = Command::new("qemu-img");
        command.args(["info", "--output=json", "-f", "qcow2"]).arg(&absolute).stdin(Stdio::null());
        let output = command.output().map_err(QemuError::Run)?;
        if !output.status.success() {
            return Err(failed(&output.stderr));
        }
        let info: Info = serde_json::from_slice(&output.stdout).map_err(|e| QemuError::Info(path.to_owned(), e))?;
        let data_file = info.format_specific.and_then(|s| s.data).and_then(|d| d.data_file);
        if info.backing_filename.is_some() || data_file.is_some() {
            return Err(QemuError::Part(path.to_owned()));
        }
        Ok(Self { path: absolute, size: info.virtual_size })
    }

    /// Writes the image's content to a new volume; how many bytes of data that were.
    pub(crate) fn import(&self, volume: &Volume, holder: &Holder) -> Result<u64, ConvertError> {
        let to = ["--target-image-opts", "--target-is-zero", "-n", "-m", "8", "-W"];
        let image = alone(&self.path)?;
        let words = to.iter().map(OsStr::new).chain([OsStr::new(&image), OsStr::new(VOLUME)]);
        Ok(convert(volume, holder, words)?.written)
    }
}

/// A qcow2 image as `qemu-img` is to open it: without what it may name as the image below it by now, whatever was looked at before.
fn alone(path: &Path) -> Result<String, QemuError> {
    let image = |error| QemuError::Image(path.to_owned(), error);
    let name = path.to_str().ok_or_else(|| image(io::Error::other("its name is not UTF-8")))?;
    let device = std::fs::metadata(path).map_err(image)?.file_type().is_block_device();
    let driver = if device { "host_device" } else { "file" };
    let options = serde_json::json!({
        "driver": "qcow2",
        "file": { "driver": driver, "filename": name },
        "backing": null,
    });
    Ok(format!("json:{options}"))
}

/// Writes a volume's content to a qcow2 image at `path`, which exists; how many bytes of it were read.
pub(crate) fn export(volume: &Volume, path: &Path, holder: &Holder) -> Result<u64, ConvertError> {
    let path = std::fs::canonicalize(path).map_err(|e| QemuError::Image(path.to_owned(), e))?;
    let from = ["--image-opts", "-m", "8", "-W", "-O", "qcow2", VOLUME];
    Ok(convert(volume, holder, from.iter().map(OsStr::new).chain([path.as_os_str()]))?.read)
}

/// Why a conversion came to nothing.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ConvertError {
    #[error(transparent)]
    Qemu(#[from] QemuError),
    #[error(transparent)]
    Volume(#[from] VolumeError),
}

/// Bytes that were moved.
struct Moved {
    read: u64,
    written: u64,
}

/// Runs `qemu-img convert` with the volume as its descriptor 0.
fn convert<'a>(
    volume: &Volume,
    holder: &Holder,
    words: impl Iterator<Item = &'a OsStr>,
) -> Result<Moved, ConvertError> {
    let (ours, theirs) = UnixStream::pair().map_err(QemuError::Run)?;
    let mut command = Command::new("qemu-img");
    command.arg("convert").args(words).stdin(OwnedFd::from(theirs)).stdout(Stdio::null()).stderr(Stdio::piped());
    let mut child = command.spawn().map_err(QemuError::Run)?;
    // It holds our copy of its descriptor.
    drop(command);
    let lent = Counted { volume, read: AtomicU64::new(0), written: AtomicU64::new(0), failed: Mutex::new(None) };
    let complaint = attend(&lent, ours, &mut child, holder);
    let status = child.wait().map_err(QemuError::Run)?;
    // What went wrong with the volume says more than what qemu-img made of it.
    if let Some(error) = lent.failed.into_inner().unwrap_or_else(PoisonError::into_inner) {
        return Err(error.into());
    }
    if !status.success() {
        return Err(failed(&complaint).into());
    }
    Ok(Moved { read: lent.read.into_inner(), written: lent.written.into_inner() })
}

/// Serves until the child has no more to ask, or the holder leaves; what the child complained about.
fn attend(lent: &Counted<'_>, stream: UnixStream, child: &mut Child, holder: &Holder) -> Vec<u8> {
    let mut complaint = Vec::new();
    let mut errors = child.stderr.take();
    let Ok((over, done)) = io::pipe() else { return complaint };
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut fds = [PollFd::new(holder, PollFlags::RDHUP), PollFd::new(&over, PollFlags::RDHUP)];
            while matches!(poll(&mut fds, None), Err(rustix::io::Errno::INTR)) {}
            if !fds[0].revents().is_empty() {
                let _ = child.kill();
            }
        });
        scope.spawn(|| {
            if let Some(errors) = &mut errors {
                let _ = errors.take(COMPLAINT).read_to_end(&mut complaint);
            }
        });
        nbd::attend(lent, "a volume", stream);
        drop(done);
    });
    complaint
}

fn failed(complaint: &[u8]) -> QemuError {
    let text = String::from_utf8_lossy(complaint);
    let line = text.lines().next().unwrap_or("it does not say why");
    QemuError::Failed(line.trim_start_matches("qemu-img: ").to_owned())
}

/// A volume whose first failure is remembered.
struct Counted<'a> {
    volume: &'a Volume,
    read: AtomicU64,
    written: AtomicU64,
    failed: Mutex<Option<VolumeError>>,
}

impl Counted<'_> {
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
        self.read.fetch_add(buffer.len() as u64, Ordering::Relaxed);
        self.told(self.volume.read(offset, buffer))
    }

    fn write(&self, offset: u64, data: &[u8]) -> Result<(), Fault> {
        self.written.fetch_add(data.len() as u64, Ordering::Relaxed);
        self.told(self.volume.write(offset, data))
    }

    fn read_many(&self, requests: &mut [(u64, &mut [u8])]) -> Vec<Result<(), Fault>> {
        let bytes: usize = requests.iter().map(|(_, buffer)| buffer.len()).sum();
        self.read.fetch_add(bytes as u64, Ordering::Relaxed);
        self.volume.read_many(requests).into_iter().map(|done| self.told(done)).collect()
    }

    fn write_many(&self, requests: &[(u64, &[u8])]) -> Vec<Result<(), Fault>> {
        let bytes: usize = requests.iter().map(|(_, data)| data.len()).sum();
        self.written.fetch_add(bytes as u64, Ordering::Relaxed);
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
