//! Benchmarks: what is compared is measured in turn in the same run, and every figure is printed in the same form.

mod attest;
mod baseline;
mod disk;
mod first_byte;
mod floor;
mod machine;
mod memory;
mod printer;
mod queue;
mod served;
mod start;

use clap::{Parser, Subcommand};
use fealty_disk::bench::MeasureError;
use std::io;
use std::path::PathBuf;

/// `bench`'s command line.
#[derive(Debug, Parser)]
#[command(name = "bench", about = "Measures fealty on this machine, against what it has to compare with")]
pub struct Arguments {
    #[command(subcommand)]
    what: What,
    /// One JSON object a line instead of a table.
    #[arg(long, global = true)]
    json: bool,
    /// How often each thing is measured.
    #[arg(long, global = true, default_value_t = 30, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    rounds: u32,
}

#[derive(Debug, Subcommand)]
enum What {
    /// From process start to the guest's first byte; memory of the processes.
    Start {
        /// Leave out what needs a TPM and a key provider.
        #[arg(long)]
        unattested_only: bool,
    },
    /// The parts of an attestation.
    Attest,
    /// A disk's requests a second on a plain file, and CPU for each.
    Queue,
    /// A volume in process: throughput, opening, recovery, metadata.
    Disk(disk::Places),
    /// The volume over NBD, against other servers with ciphers and without.
    Served(served::Places),
    /// A plain file over NBD: what `served` compares with.
    #[command(hide = true)]
    ServePlain {
        /// The file.
        file: PathBuf,
        /// Where to listen.
        socket: PathBuf,
    },
}

/// Why there is no figure.
#[derive(Debug, thiserror::Error)]
pub enum BenchError {
    /// A program could not be started, or not be talked to.
    #[error("{0}: {1}")]
    Io(PathBuf, #[source] io::Error),
    /// A program ended before the guest said anything.
    #[error("{0} ended ({1}) before the guest printed anything: {2}")]
    Silent(String, String, String),
    /// A program did not end well.
    #[error("{0} failed ({1}): {2}")]
    Failed(String, String, String),
    /// A process file does not hold what it should.
    #[error("{0} does not hold the memory of a process with a guest")]
    Memory(PathBuf),
    /// The TPM that is measured alone fails.
    #[error("the TPM for comparison fails: {0}")]
    Tpm(String),
    /// The key provider does not answer the plain request.
    #[error("a plain TLS request to the key provider fails: {0}")]
    Tls(String),
    /// The guest did not say a line that it should.
    #[error("the guest never said '{0}'")]
    Quiet(String),
    /// `fealty run --json` told nothing that could be measured.
    #[error("fealty reported no timed steps")]
    NoSteps,
    /// What a volume does can't be measured.
    #[error(transparent)]
    Measure(#[from] MeasureError),
}

impl BenchError {
    /// What a volume failed to do.
    fn volume(what: &'static str) -> impl Fn(blockcrypt::VolumeError) -> Self {
        move |error| MeasureError::Volume(what, error).into()
    }
}

/// Measures and prints.
///
/// # Errors
/// The first thing that could not be measured.
pub fn run(arguments: &Arguments) -> Result<(), BenchError> {
    if let What::ServePlain { file, socket } = &arguments.what {
        return served::serve_plain(file, socket);
    }
    let mut printer = printer::Printer::new(arguments.json);
    printer.machine(&machine::describe());
    let measured = match &arguments.what {
        What::Start { unattested_only } => start::run(arguments.rounds, !*unattested_only, &mut printer),
        What::Attest => attest::run(arguments.rounds, &mut printer),
        What::Queue => queue::run(arguments.rounds, &mut printer),
        What::Disk(places) => disk::run(arguments.rounds, places, &mut printer),
        What::Served(places) => served::run(arguments.rounds, &places.tmpfs, &mut printer),
        What::ServePlain { .. } => Ok(()),
    };
    printer.finish();
    measured
}
