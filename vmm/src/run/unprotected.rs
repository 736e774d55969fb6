//! A VM without a provider: a plain file, no keys, the same sandbox.

use super::disks::settings as disk_settings;
use super::plain::{CONFIG_LIMIT, parse};
use super::{
    Settings, connect, folder_of, hook, machine_failure, outcome, read_file, serve_api, tell_start, tell_waiting,
};
use crate::attach::{Ends, add_devices, describe};
use crate::console::Console;
use crate::exit::{Exit, Failure};
use crate::helm::Helm;
use crate::images::Taken;
use crate::lease::LeaseGate;
use crate::machine::{Boot, DiskSlot, Image, Machine, RawDisk, Shape, Traits, open_kvm};
use crate::opener::{Access, open_path};
use crate::operations::{Facts, Operations};
use crate::permit::StartPermit;
use crate::post::office;
use crate::sandbox::{Filter, close_inherited, close_thread, harden, process};
use crate::signals::Signals;
use crate::steps::Steps;
use crate::watch::Watch;
use policy::config::{PlainConfig, PlainDisk};
use std::fs::File;
use std::path::Path;
use std::sync::Arc;

/// Runs the VM that the plain configuration `file` describes, to its end.
pub fn run(file: &Path, settings: &Settings) -> Result<Exit, Failure> {
    let steps = settings.steps;
    process::settle();
    close_inherited().map_err(|e| Failure::of(Exit::Host, &e))?;
    let bytes = read_file(file, CONFIG_LIMIT)?;
    let config = parse(&bytes)
        .map_err(|e| Failure::new(Exit::File, format!("{}: {}", file.display(), crate::exit::chain(&e))))?;
    let mut files = Files::open(&config, &folder_of(file), steps)?;
    let taken = std::mem::take(&mut files.taken);
    let ends = Ends::configured(config.devices(), &folder_of(file))?;
    let kvm = open_kvm().map_err(|e| machine_failure(&e))?;
    let host = |what: &str, e: std::io::Error| Failure::new(Exit::Host, format!("cannot {what}: {e}"));
    let signals = Signals::take().map_err(|e| host("receive signals", e))?;
    let (post, inbox) = office().map_err(|e| host("make an event descriptor", e))?;
    let console = Console::open(&settings.console)?;
    let api = serve_api(settings, &post)?;
    steps.step("unprotected", "no key provider, no keys");

    harden().and_then(|()| close_thread(Filter::Main)).map_err(|e| Failure::of(Exit::Host, &e))?;

    let shape =
        Shape { vcpus: config.cpus.boot_vcpus, memory: config.memory.size, hotplug: config.memory.hotplug_size };
    let traits = Traits { hotplug: true, ..Traits::of(config.cpus, config.memory) };
    let early = Machine::open(kvm).map_err(|e| machine_failure(&e))?.with(traits);
    let mut machine = early.prepare(shape).map_err(|e| machine_failure(&e))?;
    let facts = files.into_machine(&mut machine, &config)?;
    add_devices(config.devices(), ends, &mut machine)?;
    let (keyboard, typing, raw) = connect(&mut machine, console, config.devices())?;
    let permit = StartPermit::from_plain(&config);
    let gate = Arc::new(LeaseGate::unlimited());
    tell_start(steps, typing, true);
    let running = machine.start(permit, gate.clone(), hook()).map_err(|e| machine_failure(&e))?;
    let helm = Arc::new(Helm::new(running.clone(), gate, Box::new(|_| {})));
    let operations = Arc::new(Operations::new(helm, facts, post.clone(), None));
    if let Some(api) = &api {
        api.runs(operations.clone());
    }
    tell_start(steps, typing, false);
    let mut watch = Watch { steps, signals, inbox, operations, keyboard, typing, grace: settings.grace, guard: None };
    let end = watch.until_end(running.events());
    let waiting = tell_waiting(&post, steps, String::new);
    running.stop();
    drop(raw);
    let flushed = running.flush_disks();
    drop(waiting);
    let flushed = flushed.map_err(|(name, e)| format!("disk {name} is not flushed: {}", crate::exit::chain(&e)));
    drop(taken);
    let (result, _, _) = outcome(end, flushed);
    result
}

/// The files that a configuration names, open.
struct Files {
    kernel: File,
    initramfs: Option<File>,
    disks: Vec<RawDisk>,
    taken: Vec<Taken>,
}

impl Files {
    /// Opens them, and makes what no thread can make once the sandbox is closed.
    fn open(config: &PlainConfig, folder: &Path, steps: Steps) -> Result<Self, Failure> {
        let open = |name: &str, access: Access| {
            let path = folder.join(name);
            let file = open_path(&path, access).map_err(|why| Failure::new(Exit::File, why))?;
            Ok((file, path))
        };
        let disk = |disk: &PlainDisk| {
            let access = if disk.readonly { Access::ReadStore } else { Access::WriteStore };
            let (file, path) = open(&disk.path, access)?;
            let taken = Taken::take(&file, disk.readonly)
                .map_err(|why| Failure::new(Exit::File, format!("disk {}: {} {why}", disk.id, path.display())))?;
            let raw = RawDisk::new(file, disk.id.as_str())
                .map_err(|e| Failure::new(Exit::File, format!("disk {} is no disk: {e}", disk.id)))?;
            let (raw, rings) = raw.with_rings(disk.num_queues, disk.queue_size);
            if let Err(why) = rings {
                steps.step("disk-without-io-uring", &format!("{}: {why}", disk.id));
            }
            Ok((raw, taken))
        };
        let payload = &config.payload;
        let opened: Vec<_> = config.disks.iter().map(disk).collect::<Result<_, Failure>>()?;
        let (disks, taken) = opened.into_iter().unzip();
        Ok(Self {
            kernel: open(&payload.kernel, Access::Read)?.0,
            initramfs: payload
                .initramfs
                .as_deref()
                .map(|name| open(name, Access::Read))
                .transpose()?
                .map(|(file, _)| file),
            disks,
            taken,
        })
    }

    /// Loads the kernel and adds the disks.
    fn into_machine(self, machine: &mut Machine, config: &PlainConfig) -> Result<Facts, Failure> {
        let image = |file| Image { file, digest: None };
        let boot = Boot {
            kernel: image(&self.kernel),
            initrd: self.initramfs.as_ref().map(image),
            cmdline: &config.payload.cmdline,
        };
        machine.load(&boot).map_err(|e| machine_failure(&e))?;
        let mut disks = Vec::new();
        for (raw, disk) in self.disks.into_iter().zip(&config.disks) {
            let name = disk.id.to_string();
            disks.push((name.clone(), crate::machine::Disk::size(&raw), disk.readonly));
            let slot = DiskSlot { id: name, disk: Arc::new(raw), settings: disk_settings(&disk.shape()) };
            machine.add_disk(slot).map_err(|e| machine_failure(&e))?;
        }
        let devices = describe(config.devices());
        Ok(Facts { name: None, vcpus: config.cpus.boot_vcpus, memory: config.memory.size, disks, devices })
    }
}
