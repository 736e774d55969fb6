//! The command line.

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
#[command(name = "fealty-disk", version, after_help = EXIT_CODES, after_long_help = EXAMPLES, verbatim_doc_comment)]
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
    #[command(after_help = CREATE_HELP)]
    Create(Create),
    /// Make a volume from an image; its all-zero blocks take no room
    #[command(after_help = IMPORT_HELP)]
    Import(Import),
    /// Make another volume with the same data, all of it sealed anew under keys of its own
    #[command(after_help = CLONE_HELP)]
    Clone(Clone),
    /// Decrypt a volume into an image, sparse where the volume is zero
    #[command(after_help = EXPORT_HELP)]
    Export(Export),
    /// Say what a volume is; without keys, what its superblock claims
    #[command(after_help = INFO_HELP)]
    Info(Info),
    /// Read and verify all of a volume, and name every bad block
    #[command(after_help = CHECK_HELP)]
    Check(Check),
    /// Snapshots of a volume: take, list, go back to, delete
    #[command(after_help = SNAPSHOT_HELP)]
    Snapshot(Snapshot),
    /// Make a volume larger or smaller (what is new reads as zeroes), or give its snapshots more room
    #[command(after_help = RESIZE_HELP)]
    Resize(Resize),
    /// Seal everything anew under a new key, and forget older ones
    #[command(after_help = REKEY_HELP)]
    Rekey(Rekey),
    /// Wrap a volume's keys anew under a new key-encryption key; no data is written
    #[command(after_help = REWRAP_HELP)]
    Rewrap(Rewrap),
    /// Destroy a volume's key slots: nobody can ever read it again
    #[command(after_help = ERASE_HELP)]
    Erase(Erase),
    /// Measure what a volume does on this machine; needs no keys
    #[command(after_help = BENCH_HELP)]
    Bench(Bench),
    /// Lend a volume to other programs as a disk, until SIGTERM
    #[command(after_help = SERVE_HELP)]
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

const EXIT_CODES: &str = "\
Exit codes: 0 done; 1 failed (the store, the image, no room); 2 wrong arguments; 3 the volume is damaged, was tampered with or is
older than its anchor; 4 refused, by the key holder or for want of the right key; 129, 130, 143 ended by SIGHUP, SIGINT, SIGTERM.
After any other code than 0 no volume and no image was made or replaced, unless the line says otherwise.";

const EXAMPLES: &str = "\
Examples:
  An empty volume of 20 GiB, for the volume `data` that customer `acme` has registered at the provider:
    fealty-keys volume exec acme data -- fealty-disk create /store/data.vol --size 20G

  A volume from an image, straight out of a pipe:
    zstdcat root.img.zst | fealty-keys volume exec acme root -- fealty-disk import - /store/root.vol --size 8G

  What it holds, decrypted, into another tool:
    fealty-keys volume exec acme root -- fealty-disk export /store/root.vol - | sha256sum

  Is it whole? (Code 3 if not, with a line for each bad range of blocks.)
    fealty-keys volume exec acme root -- fealty-disk check /store/root.vol

  As a disk for programs that speak NBD:
    fealty-keys volume exec acme root -- fealty-disk serve /store/root.vol --nbd /run/root.sock
    fio --ioengine=nbd --uri='nbd+unix:///?socket=/run/root.sock' --name=read --rw=randread --runtime=10 --time_based

  What the operator, who has no key, can see of it:
    fealty-disk info /store/root.vol

Exit codes:
  0    done
  1    failed: the store, the image, no room
  2    wrong arguments
  3    the volume is damaged, was tampered with, or is older than its anchor at the provider
  4    refused: by the key holder, or for want of the right key or a fresh open number
  129, 130, 143  ended by SIGHUP, SIGINT, SIGTERM

After any other code than 0 no volume and no image was made or replaced, unless the line on standard error says otherwise.";

const CREATE_HELP: &str = "\
The volume appears under its name when it is complete, and is usable once the provider keeps its first anchor, which is the last
thing this does.

Examples: fealty-keys volume exec acme data -- fealty-disk create /store/data.vol --size 20G
          fealty-keys volume exec acme data -- fealty-disk create /store/data.vol --size 20G --room 25%";

const IMPORT_HELP: &str = "\
The volume appears under its name when it is complete, and is usable once the provider keeps its first anchor, which is the last
thing this does. Until then it is written to .NAME.partial beside it.

qcow2 is read by qemu-img, which writes to the volume over a socket that nobody else has: plain text lies in no file on the way.

Examples: fealty-keys volume exec acme root -- fealty-disk import root.img /store/root.vol
          fealty-keys volume exec acme root -- fealty-disk import --format qcow2 root.qcow2 /store/root.vol";

const EXPORT_HELP: &str = "\
The image is the guest's data in plain text, readable by you alone (mode 0600). It appears under its name when it is complete. A bad
block ends the export: with --salvage it does not, and what can be read of a damaged volume is saved.

Examples: fealty-keys volume exec acme root -- fealty-disk export /store/root.vol root.img
          fealty-keys volume exec acme root -- fealty-disk export --salvage /store/root.vol root.img";

const INFO_HELP: &str = "\
Without keys this shows what whoever could write the file wrote there. With keys the volume is opened, and everything shown has been
authenticated.

Examples: fealty-disk info /store/root.vol
          fealty-keys volume exec acme root -- fealty-disk info /store/root.vol";

const CHECK_HELP: &str = "\
One line for each range of bad blocks (4096 bytes each, as the guest counts them), then a summary. Nothing is changed; each finding
also goes to the customer's audit log.

Example: fealty-keys volume exec acme root -- fealty-disk check /store/root.vol";

const SNAPSHOT_HELP: &str = "\
What is written over takes up room beyond the volume's size as long as a snapshot holds it: `info` shows how much is left, `resize --room` gives
more. The volume goes back to its newest snapshot only, which the policy must permit (volume.revert). `export --snapshot` and
`clone --snapshot` read one.

Examples: fealty-keys volume exec acme data -- fealty-disk snapshot take /store/data.vol --name before-upgrade
          fealty-keys volume exec acme data -- fealty-disk snapshot list /store/data.vol
          fealty-keys volume exec acme data -- fealty-disk snapshot revert /store/data.vol 1
          fealty-keys volume exec acme data -- fealty-disk snapshot delete /store/data.vol 1";

const RESIZE_HELP: &str = "\
The volume must not be in use meanwhile, but by `serve --control`, which can make it larger (--served): NBD clients that connect from then
on see the new size, those that are connected keep the old one until they connect again; with vhost-user the next front end sees it, when
the VM is powered on again. A volume of a running fealty VM is made larger by `fealty ctl resize-disk`. Snapshots keep their size and what they hold. The key provider learns the new size.

Make what is in the volume (partitions, file systems) smaller first. Data behind the new end, which a file system leaves there unless it
discarded it (fstrim, blkdiscard), keeps the volume from becoming smaller: it needs --discard-tail, as qemu-img's resize needs
--shrink. What is lost so is gone for good, unless a snapshot has it. A volume is not reverted to a snapshot that is larger.

Snapshots hold what the volume did, so that what is written over it takes up room beyond the volume's size. When that is used up, writes
fail, and at last discards, and nothing that was acknowledged is lost: delete a snapshot, for which there is always room, or give the
volume more with --room. A block device that became longer is used to its end with either option, also with the size that the volume has.

What the volume does not need any more becomes holes of its file (on a block device it is discarded); the file itself stays as long as it
was, for data may lie anywhere in it. `clone` makes one that is as short as it can be.

Examples: fealty-keys volume exec acme data -- fealty-disk resize /store/data.vol --size 40G
          fealty-keys volume exec acme data -- fealty-disk resize /store/data.vol --size 10G --discard-tail
          fealty-keys volume exec acme data -- fealty-disk resize /store/data.vol --room 50%
          fealty-disk resize /store/data.vol --size 40G --served /run/data.control";

const CLONE_HELP: &str = "\
The clone has a name and an id at the key provider, and keys, all of its own: every block is read, verified and written anew under them,
which takes as long as reading and writing all data. Neither opens with a key of the other; each can be rekeyed, erased or retired
alone. Snapshots are not copied. The policy must permit volume.clone.

Cut off, it leaves .NAME.partial, which the next run replaces.

Example: fealty-keys volume exec acme root -- fealty-disk clone /store/root.vol /store/copy.vol --name copy";

const REKEY_HELP: &str = "\
For when a key may be known, or has sealed enough: the key provider issues a new key, and every block is read and written under it, which
takes as long as reading and writing all data. The policy must permit volume.rekey. Where this is interrupted, the next run goes
on under the same key, and says that it did: then run it once more for a key that is new. Older keys stay as long as snapshots need them,
or blocks that are damaged, which it passes over and counts.

One key seals 1 TiB at most, and the guest gets I/O errors after that; each opening after a crash counts for up to 2 GiB. From 896 GiB on the
audit log says so: rekey then (or `serve --rekey`). Where there is more data than that, the rekey ends when its key has sealed so much,
and the next run goes on under another: run it until it says that it is done.

Example: fealty-keys volume exec acme data -- fealty-disk rekey /store/data.vol";

const REWRAP_HELP: &str = "\
For when the key-encryption key may be known, the one that the key provider hands out: the volume's keys are wrapped under a new one,
at once, whatever the volume's size. The key provider destroys the one so far when the volume's new anchor says that it is not
needed any more: a backup of the key provider from before opens this volume no more, so take a new one (fealty-keys backup) when this
is done. Who read the volume's keys with it can read on: then `rekey` too. The policy must permit volume.rewrap.
Where this is interrupted, the volume opens as before, or with the new one; the next run goes on.

Example: fealty-keys volume exec acme data -- fealty-disk rewrap /store/data.vol";

const ERASE_HELP: &str = "\
With the key holder, the key provider first retires the volume's keys, so that no copy of the file can be read either (the policy must permit
volume.erase), then the key slots are destroyed. Without, only this file's slots are, which needs no key. Both need --force.

Examples: fealty-keys volume exec acme data -- fealty-disk erase /store/data.vol --force
          fealty-disk erase /store/data.vol --force";

const BENCH_HELP: &str = "\
First the ciphers alone, on buffers in the processor's caches, on each path that this processor has: the first is the one that volumes
take. Then a volume that is half full and a plain file, in turn: 1 MiB in order, 4 KiB at random with 1 and with 32 requests in flight
(handed over together as a queue's are, and by 32 threads), written and read, and written with a FLUSH after each 32. Each line has the median, the quartiles, and the ratio to what it is compared
with: by the wall's clock the plain file, by processor time (per core) the ciphers alone, the most that is to be had. The volume is used in
this process: a server adds its own time. Its anchors are kept in memory, so that mode `flush` costs an answer of the key provider's
more for each FLUSH.

In a folder everything lies in files without a name, which are gone when this ends, however it ends.

Examples: fealty-disk bench /store --direct
          fealty-disk bench /dev/vdb --size 4G --direct --force";

const SERVE_HELP: &str = "\
It says when it is ready, with a line on standard output. The socket is yours alone (mode 0600) and goes when the server goes. On
SIGTERM or SIGINT, or when the key holder leaves, requests that were sent are finished and the volume is closed: its anchor at the
provider is then the newest.

A server that is killed loses nothing that it acknowledged unless the machine crashes too: start it again on the same socket, and clients
that reconnect (QEMU: reconnect=1 of a vhost-user chardev, reconnect-delay of nbd; Cloud Hypervisor by itself, for a minute) go on, and
their next FLUSH covers all of it. It costs each write, or as many as come together, a write of 4 KiB to the volume's log before the answer; with --direct the device is waited for.

The anchor at the key provider tells the newest state from an older copy of the volume, which then does not open. --anchor-mode says how
old a copy, put back while the server does not run, may be to pass all the same: with `flush` it lacks nothing that a FLUSH acknowledged,
with `interval` (the default) at most what was flushed in the last second or, where the provider did not answer, in the last 30; with
`close` it may be from any moment since the server began, if it was killed.

Example: fealty-keys volume exec acme root -- fealty-disk serve /store/root.vol --nbd /run/root.sock
         qemu-img info 'nbd+unix:///?socket=/run/root.sock'

With --rekey the volume is also sealed under a new key, by a thread of the lowest priority, while it is in use. It says when that is done.
Stopped before, even by a power cut, the next `serve --rekey` or `rekey` goes on, and says that it did. The policy must permit volume.rekey.

Another virtual machine monitor must share the guest's memory with this process, which weakens what keeps root on its host out:
  qemu-system-x86_64 -object memory-backend-memfd,id=m,size=1G,share=on -machine q35,memory-backend=m \\
      -chardev socket,id=c,path=/run/root.sock,reconnect=1 -device vhost-user-blk-pci,chardev=c,num-queues=4 ...
  cloud-hypervisor --memory size=1G,shared=on --disk vhost_user=true,socket=/run/root.sock,num_queues=4 ...";

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
