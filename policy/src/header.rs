//! The plain-text half of a VM file: whose VM it is and where its key provider is. Authenticated as the JWE's protected
//! header (RFC 7516, section 4), readable by anyone.

use crate::encoding::Digest;
use crate::id::{CustomerId, KeyId, VmId};
use serde::{Deserialize, Serialize};

/// What the protected header says beside `alg`, `enc`, `typ`.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmHeader {
    /// Version of the VM file's format: 1.
    pub version: u32,
    /// The owner.
    pub customer: CustomerId,
    /// The VM.
    pub vm: VmId,
    /// The key provider's URLs, tried in order: 1 to 4.
    pub providers: Vec<ProviderUrl>,
    /// SHA-256 of the DER SubjectPublicKeyInfo of the CA that the provider's certificate must chain to.
    pub pin: Digest,
    /// The key that seals the rest; new for each sealing.
    pub key_id: KeyId,
}

/// `https://HOST[:PORT]`, nothing after it: no user, path, query or fragment, so that there is nothing to trick with.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct ProviderUrl {
    host: String,
    port: u16,
}

impl ProviderUrl {
    /// The host name or address, an IPv6 address without its brackets.
    pub fn host(&self) -> &str {
        &self.host
    }

    /// The TCP port.
    pub fn port(&self) -> u16 {
        self.port
    }
}

/// What is wrong with a provider URL.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("a key provider's URL is https://HOST or https://HOST:PORT, nothing after it")]
pub struct UrlError;

impl TryFrom<String> for ProviderUrl {
    type Error = UrlError;
    fn try_from(text: String) -> Result<Self, UrlError> {
        let authority = text.strip_prefix("https://").ok_or(UrlError)?;
        let (host, port) = match authority.strip_prefix('[') {
            Some(rest) => {
                let (address, after) = rest.split_once(']').ok_or(UrlError)?;
                address.parse::<std::net::Ipv6Addr>().map_err(|_| UrlError)?;
                (address, after.strip_prefix(':').or_else(|| after.is_empty().then_some("")).ok_or(UrlError)?)
            }
            None => {
                let (host, port) = match authority.split_once(':') {
                    Some((_, "")) => return Err(UrlError),
                    Some(parts) => parts,
                    None => (authority, ""),
                };
                let label =
                    |l: &str| (1..=63).contains(&l.len()) && l.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-');
                if host.len() > 253 || !host.split('.').all(label) {
                    return Err(UrlError);
                }
                (host, port)
            }
        };
        let port = match port {
            "" => 443,
            text if text.bytes().all(|b| b.is_ascii_digit()) => text.parse().map_err(|_| UrlError)?,
            _ => return Err(UrlError),
        };
        if port == 0 {
            return Err(UrlError);
        }
        Ok(Self { host: host.to_ascii_lowercase(), port })
    }
}

impl std::fmt::Display for ProviderUrl {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if self.host.contains(':') {
            write!(f, "https://[{}]:{}", self.host, self.port)
        } else {
            write!(f, "https://{}:{}", self.host, self.port)
        }
    }
}

impl From<ProviderUrl> for String {
    fn from(url: ProviderUrl) -> String {
        url.to_string()
    }
}

/// A header that can't be used.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum HeaderError {
    /// A version that this program does not know.
    #[error("VM file format version {0} is not known to this program (it knows 1)")]
    Version(u32),
    /// None, or too many, URLs.
    #[error("a VM file names 1 to 4 key providers")]
    Providers,
}

impl VmHeader {
    /// Checks what the types alone don't.
    pub fn check(&self) -> Result<(), HeaderError> {
        if self.version != 1 {
            return Err(HeaderError::Version(self.version));
        }
        if !(1..=4).contains(&self.providers.len()) {
            return Err(HeaderError::Providers);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_hold_a_host_and_a_port_only() {
        let parse = |t: &str| ProviderUrl::try_from(t.to_owned());
        assert_eq!(parse("https://Keys.Example.org").map(|u| u.to_string()), Ok("https://keys.example.org:443".into()));
        assert_eq!(parse("https://[::1]:8443").map(|u| u.to_string()), Ok("https://[::1]:8443".into()));
        for bad in [
            "http://a",
            "https://",
            "https://a:",
            "https://a:0",
            "https://a:65536",
            "https://a:+1",
            "https://a/b",
            "https://u@a",
            "https://a?b",
            "https://a b",
            "https://[::1",
            "https://[x]:1",
            "https://a..b",
            "https://[::1]x",
        ] {
            assert_eq!(parse(bad), Err(UrlError), "{bad}");
        }
    }
}
