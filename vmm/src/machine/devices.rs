//! The virtio devices of a machine beside its disks.

use super::balloon::{BalloonCounters, BalloonDevice};
use super::console::{ConsoleCounters, ConsoleDevice};
use super::net::{NetCounters, NetDevice};
use super::rng::{RngCounters, RngDevice};
use super::thread::{Background, Crew};
use super::vsock::{VsockCounters, VsockDevice};
use serde::Serialize;
use std::collections::BTreeMap;
use std::sync::Arc;

/// Those that it has.
#[derive(Default)]
pub(super) struct Devices {
    pub(super) rng: Option<Arc<RngDevice>>,
    pub(super) balloon: Option<Arc<BalloonDevice>>,
    pub(super) vsock: Option<Arc<VsockDevice>>,
    pub(super) console: Option<Arc<ConsoleDevice>>,
    pub(super) nets: Vec<Arc<NetDevice>>,
}

/// What they did since the machine started.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize)]
pub struct DeviceCounters {
    /// The source of random numbers.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rng: Option<RngCounters>,
    /// The balloon.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub balloon: Option<BalloonCounters>,
    /// Sockets between guest and host.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vsock: Option<VsockCounters>,
    /// The virtio console.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub console: Option<ConsoleCounters>,
    /// Each network card, by its name.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub net: BTreeMap<String, NetCounters>,
}

impl Devices {
    /// Starts their threads.
    pub(super) fn hire(&self, crew: &Crew) -> std::io::Result<Vec<Arc<dyn Background>>> {
        let rng = self.rng.iter().map(|rng| rng.hire(crew));
        let nets = self.nets.iter().map(|net| net.hire(crew));
        let console = self.console.iter().map(|console| console.hire(crew));
        let balloon = self.balloon.iter().map(|balloon| balloon.hire(crew));
        let vsock = self.vsock.iter().map(|vsock| vsock.hire(crew));
        rng.chain(nets).chain(console).chain(balloon).chain(vsock).collect()
    }

    pub(super) fn counters(&self) -> DeviceCounters {
        DeviceCounters {
            rng: self.rng.as_ref().map(|rng| rng.counters()),
            balloon: self.balloon.as_ref().map(|balloon| balloon.counters()),
            vsock: self.vsock.as_ref().map(|vsock| vsock.counters()),
            console: self.console.as_ref().map(|console| console.counters()),
            net: self.nets.iter().map(|net| (net.name().to_owned(), net.counters())).collect(),
        }
    }
}
