//! `restore`.

use super::CliError;
use super::output::Output;
use crate::provider::{Provider, ProviderError, discard, lock};
use crate::store::restore::{Restored, prepare};
use std::fs::File;
use std::path::Path;

/// Brings a provider back from a backup.
pub(super) fn restore(dir: &Path, from: &Path, revoke: &[String], out: Output) -> Result<(), CliError> {
    let (target, master) = (Provider::database_path(dir), Provider::master_path(dir));
    if !master.exists() {
        return Err(CliError::Input(format!(
            "{} is missing: put the copy of the master key there first",
            master.display()
        )));
    }
    let _lock = lock(dir)?;
    Provider::no_database(dir)?;
    let beside = dir.join("restoring.db");
    // A restore that was killed may have left a journal, which SQLite would play back into the copy.
    discard(&beside);
    let copied = std::fs::copy(from, &beside).map_err(|e| CliError::Read(from.to_owned(), e));
    let restored = copied.and_then(|_| {
        super::serve::runtime()?.block_on(async {
            let keys = crate::keystore::FileKeyStore::open(&master).map_err(ProviderError::from)?;
            Ok(prepare(&beside, &keys, revoke).await?)
        })
    });
    let Restored { customers, volumes, vms, floor, admins } = restored.inspect_err(|_| discard(&beside))?;
    let durable = |path: &Path| File::open(path)?.sync_all();
    let named = durable(&beside).and_then(|()| std::fs::rename(&beside, &target)).and_then(|()| durable(dir));
    named.map_err(|e| CliError::Write(target, e))?;
    let line = format!(
        "restored into {}: {customers} customers wait for `customer confirm`, {volumes} volumes for `volume confirm`, {vms} VMs \
         for `vm confirm` or seven days; instances go on from {floor}; administrators: {}",
        dir.display(),
        admins.join(", ")
    );
    let counts = serde_json::json!({
        "customers": customers, "volumes": volumes, "vms": vms, "instance_floor": floor, "admins": admins,
    });
    out.print(line, &counts)
}
