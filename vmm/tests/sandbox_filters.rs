//! The filters themselves: what they let through, and that what they don't kills. Each case runs in a process of its own,
//! this very test binary started again with a word in its environment.
#![allow(unsafe_code)]

use fealty_vmm::sandbox::{Filter, close_thread};
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, ExitStatus};

const VARIABLE: &str = "FEALTY_TEST_FILTER";
const SURVIVED: i32 = 42;

/// What the child does under its filter.
const DEEDS: [(&str, fn()); 12] = [
    ("nothing", || ()),
    ("open", || drop(std::fs::File::open("/dev/null"))),
    ("openat2", || {
        use rustix::fs::{CWD, Mode, OFlags, ResolveFlags, openat2};
        drop(openat2(CWD, "/dev/null", OFlags::RDONLY, Mode::empty(), ResolveFlags::empty()));
    }),
    ("socket", || drop(std::net::UdpSocket::bind("127.0.0.1:0"))),
    ("unix-socket", || drop(std::os::unix::net::UnixDatagram::unbound())),
    ("fork", || {
        // SAFETY: the child, if there ever is one, ends at once.
        unsafe {
            if libc::fork() == 0 {
                libc::_exit(0);
            }
        }
    }),
    ("execute", || {
        let _ = Command::new("/bin/true").status();
    }),
    ("executable-memory", || {
        let (exec, private) = (libc::PROT_READ | libc::PROT_EXEC, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        // SAFETY: a fresh anonymous mapping that nobody uses.
        unsafe { libc::mmap(std::ptr::null_mut(), 4096, exec, private, -1, 0) };
    }),
    ("trace", || {
        // SAFETY: asks to be traced by the parent, which changes nothing in memory.
        unsafe { libc::ptrace(libc::PTRACE_TRACEME, 0, 0, 0) };
    }),
    ("terminal-injection", || {
        // SAFETY: the pointer is to one readable byte.
        unsafe { libc::ioctl(0, libc::TIOCSTI, c"x".as_ptr()) };
    }),
    ("signal-to-itself", || {
        // SAFETY: signal 0 is none: only the permission is asked for.
        unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), libc::gettid(), 0) };
    }),
    ("signal-to-another", || {
        // SAFETY: signal 0 is none: only the permission is asked for.
        unsafe { libc::syscall(libc::SYS_tgkill, 1, 1, 0) };
    }),
];

/// The child's part: returns at once where this process is no child.
#[test]
fn child() {
    let Ok(case) = std::env::var(VARIABLE) else { return };
    let (filter, deed) = case.split_once(' ').expect("a filter and a deed");
    let filter = Filter::ALL.into_iter().find(|f| format!("{f:?}") == filter).expect("a filter");
    let (_, deed) = DEEDS.into_iter().find(|(name, _)| *name == deed).expect("a deed");
    close_thread(filter).expect("closed");
    deed();
    // SAFETY: ends the process without anything that the filter might mind.
    unsafe { libc::_exit(SURVIVED) }
}

fn in_child(filter: Filter, deed: &str) -> ExitStatus {
    Command::new(std::env::current_exe().expect("own path"))
        .args(["child", "--exact", "--test-threads=1"])
        .env(VARIABLE, format!("{filter:?} {deed}"))
        .output()
        .expect("started")
        .status
}

#[track_caller]
fn killed(filter: Filter, deed: &str) {
    let status = in_child(filter, deed);
    assert_eq!(status.signal(), Some(libc::SIGSYS), "{filter:?} {deed}: {status:?}");
}

#[track_caller]
fn survives(filter: Filter, deed: &str) {
    let status = in_child(filter, deed);
    assert_eq!(status.code(), Some(SURVIVED), "{filter:?} {deed}: {status:?}");
}

#[test]
fn a_filter_lets_a_thread_live() {
    for filter in Filter::ALL {
        survives(filter, "nothing");
    }
}

#[test]
fn only_the_opener_opens_paths() {
    for filter in Filter::ALL {
        killed(filter, "open");
        if filter == Filter::Opener {
            survives(filter, "openat2");
        } else {
            killed(filter, "openat2");
        }
    }
}

#[test]
fn only_the_talking_thread_makes_sockets_and_only_those_of_the_internet() {
    for filter in Filter::ALL {
        if filter == Filter::Provider {
            survives(filter, "socket");
        } else {
            killed(filter, "socket");
        }
        killed(filter, "unix-socket");
    }
}

#[test]
fn no_thread_forks_executes_traces_or_types_into_terminals() {
    for filter in Filter::ALL {
        for deed in ["fork", "execute", "executable-memory", "trace", "terminal-injection"] {
            killed(filter, deed);
        }
    }
}

#[test]
fn no_thread_signals_another_process() {
    for filter in Filter::ALL {
        survives(filter, "signal-to-itself");
        killed(filter, "signal-to-another");
    }
}
