//! `fealty run` on a terminal: raw while it runs, as it was on every way out, and the keys that speak to the process.
#![allow(unsafe_code)]

mod common;

use common::{LIMIT, configuration, fealty};
use rustix::process::Signal;
use rustix::termios::{LocalModes, tcgetattr};
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, FromRawFd, OwnedFd};
use std::process::{Child, ExitStatus};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// A pseudo terminal: its two ends.
fn terminal() -> (File, OwnedFd) {
    let (mut ours, mut theirs) = (-1, -1);
    let null = std::ptr::null_mut();
    // SAFETY: both pointers are to live integers; no name, settings or size are asked for or given.
    let made = unsafe { libc::openpty(&raw mut ours, &raw mut theirs, null, null.cast(), null.cast()) };
    assert_eq!(made, 0, "no pseudo terminal");
    // SAFETY: openpty has just made these two descriptors, and nobody else owns them.
    unsafe { (File::from_raw_fd(ours), OwnedFd::from_raw_fd(theirs)) }
}

struct OnTerminal {
    _folder: tempfile::TempDir,
    keyboard: File,
    slave: OwnedFd,
    child: Child,
    screen: Arc<Mutex<Vec<u8>>>,
}

fn start(words: &str) -> OnTerminal {
    let folder = tempfile::tempdir().expect("folder");
    let path = configuration(folder.path(), words, serde_json::json!([]));
    let (keyboard, slave) = terminal();
    let copy = || slave.try_clone().expect("copied");
    let mut command = fealty(&["run", "--unprotected", path.to_str().expect("UTF-8"), "--grace", "1"]);
    let child = command.stdin(copy()).stdout(copy()).stderr(copy()).spawn().expect("started");
    let screen: Arc<Mutex<Vec<u8>>> = Arc::default();
    let (mut from, to) = (keyboard.try_clone().expect("copied"), screen.clone());
    std::thread::spawn(move || {
        let mut piece = [0; 4096];
        while let Ok(length @ 1..) = from.read(&mut piece) {
            to.lock().expect("lock").extend_from_slice(&piece[..length]);
        }
    });
    OnTerminal { _folder: folder, keyboard, slave, child, screen }
}

impl OnTerminal {
    fn cooked(&self) -> bool {
        tcgetattr(self.slave.as_fd()).expect("settings").local_modes.contains(LocalModes::ICANON | LocalModes::ECHO)
    }

    fn screen(&self) -> String {
        String::from_utf8_lossy(&self.screen.lock().expect("lock")).into_owned()
    }

    #[track_caller]
    fn until(&self, needle: &str) {
        let start = Instant::now();
        while !self.screen().contains(needle) {
            assert!(start.elapsed() < LIMIT, "no {needle:?} in:\n{}", self.screen());
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    fn press(&mut self, keys: &[u8]) {
        self.keyboard.write_all(keys).expect("typed");
    }

    fn signal(&self, signal: Signal) {
        let pid = rustix::process::Pid::from_raw(self.child.id().cast_signed()).expect("a pid");
        rustix::process::kill_process(pid, signal).expect("signalled");
    }

    #[track_caller]
    fn end(&mut self) -> ExitStatus {
        let start = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().expect("waited") {
                return status;
            }
            assert!(start.elapsed() < LIMIT, "it does not end:\n{}", self.screen());
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

impl Drop for OnTerminal {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn the_terminal_is_raw_while_the_guest_runs_and_cooked_after_its_end() {
    let mut vm = start("echo,poweroff");
    vm.until("fealty-guest");
    vm.until("runs");
    assert!(!vm.cooked(), "raw while the guest runs");
    vm.press(b"good morning\rquit\r");
    assert_eq!(vm.end().code(), Some(0), "{}", vm.screen());
    assert!(vm.screen().contains("good morning"));
    assert!(vm.cooked());
}

#[test]
fn ctrl_a_speaks_to_the_process() {
    let mut vm = start("spin");
    vm.until("runs");
    vm.until("spinning");
    vm.press(b"\x01c");
    vm.until("running, 1 vCPUs");
    vm.press(b"\x01h");
    vm.until("Ctrl-A x ends");
    vm.press(b"\x01x");
    assert_eq!(vm.end().code(), Some(14), "{}", vm.screen());
    assert!(vm.cooked());
}

#[test]
fn signals_and_faults_leave_the_terminal_as_it_was() {
    for (signal, code) in [(Signal::TERM, Some(14)), (Signal::HUP, Some(14)), (Signal::ABORT, None)] {
        let mut vm = start("spin");
        vm.until("runs");
        assert!(!vm.cooked());
        vm.signal(signal);
        assert_eq!(vm.end().code(), code, "{signal:?}: {}", vm.screen());
        assert!(vm.cooked(), "{signal:?}");
    }
}

#[test]
fn a_refusal_never_touches_the_terminal() {
    let folder = tempfile::tempdir().expect("folder");
    let (_keyboard, slave) = terminal();
    let copy = || slave.try_clone().expect("copied");
    let missing = folder.path().join("missing.json");
    let mut command = fealty(&["run", "--unprotected", missing.to_str().expect("UTF-8")]);
    let status = command.stdin(copy()).stdout(copy()).stderr(copy()).status().expect("started");
    assert_eq!(status.code(), Some(3));
    assert!(tcgetattr(slave.as_fd()).expect("settings").local_modes.contains(LocalModes::ICANON));
}
