//! Memory for keys: locked pages that the kernel itself keeps out of everybody's reach.
//!
//! A [`Secret`], [`SecretBuf`] or [`SecretBox`] lies in `memfd_secret` pages: never swapped, absent from the kernel's direct
//! map, from core dumps and from forked children, and unreadable through `/proc/PID/mem`, `process_vm_readv` and ptrace, also
//! for root. Where the kernel has no `memfd_secret` they lie in ordinary locked pages instead, and [`protection`] says so: root
//! who may trace this process reads those. Nothing here knows what a key is for, and no type here can be printed, cloned or
//! serialised. All are wiped when dropped.
//!
//! | module | what it holds |
//! | --- | --- |
//! | `region` | one mapping with its guard pages, and the list of all of them that [`overlaps`] asks |
//! | `arena` | many small secrets in few locked pages: 64-byte granules, first fit |
//! | `secret` | the types that users see |
//! | `process` | what protects a process as a whole: no core dump, wiped stacks |
//!
//! ```
//! # use fealty_secretmem as secretmem;
//! # fn main() -> Result<(), secretmem::SecretError> {
//! let mut arrived = [7_u8; 32];
//! let key = secretmem::Secret::take(&mut arrived)?;
//! assert_eq!(arrived, [0; 32]);
//! assert_eq!(key.expose()[0], 7);
//! # Ok(())
//! # }
//! ```

mod arena;
mod process;
mod region;
mod secret;

#[cfg(test)]
mod attacks;

pub use arena::{protection, reserve};
pub use process::{harden_process, wipe, wiping_stack};
pub use region::{Protection, overlaps};
pub use secret::{Secret, SecretBox, SecretBuf};

/// Why there is no memory for a secret.
#[derive(Debug, thiserror::Error)]
pub enum SecretError {
    /// The limit of locked memory is reached.
    #[error(
        "no locked memory for {bytes} bytes of keys; raise the limit (ulimit -l, LimitMEMLOCK=) or hold fewer keys"
    )]
    Exhausted {
        /// Bytes that a further mapping would have locked.
        bytes: usize,
        /// What the kernel said.
        #[source]
        source: std::io::Error,
    },
    /// A step of making locked memory failed for another reason.
    #[error("memory for keys can't be set up: {step} failed")]
    Map {
        /// The system call.
        step: &'static str,
        /// What the kernel said.
        #[source]
        source: std::io::Error,
    },
    /// The kernel's generator gave nothing.
    #[error("the kernel gave no random bytes for a key")]
    Random(#[source] getrandom::Error),
    /// A buffer without bytes, or above the limit.
    #[error("a secret buffer is 1 to {max} bytes, not {0}", max = SecretBuf::MAX)]
    Length(usize),
    /// The builder of a [`SecretBox`] returned something that does not lie in the box.
    #[error("the builder of a secret box filled another place than the box")]
    Elsewhere,
    /// The process can't be protected.
    #[error("this process can't be kept from dumping core: {step} failed")]
    Harden {
        /// The system call.
        step: &'static str,
        /// What the kernel said.
        #[source]
        source: std::io::Error,
    },
}
