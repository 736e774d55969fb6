//! The virtio devices of a machine beside its disks.

use super::net::{NetCounters, NetDevice};
use super::rng::{RngCounters, RngDevice};
use super::thread::{Background, Crew};
use serde::Serialize;
use std::collections::BTreeMap;
use std::sync::Arc;

/// Those that it has.
#[derive(Default)]
pub(super) struct Devices {
    pub(super) rng: Option<Arc<RngDevice>>,
    pub(super) nets: Vec<Arc<NetDevice>>,
}

/// What they did since the machine started.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize)]
pub struct DeviceCounters {
    /// The source of random numbers.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rng: Option<RngCounters>,
    /// Each network card, by its name.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub net: BTreeMap<String, NetCounters>,
}

impl Devices {
    /// Starts their threads.
    pub(super) fn hire(&self, crew: &Crew) -> std::io::Result<Vec<Arc<dyn Background>>> {
        let rng = self.rng.iter().map(|rng| rng.hire(crew));
        let nets = self.nets.iter().map(|net| net.hire(crew));
        rng.chain(nets).collect()
    }

    pub(super) fn counters(&self) -> DeviceCounters {
        DeviceCounters {
            rng: self.rng.as_ref().map(|rng| rng.counters()),
            net: self.nets.iter().map(|net| (net.name().to_owned(), net.counters())).collect(),
        }
    }
}
