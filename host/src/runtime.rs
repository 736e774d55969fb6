//! The folder of one TPM's service.
//!
//! ```text
//! /run/fealty/tpm-<16 hex digits of SHA-256 of the TCTI string>/
//!     lock           held (flock) as long as the service lives: one service a TPM
//!     control.sock   where `fealty-host measure` and whoever starts VMs ask
//!     layers.log     the layer log of this boot
//!     state.json     which boot that is, where the other logs are
//!     identity.json  who the host is, for enrolment
//! ```

use attest::tcti::Tcti;
use attest_tpm::BootCount;
use policy::{Base64Url, HostId};
use rustix::fs::{FlockOperation, Mode, OFlags};
use serde::{Deserialize, Serialize};
use std::fs;
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

/// A TPM's folder.
#[derive(Clone, Debug)]
pub struct RuntimeDir(PathBuf);

/// The lock of a TPM's folder; freed when dropped, or when its process ends in whatever way.
#[derive(Debug)]
pub struct Lock(#[allow(dead_code, reason = "held, not used")] OwnedFd);

/// What a service writes down for the next one.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct State {
    /// Version of this format: 1.
    pub version: u32,
    /// The host.
    pub host: HostId,
    /// The boot: TPM2's resetCount.
    pub reset_count: u32,
    /// The boot: TPM2's restartCount.
    pub restart_count: u32,
    /// Whether VM processes may live that this service knew and the next one does not.
    pub peers: bool,
    /// The firmware's log.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub firmware_log: Option<PathBuf>,
    /// IMA's log.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ima_log: Option<PathBuf>,
}

/// Who the host is: what an inventory wants.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct IdentityFile {
    /// SHA-256 of the EK's SubjectPublicKeyInfo.
    pub host: HostId,
    /// The kind of endorsement key.
    pub ek_kind: String,
    /// Its certificate, DER, where the TPM holds one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ek_certificate: Option<Base64Url>,
    /// TPMT_PUBLIC.
    pub ek_public: Base64Url,
}

/// A folder that can't be used.
#[derive(Debug, thiserror::Error)]
pub enum RuntimeError {
    /// The file system refused.
    #[error("{0}: {1}")]
    Io(PathBuf, #[source] io::Error),
    /// Somebody else could put files there.
    #[error("{0} belongs to another user or others may write to it: remove it, or name another --runtime-dir")]
    Unsafe(PathBuf),
    /// The lock is taken.
    #[error("another TPM service serves this TPM (process {0})")]
    Taken(String),
    /// The state can't be read.
    #[error("{0} can't be read: reboot the host, or remove the file and lose what it says")]
    State(PathBuf),
}

impl State {
    /// Whether it was written in this boot of this host.
    pub fn is_of(&self, host: &HostId, boot: BootCount) -> bool {
        (self.host, self.reset_count, self.restart_count) == (*host, boot.reset, boot.restart)
    }
}

impl RuntimeDir {
    /// The folder of `tcti`: `chosen` where given, else one of its own (see [`attest::service::start::runtime_dir`]).
    pub fn of(chosen: Option<&Path>, tcti: &Tcti) -> Self {
        Self(attest::service::start::runtime_dir(tcti, chosen))
    }

    /// Its path.
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// Where the service listens.
    pub fn control_socket(&self) -> PathBuf {
        self.0.join(attest::service::start::CONTROL_SOCKET)
    }

    /// The layer log.
    pub fn layer_log(&self) -> PathBuf {
        self.0.join("layers.log")
    }

    /// Makes the folder where it is missing, and makes sure that nobody else writes to it.
    pub fn create(&self) -> Result<(), RuntimeError> {
        let fail = |e| RuntimeError::Io(self.0.clone(), e);
        fs::DirBuilder::new().recursive(true).mode(0o700).create(&self.0).map_err(fail)?;
        let seen = fs::symlink_metadata(&self.0).map_err(fail)?;
        let mine = seen.is_dir() && seen.uid() == rustix::process::geteuid().as_raw();
        if !mine || seen.permissions().mode() & 0o022 != 0 {
            return Err(RuntimeError::Unsafe(self.0.clone()));
        }
        Ok(())
    }

    /// Takes the lock; an error where another service holds it.
    pub fn lock(&self) -> Result<Lock, RuntimeError> {
        let path = self.0.join("lock");
        let fail = |e: rustix::io::Errno| RuntimeError::Io(path.clone(), e.into());
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        let file = rustix::fs::open(&path, flags, Mode::RUSR | Mode::WUSR).map_err(fail)?;
        match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(rustix::io::Errno::WOULDBLOCK) => {
                let holder = fs::read_to_string(&path).unwrap_or_default();
                let known = !holder.is_empty() && holder.len() < 12 && holder.bytes().all(|b| b.is_ascii_digit());
                return Err(RuntimeError::Taken(if known { holder } else { "unknown".into() }));
            }
            Err(e) => return Err(fail(e)),
        }
        let mut file = fs::File::from(file);
        file.set_len(0)
            .and_then(|()| write!(file, "{}", std::process::id()))
            .map_err(|e| RuntimeError::Io(path.clone(), e))?;
        Ok(Lock(file.into()))
    }

    /// What the service before wrote down.
    pub fn state(&self) -> Result<Option<State>, RuntimeError> {
        self.read_json("state.json")
    }

    /// Writes down the state, whole or not at all.
    pub fn keep_state(&self, state: &State) -> Result<(), RuntimeError> {
        self.write_json("state.json", state)
    }

    /// Who the host is.
    pub fn identity(&self) -> Result<Option<IdentityFile>, RuntimeError> {
        self.read_json("identity.json")
    }

    /// Writes down who the host is.
    pub fn keep_identity(&self, identity: &IdentityFile) -> Result<(), RuntimeError> {
        self.write_json("identity.json", identity)
    }

    fn read_json<T: for<'de> Deserialize<'de>>(&self, name: &str) -> Result<Option<T>, RuntimeError> {
        let path = self.0.join(name);
        let bytes = match read_bounded(&path, STATE_LIMIT) {
            Ok(bytes) => bytes,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(RuntimeError::Io(path, e)),
        };
        serde_json::from_slice(&bytes).map(Some).map_err(|_| RuntimeError::State(path))
    }

    fn write_json(&self, name: &str, value: &impl Serialize) -> Result<(), RuntimeError> {
        let path = self.0.join(name);
        let bytes = serde_json::to_vec(value).map_err(|e| RuntimeError::Io(path.clone(), e.into()))?;
        replace(&path, &bytes).map_err(|e| RuntimeError::Io(path, e))
    }
}

/// Puts `bytes` in the place of the file, whole or not at all.
pub fn replace(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(".new");
    let new = path.with_file_name(name);
    let mut file = fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&new)?;
    file.write_all(bytes)?;
    file.sync_data()?;
    fs::rename(&new, path)
}

/// Reads a file of at most `limit` bytes; a longer one is an error. Sizes are not asked for: kernel logs say 0.
pub fn read_bounded(path: &Path, limit: usize) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    fs::File::open(path)?.take(limit as u64 + 1).read_to_end(&mut bytes)?;
    if bytes.len() > limit {
        return Err(io::Error::new(io::ErrorKind::FileTooLarge, format!("is longer than {limit} bytes")));
    }
    Ok(bytes)
}

const STATE_LIMIT: usize = 64 * 1024;

#[cfg(test)]
mod tests {
    use super::*;
    use policy::Digest;

    fn folder() -> (tempfile::TempDir, RuntimeDir) {
        let base = tempfile::tempdir().expect("a folder");
        let tcti = "swtpm:host=127.0.0.1,port=2321".parse().expect("a TCTI string");
        let dir = RuntimeDir::of(Some(&base.path().join("tpm")), &tcti);
        (base, dir)
    }

    #[test]
    fn a_folder_has_one_lock() {
        let (_base, dir) = folder();
        dir.create().expect("made");
        let lock = dir.lock().expect("free");
        let again = dir.clone();
        let taken = again.lock().expect_err("taken");
        assert_eq!(taken.to_string(), format!("another TPM service serves this TPM (process {})", std::process::id()));
        drop(lock);
        again.lock().expect("free again");
    }

    #[test]
    fn a_folder_that_others_write_to_is_refused() {
        let (_base, dir) = folder();
        dir.create().expect("made");
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o770)).expect("changed");
        assert!(matches!(dir.create(), Err(RuntimeError::Unsafe(_))));
        fs::remove_dir(dir.path()).expect("removed");
        std::os::unix::fs::symlink("/tmp", dir.path()).expect("linked");
        assert!(matches!(dir.create(), Err(RuntimeError::Unsafe(_))));
    }

    #[test]
    fn state_comes_back_and_garbage_does_not() {
        let (_base, dir) = folder();
        dir.create().expect("made");
        assert!(dir.state().expect("readable").is_none());
        let state = State {
            version: 1,
            host: HostId(Digest::of(b"")),
            reset_count: 3,
            restart_count: 0,
            peers: true,
            firmware_log: Some("/f".into()),
            ima_log: None,
        };
        dir.keep_state(&state).expect("kept");
        assert_eq!(dir.state().expect("readable"), Some(state.clone()));
        assert!(state.is_of(&state.host, BootCount { reset: 3, restart: 0 }));
        assert!(!state.is_of(&state.host, BootCount { reset: 4, restart: 0 }));
        fs::write(dir.path().join("state.json"), "{").expect("written");
        assert!(matches!(dir.state(), Err(RuntimeError::State(_))));
        fs::write(dir.path().join("state.json"), vec![b' '; STATE_LIMIT + 1]).expect("written");
        assert!(matches!(dir.state(), Err(RuntimeError::Io(..))));
    }
}
