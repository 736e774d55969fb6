//! The layer log of this boot, as a file, and PCR 14, which it explains.
//!
//! A record is written before PCR 14 is extended with it. Where the service ends in between, PCR 14 tells at the next start
//! whether the last record counts.

use crate::runtime::{read_bounded, replace};
use attest::eventlog::layer::Pending;
use attest::eventlog::{LayerLog, LogError, tcg};
use attest::protocol::LOG_LIMIT;
use attest_tpm::{Tpm, TpmError};
use policy::Digest;
use policy::reference::LAYER_PCR;
use std::io;
use std::path::{Path, PathBuf};

/// The layer log.
#[derive(Debug)]
pub(super) struct Layers {
    path: PathBuf,
    /// PCR 14 after the firmware's log.
    start: Digest,
    log: LayerLog,
    matches: bool,
}

/// A layer log that can't be used or changed.
#[derive(Debug, thiserror::Error)]
pub(super) enum LayerError {
    /// The TPM.
    #[error(transparent)]
    Tpm(#[from] TpmError),
    /// The file.
    #[error("the layer log {0}: {1}")]
    Io(PathBuf, #[source] io::Error),
    /// Its content, or what was to be added.
    #[error(transparent)]
    Log(#[from] LogError),
    /// PCR 14 is not what the logs say.
    #[error("PCR 14 is not what firmware log and layer log say: reboot the host")]
    Mismatch,
    /// The layer is there already.
    #[error("the layer {0} was measured already in this boot; each layer is measured once")]
    Again(String),
    /// No seal.
    #[error("the layer log is not sealed: run fealty-host measure")]
    Unsealed,
    /// Nothing to seal.
    #[error("no layer was measured: there is nothing to seal")]
    Empty,
}

impl Layers {
    /// Removes the log of another boot.
    pub(super) fn forget(path: &Path) -> Result<(), LayerError> {
        match std::fs::remove_file(path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => Err(LayerError::Io(path.to_owned(), e)),
            _ => Ok(()),
        }
    }

    /// Reads the log at `path`, where there is one, and compares it with PCR 14, whose value after the firmware's log is
    /// `start`.
    pub(super) fn load(path: PathBuf, start: Digest, tpm: &mut Tpm) -> Result<Self, LayerError> {
        let log = match read_bounded(&path, LOG_LIMIT) {
            Ok(bytes) => LayerLog::parse(&bytes)?,
            Err(e) if e.kind() == io::ErrorKind::NotFound => LayerLog::new(),
            Err(e) => return Err(LayerError::Io(path, e)),
        };
        let mut layers = Self { path, start, log, matches: false };
        layers.settle(tpm)?;
        Ok(layers)
    }

    /// The log.
    pub(super) fn bytes(&self) -> &[u8] {
        self.log.as_bytes()
    }

    /// PCR 14 after both logs.
    pub(super) fn replayed(&self) -> Digest {
        self.log.pcr_value(self.start)
    }

    /// Names and versions of the layers, in order.
    pub(super) fn names(&self) -> Vec<String> {
        let name = |l: &attest::eventlog::layer::LayerRecord| match &l.version[..] {
            "" => l.name.clone(),
            version => format!("{} {version}", l.name),
        };
        self.log.layers().iter().map(name).collect()
    }

    /// Whether the last record is a seal.
    pub(super) fn sealed(&self) -> bool {
        self.log.is_sealed()
    }

    /// Whether VMs may get keys on this log.
    pub(super) fn check(&self) -> Result<(), LayerError> {
        if !self.matches {
            Err(LayerError::Mismatch)
        } else if self.log.has_shell() {
            Err(LogError::Shell.into())
        } else if !self.log.is_sealed() {
            Err(LayerError::Unsealed)
        } else {
            Ok(())
        }
    }

    /// Measures a layer.
    pub(super) fn extend(
        &mut self,
        tpm: &mut Tpm,
        name: &str,
        version: &str,
        digest: &Digest,
    ) -> Result<(), LayerError> {
        if self.log.layers().iter().any(|l| l.name == name) {
            return Err(LayerError::Again(name.chars().take(64).collect()));
        }
        let record = self.log.layer(name, version, *digest)?;
        self.add(tpm, record)
    }

    /// Seals the log. Where it is sealed already, PCR 14 is looked at and nothing is done.
    pub(super) fn seal(&mut self, tpm: &mut Tpm) -> Result<(), LayerError> {
        if self.log.layers().is_empty() {
            return Err(LayerError::Empty);
        }
        // A record that was written but not extended may stand behind the seal.
        self.settle(tpm)?;
        if self.log.is_sealed() {
            return if self.matches { Ok(()) } else { Err(LayerError::Mismatch) };
        }
        let record = self.log.seal();
        self.add(tpm, record)
    }

    fn add(&mut self, tpm: &mut Tpm, record: Pending) -> Result<(), LayerError> {
        self.settle(tpm)?;
        if !self.matches {
            return Err(LayerError::Mismatch);
        }
        if self.log.has_shell() {
            return Err(LogError::Shell.into());
        }
        let digest = *record.digest();
        let mut longer = self.log.clone();
        longer.append(record);
        if longer.as_bytes().len() > LOG_LIMIT {
            return Err(LogError::TooLong("layer").into());
        }
        replace(&self.path, longer.as_bytes()).map_err(|e| LayerError::Io(self.path.clone(), e))?;
        self.log = longer;
        self.matches = false;
        let extended = tpm.pcr_extend(LAYER_PCR, &digest);
        self.settle(tpm)?;
        extended?;
        if self.matches { Ok(()) } else { Err(LayerError::Mismatch) }
    }

    /// Lets PCR 14 say whether the log is right, and whether its last record counts.
    fn settle(&mut self, tpm: &mut Tpm) -> Result<(), LayerError> {
        let now = tpm.pcr_read(&[LAYER_PCR])?;
        let now = now.get(&LAYER_PCR).ok_or(TpmError::Answer("TPM2_PCR_Read"))?;
        self.matches = self.replayed() == *now;
        if self.matches {
            return Ok(());
        }
        let last = tcg::parse(self.log.as_bytes(), "layer")?.last().map(|event| event.offset);
        let Some(shorter) = last.and_then(|end| self.log.as_bytes().get(..end)) else { return Ok(()) };
        let shorter = LayerLog::parse(shorter)?;
        if shorter.pcr_value(self.start) == *now {
            replace(&self.path, shorter.as_bytes()).map_err(|e| LayerError::Io(self.path.clone(), e))?;
            self.log = shorter;
            self.matches = true;
        }
        Ok(())
    }
}
