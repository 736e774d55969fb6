//! The command line of `fealty-host`.

use crate::measure::{self, LayerArg, MeasureError, Measured};
use crate::runtime::{IdentityFile, RuntimeDir, RuntimeError};
use crate::service::{self, LogPaths, Options, ServiceError};
use attest::service::ControlClient;
use attest::service::start::{LOCK_TAKEN, StartError};
use attest::tcti::Tcti;
use attest_tpm::{EkChoice, EkKind};
use clap::{Args, Parser, Subcommand};
use std::ffi::OsString;
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::process::ExitCode;

/// The measured host's own programs: the TPM service and the measuring of layers.
#[derive(Debug, Parser)]
#[command(name = "fealty-host", version, after_help = EXIT_CODES)]
pub struct Cli {
    #[command(subcommand)]
    command: Action,
}

const EXIT_CODES: &str = "\
Exit codes: 0 done; 1 refused or failed, with one line that says why; 2 wrong arguments; 3 another TPM service serves this TPM.";

#[derive(Debug, Subcommand)]
enum Action {
    /// Runs the TPM service of one TPM in the foreground, until SIGTERM.
    ///
    /// It alone opens the TPM and the logs, makes the host's keys, and answers VM processes and `measure`. It listens on
    /// control.sock in its runtime folder, for root and its own user.
    Tpm(TpmArgs),
    /// Measures layers of the host into PCR 14, in this order, and seals the layer log.
    ///
    /// Each layer once per boot. Later calls add further layers and a new seal, and make a new wrap key. Joins the running
    /// TPM service or starts one that ends when idle.
    Measure(MeasureArgs),
    /// Says what the running TPM service is and serves.
    Status(StatusArgs),
    /// Says who the host is, for a key provider's inventory. Joins the running TPM service or starts one.
    Identity(IdentityArgs),
}

#[derive(Debug, Args)]
struct TpmPlace {
    /// The TPM: device:/dev/tpmrm0, device:/dev/tpm0 or swtpm:host=HOST,port=PORT.
    #[arg(long, value_name = "TCTI")]
    tcti: Tcti,
    /// The service's folder [default: a folder for this TPM in $FEALTY_RUNTIME_DIR or /run/fealty].
    #[arg(long, value_name = "DIR")]
    runtime_dir: Option<PathBuf>,
}

#[derive(Debug, Args)]
struct LogPlaces {
    /// The firmware's TCG event log [default: where it was in this folder's last service, else Linux's own]. A service that
    /// runs already keeps its own.
    #[arg(long, value_name = "FILE")]
    firmware_log: Option<PathBuf>,
    /// IMA's binary log [default: likewise].
    #[arg(long, value_name = "FILE")]
    ima_log: Option<PathBuf>,
}

#[derive(Debug, Args)]
struct TpmArgs {
    #[command(flatten)]
    place: TpmPlace,
    #[command(flatten)]
    logs: LogPlaces,
    /// The endorsement key to be known by: rsa-2048, p-256 or p-384 [default: the first of p-384, p-256, rsa-2048 that has a
    /// certificate].
    #[arg(long, value_name = "KIND")]
    ek: Option<EkKind>,
    /// End once no VM process that was served lives and nobody is connected.
    #[arg(long)]
    exit_when_idle: bool,
    /// Write one byte to this inherited descriptor when ready, then leave the starter's session and standard error
    /// (messages go on in service.log in the runtime folder).
    #[arg(long, value_name = "N")]
    ready_fd: Option<i32>,
}

#[derive(Debug, Args)]
struct MeasureArgs {
    #[command(flatten)]
    place: TpmPlace,
    #[command(flatten)]
    logs: LogPlaces,
    /// Print one JSON object a line.
    #[arg(long)]
    json: bool,
    /// Layers: NAME=PATH or NAME=PATH@VERSION. None: seals what an earlier call that was ended left unsealed.
    #[arg(value_name = "NAME=PATH[@VERSION]")]
    layers: Vec<LayerArg>,
}

#[derive(Debug, Args)]
struct StatusArgs {
    #[command(flatten)]
    place: TpmPlace,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
struct IdentityArgs {
    #[command(flatten)]
    place: TpmPlace,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
    /// Write the endorsement key's certificate (DER) to this file.
    #[arg(long, value_name = "FILE")]
    certificate: Option<PathBuf>,
    /// Write the endorsement key's public area (TPMT_PUBLIC) to this file.
    #[arg(long, value_name = "FILE")]
    public: Option<PathBuf>,
}

/// Why the program ends with another code than 0.
#[derive(Debug, thiserror::Error)]
enum CliError {
    #[error(transparent)]
    Service(#[from] ServiceError),
    #[error(transparent)]
    Measure(#[from] MeasureError),
    #[error(transparent)]
    Start(#[from] StartError),
    #[error(transparent)]
    Client(#[from] attest::service::ServiceError),
    #[error(transparent)]
    Runtime(#[from] RuntimeError),
    #[error("no TPM service runs for this TPM: start one with fealty-host tpm, or measure")]
    NoService,
    #[error("this TPM's endorsement key has no certificate; enroll its public area (--public)")]
    NoCertificate,
    #[error("{0}: {1}")]
    File(PathBuf, #[source] io::Error),
    #[error("the TPM service that runs does not read {0}: end it (or the VMs that it serves), then measure again")]
    OtherLog(PathBuf),
    #[error("--ready-fd {0} is not an open descriptor")]
    ReadyFd(i32),
    #[error("the program's own path is not known: {0}")]
    Myself(#[source] io::Error),
    #[error("standard output: {0}")]
    Output(#[source] io::Error),
}

impl CliError {
    fn code(&self) -> u8 {
        match self {
            Self::Service(ServiceError::Runtime(RuntimeError::Taken(_))) => LOCK_TAKEN,
            _ => 1,
        }
    }
}

/// Does what the command line says.
pub fn run(cli: Cli) -> ExitCode {
    let started = matches!(&cli.command, Action::Tpm(args) if args.ready_fd.is_some());
    let outcome = match cli.command {
        Action::Tpm(args) => tpm(args),
        Action::Measure(args) => measure(&args),
        Action::Status(args) => status(&args),
        Action::Identity(args) => identity(&args),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // A starter joins the service that has the lock.
            let known = started && error.code() == LOCK_TAKEN;
            if !known {
                let _ = writeln!(io::stderr(), "fealty-host: {error}");
            }
            ExitCode::from(error.code())
        }
    }
}

fn tpm(args: TpmArgs) -> Result<(), CliError> {
    let ready = args.ready_fd.map(|fd| inherited(fd).ok_or(CliError::ReadyFd(fd))).transpose()?;
    let dir = RuntimeDir::of(args.place.runtime_dir.as_deref(), &args.place.tcti);
    let logs = LogPaths { firmware: absolute(args.logs.firmware_log)?, ima: absolute(args.logs.ima_log)? };
    let ek = args.ek.map_or(EkChoice::Certified, EkChoice::Kind);
    let options = Options { tcti: args.place.tcti, ek, dir, logs, exit_when_idle: args.exit_when_idle, ready };
    Ok(service::serve(options)?)
}

fn measure(args: &MeasureArgs) -> Result<(), CliError> {
    let mut client = join_with_logs(&args.place, &args.logs)?;
    let measured = measure::measure(&mut client, &args.layers)?;
    for layer in &measured {
        let line = if args.json { json(layer) } else { show(layer) };
        print(&line)?;
    }
    if !args.json {
        print(if measured.is_empty() { "layer log sealed" } else { "PCR 14 extended, layer log sealed" })?;
    }
    Ok(())
}

fn status(args: &StatusArgs) -> Result<(), CliError> {
    let dir = RuntimeDir::of(args.place.runtime_dir.as_deref(), &args.place.tcti);
    let mut client = ControlClient::connect(&dir.control_socket()).map_err(|_| CliError::NoService)?;
    let status = client.status()?;
    if args.json {
        return print(&json(&status));
    }
    print(&format!("host     {}", status.host))?;
    print(&format!("process  {}", status.pid))?;
    print(&format!("VMs      {}", status.vms))?;
    let sealed = if status.sealed { "sealed" } else { "not sealed: no VM gets keys" };
    print(&format!("layers   {} ({sealed})", status.layers.len()))?;
    status.layers.iter().try_for_each(|layer| print(&format!("         {layer}")))
}

fn identity(args: &IdentityArgs) -> Result<(), CliError> {
    let _client = join(&args.place, None)?;
    let dir = RuntimeDir::of(args.place.runtime_dir.as_deref(), &args.place.tcti);
    let identity = dir.identity()?.ok_or(CliError::NoService)?;
    if let Some(path) = &args.certificate {
        let certificate = identity.ek_certificate.as_ref().ok_or(CliError::NoCertificate)?;
        std::fs::write(path, &certificate.0).map_err(|e| CliError::File(path.clone(), e))?;
    }
    if let Some(path) = &args.public {
        std::fs::write(path, &identity.ek_public.0).map_err(|e| CliError::File(path.clone(), e))?;
    }
    if args.json {
        return print(&json(&identity));
    }
    show_identity(&identity)
}

fn show_identity(identity: &IdentityFile) -> Result<(), CliError> {
    print(&format!("host             {}", identity.host))?;
    print(&format!("endorsement key  {}", identity.ek_kind))?;
    let certificate = match &identity.ek_certificate {
        Some(certificate) => format!("{} bytes", certificate.len()),
        None => "none".to_owned(),
    };
    print(&format!("certificate      {certificate}"))
}

/// Joins the TPM's service; where none runs, starts one that ends when idle.
fn join(place: &TpmPlace, logs: Option<&LogPlaces>) -> Result<ControlClient, CliError> {
    let me = std::env::current_exe().map_err(CliError::Myself)?;
    let dir = RuntimeDir::of(place.runtime_dir.as_deref(), &place.tcti);
    let mut more = Vec::new();
    let named = logs.map_or([None, None], |l| {
        [Some("--firmware-log").zip(l.firmware_log.as_ref()), Some("--ima-log").zip(l.ima_log.as_ref())]
    });
    for (name, path) in named.into_iter().flatten() {
        more.extend([OsString::from(name), path.clone().into()]);
    }
    Ok(attest::service::spawn_or_join_with(&place.tcti, Some(dir.path()), &me, &more)?)
}

/// Joins a service that reads these logs. One that reads others and is about to end gets the time to do so.
fn join_with_logs(place: &TpmPlace, logs: &LogPlaces) -> Result<ControlClient, CliError> {
    let dir = RuntimeDir::of(place.runtime_dir.as_deref(), &place.tcti);
    let wanted = [absolute(logs.firmware_log.clone())?, absolute(logs.ima_log.clone())?];
    let end = std::time::Instant::now() + IDLE_END;
    loop {
        let client = join(place, Some(logs))?;
        let read = dir.state()?.map_or([None, None], |s| [s.firmware_log, s.ima_log]);
        let other = wanted.iter().zip(&read).find(|(wanted, read)| wanted.is_some() && wanted != read);
        let Some((wanted, _)) = other else { return Ok(client) };
        drop(client);
        // Not asked again while it lives: whoever connects keeps it from ending.
        while dir.control_socket().exists() {
            if std::time::Instant::now() > end {
                return Err(CliError::OtherLog(wanted.clone().unwrap_or_default()));
            }
            std::thread::sleep(std::time::Duration::from_millis(100));
        }
    }
}

/// How long a service that nobody uses may take to end.
const IDLE_END: std::time::Duration = std::time::Duration::from_secs(10);

/// An inherited descriptor, as an owned copy; standard ones are not for this.
fn inherited(fd: i32) -> Option<OwnedFd> {
    if fd < 3 {
        return None;
    }
    let file = std::fs::File::options().write(true).open(format!("/proc/self/fd/{fd}")).ok()?;
    Some(file.into())
}

fn absolute(path: Option<PathBuf>) -> Result<Option<PathBuf>, CliError> {
    path.map(|p| std::path::absolute(&p).map_err(|e| CliError::File(p, e))).transpose()
}

fn show(layer: &Measured) -> String {
    let Measured { layer, version, digest } = layer;
    let space = if version.is_empty() { "" } else { " " };
    format!("{digest}  {layer}{space}{version}")
}

fn json(value: &impl serde::Serialize) -> String {
    serde_json::to_string(value).unwrap_or_default()
}

fn print(line: &str) -> Result<(), CliError> {
    writeln!(io::stdout(), "{line}").map_err(CliError::Output)
}
