//! Images of an unprotected VM's disks: whose they are, and what may be one.

use crate::opener::{Access, check_kind};
use rustix::fs::{FlockOperation, OFlags, fcntl_getfl, flock};
use std::fs::File;
use std::io::ErrorKind;
use std::os::fd::OwnedFd;

/// A disk's image, taken until this is dropped: for writing by one disk of one VM, for reading by several. To be dropped when nothing is
/// under way: the kernel alone, which looks for that, takes its time.
pub struct Taken(File);

impl Taken {
    /// Takes `file`; where that can't be, what is to be said of it.
    pub fn take(file: &File, read_only: bool) -> Result<Self, String> {
        blockcrypt::lock(file, read_only).and_then(|()| file.try_clone()).map(Self).map_err(|error| {
            match error.kind() {
                ErrorKind::WouldBlock => "is in use by another disk or another VM".into(),
                _ => format!("can't be locked: {error}"),
            }
        })
    }
}

impl Drop for Taken {
    fn drop(&mut self) {
        // What fails is done when the process ends.
        let _ = flock(&self.0, FlockOperation::Unlock);
    }
}

/// The image behind a descriptor that somebody passed, if a disk can be made of it; what is to be said of it where not.
pub fn passed(descriptor: OwnedFd, read_only: bool) -> Result<File, String> {
    let access = if read_only { Access::ReadStore } else { Access::WriteStore };
    check_kind(&descriptor, access)?;
    let flags = fcntl_getfl(&descriptor).map_err(|e| format!("can't be looked at: {e}"))?;
    let mode = flags.intersection(OFlags::RWMODE);
    if flags.contains(OFlags::PATH) || !(mode == OFlags::RDWR || read_only && mode == OFlags::RDONLY) {
        return Err("is not open for what the disk does: reading, and writing unless it is read only".into());
    }
    // pwrite(2) would write at the file's end, wherever it is told to.
    if flags.contains(OFlags::APPEND) {
        return Err("is open for appending, which is no way to write a disk".into());
    }
    Ok(descriptor.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_descriptor_must_be_open_for_what_the_disk_does() {
        let folder = tempfile::tempdir().expect("folder");
        let path = folder.path().join("image");
        std::fs::write(&path, [0; 512]).expect("written");
        let open = |read: bool, write: bool, append: bool| {
            OwnedFd::from(File::options().read(read).write(write).append(append).open(&path).expect("open"))
        };
        assert!(passed(open(true, true, false), false).is_ok() && passed(open(true, true, false), true).is_ok());
        assert!(passed(open(true, false, false), true).is_ok());
        assert!(passed(open(true, false, false), false).is_err_and(|why| why.contains("not open for")));
        assert!(passed(open(false, true, false), true).is_err_and(|why| why.contains("not open for")));
        assert!(passed(open(true, true, true), false).is_err_and(|why| why.contains("appending")));
        let only_path = rustix::fs::open(&path, OFlags::PATH, rustix::fs::Mode::empty()).expect("open");
        assert!(passed(only_path, true).is_err());
        let (reader, _writer) = std::io::pipe().expect("pipe");
        assert!(passed(reader.into(), true).is_err_and(|why| why.contains("neither")));
        let place = OwnedFd::from(File::open(folder.path()).expect("open"));
        assert!(passed(place, true).is_err_and(|why| why.contains("neither")));
    }
}
