//! A key provider with a customer and his volumes, for tests of `fealty-disk` and `fealty-keys` as real processes; and ways to cut them off.

use crate::process::{Background, Ended, program, run};
use serde_json::Value;
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

/// Far beyond what anything takes on a quiet machine.
pub const LIMIT: Duration = Duration::from_secs(120);
/// Bytes in a MiB.
pub const MIB: usize = 1 << 20;
/// Rules that permit every operation on a volume.
pub const ALL: &str = r#"permit (principal, action in [Action::"volume.revert", Action::"volume.rekey",
    Action::"volume.rewrap", Action::"volume.clone", Action::"volume.erase"], resource);"#;

/// A provider with the customer `acme`. Whatever fails in it panics: the test can't go on.
pub struct Keys {
    dir: tempfile::TempDir,
    /// Its process; none while it is down.
    pub provider: Option<Background>,
    listen: String,
    policies: u64,
}

impl Keys {
    /// With these rules in its policy.
    pub fn new(rules: &str) -> Self {
        let dir = tempfile::tempdir().expect("a folder");
        let mut keys = Self { dir, provider: None, listen: "127.0.0.1:0".into(), policies: 0 };
        let folder = keys.text("keys");
        keys.tool("fealty-keys", &["init", "--dir", &folder, "--name", "localhost"]).good();
        keys.serve();
        keys.keys(&["customer", "create", "acme", "--policy-key", &keys.text("policy.key")]).good();
        keys.set_policy(rules);
        keys
    }

    /// With a volume `root`, imported from an image that it returns.
    pub fn with_volume(rules: &str) -> (Self, Vec<u8>) {
        let keys = Self::new(rules);
        let image = image(1);
        keys.import("root", &image);
        (keys, image)
    }

    /// Makes a volume of an image.
    pub fn import(&self, name: &str, image: &[u8]) {
        std::fs::write(self.path("root.img"), image).expect("written");
        self.keys(&["volume", "create", "acme", name]).good();
        let volume = self.volume(name);
        self.exec(name, &["import", &self.text("root.img"), &volume]).good();
    }

    /// A path in its folder.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// The same as text.
    pub fn text(&self, name: &str) -> String {
        self.path(name).display().to_string()
    }

    /// Where a volume's file lies.
    pub fn volume(&self, name: &str) -> String {
        self.text(&format!("{name}.vol"))
    }

    /// Starts the provider, on the address that it had before.
    pub fn serve(&mut self) {
        let words = ["serve", "--dir", &self.text("keys"), "--listen", &self.listen];
        let mut provider = Background::start(Command::new(program("fealty-keys")).args(words));
        provider.until("ready https://", LIMIT);
        let printed = provider.out();
        let port = printed.trim().rsplit(':').next().expect("a port").to_owned();
        self.listen = format!("127.0.0.1:{port}");
        self.provider = Some(provider);
    }

    /// The provider's URL.
    pub fn url(&self) -> String {
        self.listen.replace("127.0.0.1", "https://localhost")
    }

    /// Runs one of the programs in its folder.
    pub fn tool(&self, name: &str, words: &[&str]) -> Ended {
        run(Command::new(program(name)).args(words).current_dir(self.dir.path()), LIMIT)
    }

    /// Runs `fealty-keys` as the first administrator.
    pub fn keys(&self, words: &[&str]) -> Ended {
        let (profile, url) = (self.text("keys/admin.json"), self.url());
        self.tool("fealty-keys", &[&["--profile", &profile, "--url", &url], words].concat())
    }

    /// Puts a policy with these rules in force.
    pub fn set_policy(&mut self, rules: &str) {
        self.policies += 1;
        let lease = r#""lease": {"seconds": 60, "quiesce_seconds": 10}"#;
        let text = format!("{{\"version\": {}, \"customer\": \"acme\", {lease}}}\n---\n{rules}\n", self.policies);
        std::fs::write(self.path("policy.txt"), text).expect("written");
        let (file, key) = (self.text("policy.txt"), self.text("policy.key"));
        self.keys(&["policy", "set", "acme", &file, "--policy-key", &key]).good();
    }

    /// `fealty-disk` with the volume's keys, not yet started. It writes its process id to the file `pid`.
    pub fn command(&self, name: &str, words: &[&str]) -> Command {
        let mut command = Command::new(program("fealty-keys"));
        command.args([
            "volume",
            "exec",
            "acme",
            name,
            "--profile",
            &self.text("keys/admin.json"),
            "--url",
            &self.url(),
        ]);
        command.args(["--", "sh", "-c", r#"echo $$ >pid.new; mv pid.new pid; exec "$0" "$@""#]);
        command.arg(program("fealty-disk")).args(words).current_dir(self.dir.path());
        command
    }

    /// Runs `fealty-disk` with the volume's keys.
    pub fn exec(&self, name: &str, words: &[&str]) -> Ended {
        run(&mut self.command(name, words), LIMIT)
    }

    /// The same with `--json`: its last line.
    pub fn json(&self, name: &str, words: &[&str]) -> Value {
        let out = self.exec(name, &[words, &["--json"]].concat()).good().out;
        serde_json::from_str(out.lines().last().expect("a line")).expect("JSON")
    }

    /// Starts it; it has its session by now.
    pub fn started(&self, name: &str, words: &[&str]) -> Background {
        let _ = std::fs::remove_file(self.path("pid"));
        let running = Background::start(&mut self.command(name, words));
        let begun = Instant::now();
        while !self.path("pid").exists() {
            assert!(begun.elapsed() < LIMIT, "it does not begin");
            std::thread::sleep(Duration::from_millis(1));
        }
        running
    }

    /// Starts it, and kills it with SIGKILL after `delay`, if it still runs.
    pub fn killed(&self, name: &str, words: &[&str], delay: Duration) -> Ended {
        let running = self.started(name, words);
        std::thread::sleep(delay);
        let pid = std::fs::read_to_string(self.path("pid")).expect("a number");
        let _ = Command::new("kill").args(["-9", pid.trim()]).output();
        running.end(LIMIT)
    }

    /// How long it runs when nobody kills it.
    pub fn duration(&self, name: &str, words: &[&str]) -> Duration {
        let begun = Instant::now();
        self.exec(name, words).good();
        begun.elapsed()
    }

    /// What the operator can see.
    pub fn plain(&self, name: &str) -> Value {
        let out = self.tool("fealty-disk", &["info", &self.volume(name), "--json"]).good().out;
        serde_json::from_str(&out).expect("JSON")
    }

    /// What the volume holds; it must be whole.
    #[track_caller]
    pub fn content(&self, name: &str) -> Vec<u8> {
        self.exec(name, &["check", &self.volume(name)]).good();
        let image = self.text("exported.img");
        self.exec(name, &["export", &self.volume(name), &image, "--force"]).good();
        std::fs::read(image).expect("an image")
    }

    /// The volume is whole, and holds `image` and then nothing.
    #[track_caller]
    pub fn holds(&self, name: &str, image: &[u8]) {
        let found = self.content(name);
        let (same, more) = found.split_at(image.len());
        assert!(same == image && more.iter().all(|b| *b == 0), "volume {name} holds something else");
    }

    /// What the provider says of a volume.
    pub fn listed(&self, name: &str) -> Value {
        let out = self.keys(&["volume", "list", "acme", "--json"]).good().out;
        let all = out.lines().map(|line| serde_json::from_str::<Value>(line).expect("JSON"));
        all.into_iter().find(|v| v["name"] == name).unwrap_or_else(|| panic!("no volume {name}"))
    }

    /// The audit log's events about operations, each as one word.
    pub fn story(&self) -> Vec<String> {
        let told = |e: &Value| {
            let details = &e["details"];
            let operation = details["operation"].as_str();
            match e["kind"].as_str()? {
                "operation-permitted" => Some(format!("{} permitted", operation?)),
                "operation-refused" => Some(format!("{} refused", operation?)),
                "operation-ended" => Some(format!("{} ended: {}", operation?, details["done"].as_str()?)),
                kind @ ("volume-retired" | "volume-rewrapped" | "volume-resized") => Some(kind.to_owned()),
                _ => None,
            }
        };
        self.events().iter().filter_map(told).collect()
    }

    /// The audit log.
    pub fn events(&self) -> Vec<Value> {
        let out = self.keys(&["audit", "list", "acme", "--json"]).good().out;
        out.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect()
    }

    /// The last event of a kind.
    pub fn event(&self, kind: &str) -> Value {
        self.events().into_iter().rfind(|e| e["kind"] == kind).unwrap_or_else(|| panic!("no {kind}"))
    }

    /// Whether the provider has an anchor of a volume.
    pub fn is_anchored(&self, name: &str) -> bool {
        let out = self.keys(&["volume", "list", "acme", "--json"]).good().out;
        let all = out.lines().map(|line| serde_json::from_str::<Value>(line).expect("JSON"));
        all.into_iter().any(|v| v["name"] == name && !v["anchor"].is_null())
    }
}

/// An image of 4 MiB, half of it filled with what `seed` says.
pub fn image(seed: u64) -> Vec<u8> {
    let mut random = Random(seed);
    let mut out = vec![0; 4 * MIB];
    for block in out.chunks_mut(4096).step_by(2) {
        block.chunks_mut(8).for_each(|word| word.copy_from_slice(&random.number().to_le_bytes()));
    }
    out
}

/// Random numbers from a seed (SplitMix64).
pub struct Random(pub u64);

impl Random {
    /// The next one.
    pub fn number(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A moment within `all`.
    pub fn moment(&mut self, all: Duration) -> Duration {
        all.mul_f64((self.number() >> 11) as f64 / (1_u64 << 53) as f64)
    }
}

/// Seeds differ from run to run, and are printed; FEALTY_SEED=N repeats one.
pub fn random() -> Random {
    let given = std::env::var("FEALTY_SEED").ok().and_then(|seed| seed.parse().ok());
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).expect("after 1970");
    let seed = given.unwrap_or(now.as_nanos() as u64);
    println!("FEALTY_SEED={seed}");
    Random(seed)
}
