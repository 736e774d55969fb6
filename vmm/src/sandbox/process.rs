//! What the process as a whole gives up.
#![allow(unsafe_code)]

use super::SandboxError;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

/// The most descriptors a VM process has: 16 disks of 16 queues with three each, the vCPUs, other devices, sockets.
const DESCRIPTORS: u64 = 2048;

/// Closes every descriptor above standard error: to be called first, while none of them is this program's own.
pub fn close_inherited() -> Result<(), SandboxError> {
    close_all_but(&[])
}

/// Closes every descriptor above standard error but these: to be called by a forked child, which uses no other object of its parent's
/// that owns one, and drops none.
pub fn close_all_but(kept: &[BorrowedFd<'_>]) -> Result<(), SandboxError> {
    let mut kept: Vec<u32> = kept.iter().filter_map(|fd| u32::try_from(fd.as_raw_fd()).ok()).collect();
    kept.sort_unstable();
    let mut first = 3;
    for number in kept.into_iter().filter(|number| *number >= 3).chain([u32::MAX]) {
        if number > first {
            // SAFETY: the call closes descriptors by number, none of which an object owns that is used again: a child uses those that
            // it names here and ends without destructors, and a program that has just started has opened none.
            step("close_range", unsafe { libc::syscall(libc::SYS_close_range, first, number - 1, 0u32) })?;
        }
        first = number.saturating_add(1);
    }
    Ok(())
}

/// Gives up core dumps, new privileges and a large number of descriptors; and lets no file the process makes be read by
/// others. Idempotent.
pub fn harden() -> Result<(), SandboxError> {
    secretmem::harden_process().map_err(SandboxError::Dumps)?;
    no_new_privs()?;
    let now = getrlimit(Resource::Nofile);
    let limit = now.maximum.unwrap_or(u64::MAX).min(DESCRIPTORS);
    setrlimit(Resource::Nofile, Rlimit { current: Some(limit), maximum: Some(limit) })
        .map_err(|e| SandboxError::Step { step: "setrlimit(RLIMIT_NOFILE)", source: e.into() })?;
    rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o077));
    Ok(())
}

unsafe extern "C" {
    /// First byte of the program's image, and the end of its code, by the linker.
    static __executable_start: u8;
    static etext: u8;
}

/// Lets go of code that ran once: attesting and parsing need megabytes of it, running a guest little. What is needed again
/// comes back from the page cache at its next use.
pub fn forget_code() {
    const PAGE: usize = 4096;
    let start = (&raw const __executable_start).addr() & !(PAGE - 1);
    let end = (&raw const etext).addr() & !(PAGE - 1);
    // SAFETY: from the executable's first byte to the end of its code lie its headers, constants and code: private file mappings
    // that are never written (relocations change only what comes after the code), so that each page reads the same when it
    // is mapped again. Advice that the kernel does not take changes nothing.
    unsafe { libc::madvise(start as *mut libc::c_void, end.saturating_sub(start), libc::MADV_DONTNEED) };
}

/// Children that end leave nothing behind: for when nobody waits for one.
pub fn forget_children() {
    // SAFETY: SIG_IGN is a valid disposition, and no code of this process waits for children before `await_children`.
    unsafe { libc::signal(libc::SIGCHLD, libc::SIG_IGN) };
}

/// Children that end from now on can be waited for.
pub fn await_children() {
    // SAFETY: SIG_DFL is a valid disposition.
    unsafe { libc::signal(libc::SIGCHLD, libc::SIG_DFL) };
}

/// What libraries find out once, found out before paths are closed; and one heap for all threads: an arena for each would
/// cost 64 KiB and more of dirty memory a thread, for a program that allocates little once it runs.
pub fn settle() {
    // SAFETY: mallopt changes a number of the allocator; it is called before there is a second thread.
    unsafe { libc::mallopt(libc::M_ARENA_MAX, 1) };
    // The first look at a clock searches the vDSO, on older kernels through /proc/self/auxv.
    crate::lease::boottime_ms();
}

/// Ends this process when its parent does.
pub fn end_with_parent() -> Result<(), SandboxError> {
    // SAFETY: this prctl takes numbers only.
    let answer = unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL, 0, 0, 0) };
    step("prctl(PR_SET_PDEATHSIG)", i64::from(answer))
}

pub(super) fn no_new_privs() -> Result<(), SandboxError> {
    // SAFETY: this prctl takes numbers only.
    let answer = unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) };
    step("prctl(PR_SET_NO_NEW_PRIVS)", i64::from(answer))
}

pub(super) fn step(step: &'static str, answer: i64) -> Result<(), SandboxError> {
    if answer < 0 { Err(SandboxError::Step { step, source: io::Error::last_os_error() }) } else { Ok(()) }
}

/// What [`fork`] returned.
pub enum Forked {
    /// In the child.
    Child,
    /// In the parent.
    Parent,
}

/// Forks. Only for a process with one thread: in any other the child's locks could be held by threads it has not got.
pub fn fork() -> Result<Forked, SandboxError> {
    // SAFETY: the caller has one thread (the first thing `fealty run` does after reading its file is to call this), so the
    // child is a complete copy in which all code may run.
    match unsafe { libc::fork() } {
        -1 => Err(SandboxError::Step { step: "fork", source: io::Error::last_os_error() }),
        0 => Ok(Forked::Child),
        _ => Ok(Forked::Parent),
    }
}

/// Ends the process at once, without destructors: for a forked child.
pub fn exit_now(code: i32) -> ! {
    // SAFETY: _exit takes a number, and returns never.
    unsafe { libc::_exit(code) }
}
