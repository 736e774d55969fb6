//! VM files: JWE (RFC 7516) in flattened JSON serialization, `dir` with `A256GCM` and nothing else.
//!
//! ```text
//! { "protected":  base64url of { "alg": "dir", "enc": "A256GCM", "typ": "fealty-vm", "kid": key id,
//!                                "version": 1, "customer", "vm", "providers", "pin" },
//!   "iv":         12 random bytes, "ciphertext": the configuration as JSON, "tag": 16 bytes }
//! ```
//!
//! The protected header is readable by anyone and, as the AAD, part of what the tag covers: a header that was changed opens
//! nothing. There is no `zip`, no unprotected header, no key in the file.

use crate::aead::Cipher;
use policy::config::ConfigError;
use policy::header::{HeaderError, ProviderUrl};
use policy::{Base64Url, CustomerId, Digest, KeyId, VmHeader, VmId, config::VmConfig};
use secretmem::{Secret, SecretError};
use serde::{Deserialize, Serialize};

/// The longest VM file, in bytes.
pub const FILE_LIMIT: usize = 1024 * 1024;

/// A VM file that can't be read, opened or made.
#[derive(Debug, thiserror::Error)]
pub enum VmFileError {
    /// Too long.
    #[error("a VM file is at most {FILE_LIMIT} bytes")]
    Length,
    /// Not a flattened JWE with the fields it must have.
    #[error("this is not a VM file: {0}")]
    Shape(String),
    /// A header that can't be used.
    #[error("the VM file's header can't be used: {0}")]
    Header(#[from] HeaderError),
    /// Another key, or a file that was changed.
    #[error("the VM file's sealed part does not open: the file was changed, or the key is another one's")]
    Tampered,
    /// It opens, but what is in it can't be read.
    #[error("the VM file's sealed part can't be read: {0}")]
    Sealed(String),
    /// It describes no machine.
    #[error("the VM file's configuration can't be a machine: {0}")]
    Config(#[from] ConfigError),
    /// No locked memory, or no random bytes.
    #[error("the VM file can't be worked on: {0}")]
    Memory(#[from] SecretError),
}

/// A VM file as read: its header is not yet authentic, its configuration not yet open.
#[derive(Debug)]
pub struct VmFile {
    /// What the header says.
    pub header: VmHeader,
    /// SHA-256 of the file's bytes.
    pub digest: Digest,
    protected: String,
    nonce: [u8; 12],
    ciphertext: Vec<u8>,
    tag: [u8; 16],
}

impl VmFile {
    /// Reads the public part of a VM file.
    ///
    /// # Errors
    /// Every one but `Tampered`, `Sealed`, `Config` and `Memory`.
    pub fn read(bytes: &[u8]) -> Result<Self, VmFileError> {
        if bytes.len() > FILE_LIMIT {
            return Err(VmFileError::Length);
        }
        let shape = |e: serde_json::Error| VmFileError::Shape(e.to_string());
        let file: Flattened = serde_json::from_slice(bytes).map_err(shape)?;
        let header = Base64Url::parse(&file.protected).ok_or_else(|| bad("its header is not base64url"))?;
        let header: Protected = serde_json::from_slice(&header).map_err(shape)?;
        let header = VmHeader::from(header);
        header.check()?;
        Ok(Self {
            header,
            digest: Digest::of(bytes),
            protected: file.protected,
            nonce: file.iv.0.try_into().map_err(|_| bad("its iv is not 12 bytes"))?,
            ciphertext: file.ciphertext.0,
            tag: file.tag.0.try_into().map_err(|_| bad("its tag is not 16 bytes"))?,
        })
    }

    /// Opens the sealed part with the key that the header names; from here on the header is authentic as well.
    ///
    /// # Errors
    /// `Tampered`, `Sealed`, `Config`, `Memory`.
    pub fn open(&self, key: &Secret<32>) -> Result<VmConfig, VmFileError> {
        let mut plain = self.ciphertext.clone();
        let cipher = Cipher::new(key.expose())?;
        let opened = cipher.open(&self.nonce, self.protected.as_bytes(), &mut plain, &self.tag);
        opened.map_err(|_| VmFileError::Tampered)?;
        let config: VmConfig = serde_json::from_slice(&plain).map_err(|e| VmFileError::Sealed(e.to_string()))?;
        config.check()?;
        Ok(config)
    }
}

/// Seals `config` under `header` with `key`, which must be new: a fresh random nonce is used once under it.
///
/// # Errors
/// `Header` and `Config` where they could not be read back, `Length`, `Memory`.
pub fn seal(header: &VmHeader, config: &VmConfig, key: &Secret<32>) -> Result<Vec<u8>, VmFileError> {
    header.check()?;
    config.check()?;
    let written = |e: serde_json::Error| VmFileError::Sealed(e.to_string());
    let protected = serde_json::to_vec(&Protected::from(header.clone())).map_err(written)?;
    let protected = Base64Url(protected).to_string();
    let mut text = serde_json::to_vec(config).map_err(written)?;
    let mut nonce = [0; 12];
    getrandom::fill(&mut nonce).map_err(SecretError::Random)?;
    let tag = Cipher::new(key.expose())?.seal(&nonce, protected.as_bytes(), &mut text);
    let tag = tag.map_err(|_| VmFileError::Length)?;
    let file = Flattened { protected, iv: nonce.to_vec().into(), ciphertext: text.into(), tag: tag.to_vec().into() };
    let mut bytes = serde_json::to_vec_pretty(&file).map_err(written)?;
    bytes.push(b'\n');
    if bytes.len() > FILE_LIMIT { Err(VmFileError::Length) } else { Ok(bytes) }
}

fn bad(what: &str) -> VmFileError {
    VmFileError::Shape(what.to_owned())
}

/// RFC 7516, section 7.2.2; `encrypted_key` is absent with `dir`.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Flattened {
    protected: String,
    iv: Base64Url,
    ciphertext: Base64Url,
    tag: Base64Url,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Protected {
    alg: Algorithm,
    enc: Encryption,
    typ: Type,
    kid: KeyId,
    version: u32,
    customer: CustomerId,
    vm: VmId,
    providers: Vec<ProviderUrl>,
    pin: Digest,
}

#[derive(Serialize, Deserialize)]
enum Algorithm {
    #[serde(rename = "dir")]
    Direct,
}

#[derive(Serialize, Deserialize)]
enum Encryption {
    #[serde(rename = "A256GCM")]
    Aes256Gcm,
}

#[derive(Serialize, Deserialize)]
enum Type {
    #[serde(rename = "fealty-vm")]
    Vm,
}

impl From<Protected> for VmHeader {
    fn from(p: Protected) -> Self {
        let Protected { version, customer, vm, providers, pin, kid, .. } = p;
        Self { version, customer, vm, providers, pin, key_id: kid }
    }
}

impl From<VmHeader> for Protected {
    fn from(h: VmHeader) -> Self {
        let VmHeader { version, customer, vm, providers, pin, key_id } = h;
        let (alg, enc, typ) = (Algorithm::Direct, Encryption::Aes256Gcm, Type::Vm);
        Self { alg, enc, typ, kid: key_id, version, customer, vm, providers, pin }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn header() -> VmHeader {
        VmHeader {
            version: 1,
            customer: "acme".parse().expect("label"),
            vm: "payroll".parse().expect("label"),
            providers: vec![ProviderUrl::try_from("https://keys.example".to_owned()).expect("url")],
            pin: Digest::of(b"ca"),
            key_id: KeyId(7),
        }
    }

    fn config() -> VmConfig {
        let key = Base64Url(vec![1; 32]);
        serde_json::from_value(serde_json::json!({
            "cpus": {"boot_vcpus": 1}, "memory": {"size": 128 << 20},
            "payload": {"kernel": {"name": "vmlinuz", "sha256": Digest::of(b"k")}, "cmdline": "secret"},
            "trust": {"policy_key": key, "policy_version": 1, "directive_key": key, "audit_origin": "acme.keys", "audit_key": key}
        }))
        .expect("a configuration")
    }

    fn key(byte: u8) -> Secret<32> {
        Secret::copy_of(&[byte; 32]).expect("memory")
    }

    fn sealed() -> Vec<u8> {
        seal(&header(), &config(), &key(1)).expect("sealed")
    }

    #[test]
    fn a_file_opens_with_its_key_and_shows_only_its_header() {
        let bytes = sealed();
        let file = VmFile::read(&bytes).expect("reads");
        assert_eq!((file.header.clone(), file.digest), (header(), Digest::of(&bytes)));
        assert_eq!(file.open(&key(1)).expect("opens"), config());
        assert!(matches!(file.open(&key(2)), Err(VmFileError::Tampered)));
        assert!(!bytes.windows(6).any(|w| w == b"secret"));
    }

    #[test]
    fn attack_32_a_header_that_was_changed_opens_nothing() {
        let mut file: Flattened = serde_json::from_slice(&sealed()).expect("reads");
        let other = VmHeader { vm: "other".parse().expect("label"), ..header() };
        file.protected = Base64Url(serde_json::to_vec(&Protected::from(other)).expect("json")).to_string();
        let file = VmFile::read(&serde_json::to_vec(&file).expect("json")).expect("reads");
        assert!(matches!(file.open(&key(1)), Err(VmFileError::Tampered)));
    }

    #[test]
    fn attack_34_no_other_algorithm_and_no_other_field_is_read() {
        let value: serde_json::Value = serde_json::from_slice(&sealed()).expect("json");
        let header = Base64Url::parse(value["protected"].as_str().expect("text")).expect("base64url");
        let header: serde_json::Value = serde_json::from_slice(&header).expect("json");
        for (name, other) in [
            ("alg", "A256KW"),
            ("alg", "none"),
            ("enc", "A128GCM"),
            ("enc", "A256CBC-HS512"),
            ("typ", "JWE"),
            ("zip", "DEF"),
            ("crit", "x"),
            ("version", "1"),
        ] {
            let mut changed = header.clone();
            changed[name] = other.into();
            let mut file = value.clone();
            file["protected"] = Base64Url(changed.to_string().into_bytes()).to_string().into();
            assert!(VmFile::read(file.to_string().as_bytes()).is_err(), "{name}={other}");
        }
        for name in ["unprotected", "header", "encrypted_key", "aad", "recipients"] {
            let mut file = value.clone();
            file[name] = "".into();
            assert!(VmFile::read(file.to_string().as_bytes()).is_err(), "{name}");
        }
    }

    #[test]
    fn what_is_too_long_is_not_read() {
        assert!(matches!(VmFile::read(&vec![b' '; FILE_LIMIT + 1]), Err(VmFileError::Length)));
    }

    proptest! {
        #[test]
        fn a_changed_byte_never_opens_to_another_configuration(at in 0usize..4000, bit in 0u8..8) {
            let mut bytes = sealed();
            let at = at % bytes.len();
            bytes[at] ^= 1 << bit;
            if let Ok(file) = VmFile::read(&bytes)
                && let Ok(opened) = file.open(&key(1))
            {
                prop_assert_eq!((file.header, opened), (header(), config()));
            }
        }

        #[test]
        fn any_bytes_are_read_without_a_panic(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            let _ = VmFile::read(&bytes);
        }
    }
}
