//! The master key, and every other key wrapped under it.
//!
//! ```text
//! wrapped key   version 1, one byte | nonce, 12 bytes | AES-256-GCM ciphertext | tag, 16 bytes
//! AAD           canonical encoding of the key's label: a wrapped key put in another's place does not open
//! ```
//!
//! [`KeyStore`] is the border behind which a PKCS#11 token can stand later; [`FileKeyStore`] keeps the master key in a file.

use attest::aead::{Cipher, TAG};
use policy::{CustomerId, Digest, KeyId, VmId, VolumeId};
use rustix::fs::{Mode, OFlags};
use secretmem::{Secret, SecretBuf, SecretError};
use std::fs::File;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

const VERSION: u8 = 1;
const NONCE: usize = 12;

/// What a wrapped key is, and whose: its AAD.
#[derive(Debug, Clone, Copy)]
pub enum KeyLabel<'a> {
    /// One of the provider's own keys, by name.
    Provider(&'a str),
    /// A key that seals a VM file.
    VmFile(&'a CustomerId, &'a VmId, KeyId),
    /// A volume's key-encryption key.
    Volume(&'a CustomerId, &'a VolumeId, KeyId),
    /// The one-time key of a sealed stream.
    Stream(&'a CustomerId, &'a VmId, KeyId),
}

impl KeyLabel<'_> {
    fn aad(&self) -> Digest {
        let of = |kind: &str, owner: &[u8], thing: &[u8], id: &KeyId| {
            Digest::of_fields("fealty wrapped key v1", &[kind.as_bytes(), owner, thing, &id.0.to_be_bytes()])
        };
        match self {
            Self::Provider(name) => of("provider", b"", name.as_bytes(), &KeyId(0)),
            Self::VmFile(customer, vm, id) => of("vm-file", customer.as_str().as_bytes(), vm.as_str().as_bytes(), id),
            Self::Volume(customer, volume, id) => of("volume", customer.as_str().as_bytes(), &volume.0, id),
            Self::Stream(customer, vm, id) => of("stream", customer.as_str().as_bytes(), vm.as_str().as_bytes(), id),
        }
    }
}

/// Something that wraps keys under a master key it never shows.
pub trait KeyStore: Send + Sync {
    /// Wraps `key` as what `label` says.
    fn wrap(&self, label: KeyLabel<'_>, key: &[u8]) -> Result<Vec<u8>, KeyStoreError>;

    /// Unwraps a key that was wrapped under the same label.
    fn unwrap(&self, label: KeyLabel<'_>, wrapped: &[u8]) -> Result<SecretBuf, KeyStoreError>;

    /// The same for keys of 32 bytes.
    fn unwrap_32(&self, label: KeyLabel<'_>, wrapped: &[u8]) -> Result<Secret<32>, KeyStoreError> {
        let buffer = self.unwrap(label, wrapped)?;
        let mut key = Secret::zeroed()?;
        if buffer.len() != 32 {
            return Err(KeyStoreError::Wrapped);
        }
        key.expose_mut().copy_from_slice(buffer.expose());
        Ok(key)
    }
}

/// Why a key can't be wrapped or unwrapped.
#[derive(Debug, thiserror::Error)]
pub enum KeyStoreError {
    /// The master key file can't be read or made.
    #[error("the master key file {0} can't be used")]
    File(PathBuf, #[source] std::io::Error),
    /// A master key that others may read.
    #[error("the master key file {0} must belong to this user with mode 0600; run: chmod 600 {0}")]
    Mode(PathBuf),
    /// A file that is no master key.
    #[error("the master key file {0} does not hold 32 bytes")]
    Length(PathBuf),
    /// A wrapped key that was changed, moved, or wrapped under another master key.
    #[error("a wrapped key does not open: another master key, or the database was changed")]
    Wrapped,
    /// No memory for keys.
    #[error("no protected memory for keys")]
    Memory(#[from] SecretError),
    /// No random numbers.
    #[error("the kernel gives no random numbers")]
    Random,
}

/// A master key in a file of 32 bytes, mode 0600.
pub struct FileKeyStore {
    cipher: Cipher,
}

impl FileKeyStore {
    /// Makes a new master key file; fails where one is.
    pub fn create(path: &Path) -> Result<Self, KeyStoreError> {
        let failed = |e: std::io::Error| KeyStoreError::File(path.to_owned(), e);
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        let fd = rustix::fs::open(path, flags, Mode::RUSR | Mode::WUSR).map_err(|e| failed(e.into()))?;
        let key = Secret::<32>::random()?;
        let mut file = File::from(fd);
        file.write_all(key.expose()).and_then(|()| file.sync_all()).map_err(failed)?;
        Ok(Self { cipher: Cipher::new(key.expose())? })
    }

    /// Opens the master key in `path`.
    pub fn open(path: &Path) -> Result<Self, KeyStoreError> {
        let failed = |e: std::io::Error| KeyStoreError::File(path.to_owned(), e);
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        let fd = rustix::fs::open(path, flags, Mode::empty()).map_err(|e| failed(e.into()))?;
        let status = rustix::fs::fstat(&fd).map_err(|e| failed(e.into()))?;
        if status.st_mode & 0o7777 != 0o600 || status.st_uid != rustix::process::geteuid().as_raw() {
            return Err(KeyStoreError::Mode(path.to_owned()));
        }
        if status.st_size != 32 {
            return Err(KeyStoreError::Length(path.to_owned()));
        }
        let mut key = Secret::<32>::zeroed()?;
        File::from(fd).read_exact(key.expose_mut()).map_err(failed)?;
        Ok(Self { cipher: Cipher::new(key.expose())? })
    }
}

impl KeyStore for FileKeyStore {
    fn wrap(&self, label: KeyLabel<'_>, key: &[u8]) -> Result<Vec<u8>, KeyStoreError> {
        let mut nonce = [0; NONCE];
        getrandom::fill(&mut nonce).map_err(|_| KeyStoreError::Random)?;
        // The plain key is encrypted where it lies: in protected memory.
        let mut buffer = SecretBuf::copy_of(key)?;
        let aad = label.aad();
        let tag = self.cipher.seal(&nonce, aad.as_bytes(), buffer.expose_mut()).map_err(|_| KeyStoreError::Wrapped)?;
        Ok([&[VERSION][..], &nonce, buffer.expose(), &tag].concat())
    }

    fn unwrap(&self, label: KeyLabel<'_>, wrapped: &[u8]) -> Result<SecretBuf, KeyStoreError> {
        let [VERSION, rest @ ..] = wrapped else { return Err(KeyStoreError::Wrapped) };
        let (nonce, rest) = rest.split_first_chunk::<NONCE>().ok_or(KeyStoreError::Wrapped)?;
        let (sealed, tag) = rest.split_last_chunk::<TAG>().ok_or(KeyStoreError::Wrapped)?;
        let mut buffer = SecretBuf::copy_of(sealed)?;
        let aad = label.aad();
        self.cipher.open(nonce, aad.as_bytes(), buffer.expose_mut(), tag).map_err(|_| KeyStoreError::Wrapped)?;
        Ok(buffer)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    fn customer(name: &str) -> CustomerId {
        name.parse().expect("label")
    }

    #[test]
    fn a_wrapped_key_opens_only_as_what_it_is() {
        let dir = tempfile::tempdir().expect("a folder");
        let path = dir.path().join("master.key");
        let store = FileKeyStore::create(&path).expect("made");
        let (acme, volume) = (customer("acme"), VolumeId::random());
        let label = KeyLabel::Volume(&acme, &volume, KeyId(7));
        let wrapped = store.wrap(label, &[5; 32]).expect("wrapped");
        assert!(!wrapped.windows(8).any(|w| w == [5; 8]), "the key must not show");
        let again = FileKeyStore::open(&path).expect("opens");
        assert_eq!(again.unwrap_32(label, &wrapped).expect("opens").expose(), &[5; 32]);
        for other in [
            KeyLabel::Volume(&acme, &volume, KeyId(8)),
            KeyLabel::Volume(&customer("other"), &volume, KeyId(7)),
            KeyLabel::Volume(&acme, &VolumeId::random(), KeyId(7)),
            KeyLabel::Provider("acme"),
        ] {
            assert!(again.unwrap(other, &wrapped).is_err(), "{other:?}");
        }
        for at in 0..wrapped.len() {
            let mut bad = wrapped.clone();
            bad[at] ^= 1;
            assert!(again.unwrap(label, &bad).is_err(), "byte {at}");
        }
        for length in 0..wrapped.len() {
            assert!(again.unwrap(label, &wrapped[..length]).is_err(), "length {length}");
        }
    }

    #[test]
    fn a_master_key_that_others_may_read_is_refused() {
        let dir = tempfile::tempdir().expect("a folder");
        let path = dir.path().join("master.key");
        drop(FileKeyStore::create(&path).expect("made"));
        assert!(FileKeyStore::create(&path).is_err(), "never overwritten");
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o640)).expect("chmod");
        assert!(matches!(FileKeyStore::open(&path), Err(KeyStoreError::Mode(_))));
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).expect("chmod");
        std::fs::write(&path, [0; 31]).expect("written");
        assert!(matches!(FileKeyStore::open(&path), Err(KeyStoreError::Length(_))));
    }
}
