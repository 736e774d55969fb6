//! Firmware and kernel, played on a bare software TPM: what a computer would have measured before the host's own layers,
//! with logs to match. The events are those that OVMF logs for a machine with Secure Boot off and one boot option.

use attest::eventlog::{FirmwareLog, ImaLog, tcg::event_name};
use attest::tcti::Tcti;
use attest::tpm::pcr::extend;
use attest_tpm::{Tpm, TpmError};
use policy::Digest;
use serde::Deserialize;
use std::collections::BTreeMap;
use std::path::Path;

const EV_SEPARATOR: u32 = 0x04;
const EV_S_CRTM_VERSION: u32 = 0x08;
const EV_EFI_VARIABLE_DRIVER_CONFIG: u32 = 0x8000_0001;
const EV_EFI_VARIABLE_BOOT: u32 = 0x8000_0002;
const EV_EFI_BOOT_SERVICES_APPLICATION: u32 = 0x8000_0003;
const EV_EFI_GPT_EVENT: u32 = 0x8000_0006;
const EV_EFI_ACTION: u32 = 0x8000_0007;
const EV_EFI_HANDOFF_TABLES2: u32 = 0x8000_000b;
const EV_EFI_PLATFORM_FIRMWARE_BLOB2: u32 = 0x8000_000a;

/// One thing that firmware measures.
#[derive(Clone, PartialEq, Eq, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FirmwareEvent {
    /// The PCR, 0 to 7.
    pub pcr: u8,
    /// The event's type, by the TCG's number.
    pub kind: u32,
    /// Its data, hexadecimal in JSON.
    #[serde(deserialize_with = "from_hex")]
    pub data: Vec<u8>,
    /// What is extended; the digest of the data where it is absent.
    #[serde(default)]
    pub digest: Option<Digest>,
}

/// What a machine does before its layers are measured.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Boot {
    /// The firmware's events, in order.
    pub firmware: Vec<FirmwareEvent>,
    /// Files that the kernel's IMA measures after the boot aggregate.
    pub ima: Vec<(String, Digest)>,
}

/// Logs of a boot.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Logs {
    /// The firmware's log, crypto-agile.
    pub firmware: Vec<u8>,
    /// IMA's log, template ima-ng.
    pub ima: Vec<u8>,
}

/// A boot that can't be played.
#[derive(Debug, thiserror::Error)]
pub enum FirmwareError {
    /// The TPM.
    #[error(transparent)]
    Tpm(#[from] TpmError),
    /// Not a bare TPM.
    #[error("firmware ran on this TPM already (PCR {0} is not at its start): reset it first")]
    Ran(u8),
    /// A PCR that firmware has no business with, or a type that no log knows.
    #[error("event {0}: firmware extends PCRs 0 to 7 with events of types that the TCG knows")]
    Event(usize),
    /// A file of events.
    #[error("{0}: {1}")]
    File(String, String),
}

impl Default for Boot {
    /// A machine with the firmware "fealty lab firmware 1".
    fn default() -> Self {
        Self::with_version("fealty lab firmware 1")
    }
}

impl Boot {
    /// A machine with another firmware, all else alike.
    pub fn with_version(version: &str) -> Self {
        let event = |pcr, kind, data: Vec<u8>| FirmwareEvent { pcr, kind, data, digest: None };
        let blob = |pcr, kind, data: Vec<u8>, content: &str| FirmwareEvent {
            pcr,
            kind,
            data,
            digest: Some(Digest::of(content.as_bytes())),
        };
        let mut firmware = vec![
            event(0, EV_S_CRTM_VERSION, utf16(version)),
            blob(0, EV_EFI_PLATFORM_FIRMWARE_BLOB2, firmware_blob("PEIFV", 0x0082_0000, 0xe_0000), version),
            blob(0, EV_EFI_PLATFORM_FIRMWARE_BLOB2, firmware_blob("DXEFV", 0x0090_0000, 0xe8_0000), version),
        ];
        for (name, value) in [("SecureBoot", &[0][..]), ("PK", &[]), ("KEK", &[]), ("db", &[]), ("dbx", &[])] {
            firmware.push(event(7, EV_EFI_VARIABLE_DRIVER_CONFIG, variable(name, value)));
        }
        firmware.push(separator(7));
        firmware.push(blob(1, EV_EFI_HANDOFF_TABLES2, handoff("SMBIOS"), "SMBIOS tables of the lab machine"));
        firmware.push(event(1, EV_EFI_VARIABLE_BOOT, variable("BootOrder", &[0, 0])));
        firmware.push(event(1, EV_EFI_VARIABLE_BOOT, variable("Boot0000", &utf16("host image"))));
        firmware.push(event(4, EV_EFI_ACTION, b"Calling EFI Application from Boot Option".to_vec()));
        firmware.extend((0..=6).map(separator));
        firmware.push(event(5, EV_EFI_GPT_EVENT, b"EFI PART of the lab machine".to_vec()));
        firmware.push(blob(4, EV_EFI_BOOT_SERVICES_APPLICATION, image_load(), "unified kernel image of the host"));
        firmware.push(event(5, EV_EFI_ACTION, b"Exit Boot Services Invocation".to_vec()));
        firmware.push(event(5, EV_EFI_ACTION, b"Exit Boot Services Returned with Success".to_vec()));
        Self { firmware, ima: Vec::new() }
    }

    /// The events of a JSON file: a list of {pcr, kind, data (hexadecimal), digest (hexadecimal, optional)}.
    ///
    /// # Errors
    /// Where the file can't be read.
    pub fn from_file(path: &Path) -> Result<Self, FirmwareError> {
        let fail = |e: String| FirmwareError::File(path.display().to_string(), e);
        let bytes = std::fs::read(path).map_err(|e| fail(e.to_string()))?;
        let firmware = serde_json::from_slice(&bytes).map_err(|e| fail(e.to_string()))?;
        Ok(Self { firmware, ima: Vec::new() })
    }

    /// Plays the boot on the TPM: TPM2_Startup, the firmware's extends, IMA's extends of PCR 10.
    ///
    /// # Errors
    /// Where the TPM is no bare one, or refuses.
    pub fn play(&self, tcti: &Tcti) -> Result<Logs, FirmwareError> {
        let mut tpm = Tpm::start_up(tcti)?;
        let fresh = tpm.pcr_read(&[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 14])?;
        if let Some((pcr, _)) = fresh.iter().find(|(_, value)| value.0 != [0; 32]) {
            return Err(FirmwareError::Ran(*pcr));
        }
        let (firmware, pcrs) = self.log()?;
        for event in &self.firmware {
            tpm.pcr_extend(event.pcr, &event.extended())?;
        }
        let mut ima = ImaLog::new();
        tpm.pcr_extend(10, &ima.boot_aggregate(&pcrs))?;
        for (path, digest) in &self.ima {
            tpm.pcr_extend(10, &ima.entry(path, digest))?;
        }
        Ok(Logs { firmware, ima: ima.as_bytes().to_vec() })
    }

    /// The firmware's log, and what PCRs 0 to 7 become.
    fn log(&self) -> Result<(Vec<u8>, BTreeMap<u8, Digest>), FirmwareError> {
        let mut log = FirmwareLog::new();
        let mut pcrs = BTreeMap::new();
        for (at, event) in self.firmware.iter().enumerate() {
            if event.pcr > 7 || event_name(event.kind).is_none() {
                return Err(FirmwareError::Event(at));
            }
            let digest = log.measured(event.pcr, event.kind, event.extended(), &event.data);
            let value = pcrs.entry(event.pcr).or_insert(Digest([0; 32]));
            *value = extend(value, &digest);
        }
        Ok((log.as_bytes().to_vec(), pcrs))
    }
}

impl FirmwareEvent {
    fn extended(&self) -> Digest {
        self.digest.unwrap_or_else(|| Digest::of(&self.data))
    }
}

fn separator(pcr: u8) -> FirmwareEvent {
    FirmwareEvent { pcr, kind: EV_SEPARATOR, data: vec![0; 4], digest: None }
}

fn from_hex<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Vec<u8>, D::Error> {
    let text = String::deserialize(deserializer)?;
    hex::decode(text).map_err(serde::de::Error::custom)
}

/// UTF-16LE with its NUL.
fn utf16(text: &str) -> Vec<u8> {
    text.encode_utf16().chain([0]).flat_map(u16::to_le_bytes).collect()
}

/// UEFI_PLATFORM_FIRMWARE_BLOB2: a sized description, base, length.
fn firmware_blob(name: &str, base: u64, length: u64) -> Vec<u8> {
    let mut data = vec![name.len() as u8];
    data.extend(name.as_bytes());
    data.extend(base.to_le_bytes());
    data.extend(length.to_le_bytes());
    data
}

/// UEFI_VARIABLE_DATA: vendor GUID (EFI_GLOBAL_VARIABLE), lengths in characters and bytes, name, value.
fn variable(name: &str, value: &[u8]) -> Vec<u8> {
    const GLOBAL: [u8; 16] =
        [0x61, 0xdf, 0xe4, 0x8b, 0xca, 0x93, 0xd2, 0x11, 0xaa, 0x0d, 0x00, 0xe0, 0x98, 0x03, 0x2b, 0x8c];
    let mut data = GLOBAL.to_vec();
    data.extend((name.encode_utf16().count() as u64).to_le_bytes());
    data.extend((value.len() as u64).to_le_bytes());
    data.extend(name.encode_utf16().flat_map(u16::to_le_bytes));
    data.extend(value);
    data
}

/// UEFI_HANDOFF_TABLE_POINTERS2: a sized description and no table.
fn handoff(name: &str) -> Vec<u8> {
    let mut data = vec![name.len() as u8];
    data.extend(name.as_bytes());
    data.extend(0_u64.to_le_bytes());
    data
}

/// UEFI_IMAGE_LOAD_EVENT: location, length, link-time address, a device path that ends at once.
fn image_load() -> Vec<u8> {
    let mut data = Vec::new();
    for number in [0x7d00_0000_u64, 0x0100_0000, 0, 4] {
        data.extend(number.to_le_bytes());
    }
    data.extend([0x7f, 0xff, 4, 0]);
    data
}

#[cfg(test)]
mod tests {
    use super::*;
    use attest::eventlog::firmware;

    #[test]
    fn the_log_replays_to_the_values_that_are_extended() {
        let (log, pcrs) = Boot::default().log().expect("known events");
        let replay = firmware::replay(&log).expect("a good log");
        assert_eq!(replay.pcrs, pcrs);
        assert_eq!(pcrs.keys().copied().collect::<Vec<u8>>(), (0..=7).collect::<Vec<u8>>());
    }

    #[test]
    fn another_firmware_is_another_measurement() {
        let values = |boot: Boot| boot.log().expect("known events").1;
        let (one, two) = (values(Boot::default()), values(Boot::with_version("another")));
        assert_ne!(one[&0], two[&0]);
        assert_eq!(one[&7], two[&7]);
    }

    #[test]
    fn events_outside_the_firmware_s_business_are_refused() {
        for (pcr, kind) in [(8, EV_SEPARATOR), (14, EV_SEPARATOR), (0, 0x9999_9999)] {
            let event = FirmwareEvent { pcr, kind, data: vec![], digest: None };
            let boot = Boot { firmware: vec![event], ima: vec![] };
            assert!(matches!(boot.log(), Err(FirmwareError::Event(0))));
        }
    }
}
