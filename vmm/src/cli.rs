//! The command line.

use crate::attach::Attachment;
use crate::commands;
use crate::commands::ctl::Action;
use crate::console::Target;
use crate::exit::{EXIT_CODES, Exit, Failure};
use crate::opener::Mapping;
use crate::run::{self, ProtectedRun, Settings};
use crate::steps::Steps;
use attest::tcti::Tcti;
use clap::error::ErrorKind;
use clap::{Args, Parser, Subcommand};
use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

/// A virtual machine monitor that owes its loyalty to the customer: no keys, no boot.
#[derive(Parser, Debug)]
#[command(name = "fealty", version, after_help = EXIT_CODES)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand, Debug)]
enum Command {
    /// Run a VM in the foreground: attest, get its keys, boot
    #[command(after_help = RUN_HELP)]
    Run(Run),
    /// Show this host's evidence, and what the VM's key provider thinks of it; starts nothing
    Attest(Attest),
    /// Operate a running VM through its control socket
    Ctl(Ctl),
}

const RUN_HELP: &str = "\
On a terminal, Ctrl-A x ends the VM, Ctrl-A c shows its status, Ctrl-A Ctrl-A types Ctrl-A.
SIGTERM or SIGINT presses the power button; a second one, or the grace time's end, stops the VM with its volumes flushed.
A store that hangs then is told of, and waited for until a minute after the lease's end; SIGKILL ends the VM with what was flushed before.
Steps and errors go to standard error, the guest's console alone to standard output.";

#[derive(Args, Debug)]
struct Run {
    /// The VM file; with --unprotected a plain JSON configuration
    file: PathBuf,
    /// Run a plain configuration, which has no keys and no provider
    #[arg(long, conflicts_with_all = ["tcti", "map", "attach", "console_socket", "vsock_socket", "provider_ca", "runtime_dir"])]
    unprotected: bool,
    #[command(flatten)]
    host: Host,
    /// Where a file that the VM names lies; default: beside the VM file
    #[arg(long, value_name = "NAME=PATH")]
    map: Vec<Mapping>,
    /// The TAP that a network of the VM is connected to; queues as many as the network has pairs
    #[arg(long, value_name = "NAME=TAP[,queues=N]")]
    attach: Vec<Attachment>,
    /// Where the socket of the VM's virtio console is to be
    #[arg(long, value_name = "PATH")]
    console_socket: Option<PathBuf>,
    /// Where the socket of the VM's vsock is to be
    #[arg(long, value_name = "PATH")]
    vsock_socket: Option<PathBuf>,
    /// Serve the control socket here
    #[arg(long, value_name = "PATH")]
    api_socket: Option<PathBuf>,
    /// The guest's serial line: stdio, null or file:PATH
    #[arg(long, value_name = "WHERE", default_value = "stdio")]
    console: Target,
    /// Seconds that the guest may take to power off after SIGTERM
    #[arg(long, value_name = "SECONDS", default_value_t = 30, value_parser = clap::value_parser!(u64).range(0..=86_400))]
    grace: u64,
    /// Steps and errors as JSON, one object a line
    #[arg(long)]
    json: bool,
}

#[derive(Args, Debug)]
struct Attest {
    /// The VM file
    file: PathBuf,
    #[command(flatten)]
    host: Host,
    /// Ask without getting keys (the only way there is)
    #[arg(long, required = true)]
    dry_run: bool,
    /// One JSON object
    #[arg(long)]
    json: bool,
}

#[derive(Args, Debug)]
struct Host {
    /// The host's TPM: device:/dev/tpmrm0 or swtpm:host=HOST,port=PORT
    #[arg(long, value_name = "TCTI", default_value = "device:/dev/tpmrm0")]
    tcti: Tcti,
    /// Where the TPM service lives; default $FEALTY_RUNTIME_DIR or /run/fealty
    #[arg(long, value_name = "DIR")]
    runtime_dir: Option<PathBuf>,
    /// The provider's CA certificate (PEM or DER), where its server omits it; must match the VM file's pin
    #[arg(long, value_name = "FILE")]
    provider_ca: Option<PathBuf>,
}

#[derive(Args, Debug)]
struct Ctl {
    /// The VM's control socket
    socket: PathBuf,
    #[command(subcommand)]
    action: Action,
    /// The answer as JSON
    #[arg(long, global = true)]
    json: bool,
}

/// Runs the program; its exit code.
pub fn main() -> std::process::ExitCode {
    std::panic::set_hook(Box::new(tell_panic));
    let exit = match Cli::try_parse() {
        Ok(cli) => std::panic::catch_unwind(|| perform(cli.command)).unwrap_or(Exit::Internal),
        Err(error) => usage(&error),
    };
    std::process::ExitCode::from(exit as u8)
}

/// One line, on a terminal that is as it was. A backtrace would open files, which the sandbox answers with death.
fn tell_panic(panic: &std::panic::PanicHookInfo<'_>) {
    crate::console::terminal::restore();
    let place = panic.location().map(ToString::to_string).unwrap_or_default();
    let payload = panic.payload();
    let text = payload.downcast_ref::<&str>().copied().or_else(|| payload.downcast_ref::<String>().map(String::as_str));
    let what = text.unwrap_or("no reason given");
    crate::steps::line(&crate::exit::one_line(&format!("fealty: fault of this program at {place}: {what}")));
}

fn usage(error: &clap::Error) -> Exit {
    if matches!(error.kind(), ErrorKind::DisplayHelp | ErrorKind::DisplayVersion) {
        let _ = error.print();
        return Exit::Done;
    }
    // clap's answer is several lines; the first says what is wrong.
    let text = error.to_string();
    let what = text.lines().next().unwrap_or_default().trim_start_matches("error: ");
    // A script that asked for JSON gets it, also where the rest of its words can't be read.
    Steps::new(wants_json(std::env::args_os()))
        .failure(&Failure::new(Exit::Usage, format!("{what} (see fealty --help)")));
    Exit::Usage
}

/// Whether a command line that can't be read asks for JSON all the same.
fn wants_json(words: impl IntoIterator<Item = OsString>) -> bool {
    words.into_iter().take_while(|word| word != "--").any(|word| word == "--json")
}

fn perform(command: Command) -> Exit {
    let (steps, result) = match command {
        Command::Run(words) => {
            let steps = Steps::new(words.json);
            (steps, perform_run(words, steps))
        }
        Command::Attest(words) => {
            let steps = Steps::new(words.json);
            (steps, commands::attest::run(&words.file, &words.host.into(), steps))
        }
        Command::Ctl(words) => (Steps::new(words.json), commands::ctl::run(&words.socket, &words.action, words.json)),
    };
    result.unwrap_or_else(|failure| {
        crate::console::terminal::restore();
        steps.failure(&failure);
        failure.exit
    })
}

fn perform_run(words: Run, steps: Steps) -> Result<Exit, Failure> {
    let settings = Settings {
        console: words.console,
        api_socket: words.api_socket,
        grace: Duration::from_secs(words.grace),
        steps,
    };
    if words.unprotected {
        return run::unprotected(&words.file, &settings);
    }
    let start = ProtectedRun {
        file: words.file,
        mappings: words.map,
        attachments: words.attach,
        console_socket: words.console_socket,
        vsock_socket: words.vsock_socket,
        host: words.host.into(),
    };
    run::protected(&start, &settings)
}

impl From<Host> for run::Host {
    fn from(words: Host) -> Self {
        Self { tcti: words.tcti, runtime_dir: words.runtime_dir, provider_ca: words.provider_ca }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn a_command_line_that_can_not_be_read_may_ask_for_json() {
        let wants = |words: &[&str]| wants_json(words.iter().map(OsString::from));
        assert!(wants(&["fealty", "run", "--json", "--nonsense"]));
        assert!(!wants(&["fealty", "run", "--nonsense"]));
        assert!(!wants(&["fealty", "run", "--", "--json"]));
    }

    #[test]
    fn an_unprotected_vm_takes_nothing_that_belongs_to_a_protected_one() {
        let parse = |words: &[&str]| Cli::try_parse_from([&["fealty"], words].concat());
        assert!(parse(&["run", "--unprotected", "plain.json"]).is_ok());
        assert!(parse(&["run", "--unprotected", "plain.json", "--tcti", "device:/dev/tpm0"]).is_err());
        assert!(parse(&["run", "--unprotected", "plain.json", "--map", "a=b"]).is_err());
        assert!(parse(&["run", "a.vm", "--map", "a=b", "--map", "c=d", "--grace", "0"]).is_ok());
        assert!(parse(&["run", "a.vm", "--map", "../a=b"]).is_err());
        assert!(parse(&["run", "--unprotected", "plain.json", "--attach", "net0=tap0"]).is_err());
        assert!(parse(&["run", "a.vm", "--attach", "net0=tap0,queues=2"]).is_ok());
        assert!(parse(&["attest", "a.vm"]).is_err());
    }
}
