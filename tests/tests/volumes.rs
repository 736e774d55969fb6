//! A volume's life between `fealty-disk` and its key provider, both as real processes: operations that the customer's policy tells
//! apart, keys that are issued, changed and retired, clones; and all of it cut off by SIGKILL at moments of no choice.

use fealty_tests::process::{Background, Ended, program, run};
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

const LIMIT: Duration = Duration::from_secs(120);
const MIB: usize = 1 << 20;
const ALL: &str = r#"permit (principal, action in [Action::"volume.revert", Action::"volume.rekey",
    Action::"volume.rewrap", Action::"volume.clone", Action::"volume.erase"], resource);"#;

/// A provider with the customer `acme`.
struct Keys {
    dir: tempfile::TempDir,
    provider: Option<Background>,
    listen: String,
    policies: u64,
}

impl Keys {
    fn new(rules: &str) -> Self {
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
    fn with_volume(rules: &str) -> (Self, Vec<u8>) {
        let keys = Self::new(rules);
        let image = image(1);
        keys.import("root", &image);
        (keys, image)
    }

    fn import(&self, name: &str, image: &[u8]) {
        std::fs::write(self.path("root.img"), image).expect("written");
        self.keys(&["volume", "create", "acme", name]).good();
        let volume = self.volume(name);
        self.exec(name, &["import", &self.text("root.img"), &volume]).good();
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn text(&self, name: &str) -> String {
        self.path(name).display().to_string()
    }

    fn volume(&self, name: &str) -> String {
        self.text(&format!("{name}.vol"))
    }

    /// Starts the provider, on the address that it had before.
    fn serve(&mut self) {
        let words = ["serve", "--dir", &self.text("keys"), "--listen", &self.listen];
        let mut provider = Background::start(Command::new(program("fealty-keys")).args(words));
        provider.until("ready https://", LIMIT);
        let printed = provider.out();
        let port = printed.trim().rsplit(':').next().expect("a port").to_owned();
        self.listen = format!("127.0.0.1:{port}");
        self.provider = Some(provider);
    }

    fn url(&self) -> String {
        self.listen.replace("127.0.0.1", "https://localhost")
    }

    fn tool(&self, name: &str, words: &[&str]) -> Ended {
        run(Command::new(program(name)).args(words).current_dir(self.dir.path()), LIMIT)
    }

    fn keys(&self, words: &[&str]) -> Ended {
        let (profile, url) = (self.text("keys/admin.json"), self.url());
        self.tool("fealty-keys", &[&["--profile", &profile, "--url", &url], words].concat())
    }

    fn set_policy(&mut self, rules: &str) {
        self.policies += 1;
        let lease = r#""lease": {"seconds": 60, "quiesce_seconds": 10}"#;
        let text = format!("{{\"version\": {}, \"customer\": \"acme\", {lease}}}\n---\n{rules}\n", self.policies);
        std::fs::write(self.path("policy.txt"), text).expect("written");
        let (file, key) = (self.text("policy.txt"), self.text("policy.key"));
        self.keys(&["policy", "set", "acme", &file, "--policy-key", &key]).good();
    }

    /// `fealty-disk` with the volume's keys, not yet started. It writes its process id to the file `pid`.
    fn command(&self, name: &str, words: &[&str]) -> Command {
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

    fn exec(&self, name: &str, words: &[&str]) -> Ended {
        run(&mut self.command(name, words), LIMIT)
    }

    /// The same with `--json`: its last line.
    fn json(&self, name: &str, words: &[&str]) -> Value {
        let out = self.exec(name, &[words, &["--json"]].concat()).good().out;
        serde_json::from_str(out.lines().last().expect("a line")).expect("JSON")
    }

    /// Starts it, and kills it with SIGKILL after `delay`, if it still runs.
    fn killed(&self, name: &str, words: &[&str], delay: Duration) -> Ended {
        let _ = std::fs::remove_file(self.path("pid"));
        let running = Background::start(&mut self.command(name, words));
        let begun = Instant::now();
        while !self.path("pid").exists() {
            assert!(begun.elapsed() < LIMIT, "it does not begin");
            std::thread::sleep(Duration::from_millis(1));
        }
        std::thread::sleep(delay);
        let pid = std::fs::read_to_string(self.path("pid")).expect("a number");
        let _ = Command::new("kill").args(["-9", pid.trim()]).output();
        running.end(LIMIT)
    }

    /// How long it runs when nobody kills it.
    fn duration(&self, name: &str, words: &[&str]) -> Duration {
        let begun = Instant::now();
        self.exec(name, words).good();
        begun.elapsed()
    }

    /// What the operator can see.
    fn plain(&self, name: &str) -> Value {
        let out = self.tool("fealty-disk", &["info", &self.volume(name), "--json"]).good().out;
        serde_json::from_str(&out).expect("JSON")
    }

    /// What the volume holds; it must be whole.
    #[track_caller]
    fn content(&self, name: &str) -> Vec<u8> {
        self.exec(name, &["check", &self.volume(name)]).good();
        let image = self.text("exported.img");
        self.exec(name, &["export", &self.volume(name), &image, "--force"]).good();
        std::fs::read(image).expect("an image")
    }

    #[track_caller]
    fn holds(&self, name: &str, image: &[u8]) {
        let found = self.content(name);
        let (same, more) = found.split_at(image.len());
        assert!(same == image && more.iter().all(|b| *b == 0), "volume {name} holds something else");
    }

    fn listed(&self, name: &str) -> Value {
        let out = self.keys(&["volume", "list", "acme", "--json"]).good().out;
        let all = out.lines().map(|line| serde_json::from_str::<Value>(line).expect("JSON"));
        all.into_iter().find(|v| v["name"] == name).unwrap_or_else(|| panic!("no volume {name}"))
    }

    /// The audit log's events about operations, each as one word.
    fn story(&self) -> Vec<String> {
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

    fn events(&self) -> Vec<Value> {
        let out = self.keys(&["audit", "list", "acme", "--json"]).good().out;
        out.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect()
    }

    fn event(&self, kind: &str) -> Value {
        self.events().into_iter().rfind(|e| e["kind"] == kind).unwrap_or_else(|| panic!("no {kind}"))
    }
}

/// An image of 4 MiB, half of it filled with what `seed` says.
fn image(seed: u64) -> Vec<u8> {
    let mut random = Random(seed);
    let mut out = vec![0; 4 * MIB];
    for block in out.chunks_mut(4096).step_by(2) {
        block.chunks_mut(8).for_each(|word| word.copy_from_slice(&random.number().to_le_bytes()));
    }
    out
}

/// Random numbers from a seed (SplitMix64).
struct Random(u64);

impl Random {
    fn number(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A moment within `all`.
    fn moment(&mut self, all: Duration) -> Duration {
        all.mul_f64((self.number() >> 11) as f64 / (1_u64 << 53) as f64)
    }
}

/// Seeds differ from run to run, and are printed; FEALTY_SEED=N repeats one.
fn random() -> Random {
    let given = std::env::var("FEALTY_SEED").ok().and_then(|seed| seed.parse().ok());
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).expect("after 1970");
    let seed = given.unwrap_or(now.as_nanos() as u64);
    println!("FEALTY_SEED={seed}");
    Random(seed)
}

#[test]
fn operations_are_told_apart_and_logged_before_and_after() {
    let (mut keys, image) = Keys::with_volume("");
    let (volume, copy) = (keys.volume("root"), keys.volume("copy"));
    let snapshot = keys.json("root", &["snapshot", "take", &volume, "--name", "s"])["snapshot"].to_string();
    let operations: [(&str, Vec<&str>); 5] = [
        ("volume.revert", vec!["snapshot", "revert", &volume, &snapshot]),
        ("volume.rekey", vec!["rekey", &volume]),
        ("volume.rewrap", vec!["rewrap", &volume]),
        ("volume.clone", vec!["clone", &volume, &copy, "--name", "copy"]),
        ("volume.erase", vec!["erase", &volume, "--force"]),
    ];
    let mut told = keys.story();
    for (permitted, _) in &operations {
        keys.set_policy(&format!(
            "permit (principal, action == Action::\"{permitted}\", resource == Volume::\"root\");"
        ));
        for (operation, words) in &operations {
            let ended = keys.exec("root", words);
            if operation == permitted {
                ended.good();
                told.push(format!("{operation} permitted"));
                told.extend((*operation == "volume.rewrap").then(|| "volume-rewrapped".to_owned()));
                told.extend((*operation == "volume.clone").then(|| "volume-resized".to_owned()));
                told.extend((*operation == "volume.erase").then(|| "volume-retired".to_owned()));
                told.push(format!("{operation} ended: true"));
            } else {
                assert_eq!(ended.code, Some(4), "{}", ended.err);
                assert!(
                    ended.err.contains(&format!("no rule of the policy permits {operation} of volume root")),
                    "{}",
                    ended.err
                );
                assert_eq!(ended.err.trim_end().lines().count(), 1, "{}", ended.err);
                told.push(format!("{operation} refused"));
            }
            assert_eq!(keys.story(), told);
        }
        if *permitted != "volume.erase" {
            keys.holds("root", &image);
        }
    }
    let refused = keys.event("operation-refused");
    assert_eq!(refused["volume"], keys.listed("root")["volume"]);
    assert!(refused["actor"]["admin"].is_string(), "{refused}");
}

#[test]
fn a_rekey_gets_a_key_id_of_its_own_each_time() {
    let (keys, image) = Keys::with_volume(ALL);
    let volume = keys.volume("root");
    let mut ids = vec![keys.plain("root")["key_id"].clone()];
    for _ in 0..2 {
        let rekeyed = keys.json("root", &["rekey", &volume]);
        assert_eq!((&rekeyed["older_keys"], &rekeyed["key_id"]), (&0.into(), &keys.plain("root")["key_id"]));
        assert_eq!(keys.event("operation-permitted")["details"]["key_id"], rekeyed["key_id"]);
        assert!(!ids.contains(&rekeyed["key_id"]), "a key id twice");
        ids.push(rekeyed["key_id"].clone());
        keys.holds("root", &image);
        assert_eq!(keys.plain("root")["key_id"], rekeyed["key_id"], "nobody asked for another");
    }
}

#[test]
fn a_rewrapped_volume_opens_with_its_new_key_and_the_old_one_is_gone() {
    let (mut keys, image) = Keys::with_volume(ALL);
    let volume = keys.volume("root");
    let before = keys.plain("root")["kek_id"].clone();
    let rewrapped = keys.json("root", &["rewrap", &volume]);
    assert_eq!(rewrapped["kek_id"], keys.plain("root")["kek_id"]);
    assert_ne!(rewrapped["kek_id"], before);
    let event = keys.event("volume-rewrapped");
    assert_eq!((&event["details"]["old_kek"], &event["details"]["kek"]), (&before, &rewrapped["kek_id"]));
    keys.holds("root", &image);
    // It stands in no place of the provider's any more: not by its id either.
    keys.provider = None;
    keys.serve();
    keys.holds("root", &image);
    assert_ne!(keys.json("root", &["rewrap", &volume])["kek_id"], rewrapped["kek_id"]);
}

#[test]
fn an_erased_volume_is_retired_and_never_released_again() {
    let (keys, _) = Keys::with_volume(ALL);
    let (volume, copy) = (keys.volume("root"), keys.text("copied-before"));
    std::fs::copy(&volume, &copy).expect("copied");
    // Not another volume's file.
    keys.import("other", &image(2));
    let refused = keys.exec("root", &["erase", &keys.volume("other"), "--force"]).refused();
    assert!(refused.err.contains("but the keys are for volume"), "{}", refused.err);
    keys.holds("other", &image(2));
    assert_eq!(keys.json("root", &["erase", &volume, "--force"])["retired"], true);
    assert_eq!(keys.listed("root")["retired"], true);
    for path in [&volume, &copy] {
        let refused = keys.exec("root", &["export", path, "-"]).refused();
        assert!(refused.err.contains("retired, for good"), "{}", refused.err);
    }
    assert_eq!(keys.tool("fealty-disk", &["info", &volume]).code, Some(3));
    // A file that is lost.
    keys.keys(&["volume", "retire", "acme", "other"]).refused();
    keys.keys(&["volume", "retire", "acme", "other", "--force"]).good();
    keys.exec("other", &["check", &keys.volume("other")]).refused();
    assert!(keys.keys(&["volume", "list", "acme"]).good().out.lines().all(|line| line.ends_with("erased")));
    keys.keys(&["volume", "retire", "acme", "other", "--force"]).refused();
}

#[test]
fn the_provider_learns_a_volumes_size() {
    let (keys, image) = Keys::with_volume(ALL);
    assert_eq!(keys.listed("root")["size"], image.len());
    let volume = keys.volume("root");
    keys.exec("root", &["resize", &volume, "--size", "8M"]).good();
    assert_eq!(keys.listed("root")["size"], 8 * MIB);
    let event = keys.event("volume-resized");
    let (before, size) = (image.len().to_string(), (8 * MIB).to_string());
    assert_eq!((&event["details"]["before"], &event["details"]["size"]), (&before.into(), &size.into()));
    let told = keys.story().len();
    keys.exec("root", &["snapshot", "take", &volume, "--name", "s"]).good();
    assert_eq!(keys.story().len(), told, "nothing new");
    keys.holds("root", &image);
}

#[test]
fn a_clone_is_a_volume_of_its_own() {
    let (keys, image) = Keys::with_volume(ALL);
    let (volume, copy) = (keys.volume("root"), keys.volume("copy"));
    let cloned = keys.json("root", &["clone", &volume, &copy, "--name", "copy"]);
    assert_eq!(cloned["volume"], keys.listed("copy")["volume"]);
    assert_eq!((&cloned["of"], &cloned["data"]), (&keys.listed("root")["volume"], &(image.len() / 2).into()));
    assert_eq!(keys.event("operation-permitted")["details"]["clone"], cloned["volume"]);
    for id in ["volume", "key_id", "kek_id"] {
        assert_ne!(keys.plain("copy")[id], keys.plain("root")[id], "{id}");
    }
    // Each opens with its own session only, and lives when the other is gone.
    assert_eq!(keys.exec("root", &["check", &copy]).code, Some(3));
    let refused = keys.exec("root", &["clone", &volume, &keys.volume("more"), "--name", "copy"]).refused();
    assert!(refused.err.contains("has a volume copy already"), "{}", refused.err);
    assert!(!Path::new(&keys.volume("more")).exists());
    assert_eq!(keys.json("copy", &["rekey", &copy])["older_keys"], 0);
    keys.exec("root", &["erase", &volume, "--force"]).good();
    keys.holds("copy", &image);
    assert_eq!(keys.listed("copy")["size"], image.len());
}

#[test]
fn a_clone_of_a_snapshot_fills_a_volume_that_was_never_filled() {
    let (keys, image) = Keys::with_volume(ALL);
    let volume = keys.volume("root");
    let snapshot = keys.json("root", &["snapshot", "take", &volume, "--name", "s"])["snapshot"].to_string();
    keys.exec("root", &["resize", &volume, "--size", "8M"]).good();
    let waiting = keys.keys(&["volume", "create", "acme", "copy"]).good().out;
    let words = ["clone", &volume, &keys.volume("copy"), "--name", "copy", "--snapshot", &snapshot];
    assert!(waiting.contains(keys.json("root", &words)["volume"].as_str().expect("an id")), "{waiting}");
    assert!(keys.content("copy") == image, "the snapshot's size and content");
    let refused = keys.exec("root", &["clone", &volume, &volume, "--name", "more", "--force"]).refused();
    assert!(refused.err.contains("are the same file"), "{}", refused.err);
}

#[test]
fn a_volume_that_was_not_closed_is_recovered_before_it_is_cloned() {
    let (keys, image) = Keys::with_volume(ALL);
    let (volume, socket) = (keys.volume("root"), keys.text("socket"));
    let mut serving = Background::start(&mut keys.command("root", &["serve", &volume, "--nbd", &socket]));
    serving.until("ready: volume", LIMIT);
    let pid = std::fs::read_to_string(keys.path("pid")).expect("a number");
    Command::new("kill").args(["-9", pid.trim()]).output().expect("killed");
    assert_eq!(serving.end(LIMIT).code, Some(128 + 9));
    assert_eq!(keys.plain("root")["closed"], false);
    keys.exec("root", &["clone", &volume, &keys.volume("copy"), "--name", "copy"]).good();
    keys.holds("copy", &image);
    keys.holds("root", &image);
}

#[test]
fn a_volume_is_rekeyed_while_it_is_lent_and_goes_on_after_each_stop() {
    let (keys, image) = Keys::with_volume(ALL);
    let (volume, socket) = (keys.volume("root"), keys.text("socket"));
    let words = ["serve", &volume, "--nbd", &socket, "--rekey"];
    let first = keys.plain("root")["key_id"].clone();
    for signal in ["-9", "-TERM"] {
        let mut serving = Background::start(&mut keys.command("root", &words));
        serving.until("ready: volume", LIMIT);
        let pid = std::fs::read_to_string(keys.path("pid")).expect("a number");
        Command::new("kill").args([signal, pid.trim()]).output().expect("killed");
        serving.end(LIMIT);
        keys.holds("root", &image);
    }
    let mut serving = Background::start(&mut keys.command("root", &words));
    serving.until("no older key is needed any more", LIMIT);
    let pid = std::fs::read_to_string(keys.path("pid")).expect("a number");
    Command::new("kill").args(["-TERM", pid.trim()]).output().expect("asked");
    serving.end(LIMIT).good();
    let found = keys.plain("root")["key_id"].clone();
    assert_ne!(found, first);
    keys.holds("root", &image);
    assert_eq!(keys.json("root", &["info", &volume])["older_keys"], 0);
    assert_eq!(keys.story().last().map(String::as_str), Some("volume.rekey ended: true"));
    let refused = keys.exec("root", &[&words[..], &["--read-only"]].concat());
    assert_eq!(refused.code, Some(2), "{}", refused.err);
}

/// How often each operation is killed.
const KILLS: usize = 5;

/// Kills `words` at random moments of its work. Whenever it was, the volume is whole and holds `image`, and `words` goes on to its end.
fn killed_again_and_again(words: &[&str]) -> Keys {
    let (keys, image) = Keys::with_volume(ALL);
    let volume = keys.volume("root");
    let words: Vec<&str> = words.iter().map(|word| if *word == "VOLUME" { &volume } else { *word }).collect();
    let (mut random, whole, mut kills) = (random(), keys.duration("root", &words), 0);
    for _ in 0..KILLS {
        let ended = keys.killed("root", &words, random.moment(whole));
        kills += usize::from(ended.code == Some(128 + 9));
        assert!(matches!(ended.code, Some(0 | 137)), "{}", ended.err);
        keys.holds("root", &image);
    }
    assert!(kills > 0, "it was never killed");
    keys.exec("root", &words).good();
    keys.holds("root", &image);
    keys
}

#[test]
fn a_killed_rekey_goes_on_under_the_same_key() {
    let keys = killed_again_and_again(&["rekey", "VOLUME"]);
    assert_eq!(keys.json("root", &["info", &keys.volume("root")])["older_keys"], 0);
    // What was cut off is told of.
    let ended = keys.story().into_iter().filter(|told| told == "volume.rekey ended: not said").count();
    assert!(ended > 0, "{:?}", keys.story());
}

#[test]
fn a_killed_rewrap_never_locks_anybody_out() {
    let keys = killed_again_and_again(&["rewrap", "VOLUME"]);
    assert!(keys.story().contains(&"volume-rewrapped".to_owned()));
}

#[test]
fn a_killed_snapshot_leaves_a_whole_volume() {
    killed_again_and_again(&["snapshot", "take", "VOLUME", "--name", "s"]);
}

#[test]
fn a_killed_revert_leaves_one_of_both() {
    let (keys, image) = Keys::with_volume(ALL);
    let volume = keys.volume("root");
    let snapshot = keys.json("root", &["snapshot", "take", &volume, "--name", "s"])["snapshot"].to_string();
    let words = ["snapshot", "revert", &volume, &snapshot];
    let (mut random, whole) = (random(), keys.duration("root", &words));
    for _ in 0..KILLS {
        keys.killed("root", &words, random.moment(whole));
        keys.holds("root", &image);
    }
    keys.exec("root", &words).good();
    keys.holds("root", &image);
}

#[test]
fn a_killed_resize_has_one_of_both_sizes() {
    let (keys, image) = Keys::with_volume(ALL);
    let (volume, mut random) = (keys.volume("root"), random());
    let whole = keys.duration("root", &["resize", &volume, "--size", "5M"]);
    for size in 6..6 + KILLS {
        let words = ["resize", &volume, "--size", &format!("{size}M")];
        keys.killed("root", &words, random.moment(whole));
        let found = keys.content("root");
        assert!(found.len() == size * MIB || found.len() < size * MIB, "{}", found.len());
        assert!(found[..image.len()] == image[..] && found[image.len()..].iter().all(|b| *b == 0));
        // The provider learns what it missed.
        keys.exec("root", &words).good();
        assert_eq!(keys.listed("root")["size"], size * MIB);
    }
}

#[test]
fn a_killed_clone_is_begun_again_under_its_name() {
    let (keys, image) = Keys::with_volume(ALL);
    let volume = keys.volume("root");
    let clone = |name: &str| ["clone", &volume, &keys.volume(name), "--name", name].map(str::to_owned);
    let words = |clone: &[String; 5]| clone.iter().map(String::as_str).map(str::to_owned).collect::<Vec<_>>();
    let first = words(&clone("first"));
    let first: Vec<&str> = first.iter().map(String::as_str).collect();
    let (mut random, whole) = (random(), keys.duration("root", &first));
    for round in 0..KILLS {
        let name = format!("copy{round}");
        let again = words(&clone(&name));
        let again: Vec<&str> = again.iter().map(String::as_str).collect();
        let ended = keys.killed("root", &again, random.moment(whole));
        keys.holds("root", &image);
        if keys.listed_anchor(&name) {
            keys.holds(&name, &image);
        } else {
            assert_ne!(ended.code, Some(0));
            // Killed between its name and its anchor, it stands there and opens for nobody.
            keys.exec("root", &[&again[..], &["--force"]].concat()).good();
        }
        keys.holds(&name, &image);
    }
}

impl Keys {
    /// Whether the provider has an anchor of a volume.
    fn listed_anchor(&self, name: &str) -> bool {
        let out = self.keys(&["volume", "list", "acme", "--json"]).good().out;
        let all = out.lines().map(|line| serde_json::from_str::<Value>(line).expect("JSON"));
        all.into_iter().any(|v| v["name"] == name && !v["anchor"].is_null())
    }
}

#[test]
fn a_killed_erasure_is_none_or_can_be_done_again_by_anybody() {
    let keys = Keys::new(ALL);
    let (mut random, image) = (random(), image(3));
    keys.import("first", &image);
    let whole = keys.duration("first", &["erase", &keys.volume("first"), "--force"]);
    for round in 0..KILLS {
        let name = format!("v{round}");
        keys.import(&name, &image);
        let volume = keys.volume(&name);
        keys.killed(&name, &["erase", &volume, "--force"], random.moment(whole));
        if keys.listed(&name)["retired"] == false {
            keys.holds(&name, &image);
            continue;
        }
        keys.exec(&name, &["export", &volume, "-"]).refused();
        let again = keys.tool("fealty-disk", &["erase", &volume, "--force"]);
        assert!(again.code == Some(0) || again.err.contains("this is no fealty volume"), "{}", again.err);
        assert_eq!(keys.tool("fealty-disk", &["info", &volume]).code, Some(3));
    }
}

/// The provider is killed and comes back: whoever waits for its answer waits, and what it did is done once.
#[test]
fn operations_outlive_a_killed_provider() {
    let (mut keys, image) = Keys::with_volume(ALL);
    let (volume, mut random) = (keys.volume("root"), random());
    for operation in ["rekey", "rewrap", "rewrap", "rekey"] {
        let whole = keys.duration("root", &[operation, &volume]);
        let running = Background::start(&mut keys.command("root", &[operation, &volume]));
        std::thread::sleep(random.moment(whole));
        keys.provider = None;
        keys.serve();
        let ended = running.end(LIMIT);
        // Only the session's beginning is not asked for twice.
        assert!(
            ended.code == Some(0) || !keys.path("pid").exists() || ended.err.contains("fealty-keys: "),
            "{}",
            ended.err
        );
        keys.holds("root", &image);
    }
}
