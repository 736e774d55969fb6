//! seccomp filters, one for each kind of thread.
#![allow(unsafe_code)]

use super::SandboxError;
use std::io;

/// Kinds of threads and processes, each with its list.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Filter {
    /// The first thread, and what volumes and devices start from it.
    Main,
    /// The thread that talks to the key provider and to the TPM service.
    Provider,
    /// A vCPU.
    Vcpu,
    /// A disk's queue.
    Disk,
    /// The source of random numbers.
    Rng,
    /// A network card.
    Net,
    /// A balloon.
    Balloon,
    /// Sockets between guest and host.
    Vsock,
    /// A virtio console.
    VirtioConsole,
    /// The serial line.
    Console,
    /// Disks that come and go.
    Slots,
    /// The control socket.
    Api,
    /// The child that turns names into descriptors.
    Opener,
    /// `fealty ctl`.
    Ctl,
}

type Program = &'static [(u16, u8, u8, u32)];

impl Filter {
    /// Every kind.
    pub const ALL: [Self; 14] = [
        Self::Main,
        Self::Provider,
        Self::Vcpu,
        Self::Disk,
        Self::Rng,
        Self::Net,
        Self::Balloon,
        Self::Vsock,
        Self::VirtioConsole,
        Self::Console,
        Self::Slots,
        Self::Api,
        Self::Opener,
        Self::Ctl,
    ];

    fn program(self) -> Program {
        match self {
            Self::Main => &include!(concat!(env!("OUT_DIR"), "/main.rs")),
            Self::Provider => &include!(concat!(env!("OUT_DIR"), "/provider.rs")),
            Self::Vcpu => &include!(concat!(env!("OUT_DIR"), "/vcpu.rs")),
            Self::Disk => &include!(concat!(env!("OUT_DIR"), "/disk.rs")),
            Self::Rng => &include!(concat!(env!("OUT_DIR"), "/rng.rs")),
            Self::Net => &include!(concat!(env!("OUT_DIR"), "/net.rs")),
            Self::Balloon => &include!(concat!(env!("OUT_DIR"), "/balloon.rs")),
            Self::Vsock => &include!(concat!(env!("OUT_DIR"), "/vsock.rs")),
            Self::VirtioConsole => &include!(concat!(env!("OUT_DIR"), "/virtio-console.rs")),
            Self::Console => &include!(concat!(env!("OUT_DIR"), "/console.rs")),
            Self::Slots => &include!(concat!(env!("OUT_DIR"), "/slots.rs")),
            Self::Api => &include!(concat!(env!("OUT_DIR"), "/api.rs")),
            Self::Opener => &include!(concat!(env!("OUT_DIR"), "/opener.rs")),
            Self::Ctl => &include!(concat!(env!("OUT_DIR"), "/ctl.rs")),
        }
    }
}

/// What stands in a program for the process's own id, as in `build.rs`; far above the highest that there is (2^22).
const SELF: u32 = 0x5e1f_5e1f;

/// Puts the calling thread, and every thread it makes from now on, under `filter` for good. Whatever the filter does not
/// allow kills the whole process (SIGSYS). Sets no_new_privs as well.
pub fn close_thread(filter: Filter) -> Result<(), SandboxError> {
    super::process::no_new_privs()?;
    // No list allows a fork: the id is that of every thread which will be under this filter.
    let own = std::process::id();
    let with_id = |k| if k == SELF { own } else { k };
    let program: Vec<libc::sock_filter> =
        filter.program().iter().map(|&(code, jt, jf, k)| libc::sock_filter { code, jt, jf, k: with_id(k) }).collect();
    let length = u16::try_from(program.len())
        .map_err(|_| SandboxError::Step { step: "a filter's length", source: io::ErrorKind::InvalidData.into() })?;
    let program = libc::sock_fprog { len: length, filter: program.as_ptr().cast_mut() };
    // SAFETY: the pointer is to a live sock_fprog whose length is that of the live array it points to; the kernel copies both
    // and writes to neither.
    let answer = unsafe { libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, 0, &raw const program) };
    if answer != 0 {
        return Err(SandboxError::Step { step: "seccomp", source: io::Error::last_os_error() });
    }
    Ok(())
}
