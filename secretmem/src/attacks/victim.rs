//! The process that is attacked: this test program once more, running one of the ignored tests at the end of this file.

use super::techniques::Bytes;
use crate::arena::Arena;
use crate::region::Protection;
use crate::{Secret, SecretError, harden_process};
use std::io::{self, BufRead, BufReader, Write};
use std::os::fd::FromRawFd;
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Command, Stdio};

/// A process that holds a key and canaries, and waits. Killed when dropped.
pub(super) struct Victim {
    child: Child,
    folder: tempfile::TempDir,
    /// Where its key lies.
    pub(super) key: usize,
    /// Where its canary lies in ordinary memory.
    pub(super) canary: usize,
    /// Where the same lies in a mapping of an ordinary memfd whose descriptor is closed.
    pub(super) shared_canary: usize,
}

/// The key of every victim. Computed where it is needed, so that no copy lies about in the program.
pub(super) fn key_bytes() -> Bytes {
    std::array::from_fn(key_byte)
}

/// Writes the key byte by byte, so that no copy of it comes to lie on the stack.
pub(super) fn fill_with_key(place: &mut Bytes) {
    for (n, byte) in place.iter_mut().enumerate() {
        *byte = key_byte(n);
    }
}

fn key_byte(n: usize) -> u8 {
    (n as u8).wrapping_mul(37).wrapping_add(101) ^ 0x5a
}

/// What the controls look for.
pub(super) fn canary_bytes() -> Bytes {
    std::array::from_fn(|n| (n as u8).wrapping_mul(53).wrapping_add(17) ^ 0xc3)
}

/// Whether `needle` stands anywhere in `content`.
pub(super) fn holds(content: &[u8], needle: &Bytes) -> bool {
    content.windows(32).any(|w| w == needle)
}

impl Victim {
    pub(super) fn start(protection: Protection) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let mut child = run(name(protection, "holds_a_key"), Stdio::piped(), &folder);
        let mut lines = BufReader::new(child.stdout.take().expect("piped")).lines();
        let found = lines.find_map(|line| line.ok()?.split_once("secrets lie at ").map(|(_, rest)| rest.to_owned()));
        let line = found.expect("the victim says where its secrets lie");
        let mut numbers = line.split_whitespace().map(|n| n.parse().expect("an address"));
        let mut next = || numbers.next().expect("three addresses");
        Self { key: next(), canary: next(), shared_canary: next(), child, folder }
    }

    pub(super) fn pid(&self) -> libc::pid_t {
        libc::pid_t::try_from(self.child.id()).expect("a pid")
    }

    /// Makes it abort, having made itself dumpable or, if `hardened`, not; its core, if there is one.
    pub(super) fn dump_core(mut self, hardened: bool) -> Option<Vec<u8>> {
        let order = if hardened { "harden\n" } else { "dump\n" };
        self.child.stdin.take().expect("piped").write_all(order.as_bytes()).expect("it listens");
        let status = self.child.wait().expect("it ends");
        assert_eq!(status.signal(), Some(libc::SIGABRT));
        let file = std::fs::read_dir(self.folder.path()).expect("its folder").next();
        assert_eq!(file.is_some(), status.core_dumped());
        file.map(|f| std::fs::read(f.expect("an entry").path()).expect("the core"))
    }

    /// Runs the test of a process that is given little locked memory.
    pub(super) fn starve(protection: Protection) {
        let folder = tempfile::tempdir().expect("a folder");
        let child = run(name(protection, "runs_out"), Stdio::null(), &folder);
        let output = child.wait_with_output().expect("it ends");
        let said = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success() && said.contains("1 passed"), "{said}");
    }
}

impl Drop for Victim {
    fn drop(&mut self) {
        // Both fail only when it has ended and been waited for already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn name(protection: Protection, what: &str) -> String {
    let kind = match protection {
        Protection::MemfdSecret => "memfd_secret",
        Protection::Mlock => "mlock",
    };
    format!("attacks::victim::{kind}_{what}")
}

fn run(test: String, stdin: Stdio, folder: &tempfile::TempDir) -> Child {
    Command::new(std::env::current_exe().expect("this program"))
        .args(["--exact", &test, "--ignored", "--nocapture", "--test-threads=1"])
        .current_dir(folder)
        .stdin(stdin)
        .stdout(Stdio::piped())
        .spawn()
        .expect("this program starts once more")
}

#[test]
#[ignore = "the other process of the attacks, which start it"]
fn memfd_secret_holds_a_key() {
    hold_a_key(Protection::MemfdSecret);
}

#[test]
#[ignore = "the other process of the attacks, which start it"]
fn mlock_holds_a_key() {
    hold_a_key(Protection::Mlock);
}

#[test]
#[ignore = "the other process of the attacks, which start it"]
fn memfd_secret_runs_out() {
    run_out(Protection::MemfdSecret);
}

#[test]
#[ignore = "the other process of the attacks, which start it"]
fn mlock_runs_out() {
    run_out(Protection::Mlock);
}

fn hold_a_key(protection: Protection) {
    let mut key = Secret::<32>::zeroed_in(Arena::with_protection(protection)).expect("room");
    fill_with_key(key.expose_mut());
    let canary = Box::new(canary_bytes());
    let shared_canary = canary_in_memfd(libc::SYS_memfd_create, false);
    if protection == Protection::MemfdSecret {
        canary_in_memfd(libc::SYS_memfd_secret, true);
    }
    println!("secrets lie at {} {} {shared_canary}", key.expose().as_ptr().addr(), canary.as_ptr().addr());
    let mut order = String::new();
    io::stdin().read_line(&mut order).expect("an order or the end");
    match order.trim() {
        "dump" => dump_all(),
        "harden" => harden_process().expect("hardened"),
        _ => return,
    }
    // SAFETY: abort ends the process, which is what is wanted.
    unsafe { libc::abort() }
}

/// A page with the canary, mapped from a memfd of the given kind; its address.
fn canary_in_memfd(kind: libc::c_long, leave_open: bool) -> usize {
    // SAFETY: the name is a C string (which memfd_secret, taking flags first, must not get); the rest are numbers. The mapping
    // is new, one page that the file was made to have, and stays until the process ends.
    unsafe {
        let name = if kind == libc::SYS_memfd_create { c"canary".as_ptr() } else { std::ptr::null() };
        let fd = libc::syscall(kind, name, 0) as i32;
        assert!(fd >= 0 && libc::ftruncate(fd, 4096) == 0, "{}", io::Error::last_os_error());
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let page = libc::mmap(std::ptr::null_mut(), 4096, protection, libc::MAP_SHARED, fd, 0);
        assert_ne!(page, libc::MAP_FAILED, "{}", io::Error::last_os_error());
        page.cast::<Bytes>().write(canary_bytes());
        if !leave_open {
            drop(std::os::fd::OwnedFd::from_raw_fd(fd));
        }
        page.addr()
    }
}

/// Takes down every protection against core dumps but that of the pages.
fn dump_all() {
    let all = libc::rlimit { rlim_cur: libc::RLIM_INFINITY, rlim_max: libc::RLIM_INFINITY };
    // SAFETY: the limit is only read; the prctl takes numbers.
    unsafe {
        assert_eq!(libc::setrlimit(libc::RLIMIT_CORE, &all), 0, "{}", io::Error::last_os_error());
        assert_eq!(libc::prctl(libc::PR_SET_DUMPABLE, 1, 0, 0, 0), 0, "{}", io::Error::last_os_error());
    }
    std::fs::write("/proc/self/coredump_filter", "0x7f").expect("the filter takes every kind of page");
}

fn run_out(protection: Protection) {
    give_up_ipc_lock();
    let limit = libc::rlimit { rlim_cur: 1 << 20, rlim_max: 1 << 20 };
    // SAFETY: the limit is only read.
    assert_eq!(unsafe { libc::setrlimit(libc::RLIMIT_MEMLOCK, &limit) }, 0);
    let arena = Arena::with_protection(protection);
    let mut keys = Vec::new();
    let error = loop {
        match Secret::<4096>::zeroed_in(arena) {
            Ok(key) => keys.push(key),
            Err(error) => break error,
        }
        assert!(keys.len() <= 256, "the limit was not kept");
    };
    assert!(matches!(error, SecretError::Exhausted { .. }), "{error:?}");
    assert_eq!(keys.len(), 256, "every page that the limit allows was used");
    keys.truncate(10);
    keys.push(Secret::zeroed_in(arena).expect("what was given back can be had again"));
    assert_eq!(keys[10].expose(), &[0; 4096]);
}

/// Root has CAP_IPC_LOCK, with which no limit counts.
fn give_up_ipc_lock() {
    #[repr(C)]
    struct Header {
        version: u32,
        pid: i32,
    }
    let header = Header { version: 0x2008_0522, pid: 0 };
    let none = [[0_u32; 3]; 2];
    // SAFETY: capset reads a header and, in version 3, two triples of u32, which both live here; it changes this thread only.
    let done = unsafe { libc::syscall(libc::SYS_capset, &header, &none) };
    assert_eq!(done, 0, "{}", io::Error::last_os_error());
}
