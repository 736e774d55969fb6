//! Names and numbers. Names are DNS labels, so that they can stand in a URL, a file name and a log line unescaped.

use crate::encoding::{Base64Url, Digest};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::fmt;
use std::str::FromStr;

/// A name, number or identifier that can't be one.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum IdError {
    /// Not a DNS label (RFC 1123, section 2.1).
    #[error("a {0} is 1 to 63 of a-z, 0-9 and '-', neither first nor last '-'")]
    Label(&'static str),
    /// Not the text of this kind of identifier.
    #[error("not a {0}")]
    Text(&'static str),
    /// A number outside its range.
    #[error("{0} lies outside 1 to {1}")]
    Range(&'static str, u64),
}

macro_rules! label {
    ($(#[$doc:meta])* $name:ident, $what:literal) => {
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(String);

        impl $name {
            /// The name as text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl FromStr for $name {
            type Err = IdError;
            fn from_str(text: &str) -> Result<Self, IdError> {
                if is_label(text) { Ok(Self(text.to_owned())) } else { Err(IdError::Label($what)) }
            }
        }

        text_forms!($name, $what);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
    };
}

macro_rules! text_forms {
    ($name:ident, $what:literal) => {
        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{} {self}", $what)
            }
        }

        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
                s.collect_str(self)
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
                let text = std::borrow::Cow::<'de, str>::deserialize(d)?;
                text.parse().map_err(serde::de::Error::custom)
            }
        }
    };
}

label!(
    /// A customer of the key provider.
    CustomerId,
    "customer id"
);
label!(
    /// A virtual machine, unique within its customer.
    VmId,
    "VM id"
);
label!(
    /// A cloud whose hosts stand in an inventory.
    CloudId,
    "cloud id"
);
label!(
    /// A virtual network, unique within its customer.
    NetworkId,
    "network id"
);

fn is_label(text: &str) -> bool {
    let bytes = text.as_bytes();
    (1..=63).contains(&bytes.len())
        && bytes.iter().all(|b| matches!(b, b'a'..=b'z' | b'0'..=b'9' | b'-'))
        && bytes[0] != b'-'
        && bytes[bytes.len() - 1] != b'-'
}

/// A host: SHA-256 of its endorsement key's DER SubjectPublicKeyInfo (RFC 5280, 4.1.2.7), never of the certificate,
/// which may be reissued.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct HostId(pub Digest);

impl FromStr for HostId {
    type Err = IdError;
    fn from_str(text: &str) -> Result<Self, IdError> {
        text.parse().map(Self).map_err(|_| IdError::Text("host id (64 hexadecimal digits)"))
    }
}

impl fmt::Display for HostId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

text_forms!(HostId, "host");

/// A volume: its UUID (RFC 9562), which also names the origin of its blocks.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct VolumeId(pub [u8; 16]);

impl VolumeId {
    /// A fresh random id (UUID version 4).
    pub fn random() -> Self {
        Self(uuid::Uuid::new_v4().into_bytes())
    }
}

impl FromStr for VolumeId {
    type Err = IdError;
    fn from_str(text: &str) -> Result<Self, IdError> {
        uuid::Uuid::parse_str(text).map(|u| Self(u.into_bytes())).map_err(|_| IdError::Text("volume id (a UUID)"))
    }
}

impl fmt::Display for VolumeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        uuid::Uuid::from_bytes(self.0).hyphenated().fmt(f)
    }
}

text_forms!(VolumeId, "volume");

/// A provider's nonce: 32 random bytes, used once.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Nonce(pub [u8; 32]);

impl FromStr for Nonce {
    type Err = IdError;
    fn from_str(text: &str) -> Result<Self, IdError> {
        let bytes = Base64Url::parse(text).ok_or(IdError::Text("nonce"))?;
        bytes.0.try_into().map(Self).map_err(|_| IdError::Text("nonce"))
    }
}

impl fmt::Display for Nonce {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        Base64Url::from(&self.0[..]).fmt(f)
    }
}

text_forms!(Nonce, "nonce");

/// One attestation at the provider: 16 random bytes, base64url.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct AttestationId(pub [u8; 16]);

impl FromStr for AttestationId {
    type Err = IdError;
    fn from_str(text: &str) -> Result<Self, IdError> {
        let bytes = Base64Url::parse(text).ok_or(IdError::Text("attestation id"))?;
        bytes.0.try_into().map(Self).map_err(|_| IdError::Text("attestation id"))
    }
}

impl fmt::Display for AttestationId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        Base64Url::from(&self.0[..]).fmt(f)
    }
}

text_forms!(AttestationId, "attestation");

/// A key: a random 64-bit number issued by the provider, which enforces that it is unique; 16 hexadecimal digits.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct KeyId(pub u64);

impl FromStr for KeyId {
    type Err = IdError;
    fn from_str(text: &str) -> Result<Self, IdError> {
        if text.len() != 16 || !text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f')) {
            return Err(IdError::Text("key id (16 hexadecimal digits)"));
        }
        u64::from_str_radix(text, 16).map(Self).map_err(|_| IdError::Text("key id (16 hexadecimal digits)"))
    }
}

impl fmt::Display for KeyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

text_forms!(KeyId, "key");

macro_rules! number {
    ($(#[$doc:meta])* $name:ident, $inner:ty, $what:literal, $max:expr) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
        #[serde(try_from = "u64", into = "u64")]
        pub struct $name($inner);

        impl $name {
            /// The largest one.
            pub const MAX: u64 = $max;

            /// The number itself, from 1.
            pub fn get(self) -> $inner {
                self.0
            }
        }

        impl TryFrom<u64> for $name {
            type Error = IdError;
            fn try_from(n: u64) -> Result<Self, IdError> {
                if (1..=$max).contains(&n) { Ok(Self(n as $inner)) } else { Err(IdError::Range($what, $max)) }
            }
        }

        impl From<$name> for u64 {
            fn from(n: $name) -> u64 {
                u64::from(n.0)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
    };
}

number!(
    /// One life of a VM in one process: issued by the provider, per VM, rising. Below 2^53, so that every JSON reader
    /// holds it exactly.
    InstanceNumber,
    u64,
    "an instance number",
    (1 << 53) - 1
);
number!(
    /// One opening of a volume: 24 bits, issued by the provider, rising, never repeated for a volume.
    OpenNumber,
    u32,
    "an open number",
    (1 << 24) - 1
);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_label_holds_nothing_that_a_path_or_url_would_read() {
        for good in ["a", "payroll-7", &"x".repeat(63)] {
            assert!(good.parse::<VmId>().is_ok(), "{good}");
        }
        for bad in ["", "-a", "a-", "A", "a.b", "a/b", "..", "a b", "ä", &"x".repeat(64)] {
            assert!(bad.parse::<VmId>().is_err(), "{bad}");
        }
    }

    #[test]
    fn numbers_keep_their_range_also_in_json() {
        assert!(serde_json::from_str::<OpenNumber>("0").is_err());
        assert!(serde_json::from_str::<OpenNumber>("16777216").is_err());
        assert_eq!(serde_json::from_str::<OpenNumber>("16777215").map(OpenNumber::get).ok(), Some(16_777_215));
    }

    #[test]
    fn text_forms_come_back() {
        let volume = VolumeId::random();
        assert_eq!(volume.to_string().parse(), Ok(volume));
        assert_eq!(KeyId(255).to_string().parse(), Ok(KeyId(255)));
        assert!("ff".parse::<KeyId>().is_err());
        assert!("+00000000000000f".parse::<KeyId>().is_err());
    }
}
