//! The sealed half of a VM file, and the plain configuration of an unprotected VM. Names follow Cloud Hypervisor's
//! configuration where it has them.

use crate::device::{Balloon, Console, Devices, Net, Rng, Vsock, Whose, check_nets};
use crate::encoding::{Base64Url, Digest};
use crate::id::VolumeId;
use serde::{Deserialize, Serialize};

mod disk;

use disk::check_disks;
pub use disk::{Disk, DiskShape, PlainDisk, RateLimiterConfig, TokenBucket, one_queue, queue_size};

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
    /// Network cards on TAPs, in plain by the customer's word; at most 8.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub net: Vec<Net>,
    /// A source of random numbers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rng: Option<Rng>,
    /// Sockets between guest and host.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vsock: Option<Vsock>,
    /// A memory balloon.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub balloon: Option<Balloon>,
    /// A virtio console.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub console: Option<Console>,
    /// Whether there is a device through which a kernel that panics ends the VM (pvpanic).
    #[serde(default, skip_serializing_if = "is_false")]
    pub pvpanic: bool,
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
    /// Network cards on TAPs; at most 8.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub net: Vec<Net>,
    /// A source of random numbers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rng: Option<Rng>,
    /// Sockets between guest and host.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vsock: Option<Vsock>,
    /// A memory balloon.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub balloon: Option<Balloon>,
    /// A virtio console.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub console: Option<Console>,
    /// Whether there is a device through which a kernel that panics ends the VM (pvpanic).
    #[serde(default, skip_serializing_if = "is_false")]
    pub pvpanic: bool,
}

fn is_false(flag: &bool) -> bool {
    !flag
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

/// What a VM process holds the customer's statements against; sealed with the configuration.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TrustRoots {
    /// Ed25519 public key (32 bytes) that signs the customer's policies.
    pub policy_key: Base64Url,
    /// Version of the policy that was in force when the file was sealed, 0 where there was none: no older one is taken.
    pub policy_version: u64,
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
    /// Huge pages and a balloon.
    #[error("memory in hugepages can't be given back piece by piece: leave out the balloon")]
    HugeBalloon,
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
    /// A number of queues that a disk can't have.
    #[error("disk {0} has num_queues {1}; a disk has 1 to 16")]
    Queues(String, u16),
    /// A queue that can't be.
    #[error("disk {0} has queue_size {1}, which is not a power of two between 16 and 1024")]
    QueueSize(String, u16),
    /// A serial number that the guest can't read.
    #[error("the serial number of disk {0} is not 1 to 20 printable ASCII characters")]
    Serial(String),
    /// A limit that lets nothing through, or everything.
    #[error(
        "rate_limiter_config of {0}: a bucket has a size and one_time_burst of at most 2^50, a size of at least 1, and a refill_time of 1 to 3600000 ms"
    )]
    Rate(String),
    /// A volume twice.
    #[error("two disks are volume {0}")]
    VolumeTwice(VolumeId),
    /// More networks than a VM has.
    #[error("a VM has at most 8 networks")]
    Nets,
    /// A network twice.
    #[error("two networks are called {0}")]
    NetTwice(String),
    /// A network card that can't be.
    #[error("network {id}: {why}")]
    Net {
        /// Its name.
        id: String,
        /// What is wrong.
        why: &'static str,
    },
    /// A balloon that does not fit.
    #[error("balloon size {0} is not a multiple of 4096 below the memory's size")]
    Balloon(u64),
    /// Sockets that can't be.
    #[error("vsock: {0}")]
    Vsock(&'static str),
    /// A console that can't be.
    #[error("virtio console: {0}")]
    Console(&'static str),
    /// The name of a network interface with something in it.
    #[error("an interface's name is 1 to 15 bytes of ASCII without '/', ':', '%' and white space")]
    Interface,
    /// No address of a network card.
    #[error("a MAC address is six hexadecimal bytes with colons, and no group's")]
    Mac,
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

/// A page of a reserved pool that is given back is not surely there when the guest wants it again: then the guest dies.
fn check_balloon(memory: Memory, balloon: bool) -> Result<(), ConfigError> {
    if memory.hugepages && balloon { Err(ConfigError::HugeBalloon) } else { Ok(()) }
}

impl VmConfig {
    /// What it has beside processors, memory and disks.
    pub fn devices(&self) -> Devices<'_> {
        Devices {
            net: &self.net,
            rng: self.rng,
            vsock: self.vsock.as_ref(),
            balloon: self.balloon,
            console: self.console.as_ref(),
            pvpanic: self.pvpanic,
        }
    }

    /// Checks what the types alone don't.
    pub fn check(&self) -> Result<(), ConfigError> {
        check_machine(self.cpus, self.memory, &self.payload.cmdline)?;
        check_disks(self.disks.iter().map(|d| d.shape()))?;
        check_nets(&self.net, Whose::Protected)?;
        check_balloon(self.memory, self.balloon.is_some())?;
        self.balloon.map_or(Ok(()), |balloon| balloon.check(self.memory.size))?;
        self.vsock.as_ref().map_or(Ok(()), |vsock| vsock.check(Whose::Protected))?;
        self.console.as_ref().map_or(Ok(()), |console| console.check(Whose::Protected))?;
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
    /// What it has beside processors, memory and disks.
    pub fn devices(&self) -> Devices<'_> {
        Devices {
            net: &self.net,
            rng: self.rng,
            vsock: self.vsock.as_ref(),
            balloon: self.balloon,
            console: self.console.as_ref(),
            pvpanic: self.pvpanic,
        }
    }

    /// Checks what the types alone don't.
    pub fn check(&self) -> Result<(), ConfigError> {
        check_machine(self.cpus, self.memory, &self.payload.cmdline)?;
        check_disks(self.disks.iter().map(|d| d.shape()))?;
        check_nets(&self.net, Whose::Unprotected)?;
        check_balloon(self.memory, self.balloon.is_some())?;
        self.balloon.map_or(Ok(()), |balloon| balloon.check(self.memory.size))?;
        self.vsock.as_ref().map_or(Ok(()), |vsock| vsock.check(Whose::Unprotected))?;
        self.console.as_ref().map_or(Ok(()), |console| console.check(Whose::Unprotected))
    }
}

#[cfg(test)]
#[path = "config_tests.rs"]
mod tests;
