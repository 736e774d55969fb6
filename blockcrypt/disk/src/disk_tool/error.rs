//! Why the tool came to nothing, and the exit code that says so.

use super::control::ControlError;
use super::holder::HolderError;
use super::image::ImageError;
use super::inherit::InheritError;
use super::make::MakeError;
use super::place::PlaceError;
use super::qemu::{ConvertError, QemuError};
use super::scratch::ScratchError;
use blockcrypt::VolumeError;
use fealty_disk::SocketError;
use fealty_disk::bench::MeasureError;
use std::io;
use std::path::{Path, PathBuf};

/// What ends the tool with another code than 0.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ToolError {
    #[error(
        "{0} needs the volume's key: run it as fealty-keys volume exec CUSTOMER VOLUME -- fealty-disk {0} ... (it appends --keys-fd)"
    )]
    NoKeys(&'static str),
    #[error(transparent)]
    Inherit(#[from] InheritError),
    #[error(transparent)]
    Holder(#[from] HolderError),
    #[error("{0} can't be opened")]
    Open(PathBuf, #[source] io::Error),
    #[error("{0}")]
    Volume(PathBuf, #[source] VolumeError),
    #[error(transparent)]
    Make(#[from] MakeError),
    #[error(transparent)]
    Place(#[from] PlaceError),
    #[error(transparent)]
    Image(#[from] ImageError),
    #[error(transparent)]
    Qemu(#[from] QemuError),
    #[error("qcow2 can't be read from or written to {0}; name a file")]
    NotAFile(PathBuf),
    #[error(
        "{0} and {1} are the same file, or {0} has the name that {1} has before it is complete; name another one to make"
    )]
    SameFile(PathBuf, PathBuf),
    #[error("{path} is not whole: {bad} bad blocks, {problems} other problems; restore it from a copy")]
    Bad { path: PathBuf, bad: u64, problems: u64 },
    #[error(
        "{lost} blocks of {path} can't be read, and are zeroes in the image, which is made; restore them from a copy"
    )]
    Salvaged { path: PathBuf, lost: u64 },
    #[error("{0} was overwritten in part")]
    Overwritten(PathBuf, #[source] Box<ToolError>),
    #[error(
        "there is no clone, but the key provider has its name {0}, and takes it from the next run, once this is mended"
    )]
    Uncloned(String, #[source] Box<ToolError>),
    #[error("{0} is as large as it was; say --discard-tail if what lies behind the new end may be lost")]
    Tail(PathBuf, #[source] VolumeError),
    #[error("it is done, and need not be done again, but the audit log did not take all that is to be said of it: {0}")]
    Untold(String),
    #[error("{0} would be unreadable for ever; say --force if that is meant")]
    Unforced(PathBuf),
    #[error("the keys of {0} are retired, but its key slots are not destroyed yet; run fealty-disk erase {0} --force")]
    Retired(PathBuf, #[source] VolumeError),
    #[error("the process can't be protected")]
    Harden(#[from] secretmem::SecretError),
    #[error("signals can't be watched for")]
    Signals(#[source] io::Error),
    #[error(transparent)]
    Socket(#[from] SocketError),
    #[error(transparent)]
    Control(#[from] ControlError),
    #[error("no thread for the {0}")]
    Thread(&'static str, #[source] io::Error),
    #[error("clients can't be waited for")]
    Serve(#[source] io::Error),
    #[error(transparent)]
    Scratch(#[from] ScratchError),
    #[error("{0}")]
    Bench(PathBuf, #[source] MeasureError),
    #[error("standard output takes no more")]
    Output(#[source] io::Error),
}

impl ToolError {
    /// A conversion of the volume at `path` that came to nothing.
    pub(crate) fn converting(path: &Path, error: ConvertError) -> Self {
        match error {
            ConvertError::Qemu(error) => error.into(),
            ConvertError::Volume(error) => Self::Volume(path.to_owned(), error),
        }
    }

    /// Whether a volume stands complete all the same.
    pub(crate) fn leaves_a_volume(&self) -> bool {
        match self {
            Self::Make(MakeError::Unknown { .. } | MakeError::Close { .. }) => true,
            Self::Overwritten(_, error) => error.leaves_a_volume(),
            _ => false,
        }
    }

    /// What `--help` promises.
    pub(crate) fn code(&self) -> u8 {
        match self {
            Self::Scratch(ScratchError::Size(_) | ScratchError::Kind(_))
            | Self::NoKeys(_)
            | Self::Inherit(_)
            | Self::Unforced(_)
            | Self::NotAFile(_) => USAGE,
            Self::Holder(HolderError::Secret(_)) => FAILED,
            Self::Holder(_) | Self::Make(MakeError::Anchor(_)) | Self::Untold(_) => REFUSED,
            Self::Volume(_, error) => of_volume(error),
            Self::Bad { .. } | Self::Salvaged { .. } => BAD,
            Self::Overwritten(_, error) | Self::Uncloned(_, error) => error.code(),
            _ => FAILED,
        }
    }
}

const FAILED: u8 = 1;
const USAGE: u8 = 2;
const BAD: u8 = 3;
const REFUSED: u8 = 4;

fn of_volume(error: &VolumeError) -> u8 {
    match error {
        error if error.is_integrity() => BAD,
        VolumeError::WrongKey
        | VolumeError::NoAnchor
        | VolumeError::Exists
        | VolumeError::StaleOpenNumber { .. }
        | VolumeError::KeyExhausted(_)
        | VolumeError::Grant(_)
        | VolumeError::Anchor(_) => REFUSED,
        VolumeError::Size { .. } | VolumeError::Room { .. } | VolumeError::SnapshotName => USAGE,
        _ => FAILED,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use secretmem::SecretError;

    #[test]
    fn no_memory_for_keys_is_no_refusal() {
        let error = SecretError::Exhausted { bytes: 4096, source: io::Error::from_raw_os_error(libc::EAGAIN) };
        assert_eq!(ToolError::from(HolderError::from(error)).code(), FAILED);
    }
}
