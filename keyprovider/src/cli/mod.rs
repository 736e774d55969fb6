//! The tool: command line in, one line out.

mod args;
mod audit;
mod exec;
mod files;
mod help;
mod inventory;
mod output;
mod overtime;
mod people;
mod reference;
mod restore;
mod serve;
mod vm;
mod volume;

use crate::client::{AdminClient, AdminClientError, Profile};
use crate::server::problem::chain;
use args::{Cli, Command, Common};
use clap::Parser;
use output::Output;
use std::path::PathBuf;
use std::process::ExitCode;

/// What every failure of the tool is in the end.
#[derive(Debug, thiserror::Error)]
enum CliError {
    #[error(transparent)]
    Client(#[from] AdminClientError),
    #[error("no profile: give --profile FILE or set FEALTY_KEYS_PROFILE; `init` and `admin add` write them")]
    NoProfile,
    #[error("{0} can't be read")]
    Read(PathBuf, #[source] std::io::Error),
    #[error("{0} can't be written")]
    Write(PathBuf, #[source] std::io::Error),
    #[error("{0}")]
    Input(String),
    #[error("nothing was sealed; what you wrote is kept in {kept}: go on with --from {kept}, or remove it")]
    Kept {
        #[source]
        error: Box<CliError>,
        kept: PathBuf,
    },
    #[error("{0} can't be started")]
    Start(String, #[source] std::io::Error),
    #[error("the output can't be written")]
    Output(#[source] std::io::Error),
    #[error(transparent)]
    Provider(#[from] crate::provider::ProviderError),
    #[error(transparent)]
    Serve(#[from] crate::server::ServeError),
    #[error("{0}")]
    Refused(#[from] crate::server::problem::Refusal),
    #[error(transparent)]
    Store(#[from] crate::store::StoreError),
    #[error("no protected memory for keys")]
    Memory(#[from] secretmem::SecretError),
}

/// What a command does with a running provider.
struct Session {
    client: AdminClient,
    out: Output,
}

/// Runs the tool.
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    let out = Output { json: cli.common.json };
    // Keys pass through this process: no core dumps, nobody traces it.
    if let Err(error) = secretmem::harden_process() {
        eprintln!("fealty-keys: {}", chain(&error));
        return ExitCode::FAILURE;
    }
    match run(cli, out) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("fealty-keys: {}", chain(&error));
            ExitCode::FAILURE
        }
    }
}

fn run(cli: Cli, out: Output) -> Result<ExitCode, CliError> {
    let common = &cli.common;
    let session = || connect(common, out);
    match cli.command {
        Command::Init(init) => serve::init(&init, out)?,
        Command::Serve(serve) => serve::serve(&serve)?,
        Command::Customer(command) => people::customer(session()?, command)?,
        Command::Cloud(command) => inventory::cloud(session()?, command)?,
        Command::Reference(command) => reference::reference(session, command)?,
        Command::Policy(command) => people::policy(session()?, command)?,
        Command::Vm(command) => vm::vm(session, command, out)?,
        Command::Instance(command) => vm::instance(session()?, command)?,
        Command::Volume(args::VolumeCommand::Exec { customer, name, command }) => {
            return exec::exec(session()?, &customer, &name, &command);
        }
        Command::Volume(command) => volume::volume(session()?, command)?,
        Command::Audit(command) => audit::audit(session()?, command)?,
        Command::Dump(command) => audit::dump(session()?, command)?,
        Command::Admin(command) => people::admin(session()?, command)?,
        Command::Backup { out } => audit::backup(session()?, &out)?,
        Command::Restore { dir, from, revoke } => restore::restore(&dir, &from, &revoke, out)?,
    }
    Ok(ExitCode::SUCCESS)
}

fn connect(common: &Common, out: Output) -> Result<Session, CliError> {
    let from_environment = || std::env::var_os("FEALTY_KEYS_PROFILE").map(PathBuf::from);
    let path = common.profile.clone().or_else(from_environment).ok_or(CliError::NoProfile)?;
    let profile = Profile::read(&path)?;
    let client = AdminClient::new(&path, &profile, common.url.clone())?;
    Ok(Session { client, out })
}
