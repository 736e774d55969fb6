//! Plays firmware and kernel on a bare software TPM: for demonstrations and tests on machines without a TPM. Never on a real one.
#![allow(unsafe_code)]

use attest::tcti::Tcti;
use clap::Parser;
use fealty_tests::firmware::{Boot, FirmwareError};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// Plays firmware on a bare software TPM: starts it, extends PCRs 0 to 7 and 10, and writes the logs that belong to that.
#[derive(Debug, Parser)]
struct Cli {
    /// The software TPM: swtpm:host=HOST,port=PORT.
    #[arg(long)]
    tcti: Tcti,
    /// Where to write the firmware's TCG event log.
    #[arg(long, value_name = "OUT")]
    firmware_log: PathBuf,
    /// Where to write IMA's log.
    #[arg(long, value_name = "OUT")]
    ima_log: PathBuf,
    /// What firmware measures: "default", or a JSON file with a list of {pcr, kind, data, digest}.
    #[arg(long, value_name = "default|FILE", default_value = "default")]
    seed_events: PathBuf,
}

fn main() -> ExitCode {
    // SAFETY: this is the program's first statement; no other thread exists yet.
    unsafe { attest_tpm::silence_library() };
    match run(&Cli::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("play-firmware: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(cli: &Cli) -> Result<(), FirmwareError> {
    let boot = match cli.seed_events.to_str() {
        Some("default") => Boot::default(),
        _ => Boot::from_file(&cli.seed_events)?,
    };
    let logs = boot.play(&cli.tcti)?;
    write(&cli.firmware_log, &logs.firmware)?;
    write(&cli.ima_log, &logs.ima)?;
    println!("firmware played: {} events, PCRs 0 to 7 and 10 extended", boot.firmware.len());
    Ok(())
}

fn write(path: &Path, bytes: &[u8]) -> Result<(), FirmwareError> {
    std::fs::write(path, bytes).map_err(|e| FirmwareError::File(path.display().to_string(), e.to_string()))
}
