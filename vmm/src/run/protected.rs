//! A protected VM: no keys, no boot.
//!
//! Each function here is one stretch of the way; what it leaves behind the next one takes. After the release, whatever goes
//! wrong is the instance's end, and the provider is told so before the process exits.

use super::{
    Host, STORE, Settings, connect, disks, folder_of, hook, machine_failure, millis, outcome, read_file, serve_api,
    tell_start, tell_waiting,
};
use crate::api::Api;
use crate::attach::{Attachment, Ends, add_devices, describe};
use crate::console::{Console, Keyboard};
use crate::exit::{Exit, Failure, chain};
use crate::guard::Guard;
use crate::helm::Helm;
use crate::lease::{Deadline, LeaseClock, LeaseGate, boottime_ms};
use crate::machine::{Boot, Disk, DiskSlot, EarlyVm, Image, Machine, Running, Shape, Traits, open_kvm};
use crate::opener::{Access, Mapping, Opener};
use crate::operations::{Facts, Operations, Protected};
use crate::permit::StartPermit;
use crate::post::{Inbox, Post, office};
use crate::provider::{Denied, Link, contacts};
use crate::registrar::Registrar;
use crate::sandbox::{Filter, close_inherited, close_thread, harden, process};
use crate::signals::Signals;
use crate::steps::Steps;
use crate::threads::patiently;
use crate::volumes::{VolumeDisk, Volumes};
use crate::watch::{End, Watch};
use attest::flow::OpenedRelease;
use attest::vmfile::{FILE_LIMIT, VmFile};
use policy::config::{ProvedFile, VmConfig};
use policy::operation::OperationRequest;
use policy::report::{EndReason, ReportEvent};
use policy::{Operation, VmHeader};
use std::fs::File;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::{Duration, Instant};

/// How often whoever waits for another thread looks for signals.
const LOOK: Duration = Duration::from_millis(100);

/// How long a VM that ends waits for the key provider to keep its volumes' last anchors: for all of them together.
const CLOSING: Duration = Duration::from_secs(10);

/// How long after its lease a VM that ends waits for a store.
const LEFT: Duration = Duration::from_secs(60);

/// How long a VM that ends waits for a core dump to notice that.
const SETTLING: Duration = Duration::from_secs(2);

/// What a protected VM is started with.
pub struct ProtectedRun {
    /// The VM file.
    pub file: PathBuf,
    /// Where its files lie.
    pub mappings: Vec<Mapping>,
    /// Where its networks are.
    pub attachments: Vec<Attachment>,
    /// Where the socket of its virtio console is to be.
    pub console_socket: Option<PathBuf>,
    /// Where the socket of its vsock is to be.
    pub vsock_socket: Option<PathBuf>,
    /// The host's TPM, and the way to the provider.
    pub host: Host,
}

/// Everything that is there when the sandbox closes.
struct Prepared {
    file: VmFile,
    opener: Opener,
    signals: Signals,
    post: Post,
    inbox: Inbox,
    lines: Lines,
    api: Option<Api>,
    link: Link,
}

/// The host's ends of the guest's lines.
struct Lines {
    console: Console,
    ends: Ends,
}

/// Runs the VM of a VM file, to its end.
pub fn run(start: &ProtectedRun, settings: &Settings) -> Result<Exit, Failure> {
    let steps = settings.steps;
    let (prepared, kvm) = prepare(start, settings)?;
    close_thread(Filter::Main).map_err(|e| Failure::of(Exit::Host, &e))?;
    // While the provider's thread attests, this one makes what needs no keys.
    let asked = prepared.link.ask(OperationRequest::plain(Operation::PowerOn))?;
    let released = match Machine::open(kvm) {
        Ok(early) => asked.wait(|| unwanted(&prepared.signals)).map(|opened| (early, opened)),
        Err(error) => Err(asked.give_up(machine_failure(&error))),
    };
    let link = prepared.link.clone();
    let VmHeader { customer, vm, .. } = prepared.file.header.clone();
    let lived = match released {
        Ok((early, opened)) => {
            link.speak_for(&customer, &vm, opened.release.instance);
            link.keep_lease(&opened);
            // A fault of this program is an end too, and is reported as one.
            let lived = catch_unwind(AssertUnwindSafe(|| live(prepared, early, opened, settings)));
            lived.unwrap_or_else(|_| Err(Failure::new(Exit::Internal, "a fault of this program ended the VM")))
        }
        Err(Denied { failure, instance: None }) => return Err(failure),
        Err(Denied { failure, instance: Some(instance) }) => {
            link.speak_for(&customer, &vm, instance);
            Err(failure)
        }
    };
    let (result, reason, detail) = match lived {
        Ok((end, flushed)) => outcome(end, flushed),
        Err(failure) => {
            let reason = if failure.exit == Exit::Stopped { EndReason::Shutdown } else { EndReason::Failed };
            let detail = failure.message.clone();
            (Err(failure), reason, detail)
        }
    };
    if !link.end(reason, &detail) {
        steps.step("end-not-reported", "the VM may start elsewhere once its lease is past");
    }
    result
}

/// Why not to start a VM whose process was asked to end. The signals stay where they are.
fn unwanted(signals: &Signals) -> Option<Failure> {
    signals.pending().then(|| Failure::new(Exit::Stopped, "stopped by a signal before the VM started"))
}

/// Everything that needs paths, other processes or a fork: before the sandbox closes.
fn prepare(start: &ProtectedRun, settings: &Settings) -> Result<(Prepared, std::os::fd::OwnedFd), Failure> {
    let steps = settings.steps;
    process::settle();
    close_inherited().map_err(|e| Failure::of(Exit::Host, &e))?;
    let file = read_vm_file(&start.file)?;
    steps.step("read", &format!("VM {} of {}, file {}", file.header.vm, file.header.customer, file.digest));
    // The service registers this process while it prepares itself, and the provider's thread its client.
    let begun = Instant::now();
    let mut registrar = Registrar::start(&file, &start.host)?;
    let opener = Opener::start(&folder_of(&start.file), &start.mappings).map_err(|e| Failure::of(Exit::Host, &e))?;
    process::forget_children();
    let host = |what: &str, e: std::io::Error| Failure::new(Exit::Host, format!("cannot {what}: {e}"));
    let (post, inbox) = office().map_err(|e| host("make an event descriptor", e))?;
    let (service, registered) = channel();
    let contacts = contacts(&file, &start.host, registered, steps)?;
    let link = Signals::kept_from(|| Link::start(contacts, steps, post.clone()))?;
    let ends = Ends::attached(&start.attachments, start.console_socket.as_deref(), start.vsock_socket.as_deref())?;
    let kvm = open_kvm().map_err(|e| machine_failure(&e))?;
    let console = Console::open(&settings.console)?;
    harden().map_err(|e| Failure::of(Exit::Host, &e))?;
    // Signals still end a process whose TPM service hangs. A thread that is gone says so when it is asked.
    let _ = service.send((registrar.registered()?, registrar));
    steps.timed("tpm-service", &start.host.tcti.to_string(), begun.elapsed());
    let signals = Signals::take().map_err(|e| host("receive signals", e))?;
    let api = serve_api(settings, &post)?;
    Ok((Prepared { file, opener, signals, post, inbox, lines: Lines { console, ends }, api, link }, kvm))
}

/// The VM file at `path`, read once.
pub fn read_vm_file(path: &Path) -> Result<VmFile, Failure> {
    let bytes = read_file(path, FILE_LIMIT as u64)?;
    VmFile::read(&bytes).map_err(|e| Failure::new(Exit::File, format!("{}: {}", path.display(), chain(&e))))
}

fn tell_release(opened: &OpenedRelease, steps: Steps) {
    let release = &opened.release;
    let lab = if release.lab { ", laboratory TPM" } else { "" };
    let detail = format!(
        "instance {}, lease {} s, host {}, cloud {}{lab}",
        release.instance, release.lease.seconds, release.host, release.cloud
    );
    steps.step("released", &detail);
}

/// From released keys to the end of the VM's life; and whether its volumes are flushed.
fn live(
    prepared: Prepared,
    early: EarlyVm,
    opened: OpenedRelease,
    settings: &Settings,
) -> Result<(End, Result<(), String>), Failure> {
    let steps = settings.steps;
    let lease = LeaseClock::new(opened.release.lease, opened.asked_ms);
    // Until the guard watches: a store that hangs must not keep keys in memory past the lease.
    let opening = Deadline::new(lease.end_ms(), prepared.post.clone(), move || end_at_once(steps))?;
    tell_release(&opened, steps);
    let (permit, config, established) =
        StartPermit::from_release(&opened, &prepared.file).map_err(|e| Failure::of(Exit::File, &e))?;
    steps.step("opened", "the sealed part fits its header, the release stands in the audit log");
    let Prepared { file, opener, signals, post, inbox, lines, api, link } = prepared;
    link.establish(established);
    let waiting = Deadline::new(boottime_ms().saturating_add(millis(STORE)), post.clone(), move || {
        let seconds = STORE.as_secs();
        let what =
            "where a store, or the key provider, hangs, the process ends with its lease; SIGKILL ends it at once";
        steps.step("waiting", &format!("volumes have been opening for {seconds} s: {what}"));
    });
    let (machine, volumes) = build(early, &config, &opened, &opener, &link, &signals, steps)?;
    drop(waiting);
    drop(opener);
    if let Some(failure) = unwanted(&signals) {
        volumes.close_unused(&link, steps);
        return Err(failure);
    }
    let volumes = Arc::new(volumes);
    let gate = Arc::new(LeaseGate::closed());
    gate.open_until(lease.quiesce_ms(), lease.end_ms());

    let started = start(machine, &config, &volumes, lines, permit, &gate, steps);
    let (running, keyboard, typing, raw) = match started {
        Ok(started) => started,
        Err(failure) => {
            volumes.close_unused(&link, steps);
            return Err(failure);
        }
    };
    link.report(ReportEvent::Runs);

    let (flushing, anchoring) = (volumes.clone(), link.clone());
    let still = move |still| {
        flushing.stand_still(still);
        anchoring.stand_still(still);
    };
    let helm = Arc::new(Helm::new(running.clone(), gate.clone(), Box::new(still)));
    let protected = Arc::new(Protected {
        link: link.clone(),
        instance: opened.release.instance,
        lease_end_ms: AtomicU64::new(lease.end_ms()),
        volumes: volumes.clone(),
    });
    let guard = Guard::new(helm.clone(), volumes.clone(), protected.clone(), &opened, post.clone());
    drop(opening);
    // The keys live in the volumes now.
    drop(opened);
    let facts = facts(&config, &file, &volumes);
    let operations = Arc::new(Operations::new(helm, facts, post.clone(), Some(protected.clone())));
    if let Some(api) = &api {
        api.runs(operations.clone());
    }
    tell_start(steps, typing, false);
    process::forget_code();
    let begun_operations = operations.clone();
    let end = guard.map(|guard| {
        let grace = settings.grace;
        let mut watch = Watch { steps, signals, inbox, operations, keyboard, typing, grace, guard: Some(guard) };
        watch.until_end(running.events())
    });
    let closing = closing(&protected, &post, steps);
    // Requests in hand may wait for an anchor, and so do volumes that are closed.
    link.hurry(CLOSING);
    patiently(&|| running.stop(), || drop(volumes.rest()));
    drop(raw);
    let flushed = volumes.close(&link, steps);
    drop(closing);
    // A renewal that was still to bring keys back finds it closed.
    gate.close();
    volumes.wipe_keys();
    begun_operations.settle(SETTLING);
    end.map(|end| (end, flushed))
}

/// What is done at its time, until this is dropped, while a VM that ends waits for its stores: it is told for which; keys are wiped at the
/// lease's end, whatever hangs; and then nothing is waited for without end, for without keys there is not much that could still be made durable.
fn closing(protected: &Protected, post: &Post, steps: Steps) -> [Result<Deadline, Failure>; 3] {
    let (volumes, lease_end_ms) = (&protected.volumes, protected.lease_end_ms.load(Ordering::SeqCst));
    let told = volumes.clone();
    let tell = tell_waiting(post, steps, move || told.resting().join(", "));
    let (kept, wiped) = (volumes.clone(), protected.link.are_keys_wiped());
    let wipe = Deadline::new(lease_end_ms, post.clone(), move || {
        kept.wipe_keys();
        if !wiped {
            steps.step("keys-wiped", "the lease ended before the volumes were closed");
        }
    });
    if wipe.is_err() {
        volumes.wipe_keys();
    }
    // Of a VM that has waited for its provider for long, that is from now on.
    let left_ms = lease_end_ms.max(boottime_ms()).saturating_add(millis(LEFT));
    let left = volumes.clone();
    let left = Deadline::new(left_ms, post.clone(), move || {
        let which = match &left.resting()[..] {
            [] => "volumes may not be".to_owned(),
            hang => format!("{} not", hang.join(", ")),
        };
        let why = format!("the lease has ended, and a store hangs: {which} flushed");
        crate::console::terminal::restore();
        exit_at_once(&Failure::new(Exit::Volume, why), steps)
    });
    [tell, wipe, left]
}

fn exit_at_once(failure: &Failure, steps: Steps) {
    steps.failure(failure);
    std::process::exit(failure.exit as i32);
}

/// The end of a process whose volumes do not open within their lease. No guest ran, so nothing is lost; its keys go with it.
fn end_at_once(steps: Steps) {
    let failure =
        Failure::new(Exit::Lease, "the lease ended while volumes were opened: a store, or the key provider, hangs");
    exit_at_once(&failure, steps);
}

/// The machine with its kernel, and its volumes: both at once, because one waits for the provider.
fn build(
    early: EarlyVm,
    config: &VmConfig,
    opened: &OpenedRelease,
    opener: &Opener,
    link: &Link,
    signals: &Signals,
    steps: Steps,
) -> Result<(Machine, Volumes), Failure> {
    let proved = |file: &ProvedFile| {
        let open = opener.open(file.name.as_str(), Access::Read);
        open.map_err(|e| Failure::new(Exit::File, chain(&e)))
    };
    let kernel = proved(&config.payload.kernel)?;
    let initrd = config.payload.initramfs.as_ref().map(proved).transpose()?;
    let (opening, opened_all) = channel::<()>();
    let (machine, volumes) = std::thread::scope(|scope| {
        let volumes = std::thread::Builder::new().name("volumes".into()).spawn_scoped(scope, move || {
            let _opening = opening;
            let begun = Instant::now();
            let volumes = Volumes::open(&config.disks, opened, opener, link, steps)?;
            if !config.disks.is_empty() {
                steps.timed("volumes", &format!("{} opened and anchored", config.disks.len()), begun.elapsed());
            }
            Ok(volumes)
        });
        let machine = load(early, config, &kernel, initrd.as_ref(), steps);
        // A provider that hangs holds up nobody who does not want the VM any more.
        while opened_all.recv_timeout(LOOK) == Err(RecvTimeoutError::Timeout) {
            if machine.is_err() || signals.pending() {
                link.hurry(Duration::ZERO);
            }
        }
        let volumes = match volumes {
            Ok(thread) => {
                thread.join().unwrap_or_else(|_| Err(Failure::new(Exit::Internal, "a volume's opening panicked")))
            }
            Err(e) => Err(Failure::new(Exit::Host, format!("cannot start a thread: {e}"))),
        };
        (machine, volumes)
    });
    match (machine, volumes) {
        (Ok(machine), Ok(volumes)) => Ok((machine, volumes)),
        (Err(failure), Ok(volumes)) => {
            volumes.close_unused(link, steps);
            Err(failure)
        }
        // What was given up because of a signal is no volume's fault.
        (_, Err(failure)) => Err(unwanted(signals).unwrap_or(failure)),
    }
}

fn load(
    early: EarlyVm,
    config: &VmConfig,
    kernel: &File,
    initrd: Option<&File>,
    steps: Steps,
) -> Result<Machine, Failure> {
    let begun = Instant::now();
    let shape =
        Shape { vcpus: config.cpus.boot_vcpus, memory: config.memory.size, hotplug: config.memory.hotplug_size };
    let early = early.with(Traits::of(config.cpus, config.memory));
    let mut machine = early.prepare(shape).map_err(|e| machine_failure(&e))?;
    let initramfs = config.payload.initramfs.as_ref();
    let boot = Boot {
        kernel: Image { file: kernel, digest: Some(config.payload.kernel.sha256) },
        initrd: initrd.zip(initramfs).map(|(file, proved)| Image { file, digest: Some(proved.sha256) }),
        cmdline: &config.payload.cmdline,
    };
    machine.load(&boot).map_err(|e| machine_failure(&e))?;
    steps.timed("loaded", "kernel digests are right", begun.elapsed());
    Ok(machine)
}

type Started = (Running, Keyboard, crate::watch::Typing, Option<crate::console::terminal::RawMode>);

fn start(
    mut machine: Machine,
    config: &VmConfig,
    volumes: &Volumes,
    lines: Lines,
    permit: StartPermit,
    gate: &Arc<LeaseGate>,
    steps: Steps,
) -> Result<Started, Failure> {
    for (volume, disk) in volumes.iter().zip(&config.disks) {
        let disk_slot = DiskSlot {
            id: disk.id.to_string(),
            disk: Arc::new(VolumeDisk(volume.volume.clone())),
            settings: disks::settings(&disk.shape()),
        };
        machine.add_disk(disk_slot).map_err(|e| machine_failure(&e))?;
    }
    add_devices(config.devices(), lines.ends, &mut machine)?;
    let (keyboard, typing, raw) = connect(&mut machine, lines.console, config.devices())?;
    tell_start(steps, typing, true);
    let running = machine.start(permit, gate.clone(), hook()).map_err(|e| machine_failure(&e))?;
    Ok((running, keyboard, typing, raw))
}

fn facts(config: &VmConfig, file: &VmFile, volumes: &Volumes) -> Facts {
    let disk = |opened: &crate::volumes::Opened| {
        (opened.name.clone(), VolumeDisk(opened.volume.clone()).size(), opened.readonly)
    };
    Facts {
        name: Some(file.header.vm.to_string()),
        vcpus: config.cpus.boot_vcpus,
        memory: config.memory.size,
        disks: volumes.iter().map(disk).collect(),
        devices: describe(config.devices()),
    }
}
