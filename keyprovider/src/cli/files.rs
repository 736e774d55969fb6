//! Files of the tool: read whole within a bound, written so that a reader sees the old or the new one.

use super::CliError;
use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

/// The longest file that is read whole, in bytes.
const LIMIT: u64 = 64 << 20;

/// Reads a file of at most 64 MiB.
pub(super) fn read(path: &Path) -> Result<Vec<u8>, CliError> {
    let failed = |e| CliError::Read(path.to_owned(), e);
    let mut bytes = Vec::new();
    File::open(path).map_err(failed)?.take(LIMIT + 1).read_to_end(&mut bytes).map_err(failed)?;
    if bytes.len() as u64 > LIMIT {
        return Err(CliError::Input(format!("{} is longer than 64 MiB", path.display())));
    }
    Ok(bytes)
}

/// Reads a text file.
pub(super) fn text(path: &Path) -> Result<String, CliError> {
    String::from_utf8(read(path)?).map_err(|_| CliError::Input(format!("{} is not text", path.display())))
}

/// A file that takes its name only once it is complete.
pub(super) struct Pending {
    path: PathBuf,
    beside: PathBuf,
    file: File,
}

impl Pending {
    /// A new file beside `path`, with these permissions.
    pub(super) fn beside(path: &Path, mode: u32) -> Result<Self, CliError> {
        let name = path.file_name().ok_or_else(|| CliError::Input(format!("{} names no file", path.display())))?;
        let mut hidden = std::ffi::OsString::from(".");
        hidden.push(name);
        hidden.push(format!(".{}", std::process::id()));
        let beside = path.with_file_name(hidden);
        let mut options = File::options();
        options.write(true).create(true).truncate(true).mode(mode);
        let file = options.open(&beside).map_err(|e| CliError::Write(path.to_owned(), e))?;
        Ok(Self { path: path.to_owned(), beside, file })
    }

    /// Where to write.
    pub(super) fn file(&mut self) -> &mut File {
        &mut self.file
    }

    /// Writes all of `bytes`.
    pub(super) fn write(&mut self, bytes: &[u8]) -> Result<(), CliError> {
        self.file.write_all(bytes).map_err(|e| CliError::Write(self.path.clone(), e))
    }

    /// Makes the content durable, but does not give it its name yet.
    pub(super) fn sync(&self) -> Result<(), CliError> {
        self.file.sync_all().map_err(|e| CliError::Write(self.path.clone(), e))
    }

    /// Gives the file its name.
    pub(super) fn finish(self) -> Result<(), CliError> {
        self.sync()?;
        std::fs::rename(&self.beside, &self.path).map_err(|e| CliError::Write(self.path.clone(), e))
    }
}

impl Drop for Pending {
    fn drop(&mut self) {
        // After `finish` there is nothing of that name any more.
        let _ = std::fs::remove_file(&self.beside);
    }
}

/// Writes a file whole.
pub(super) fn write(path: &Path, bytes: &[u8], mode: u32) -> Result<(), CliError> {
    let mut pending = Pending::beside(path, mode)?;
    pending.write(bytes)?;
    pending.finish()
}

/// Writes a file that must not exist yet, mode 0600.
pub(super) fn write_new(path: &Path, bytes: &[u8]) -> Result<(), CliError> {
    let failed = |e| CliError::Write(path.to_owned(), e);
    let mut options = File::options();
    let mut file = options.write(true).create_new(true).mode(0o600).open(path).map_err(failed)?;
    file.write_all(bytes).and_then(|()| file.sync_all()).map_err(failed)
}
