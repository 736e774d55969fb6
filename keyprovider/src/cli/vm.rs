//! `vm` and `instance`.

use super::args::{InstanceCommand, VmCommand};
use super::output::Output;
use super::{CliError, Session, files};
use crate::api::{Done, NewVm, SealedFile, TrustView, VmView};
use crate::server::problem::chain;
use crate::store::vms::FileDisk;
use attest::vmfile::{VmFile, VmFileError};
use policy::config::{TrustRoots, VmConfig};
use policy::header::ProviderUrl;
use policy::{CustomerId, Digest, VmHeader, VmId};
use serde_json::Value;
use std::cell::Cell;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::process::Command;

/// `vm …`
pub(super) fn vm(
    session: impl FnOnce() -> Result<Session, CliError>,
    command: VmCommand,
    out: Output,
) -> Result<(), CliError> {
    match command {
        VmCommand::Header { file } => {
            let header = read(&file)?.header;
            if out.json { out.document(&header) } else { out.pretty(&header) }
        }
        VmCommand::Show { file } => show(&mut session()?, &file),
        VmCommand::Edit { file, from } => edit(&mut session()?, &file, from.as_deref()),
        VmCommand::Back { file } => back(&mut session()?, &file),
        VmCommand::Create { customer, vm } => {
            let mut s = session()?;
            let done: Done = s.client.post(&format!("/v1/customers/{customer}/vms"), &NewVm { vm: vm.clone() })?;
            s.out.print(format!("created VM {vm}"), &done)
        }
        VmCommand::Seal { customer, vm, config, out, provider } => {
            let mut s = session()?;
            let folder = config.parent().map_or(PathBuf::new(), Path::to_owned);
            let text = files::read(&config)?;
            let value = serde_json::from_slice(&text)
                .map_err(|e| CliError::Input(format!("{} is not JSON: {e}", config.display())))?;
            seal(&mut s, &customer, &vm, value, &folder, &out, provider)
        }
        VmCommand::List { customer } => {
            let mut s = session()?;
            let all: Vec<VmView> = s.client.get(&format!("/v1/customers/{customer}/vms"))?;
            s.out.list(&all, line)
        }
        VmCommand::Confirm { customer, vm } => {
            let mut s = session()?;
            let done: Done = s.client.post(&format!("/v1/customers/{customer}/vms/{vm}/confirm"), &())?;
            s.out.print(format!("VM {vm} may start: nothing of it runs"), &done)
        }
    }
}

/// `instance …`
pub(super) fn instance(mut s: Session, command: InstanceCommand) -> Result<(), CliError> {
    let InstanceCommand::Revoke { customer, vm } = command;
    let done: Done = s.client.post(&format!("/v1/customers/{customer}/vms/{vm}/revoke"), &())?;
    s.out.print(format!("the newest instance of {vm} gets no more leases"), &done)
}

fn line(vm: &VmView) -> String {
    let file = vm.current_file.map_or("no file".to_owned(), |d| format!("file {}", &d.to_string()[..16]));
    let instance = vm.instance.as_ref().map_or("never ran".to_owned(), |i| {
        let end = crate::clock::utc(i.lease_end_us);
        format!("instance {} {} on {}, lease to {end}", i.number, i.state, &i.host.to_string()[..16])
    });
    let waits = if vm.unconfirmed_until_us.is_some() { ", waits for `vm confirm`" } else { "" };
    format!("{} {file}, {instance}{waits}", vm.vm)
}

fn read(file: &Path) -> Result<VmFile, CliError> {
    VmFile::read(&files::read(file)?).map_err(|e| bad_file(file, &e))
}

fn bad_file(file: &Path, error: &VmFileError) -> CliError {
    CliError::Input(format!("{}: {}", file.display(), chain(error)))
}

/// Reads and opens a VM file with the key that the provider keeps of it.
fn open(s: &mut Session, path: &Path) -> Result<(VmFile, VmConfig), CliError> {
    let file = read(path)?;
    if file.header.pin != s.client.pin {
        return Err(CliError::Input(format!("{} names another provider than the profile", path.display())));
    }
    let VmHeader { customer, vm, .. } = &file.header;
    let ask = format!("/v1/customers/{customer}/vms/{vm}/files/{}/open", file.digest);
    let (_, key) = s.client.key(&ask, customer, vm.as_str())?;
    let config = file.open(&key).map_err(|e| bad_file(path, &e))?;
    Ok((file, config))
}

fn show(s: &mut Session, path: &Path) -> Result<(), CliError> {
    let (file, config) = open(s, path)?;
    let value = serde_json::json!({ "header": file.header, "digest": file.digest, "config": config });
    if s.out.json { s.out.document(&value) } else { s.out.pretty(&value) }
}

fn back(s: &mut Session, path: &Path) -> Result<(), CliError> {
    let file = read(path)?;
    let VmHeader { customer, vm, .. } = &file.header;
    let ask = format!("/v1/customers/{customer}/vms/{vm}/files/{}/back", file.digest);
    let done: Done = s.client.post(&ask, &())?;
    s.out.print(format!("{} is the current file of VM {vm} again", path.display()), &done)
}

fn edit(s: &mut Session, path: &Path, from: Option<&Path>) -> Result<(), CliError> {
    let (file, config) = open(s, path)?;
    let mut value = serde_json::to_value(&config).map_err(|e| CliError::Input(e.to_string()))?;
    if let Some(object) = value.as_object_mut() {
        object.remove("trust");
    }
    let before = serde_json::to_string_pretty(&value).map_err(|e| CliError::Input(e.to_string()))?;
    let begun = from.map(files::text).transpose()?;
    let scratch = Scratch::new()?;
    let edited = scratch.edit(begun.as_ref().unwrap_or(&before))?;
    if edited.trim() == before.trim() {
        return s.out.print("nothing was changed", &Done { done: false });
    }
    seal_edited(s, path, &edited, file.header).map_err(|error| scratch.keep(error))?;
    from.map_or(Ok(()), forget)
}

/// Removes what an earlier edit kept, and the folder that was made for it.
fn forget(kept: &Path) -> Result<(), CliError> {
    std::fs::remove_file(kept).map_err(|e| CliError::Write(kept.to_owned(), e))?;
    if let Some(folder) = kept.parent()
        && folder.file_name().is_some_and(|name| name.to_string_lossy().starts_with(SCRATCH))
    {
        // Whatever else lies there keeps it.
        let _ = std::fs::remove_dir(folder);
    }
    Ok(())
}

fn seal_edited(s: &mut Session, path: &Path, edited: &str, header: VmHeader) -> Result<(), CliError> {
    let value =
        serde_json::from_str(edited).map_err(|e| CliError::Input(format!("the edited text is not JSON: {e}")))?;
    let folder = path.parent().map_or(PathBuf::new(), Path::to_owned);
    let VmHeader { customer, vm, providers, .. } = header;
    seal(s, &customer, &vm, value, &folder, path, providers)
}

/// Seals `value`, a configuration without trust roots, into `out`.
fn seal(
    s: &mut Session,
    customer: &CustomerId,
    vm: &VmId,
    mut value: Value,
    folder: &Path,
    out: &Path,
    providers: Vec<ProviderUrl>,
) -> Result<(), CliError> {
    let view: TrustView = s.client.get(&format!("/v1/customers/{customer}"))?;
    for part in ["kernel", "initramfs"] {
        fill_digest(&mut value["payload"][part], folder)?;
    }
    let config = with_trust(value, view.trust)?;
    let (key_id, key) = s.client.key(&format!("/v1/customers/{customer}/vms/{vm}/keys"), customer, vm.as_str())?;
    let providers = if providers.is_empty() { vec![s.client.url.clone()] } else { providers };
    let (customer_id, vm_id) = (customer.clone(), vm.clone());
    let header = VmHeader { version: 1, customer: customer_id, vm: vm_id, providers, pin: s.client.pin, key_id };
    let bytes = attest::vmfile::seal(&header, &config, &key).map_err(|e| bad_file(out, &e))?;
    let digest = Digest::of(&bytes);
    let mut pending = files::Pending::beside(out, 0o644)?;
    pending.write(&bytes)?;
    pending.sync()?;
    let disks = config.disks.iter().map(|d| FileDisk { volume: d.volume, anchor_mode: d.anchor_mode }).collect();
    let sealed = SealedFile { key_id, digest, disks };
    let _: Done = s.client.put(&format!("/v1/customers/{customer}/vms/{vm}/file"), &sealed)?;
    pending.finish()?;
    s.out.print(format!("sealed {}: the current file of VM {vm}", out.display()), &sealed)
}

/// Fills in the digest of a file that the configuration names but does not prove.
fn fill_digest(part: &mut Value, folder: &Path) -> Result<(), CliError> {
    let Some(object) = part.as_object_mut() else {
        return Ok(());
    };
    if object.contains_key("sha256") {
        return Ok(());
    }
    let name = object.get("name").and_then(Value::as_str).unwrap_or_default();
    let name = policy::config::FileName::try_from(name.to_owned()).map_err(|e| CliError::Input(e.to_string()))?;
    let digest = Digest::of(&files::read(&folder.join(name.as_str()))?);
    object.insert("sha256".to_owned(), Value::String(digest.to_string()));
    Ok(())
}

fn with_trust(mut value: Value, trust: TrustRoots) -> Result<VmConfig, CliError> {
    let bad = |why: String| CliError::Input(format!("the configuration: {why}"));
    let object = value.as_object_mut().ok_or_else(|| bad("not a JSON object".into()))?;
    if object.contains_key("trust") {
        return Err(bad("trust roots come from the provider, leave them out".into()));
    }
    // An absent initramfs was looked at as null above.
    if let Some(payload) = object.get_mut("payload").and_then(Value::as_object_mut) {
        payload.retain(|_, value| !value.is_null());
    }
    let trust = serde_json::to_value(trust).map_err(|e| bad(e.to_string()))?;
    object.insert("trust".to_owned(), trust);
    let config: VmConfig = serde_json::from_value(value).map_err(|e| bad(e.to_string()))?;
    config.check().map_err(|e| bad(e.to_string()))?;
    Ok(config)
}

/// What names of folders in memory begin with.
const SCRATCH: &str = "fealty-keys-";

/// A folder in memory that nobody else reads, gone when dropped. What lies there is a configuration: no key, but the customer's
/// secret all the same.
struct Scratch {
    folder: PathBuf,
    kept: Cell<bool>,
}

impl Scratch {
    fn new() -> Result<Self, CliError> {
        let base = std::env::var_os("XDG_RUNTIME_DIR").map_or_else(|| PathBuf::from("/dev/shm"), PathBuf::from);
        let mut random = [0; 8];
        getrandom::fill(&mut random).map_err(|e| CliError::Input(e.to_string()))?;
        let path = base.join(format!("{SCRATCH}{}", hex::encode(random)));
        let made = std::fs::DirBuilder::new().mode(0o700).create(&path);
        made.map_err(|e| CliError::Write(path.clone(), e))?;
        Ok(Self { folder: path, kept: Cell::new(false) })
    }

    /// Lets the text outlive an error, which then says where it is.
    fn keep(&self, error: CliError) -> CliError {
        self.kept.set(true);
        CliError::Kept { error: Box::new(error), kept: self.text() }
    }

    fn text(&self) -> PathBuf {
        self.folder.join("config.json")
    }

    fn edit(&self, text: &str) -> Result<String, CliError> {
        let path = self.text();
        files::write_new(&path, text.as_bytes())?;
        let editor = std::env::var("EDITOR").unwrap_or_else(|_| "vi".to_owned());
        let mut words = editor.split_whitespace();
        let program = words.next().ok_or_else(|| CliError::Input("EDITOR names no program".into()))?;
        let status = Command::new(program).args(words).arg(&path).status();
        let status = status.map_err(|e| CliError::Start(program.to_owned(), e))?;
        if !status.success() {
            return Err(CliError::Input(format!("{program} failed; nothing was changed")));
        }
        files::text(&path)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if !self.kept.get() {
            let _ = std::fs::remove_dir_all(&self.folder);
        }
    }
}
