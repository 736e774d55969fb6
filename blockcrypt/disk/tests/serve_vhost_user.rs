//! `fealty-disk serve --vhost-user` with QEMU and a Linux guest, whose fio verifies what it wrote; and with a front end that none
//! should be like.

mod disk_support;

use disk_support::server::{LIMIT, Server, system};
use disk_support::{Folder, Keeper};
use rustix::process::{Resource, Rlimit, Signal, getrlimit, prlimit};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

/// A guest that runs under QEMU without KVM, with two processors.
struct Guest {
    qemu: Child,
    lines: Receiver<String>,
    said: Vec<String>,
}

impl Guest {
    fn boot(socket: &Path, does: &str) -> Self {
        let folder = made();
        let chardev = format!("socket,id=c,path={},reconnect=1", socket.display());
        let mut qemu = Command::new("qemu-system-x86_64")
            .args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-serial", "stdio"])
            .args(["-machine", "q35,memory-backend=m", "-accel", "tcg,thread=multi", "-cpu", "max", "-smp", "2"])
            .args(["-m", "512", "-object", "memory-backend-memfd,id=m,size=512M,share=on"])
            .args(["-chardev", &chardev, "-device", "vhost-user-blk-pci,chardev=c,num-queues=2"])
            .arg("-kernel")
            .arg(folder.join("kernel"))
            .arg("-initrd")
            .arg(folder.join("initramfs"))
            .args(["-append", &format!("console=ttyS0 quiet panic=-1 mitigations=off no_timer_check do={does}")])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::inherit())
            .spawn()
            .expect("qemu-system-x86_64 runs: scripts/test installs it");
        let console = qemu.stdout.take().expect("piped");
        let (teller, lines) = channel();
        std::thread::spawn(move || {
            for line in BufReader::new(console).split(b'\n').map_while(Result::ok) {
                let _ = teller.send(String::from_utf8_lossy(&line).trim().to_owned());
            }
        });
        Self { qemu, lines, said: Vec::new() }
    }

    /// Types Enter on its console.
    fn go_on(&mut self) {
        self.qemu.stdin.as_mut().expect("piped").write_all(b"\n").expect("it runs");
    }

    /// Waits until it says a line with `words`.
    #[track_caller]
    fn until(&mut self, words: &str) -> String {
        let begun = std::time::Instant::now();
        loop {
            let line = self.lines.recv_timeout((4 * LIMIT).saturating_sub(begun.elapsed()));
            let Ok(line) = line else { panic!("{words:?} did not come:\n{}", self.said.join("\n")) };
            self.said.push(line.clone());
            if line.contains(words) {
                return line;
            }
        }
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = self.qemu.kill();
        let _ = self.qemu.wait();
    }
}

/// The folder with the guest's kernel and initramfs; it is made once, beside what cargo builds.
fn made() -> PathBuf {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("linux-guest");
    let make = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/linux_guest/make");
    system(make.to_str().expect("text"), &[folder.to_str().expect("text")]);
    folder
}

#[test]
fn a_linux_guest_verifies_what_it_wrote_whoever_is_restarted() {
    let (folder, mut keeper) = (Folder::new(), Keeper::new());
    let volume = folder.name("a.vol");
    keeper.good(&["create", &volume, "--size", "64M"]);
    let server = Server::start(&mut keeper, &folder, &volume, "--vhost-user", &["--queues", "2"]);
    let mut guest = Guest::boot(&server.socket, "write");
    let serial = guest.until("guest: serial");
    assert!(serial.contains(&keeper.volume.to_string().replace('-', "")[..20]), "{serial}");
    assert!(guest.until("guest: queues").ends_with(" 2"));
    guest.until("guest: verified");
    guest.until("guest: discarded");
    guest.until("guest: round 1.");
    // The server goes and comes back under load: the guest waits, and goes on.
    let ended = server.stop(&mut keeper);
    assert_eq!(ended.code, 0, "{}", ended.error);
    let server = Server::start(&mut keeper, &folder, &volume, "--vhost-user", &["--queues", "2"]);
    let reached = guest.said.iter().filter(|line| line.contains("guest: round")).count();
    guest.until(&format!("guest: round {}.", reached + 2));
    // The front end goes without a word and another comes.
    drop(guest);
    let mut guest = Guest::boot(&server.socket, "read");
    guest.until("guest: the same");
    drop(guest);
    let ended = server.stop(&mut keeper);
    assert_eq!(ended.code, 0, "{}", ended.error);
    assert_eq!(keeper.json(&["check", &volume])["good"], true);
    let exported = keeper.good(&["export", &volume, "-"]);
    assert!(exported[24 << 20..26 << 20].iter().all(|b| *b == 0));
}

#[test]
fn what_a_guest_was_told_is_written_outlives_the_server_and_its_next_flush_covers_it() {
    let (folder, mut keeper) = (Folder::new(), Keeper::new());
    let volume = folder.name("a.vol");
    keeper.good(&["create", &volume, "--size", "64M"]);
    let server = Server::start(&mut keeper, &folder, &volume, "--vhost-user", &["--queues", "2"]);
    let mut guest = Guest::boot(&server.socket, "outlive");
    guest.until("guest: acknowledged");
    // It has flushed nothing of that, and waits. Its front end connects again by itself.
    server.running.signal(Signal::KILL);
    assert_eq!(server.end(&mut keeper).code, 128 + 9);
    let server = Server::start(&mut keeper, &folder, &volume, "--vhost-user", &["--queues", "2"]);
    guest.go_on();
    guest.until("guest: flushed");
    server.running.signal(Signal::KILL);
    assert_eq!(server.end(&mut keeper).code, 128 + 9);
    drop(guest);
    let exported = keeper.good(&["export", &volume, "-"]);
    let written: String = (1..=200_000).map(|i| format!("{i}\n")).collect();
    assert!(exported[..1 << 20] == written.as_bytes()[..1 << 20], "what it was told is durable");
    assert!(exported[8 << 20..][..4096] == written.as_bytes()[..4096]);
}

#[test]
fn a_front_end_that_makes_no_sense_is_hung_up_on_and_the_next_is_served() {
    let (folder, mut keeper) = (Folder::new(), Keeper::new());
    let volume = folder.name("a.vol");
    keeper.good(&["create", &volume, "--size", "1M"]);
    let server = Server::start(&mut keeper, &folder, &volume, "--vhost-user", &[]);
    let message = |request: u32, payload: &[u8]| {
        // Version 1 and no flags; then the payload's size.
        [&request.to_le_bytes()[..], &1_u32.to_le_bytes(), &(payload.len() as u32).to_le_bytes(), payload].concat()
    };
    let (get_features, set_vring_addr, set_vring_num, get_config) = (1, 9, 8, 24);
    for said in [
        vec![],
        vec![0xff; 64],
        vec![0; 11],
        message(4711, &[]),
        message(set_vring_num, &[0xff; 8]),
        message(set_vring_addr, &[0xff; 40]),
        message(get_config, &[0xff; 12]),
        [message(get_features, &[]), vec![0xee; 1000]].concat(),
    ] {
        let mut stream = UnixStream::connect(&server.socket).expect("connects");
        stream.set_read_timeout(Some(LIMIT)).expect("set");
        stream.write_all(&said).expect("sent");
        stream.shutdown(std::net::Shutdown::Write).expect("shut down");
        let mut heard = Vec::new();
        // Its end of the stream ends, in order or not.
        if let Err(error) = stream.read_to_end(&mut heard) {
            assert_ne!(error.kind(), std::io::ErrorKind::WouldBlock, "{said:?}");
        }
    }
    let mut stream = UnixStream::connect(&server.socket).expect("connects");
    stream.set_read_timeout(Some(LIMIT)).expect("set");
    stream.write_all(&message(get_features, &[])).expect("sent");
    let mut answer = [0; 20];
    stream.read_exact(&mut answer).expect("an answer");
    let features = u64::from_le_bytes(answer[12..].try_into().expect("eight"));
    // VERSION_1, DISCARD, WRITE_ZEROES, MQ, FLUSH; not RO.
    let (wanted, unwanted) = (1 << 32 | 1 << 13 | 1 << 14 | 1 << 12 | 1 << 9, 1 << 5);
    assert!(features & wanted == wanted && features & unwanted == 0, "{features:#x}");
    let ended = server.stop(&mut keeper);
    assert_eq!(ended.code, 0, "{}", ended.error);
    assert!(!ended.error.contains("panicked"), "{}", ended.error);
}

#[test]
fn a_front_end_waits_while_the_system_has_no_descriptors() {
    let (folder, mut keeper) = (Folder::new(), Keeper::new());
    let volume = folder.name("a.vol");
    keeper.good(&["create", &volume, "--size", "1M"]);
    let server = Server::start(&mut keeper, &folder, &volume, "--vhost-user", &[]);
    let get_features = [1_u32, 1, 0].map(|word| word.to_le_bytes()).concat();
    let mut answer = [0; 20];
    // What it needs for itself it has once it has served one.
    let mut first = UnixStream::connect(&server.socket).expect("connects");
    first.set_read_timeout(Some(LIMIT)).expect("set");
    first.write_all(&get_features).expect("sent");
    first.read_exact(&mut answer).expect("an answer");
    drop(first);
    let (pid, limit) = (server.running.pid(), Resource::Nofile);
    let before = getrlimit(limit);
    // It keeps those that it has, which are more than that.
    prlimit(Some(pid), limit, Rlimit { current: Some(8), ..before }).expect("a lower limit");
    let mut stream = UnixStream::connect(&server.socket).expect("connects");
    stream.set_read_timeout(Some(Duration::from_secs(1))).expect("set");
    stream.write_all(&get_features).expect("sent");
    let error = stream.read_exact(&mut answer).expect_err("nobody can take it");
    assert_eq!(error.kind(), std::io::ErrorKind::WouldBlock, "{error}");
    prlimit(Some(pid), limit, before).expect("the limit as it was");
    stream.set_read_timeout(Some(LIMIT)).expect("set");
    stream.read_exact(&mut answer).expect("an answer");
    let ended = server.stop(&mut keeper);
    assert_eq!(ended.error.matches("front ends must wait: ").count(), 1, "{}", ended.error);
}
