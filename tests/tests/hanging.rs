//! A VM beside a provider that is away, hangs or takes its time, or a store that hangs: what can be done without them is done.

use fealty_tests::lab::{LIMIT, Lab, Plan, lease};
use fealty_tests::process::Background;
use serde_json::json;
use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Seals a VM with two disks: FLUSH of `root` waits for anchors, `data` has none before it is closed.
fn seal_two(lab: &Lab, words: &str) {
    let disk = |name: &str, mode: &str| json!({"id": name, "volume": lab.volume_id(name), "anchor_mode": mode});
    lab.seal_disks(words, &[disk("root", "flush"), disk("data", "close")]);
}

fn two_disks(settings: String) -> Lab {
    let lab = Lab::new(&Plan { settings, ..Plan::default() });
    lab.make_volume("data", &vec![0; 1 << 20]);
    lab
}

/// What is written to `data` nobody flushes.
const WRITES: &str = "hello,disk:1,write:9:0x22,disk:0,write:9:0x11";
const VERIFIES: &str = "verify:9:0x11,disk:1,verify:9:0x22,poweroff";

#[track_caller]
fn wait(what: &str, mut done: impl FnMut() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < LIMIT, "{what} did not happen");
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// Has the guest flush `root`, which waits for a provider that `signal` keeps from answering.
fn flush_that_waits(lab: &mut Lab, more: &[&str], signal: i32) -> Background {
    seal_two(lab, &format!("{WRITES},wait-button,flush,tick"));
    let mut vm = Background::start(&mut lab.vm(&[&["--grace", "600"], more].concat()));
    vm.until("waiting for the button", LIMIT);
    match signal {
        19 => lab.provider.as_ref().expect("a provider").signal(signal),
        signal => lab.stop_provider(signal),
    }
    vm.signal(15);
    vm.until("button pressed", LIMIT);
    vm
}

#[test]
fn attack_45_a_flush_that_waits_for_its_anchor_keeps_no_volume_from_being_flushed_before_the_keys_go() {
    for signal in [9, 19] {
        let mut lab = two_disks(lease(12, 5));
        let mut vm = flush_that_waits(&mut lab, &[], signal);
        vm.until("keys-wiped", LIMIT);
        assert!(vm.err().contains("no vCPU runs, volumes are flushed"), "{}", vm.err());
        vm.signal(15);
        if signal == 19 {
            std::thread::sleep(Duration::from_secs(1));
            lab.provider.as_ref().expect("a provider").signal(18);
        }
        let ended = vm.end(LIMIT);
        assert_eq!(ended.code, Some(14), "{}", ended.err);
        assert!(ended.err.contains("its volumes are flushed"), "{}", ended.err);
        if signal == 9 {
            lab.start_provider();
        }
        seal_two(&lab, VERIFIES);
        let again = lab.run_vm(&[]).good();
        assert_eq!(again.out.matches("verify 9 ok").count(), 2, "{}", again.out);
    }
}

#[test]
fn a_vm_whose_flush_waits_for_its_anchor_can_be_paused_and_goes_on() {
    let mut lab = two_disks(lease(600, 10));
    let socket = lab.text("api.sock");
    let mut vm = flush_that_waits(&mut lab, &["--api-socket", &socket], 19);
    let ctl = |word: &str| lab.run_tool("fealty", &["ctl", &socket, word]);
    ctl("pause").good();
    assert!(ctl("info").good().out.contains("paused by the operator"));
    ctl("resume").good();
    std::thread::sleep(Duration::from_secs(1));
    assert!(!vm.out().contains("flush ok") && !vm.out().contains("disk error"), "{}", vm.out());
    lab.provider.as_ref().expect("a provider").signal(18);
    vm.until("flush ok", LIMIT);
    vm.signal(15);
    vm.end(LIMIT);
}

/// A file system that can be frozen: whoever writes to it then hangs.
struct Freezer {
    place: PathBuf,
}

impl Freezer {
    /// One at `place`; none where the kernel has no loop devices, or keeps them and mounts from whoever runs this.
    fn new(image: &Path, place: PathBuf) -> Option<Self> {
        if let Err(error) = std::fs::File::options().read(true).write(true).open("/dev/loop-control") {
            let excused = error.kind() == std::io::ErrorKind::NotFound || !rustix::process::geteuid().is_root();
            assert!(excused, "/dev/loop-control: {error}");
            eprintln!("NOT TESTED: no file system to freeze: {error}");
            return None;
        }
        std::fs::File::create(image).and_then(|file| file.set_len(64 << 20)).expect("room");
        std::fs::create_dir(&place).expect("a folder");
        Self::command("mkfs.ext4", &["-q".as_ref(), image]);
        let mounted = Command::new("mount").args(["-o", "loop"]).arg(image).arg(&place).output().expect("mount runs");
        if !mounted.status.success() {
            // Root in a container may not.
            eprintln!("NOT TESTED: no file system to freeze: {}", String::from_utf8_lossy(&mounted.stderr).trim());
            return None;
        }
        Some(Self { place })
    }

    /// Freezes it, as long as what this returns lives: nobody who hangs there can be killed.
    fn freeze(&self) -> Frozen<'_> {
        Self::command("fsfreeze", &["-f".as_ref(), &self.place]);
        Frozen(self)
    }

    #[track_caller]
    fn command(name: &str, words: &[&Path]) {
        let status = Command::new(name).args(words).status().unwrap_or_else(|error| panic!("{name}: {error}"));
        assert!(status.success(), "{name}: {status}");
    }
}

impl Drop for Freezer {
    fn drop(&mut self) {
        // Not at once where somebody is still there, after a test that failed.
        let _ = Command::new("umount").arg("--lazy").arg(&self.place).status();
    }
}

struct Frozen<'a>(&'a Freezer);

impl Drop for Frozen<'_> {
    fn drop(&mut self) {
        let _ = Command::new("fsfreeze").arg("-u").arg(&self.0.place).status();
    }
}

/// A laboratory whose volume `root` lies where it can be frozen, and the words that say so.
fn freezable(settings: String, words: &str) -> Option<(Lab, Freezer, Vec<String>)> {
    let lab = two_disks(settings);
    let freezer = Freezer::new(&lab.path("freezer.img"), lab.path("freezer"))?;
    let there = freezer.place.join("root.vol");
    std::fs::copy(lab.volume("root"), &there).expect("copied");
    let disk = |name: &str| json!({"id": name, "volume": lab.volume_id(name), "anchor_mode": "interval"});
    lab.seal_disks(words, &[disk("root"), disk("data")]);
    let map = vec!["--map".to_owned(), format!("root={}", there.display())];
    Some((lab, freezer, map))
}

fn words(map: &[String]) -> Vec<&str> {
    map.iter().map(String::as_str).collect()
}

#[test]
fn a_store_that_hangs_keeps_no_other_volume_from_being_closed_and_the_end_says_for_what_it_waits() {
    let Some((lab, freezer, map)) = freezable(lease(600, 10), &format!("{WRITES},tick")) else { return };
    let mut vm = Background::start(&mut lab.vm(&words(&map)));
    vm.until("tick", LIMIT);
    let frozen = freezer.freeze();
    vm.signal(15);
    vm.until("power-button", LIMIT);
    vm.signal(15);
    vm.until("volume-closed: data", LIMIT);
    vm.until("root: its store has not answered", LIMIT);
    drop(frozen);
    let ended = vm.end(LIMIT);
    assert_eq!(ended.code, Some(14), "{}", ended.err);
    assert!(ended.err.contains("its volumes are flushed"), "{}", ended.err);
    let disk = |name: &str| json!({"id": name, "volume": lab.volume_id(name), "anchor_mode": "interval"});
    lab.seal_disks(VERIFIES, &[disk("root"), disk("data")]);
    let again = lab.run_vm(&words(&map)).good();
    assert_eq!(again.out.matches("verify 9 ok").count(), 2, "{}", again.out);
}

#[test]
fn attack_45_a_store_that_hangs_keeps_no_other_volume_from_being_flushed_before_the_keys_go() {
    let guest = format!("{WRITES},load:600");
    let Some((lab, freezer, map)) = freezable(lease(12, 5), &guest) else { return };
    let mut vm = Background::start(&mut lab.vm(&words(&map)));
    vm.until("load started", LIMIT);
    // Its requests hang, and with them whoever pauses the machine.
    let frozen = freezer.freeze();
    lab.provider.as_ref().expect("a provider").signal(19);
    vm.until("keys-wiped", LIMIT);
    vm.signal(15);
    vm.until("power-button", LIMIT);
    vm.signal(15);
    vm.until("stopping", LIMIT);
    lab.provider.as_ref().expect("a provider").signal(18);
    std::thread::sleep(Duration::from_secs(1));
    drop(frozen);
    let ended = vm.end(LIMIT);
    assert!(matches!(ended.code, Some(8 | 14)), "{:?}: {}", ended.code, ended.err);
    let disk = |name: &str| json!({"id": name, "volume": lab.volume_id(name), "anchor_mode": "interval"});
    lab.seal_disks("disk:1,verify:9:0x22,poweroff", &[disk("root"), disk("data")]);
    let again = lab.run_vm(&words(&map)).good();
    assert!(again.out.contains("verify 9 ok"), "{}\n{}", again.out, ended.err);
}

/// A VM on a terminal.
struct Typed {
    script: Child,
    printed: PathBuf,
}

impl Typed {
    fn start(vm: &Command, printed: PathBuf) -> Self {
        let words: Vec<_> =
            std::iter::once(vm.get_program()).chain(vm.get_args()).map(|w| w.to_string_lossy()).collect();
        let file = std::fs::File::create(&printed).expect("made");
        let mut script = Command::new("script");
        script.args(["-qec", &words.join(" "), "/dev/null"]).stdin(Stdio::piped()).stdout(file);
        if let Some(folder) = vm.get_current_dir() {
            script.current_dir(folder);
        }
        Self { script: script.spawn().expect("script runs"), printed }
    }

    fn printed(&self) -> String {
        String::from_utf8_lossy(&std::fs::read(&self.printed).expect("there")).into_owned()
    }

    #[track_caller]
    fn until(&self, what: &str) {
        let begun = Instant::now();
        while !self.printed().contains(what) {
            assert!(begun.elapsed() < LIMIT, "no {what:?} in:\n{}", self.printed());
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    fn type_in(&mut self, keys: &[u8]) {
        self.script.stdin.as_mut().expect("a pipe").write_all(keys).expect("typed");
    }
}

impl Drop for Typed {
    fn drop(&mut self) {
        let _ = self.script.kill();
        let _ = self.script.wait();
    }
}

#[test]
fn attack_28_who_asks_on_the_terminal_how_a_vm_is_does_not_keep_its_keys_from_being_wiped() {
    let guest = format!("{WRITES},load:600");
    let Some((lab, freezer, map)) = freezable(lease(12, 5), &guest) else { return };
    let mut vm = Typed::start(&lab.vm(&words(&map)), lab.path("printed"));
    vm.until("load started");
    let frozen = freezer.freeze();
    lab.provider.as_ref().expect("a provider").signal(19);
    vm.until("lease-ends");
    std::thread::sleep(Duration::from_secs(1));
    vm.type_in(b"\x01c");
    vm.until("paused until its lease is renewed");
    vm.until("keys-wiped");
    drop(frozen);
    vm.type_in(b"\x01x");
    lab.provider.as_ref().expect("a provider").signal(18);
    vm.until("stopping");
    assert!(vm.script.wait().is_ok());
}

/// Stands before the provider, and passes on what it says a while later.
struct Slow {
    port: u16,
    delay_ms: Arc<AtomicU64>,
}

impl Slow {
    fn before(target: &str) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let port = listener.local_addr().expect("an address").port();
        let delay_ms = Arc::new(AtomicU64::new(0));
        let (target, delay) = (target.to_owned(), delay_ms.clone());
        std::thread::spawn(move || {
            for client in listener.incoming().flatten() {
                let server = TcpStream::connect(&target).expect("the provider");
                let (from, to, now) = (client.try_clone(), server.try_clone(), Arc::default());
                std::thread::spawn(move || pass_on(from.expect("a socket"), to.expect("a socket"), &now));
                let delay = delay.clone();
                std::thread::spawn(move || pass_on(server, client, &delay));
            }
        });
        Self { port, delay_ms }
    }

    fn url(&self) -> String {
        format!("https://localhost:{}", self.port)
    }

    fn delay(&self, by: Duration) {
        self.delay_ms.store(by.as_millis() as u64, Ordering::SeqCst);
    }
}

fn pass_on(mut from: TcpStream, mut to: TcpStream, delay_ms: &AtomicU64) {
    let mut bytes = vec![0; 1 << 20];
    while let Ok(count @ 1..) = from.read(&mut bytes) {
        std::thread::sleep(Duration::from_millis(delay_ms.load(Ordering::SeqCst)));
        if to.write_all(&bytes[..count]).is_err() {
            break;
        }
    }
    let _ = (from.shutdown(Shutdown::Both), to.shutdown(Shutdown::Both));
}

fn slow(lab: &Lab) -> Slow {
    let url = lab.url();
    Slow::before(url.trim_start_matches("https://"))
}

#[test]
fn a_lease_is_renewed_however_many_reports_a_slow_provider_is_still_to_take() {
    let lab = Lab::new(&Plan { settings: lease(16, 2), ..Plan::default() });
    let slow = slow(&lab);
    lab.seal_with("hello,tick", "interval", |_| {}, &["--provider", &slow.url()]);
    let socket = lab.text("api.sock");
    let mut vm = Background::start(&mut lab.vm(&["--api-socket", &socket]));
    vm.until("tick", LIMIT);
    slow.delay(Duration::from_secs(1));
    for word in ["pause", "resume"].repeat(15) {
        lab.run_tool("fealty", &["ctl", &socket, word]).good();
    }
    wait("a renewal, or the lease's end", || vm.err().contains("lease-renewed") || vm.err().contains("lease-ends"));
    assert!(vm.err().contains("lease-renewed"), "{}", vm.err());
    slow.delay(Duration::ZERO);
    fealty_tests::lab::stop(vm);
}

#[test]
fn the_end_of_a_vm_is_reported_to_a_slow_provider_before_anchors_that_nobody_waits_for() {
    let lab = Lab::new(&Plan { settings: lease(600, 10), ..Plan::default() });
    let slow = slow(&lab);
    let names = ["root", "a", "b", "c"];
    names[1..].iter().for_each(|name| lab.make_volume(name, &vec![0; 1 << 20]));
    let disk = |name: &&str| json!({"id": name, "volume": lab.volume_id(name), "anchor_mode": "interval"});
    let disks: Vec<_> = names.iter().map(disk).collect();
    let writes = "hello,write:9:1,disk:1,write:9:1,disk:2,write:9:1,disk:3,write:9:1,tick";
    lab.seal_with(writes, "interval", |config| config["disks"] = disks.into(), &["--provider", &slow.url()]);
    let mut vm = Background::start(&mut lab.vm(&[]));
    vm.until("tick", LIMIT);
    wait("the first report", || lab.audit_kinds().contains(&"report".into()));
    slow.delay(Duration::from_secs(8));
    vm.signal(15);
    vm.until("power-button", LIMIT);
    vm.signal(15);
    let ended = vm.end(LIMIT);
    assert_eq!(ended.code, Some(14), "{}", ended.err);
    assert!(!ended.err.contains("end-not-reported"), "{}", ended.err);
}

#[test]
fn a_slow_provider_keeps_the_last_anchors_of_a_vm_before_it_takes_its_last_reports() {
    let lab = two_disks(lease(600, 10));
    let slow = slow(&lab);
    let disk = |name: &str| json!({"id": name, "volume": lab.volume_id(name), "anchor_mode": "interval"});
    let disks = [disk("root"), disk("data")];
    let writes = format!("{WRITES},tick");
    lab.seal_with(&writes, "interval", |config| config["disks"] = disks.to_vec().into(), &["--provider", &slow.url()]);
    let socket = lab.text("api.sock");
    let mut vm = Background::start(&mut lab.vm(&["--api-socket", &socket]));
    vm.until("tick", LIMIT);
    wait("the first report", || lab.audit_kinds().contains(&"report".into()));
    slow.delay(Duration::from_millis(1500));
    for word in ["pause", "resume"].repeat(4) {
        lab.run_tool("fealty", &["ctl", &socket, word]).good();
    }
    vm.signal(15);
    vm.until("power-button", LIMIT);
    vm.signal(15);
    let ended = vm.end(LIMIT);
    assert_eq!(ended.code, Some(14), "{}", ended.err);
    assert_eq!(ended.err.matches("volume-closed").count(), 2, "{}", ended.err);
    assert!(!ended.err.contains("end-not-reported"), "{}", ended.err);
}
