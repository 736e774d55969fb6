//! The command line of `fealty-keys`.

use super::help::{EXEC_HELP, FIRST_STEPS, RETIRE_HELP};
use crate::store::inventory::CloudKind;
use crate::store::people::Role;
use clap::{Args, Parser, Subcommand};
use policy::header::ProviderUrl;
use policy::{CloudId, CustomerId, HostId, KeyId, VmId, VolumeAnchor};
use std::ffi::OsString;
use std::net::SocketAddr;
use std::path::PathBuf;

/// The customer's key provider and tool.
///
/// A virtual machine of fealty does not start without keys, and this program decides who gets them. `init` makes a
/// provider, `serve` runs it; everything else is an administrator's request to a running provider, made with the profile
/// that `init` or `admin add` wrote.
#[derive(Debug, Parser)]
#[command(name = "fealty-keys", version, after_help = FIRST_STEPS)]
pub(super) struct Cli {
    #[command(flatten)]
    pub(super) common: Common,
    #[command(subcommand)]
    pub(super) command: Command,
}

/// Options that every command takes.
#[derive(Debug, Args)]
pub(super) struct Common {
    /// The administrator's profile [env: FEALTY_KEYS_PROFILE].
    #[arg(long, global = true, value_name = "FILE")]
    pub(super) profile: Option<PathBuf>,
    /// The provider's URL, in place of the profile's: https://HOST:PORT.
    #[arg(long, global = true, value_name = "URL", value_parser = url)]
    pub(super) url: Option<ProviderUrl>,
    /// Print JSON, one document a line.
    #[arg(long, global = true)]
    pub(super) json: bool,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// Make a provider in a new folder: authorities, master key, database, the first administrator.
    Init(Init),
    /// Serve from a provider's folder; prints `ready https://HOST:PORT` once it answers.
    Serve(Serve),
    /// Customers.
    #[command(subcommand)]
    Customer(CustomerCommand),
    /// Clouds: inventories of hosts' TPMs.
    #[command(subcommand)]
    Cloud(CloudCommand),
    /// Reference values: which software a host may run.
    #[command(subcommand)]
    Reference(ReferenceCommand),
    /// Policies: what is allowed, signed by the customer.
    #[command(subcommand)]
    Policy(PolicyCommand),
    /// VMs and their sealed files.
    #[command(subcommand)]
    Vm(VmCommand),
    /// Running VMs.
    #[command(subcommand)]
    Instance(InstanceCommand),
    /// Encrypted volumes.
    #[command(subcommand)]
    Volume(VolumeCommand),
    /// The audit log.
    #[command(subcommand)]
    Audit(AuditCommand),
    /// Core dumps.
    #[command(subcommand)]
    Dump(DumpCommand),
    /// Administrators.
    #[command(subcommand)]
    Admin(AdminCommand),
    /// Fetch a consistent copy of the database. Keys in it are wrapped; the master key is not in it: keep a copy of
    /// master.key apart, for without it a backup opens nothing, and with it a backup opens everything.
    Backup {
        /// Where to write it.
        #[arg(long, value_name = "FILE")]
        out: PathBuf,
    },
    /// Bring a provider back from a backup, into a folder that holds its master.key, no database, and nothing that SQLite
    /// left of one (keys.db-wal, keys.db-shm, keys.db-journal).
    ///
    /// What a backup can't know is voided: nonces, leases, sessions. Every volume gets a new key for new writes and waits
    /// for `volume confirm`; instance numbers go on above the time of the restore; VMs wait for `vm confirm`, or for seven
    /// days: the longest lease that an instance which the backup never saw can have. What was taken away since the backup is
    /// back: nothing is released for a customer until `customer confirm`, and who should stay revoked is named here.
    Restore {
        /// The provider's folder.
        #[arg(long, value_name = "DIR")]
        dir: PathBuf,
        /// The backup.
        #[arg(long, value_name = "FILE")]
        from: PathBuf,
        /// An administrator who was revoked since the backup; may be given several times.
        #[arg(long, value_name = "NAME")]
        revoke: Vec<String>,
    },
}

/// Options of `init`.
#[derive(Debug, Args)]
pub(super) struct Init {
    /// The folder to make it in.
    #[arg(long, value_name = "DIR")]
    pub(super) dir: PathBuf,
    /// A DNS name or address under which hosts reach it; several with commas, or repeat it. The first is part of the audit
    /// logs' origin for good.
    #[arg(long = "name", value_name = "HOST", required = true, value_delimiter = ',')]
    pub(super) names: Vec<String>,
    /// The port that profiles and VM files name.
    #[arg(long, default_value_t = 8443)]
    pub(super) port: u16,
}

/// Options of `serve`.
#[derive(Debug, Args)]
pub(super) struct Serve {
    /// The provider's folder.
    #[arg(long, value_name = "DIR")]
    pub(super) dir: PathBuf,
    /// The address to listen on; port 0 takes a free one.
    #[arg(long, value_name = "ADDRESS:PORT", default_value = "127.0.0.1:8443")]
    pub(super) listen: SocketAddr,
    /// A descriptor that the ready line is written to as well.
    #[arg(long, value_name = "N")]
    pub(super) ready_fd: Option<i32>,
}

/// `customer …`
#[derive(Debug, Subcommand)]
pub(super) enum CustomerCommand {
    /// Create a customer.
    Create {
        /// Its name.
        id: CustomerId,
        /// Hosts with software TPMs may serve it: for laboratories, never for secrets.
        #[arg(long)]
        lab: bool,
        /// The key that signs its policies; made (Ed25519, mode 0600) where the file is missing. Only its public half leaves.
        #[arg(long, value_name = "FILE")]
        policy_key: PathBuf,
    },
    /// List customers.
    List,
    /// After a restore: confirm that this policy and these reference values are the last that were set, and that the
    /// administrators, hosts and VM files that came back (`audit list` shows them) should be there. Nothing is released before.
    Confirm {
        /// The customer.
        customer: CustomerId,
        /// Version of the policy; 0 for none.
        #[arg(long, value_name = "VERSION")]
        policy: u64,
        /// Version of the reference values; 0 for none.
        #[arg(long, value_name = "VERSION")]
        reference: u64,
    },
    /// Let a customer's VMs run on the hosts of a cloud.
    AllowCloud {
        /// The customer.
        customer: CustomerId,
        /// The cloud.
        cloud: CloudId,
    },
}

/// `cloud …`
#[derive(Debug, Subcommand)]
pub(super) enum CloudCommand {
    /// Create a cloud with an empty inventory.
    Create {
        /// Its name.
        id: CloudId,
        /// `maker` for TPMs whose makers vouch for them, `lab` for software TPMs.
        #[arg(long)]
        kind: CloudKind,
        /// Certificates of the TPM makers' authorities, PEM; without them only pinned keys can be enrolled.
        #[arg(long, value_name = "FILE")]
        roots: Option<PathBuf>,
    },
    /// Enter a host into a cloud's inventory.
    Enroll {
        /// The cloud.
        id: CloudId,
        /// The certificate of the TPM's endorsement key, DER or PEM.
        #[arg(long, value_name = "FILE", conflicts_with = "ek_public", required_unless_present = "ek_public")]
        certificate: Option<PathBuf>,
        /// The endorsement key itself, for a TPM without certificate: TPMT_PUBLIC, TPM2B_PUBLIC or a PEM public key.
        #[arg(long, value_name = "FILE")]
        ek_public: Option<PathBuf>,
        /// What the cloud calls the host. The name stays with this TPM.
        #[arg(long)]
        name: Option<String>,
    },
    /// Take a host out of a cloud's inventory: no VM starts on it, and no lease is renewed there, from now on. VMs that run there
    /// pause with their leases.
    Remove {
        /// The cloud.
        id: CloudId,
        /// The host, as `cloud hosts` names it.
        host: HostId,
    },
    /// List clouds.
    List,
    /// List the hosts of a cloud.
    Hosts {
        /// The cloud.
        id: CloudId,
    },
}

/// `reference …`
#[derive(Debug, Subcommand)]
pub(super) enum ReferenceCommand {
    /// Learn reference values from the logs of a host that you trust, and print them. Needs no provider.
    Learn {
        /// Its firmware's event log.
        #[arg(long, value_name = "FILE")]
        firmware_log: PathBuf,
        /// Its layer log.
        #[arg(long, value_name = "FILE")]
        layer_log: PathBuf,
        /// Its IMA log (binary, ima-ng); then every file it measured is a reference value, and IMA is required.
        #[arg(long, value_name = "FILE")]
        ima_log: Option<PathBuf>,
        /// PCRs of the firmware to cover; PCR 1 is left out because it varies with devices. PCR 14 is always covered.
        #[arg(long, value_delimiter = ',', default_value = "0,2,3,4,5,6,7,8,9,11,12,13")]
        pcrs: Vec<u8>,
    },
    /// Put reference values in force.
    Set {
        /// The customer.
        customer: CustomerId,
        /// The values, JSON.
        file: PathBuf,
    },
    /// Print the values in force.
    Show {
        /// The customer.
        customer: CustomerId,
    },
}

/// `policy …`
#[derive(Debug, Subcommand)]
pub(super) enum PolicyCommand {
    /// Sign a policy document and put it in force; its version must be above the one in force.
    Set {
        /// The customer.
        customer: CustomerId,
        /// The document: settings (JSON), a line `---`, Cedar rules.
        file: PathBuf,
        /// The customer's policy key.
        #[arg(long, value_name = "FILE")]
        policy_key: PathBuf,
    },
    /// Print the policy in force.
    Show {
        /// The customer.
        customer: CustomerId,
    },
}

/// `vm …`
#[derive(Debug, Subcommand)]
pub(super) enum VmCommand {
    /// Create a VM.
    Create {
        /// The customer.
        customer: CustomerId,
        /// Its name.
        vm: VmId,
    },
    /// Seal a configuration into a VM file, which is the current one from then on.
    Seal {
        /// The customer.
        customer: CustomerId,
        /// The VM.
        vm: VmId,
        /// The configuration, JSON. Digests of kernel and initramfs that it leaves out are computed from the files beside it.
        #[arg(long, value_name = "FILE")]
        config: PathBuf,
        /// Where to write the VM file.
        #[arg(long, value_name = "NAME.vm")]
        out: PathBuf,
        /// A provider's URL for the VM file, up to four; by default the one in use.
        #[arg(long, value_name = "URL", value_parser = url)]
        provider: Vec<ProviderUrl>,
    },
    /// Print the readable part of a VM file. Needs no provider.
    Header {
        /// The VM file.
        file: PathBuf,
    },
    /// Print a VM file, sealed part included; written to the audit log.
    Show {
        /// The VM file.
        file: PathBuf,
    },
    /// Edit a VM file's configuration with $EDITOR and seal it anew; written to the audit log.
    Edit {
        /// The VM file.
        file: PathBuf,
        /// Go on with the text that an edit which failed has kept.
        #[arg(long, value_name = "KEPT")]
        from: Option<PathBuf>,
    },
    /// Make an older VM file the current one again; written to the audit log.
    Back {
        /// The VM file.
        file: PathBuf,
    },
    /// List VMs, with their newest instances.
    List {
        /// The customer.
        customer: CustomerId,
    },
    /// After a restore: state that no instance of this VM from before it runs.
    Confirm {
        /// The customer.
        customer: CustomerId,
        /// The VM.
        vm: VmId,
    },
}

/// `instance …`
#[derive(Debug, Subcommand)]
pub(super) enum InstanceCommand {
    /// Give a VM's newest instance no more leases: it loses its keys at the end of the one it has.
    Revoke {
        /// The customer.
        customer: CustomerId,
        /// The VM.
        vm: VmId,
    },
}

/// `volume …`
#[derive(Debug, Subcommand)]
pub(super) enum VolumeCommand {
    /// Create a volume's id and key; `volume exec … fealty-disk create` or `import` then fills it.
    Create {
        /// The customer.
        customer: CustomerId,
        /// What to call it.
        name: String,
    },
    /// List volumes.
    List {
        /// The customer.
        customer: CustomerId,
    },
    /// Run a command that holds a volume: `--keys-fd N` is appended to it, over which it gets key, open number and anchor.
    #[command(after_help = EXEC_HELP)]
    Exec {
        /// The customer.
        customer: CustomerId,
        /// The volume.
        name: String,
        /// The command.
        #[arg(last = true, required = true)]
        command: Vec<OsString>,
    },
    /// Destroy a volume's keys: nobody can ever read it again, nor any copy of its file.
    #[command(after_help = RETIRE_HELP)]
    Retire {
        /// The customer.
        customer: CustomerId,
        /// The volume.
        name: String,
        /// It is meant.
        #[arg(long)]
        force: bool,
    },
    /// After a restore: confirm that the provider's anchor is the volume's newest (or that the volume was never filled, where
    /// there is none), or move it forward to what the volume itself shows (`fealty-disk info`).
    Confirm {
        /// The customer.
        customer: CustomerId,
        /// The volume.
        name: String,
        /// The anchor that the volume shows, where it is newer.
        #[arg(long, value_parser = anchor)]
        anchor: Option<VolumeAnchor>,
    },
}

/// `audit …`
#[derive(Debug, Subcommand)]
pub(super) enum AuditCommand {
    /// Print a customer's audit log, after checking its chain.
    List {
        /// The customer.
        customer: CustomerId,
        /// The first event to print.
        #[arg(long, default_value_t = 1)]
        from: u64,
    },
}

/// `dump …`
#[derive(Debug, Subcommand)]
pub(super) enum DumpCommand {
    /// Open a sealed core dump; written to the audit log.
    Open {
        /// The customer.
        customer: CustomerId,
        /// The sealed dump.
        #[arg(long = "in", value_name = "FILE")]
        input: PathBuf,
        /// The id of its key, where the outcome of the dump was never reported.
        #[arg(long, value_parser = key)]
        key: Option<KeyId>,
        /// Where to write the ELF core (mode 0600).
        #[arg(long, value_name = "FILE")]
        out: PathBuf,
    },
}

/// `admin …`
#[derive(Debug, Subcommand)]
pub(super) enum AdminCommand {
    /// Register an administrator and write a profile for it.
    Add {
        /// Name, as in the audit log.
        name: String,
        /// `admin` may do everything, `auditor` may only read.
        #[arg(long)]
        role: Role,
        /// The only customer it may deal with; without it, all.
        #[arg(long)]
        customer: Option<CustomerId>,
        /// Where to write the profile (mode 0600).
        #[arg(long, value_name = "FILE")]
        out: PathBuf,
    },
    /// List administrators.
    List,
    /// Revoke an administrator.
    Revoke {
        /// Name.
        name: String,
    },
}

fn url(text: &str) -> Result<ProviderUrl, policy::header::UrlError> {
    ProviderUrl::try_from(text.to_owned())
}

fn key(text: &str) -> Result<KeyId, policy::id::IdError> {
    text.parse()
}

fn anchor(text: &str) -> Result<VolumeAnchor, String> {
    let bytes = policy::Base64Url::parse(text).ok_or("an anchor is base64url")?;
    VolumeAnchor::from_bytes(&bytes).map_err(|e| e.to_string())
}
