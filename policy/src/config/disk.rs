//! Disks of either kind of configuration.

use super::{ConfigError, FileName};
use crate::anchor::AnchorMode;
use crate::id::VolumeId;
use serde::{Deserialize, Serialize};

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
    /// Queues, each served by a thread of its own: 1 to 16.
    #[serde(default = "one_queue", skip_serializing_if = "is_one_queue")]
    pub num_queues: u16,
    /// Requests that each queue holds: a power of two, 16 to 1024.
    #[serde(default = "queue_size", skip_serializing_if = "is_queue_size")]
    pub queue_size: u16,
    /// What the guest reads as its serial number: 1 to 20 printable ASCII characters; by default the start of the volume's UUID.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub serial: Option<String>,
    /// How much may go through.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rate_limiter_config: Option<RateLimiterConfig>,
}

impl Disk {
    /// The file's name beside the VM file.
    pub fn file_name(&self) -> String {
        self.name.as_ref().map_or_else(|| format!("{}.vol", self.id), |n| n.to_string())
    }

    /// How the guest sees it.
    pub fn shape(&self) -> DiskShape<'_> {
        DiskShape {
            id: &self.id,
            readonly: self.readonly,
            num_queues: self.num_queues,
            queue_size: self.queue_size,
            serial: self.serial.as_deref(),
            rate_limiter: self.rate_limiter_config,
        }
    }
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
    /// Queues, each served by a thread of its own: 1 to 16.
    #[serde(default = "one_queue", skip_serializing_if = "is_one_queue")]
    pub num_queues: u16,
    /// Requests that each queue holds: a power of two, 16 to 1024.
    #[serde(default = "queue_size", skip_serializing_if = "is_queue_size")]
    pub queue_size: u16,
    /// What the guest reads as its serial number: 1 to 20 printable ASCII characters; by default its name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub serial: Option<String>,
    /// How much may go through.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rate_limiter_config: Option<RateLimiterConfig>,
}

impl PlainDisk {
    /// How the guest sees it.
    pub fn shape(&self) -> DiskShape<'_> {
        DiskShape {
            id: &self.id,
            readonly: self.readonly,
            num_queues: self.num_queues,
            queue_size: self.queue_size,
            serial: self.serial.as_deref(),
            rate_limiter: self.rate_limiter_config,
        }
    }
}

/// How a disk of either kind is shown to the guest.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct DiskShape<'a> {
    /// Its name.
    pub id: &'a FileName,
    /// Whether the guest may not write.
    pub readonly: bool,
    /// Queues.
    pub num_queues: u16,
    /// Requests that each holds.
    pub queue_size: u16,
    /// Its serial number, where one is given.
    pub serial: Option<&'a str>,
    /// Its limits.
    pub rate_limiter: Option<RateLimiterConfig>,
}

impl DiskShape<'_> {
    /// Checks what the types alone don't.
    pub fn check(&self) -> Result<(), ConfigError> {
        let id = || self.id.to_string();
        if !(1..=16).contains(&self.num_queues) {
            return Err(ConfigError::Queues(id(), self.num_queues));
        }
        if !self.queue_size.is_power_of_two() || !(16..=1024).contains(&self.queue_size) {
            return Err(ConfigError::QueueSize(id(), self.queue_size));
        }
        let printable = |text: &str| (1..=20).contains(&text.len()) && text.bytes().all(|b| (0x20..0x7f).contains(&b));
        if self.serial.is_some_and(|serial| !printable(serial)) {
            return Err(ConfigError::Serial(id()));
        }
        self.rate_limiter.map_or(Ok(()), |limits| limits.check(&format!("disk {}", self.id)))
    }
}

/// Limits of one device, of all its queues together. What is left out is not limited.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RateLimiterConfig {
    /// Bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bandwidth: Option<TokenBucket>,
    /// Operations.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ops: Option<TokenBucket>,
}

/// A token bucket: `size` tokens in each `refill_time`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TokenBucket {
    /// Bytes or operations: 1 to 2^50.
    pub size: u64,
    /// More of them at the start, once: up to 2^50.
    #[serde(default)]
    pub one_time_burst: u64,
    /// Milliseconds: 1 to 3600000.
    pub refill_time: u64,
}

impl RateLimiterConfig {
    /// Checks what the types alone don't; `device` says in the error whose limits these are.
    pub fn check(&self, device: &str) -> Result<(), ConfigError> {
        const MOST: u64 = 1 << 50;
        let good = |bucket: &TokenBucket| {
            (1..=MOST).contains(&bucket.size)
                && bucket.one_time_burst <= MOST
                && (1..=3_600_000).contains(&bucket.refill_time)
        };
        let bad = self.bandwidth.iter().chain(&self.ops).any(|bucket| !good(bucket));
        if bad { Err(ConfigError::Rate(device.to_owned())) } else { Ok(()) }
    }
}

/// How many queues a disk has where nothing is said.
pub fn one_queue() -> u16 {
    1
}

fn is_one_queue(queues: &u16) -> bool {
    *queues == one_queue()
}

/// How many requests a queue of a disk holds where nothing is said.
pub fn queue_size() -> u16 {
    256
}

fn is_queue_size(size: &u16) -> bool {
    *size == queue_size()
}

pub(super) fn check_disks<'a>(disks: impl Iterator<Item = DiskShape<'a>>) -> Result<(), ConfigError> {
    let mut seen = std::collections::BTreeSet::new();
    for disk in disks {
        if !seen.insert(disk.id.as_str()) {
            return Err(ConfigError::Twice(disk.id.to_string()));
        }
        disk.check()?;
    }
    if seen.len() > 16 { Err(ConfigError::Disks) } else { Ok(()) }
}
