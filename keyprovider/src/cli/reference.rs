//! `reference`: learning which software a trusted host runs, and putting that in force.

use super::args::ReferenceCommand;
use super::output::Output;
use super::{CliError, Session, files};
use crate::api::{ReferenceView, VersionView};
use crate::server::problem::chain;
use attest::eventlog::{LogError, Replay, firmware, ima, layer};
use policy::reference::{IMA_PCR, LAYER_PCR, Layer, Measurement};
use policy::{Digest, ReferenceValues};
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

/// `reference …`
pub(super) fn reference(
    session: impl FnOnce() -> Result<Session, CliError>,
    command: ReferenceCommand,
) -> Result<(), CliError> {
    match command {
        ReferenceCommand::Learn { firmware_log, layer_log, ima_log, pcrs } => {
            let values = learn(&firmware_log, &layer_log, ima_log.as_deref(), &pcrs)?;
            Output { json: true }.pretty(&values)
        }
        ReferenceCommand::Set { customer, file } => {
            let values: ReferenceValues = serde_json::from_slice(&files::read(&file)?)
                .map_err(|e| CliError::Input(format!("{} is no set of reference values: {e}", file.display())))?;
            let mut s = session()?;
            let view: VersionView = s.client.put(&format!("/v1/customers/{customer}/reference"), &values)?;
            s.out.print(format!("reference values version {} of {customer} are in force", view.version), &view)
        }
        ReferenceCommand::Show { customer } => {
            let mut s = session()?;
            let view: ReferenceView = s.client.get(&format!("/v1/customers/{customer}/reference"))?;
            if s.out.json { s.out.document(&view) } else { s.out.pretty(&view.values) }
        }
    }
}

fn learn(
    firmware_log: &Path,
    layer_log: &Path,
    ima_log: Option<&Path>,
    pcrs: &[u8],
) -> Result<ReferenceValues, CliError> {
    let bad = |e: LogError| CliError::Input(chain(&e));
    let mut replay = firmware::replay(&files::read(firmware_log)?).map_err(bad)?;
    let boot = replay.pcrs.clone();
    layer::replay(&files::read(layer_log)?, &mut replay).map_err(bad)?;
    let mut values = from_replay(&replay, pcrs);
    if let Some(path) = ima_log {
        let (_, entries) = ima::replay(&files::read(path)?, ima::ImaState::START, &boot).map_err(bad)?;
        let mut layers = Vec::new();
        entries.iter().for_each(|m| add(&mut layers, m));
        values.pcrs.insert(IMA_PCR, layers);
        values.ima = true;
    }
    values.check().map_err(|e| CliError::Input(e.to_string()))?;
    Ok(values)
}

/// Every measurement of the PCRs asked for (those that anything extended) and of PCR 14.
fn from_replay(replay: &Replay, pcrs: &[u8]) -> ReferenceValues {
    let extended = |pcr: &u8| replay.value(*pcr) != Digest([0; 32]) && *pcr != IMA_PCR;
    let covered = pcrs.iter().copied().chain([LAYER_PCR]).filter(extended);
    let mut sets: BTreeMap<u8, Vec<Layer>> = covered.map(|pcr| (pcr, Vec::new())).collect();
    let mut required = BTreeSet::new();
    for measurement in &replay.measurements {
        if let Some(layers) = sets.get_mut(&measurement.pcr) {
            add(layers, measurement);
        }
        if measurement.pcr == LAYER_PCR {
            required.extend(measurement.layer.clone());
        }
    }
    ReferenceValues {
        version: 1,
        pcrs: sets,
        exact: BTreeMap::new(),
        required_layers: required.into_iter().collect(),
        ima: false,
        revoked: BTreeSet::new(),
        denied_tpm_firmware: Vec::new(),
    }
}

fn add(layers: &mut Vec<Layer>, m: &Measurement) {
    let layer = Layer {
        layer: m.layer.clone().unwrap_or_else(|| m.kind.clone()),
        version: m.version.clone().unwrap_or_default(),
        digest: m.digest,
    };
    if !layers.contains(&layer) {
        layers.push(layer);
    }
}
