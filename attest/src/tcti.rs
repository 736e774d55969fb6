//! How to reach the TPM: the two kinds of TCTI string that are accepted.

use std::fmt;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::str::FromStr;

/// A way to a TPM (TCG TSS 2.0 TCTI API, 3.5). Parsed here and nowhere else, by each program before it does anything: the
/// library that opens the TPM maps what it does not know to 127.0.0.1:2321 without a word.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Tcti {
    /// `device:/dev/tpmrm0`, `device:/dev/tpm0`: a character device, by its absolute path.
    Device(PathBuf),
    /// `swtpm:host=127.0.0.1,port=2321`: a software TPM; its control channel is the port after.
    Swtpm {
        /// A host name or an IPv4 address.
        host: String,
        /// 1 to 65534.
        port: u16,
    },
}

/// A TCTI string that is not accepted.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum TctiError {
    /// Another kind.
    #[error("the TPM is named device:/dev/NAME or swtpm:host=HOST,port=PORT, not {0:?}")]
    Kind(String),
    /// A device without an absolute path.
    #[error("device: needs the absolute path of a TPM device, as in device:/dev/tpmrm0")]
    Path,
    /// The unix socket of a software TPM, which the library can't be told.
    #[error("swtpm:path= is not supported; start swtpm with --server type=tcp and name it swtpm:host=HOST,port=PORT")]
    UnixSocket,
    /// Something else after `swtpm:`.
    #[error("swtpm: takes exactly host=HOST,port=PORT (a name or IPv4 address, a port from 1 to 65534)")]
    Swtpm,
}

impl Tcti {
    /// Whether a resource manager stands before the TPM: then every client has objects of its own, and what another one
    /// left is no concern of ours.
    pub fn has_resource_manager(&self) -> bool {
        let managed = |p: &Path| p.file_name().and_then(|n| n.to_str()).is_some_and(|n| n.starts_with("tpmrm"));
        matches!(self, Self::Device(path) if managed(path))
    }
}

impl FromStr for Tcti {
    type Err = TctiError;
    fn from_str(text: &str) -> Result<Self, TctiError> {
        match text.split_once(':') {
            Some(("device", path)) => device(path),
            Some(("swtpm", rest)) => swtpm(rest),
            _ => Err(TctiError::Kind(text.chars().take(64).collect())),
        }
    }
}

fn device(path: &str) -> Result<Tcti, TctiError> {
    if path.starts_with('/') && path.len() < 256 && !path.contains(['\0', '\n']) {
        Ok(Tcti::Device(path.into()))
    } else {
        Err(TctiError::Path)
    }
}

fn swtpm(rest: &str) -> Result<Tcti, TctiError> {
    if rest.split(',').any(|part| part.starts_with("path=")) {
        return Err(TctiError::UnixSocket);
    }
    let (first, second) = rest.split_once(',').ok_or(TctiError::Swtpm)?;
    let host = first.strip_prefix("host=").ok_or(TctiError::Swtpm)?;
    let port = second.strip_prefix("port=").ok_or(TctiError::Swtpm)?;
    if port.is_empty() || !port.bytes().all(|b| b.is_ascii_digit()) {
        return Err(TctiError::Swtpm);
    }
    let port: u16 = port.parse().map_err(|_| TctiError::Swtpm)?;
    if !is_host(host) || port == 0 || port == u16::MAX {
        return Err(TctiError::Swtpm);
    }
    Ok(Tcti::Swtpm { host: host.to_owned(), port })
}

/// A host name, or an IPv4 address: the library's own separator takes IPv6 away.
fn is_host(host: &str) -> bool {
    let label = |l: &str| {
        (1..=63).contains(&l.len())
            && l.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
            && !l.starts_with('-')
            && !l.ends_with('-')
    };
    matches!(host.parse(), Ok(IpAddr::V4(_))) || (host.len() <= 253 && host.split('.').all(label))
}

impl fmt::Display for Tcti {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Device(path) => write!(f, "device:{}", path.display()),
            Self::Swtpm { host, port } => write!(f, "swtpm:host={host},port={port}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_accepted_comes_back_as_written() {
        for text in
            ["device:/dev/tpmrm0", "device:/dev/tpm0", "swtpm:host=127.0.0.1,port=2321", "swtpm:host=a.b,port=1"]
        {
            let tcti: Tcti = text.parse().expect("accepted");
            assert_eq!(tcti.to_string(), text);
        }
    }

    #[test]
    fn everything_else_is_refused_and_never_becomes_a_default() {
        for text in [
            "",
            "device",
            "device:",
            "device:tpm0",
            "swtpm",
            "swtpm:",
            "swtpm:host=127.0.0.1",
            "swtpm:port=2321",
            "swtpm:port=2321,host=127.0.0.1",
            "swtpm:host=127.0.0.1,port=0",
            "swtpm:host=127.0.0.1,port=65535",
            "swtpm:host=127.0.0.1,port=+1",
            "swtpm:host=127.0.0.1,port=2321,x=y",
            "swtpm:host=::1,port=2321",
            "swtpm:host=,port=2321",
            "mssim:host=127.0.0.1,port=2321",
            "tabrmd",
            "cmd:sh",
            "libtss2-tcti-cmd.so.0:sh",
        ] {
            assert!(text.parse::<Tcti>().is_err(), "{text}");
        }
        assert_eq!("swtpm:path=/run/tpm.sock".parse::<Tcti>(), Err(TctiError::UnixSocket));
    }

    #[test]
    fn only_the_kernel_s_manager_is_one() {
        assert!("device:/dev/tpmrm0".parse::<Tcti>().is_ok_and(|t| t.has_resource_manager()));
        assert!("device:/dev/tpm0".parse::<Tcti>().is_ok_and(|t| !t.has_resource_manager()));
    }
}
