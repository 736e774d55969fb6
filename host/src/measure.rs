//! Measuring layers: the file behind a descriptor is hashed, PCR 14 is extended by the TPM service, the log is sealed.

use attest::service::{ControlClient, ServiceError};
use policy::Digest;
use sha2::{Digest as _, Sha256};
use std::fs::File;
use std::io::{self, Read};
use std::path::PathBuf;
use std::str::FromStr;

/// A layer to measure: `NAME=PATH` or `NAME=PATH@VERSION`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct LayerArg {
    /// Its name: 1 to 255 bytes.
    pub name: String,
    /// The file.
    pub path: PathBuf,
    /// Its version, 0 to 255 bytes; empty where none is given.
    pub version: String,
}

/// A layer that was measured.
#[derive(Clone, PartialEq, Eq, Debug, serde::Serialize)]
pub struct Measured {
    /// Its name.
    pub layer: String,
    /// Its version.
    pub version: String,
    /// SHA-256 of the file.
    pub digest: Digest,
}

/// Layers that could not be measured.
#[derive(Debug, thiserror::Error)]
pub enum MeasureError {
    /// Not `NAME=PATH[@VERSION]`.
    #[error("a layer is NAME=PATH or NAME=PATH@VERSION, name and version at most 255 bytes, not {0:?}")]
    Argument(String),
    /// A name that stands twice.
    #[error("the layer {0} stands twice")]
    Twice(String),
    /// A layer of this boot.
    #[error("the layer {0} was measured already in this boot; each layer is measured once{1}")]
    Again(String, &'static str),
    /// The file.
    #[error("{0}: {1}")]
    File(PathBuf, #[source] io::Error),
    /// The service.
    #[error(transparent)]
    Service(#[from] ServiceError),
}

impl FromStr for LayerArg {
    type Err = MeasureError;
    fn from_str(text: &str) -> Result<Self, MeasureError> {
        let wrong = || MeasureError::Argument(text.chars().take(128).collect());
        let (name, rest) = text.split_once('=').ok_or_else(wrong)?;
        let (path, version) = match rest.rsplit_once('@') {
            // An '@' in a folder's name begins no version.
            Some((path, version)) if !version.contains('/') => (path, version),
            _ => (rest, ""),
        };
        if !(1..=255).contains(&name.len()) || version.len() > 255 || path.is_empty() {
            return Err(wrong());
        }
        Ok(Self { name: name.to_owned(), path: path.into(), version: version.to_owned() })
    }
}

/// Measures `layers` in this order and seals the log; no layers: only seals what an earlier call left unsealed. Every file is
/// hashed, and every name held against the log, before anything is extended, so that a wrong one changes nothing.
pub fn measure(client: &mut ControlClient, layers: &[LayerArg]) -> Result<Vec<Measured>, MeasureError> {
    let mut measured: Vec<Measured> = Vec::new();
    for layer in layers {
        if measured.iter().any(|m| m.layer == layer.name) {
            return Err(MeasureError::Twice(layer.name.clone()));
        }
        let digest = hash(layer).map_err(|e| MeasureError::File(layer.path.clone(), e))?;
        measured.push(Measured { layer: layer.name.clone(), version: layer.version.clone(), digest });
    }
    let status = client.status()?;
    let hint = if status.sealed { "" } else { "; fealty-host measure without layers seals the log" };
    if let Some(known) = measured.iter().find(|m| status.layers.iter().any(|shown| is_of(shown, &m.layer))) {
        return Err(MeasureError::Again(known.layer.clone(), hint));
    }
    for layer in &measured {
        client.extend(&layer.layer, &layer.version, layer.digest)?;
    }
    client.reseal()?;
    Ok(measured)
}

/// Whether `shown`, a layer's name and version as [`attest::service::Status`] has them, is of the layer `name`.
fn is_of(shown: &str, name: &str) -> bool {
    shown.strip_prefix(name).is_some_and(|rest| rest.is_empty() || rest.starts_with(' '))
}

fn hash(layer: &LayerArg) -> io::Result<Digest> {
    let mut file = File::open(&layer.path)?;
    if !file.metadata()?.is_file() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "a layer is a regular file"));
    }
    let mut hash = Sha256::new();
    let mut chunk = vec![0; 1 << 16];
    loop {
        match file.read(&mut chunk) {
            Ok(0) => return Ok(Digest(hash.finalize().into())),
            Ok(count) => hash.update(&chunk[..count]),
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_layer_is_a_name_a_path_and_maybe_a_version() {
        let parse = |t: &str| t.parse::<LayerArg>().map(|l| (l.name, l.path.display().to_string(), l.version)).ok();
        let some = |n: &str, p: &str, v: &str| Some((n.to_owned(), p.to_owned(), v.to_owned()));
        assert_eq!(parse("fealty=/bin/fealty@0.1.0"), some("fealty", "/bin/fealty", "0.1.0"));
        assert_eq!(parse("fealty=/bin/fealty"), some("fealty", "/bin/fealty", ""));
        assert_eq!(parse("a=/home/x@y/f"), some("a", "/home/x@y/f", ""));
        assert_eq!(parse("a=/home/x@y/f@2"), some("a", "/home/x@y/f", "2"));
        assert_eq!(parse("a=b=c"), some("a", "b=c", ""));
        for bad in ["", "a", "=x", "a=", "a=@1", &format!("{}=x", "n".repeat(256)), &format!("a=x@{}", "v".repeat(256))]
        {
            assert_eq!(parse(bad), None, "{bad}");
        }
    }

    #[test]
    fn files_are_hashed_whole_and_only_files() {
        let dir = tempfile::tempdir().expect("a folder");
        let path = dir.path().join("layer");
        std::fs::write(&path, vec![7; 200_000]).expect("written");
        let layer = LayerArg { name: "a".into(), path, version: String::new() };
        assert_eq!(hash(&layer).ok(), Some(Digest::of(&vec![7; 200_000])));
        let folder = LayerArg { path: dir.path().into(), ..layer };
        assert!(hash(&folder).is_err());
    }
}
