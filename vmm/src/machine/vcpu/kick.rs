//! Brings a vCPU out of the guest: a signal interrupts KVM_RUN, and its handler sets `immediate_exit`, so that a signal that
//! comes just before KVM_RUN is not lost.
#![allow(unsafe_code)]

use kvm_ioctls::VcpuFd;
use std::cell::Cell;
use std::ptr::null_mut;
use std::thread::JoinHandle;
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

thread_local! {
    /// `immediate_exit` of the vCPU that this thread runs.
    static IMMEDIATE_EXIT: Cell<*mut u8> = const { Cell::new(null_mut()) };
}

/// Installs the handler, once per process is enough.
pub(crate) fn install() -> std::io::Result<()> {
    register_signal_handler(SIGRTMIN(), handler).map_err(Into::into)
}

/// Signals the thread of a vCPU.
pub(in crate::machine) fn kick(thread: &JoinHandle<()>) {
    // It fails for a thread that has ended, which is out of the guest.
    let _ = thread.kill(SIGRTMIN());
}

/// While it lives, kicks of this thread reach the vCPU.
pub(super) struct Kickable(());

impl Kickable {
    pub(super) fn new(vcpu: &mut VcpuFd) -> Self {
        let flag = std::ptr::from_mut(&mut vcpu.get_kvm_run().immediate_exit);
        IMMEDIATE_EXIT.set(flag);
        Self(())
    }

    /// Takes the kick that has arrived.
    pub(super) fn clear(&self) {
        // SAFETY: as in `set`.
        unsafe { set(0) }
    }
}

impl Drop for Kickable {
    fn drop(&mut self) {
        IMMEDIATE_EXIT.set(null_mut());
    }
}

extern "C" fn handler(_signal: libc::c_int, _info: *mut libc::siginfo_t, _context: *mut libc::c_void) {
    // SAFETY: as in `set`; a constant thread-local without destructor is a plain memory access, safe in a handler.
    unsafe { set(1) }
}

/// # Safety
///
/// The pointer is null or that of a `Kickable` of this thread, made from a `VcpuFd` that outlives it (the vCPU's loop holds
/// both, the descriptor longer), whose shared page stays mapped as long as the descriptor. Only this thread, its signal handler
/// and the kernel touch the byte, and all of them as single bytes.
unsafe fn set(value: u8) {
    let flag = IMMEDIATE_EXIT.get();
    if !flag.is_null() {
        // SAFETY: see above; the write is volatile because the kernel reads the byte.
        unsafe { flag.write_volatile(value) };
    }
}
