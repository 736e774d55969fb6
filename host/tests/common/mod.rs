//! A host for one test: a software TPM on which firmware was played, its TPM service, VM processes.
#![allow(dead_code, unreachable_pub, reason = "a module of several test programs; each uses a part of it")]

use attest::eventlog::{Replay, firmware, layer};
use attest::qualify::Qualified;
use attest::service::{Client, ControlClient, Quoted, Registering, VmRequest};
use attest::tcti::Tcti;
use attest::tpm::attested::Attested;
use attest::tpm::pcr::{Selection, composite};
use attest::tpm::{Attest, Public, Signature};
use fealty_tests::firmware::Boot;
use fealty_tests::process::{Background, Ended, run};
use fealty_tests::swtpm::Swtpm;
use policy::operation::{Operation, OperationRequest};
use policy::{AttestationId, CustomerId, Digest, Nonce, VmId};
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use std::fs;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// Far beyond what anything here takes on a quiet machine.
pub const LIMIT: Duration = Duration::from_secs(60);

pub struct Host {
    pub dir: tempfile::TempDir,
    pub tpm: Swtpm,
}

/// A VM process: anything that lives.
pub struct Vm {
    pub process: Sleeper,
    pub client: Client,
    pub customer: CustomerId,
    pub name: VmId,
    pub file: Digest,
}

impl Host {
    /// A computer whose firmware ran.
    pub fn booted() -> Self {
        let host = Self::bare();
        host.play(&Boot::default());
        host
    }

    pub fn bare() -> Self {
        let dir = tempfile::tempdir().expect("a folder");
        let state = dir.path().join("tpm");
        fs::create_dir(&state).expect("a folder");
        let tpm = Swtpm::start(&state);
        for layer in ["fealty", "fealty-host", "more"] {
            fs::write(dir.path().join(layer), layer).expect("written");
        }
        Self { dir, tpm }
    }

    pub fn play(&self, boot: &Boot) {
        let logs = boot.play(&self.tcti()).expect("firmware plays");
        fs::write(self.path("firmware.log"), logs.firmware).expect("written");
        fs::write(self.path("ima.log"), logs.ima).expect("written");
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn tcti(&self) -> Tcti {
        self.tpm.tcti().parse().expect("a TCTI string")
    }

    pub fn socket(&self) -> PathBuf {
        self.path("run/control.sock")
    }

    pub fn command(&self, words: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_fealty-host"));
        command.arg(words[0]).args(["--tcti", &self.tpm.tcti()]).arg("--runtime-dir").arg(self.path("run"));
        if ["tpm", "measure"].contains(&words[0]) {
            command.arg("--firmware-log").arg(self.path("firmware.log")).arg("--ima-log").arg(self.path("ima.log"));
        }
        command.args(&words[1..]).current_dir(self.dir.path());
        command
    }

    pub fn run(&self, words: &[&str]) -> Ended {
        run(&mut self.command(words), LIMIT)
    }

    /// Starts the service and waits until it answers.
    pub fn serve(&self, more: &[&str]) -> Background {
        let service = self.start(more);
        let start = Instant::now();
        while ControlClient::connect(&self.socket()).is_err() {
            // A service that ends says why.
            assert!(service.err().is_empty() && start.elapsed() < LIMIT, "no service: {}", service.err());
            std::thread::sleep(Duration::from_millis(10));
        }
        service
    }

    pub fn start(&self, more: &[&str]) -> Background {
        Background::start(&mut self.command(&[&["tpm"], more].concat()))
    }

    /// A service on a host with two layers measured.
    pub fn ready(&self) -> Background {
        let service = self.serve(&[]);
        self.measure();
        service
    }

    pub fn measure(&self) {
        self.run(&["measure", "fealty=fealty@1", "fealty-host=fealty-host@1"]).good();
    }

    pub fn control(&self) -> ControlClient {
        let start = Instant::now();
        loop {
            match ControlClient::connect(&self.socket()) {
                Ok(client) => return client,
                Err(e) => assert!(start.elapsed() < LIMIT, "no service: {e}"),
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    pub fn vm(&self, customer: &str, name: &str) -> Vm {
        let process = Sleeper::new();
        let (customer, name) = (customer.parse().expect("a label"), name.parse().expect("a label"));
        let file = Digest::of(b"the VM file");
        let client = self.register(&process, &customer, &name, file);
        Vm { process, client, customer, name, file }
    }

    pub fn register(&self, process: &Sleeper, customer: &CustomerId, name: &VmId, file: Digest) -> Client {
        let (ours, theirs) = UnixStream::pair().expect("a pair");
        let pidfd = pidfd(process);
        self.control()
            .register(customer, name, file, theirs.as_fd(), pidfd.as_fd())
            .and_then(Registering::done)
            .expect("registered");
        Client::new(ours)
    }

    /// What the firmware log and a layer log replay to.
    pub fn replay(&self, layer_log: &[u8]) -> Replay {
        let firmware_log = fs::read(self.path("firmware.log")).expect("a log");
        let mut replay = firmware::replay(&firmware_log).expect("a good firmware log");
        layer::replay(layer_log, &mut replay).expect("a good layer log");
        replay
    }
}

/// A process that only lives; killed when dropped.
pub struct Sleeper(Child);

impl Sleeper {
    pub fn new() -> Self {
        let mut command = Command::new("sleep");
        command.arg("600").stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        Self(command.spawn().expect("sleep"))
    }

    pub fn end(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Drop for Sleeper {
    fn drop(&mut self) {
        self.end();
    }
}

pub fn pidfd(process: &Sleeper) -> OwnedFd {
    let pid = Pid::from_raw(process.0.id() as i32).expect("a pid");
    pidfd_open(pid, PidfdFlags::empty()).expect("a pidfd")
}

impl Vm {
    pub fn end(&mut self) {
        self.process.end();
    }
}

/// A request for a quote over `pcrs`.
pub fn quote(nonce: u8, pcrs: &[u8], ima_offset: Option<u64>) -> VmRequest {
    VmRequest::Quote {
        nonce: Nonce([nonce; 32]),
        attestation: AttestationId([nonce; 16]),
        operation: OperationRequest::plain(Operation::PowerOn),
        bundle_key: [9; 32][..].into(),
        client_key: Digest::of(b"client key"),
        pin: Digest::of(b"pin"),
        pcrs: pcrs.to_vec(),
        ima_offset,
        claims: b"{}"[..].into(),
    }
}

/// H of an answer to [`quote`] for a VM.
pub fn h(nonce: u8, host: &policy::HostId, vm: (&CustomerId, &VmId, &Digest), quoted: &Quoted) -> Digest {
    let wrap = Public::parse(&quoted.wrap_key.public).expect("a key");
    Qualified {
        nonce: &Nonce([nonce; 32]),
        attestation: &AttestationId([nonce; 16]),
        host,
        customer: vm.0,
        vm: vm.1,
        vm_file: vm.2,
        operation: &OperationRequest::plain(Operation::PowerOn),
        bundle_key: &[9; 32],
        client_key: &Digest::of(b"client key"),
        wrap_key_name: &wrap.name().0,
        earlier_peer: quoted.earlier_peer,
        firmware_log: &quoted.firmware_log,
        layer_log: &quoted.layer_log,
        ima_log: &quoted.ima_log,
        ima_offset: quoted.ima_offset,
        pin: &Digest::of(b"pin"),
        claims: b"{}",
    }
    .digest()
}

/// Verifies a quote as a provider would: signature, H, selection, PCR values from the logs alone.
pub fn verify(host: &Host, vm: &mut Vm, nonce: u8, pcrs: &[u8], quoted: &Quoted) {
    let identity = vm.client.identity().expect("identity");
    let ak = Public::parse(&identity.ak_public).expect("an AK");
    attest::tpm::check_ak(&ak).expect("a good AK");
    let signature = Signature::parse(&quoted.signature).expect("a signature");
    signature.verify(&ak, &quoted.quote, "quote").expect("signed by the AK");
    let attest = Attest::parse(&quoted.quote).expect("TPMS_ATTEST");
    let expected = h(nonce, &identity.host, (&vm.customer, &vm.name, &vm.file), quoted);
    assert_eq!(attest.extra_data, expected.as_bytes());
    let Attested::Quote { selection, pcr_digest } = attest.attested else { panic!("not a quote") };
    assert_eq!(selection, [Selection::sha256(pcrs)]);
    let mut replay = host.replay(&quoted.layer_log);
    if pcrs.contains(&10) {
        let (state, _) =
            attest::eventlog::ima::replay(&quoted.ima_log, attest::eventlog::ImaState::START, &replay.pcrs)
                .expect("a good IMA log");
        replay.pcrs.insert(10, state.pcr);
    }
    assert_eq!(pcr_digest, composite(pcrs, &replay.pcrs).as_bytes());
    let known: Vec<Digest> = pcrs.iter().map(|p| replay.value(*p)).collect();
    assert_eq!(quoted.pcr_values, known);
}

/// The reason of a refusal.
#[track_caller]
pub fn refused<T: std::fmt::Debug>(answer: Result<T, attest::service::ServiceError>) -> (String, bool) {
    match answer {
        Err(attest::service::ServiceError::Refused { reason, again }) => {
            assert!(!reason.contains('\n') && !reason.is_empty(), "not one line: {reason}");
            (reason, again)
        }
        other => panic!("not refused: {other:?}"),
    }
}
