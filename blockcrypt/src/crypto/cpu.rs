//! Proof that this processor has what a fast path needs.
//!
//! Each path takes a token that only its detection makes, so that none can be called on a processor without its
//! instructions. A token says nothing about which path is the best: [`Engines`](super::Engines) chooses.
#![allow(unsafe_code)]

use std::arch::asm;

macro_rules! tokens {
    ($($(#[$doc:meta])* $name:ident: $($feature:tt),+;)+) => { $(
        $(#[$doc])*
        #[derive(Clone, Copy)]
        pub(crate) struct $name(());

        impl $name {
            /// The token, if processor and operating system have the instructions.
            pub(crate) fn detect() -> Option<Self> {
                (true $(&& is_x86_feature_detected!($feature))+).then_some(Self(()))
            }
        }
    )+ };
}

tokens! {
    /// AES and carry-less products over 512 bits.
    Vaes512: "aes", "vaes", "vpclmulqdq", "avx512f", "avx512bw";
    /// AES and carry-less products over 256 bits.
    Vaes256: "aes", "vaes", "vpclmulqdq", "avx2";
    /// AES and carry-less products over 128 bits.
    AesNi: "aes", "pclmulqdq", "sse4.1";
    /// Sixteen 32-bit words at once, with rotations, three-way logic and byte shuffles.
    Avx512: "avx512f", "avx512bw";
    /// Rounds of SHA-256.
    ShaNi: "sha", "ssse3", "sse4.1";
}

/// Overwrites all vector registers: round keys and hash states stay in them for a long time otherwise. What the compiler
/// had saved to the stack is for [`wiping_stack`](secretmem::wiping_stack).
#[inline(never)]
pub(crate) fn wipe_registers() {
    if is_x86_feature_detected!("avx512f") {
        // SAFETY: AVX-512F is there; the function changes vector registers only.
        unsafe { wipe_zmm() }
    } else if is_x86_feature_detected!("avx") {
        // SAFETY: AVX is there; the function changes vector registers only.
        unsafe { wipe_ymm() }
    } else {
        wipe_xmm();
    }
}

#[target_feature(enable = "avx512f")]
fn wipe_zmm() {
    // SAFETY: every register that is changed is named as clobbered; no memory, no flags, no stack. VZEROALL clears 0 to 15
    // over their whole width.
    unsafe {
        asm!(
            "vzeroall",
            "vpxord zmm16, zmm16, zmm16", "vpxord zmm17, zmm17, zmm17", "vpxord zmm18, zmm18, zmm18",
            "vpxord zmm19, zmm19, zmm19", "vpxord zmm20, zmm20, zmm20", "vpxord zmm21, zmm21, zmm21",
            "vpxord zmm22, zmm22, zmm22", "vpxord zmm23, zmm23, zmm23", "vpxord zmm24, zmm24, zmm24",
            "vpxord zmm25, zmm25, zmm25", "vpxord zmm26, zmm26, zmm26", "vpxord zmm27, zmm27, zmm27",
            "vpxord zmm28, zmm28, zmm28", "vpxord zmm29, zmm29, zmm29", "vpxord zmm30, zmm30, zmm30",
            "vpxord zmm31, zmm31, zmm31",
            out("zmm0") _, out("zmm1") _, out("zmm2") _, out("zmm3") _, out("zmm4") _, out("zmm5") _, out("zmm6") _,
            out("zmm7") _, out("zmm8") _, out("zmm9") _, out("zmm10") _, out("zmm11") _, out("zmm12") _,
            out("zmm13") _, out("zmm14") _, out("zmm15") _, out("zmm16") _, out("zmm17") _, out("zmm18") _,
            out("zmm19") _, out("zmm20") _, out("zmm21") _, out("zmm22") _, out("zmm23") _, out("zmm24") _,
            out("zmm25") _, out("zmm26") _, out("zmm27") _, out("zmm28") _, out("zmm29") _, out("zmm30") _,
            out("zmm31") _, options(nomem, nostack, preserves_flags)
        );
    }
}

#[target_feature(enable = "avx")]
fn wipe_ymm() {
    // SAFETY: every register that VZEROALL changes is named as clobbered; no memory, no flags, no stack.
    unsafe {
        asm!(
            "vzeroall",
            out("ymm0") _, out("ymm1") _, out("ymm2") _, out("ymm3") _, out("ymm4") _, out("ymm5") _, out("ymm6") _,
            out("ymm7") _, out("ymm8") _, out("ymm9") _, out("ymm10") _, out("ymm11") _, out("ymm12") _,
            out("ymm13") _, out("ymm14") _, out("ymm15") _, options(nomem, nostack, preserves_flags)
        );
    }
}

fn wipe_xmm() {
    // SAFETY: every register that is changed is named as clobbered; no memory, no flags, no stack. SSE2 is part of x86-64.
    unsafe {
        asm!(
            "pxor xmm0, xmm0", "pxor xmm1, xmm1", "pxor xmm2, xmm2", "pxor xmm3, xmm3", "pxor xmm4, xmm4",
            "pxor xmm5, xmm5", "pxor xmm6, xmm6", "pxor xmm7, xmm7", "pxor xmm8, xmm8", "pxor xmm9, xmm9",
            "pxor xmm10, xmm10", "pxor xmm11, xmm11", "pxor xmm12, xmm12", "pxor xmm13, xmm13", "pxor xmm14, xmm14",
            "pxor xmm15, xmm15",
            out("xmm0") _, out("xmm1") _, out("xmm2") _, out("xmm3") _, out("xmm4") _, out("xmm5") _, out("xmm6") _,
            out("xmm7") _, out("xmm8") _, out("xmm9") _, out("xmm10") _, out("xmm11") _, out("xmm12") _,
            out("xmm13") _, out("xmm14") _, out("xmm15") _, options(nomem, nostack, preserves_flags)
        );
    }
}
