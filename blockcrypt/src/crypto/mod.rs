//! The ciphers of data blocks, computed as fast as the processor allows.
//!
//! | module | what it holds |
//! | --- | --- |
//! | `xts` | AES-256-XTS: VAES over 512 or 256 bits, AES-NI, the `aes` crate |
//! | `hmac` | HMAC-SHA256 of many messages: 16 lanes of AVX-512, interleaved SHA-NI streams, the `sha2` crate |
//! | `cpu` | proof that the processor has what a path needs; wiping registers |
//!
//! Which path is taken is decided once for a key, when it is expanded; the results are the same, bit for bit. No path has a
//! table or a branch that depends on a key or on data. Expanded keys and the hash states that stand for a MAC key lie in
//! secret memory; what a computation leaves in vector registers is wiped by [`wipe_registers`], what it leaves on the stack
//! by [`wiping_stack`](secretmem::wiping_stack) around it.

#[cfg(target_arch = "x86_64")]
mod cpu;
mod hmac;
mod xts;

pub(crate) use hmac::{BATCH, MacKey, Message, ShaEngine};
pub(crate) use xts::{AesEngine, TWEAKS, Xts};

/// Which paths are taken.
#[derive(Clone, Copy)]
pub(crate) struct Engines {
    pub(crate) aes: AesEngine,
    pub(crate) sha: ShaEngine,
}

impl Engines {
    /// The fastest that run here.
    pub(crate) fn best() -> Self {
        Self { aes: AesEngine::all()[0], sha: ShaEngine::all()[0] }
    }
}

/// Overwrites the vector registers, which hold round keys and hash states after a computation.
pub(crate) fn wipe_registers() {
    #[cfg(target_arch = "x86_64")]
    cpu::wipe_registers();
}
