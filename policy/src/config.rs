//! The sealed half of a VM file, and the plain configuration of an unprotected VM. Names follow Cloud Hypervisor's
//! configuration where it has them.

use crate::anchor::AnchorMode;
use crate::encoding::{Base64Url, Digest};
use crate::id::VolumeId;
use serde::{Deserialize, Serialize};

/// What a VM file seals: the machine and the trust roots.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmConfig {
    /// Processors.
    pub cpus: Cpus,
    /// Memory.
    pub memory: Memory,
    /// Kernel, initramfs and command line, proved by digests.
    pub payload: Payload,
    /// Protected disks, in the order in which the guest sees them; at most 16.
    #[serde(default)]
    pub disks: Vec<Disk>,
    /// What the customer's other statements are checked against.
    pub trust: TrustRoots,
}

/// A VM without a provider, for trying things out: a plain JSON file, given with `--unprotected`. There is no field in
/// it that could name a customer, a key, or a protected volume or network.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PlainConfig {
    /// Processors.
    pub cpus: Cpus,
    /// Memory.
    pub memory: Memory,
    /// Kernel, initramfs and command line.
    pub payload: PlainPayload,
    /// Raw disks.
    #[serde(default)]
    pub disks: Vec<PlainDisk>,
}

/// Virtual processors.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Cpus {
    /// How many the guest starts with: 1 to 16.
    pub boot_vcpus: u8,
    /// What they can do.
    #[serde(default, skip_serializing_if = "CpuBaseline::is_host")]
    pub baseline: CpuBaseline,
}

/// What a guest's processors can do. With a named baseline a VM sees the same processor on every host of one maker that has at
/// least that, and can move between them; a host that has less does not start it.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug, Serialize, Deserialize)]
pub enum CpuBaseline {
    /// Everything that this host's processor and its KVM offer: fastest, and tied to hosts like this one.
    #[default]
    #[serde(rename = "host")]
    Host,
    /// SSE4.2, POPCNT: processors from 2009 on (x86-64 psABI, microarchitecture levels).
    #[serde(rename = "x86-64-v2")]
    V2,
    /// AVX2, BMI, FMA, and AES: from 2013 on.
    #[serde(rename = "x86-64-v3")]
    V3,
    /// AVX-512 F, BW, CD, DQ, VL: servers from 2017 on.
    #[serde(rename = "x86-64-v4")]
    V4,
}

impl CpuBaseline {
    fn is_host(&self) -> bool {
        *self == Self::Host
    }
}

impl std::fmt::Display for CpuBaseline {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Host => "host",
            Self::V2 => "x86-64-v2",
            Self::V3 => "x86-64-v3",
            Self::V4 => "x86-64-v4",
        })
    }
}

/// Guest memory, in bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Memory {
    /// Memory at start: a multiple of 2 MiB, 16 MiB to 1 TiB.
    pub size: u64,
    /// Address space reserved for memory added later, in bytes: a multiple of 2 MiB.
    #[serde(default)]
    pub hotplug_size: u64,
    /// Take the memory from the host's pool of huge pages, which must hold enough free ones of `hugepage_size`.
    #[serde(default, skip_serializing_if = "is_false")]
    pub hugepages: bool,
    /// Size of a huge page: 2 MiB (the default) or 1 GiB, of which `size` and `hotplug_size` must then be multiples.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hugepage_size: Option<u64>,
    /// Ask the host's kernel for transparent huge pages, where it gives them only to who asks.
    #[serde(default, skip_serializing_if = "is_false")]
    pub thp: bool,
}

fn is_false(value: &bool) -> bool {
    !value
}

/// What is booted.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Payload {
    /// The kernel, bzImage or ELF.
    pub kernel: ProvedFile,
    /// The initial RAM file system.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub initramfs: Option<ProvedFile>,
    /// The kernel's command line: at most 2047 bytes without NUL.
    #[serde(default)]
    pub cmdline: String,
}

/// A file by name, proved by its digest.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ProvedFile {
    /// The name that `--map NAME=PATH` maps; by default the file of that name beside the VM file.
    pub name: FileName,
    /// SHA-256 of its content.
    pub sha256: Digest,
}

/// A protected disk.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Disk {
    /// Its name in the API and in `--map`.
    pub id: FileName,
    /// The file beside the VM file where `--map` says nothing; by default `ID.vol`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<FileName>,
    /// Which volume it must be.
    pub volume: VolumeId,
    /// Whether the guest may not write.
    #[serde(default)]
    pub readonly: bool,
    /// How fresh the anchor at the provider is kept.
    #[serde(default)]
    pub anchor_mode: AnchorMode,
}

impl Disk {
    /// The file's name beside the VM file.
    pub fn file_name(&self) -> String {
        self.name.as_ref().map_or_else(|| format!("{}.vol", self.id), |n| n.to_string())
    }
}

/// Kernel, initramfs and command line of an unprotected VM, by path.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PlainPayload {
    /// Path of the kernel; relative ones count from the configuration's folder.
    pub kernel: String,
    /// Path of the initramfs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub initramfs: Option<String>,
    /// The command line.
    #[serde(default)]
    pub cmdline: String,
}

/// A raw disk of an unprotected VM.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PlainDisk {
    /// Its name in the API.
    pub id: FileName,
    /// Path of the raw image.
    pub path: String,
    /// Whether the guest may not write.
    #[serde(default)]
    pub readonly: bool,
}

/// What a VM process holds the customer's statements against; sealed with the configuration.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TrustRoots {
    /// Ed25519 public key (32 bytes) that signs the customer's policies.
    pub policy_key: Base64Url,
    /// Ed25519 public key (32 bytes) that signs the provider's directives.
    pub directive_key: Base64Url,
    /// Origin line of the audit log (C2SP tlog-checkpoint).
    pub audit_origin: String,
    /// Ed25519 public key (32 bytes) that signs the audit log's receipts and checkpoints.
    pub audit_key: Base64Url,
}

/// A bare file name: 1 to 64 of letters, digits, '.', '_', '-', not starting with '.' or '-'. It can't leave its folder.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct FileName(String);

impl FileName {
    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl TryFrom<String> for FileName {
    type Error = ConfigError;
    fn try_from(text: String) -> Result<Self, ConfigError> {
        let allowed = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-');
        let good = (1..=64).contains(&text.len()) && text.bytes().all(allowed) && !text.starts_with(['.', '-']);
        if good { Ok(Self(text)) } else { Err(ConfigError::Name) }
    }
}

impl From<FileName> for String {
    fn from(name: FileName) -> String {
        name.0
    }
}

impl std::fmt::Display for FileName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

/// A configuration that can't be a machine.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum ConfigError {
    /// A file or disk name with something in it.
    #[error("a name is 1 to 64 letters, digits, '.', '_' and '-', and starts with neither '.' nor '-'")]
    Name,
    /// Too few or many processors.
    #[error("boot_vcpus is {0}; a VM has 1 to 16")]
    Cpus(u8),
    /// A memory size that does not fit.
    #[error("memory size {0} is not a multiple of 2 MiB between 16 MiB and 1 TiB")]
    Memory(u64),
    /// A hotplug window that does not fit.
    #[error("memory hotplug_size {0} is not a multiple of 2 MiB up to 1 TiB")]
    Hotplug(u64),
    /// Huge pages of another size, or memory that they don't fill, or a size without them.
    #[error(
        "hugepage_size is 2 MiB or 1 GiB, goes with hugepages, and memory size and hotplug_size are multiples of it"
    )]
    HugePages,
    /// Two kinds of huge pages.
    #[error("memory has hugepages or thp, not both")]
    TwoKinds,
    /// A command line that the boot protocol can't carry.
    #[error("the kernel's command line is longer than 2047 bytes or holds a NUL")]
    CommandLine,
    /// More disks than slots.
    #[error("a VM has at most 16 disks")]
    Disks,
    /// A disk twice.
    #[error("two disks are called {0}")]
    Twice(String),
    /// A volume twice.
    #[error("two disks are volume {0}")]
    VolumeTwice(VolumeId),
    /// A key of the wrong length.
    #[error("{0} in the trust roots is not an Ed25519 public key of 32 bytes")]
    Key(&'static str),
    /// An origin that a note can't carry.
    #[error("audit_origin is empty, longer than 255 bytes, or holds a line break")]
    Origin,
}

fn check_machine(cpus: Cpus, memory: Memory, cmdline: &str) -> Result<(), ConfigError> {
    const UNIT: u64 = 2 << 20;
    const TIB: u64 = 1 << 40;
    if !(1..=16).contains(&cpus.boot_vcpus) {
        return Err(ConfigError::Cpus(cpus.boot_vcpus));
    }
    if !memory.size.is_multiple_of(UNIT) || !(16 << 20..=TIB).contains(&memory.size) {
        return Err(ConfigError::Memory(memory.size));
    }
    if !memory.hotplug_size.is_multiple_of(UNIT) || memory.hotplug_size > TIB {
        return Err(ConfigError::Hotplug(memory.hotplug_size));
    }
    if let Some(page) = memory.hugepage_size {
        let fills = memory.size.is_multiple_of(page) && memory.hotplug_size.is_multiple_of(page);
        if !memory.hugepages || ![UNIT, 1 << 30].contains(&page) || !fills {
            return Err(ConfigError::HugePages);
        }
    }
    if memory.hugepages && memory.thp {
        return Err(ConfigError::TwoKinds);
    }
    if cmdline.len() > 2047 || cmdline.contains('\0') {
        return Err(ConfigError::CommandLine);
    }
    Ok(())
}

fn check_disks<'a>(ids: impl Iterator<Item = &'a FileName>) -> Result<(), ConfigError> {
    let mut seen = std::collections::BTreeSet::new();
    for id in ids {
        if !seen.insert(id.as_str()) {
            return Err(ConfigError::Twice(id.to_string()));
        }
    }
    if seen.len() > 16 { Err(ConfigError::Disks) } else { Ok(()) }
}

impl VmConfig {
    /// Checks what the types alone don't.
    pub fn check(&self) -> Result<(), ConfigError> {
        check_machine(self.cpus, self.memory, &self.payload.cmdline)?;
        check_disks(self.disks.iter().map(|d| &d.id))?;
        let mut volumes = std::collections::BTreeSet::new();
        for disk in &self.disks {
            if !volumes.insert(disk.volume) {
                return Err(ConfigError::VolumeTwice(disk.volume));
            }
        }
        let keys = [
            ("policy_key", &self.trust.policy_key),
            ("directive_key", &self.trust.directive_key),
            ("audit_key", &self.trust.audit_key),
        ];
        if let Some((name, _)) = keys.iter().find(|(_, key)| key.len() != 32) {
            return Err(ConfigError::Key(name));
        }
        let origin = &self.trust.audit_origin;
        if origin.is_empty() || origin.len() > 255 || origin.contains(['\n', '\r']) {
            return Err(ConfigError::Origin);
        }
        Ok(())
    }
}

impl PlainConfig {
    /// Checks what the types alone don't.
    pub fn check(&self) -> Result<(), ConfigError> {
        check_machine(self.cpus, self.memory, &self.payload.cmdline)?;
        check_disks(self.disks.iter().map(|d| &d.id))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plain(text: &str) -> Result<PlainConfig, serde_json::Error> {
        serde_json::from_str(text)
    }

    #[test]
    fn a_plain_configuration_can_carry_nothing_protected() {
        let good = r#"{"cpus":{"boot_vcpus":1},"memory":{"size":134217728},"payload":{"kernel":"k"}}"#;
        assert!(plain(good).is_ok_and(|c| c.check().is_ok()));
        for field in ["customer", "provider", "providers", "trust", "key", "volume", "net"] {
            let bad = good.replacen('{', &format!("{{\"{field}\":\"x\","), 1);
            assert!(plain(&bad).is_err(), "{field}");
        }
        let disk = good.replacen('{', r#"{"disks":[{"id":"a","path":"p","volume":"x"}],"#, 1);
        assert!(plain(&disk).is_err());
    }

    #[test]
    fn what_no_machine_has_is_refused() {
        let good = PlainConfig {
            cpus: Cpus { boot_vcpus: 1, baseline: CpuBaseline::Host },
            memory: Memory { size: 128 << 20, hotplug_size: 0, hugepages: false, hugepage_size: None, thp: false },
            payload: PlainPayload { kernel: "k".into(), initramfs: None, cmdline: String::new() },
            disks: vec![],
        };
        let mut bad = good.clone();
        bad.cpus.boot_vcpus = 0;
        assert_eq!(bad.check(), Err(ConfigError::Cpus(0)));
        let mut bad = good.clone();
        bad.memory.size += 1;
        assert!(matches!(bad.check(), Err(ConfigError::Memory(_))));
        let mut bad = good;
        bad.payload.cmdline = "x".repeat(2048);
        assert_eq!(bad.check(), Err(ConfigError::CommandLine));
    }

    #[test]
    fn baselines_and_pages_have_names_and_bounds() {
        let with = |cpus: &str, memory: &str| {
            let text =
                format!(r#"{{"cpus":{{"boot_vcpus":1{cpus}}},"memory":{{{memory}}},"payload":{{"kernel":"k"}}}}"#);
            plain(&text).map_err(|_| None).and_then(|c| c.check().map_err(Some))
        };
        let small = r#""size":134217728"#;
        for name in ["host", "x86-64-v2", "x86-64-v3", "x86-64-v4"] {
            assert_eq!(with(&format!(r#","baseline":"{name}""#), small), Ok(()));
        }
        assert_eq!(with(r#","baseline":"x86-64-v5""#, small), Err(None));
        for good in [r#","hugepages":true"#, r#","hugepages":true,"hugepage_size":2097152"#, r#","thp":true"#] {
            assert_eq!(with("", &format!("{small}{good}")), Ok(()));
        }
        for bad in [
            r#","hugepage_size":2097152"#,
            r#","hugepages":true,"hugepage_size":4096"#,
            r#","hugepages":true,"hugepage_size":1073741824"#,
        ] {
            assert_eq!(with("", &format!("{small}{bad}")), Err(Some(ConfigError::HugePages)), "{bad}");
        }
        assert_eq!(with("", &format!(r#"{small},"hugepages":true,"thp":true"#)), Err(Some(ConfigError::TwoKinds)));
    }

    #[test]
    fn names_stay_in_their_folder() {
        for bad in ["", ".", "..", "a/b", ".hidden", "-x", "a\0", "a b"] {
            assert!(FileName::try_from(bad.to_owned()).is_err(), "{bad}");
        }
        assert!(FileName::try_from("vmlinuz-6.1.0_x.img".to_owned()).is_ok());
    }
}
