//! The command line: `help` has the texts that are longer than a line.

mod help;

use super::report;
use super::size::{Room, Size};
use clap::error::ErrorKind;
use clap::{Args, Parser, Subcommand, ValueEnum};
use policy::AnchorMode;
use std::path::PathBuf;
use std::process::ExitCode;

/// Makes, fills, empties, describes and verifies encrypted volumes.
///
/// A volume's key never stands on a command line. The customer's tool holds the volume's session with the key provider and
/// starts this one with an inherited descriptor:
///
///     fealty-keys volume exec CUSTOMER VOLUME -- fealty-disk COMMAND ...
///
/// It appends `--keys-fd N` itself, and keeps the volume's new anchor at the provider when the command has done its work.
#[derive(Parser, Debug)]
#[command(name = "fealty-disk", version, after_help = help::EXIT_CODES, after_long_help = help::EXAMPLES, verbatim_doc_comment)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Command,
    /// The inherited descriptor (a stream socket) that hands over key, open number and anchor; `fealty-keys volume exec`
    /// appends this
    #[arg(long, global = true, value_name = "N")]
    pub(crate) keys_fd: Option<i32>,
    /// Results on standard output and progress on standard error as JSON, one object a line
    #[arg(long, global = true)]
    pub(crate) json: bool,
}

#[derive(Subcommand, Debug)]
pub(crate) enum Command {
    /// Make an empty volume; it reads as zeroes
    #[command(after_help = help::CREATE)]
    Create(Create),
    /// Make a volume from an image; its all-zero blocks take no room
    #[command(after_help = help::IMPORT)]
    Import(Import),
    /// Make another volume with the same data, all of it sealed anew under keys of its own
    #[command(after_help = help::CLONE)]
    Clone(Clone),
    /// Decrypt a volume into an image, sparse where the volume is zero
    #[command(after_help = help::EXPORT)]
    Export(Export),
    /// Say what a volume is; without keys, what its superblock claims
    #[command(after_help = help::INFO)]
    Info(Info),
    /// Read and verify all of a volume, and name every bad block
    #[command(after_help = help::CHECK)]
    Check(Check),
    /// Snapshots of a volume: take, list, go back to, delete
    #[command(after_help = help::SNAPSHOT)]
    Snapshot(Snapshot),
    /// Make a volume larger or smaller (what is new reads as zeroes), or give its snapshots more room
    #[command(after_help = help::RESIZE)]
    Resize(Resize),
    /// Seal everything anew under a new key, and forget older ones
    #[command(after_help = help::REKEY)]
    Rekey(Rekey),
    /// Wrap a volume's keys anew under a new key-encryption key; no data is written
    #[command(after_help = help::REWRAP)]
    Rewrap(Rewrap),
    /// Destroy a volume's key slots: nobody can ever read it again
    #[command(after_help = help::ERASE)]
    Erase(Erase),
    /// Measure what a volume does on this machine; needs no keys
    #[command(after_help = help::BENCH)]
    Bench(Bench),
    /// Lend a volume to other programs as a disk, until SIGTERM
    #[command(after_help = help::SERVE)]
    Serve(Serve),
}

#[derive(Args, Debug)]
pub(crate) struct Create {
    /// The file to make, or a block device (with --force)
    pub(crate) volume: PathBuf,
    /// Bytes that the guest sees: a number, or one with K, M, G or T (powers of 1024); a multiple of 512
    #[arg(long, value_name = "N[K|M|G|T]")]
    pub(crate) size: Size,
    #[command(flatten)]
    pub(crate) more: More,
    /// Replace what stands there
    #[arg(long)]
    pub(crate) force: bool,
}

/// Room beyond the volume's size.
#[derive(Args, Debug)]
pub(crate) struct More {
    /// Room beyond the volume's size, for what its snapshots hold that it does not any more: as a size, or in percent of the volume's;
    /// without this hardly any. A file takes it up only when it is used; on a block device the volume has all of the device anyway
    #[arg(long, value_name = "N[K|M|G|T]|N%")]
    pub(crate) room: Option<Room>,
}

#[derive(Args, Debug)]
pub(crate) struct Import {
    /// The image: a file, a block device, or - for standard input (with --size)
    pub(crate) image: PathBuf,
    /// The file to make, or a block device (with --force)
    pub(crate) volume: PathBuf,
    /// The volume's size, if it is not the image's: a larger volume is zero behind the image. Standard input must give exactly
    /// as much
    #[arg(long, value_name = "N[K|M|G|T]")]
    pub(crate) size: Option<Size>,
    /// What the image is; qcow2 needs qemu-img
    #[arg(long, value_enum, default_value_t)]
    pub(crate) format: Format,
    #[command(flatten)]
    pub(crate) more: More,
    /// Replace what stands there
    #[arg(long)]
    pub(crate) force: bool,
}

/// Formats of images.
#[derive(ValueEnum, Clone, Copy, PartialEq, Eq, Default, Debug)]
pub(crate) enum Format {
    /// The guest's bytes, one after the other
    #[default]
    Raw,
    /// QEMU's format, one file, without a backing file
    Qcow2,
}

#[derive(Args, Debug)]
pub(crate) struct Clone {
    /// The volume
    pub(crate) volume: PathBuf,
    /// The file to make, or a block device (with --force)
    pub(crate) clone: PathBuf,
    /// What the key provider is to call the clone: a new name, or one of a volume that was never filled
    #[arg(long)]
    pub(crate) name: String,
    /// Clone this snapshot instead of the volume
    #[arg(long, value_name = "N")]
    pub(crate) snapshot: Option<u64>,
    #[command(flatten)]
    pub(crate) more: More,
    /// Replace what stands there
    #[arg(long)]
    pub(crate) force: bool,
}

#[derive(Args, Debug)]
pub(crate) struct Export {
    /// The volume
    pub(crate) volume: PathBuf,
    /// The image to make: a file, a block device (with --force), or - for standard output; a file if it is qcow2
    pub(crate) image: PathBuf,
    /// Export this snapshot instead of the volume
    #[arg(long, value_name = "N")]
    pub(crate) snapshot: Option<u64>,
    /// Go on past blocks that can't be read: they are zeroes in the image, and each range of them is named; the code is 3 then
    #[arg(long)]
    pub(crate) salvage: bool,
    /// What the image is to be; qcow2 needs qemu-img
    #[arg(long, value_enum, default_value_t)]
    pub(crate) format: Format,
    /// Replace what stands there
    #[arg(long)]
    pub(crate) force: bool,
}

#[derive(Args, Debug)]
pub(crate) struct Info {
    /// The volume
    pub(crate) volume: PathBuf,
}

#[derive(Args, Debug)]
pub(crate) struct Check {
    /// The volume
    pub(crate) volume: PathBuf,
}

#[derive(Args, Debug)]
pub(crate) struct Snapshot {
    #[command(subcommand)]
    pub(crate) command: SnapshotCommand,
}

#[derive(Subcommand, Debug)]
pub(crate) enum SnapshotCommand {
    /// Take a snapshot; it costs nothing until the volume changes
    Take(TakeSnapshot),
    /// Show a volume's snapshots, oldest first; times are Unix seconds
    List(ListSnapshots),
    /// Make the volume hold again what its newest snapshot holds; what was written since is gone
    Revert(OneSnapshot),
    /// Delete a snapshot and free what only it holds
    Delete(OneSnapshot),
}

#[derive(Args, Debug)]
pub(crate) struct TakeSnapshot {
    /// The volume
    pub(crate) volume: PathBuf,
    /// What to call it: 1 to 64 bytes
    #[arg(long)]
    pub(crate) name: String,
}

#[derive(Args, Debug)]
pub(crate) struct ListSnapshots {
    /// The volume
    pub(crate) volume: PathBuf,
}

#[derive(Args, Debug)]
pub(crate) struct OneSnapshot {
    /// The volume
    pub(crate) volume: PathBuf,
    /// The snapshot's number
    pub(crate) snapshot: u64,
}

#[derive(Args, Debug)]
pub(crate) struct Resize {
    /// The volume
    pub(crate) volume: PathBuf,
    /// Its new size: a number, or one with K, M, G or T (powers of 1024); a multiple of 512
    #[arg(long, value_name = "N[K|M|G|T]", required_unless_present = "room")]
    pub(crate) size: Option<Size>,
    /// Room beyond that size, for what snapshots hold that the volume does not any more: as a size, or in percent of the volume's. It does
    /// not become less
    #[arg(long, value_name = "N[K|M|G|T]|N%")]
    pub(crate) room: Option<Room>,
    /// Where data lies behind a smaller size, lose it
    #[arg(long)]
    pub(crate) discard_tail: bool,
    /// Ask the server that has the volume open to make it larger, at its --control socket; needs no keys
    #[arg(long, value_name = "SOCKET", conflicts_with_all = ["discard_tail", "room", "keys_fd"])]
    pub(crate) served: Option<PathBuf>,
}

#[derive(Args, Debug)]
pub(crate) struct Rekey {
    /// The volume
    pub(crate) volume: PathBuf,
}

#[derive(Args, Debug)]
pub(crate) struct Rewrap {
    /// The volume
    pub(crate) volume: PathBuf,
}

#[derive(Args, Debug)]
pub(crate) struct Erase {
    /// The volume
    pub(crate) volume: PathBuf,
    /// It is meant
    #[arg(long)]
    pub(crate) force: bool,
}

#[derive(Args, Debug)]
pub(crate) struct Bench {
    /// Where to measure: a folder, or a block device, whose content is lost (with --force)
    pub(crate) place: PathBuf,
    /// Bytes that are written and read: a number, or one with K, M, G or T (powers of 1024); a multiple of 1M. Three times as much
    /// room is needed
    #[arg(long, value_name = "N[K|M|G|T]", default_value = "256M")]
    pub(crate) size: Size,
    /// How often each thing is measured
    #[arg(long, value_name = "N", default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    pub(crate) rounds: u32,
    /// Past the page cache (O_DIRECT), as `serve --direct`: what the device does, rather than the host's memory
    #[arg(long)]
    pub(crate) direct: bool,
    /// Overwrite the block device
    #[arg(long)]
    pub(crate) force: bool,
}

#[derive(Args, Debug)]
pub(crate) struct Serve {
    /// The volume
    pub(crate) volume: PathBuf,
    #[command(flatten)]
    pub(crate) way: Way,
    /// Take no writes; others may read the volume too
    #[arg(long)]
    pub(crate) read_only: bool,
    /// Seal everything anew under a new key meanwhile, as `rekey` does, in the background
    #[arg(long, conflicts_with = "read_only")]
    pub(crate) rekey: bool,
    /// Read and write the volume past the page cache (O_DIRECT): saves the host's memory, and costs whatever it would have held
    #[arg(long)]
    pub(crate) direct: bool,
    /// Listen on this unix socket for `resize --served`
    #[arg(long, value_name = "SOCKET", conflicts_with = "read_only")]
    pub(crate) control: Option<PathBuf>,
    /// How fresh the volume's anchor is kept at the key provider while the volume is in use
    #[arg(long, value_enum, default_value_t, conflicts_with = "read_only")]
    pub(crate) anchor_mode: Freshness,
    /// With --vhost-user: virtio queues, each with a thread; as many as the guest has processors serve it best
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = clap::value_parser!(u16).range(1..=16))]
    pub(crate) queues: u16,
}

/// `policy::AnchorMode`, as words of the command line.
#[derive(ValueEnum, Clone, Copy, PartialEq, Eq, Default, Debug)]
pub(crate) enum Freshness {
    /// At the beginning and at the end alone
    Close,
    /// Each second too in which something was flushed; FLUSH waits when the provider has not answered for 30 s
    #[default]
    Interval,
    /// Each FLUSH waits until the provider has its anchor
    Flush,
}

impl From<Freshness> for AnchorMode {
    fn from(freshness: Freshness) -> Self {
        match freshness {
            Freshness::Close => Self::Close,
            Freshness::Interval => Self::Interval,
            Freshness::Flush => Self::Flush,
        }
    }
}

/// How a volume is lent: one of them.
#[derive(Args, Debug)]
#[group(required = true, multiple = false)]
pub(crate) struct Way {
    /// Serve NBD on this unix socket: for qemu-img, qemu-io, fio, nbd-client
    #[arg(long, value_name = "SOCKET")]
    pub(crate) nbd: Option<PathBuf>,
    /// Be the vhost-user-blk back end of another virtual machine monitor on this unix socket
    #[arg(long, value_name = "SOCKET")]
    pub(crate) vhost_user: Option<PathBuf>,
}

/// The command line, or the exit code if there is nothing to do: help was asked for, or it makes no sense.
pub(crate) fn parse() -> Result<Cli, ExitCode> {
    Cli::try_parse().map_err(|error| match error.kind() {
        ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => {
            let _ = error.print();
            ExitCode::SUCCESS
        }
        ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand => {
            end(
                "a command is missing: create, import, clone, export, info, check, snapshot, resize, rekey, rewrap, erase, bench or \
                 serve (see \
                 fealty-disk --help)",
            )
        }
        _ => end(&format!("{} (see fealty-disk --help)", first_sentence(&error))),
    })
}

/// Says what is wrong with the command line, as its `--json` asks, wherever that stands.
fn end(why: &str) -> ExitCode {
    report::speak(std::env::args_os().any(|word| word == "--json"));
    report::end(2, why);
    ExitCode::from(2)
}

/// clap's answer is several lines: what is wrong, perhaps a list of what is missing, then usage.
fn first_sentence(error: &clap::Error) -> String {
    let text = error.to_string();
    let mut lines = text.lines().map(str::trim).take_while(|line| !line.is_empty());
    let what = lines.next().unwrap_or_default().trim_start_matches("error: ").trim_end_matches(':').to_owned();
    let missing: Vec<_> = lines.collect();
    if missing.is_empty() { what } else { format!("{what}: {}", missing.join(", ")) }
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
    fn the_descriptor_may_stand_last() {
        let words = ["fealty-disk", "import", "-", "b", "--size", "1M", "--keys-fd", "7"];
        let cli = Cli::try_parse_from(words).expect("good");
        assert_eq!(cli.keys_fd, Some(7));
        assert!(matches!(cli.command, Command::Import(words) if words.size.expect("given").bytes() == 1 << 20));
    }

    #[test]
    fn what_is_missing_is_named_in_one_line() {
        let error = Cli::try_parse_from(["fealty-disk", "create", "v"]).expect_err("no size");
        let line = first_sentence(&error);
        assert!(line.contains("--size") && !line.contains('\n'), "{line}");
    }
}
