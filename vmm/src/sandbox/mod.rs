//! The sandbox: what a thread may still ask of the kernel, and what the process as a whole gives up before it reads a byte
//! of a guest or of a network.
//!
//! Each kind of thread has a list in `vmm/seccomp/`, readable, compiled at build time and embedded, so that every build has
//! the same. Filters add up: a vCPU thread runs under its own and under that of the thread that made it. What no list
//! allows kills the process. No list but the opener's can open a path, and none can make a process or executable memory, or signal
//! another process: the VM processes of a host may share a user with each other.

pub mod descriptors;
pub mod filter;
pub mod landlock;
pub mod process;

pub use filter::{Filter, close_thread};
pub use process::{close_inherited, harden};

/// Why the sandbox could not be closed. Nothing runs without it.
#[derive(Debug, thiserror::Error)]
pub enum SandboxError {
    /// A system call that gives something up failed.
    #[error("cannot close the sandbox: {step} failed; this program needs Linux 5.14 or newer with seccomp")]
    Step {
        /// Which.
        step: &'static str,
        /// What the kernel said.
        #[source]
        source: std::io::Error,
    },
    /// Core dumps could not be switched off.
    #[error("cannot close the sandbox")]
    Dumps(#[source] secretmem::SecretError),
}
