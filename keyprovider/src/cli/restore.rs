//! `restore`.

use super::CliError;
use super::output::Output;
use crate::provider::{Provider, ProviderError, lock};
use crate::store::restore::{Restored, prepare};
use std::path::Path;

/// Brings a provider back from a backup.
pub(super) fn restore(dir: &Path, from: &Path, out: Output) -> Result<(), CliError> {
    let (target, master) = (Provider::database_path(dir), Provider::master_path(dir));
    if !master.exists() {
        return Err(CliError::Input(format!(
            "{} is missing: put the copy of the master key there first",
            master.display()
        )));
    }
    let _lock = lock(dir)?;
    if target.exists() {
        return Err(ProviderError::Exists(target).into());
    }
    let beside = dir.join("restoring.db");
    let _ = std::fs::remove_file(&beside);
    let copied = std::fs::copy(from, &beside).map_err(|e| CliError::Read(from.to_owned(), e));
    let restored = copied.and_then(|_| {
        super::serve::runtime()?.block_on(async {
            let keys = crate::keystore::FileKeyStore::open(&master).map_err(ProviderError::from)?;
            Ok(prepare(&beside, &keys).await?)
        })
    });
    let Restored { volumes, vms, floor } = restored.inspect_err(|_| {
        let _ = std::fs::remove_file(&beside);
    })?;
    std::fs::rename(&beside, &target).map_err(|e| CliError::Write(target, e))?;
    let line = format!(
        "restored into {}: {volumes} volumes wait for `volume confirm`, {vms} VMs for the end of leases or `vm confirm`; \
         instances go on from {floor}",
        dir.display()
    );
    out.print(line, &serde_json::json!({ "volumes": volumes, "vms": vms, "instance_floor": floor }))
}
