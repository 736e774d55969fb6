//! Operations on a running VM, wherever they come from: first whether they may be done, then the act, then the report.
//!
//! Free ones are done and reported; restricted ones ask the provider first, whose answer brings what they need. Where no
//! more reports fit, nothing is done.

use crate::dump;
use crate::exit::{Exit, Failure};
use crate::helm::{Helm, Hold};
use crate::images::{self, Taken};
use crate::lease::boottime_ms;
use crate::machine::{DiskError, DiskSlot, PlugError, RawDisk};
use crate::post::{Message, Post};
use crate::provider::{Link, OutboxFull};
use crate::run::disks::settings as disk_settings;
use crate::volumes::Volumes;
use attest::protocol::KeyName;
use policy::config::DiskShape;
use policy::disk::VolumeSize;
use policy::operation::{OperationClass, OperationRequest};
use policy::report::{ReportEvent, Resized};
use policy::{InstanceNumber, Operation};
use serde_json::{Map, Value, json};
use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, TryLockError};
use std::time::{Duration, Instant};

/// What the operator may know of the machine: nothing that is sealed.
#[derive(Clone, Debug)]
pub struct Facts {
    /// The VM's name; of an unprotected one, none.
    pub name: Option<String>,
    /// vCPUs.
    pub vcpus: u8,
    /// Memory in bytes.
    pub memory: u64,
    /// Disks: name, size in bytes, whether read only.
    pub disks: Vec<(String, u64, bool)>,
    /// The other devices, by their keys in the configuration.
    pub devices: Map<String, Value>,
}

/// The provider's side of a protected VM.
pub struct Protected {
    /// The way to the provider.
    pub link: Link,
    /// The instance.
    pub instance: InstanceNumber,
    /// End of the lease, boot-time milliseconds; the watching thread keeps it.
    pub lease_end_ms: AtomicU64,
    /// Its volumes.
    pub volumes: Arc<Volumes>,
}

/// Operations on one VM.
pub struct Operations {
    helm: Arc<Helm>,
    facts: Facts,
    post: Post,
    protected: Option<Arc<Protected>>,
    ending: AtomicBool,
    /// Held from a restricted operation's permission to the report of its outcome.
    restricted: Mutex<()>,
    /// Boot-time milliseconds before which no further look at the VM is reported.
    looked_until_ms: AtomicU64,
}

/// A look at the VM is reported, but not each of a monitoring program's: at most one in so many milliseconds.
const LOOKS_MS: u64 = 60_000;

/// What became of a core dump.
pub struct Dumped {
    /// The attestation that permitted it.
    pub attestation: String,
    /// Bytes written.
    pub bytes: u64,
    /// The sealed stream's final tag, in hex: also in the audit log.
    pub tag: String,
}

/// Why an operation was not done.
#[derive(Debug, thiserror::Error)]
pub enum OperationError {
    /// It makes no sense now.
    #[error("{0}")]
    State(String),
    /// Its report would find no room.
    #[error(transparent)]
    Full(#[from] OutboxFull),
    /// The provider did not permit it.
    #[error("not permitted: {0}")]
    Refused(Failure),
    /// It needs a provider, and this VM has none.
    #[error("{0} needs a key provider's permission, and an unprotected VM has no provider")]
    Unprotected(Operation),
    /// A disk can't be added.
    #[error(transparent)]
    Plug(#[from] PlugError),
    /// It was begun and failed.
    #[error("the core dump failed")]
    Dump(#[from] dump::DumpError),
    /// It was begun and failed.
    #[error("the volume did not grow")]
    Grow(#[from] DiskError),
}

impl OperationError {
    /// The HTTP status of its answer.
    pub fn status(&self) -> u16 {
        match self {
            Self::State(_) | Self::Unprotected(_) => 409,
            Self::Plug(PlugError::Wire(_) | PlugError::Thread(_)) => 500,
            Self::Plug(_) => 409,
            Self::Refused(Failure { exit: Exit::Refused, .. }) => 403,
            Self::Refused(Failure { exit: Exit::Unreachable, .. }) | Self::Full(_) => 503,
            Self::Refused(_) | Self::Dump(_) | Self::Grow(_) => 500,
        }
    }
}

impl Operations {
    /// Operations on the VM at `helm`.
    pub fn new(helm: Arc<Helm>, facts: Facts, post: Post, protected: Option<Arc<Protected>>) -> Self {
        let (ending, restricted, looked_until_ms) = (AtomicBool::new(false), Mutex::new(()), AtomicU64::new(0));
        Self { helm, facts, post, protected, ending, restricted, looked_until_ms }
    }

    /// `vm.info`, in Cloud Hypervisor's shape; reported, once a minute at most.
    pub fn info(&self) -> Result<Value, OperationError> {
        let now = boottime_ms();
        if now >= self.looked_until_ms.load(Ordering::SeqCst) {
            self.room()?;
            self.report(ReportEvent::Operation { operation: Operation::Info });
            self.looked_until_ms.store(now + LOOKS_MS, Ordering::SeqCst);
        }
        Ok(self.described())
    }

    fn described(&self) -> Value {
        let (held, _) = self.helm.state();
        let fixed = self.facts.disks.iter().map(|(id, _, readonly)| (id.clone(), *readonly));
        let disks = fixed.chain(self.helm.running().added_disks());
        let disks: Vec<_> = disks.map(|(id, readonly)| json!({ "id": id, "readonly": readonly })).collect();
        let mut config = json!({
            "cpus": { "boot_vcpus": self.facts.vcpus, "max_vcpus": self.facts.vcpus },
            "memory": { "size": self.facts.memory },
            "payload": {},
            "disks": disks,
        });
        if let Value::Object(config) = &mut config {
            config.extend(self.facts.devices.clone());
        }
        json!({
            "config": config,
            "state": if held { "Paused" } else { "Running" },
            "memory_actual_size": self.facts.memory.saturating_sub(self.helm.running().in_balloon()),
        })
    }

    /// `vm.counters`: by device.
    pub fn counters(&self) -> Value {
        serde_json::to_value(self.helm.running().counters()).unwrap_or_default()
    }

    /// What is fealty's own: lease, holds, reports that wait.
    pub fn status(&self) -> Value {
        let (_, state) = self.helm.state();
        let mut status = json!({ "state": state, "protected": self.protected.is_some() });
        if let Some(protected) = &self.protected {
            let left = protected.lease_end_ms.load(Ordering::SeqCst).saturating_sub(boottime_ms());
            let (reports, _) = protected.link.waiting();
            status["vm"] = json!(self.facts.name);
            status["instance"] = json!(protected.instance);
            status["lease_left_seconds"] = json!(left / 1000);
            status["reports_waiting"] = json!(reports);
        }
        status
    }

    /// One line for people.
    pub fn status_line(&self) -> String {
        let (_, state) = self.helm.state();
        let size = self.facts.memory >> 20;
        let disks = self.facts.disks.len() + self.helm.running().added_disks().len();
        let machine = format!("{state}, {} vCPUs, {size} MiB, {disks} disks", self.facts.vcpus);
        match &self.protected {
            None => format!("{machine}, unprotected"),
            Some(protected) => {
                let left = protected.lease_end_ms.load(Ordering::SeqCst).saturating_sub(boottime_ms()) / 1000;
                let (reports, _) = protected.link.waiting();
                let name = self.facts.name.as_deref().unwrap_or_default();
                format!("{name} instance {}: {machine}, lease {left} s, {reports} reports wait", protected.instance)
            }
        }
    }

    /// Does a free operation and reports it; a shutdown is done by [`end_if_asked`](Self::end_if_asked).
    pub fn free(&self, operation: Operation) -> Result<(), OperationError> {
        if operation.class() != OperationClass::Free {
            return Err(OperationError::State(format!("{operation} is not free")));
        }
        self.room()?;
        match operation {
            Operation::Pause => self.pause()?,
            Operation::Resume => self.resume()?,
            Operation::PowerButton => self.helm.running().power_button(),
            Operation::Shutdown => self.ending.store(true, Ordering::SeqCst),
            _ => {}
        }
        self.report(ReportEvent::Operation { operation });
        Ok(())
    }

    /// Disk `id` has another size. Gives the bytes that the guest sees.
    ///
    /// Of an unprotected VM the file is the operator's to change, and `desired` bytes, where given, are what it must have by now: its guest
    /// is told. The volume of a protected VM is made as large as `desired`, where the customer permits it.
    pub fn resize_disk(&self, id: &str, desired: Option<u64>) -> Result<u64, OperationError> {
        let state = |why: String| OperationError::State(why);
        let size = self.helm.running().look_again(id).ok_or_else(|| state(format!("this VM has no disk {id}")))?;
        if let Some(protected) = &self.protected {
            let desired =
                desired.ok_or_else(|| state(format!("say how large disk {id} is to be; it has {size} bytes")))?;
            return self.grow_volume(protected, id, size, desired);
        }
        match desired {
            Some(desired) if desired != size => {
                Err(state(format!("disk {id} has {size} bytes, not {desired}; change its file first")))
            }
            _ => Ok(size),
        }
    }

    /// Makes a volume larger: asks the provider, and reports the outcome.
    fn grow_volume(&self, protected: &Protected, id: &str, size: u64, desired: u64) -> Result<u64, OperationError> {
        let state = |why: String| Err(OperationError::State(why));
        if desired < size {
            return state(format!("disk {id} has {size} bytes; a volume is made smaller while its VM does not run"));
        }
        if !desired.is_multiple_of(512) {
            return state(format!("a disk has a multiple of 512 bytes, not {desired}"));
        }
        if self.facts.disks.iter().any(|(name, _, readonly)| name == id && *readonly) {
            return state(format!("disk {id} is read only"));
        }
        if desired == size {
            return Ok(size);
        }
        self.room()?;
        let operation = Operation::ResizeDisk;
        let mut request = OperationRequest::plain(operation);
        request.parameters.insert("disk".into(), id.to_owned());
        request.parameters.insert("size".into(), desired.to_string());
        let _one = self.restricted.lock().unwrap_or_else(PoisonError::into_inner);
        // Its answer brings keys that this process has already: what counts is that there is one.
        let opened = protected.link.attest(request).map_err(OperationError::Refused)?;
        let attestation = opened.release.attestation;
        drop(opened);
        let grown = self.helm.running().grow(id, desired).unwrap_or(Err(DiskError::Unsupported));
        let detail = match &grown {
            Ok(size) => format!("disk {id} has {size} bytes"),
            Err(error) => {
                let size = self.helm.running().look_again(id).unwrap_or(size);
                format!("disk {id} has {size} bytes: {}", crate::exit::chain(error))
            }
        };
        let volume = protected.volumes.iter().find(|opened| opened.name == id).map(|opened| &opened.volume);
        let resized = volume.and_then(|volume| {
            let size = VolumeSize::try_from(volume.size()).ok()?;
            Some(Resized { volume: volume.id(), size })
        });
        self.report(ReportEvent::Outcome { attestation, operation, done: grown.is_ok(), detail, resized });
        Ok(grown?)
    }

    /// Adds a disk to an unprotected VM: the image behind `descriptor`, which nobody else may use. Gives its PCI address. `shape` is checked.
    pub fn add_disk(&self, shape: &DiskShape<'_>, descriptor: OwnedFd) -> Result<String, OperationError> {
        self.may_change_disks()?;
        let id = shape.id;
        let bad = |why: String| OperationError::State(format!("disk {id}: the image {why}"));
        let file = images::passed(descriptor, shape.readonly).map_err(bad)?;
        let taken = Taken::take(&file, shape.readonly).map_err(bad)?;
        let disk = RawDisk::new(file, id.as_str()).map_err(|e| bad(format!("is no disk: {e}")))?;
        let slot = DiskSlot { id: id.to_string(), disk: Arc::new(disk), settings: disk_settings(shape) };
        let (post, name) = (self.post.clone(), id.to_string());
        let gone = Box::new(move |flushed: Result<(), DiskError>| {
            drop(taken);
            post.put(Message::DiskRemoved(name, flushed.map_err(|e| crate::exit::chain(&e))));
        });
        let slot = self.helm.running().plug(slot, gone)?;
        Ok(format!("0000:00:{slot:02x}.0"))
    }

    /// Asks the guest of an unprotected VM to let go of a disk that was added: it is there until the guest has.
    pub fn remove_disk(&self, id: &str) -> Result<(), OperationError> {
        self.may_change_disks()?;
        self.helm.running().unplug(id).map_err(|e| OperationError::State(e.to_string()))
    }

    fn may_change_disks(&self) -> Result<(), OperationError> {
        match self.protected {
            None => Ok(()),
            Some(_) => Err(OperationError::State(
                "a protected VM keeps the disks of its start: others need the customer's permission, which this version can't ask for"
                    .into(),
            )),
        }
    }

    /// Asks the guest of an unprotected VM to put `size` bytes into its balloon, a multiple of 4096 less than its memory.
    pub fn resize_balloon(&self, size: u64) -> Result<(), OperationError> {
        let state = |why: String| Err(OperationError::State(why));
        if self.protected.is_some() {
            return state("the balloon of a protected VM keeps the size that its customer gave it".into());
        }
        if !size.is_multiple_of(4096) || size >= self.facts.memory {
            let memory = self.facts.memory;
            return state(format!("a balloon holds a multiple of 4096 bytes, less than the memory's {memory}"));
        }
        match self.helm.running().resize_balloon(size) {
            true => Ok(()),
            false => state("this VM has no balloon; its configuration may ask for one".into()),
        }
    }

    /// Ends the VM if that was asked for: called once the one who asked has an answer.
    pub fn end_if_asked(&self) {
        if self.ending.load(Ordering::SeqCst) {
            self.post.put(Message::Shutdown);
        }
    }

    fn pause(&self) -> Result<(), OperationError> {
        let held = self.helm.hold(Hold::Operator);
        if held { Ok(()) } else { Err(OperationError::State("the VM is paused already".into())) }
    }

    fn resume(&self) -> Result<(), OperationError> {
        let released = self.helm.release(Hold::Operator);
        match self.helm.state() {
            (true, why) if !released => Err(OperationError::State(format!("the VM is {why}"))),
            _ if released => Ok(()),
            _ => Err(OperationError::State("the VM is not paused".into())),
        }
    }

    /// Writes a sealed core dump to `to`: asks the provider, whose answer brings the key, and reports the outcome.
    pub fn core_dump(&self, to: File) -> Result<Dumped, OperationError> {
        let Some(protected) = &self.protected else {
            return Err(OperationError::Unprotected(Operation::CoreDump));
        };
        self.room()?;
        let mut request = OperationRequest::plain(Operation::CoreDump);
        request.parameters.insert("memory".into(), self.facts.memory.to_string());
        request.parameters.insert("vcpus".into(), self.facts.vcpus.to_string());
        let _one = self.restricted.lock().unwrap_or_else(PoisonError::into_inner);
        let opened = protected.link.attest(request).map_err(OperationError::Refused)?;
        let attestation = opened.release.attestation;
        let stream = |name: &KeyName| matches!(name, KeyName::Stream(_));
        let key = opened.release.keys.iter().zip(&opened.keys).find(|(name, _)| stream(name));
        self.helm.hold(Hold::Dump);
        let outcome = match key {
            Some((KeyName::Stream(id), key)) => dump::write(self.helm.running(), to, *id, key, &opened.release),
            _ => Err(dump::DumpError::NoKey),
        };
        self.helm.release(Hold::Dump);
        let detail = match &outcome {
            Ok(written) => written.tag.clone(),
            Err(error) => crate::exit::chain(error),
        };
        let operation = Operation::CoreDump;
        self.report(ReportEvent::Outcome { attestation, operation, done: outcome.is_ok(), detail, resized: None });
        let written = outcome?;
        Ok(Dumped { attestation: attestation.to_string(), bytes: written.bytes, tag: written.tag })
    }

    /// Waits until a restricted operation that the VM's end cuts off has reported that, for `limit` at most: nothing is reported after the end.
    pub fn settle(&self, limit: Duration) {
        let begun = Instant::now();
        while matches!(self.restricted.try_lock(), Err(TryLockError::WouldBlock)) && begun.elapsed() < limit {
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    fn room(&self) -> Result<(), OutboxFull> {
        self.protected.as_ref().map_or(Ok(()), |p| p.link.room())
    }

    fn report(&self, event: ReportEvent) {
        if let Some(protected) = &self.protected {
            protected.link.report(event);
        }
    }
}
