//! What protects a process as a whole: no core dumps, wiped buffers, wiped stacks.
#![allow(unsafe_code)]

use crate::SecretError;
use std::io;
use std::mem::MaybeUninit;
use std::sync::atomic::{AtomicBool, Ordering};

/// Keeps this process from being dumped: PR_SET_DUMPABLE 0 (which also keeps other users' debuggers out and makes its
/// `/proc` files root's) and a core size limit of 0, hard and soft.
pub fn harden_process() -> Result<(), SecretError> {
    let none = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: the pointer is to a live rlimit that the call only reads.
    if unsafe { libc::setrlimit(libc::RLIMIT_CORE, &none) } != 0 {
        return Err(SecretError::Harden { step: "setrlimit(RLIMIT_CORE)", source: io::Error::last_os_error() });
    }
    forbid_dumps()
}

/// PR_SET_DUMPABLE 0 alone, once: locked pages may have to grow under a sandbox that forbids the call by then.
pub(crate) fn forbid_dumps_once() -> Result<(), SecretError> {
    static FORBIDDEN: AtomicBool = AtomicBool::new(false);
    if !FORBIDDEN.load(Ordering::Acquire) {
        forbid_dumps()?;
        FORBIDDEN.store(true, Ordering::Release);
    }
    Ok(())
}

fn forbid_dumps() -> Result<(), SecretError> {
    // SAFETY: this prctl takes numbers only and changes one flag of the process.
    if unsafe { libc::prctl(libc::PR_SET_DUMPABLE, 0, 0, 0, 0) } != 0 {
        return Err(SecretError::Harden { step: "prctl(PR_SET_DUMPABLE)", source: io::Error::last_os_error() });
    }
    Ok(())
}

/// Overwrites `bytes` with zeroes in a way that no optimiser removes.
pub fn wipe(bytes: &mut [u8]) {
    // SAFETY: pointer and length are those of a live, exclusively borrowed slice, and every byte may be zero.
    unsafe { libc::explicit_bzero(bytes.as_mut_ptr().cast(), bytes.len()) }
}

/// Bytes below the caller's frame that [`wiping_stack`] overwrites.
const STACK: usize = 16 * 1024;

/// Runs `f`, then overwrites 16 KiB of the stack where its frames lay, also when it panics. For code that leaves pieces of
/// keys behind: key schedules, hash states, decryptions. What `f` returns, and what it wrote deeper than 16 KiB or left in
/// registers, is not covered.
pub fn wiping_stack<R>(f: impl FnOnce() -> R) -> R {
    let _wiped_after = StackBelow;
    run_apart(f)
}

/// Keeps the frames of `f` below the one of [`wiping_stack`], where the wipe reaches.
#[inline(never)]
fn run_apart<R>(f: impl FnOnce() -> R) -> R {
    f()
}

struct StackBelow;

impl Drop for StackBelow {
    #[inline(never)]
    fn drop(&mut self) {
        let mut area = [MaybeUninit::<u8>::uninit(); STACK];
        // SAFETY: pointer and length are those of `area`; zero is a value of MaybeUninit<u8>.
        unsafe { libc::explicit_bzero(area.as_mut_ptr().cast(), STACK) }
        std::hint::black_box(&mut area);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wipe_leaves_zeroes() {
        let mut bytes = [7; 100];
        wipe(&mut bytes[..99]);
        assert_eq!(bytes[..99], [0; 99]);
        assert_eq!(bytes[99], 7);
    }

    /// Leaves a mark on the stack and says where.
    #[inline(never)]
    fn leave(mark: u64) -> *const u64 {
        let area = [mark; 64];
        std::hint::black_box(&area);
        &raw const area[32]
    }

    #[inline(never)]
    fn leave_deeper(mark: u64) -> *const u64 {
        let room = [0_u8; 4096];
        std::hint::black_box(&room);
        leave(mark)
    }

    fn found(at: *const u64) -> u64 {
        // SAFETY: this is an address of the current thread's stack, mapped, aligned and initialised by `leave`; the read is
        // volatile so that the compiler takes no view of what lies there now.
        unsafe { at.read_volatile() }
    }

    #[test]
    fn the_stack_below_is_wiped() {
        let mark = 0x5ec2_e75e_c2e7_5ec2;
        let plain = leave_deeper(mark);
        let without = found(plain);
        let wiped = wiping_stack(|| leave_deeper(mark));
        assert_eq!(found(wiped), 0);
        assert_eq!(without, mark, "the control: without the wipe the mark stays");
    }
}
