//! A laboratory: one host with a software TPM, one key provider, one customer with a VM whose disk is encrypted. Real
//! programs throughout; only the firmware is played.

use crate::process::{Background, Ended, program, run};
use crate::swtpm::Swtpm;
use rustix::fs::{FlockOperation, flock};
use rustix::process::{Pid, Signal, kill_process};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

/// How long one program may take; far beyond what it takes on a quiet machine.
pub const LIMIT: Duration = Duration::from_secs(120);

/// What a laboratory may differ in.
#[derive(Debug, Clone)]
pub struct Plan {
    /// The guest's words (see the small guest): its `fealty.do=`.
    pub words: String,
    /// Settings of the policy document, JSON members beside version and customer.
    pub settings: String,
    /// Cedar rules.
    pub rules: String,
    /// Bytes of the disk image.
    pub disk: Vec<u8>,
    /// How the volume is anchored.
    pub anchor_mode: &'static str,
}

impl Default for Plan {
    fn default() -> Self {
        Self {
            words: "hash,poweroff".into(),
            settings: lease(600, 10),
            rules: POWER_ON_ONLY.into(),
            disk: (0..4u32 << 20).map(|i| (i >> 12) as u8 ^ (i as u8)).collect(),
            anchor_mode: "interval",
        }
    }
}

/// Rules that let a VM start and go on, and nothing else.
pub const POWER_ON_ONLY: &str = r#"
permit (principal, action in [Action::"vm.power-on", Action::"vm.renew", Action::"vm.resume-keys"], resource);
"#;

/// Settings with a lease, strict but for what a machine of tests has not got.
pub fn lease(seconds: u32, quiesce: u32) -> String {
    let memfd_secret = has_memfd_secret();
    format!(
        r#""lease": {{"seconds": {seconds}, "quiesce_seconds": {quiesce}}}, "require_ptrace_closed": false, "require_memfd_secret": {memfd_secret}"#
    )
}

/// Whether this kernel offers memfd_secret: before Linux 6.5 it has to be asked to.
pub fn has_memfd_secret() -> bool {
    matches!(secretmem::protection(), Ok(secretmem::Protection::MemfdSecret))
}

/// Asks a VM that runs to end, and once more when it has heard that: two signals that come together count once.
///
/// # Panics
/// Where it does not end.
#[track_caller]
pub fn stop(mut vm: Background) -> Ended {
    vm.signal(15);
    vm.until("power-button", LIMIT);
    vm.signal(15);
    vm.end(LIMIT)
}

/// The laboratory. Dropping it ends everything.
#[derive(Debug)]
pub struct Lab {
    /// Where everything lies.
    pub dir: tempfile::TempDir,
    /// The TPM service's folder: in memory, as /run is.
    pub run: tempfile::TempDir,
    /// The host's TPM.
    pub tpm: Swtpm,
    /// The key provider's process; `None` while it is stopped.
    pub provider: Option<Background>,
    listen: String,
    policy_version: u64,
}

impl Lab {
    /// Builds a laboratory after `plan`: everything up to a sealed VM file `payroll.vm`.
    ///
    /// # Panics
    /// Where any step fails: the test can't go on.
    #[track_caller]
    pub fn new(plan: &Plan) -> Self {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let run = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).expect("a temporary folder");
        let tpm_dir = dir.path().join("tpm");
        std::fs::create_dir(&tpm_dir).expect("a folder");
        let tpm = Swtpm::start(&tpm_dir);
        let mut lab = Self { dir, run, tpm, provider: None, listen: "127.0.0.1:0".into(), policy_version: 0 };
        lab.boot_host();
        lab.keys_local(&["init", "--dir", &lab.text("keys"), "--name", "localhost", "--name", "127.0.0.1"]).good();
        lab.start_provider();
        lab.keys(&["customer", "create", "acme", "--lab", "--policy-key", &lab.text("policy.key")]).good();
        let roots = lab.tpm.roots().display().to_string();
        lab.keys(&["cloud", "create", "lab", "--kind", "lab", "--roots", &roots]).good();
        let certificate = lab.tpm.ek_certificate().display().to_string();
        lab.keys(&["cloud", "enroll", "lab", "--certificate", &certificate]).good();
        lab.keys(&["customer", "allow-cloud", "acme", "lab"]).good();
        lab.set_reference();
        lab.set_policy(&plan.settings, &plan.rules);
        lab.make_volume("root", &plan.disk);
        lab.make_vm(plan);
        lab
    }

    /// A path inside the laboratory.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// The same as text.
    pub fn text(&self, name: &str) -> String {
        self.path(name).display().to_string()
    }

    /// The TPM service's folder, as text.
    pub fn runtime_dir(&self) -> String {
        self.run.path().display().to_string()
    }

    /// Takes the host's power away: with it go the TPM's, the TPM service, and the folder in memory.
    ///
    /// # Panics
    /// Where the service does not die.
    #[track_caller]
    pub fn power_off(&mut self) {
        self.tpm.power_off();
        let path = self.run.path().join("lock");
        let lock = std::fs::File::open(&path).expect("a host that booted");
        let begun = Instant::now();
        // A service that lived on would take the next boot's for its own: its handles in the TPM, its socket and its state.
        while flock(&lock, FlockOperation::NonBlockingLockExclusive).is_err() {
            assert!(begun.elapsed() < LIMIT, "the TPM service does not die");
            let holder = std::fs::read_to_string(&path).expect("read");
            if let Some(pid) = holder.parse().ok().and_then(Pid::from_raw) {
                let _ = kill_process(pid, Signal::KILL);
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        std::fs::remove_dir_all(self.run.path()).expect("removed");
    }

    /// Plays the firmware and measures the host's layers: what a boot does.
    #[track_caller]
    pub fn boot_host(&self) {
        self.play_firmware();
        self.measure(&[]).good();
    }

    /// Plays the firmware alone.
    #[track_caller]
    pub fn play_firmware(&self) {
        let (firmware, ima) = (self.text("firmware.log"), self.text("ima.log"));
        let words = ["--tcti", &self.tpm.tcti(), "--firmware-log", &firmware, "--ima-log", &ima];
        self.run_tool("play-firmware", &words).good();
    }

    /// Measures the host's own programs, and `more` as `NAME=PATH`.
    #[track_caller]
    pub fn measure(&self, more: &[&str]) -> Ended {
        let layers = ["fealty", "fealty-host"].map(|name| format!("{name}={}@0.1.0", program(name).display()));
        let (tcti, runtime) = (self.tpm.tcti(), self.runtime_dir());
        let (firmware, ima) = (self.text("firmware.log"), self.text("ima.log"));
        let mut words = vec!["measure", "--tcti", &tcti, "--runtime-dir", &runtime];
        words.extend(["--firmware-log", &firmware, "--ima-log", &ima]);
        words.extend(layers.iter().map(String::as_str));
        words.extend(more);
        self.run_tool("fealty-host", &words)
    }

    /// Starts the provider, on the address it had before if it ran already.
    #[track_caller]
    pub fn start_provider(&mut self) {
        let mut provider = Background::start(Command::new(program("fealty-keys")).args([
            "serve",
            "--dir",
            &self.text("keys"),
            "--listen",
            &self.listen,
        ]));
        provider.until("ready https://", LIMIT);
        let printed = provider.out() + &provider.err();
        let port = printed.split("ready https://").nth(1).and_then(|rest| rest.lines().next());
        let port = port.and_then(|line| line.trim().rsplit(':').next()).expect("a port after ready");
        self.listen = format!("127.0.0.1:{}", port.trim_matches('/'));
        self.provider = Some(provider);
    }

    /// Ends the provider as `signal` would.
    pub fn stop_provider(&mut self, signal: i32) {
        if let Some(provider) = self.provider.take() {
            provider.signal(signal);
            let _ = provider.end(LIMIT);
        }
    }

    /// The provider's URL.
    pub fn url(&self) -> String {
        format!("https://localhost:{}", self.listen.rsplit(':').next().unwrap_or_default())
    }

    /// Runs `fealty-keys` without a server.
    #[track_caller]
    pub fn keys_local(&self, words: &[&str]) -> Ended {
        self.run_tool("fealty-keys", words)
    }

    /// Runs `fealty-keys` as the first administrator.
    #[track_caller]
    pub fn keys(&self, words: &[&str]) -> Ended {
        let (profile, url) = (self.text("keys/admin.json"), self.url());
        let mut all = words.to_vec();
        let at = all.iter().position(|w| *w == "--").unwrap_or(all.len());
        all.splice(at..at, ["--profile", &profile, "--url", &url]);
        self.run_tool("fealty-keys", &all)
    }

    /// Learns reference values from this host's logs and sets them.
    #[track_caller]
    pub fn set_reference(&self) {
        let layers = self.layer_log().display().to_string();
        let learned = self.keys_local(&[
            "reference",
            "learn",
            "--firmware-log",
            &self.text("firmware.log"),
            "--layer-log",
            &layers,
        ]);
        std::fs::write(self.path("values.json"), learned.good().out).expect("written");
        self.keys(&["reference", "set", "acme", &self.text("values.json")]).good();
    }

    /// Where the host's layer log lies.
    pub fn layer_log(&self) -> PathBuf {
        let mut found = find(self.run.path(), "layers.log");
        found.pop().expect("fealty-host measure left a layer log")
    }

    /// Sets a policy of the next version.
    #[track_caller]
    pub fn set_policy(&mut self, settings: &str, rules: &str) {
        self.policy_version += 1;
        let text =
            format!("{{\"version\": {}, \"customer\": \"acme\", {settings}}}\n---\n{rules}", self.policy_version);
        std::fs::write(self.path("policy.txt"), text).expect("written");
        self.keys(&["policy", "set", "acme", &self.text("policy.txt"), "--policy-key", &self.text("policy.key")])
            .good();
    }

    /// Makes a volume of an image.
    #[track_caller]
    pub fn make_volume(&self, name: &str, image: &[u8]) {
        std::fs::create_dir_all(self.path("store")).expect("a folder");
        let file = format!("{name}.img");
        std::fs::write(self.path(&file), image).expect("written");
        self.keys(&["volume", "create", "acme", name]).good();
        self.disk_tool(name, "import", &[&self.text(&file), &self.volume(name)]).good();
    }

    /// Where a volume's file lies.
    pub fn volume(&self, name: &str) -> String {
        self.text(&format!("store/{name}.vol"))
    }

    /// Runs `fealty-disk` with a volume's keys.
    #[track_caller]
    pub fn disk_tool(&self, name: &str, command: &str, words: &[&str]) -> Ended {
        let disk = program("fealty-disk").display().to_string();
        self.keys(&[&["volume", "exec", "acme", name, "--", &disk, command], words].concat())
    }

    /// A volume's UUID.
    #[track_caller]
    pub fn volume_id(&self, name: &str) -> String {
        let listed = self.keys(&["volume", "list", "acme", "--json"]).good().out;
        let volumes = listed.lines().map(|line| serde_json::from_str::<serde_json::Value>(line).expect("JSON"));
        let volume = volumes.into_iter().find(|v| v["name"] == name).unwrap_or_else(|| panic!("no {name} in {listed}"));
        volume["volume"].as_str().expect("a volume id").to_owned()
    }

    #[track_caller]
    fn make_vm(&self, plan: &Plan) {
        self.keys(&["vm", "create", "acme", "payroll"]).good();
        self.seal(&plan.words, plan.anchor_mode);
    }

    /// Seals a new VM file whose guest does `words`.
    #[track_caller]
    pub fn seal(&self, words: &str, anchor_mode: &str) {
        self.seal_with(words, anchor_mode, |_| {}, &[]);
    }

    /// The same, with these disks.
    #[track_caller]
    pub fn seal_disks(&self, words: &str, disks: &[serde_json::Value]) {
        self.seal_with(words, "interval", |config| config["disks"] = disks.into(), &[]);
    }

    /// The same of a configuration that `change` changes, with `more` words for the tool.
    #[track_caller]
    pub fn seal_with(
        &self,
        words: &str,
        anchor_mode: &str,
        change: impl FnOnce(&mut serde_json::Value),
        more: &[&str],
    ) {
        let id = self.volume_id("root");
        let kernel = &crate::guest::images().elf;
        std::fs::copy(kernel, self.path("store/guest")).expect("copied");
        let mut config = serde_json::json!({
            "cpus": {"boot_vcpus": 1},
            "memory": {"size": 32u64 << 20},
            "payload": {"kernel": {"name": "guest"}, "cmdline": format!("console=ttyS0 fealty.do={words}")},
            "disks": [{"id": "root", "volume": id, "anchor_mode": anchor_mode, "num_queues": 2}],
        });
        change(&mut config);
        std::fs::write(self.path("store/payroll.json"), config.to_string()).expect("written");
        let (config, out) = (self.text("store/payroll.json"), self.text("store/payroll.vm"));
        self.keys(&[&["vm", "seal", "acme", "payroll", "--config", &config, "--out", &out], more].concat()).good();
    }

    /// `fealty run store/payroll.vm`, not yet started.
    pub fn vm(&self, more: &[&str]) -> Command {
        self.vm_file("store/payroll.vm", more)
    }

    /// `fealty run` of another VM file of the laboratory, not yet started.
    pub fn vm_file(&self, file: &str, more: &[&str]) -> Command {
        let mut command = Command::new(program("fealty"));
        command.args(["run", &self.text(file), "--tcti", &self.tpm.tcti(), "--runtime-dir", &self.runtime_dir()]);
        command.args(more).current_dir(self.dir.path());
        command
    }

    /// Runs the VM to its end.
    #[track_caller]
    pub fn run_vm(&self, more: &[&str]) -> Ended {
        run(&mut self.vm(more), LIMIT)
    }

    /// Exports the volume `root` and returns its bytes.
    #[track_caller]
    pub fn export(&self) -> Vec<u8> {
        self.export_volume("root")
    }

    /// Exports a volume, which must be free, and returns its bytes.
    #[track_caller]
    pub fn export_volume(&self, name: &str) -> Vec<u8> {
        let image = self.text("exported.img");
        self.disk_tool(name, "export", &[&self.volume(name), &image, "--force"]).good();
        std::fs::read(image).expect("the exported image")
    }

    /// The volume's key-encryption key, as a tool gets it: behind the session's description.
    #[track_caller]
    pub fn volume_key(&self) -> Vec<u8> {
        let take = r#"timeout 3 cat <&"$1""#;
        let mut command = Command::new(program("fealty-keys"));
        let (profile, url) = (self.text("keys/admin.json"), self.url());
        command.args([
            "--profile",
            &profile,
            "--url",
            &url,
            "volume",
            "exec",
            "acme",
            "root",
            "--",
            "bash",
            "-c",
            take,
        ]);
        let told = command.stderr(std::process::Stdio::null()).output().expect("it runs").stdout;
        let length = told.first_chunk().map_or(0, |length| u32::from_be_bytes(*length) as usize);
        let key = told.get(4 + length..).unwrap_or_default();
        assert!(key.len() == 32 && told[4..4 + length].starts_with(b"{"), "no key in {} bytes", told.len());
        key.to_vec()
    }

    /// All files beneath a folder, with what they hold.
    #[track_caller]
    pub fn files(folder: &Path) -> Vec<(PathBuf, Vec<u8>)> {
        let mut all = Vec::new();
        for entry in std::fs::read_dir(folder).expect("a folder").flatten() {
            let (path, kind) = (entry.path(), entry.file_type().expect("a kind"));
            if kind.is_dir() {
                all.extend(Self::files(&path));
            } else if kind.is_file() {
                match std::fs::read(&path) {
                    Ok(bytes) => all.push((path, bytes)),
                    // The TPM service, about to end, puts a new file in an old one's place.
                    Err(error) => assert_eq!(error.kind(), std::io::ErrorKind::NotFound, "{}", path.display()),
                }
            }
        }
        all
    }

    /// What `fealty-host` says of the TPM service that runs.
    #[track_caller]
    pub fn service(&self) -> serde_json::Value {
        let words = ["status", "--tcti", &self.tpm.tcti(), "--runtime-dir", &self.runtime_dir(), "--json"];
        serde_json::from_str(&self.run_tool("fealty-host", &words).good().out).expect("JSON")
    }

    /// The customer's audit log, one JSON event a line.
    #[track_caller]
    pub fn audit(&self) -> Vec<serde_json::Value> {
        let listed = self.keys(&["audit", "list", "acme", "--json"]).good().out;
        listed.lines().filter_map(|line| serde_json::from_str(line).ok()).collect()
    }

    /// Kinds of the audit log's events, in order.
    #[track_caller]
    pub fn audit_kinds(&self) -> Vec<String> {
        self.audit().iter().filter_map(|e| e["kind"].as_str().map(str::to_owned)).collect()
    }

    /// Runs one of the project's programs in the laboratory's folder.
    #[track_caller]
    pub fn run_tool(&self, name: &str, words: &[&str]) -> Ended {
        run(Command::new(program(name)).args(words).current_dir(self.dir.path()), LIMIT)
    }
}

fn find(folder: &Path, name: &str) -> Vec<PathBuf> {
    let Ok(entries) = std::fs::read_dir(folder) else { return Vec::new() };
    let mut found = Vec::new();
    for entry in entries.flatten() {
        let path = entry.path();
        if path.is_dir() {
            found.extend(find(&path, name));
        } else if path.file_name().is_some_and(|n| n == name) {
            found.push(path);
        }
    }
    found
}
