//! A provider of real programs, and hosts whose TPMs are software keys: enough where the point is the provider's. What a
//! real TPM is needed for is tested in the workspace's `tests/`.

pub(crate) mod host;
pub(crate) mod vm;

use fealty_keyprovider::api;
use fealty_keyprovider::client::{AdminClient, OneTimeKey, Profile};
use fealty_keyprovider::store::Database;
use host::SoftHost;
use policy::header::ProviderUrl;
use policy::{Digest, KeyId, VolumeAnchor, VolumeId};
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

/// Rules that let a VM start and go on.
pub(crate) const GO: &str =
    r#"permit (principal, action in [Action::"vm.power-on", Action::"vm.renew", Action::"vm.resume-keys"], resource);"#;

/// A provider's process.
pub(crate) struct Provider {
    child: Child,
    pub(crate) url: ProviderUrl,
    log: PathBuf,
}

impl Provider {
    /// Serves from `dir` on a free port.
    pub(crate) fn start(dir: &Path) -> Self {
        Self::start_as(keys_command(), dir, &dir.join("../provider.log"))
    }

    /// The same by another command, with another log.
    pub(crate) fn start_as(mut command: Command, dir: &Path, log: &Path) -> Self {
        let errors = std::fs::File::options().create(true).append(true).open(log).expect("a log");
        let mut child = command
            .args(["serve", "--listen", "127.0.0.1:0", "--dir"])
            .arg(dir)
            .env("FEALTY_LOG", "trace")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(errors)
            .spawn()
            .expect("the provider starts");
        let mut line = String::new();
        BufReader::new(child.stdout.take().expect("piped")).read_line(&mut line).expect("a line");
        let url = line.trim().strip_prefix("ready ").unwrap_or_else(|| panic!("not ready: {line}"));
        Self { child, url: url.to_owned().try_into().expect("a URL"), log: log.to_owned() }
    }

    pub(crate) fn pid(&self) -> rustix::process::Pid {
        rustix::process::Pid::from_raw(self.child.id() as i32).expect("a process")
    }

    /// What it logged, this and every process before it.
    pub(crate) fn log(&self) -> String {
        std::fs::read_to_string(&self.log).expect("the log")
    }

    /// Kills it, as a power cut would.
    pub(crate) fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for Provider {
    fn drop(&mut self) {
        self.kill();
    }
}

/// The program under test.
pub(crate) fn keys_command() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_fealty-keys"));
    command.env_remove("FEALTY_KEYS_PROFILE").stdin(Stdio::null());
    command
}

/// A provider with a customer `acme` (lab), a cloud `lab` with one host, reference values, a policy, a volume `root` with an
/// anchor, and a VM `payroll` whose file names that volume.
pub(crate) struct Lab {
    pub(crate) dir: tempfile::TempDir,
    pub(crate) provider: Provider,
    pub(crate) host: SoftHost,
    pub(crate) root: host::Maker,
    pub(crate) volume: VolumeId,
    pub(crate) file: Digest,
    pub(crate) policy_version: std::cell::Cell<u64>,
}

impl Lab {
    pub(crate) fn new() -> Self {
        Self::with(600, GO)
    }

    /// With leases of so many seconds, and these rules.
    pub(crate) fn with(lease: u32, rules: &str) -> Self {
        let dir = tempfile::tempdir().expect("a folder");
        let path = |name: &str| dir.path().join(name);
        let made = keys_command().args(["init", "--name", "localhost,127.0.0.1", "--dir"]).arg(path("keys")).output();
        good(made.expect("init runs"));
        let provider = Provider::start(&path("keys"));
        let root = host::Maker::new();
        let host = SoftHost::new(&root);
        let mut lab = Self {
            dir,
            provider,
            host,
            root,
            volume: VolumeId([0; 16]),
            file: Digest([0; 32]),
            policy_version: 0.into(),
        };
        lab.write("roots.pem", lab.root.pem().as_bytes());
        lab.write("ek.der", &lab.host.certificate);
        let (policy_key, roots, ek) = (lab.text("policy.key"), lab.text("roots.pem"), lab.text("ek.der"));
        lab.keys(&["customer", "create", "acme", "--lab", "--policy-key", &policy_key]);
        lab.keys(&["cloud", "create", "lab", "--kind", "lab", "--roots", &roots]);
        lab.keys(&["cloud", "enroll", "lab", "--certificate", &ek]);
        lab.keys(&["customer", "allow-cloud", "acme", "lab"]);
        lab.set_reference();
        lab.set_policy(lease, rules);
        lab.volume = lab.make_volume("root");
        lab.anchor_volume("root", 1);
        lab.keys(&["vm", "create", "acme", "payroll"]);
        lab.file = lab.seal("payroll", &[lab.volume]);
        lab
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub(crate) fn text(&self, name: &str) -> String {
        self.path(name).display().to_string()
    }

    pub(crate) fn write(&self, name: &str, bytes: &[u8]) {
        std::fs::write(self.path(name), bytes).expect("written");
    }

    /// Runs the tool as the first administrator; it must succeed.
    #[track_caller]
    pub(crate) fn keys(&self, words: &[&str]) -> String {
        good(self.try_keys(words))
    }

    /// Runs the tool; it must fail with one line.
    #[track_caller]
    pub(crate) fn refused(&self, words: &[&str]) -> String {
        let output = self.try_keys(words);
        let errors = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success(), "{words:?} was not refused");
        assert_eq!(errors.trim_end().lines().count(), 1, "one line: {errors}");
        errors
    }

    pub(crate) fn try_keys(&self, words: &[&str]) -> Output {
        let profile = self.text("keys/admin.json");
        self.try_keys_as(&profile, words)
    }

    pub(crate) fn try_keys_as(&self, profile: &str, words: &[&str]) -> Output {
        let url = self.provider.url.to_string();
        let at = words.iter().position(|w| *w == "--").unwrap_or(words.len());
        let mut all = words.to_vec();
        all.splice(at..at, ["--profile", profile, "--url", &url]);
        keys_command().args(all).current_dir(self.dir.path()).output().expect("the tool runs")
    }

    /// A client of the administrators' API.
    pub(crate) fn admin(&self) -> AdminClient {
        self.admin_as("keys/admin.json")
    }

    pub(crate) fn admin_as(&self, profile: &str) -> AdminClient {
        let path = self.path(profile);
        let profile = Profile::read(&path).expect("a profile");
        AdminClient::new(&path, &profile, Some(self.provider.url.clone())).expect("a client")
    }

    /// The provider's pin.
    pub(crate) fn pin(&self) -> Digest {
        Profile::read(&self.path("keys/admin.json")).expect("a profile").pin
    }

    pub(crate) fn set_reference(&self) {
        self.write("firmware.log", &self.host.firmware);
        self.write("layers.log", &self.host.layers);
        let (firmware, layers) = (self.text("firmware.log"), self.text("layers.log"));
        let mut learn = keys_command();
        learn.args(["reference", "learn", "--firmware-log", &firmware, "--layer-log", &layers]);
        if !self.host.ima.is_empty() {
            self.write("ima.log", &self.host.ima);
            learn.args(["--ima-log", &self.text("ima.log")]);
        }
        let learned = learn.output().expect("the tool runs");
        self.write("values.json", good(learned).as_bytes());
        self.keys(&["reference", "set", "acme", &self.text("values.json")]);
    }

    pub(crate) fn set_policy(&self, lease: u32, rules: &str) {
        let version = self.policy_version.get() + 1;
        self.policy_version.set(version);
        let quiesce = (lease / 10).max(1);
        let text = format!(
            "{{\"version\": {version}, \"customer\": \"acme\", \
             \"lease\": {{\"seconds\": {lease}, \"quiesce_seconds\": {quiesce}}}}}\n---\n{rules}\n"
        );
        self.write("policy.txt", text.as_bytes());
        let (file, key) = (self.text("policy.txt"), self.text("policy.key"));
        self.keys(&["policy", "set", "acme", &file, "--policy-key", &key]);
    }

    pub(crate) fn make_volume(&self, name: &str) -> VolumeId {
        let new = api::NewVolume { name: name.into() };
        let view: api::VolumeView = self.admin().post("/v1/customers/acme/volumes", &new).expect("created");
        view.volume
    }

    /// What `fealty-disk create` does, as far as the provider sees it. `epoch` makes the anchor later than one before.
    pub(crate) fn anchor_volume(&self, name: &str, epoch: u8) -> VolumeAnchor {
        let mut admin = self.admin();
        let path = format!("/v1/customers/acme/volumes/{name}/sessions");
        let one_time = OneTimeKey::generate().expect("memory");
        let session: api::SessionView = admin.post(&path, &one_time.request()).expect("a session");
        let grant = &session.grant;
        let anchor = anchor_of(grant.volume, grant.open_number.get(), epoch, grant.key_id);
        let path = format!("{path}/{}", session.session);
        let update = api::SessionAnchor { anchor: anchor.clone() };
        let _: api::Done = admin.put(&format!("{path}/anchor"), &update).expect("anchored");
        let end = api::SessionEnd { outcome: "done".into() };
        let _: api::Done = admin.post(&format!("{path}/end"), &end).expect("ended");
        anchor
    }

    /// Seals a VM file with these volumes; returns its digest.
    pub(crate) fn seal(&self, vm: &str, volumes: &[VolumeId]) -> Digest {
        self.write("kernel", b"a kernel");
        let disks: Vec<_> = volumes
            .iter()
            .enumerate()
            .map(|(n, volume)| serde_json::json!({ "id": format!("d{n}"), "volume": volume }))
            .collect();
        let config = serde_json::json!({
            "cpus": {"boot_vcpus": 1}, "memory": {"size": 128u64 << 20},
            "payload": {"kernel": {"name": "kernel"}, "cmdline": ""}, "disks": disks,
        });
        self.write("config.json", config.to_string().as_bytes());
        let (config, out) = (self.text("config.json"), self.text(&format!("{vm}.vm")));
        self.keys(&["vm", "seal", "acme", vm, "--config", &config, "--out", &out]);
        Digest::of(&std::fs::read(out).expect("the VM file"))
    }

    /// The audit log; the tool has checked its chain.
    pub(crate) fn audit(&self) -> Vec<serde_json::Value> {
        let text = self.keys(&["audit", "list", "acme", "--json"]);
        text.lines().map(|l| serde_json::from_str(l).expect("an event")).collect()
    }

    /// Events of one kind.
    pub(crate) fn events(&self, kind: &str) -> Vec<serde_json::Value> {
        self.audit().into_iter().filter(|e| e["kind"] == kind).collect()
    }

    /// Changes the database behind the provider's back.
    pub(crate) fn sql(&self, statement: &'static str) {
        self.try_sql(statement).expect(statement);
    }

    /// The same; what the database says where it refuses.
    pub(crate) fn try_sql(&self, statement: &'static str) -> Result<(), String> {
        let runtime = tokio::runtime::Runtime::new().expect("a runtime");
        runtime.block_on(async {
            let db = Database::open(&self.path("keys/keys.db"), false).await.expect("opens");
            let mut tx = db.write().await.expect("begins");
            let done = sqlx::query(statement).execute(&mut *tx).await;
            tx.commit().await.expect("committed");
            db.close().await;
            done.map(drop).map_err(|e| e.to_string())
        })
    }

    /// The same while no provider runs, for what one reads at its start.
    pub(crate) fn stopped_sql(&mut self, statement: &'static str) {
        self.provider.kill();
        self.sql(statement);
        self.provider = Provider::start(&self.path("keys"));
    }

    /// Kills the provider and brings it back from a backup.
    pub(crate) fn restore(&mut self, backup: &str) {
        self.provider.kill();
        for file in ["keys.db", "keys.db-wal", "keys.db-shm"] {
            let _ = std::fs::remove_file(self.path("keys").join(file));
        }
        let restored =
            keys_command().args(["restore", "--dir", &self.text("keys"), "--from", &self.text(backup)]).output();
        good(restored.expect("runs"));
        self.provider = Provider::start(&self.path("keys"));
    }

    /// What SQLite says of the database.
    pub(crate) fn integrity(&self) -> String {
        let runtime = tokio::runtime::Runtime::new().expect("a runtime");
        runtime.block_on(async {
            let db = Database::open(&self.path("keys/keys.db"), false).await.expect("opens");
            let mut reader = db.read().await.expect("reads");
            let (said,): (String,) =
                sqlx::query_as("PRAGMA integrity_check").fetch_one(&mut *reader).await.expect("checked");
            said
        })
    }

    /// Kills the provider and starts another one on the same folder.
    pub(crate) fn restart(&mut self) {
        self.provider.kill();
        self.provider = Provider::start(&self.path("keys"));
    }
}

/// An anchor that names no key of the volume's.
pub(crate) fn anchor(volume: VolumeId, writer: u32, epoch: u8) -> VolumeAnchor {
    anchor_of(volume, writer, epoch, KeyId(0))
}

/// An anchor as far as the provider looks at it.
pub(crate) fn anchor_of(volume: VolumeId, writer: u32, epoch: u8, key: KeyId) -> VolumeAnchor {
    let mut bytes = [0; VolumeAnchor::LENGTH];
    bytes[0] = 1;
    bytes[4..20].copy_from_slice(&volume.0);
    bytes[20..24].copy_from_slice(&writer.to_be_bytes());
    bytes[31] = epoch;
    bytes[104..112].copy_from_slice(&key.0.to_be_bytes());
    VolumeAnchor::from_bytes(&bytes).expect("an anchor")
}

/// An anchor as the tool takes it.
pub(crate) fn text_of(anchor: &VolumeAnchor) -> String {
    policy::Base64Url::from(&anchor.as_bytes()[..]).to_string()
}

#[track_caller]
pub(crate) fn good(output: Output) -> String {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).expect("text")
}
