//! Software TPMs: each with a certificate authority of its own, ended when dropped.

use crate::process::{Ended, run};
use std::fs;
use std::hash::{BuildHasher, Hasher, RandomState};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// How long setting up or starting may take.
const LIMIT: Duration = Duration::from_secs(120);

/// How often another pair of ports is tried.
const ATTEMPTS: u32 = 50;

/// A software TPM (swtpm): endorsement keys RSA-2048 and P-384 with certificates in NV, bank SHA-256. Serves TPM commands on
/// a TCP port of 127.0.0.1 and its control channel on the next, as the library wants it. Bare: nobody played firmware on it.
#[derive(Debug)]
pub struct Swtpm {
    dir: PathBuf,
    port: u16,
    child: Option<Child>,
}

impl Swtpm {
    /// Makes a new TPM with its state in `dir`, an absolute path, and switches it on.
    ///
    /// # Panics
    /// Where swtpm is missing or fails.
    #[track_caller]
    pub fn start(dir: &Path) -> Self {
        Self::start_with(dir, "sha256")
    }

    /// The same with other active PCR banks, as swtpm_setup names them.
    ///
    /// # Panics
    /// Where swtpm is missing or fails.
    #[track_caller]
    pub fn start_with(dir: &Path, banks: &str) -> Self {
        let dir = dir.canonicalize().expect("the folder of the TPM exists");
        write_configuration(&dir);
        set_up(&dir, banks).good();
        let mut tpm = Self { dir, port: 0, child: None };
        tpm.power_on();
        tpm
    }

    /// Its name for `--tcti`.
    pub fn tcti(&self) -> String {
        format!("swtpm:host=127.0.0.1,port={}", self.port)
    }

    /// The certificate authority's roots, PEM.
    pub fn roots(&self) -> PathBuf {
        self.dir.join("roots.pem")
    }

    /// The certificate of the endorsement key that hosts are known by (P-384), DER.
    pub fn ek_certificate(&self) -> PathBuf {
        self.dir.join("certificates/ek-secp384r1.crt")
    }

    /// The certificate of the RSA-2048 endorsement key, DER.
    pub fn rsa_ek_certificate(&self) -> PathBuf {
        self.dir.join("certificates/ek-rsa2048.crt")
    }

    /// Its process id, while it is on.
    pub fn pid(&self) -> Option<u32> {
        self.child.as_ref().map(Child::id)
    }

    /// Takes its power away at once, as SIGKILL does. Its NV memory stays.
    pub fn power_off(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    /// Switches it on again, on the same port where that is still free: a TPM reset, once firmware starts it.
    ///
    /// # Panics
    /// Where swtpm fails.
    #[track_caller]
    pub fn power_on(&mut self) {
        self.power_off();
        let mut candidates = std::iter::once(self.port).filter(|p| *p != 0).chain(std::iter::from_fn(free_pair));
        for _ in 0..ATTEMPTS {
            let port = candidates.next().expect("endless");
            if self.try_on(port) {
                self.port = port;
                return;
            }
        }
        panic!("no two free ports for swtpm");
    }

    /// Off and on.
    ///
    /// # Panics
    /// Where swtpm fails.
    #[track_caller]
    pub fn reset(&mut self) {
        self.power_on();
    }

    fn try_on(&mut self, port: u16) -> bool {
        let child = Command::new("swtpm")
            .args(["socket", "--tpm2", "--flags", "not-need-init"])
            .args(["--tpmstate", &format!("dir={}", self.dir.join("state").display())])
            .args(["--server", &format!("type=tcp,port={port}")])
            .args(["--ctrl", &format!("type=tcp,port={}", port + 1)])
            .args(["--log", &format!("file={}", self.dir.join("swtpm.log").display())])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn();
        let mut child = child.expect("swtpm is installed (package swtpm)");
        let start = Instant::now();
        while start.elapsed() < LIMIT {
            if child.try_wait().expect("a child").is_some() {
                return false;
            }
            // Not found out by connecting: somebody else's TPM may have been faster.
            if [port, port + 1].iter().all(|p| listens(child.id(), *p)) {
                self.child = Some(child);
                return true;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        let _ = child.kill();
        let _ = child.wait();
        false
    }
}

impl Drop for Swtpm {
    fn drop(&mut self) {
        self.power_off();
    }
}

/// Two neighbouring ports that were free just now. Below the range that the kernel gives to clients.
fn free_pair() -> Option<u16> {
    loop {
        let random = RandomState::new().build_hasher().finish();
        let port = 10_000 + (random % 20_000) as u16;
        let free = |p| TcpListener::bind(("127.0.0.1", p)).is_ok();
        if free(port) && free(port + 1) {
            return Some(port);
        }
    }
}

/// Whether process `pid` listens on `port` of 127.0.0.1.
fn listens(pid: u32, port: u16) -> bool {
    let table = fs::read_to_string("/proc/net/tcp").unwrap_or_default();
    let address = format!("0100007F:{port:04X}");
    let sockets = table.lines().filter_map(|line| {
        let mut fields = line.split_whitespace().skip(1);
        let listens = fields.next() == Some(&address) && fields.nth(1) == Some("0A");
        listens.then(|| fields.nth(5)).flatten().map(|inode| format!("socket:[{inode}]"))
    });
    let sockets: Vec<String> = sockets.collect();
    let Ok(descriptors) = fs::read_dir(format!("/proc/{pid}/fd")) else { return false };
    descriptors
        .flatten()
        .filter_map(|fd| fs::read_link(fd.path()).ok())
        .any(|link| sockets.iter().any(|socket| link.as_os_str() == socket.as_str()))
}

/// Without configuration files of our own, swtpm_setup would write to system folders.
fn write_configuration(dir: &Path) {
    let text = |name: &str| dir.join(name).display().to_string();
    for folder in ["ca", "certificates", "state"] {
        fs::create_dir_all(dir.join(folder)).expect("a folder");
    }
    let setup = format!(
        "create_certs_tool = swtpm_localca\ncreate_certs_tool_config = {}\ncreate_certs_tool_options = {}\n",
        text("localca.conf"),
        text("localca.options")
    );
    let authority = format!(
        "statedir = {}\nsigningkey = {}\nissuercert = {}\ncertserial = {}\n",
        text("ca"),
        text("ca/signkey.pem"),
        text("ca/issuercert.pem"),
        text("ca/certserial")
    );
    fs::write(dir.join("setup.conf"), setup).expect("written");
    fs::write(dir.join("localca.conf"), authority).expect("written");
    fs::write(
        dir.join("localca.options"),
        "--platform-manufacturer fealty\n--platform-version 1\n--platform-model test\n",
    )
    .expect("written");
}

fn set_up(dir: &Path, banks: &str) -> Ended {
    let text = |name: &str| dir.join(name).display().to_string();
    let ended = run(
        Command::new("swtpm_setup")
            .args(["--tpm2", "--create-ek-cert", "--overwrite", "--pcr-banks", banks, "--vmid", "test"])
            .args(["--tpmstate", &text("state"), "--config", &text("setup.conf"), "--logfile", &text("setup.log")])
            .args(["--write-ek-cert-files", &text("certificates")]),
        LIMIT,
    );
    let root = fs::read_to_string(dir.join("ca/swtpm-localca-rootca-cert.pem")).unwrap_or_default();
    let issuer = fs::read_to_string(dir.join("ca/issuercert.pem")).unwrap_or_default();
    fs::write(dir.join("roots.pem"), root + &issuer).expect("written");
    ended
}
