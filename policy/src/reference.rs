//! Which software a host may run: reference values, and the verdict on what a host's verified logs say it runs.
//!
//! The verifier has already replayed the logs against the quote; here every single measurement must be known. There is no
//! "other": what no reference value names is refused.

use crate::encoding::Digest;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};

/// The PCR that the host's own layers extend.
pub const LAYER_PCR: u8 = 14;

/// The PCR that IMA extends.
pub const IMA_PCR: u8 = 10;

/// A customer's reference values: sets of known layers per PCR, closed.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ReferenceValues {
    /// Version of this format: 1.
    pub version: u32,
    /// Layers that may stand in the logs, by PCR. The keys (with those of `exact`) are the PCRs that are quoted.
    pub pcrs: BTreeMap<u8, Vec<Layer>>,
    /// PCRs trusted by their exact final value instead: any of the listed ones.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub exact: BTreeMap<u8, Vec<Digest>>,
    /// Layers (by name) of which at least one must stand in PCR 14's log, each.
    pub required_layers: Vec<String>,
    /// Whether an IMA log must come, PCR 10 be quoted, and each of its entries be known.
    #[serde(default)]
    pub ima: bool,
    /// Digests that are refused wherever they stand, known or not.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub revoked: BTreeSet<Digest>,
    /// Firmware of TPMs that is known to be broken: a TPM that runs it proves nothing.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub denied_tpm_firmware: Vec<FirmwareRange>,
}

/// Versions of a TPM's firmware, as its quotes give them (TPM 2.0 part 2, 10.12.8), from the first to the last.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FirmwareRange {
    /// The first.
    pub from: FirmwareVersion,
    /// The last.
    pub to: FirmwareVersion,
    /// Why, for people: an advisory's number.
    pub why: String,
}

/// A TPM's firmware version: 64 bits, written as 16 hex digits.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct FirmwareVersion(pub u64);

impl std::fmt::Display for FirmwareVersion {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

impl From<FirmwareVersion> for String {
    fn from(version: FirmwareVersion) -> Self {
        version.to_string()
    }
}

impl TryFrom<String> for FirmwareVersion {
    type Error = &'static str;
    fn try_from(text: String) -> Result<Self, Self::Error> {
        let digits = text.len() == 16 && text.bytes().all(|b| b.is_ascii_hexdigit());
        let number = u64::from_str_radix(&text, 16).ok().filter(|_| digits);
        number.map(Self).ok_or("a TPM's firmware version is 16 hex digits")
    }
}

/// One known layer: a firmware event, a boot loader, a binary, a file.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Layer {
    /// What it is: the layer log's name, a file's path for IMA, any text for firmware events.
    pub layer: String,
    /// Its version, for people; for layers of PCR 14 it must match the log's.
    pub version: String,
    /// For firmware events the digest that was extended; for layers of PCR 14 and IMA entries the file's digest.
    pub digest: Digest,
}

/// One measurement that a verified log holds.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Measurement {
    /// The PCR it extended.
    pub pcr: u8,
    /// Name, where the log gives one that is covered by the digest: layers of PCR 14, IMA paths.
    pub layer: Option<String>,
    /// Version, likewise.
    pub version: Option<String>,
    /// As in [`Layer::digest`].
    pub digest: Digest,
    /// What the event is, for messages: "EV_EFI_PLATFORM_FIRMWARE_BLOB2", "layer", "IMA".
    pub kind: String,
}

/// What a host was proved to run.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct PlatformState {
    /// Every measurement of the quoted PCRs, in log order, separators and capped actions left out.
    pub measurements: Vec<Measurement>,
    /// Final values of the quoted PCRs.
    pub pcrs: BTreeMap<u8, Digest>,
    /// The TPM's firmware, by its quote.
    pub tpm_firmware: FirmwareVersion,
}

/// Why reference values can't be used.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum ReferenceError {
    /// Another format.
    #[error("reference values of version {0} are not known to this program (it knows 1)")]
    Version(u32),
    /// No such PCR.
    #[error("PCR {0} does not exist; there are 0 to 23")]
    Pcr(u8),
    /// A PCR without which nothing is proved.
    #[error("reference values must cover PCR {0}")]
    Missing(u8),
    /// Two ways to judge one PCR.
    #[error("PCR {0} stands under both pcrs and exact")]
    Both(u8),
    /// PCR 10 without IMA, or the reverse.
    #[error("reference values cover PCR 10 exactly when they ask for an IMA log")]
    Ima,
    /// Nothing required.
    #[error("required_layers is empty: a host without any layer of ours would do")]
    NoLayers,
    /// A range of firmware that holds nothing.
    #[error("denied TPM firmware goes from {0} to {1}: the first must not be above the last")]
    Firmware(FirmwareVersion, FirmwareVersion),
    /// PCR 14 by composite.
    #[error("PCR 14 is judged by its layers, not by an exact value")]
    ExactLayers,
}

/// Why a host's software is refused; each names the first offender.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum PlatformError {
    /// A layer that no reference value names.
    #[error("PCR {pcr}: {kind} {name} with digest {digest} is not among the reference values")]
    Unknown {
        /// Where.
        pcr: u8,
        /// What the log calls it.
        name: String,
        /// The event's kind.
        kind: String,
        /// What it is.
        digest: Digest,
    },
    /// A layer that is known to be bad.
    #[error("PCR {pcr}: {name} with digest {digest} is revoked")]
    Revoked {
        /// Where.
        pcr: u8,
        /// What the log calls it.
        name: String,
        /// What it is.
        digest: Digest,
    },
    /// A PCR value that no reference value names.
    #[error("PCR {0} has the value {1}, which is not among the reference values")]
    Value(u8, Digest),
    /// A quoted set that is not the asked one.
    #[error("the quoted PCRs are not those that the reference values ask for")]
    Selection,
    /// A layer that must be there.
    #[error("the layer {0} was not measured on this host")]
    Absent(String),
    /// Firmware never ran, or never measured.
    #[error("PCR {0} is all zero: nothing measured the boot")]
    Zero(u8),
    /// A TPM that proves nothing.
    #[error("the TPM's firmware {version} is denied ({why}): update it, then enrol the host anew")]
    Firmware {
        /// Which.
        version: FirmwareVersion,
        /// Why, as the reference values say.
        why: String,
    },
}

impl ReferenceValues {
    /// Checks what the types alone don't.
    pub fn check(&self) -> Result<(), ReferenceError> {
        if self.version != 1 {
            return Err(ReferenceError::Version(self.version));
        }
        if let Some(pcr) = self.pcrs.keys().chain(self.exact.keys()).find(|p| **p > 23) {
            return Err(ReferenceError::Pcr(*pcr));
        }
        if let Some(pcr) = self.pcrs.keys().find(|p| self.exact.contains_key(p)) {
            return Err(ReferenceError::Both(*pcr));
        }
        if self.exact.contains_key(&LAYER_PCR) {
            return Err(ReferenceError::ExactLayers);
        }
        let selection = self.selection();
        if let Some(pcr) = [0, LAYER_PCR].iter().find(|p| !selection.contains(p)) {
            return Err(ReferenceError::Missing(*pcr));
        }
        if selection.contains(&IMA_PCR) != self.ima {
            return Err(ReferenceError::Ima);
        }
        if self.required_layers.is_empty() {
            return Err(ReferenceError::NoLayers);
        }
        if let Some(range) = self.denied_tpm_firmware.iter().find(|r| r.from > r.to) {
            return Err(ReferenceError::Firmware(range.from, range.to));
        }
        Ok(())
    }

    /// The PCRs that must be quoted, rising.
    pub fn selection(&self) -> Vec<u8> {
        let set: BTreeSet<u8> = self.pcrs.keys().chain(self.exact.keys()).copied().collect();
        set.into_iter().collect()
    }

    /// Whether `state` is software that these values know, every piece of it.
    pub fn judge(&self, state: &PlatformState) -> Result<(), PlatformError> {
        let version = state.tpm_firmware;
        if let Some(denied) = self.denied_tpm_firmware.iter().find(|r| (r.from..=r.to).contains(&version)) {
            return Err(PlatformError::Firmware { version, why: denied.why.clone() });
        }
        if !state.pcrs.keys().copied().eq(self.selection()) {
            return Err(PlatformError::Selection);
        }
        if let Some((pcr, _)) = state.pcrs.iter().find(|(_, value)| value.0 == [0; 32]) {
            return Err(PlatformError::Zero(*pcr));
        }
        for measurement in &state.measurements {
            self.judge_one(measurement)?;
        }
        for (pcr, values) in &self.exact {
            let found = state.pcrs.get(pcr).copied().unwrap_or(Digest([0; 32]));
            if !values.contains(&found) {
                return Err(PlatformError::Value(*pcr, found));
            }
        }
        for name in &self.required_layers {
            let there = |m: &Measurement| m.pcr == LAYER_PCR && m.layer.as_deref() == Some(name);
            if !state.measurements.iter().any(there) {
                return Err(PlatformError::Absent(name.clone()));
            }
        }
        Ok(())
    }

    fn judge_one(&self, measurement: &Measurement) -> Result<(), PlatformError> {
        let Measurement { pcr, layer, version, digest, kind } = measurement;
        let name = || layer.clone().unwrap_or_default();
        if self.revoked.contains(digest) {
            return Err(PlatformError::Revoked { pcr: *pcr, name: name(), digest: *digest });
        }
        if self.exact.contains_key(pcr) {
            return Ok(());
        }
        let known = self.pcrs.get(pcr).is_some_and(|layers| {
            layers.iter().any(|l| {
                l.digest == *digest
                    && layer.as_ref().is_none_or(|n| *n == l.layer)
                    && version.as_ref().is_none_or(|v| *v == l.version)
            })
        });
        if known {
            Ok(())
        } else {
            Err(PlatformError::Unknown { pcr: *pcr, name: name(), kind: kind.clone(), digest: *digest })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layer(layer: &str, byte: u8) -> Layer {
        Layer { layer: layer.into(), version: "1".into(), digest: Digest([byte; 32]) }
    }

    fn values() -> ReferenceValues {
        ReferenceValues {
            version: 1,
            pcrs: [(0, vec![layer("firmware", 1)]), (14, vec![layer("fealty", 2)])].into(),
            exact: [(7, vec![Digest([7; 32])])].into(),
            required_layers: vec!["fealty".into()],
            ima: false,
            revoked: BTreeSet::new(),
            denied_tpm_firmware: vec![],
        }
    }

    fn state() -> PlatformState {
        let m = |pcr, layer: Option<&str>, byte| Measurement {
            pcr,
            layer: layer.map(Into::into),
            version: layer.map(|_| "1".into()),
            digest: Digest([byte; 32]),
            kind: "event".into(),
        };
        PlatformState {
            measurements: vec![m(0, None, 1), m(7, None, 99), m(14, Some("fealty"), 2)],
            pcrs: [(0, Digest([3; 32])), (7, Digest([7; 32])), (14, Digest([4; 32]))].into(),
            tpm_firmware: FirmwareVersion(0x0007_0002_0000_0001),
        }
    }

    #[test]
    fn what_is_known_is_accepted() {
        assert_eq!(values().check(), Ok(()));
        assert_eq!(values().judge(&state()), Ok(()));
    }

    #[test]
    fn attack_17_an_unknown_layer_is_refused() {
        let mut bad = state();
        bad.measurements[0].digest = Digest([9; 32]);
        assert!(matches!(values().judge(&bad), Err(PlatformError::Unknown { pcr: 0, .. })));
        let mut bad = state();
        bad.measurements[2].layer = Some("shell".into());
        assert!(matches!(values().judge(&bad), Err(PlatformError::Unknown { pcr: 14, .. })));
    }

    #[test]
    fn attack_35_a_layer_of_another_version_is_refused() {
        let mut bad = state();
        bad.measurements[2].version = Some("0".into());
        assert!(matches!(values().judge(&bad), Err(PlatformError::Unknown { pcr: 14, .. })));
    }

    #[test]
    fn attack_49_tables_that_nobody_knows_are_refused_wherever_firmware_measured_them() {
        // Firmware measures the ACPI tables that it hands over as an event like any other: a configuration table in PCR 0.
        let mut bad = state();
        let tables = Measurement {
            kind: "EV_EFI_HANDOFF_TABLES2".into(),
            digest: Digest([8; 32]),
            ..bad.measurements[0].clone()
        };
        bad.measurements.push(tables);
        assert!(matches!(values().judge(&bad), Err(PlatformError::Unknown { pcr: 0, .. })));
        // Known as a layer of another PCR they are still unknown in this one.
        let mut elsewhere = values();
        elsewhere.pcrs.get_mut(&14).expect("there").push(layer("tables", 8));
        assert!(matches!(elsewhere.judge(&bad), Err(PlatformError::Unknown { pcr: 0, .. })));
        elsewhere.pcrs.get_mut(&0).expect("there").push(layer("tables", 8));
        assert_eq!(elsewhere.judge(&bad), Ok(()));
    }

    #[test]
    fn attack_13_another_selection_is_refused() {
        let mut bad = state();
        bad.pcrs.remove(&7);
        assert_eq!(values().judge(&bad), Err(PlatformError::Selection));
        let mut bad = state();
        bad.pcrs.insert(1, Digest([1; 32]));
        assert_eq!(values().judge(&bad), Err(PlatformError::Selection));
    }

    #[test]
    fn attack_14_an_all_zero_pcr_is_refused() {
        let mut bad = state();
        bad.pcrs.insert(0, Digest([0; 32]));
        assert_eq!(values().judge(&bad), Err(PlatformError::Zero(0)));
    }

    #[test]
    fn attack_24_a_tpm_whose_firmware_is_denied_proves_nothing() {
        let with = |from, to| ReferenceValues {
            denied_tpm_firmware: vec![FirmwareRange {
                from: FirmwareVersion(from),
                to: FirmwareVersion(to),
                why: "CVE-2017-15361".into(),
            }],
            ..values()
        };
        let version = state().tpm_firmware.0;
        assert_eq!(with(version + 1, u64::MAX).judge(&state()), Ok(()));
        assert_eq!(with(0, version - 1).judge(&state()), Ok(()));
        assert!(matches!(with(2, 1).check(), Err(ReferenceError::Firmware(..))));
        assert_eq!(with(1, 1).check(), Ok(()));
        let denied = with(version, version).judge(&state());
        assert!(matches!(&denied, Err(PlatformError::Firmware { why, .. }) if why == "CVE-2017-15361"));
        let text = serde_json::to_string(&with(1, 2)).expect("json");
        assert!(text.contains(r#""from":"0000000000000001""#));
        assert_eq!(serde_json::from_str::<ReferenceValues>(&text).expect("reads back"), with(1, 2));
        assert!(serde_json::from_str::<FirmwareVersion>("\"12\"").is_err());
        assert!(serde_json::from_str::<FirmwareVersion>("\"+000000000000001\"").is_err());
    }

    #[test]
    fn missing_and_revoked_layers_are_refused() {
        let mut bad = state();
        bad.measurements.pop();
        assert_eq!(values().judge(&bad), Err(PlatformError::Absent("fealty".into())));
        let mut strict = values();
        strict.revoked.insert(Digest([99; 32]));
        assert!(matches!(strict.judge(&state()), Err(PlatformError::Revoked { pcr: 7, .. })));
    }

    #[test]
    fn values_that_prove_nothing_are_refused() {
        let mut bad = values();
        bad.pcrs.remove(&14);
        assert_eq!(bad.check(), Err(ReferenceError::Missing(14)));
        let mut bad = values();
        bad.required_layers.clear();
        assert_eq!(bad.check(), Err(ReferenceError::NoLayers));
        let mut bad = values();
        bad.ima = true;
        assert_eq!(bad.check(), Err(ReferenceError::Ima));
    }
}
