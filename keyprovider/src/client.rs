//! The tool's end of the administrators' API: the same client as VM processes use, with an administrator's certificate.

use crate::api::{KeyRequest, SealedKey, key_info};
use crate::authority::pem;
use attest::client::{ClientError, ClientIdentity, HttpsClient, Method};
use attest::hpke::X25519Key;
use policy::header::ProviderUrl;
use policy::{Base64Url, CustomerId, Digest};
use secretmem::{Secret, SecretError};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};

/// The longest answer that the tool reads, in bytes.
pub const ANSWER: usize = 8 * 1024 * 1024;

/// Who an administrator is and where the provider is: one file, to be kept like a private key.
#[derive(Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Profile {
    /// Name, for people.
    pub name: String,
    /// The provider.
    pub url: ProviderUrl,
    /// SHA-256 of its authority's SubjectPublicKeyInfo.
    pub pin: Digest,
    /// The administrator's certificate, PEM.
    pub certificate: String,
    /// The private key, PKCS#8, PEM.
    pub key: String,
}

/// Why the tool can't talk to the provider.
#[derive(Debug, thiserror::Error)]
pub enum AdminClientError {
    /// No profile.
    #[error("the profile {0} can't be read")]
    Profile(PathBuf, #[source] std::io::Error),
    /// No profile, but something else.
    #[error("the profile {0} is not one: {1}")]
    NotAProfile(PathBuf, String),
    /// The provider.
    #[error(transparent)]
    Client(#[from] ClientError),
    /// A key that does not open.
    #[error("the provider's answer holds no key that this tool can open")]
    Sealed,
    /// No memory for keys.
    #[error("no protected memory for keys")]
    Memory(#[from] SecretError),
}

/// A client with an administrator's certificate.
pub struct AdminClient {
    https: HttpsClient,
    /// The provider's URL.
    pub url: ProviderUrl,
    /// Its pin.
    pub pin: Digest,
}

impl Profile {
    /// A profile of these parts, DER.
    pub fn new(name: &str, url: ProviderUrl, pin: Digest, certificate: &[u8], key: &[u8]) -> Self {
        let (certificate, key) = (pem("CERTIFICATE", certificate), pem("PRIVATE KEY", key));
        Self { name: name.to_owned(), url, pin, certificate, key }
    }

    /// Reads a profile.
    pub fn read(path: &Path) -> Result<Self, AdminClientError> {
        let text = std::fs::read_to_string(path).map_err(|e| AdminClientError::Profile(path.to_owned(), e))?;
        serde_json::from_str(&text).map_err(|e| AdminClientError::NotAProfile(path.to_owned(), e.to_string()))
    }
}

impl AdminClient {
    /// A client for `profile`, at `url` where that is given.
    pub fn new(path: &Path, profile: &Profile, url: Option<ProviderUrl>) -> Result<Self, AdminClientError> {
        let not = |what: &str| AdminClientError::NotAProfile(path.to_owned(), what.to_owned());
        let certificate = from_pem(&profile.certificate).ok_or_else(|| not("its certificate is no PEM"))?;
        let key = from_pem(&profile.key).ok_or_else(|| not("its key is no PEM"))?;
        let identity = ClientIdentity::from_der(vec![certificate], key)?;
        let url = url.unwrap_or_else(|| profile.url.clone());
        let https = HttpsClient::new(vec![url.clone()], profile.pin, None, &identity)?;
        Ok(Self { https, url, pin: profile.pin })
    }

    /// GET.
    pub fn get<T: DeserializeOwned>(&mut self, path: &str) -> Result<T, AdminClientError> {
        Ok(self.https.json(Method::Get, path, None::<&()>, ANSWER)?)
    }

    /// GET of bytes.
    pub fn bytes(&mut self, path: &str) -> Result<Vec<u8>, AdminClientError> {
        Ok(self.https.request(Method::Get, path, None, ANSWER)?)
    }

    /// POST.
    pub fn post<T: DeserializeOwned>(&mut self, path: &str, body: &impl Serialize) -> Result<T, AdminClientError> {
        Ok(self.https.json(Method::Post, path, Some(body), ANSWER)?)
    }

    /// PUT.
    pub fn put<T: DeserializeOwned>(&mut self, path: &str, body: &impl Serialize) -> Result<T, AdminClientError> {
        Ok(self.https.json(Method::Put, path, Some(body), ANSWER)?)
    }

    /// DELETE.
    pub fn delete<T: DeserializeOwned>(&mut self, path: &str) -> Result<T, AdminClientError> {
        Ok(self.https.json(Method::Delete, path, None::<&()>, ANSWER)?)
    }

    /// POST that is answered with a key, sealed to this process alone.
    pub fn key(
        &mut self,
        path: &str,
        customer: &CustomerId,
        what: &str,
    ) -> Result<(policy::KeyId, Secret<32>), AdminClientError> {
        let one_time = OneTimeKey::generate()?;
        let sealed: SealedKey = self.post(path, &one_time.request())?;
        let key = one_time.open(customer, what, &sealed)?;
        Ok((sealed.key_id, key))
    }
}

/// The tool's one-time key.
pub struct OneTimeKey(X25519Key);

impl OneTimeKey {
    /// A fresh one.
    pub fn generate() -> Result<Self, AdminClientError> {
        Ok(Self(X25519Key::generate()?))
    }

    /// What is sent of it.
    pub fn request(&self) -> KeyRequest {
        KeyRequest { public: Base64Url::from(&self.0.public()[..]) }
    }

    /// Opens a key that was sealed to it.
    pub fn open(&self, customer: &CustomerId, what: &str, sealed: &SealedKey) -> Result<Secret<32>, AdminClientError> {
        let info = key_info(customer, what, sealed.key_id);
        let opened = attest::hpke::open_x25519(&self.0, info.as_bytes(), b"", &sealed.sealed);
        let opened = opened.map_err(|_| AdminClientError::Sealed)?;
        let bytes: &[u8; 32] = opened.expose().try_into().map_err(|_| AdminClientError::Sealed)?;
        Ok(Secret::copy_of(bytes)?)
    }
}

/// The DER of the first block in a PEM text.
pub fn from_pem(text: &str) -> Option<Vec<u8>> {
    use base64::Engine;
    let (_, rest) = text.split_once("-----BEGIN ")?;
    let (_, rest) = rest.split_once("-----")?;
    let (body, _) = rest.split_once("-----END ")?;
    let body: String = body.split_whitespace().collect();
    base64::engine::general_purpose::STANDARD.decode(body).ok()
}
