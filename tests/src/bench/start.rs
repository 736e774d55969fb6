//! `bench start`: process start to the guest's first byte, and memory.

use super::baseline::{TlsAlone, TpmAlone};
use super::memory::Memory;
use super::printer::Printer;
use super::{BenchError, first_byte, memory};
use crate::guest::images;
use crate::lab::{Lab, Plan};
use crate::process::{Background, program};
use fealty_disk::bench::{Figure, Samples};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

const MEMORY_SIZE: u64 = 128 << 20;
/// Rounds before those that count: caches and page tables fill.
const WARM_UP: u32 = 3;
/// How often memory is measured.
const MEMORY_ROUNDS: u32 = 5;
/// Until a VM process does nothing more by itself.
const SETTLED: Duration = Duration::from_millis(300);

const ENDS: &str = "hello,poweroff";
const STAYS: &str = "hello,sleep";

/// Targets (DESIGN.md, section 11).
const UNATTESTED_BY_BARE: f64 = 1.7;
const ATTESTED_BY_PARTS: f64 = 1.2;
const ATTESTED_BY_BARE: f64 = 4.7;
const RESIDENT_MIB: f64 = 6.0;
const DIRTY_MIB: f64 = 1.5;

/// Measures and prints; `attested` with a key provider and a software TPM on this machine.
pub(super) fn run(rounds: u32, attested: bool, printer: &mut Printer) -> Result<(), BenchError> {
    let folder = tempfile::tempdir().map_err(|error| BenchError::Io("a temporary folder".into(), error))?;
    let plain = Plain::new(folder.path())?;
    let mut protected = if attested { Some(Protected::new()?) } else { None };

    let (mut bare_ms, mut plain_ms, mut disk_ms) = (Samples::default(), Samples::default(), Samples::default());
    let (mut attested_ms, mut tpm_ms, mut tls_ms) = (Samples::default(), Samples::default(), Samples::default());
    for round in 0..rounds + WARM_UP {
        let counts = round >= WARM_UP;
        let keep = |samples: &mut Samples, ms: f64| {
            if counts {
                samples.add(ms)
            }
        };
        keep(&mut bare_ms, once(&mut bare())?);
        keep(&mut plain_ms, once(&mut plain.run("ends"))?);
        keep(&mut disk_ms, once(&mut plain.run("ends-disk"))?);
        if let Some(protected) = &mut protected {
            keep(&mut attested_ms, once(&mut protected.lab.vm(&[]))?);
            keep(&mut tpm_ms, protected.tpm_alone()?);
            keep(&mut tls_ms, protected.tls_alone()?);
        }
    }

    printer.add(Figure::new("start, bare program", "ms", &bare_ms));
    let name = "start, unattested";
    printer.add(Figure::new(name, "ms", &plain_ms).against("bare program", &bare_ms, Some(UNATTESTED_BY_BARE)));
    printer.add(Figure::new("start, unattested, one disk", "ms", &disk_ms).against("bare program", &bare_ms, None));
    if protected.is_some() {
        let parts = tpm_ms.with(&tls_ms, |tpm, tls| tpm + tls);
        let more = attested_ms.with(&plain_ms, |attested, plain| attested - plain);
        let name = "start, attested, one volume";
        printer.add(Figure::new("TPM commands alone", "ms", &tpm_ms));
        printer.add(Figure::new("one TLS request alone", "ms", &tls_ms));
        printer.add(Figure::new(name, "ms", &attested_ms).against("bare program", &bare_ms, Some(ATTESTED_BY_BARE)));
        let figure = Figure::new("attested less unattested", "ms", &more);
        printer.add(figure.against("TPM and TLS alone", &parts, Some(ATTESTED_BY_PARTS)));
    }
    measure_memory(&plain, protected.as_ref(), printer)
}

fn once(command: &mut Command) -> Result<f64, BenchError> {
    let speaking = first_byte::start(command)?;
    let ms = speaking.ms;
    speaking.end()?;
    Ok(ms)
}

fn bare() -> Command {
    let mut command = Command::new(&images().bare);
    command.arg("--pvh").arg(&images().elf).arg(command_line(ENDS));
    command
}

fn command_line(words: &str) -> String {
    format!("console=ttyS0 fealty.do={words}")
}

/// Unprotected VMs, one for each configuration.
struct Plain<'a> {
    folder: &'a Path,
}

impl<'a> Plain<'a> {
    fn new(folder: &'a Path) -> Result<Self, BenchError> {
        let this = Self { folder };
        this.write("disk.img", &vec![0; 16 << 20])?;
        let disk = serde_json::json!([{"id": "root", "path": "disk.img"}]);
        for (name, words, disks) in
            [("ends", ENDS, serde_json::json!([])), ("ends-disk", ENDS, disk), ("stays", STAYS, serde_json::json!([]))]
        {
            let config = serde_json::json!({
                "cpus": {"boot_vcpus": 1},
                "memory": {"size": MEMORY_SIZE},
                "payload": {"kernel": images().elf, "cmdline": command_line(words)},
                "disks": disks,
            });
            this.write(&format!("{name}.json"), config.to_string().as_bytes())?;
        }
        Ok(this)
    }

    fn run(&self, name: &str) -> Command {
        let mut command = Command::new(program("fealty"));
        command.args(["run", "--unprotected"]).arg(self.folder.join(format!("{name}.json")));
        command
    }

    fn write(&self, name: &str, bytes: &[u8]) -> Result<(), BenchError> {
        let path = self.folder.join(name);
        std::fs::write(&path, bytes).map_err(|error| BenchError::Io(path, error))
    }
}

/// A laboratory whose TPM service runs already, so that what is done once per boot is done; and what an attestation can't do without.
pub(super) struct Protected {
    pub(super) lab: Lab,
    _service: Background,
    tpm: TpmAlone,
    tls: TlsAlone,
}

impl Protected {
    pub(super) fn new() -> Result<Self, BenchError> {
        let lab = Lab::new(&Plan::default());
        let mut service = Command::new(program("fealty-host"));
        service.args(["tpm", "--tcti", &lab.tpm.tcti(), "--runtime-dir", &lab.runtime_dir()]);
        service.args(["--firmware-log", &lab.text("firmware.log"), "--ima-log", &lab.text("ima.log")]);
        let service = Background::start(&mut service);
        let (tpm, tls) = (TpmAlone::start()?, TlsAlone::new(&lab.url(), &lab.path("keys/ca.pem"))?);
        let this = Self { lab, _service: service, tpm, tls };
        this.seal(ENDS)?;
        // The first attestation activates the AK; later ones find it known.
        once(&mut this.lab.vm(&[]))?;
        Ok(this)
    }

    pub(super) fn tpm_alone(&mut self) -> Result<f64, BenchError> {
        self.tpm.commands()
    }

    pub(super) fn tls_alone(&self) -> Result<f64, BenchError> {
        self.tls.request()
    }

    /// Makes the laboratory's VM as large as the others, and its guest do `words`.
    fn seal(&self, words: &str) -> Result<(), BenchError> {
        let config = serde_json::json!({
            "cpus": {"boot_vcpus": 1},
            "memory": {"size": MEMORY_SIZE},
            "payload": {"kernel": {"name": "guest"}, "cmdline": command_line(words)},
            "disks": [{"id": "root", "volume": self.lab.volume_id("root"), "anchor_mode": "interval"}],
        });
        let (path, out) = (self.lab.path("store/bench.json"), self.lab.text("store/payroll.vm"));
        std::fs::write(&path, config.to_string()).map_err(|error| BenchError::Io(path, error))?;
        let config = self.lab.text("store/bench.json");
        self.lab.keys(&["vm", "seal", "acme", "payroll", "--config", &config, "--out", &out]).good();
        Ok(())
    }
}

fn measure_memory(plain: &Plain, protected: Option<&Protected>, printer: &mut Printer) -> Result<(), BenchError> {
    let stays = || plain.run("stays");
    processes("unattested", || settled(&mut stays()), printer)?;
    let Some(protected) = protected else { return Ok(()) };
    protected.seal(STAYS)?;
    processes("attested", || settled(&mut protected.lab.vm(&[])), printer)?;
    let service = memory::find(&["fealty-host", "tpm", &protected.lab.tpm.tcti()])
        .ok_or(BenchError::Memory("the TPM service".into()))?;
    let service = memory::of(service)?;
    printer.add(Figure::new("memory, TPM service", "MiB", &[mib(service.resident)].into_iter().collect()));
    printer.add(Figure::new("memory, TPM service, private dirty", "MiB", &[mib(service.dirty)].into_iter().collect()));
    Ok(())
}

fn processes(
    kind: &str,
    measure: impl Fn() -> Result<Memory, BenchError>,
    printer: &mut Printer,
) -> Result<(), BenchError> {
    let measured: Vec<Memory> = (0..MEMORY_ROUNDS).map(|_| measure()).collect::<Result<_, _>>()?;
    let (resident, dirty): (Samples, Samples) = (
        measured.iter().map(|memory| mib(memory.resident)).collect(),
        measured.iter().map(|memory| mib(memory.dirty)).collect(),
    );
    let name = format!("memory, {kind} VM process less guest");
    printer.add(Figure::new(&name, "MiB", &resident).limit(RESIDENT_MIB));
    printer.add(Figure::new(format!("{name}, private dirty"), "MiB", &dirty).limit(DIRTY_MIB));
    Ok(())
}

/// Memory of a VM process once its guest has nothing more to do.
fn settled(command: &mut Command) -> Result<Memory, BenchError> {
    let speaking = first_byte::start(command)?;
    std::thread::sleep(SETTLED);
    let measured = memory::without_guest(speaking.pid());
    // A process that ended says more than its empty memory does.
    speaking.stop()?;
    measured
}

fn mib(kib: u64) -> f64 {
    kib as f64 / 1024.0
}
