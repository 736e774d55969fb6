//! Named CPU baselines: what a guest sees of its processor when it is to be the same on every host that has at least that.
//! Levels are those of the x86-64 psABI, with what a kernel needs besides, and AES from level 3 on.
//!
//! Vendor, family, model and stepping stay the host's: guests choose workarounds by them. So do the controls against speculation:
//! a guest must know what this processor can do. Everything else that a level does not name is hidden.

use kvm_bindings::kvm_cpuid_entry2;
use policy::config::CpuBaseline;

/// The host lacks something.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("this host's processor, or its KVM, lacks {lacks}, which the CPU baseline {baseline} has")]
pub struct BaselineError {
    /// What was asked for.
    baseline: CpuBaseline,
    /// The first feature that is missing.
    lacks: &'static str,
}

/// A register of a leaf.
type Word = (u32, u32, Register);

#[derive(Clone, Copy, PartialEq, Eq)]
enum Register {
    A,
    B,
    C,
    D,
}
use Register::{A, B, C, D};

const ONE_C: Word = (1, 0, C);
const ONE_D: Word = (1, 0, D);
const SEVEN_B: Word = (7, 0, B);
const SEVEN_D: Word = (7, 0, D);
const XSAVE_A: Word = (0xd, 1, A);
const EXTENDED_C: Word = (0x8000_0001, 0, C);
const EXTENDED_D: Word = (0x8000_0001, 0, D);
const SPECULATION_B: Word = (0x8000_0008, 0, B);
const KVM_A: Word = (0x4000_0001, 0, A);

/// Features by level: register, bit, name. A level has those of the levels below.
const FEATURES: &[(u8, Word, u32, &str)] = &[
    (2, ONE_D, 0, "fpu"),
    (2, ONE_D, 2, "de"),
    (2, ONE_D, 3, "pse"),
    (2, ONE_D, 4, "tsc"),
    (2, ONE_D, 5, "msr"),
    (2, ONE_D, 6, "pae"),
    (2, ONE_D, 7, "mce"),
    (2, ONE_D, 8, "cx8"),
    (2, ONE_D, 9, "apic"),
    (2, ONE_D, 11, "sep"),
    (2, ONE_D, 12, "mtrr"),
    (2, ONE_D, 13, "pge"),
    (2, ONE_D, 14, "mca"),
    (2, ONE_D, 15, "cmov"),
    (2, ONE_D, 16, "pat"),
    (2, ONE_D, 17, "pse36"),
    (2, ONE_D, 19, "clflush"),
    (2, ONE_D, 23, "mmx"),
    (2, ONE_D, 24, "fxsr"),
    (2, ONE_D, 25, "sse"),
    (2, ONE_D, 26, "sse2"),
    (2, ONE_C, 0, "sse3"),
    (2, ONE_C, 9, "ssse3"),
    (2, ONE_C, 13, "cx16"),
    (2, ONE_C, 19, "sse4.1"),
    (2, ONE_C, 20, "sse4.2"),
    (2, ONE_C, 21, "x2apic"),
    (2, ONE_C, 23, "popcnt"),
    (2, EXTENDED_C, 0, "lahf"),
    (2, EXTENDED_D, 11, "syscall"),
    (2, EXTENDED_D, 20, "nx"),
    (2, EXTENDED_D, 29, "lm"),
    (3, ONE_C, 1, "pclmulqdq"),
    (3, ONE_C, 12, "fma"),
    (3, ONE_C, 22, "movbe"),
    (3, ONE_C, 25, "aes"),
    (3, ONE_C, 26, "xsave"),
    (3, ONE_C, 28, "avx"),
    (3, ONE_C, 29, "f16c"),
    (3, SEVEN_B, 0, "fsgsbase"),
    (3, SEVEN_B, 3, "bmi1"),
    (3, SEVEN_B, 5, "avx2"),
    (3, SEVEN_B, 7, "smep"),
    (3, SEVEN_B, 8, "bmi2"),
    (3, EXTENDED_C, 5, "lzcnt"),
    (4, SEVEN_B, 16, "avx512f"),
    (4, SEVEN_B, 17, "avx512dq"),
    (4, SEVEN_B, 20, "smap"),
    (4, SEVEN_B, 28, "avx512cd"),
    (4, SEVEN_B, 30, "avx512bw"),
    (4, SEVEN_B, 31, "avx512vl"),
    (4, XSAVE_A, 0, "xsaveopt"),
    (4, XSAVE_A, 1, "xsavec"),
];

/// Bits that stay as they are: the deadline timer and the hypervisor's mark, which this program sets; threads in a package;
/// what says how to read AMD's topology; controls against speculation; clocks, interrupts and steal time of KVM 5.10.
const KEPT: &[(Word, u32)] = &[
    (ONE_C, 1 << 24 | 1 << 31),
    (ONE_D, 1 << 28),
    (EXTENDED_C, 1 << 22),
    // AMD repeats these of leaf 1.
    (EXTENDED_D, 0x0183_f3ff),
    (SEVEN_D, 1 << 10 | 1 << 26 | 1 << 27 | 1 << 28 | 1 << 29 | 1 << 31),
    (SPECULATION_B, 1 << 12 | 1 << 14 | 1 << 15 | 1 << 17 | 1 << 18 | 1 << 24 | 1 << 25 | 1 << 26),
    (KVM_A, 1 | 1 << 1 | 1 << 3 | 1 << 5 | 1 << 6 | 1 << 7 | 1 << 9 | 1 << 11 | 1 << 24),
];

/// Words of which nothing but the above is shown.
const WORDS: &[Word] =
    &[ONE_C, ONE_D, SEVEN_B, (7, 0, C), SEVEN_D, XSAVE_A, EXTENDED_C, EXTENDED_D, SPECULATION_B, KVM_A];

/// Leaves that are shown at all: identity, features, caches, ARAT, topology, XSAVE, hypervisor, addresses.
const LEAVES: &[u32] = &[
    0,
    1,
    2,
    4,
    6,
    7,
    0xb,
    0xd,
    0x4000_0000,
    0x4000_0001,
    0x4000_0010,
    0x8000_0000,
    0x8000_0001,
    0x8000_0002,
    0x8000_0003,
    0x8000_0004,
    0x8000_0005,
    0x8000_0006,
    0x8000_0007,
    0x8000_0008,
    0x8000_001d,
    0x8000_001e,
];

const XSAVE: u32 = 0xd;
/// Legacy area and header, in bytes.
const XSAVE_BASE: u32 = 576;
/// Invariant TSC.
const POWER_D: u32 = 1 << 8;

/// Takes from `entries`, what KVM supports here, all that `baseline` does not name; an error if it lacks something.
pub(super) fn apply(entries: &mut Vec<kvm_cpuid_entry2>, baseline: CpuBaseline) -> Result<(), BaselineError> {
    // What the level has of extended state: nothing; x87, SSE and AVX; these and the three parts of AVX-512.
    let (level, state) = match baseline {
        CpuBaseline::Host => return Ok(()),
        CpuBaseline::V2 => (2, 0),
        CpuBaseline::V3 => (3, 0b111),
        CpuBaseline::V4 => (4, 0b1110_0111),
    };
    let features = || FEATURES.iter().filter(|(from, ..)| *from <= level);
    for (_, word, bit, lacks) in features() {
        let has = entries.iter_mut().any(|entry| register(entry, *word).is_some_and(|value| *value >> bit & 1 == 1));
        if !has {
            return Err(BaselineError { baseline, lacks });
        }
    }
    entries.retain(|entry| LEAVES.contains(&entry.function) && (entry.function != 7 || entry.index == 0));
    for word in WORDS {
        let named = features().filter(|(_, of, ..)| of == word).fold(0, |mask, (_, _, bit, _)| mask | 1 << bit);
        let kept = KEPT.iter().filter(|(of, _)| of == word).fold(0, |mask, (_, kept)| mask | kept);
        entries.iter_mut().filter_map(|entry| register(entry, *word)).for_each(|value| *value &= named | kept);
    }
    limit_xsave(entries, state);
    for entry in entries.iter_mut() {
        match entry.function {
            0 => entry.eax = entry.eax.min(XSAVE),
            6 => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (entry.eax & 1 << 2, 0, 0, 0),
            7 => entry.eax = 0,
            0x8000_0000 => entry.eax = entry.eax.min(0x8000_001e),
            0x8000_0007 => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, entry.edx & POWER_D),
            _ => {}
        }
    }
    Ok(())
}

/// Leaves of leaf 0xd only the state components in `mask`, and says how much room they need.
fn limit_xsave(entries: &mut Vec<kvm_cpuid_entry2>, mask: u32) {
    entries.retain(|entry| match (entry.function, entry.index) {
        (XSAVE, _) if mask == 0 => false,
        (XSAVE, index) => index < 2 || (index < 32 && mask >> index & 1 == 1),
        _ => true,
    });
    let components = entries.iter().filter(|entry| entry.function == XSAVE && entry.index >= 2);
    let room = components.map(|entry| entry.ebx.saturating_add(entry.eax)).max().unwrap_or(0).max(XSAVE_BASE);
    for entry in entries.iter_mut().filter(|entry| entry.function == XSAVE) {
        match entry.index {
            0 => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (entry.eax & mask, room, room, 0),
            1 => (entry.ebx, entry.ecx, entry.edx) = (room, 0, 0),
            _ => {}
        }
    }
}

fn register(entry: &mut kvm_cpuid_entry2, (function, index, register): Word) -> Option<&mut u32> {
    if (entry.function, entry.index) != (function, index) {
        return None;
    }
    Some(match register {
        A => &mut entry.eax,
        B => &mut entry.ebx,
        C => &mut entry.ecx,
        D => &mut entry.edx,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A processor that has everything.
    fn all() -> Vec<kvm_cpuid_entry2> {
        let ones = |function, index| kvm_cpuid_entry2 {
            function,
            index,
            eax: u32::MAX,
            ebx: u32::MAX,
            ecx: u32::MAX,
            edx: u32::MAX,
            ..Default::default()
        };
        let mut entries: Vec<_> = LEAVES.iter().map(|leaf| ones(*leaf, 0)).collect();
        entries.extend([ones(7, 1), ones(0xa, 0), ones(0x14, 0), ones(0x8000_0021, 0), ones(XSAVE, 1)]);
        for (index, size, offset) in
            [(2, 256, 576), (5, 64, 832), (6, 512, 896), (7, 1024, 1408), (9, 8, 2432), (18, 8192, 2816)]
        {
            entries.push(kvm_cpuid_entry2 { function: XSAVE, index, eax: size, ebx: offset, ..Default::default() });
        }
        entries
    }

    fn value(entries: &mut [kvm_cpuid_entry2], word: Word) -> u32 {
        entries.iter_mut().find_map(|entry| register(entry, word).copied()).unwrap_or_default()
    }

    #[test]
    fn a_level_has_its_features_and_no_others() {
        for (baseline, level) in [(CpuBaseline::V2, 2), (CpuBaseline::V3, 3), (CpuBaseline::V4, 4)] {
            let mut entries = all();
            apply(&mut entries, baseline).expect("a processor that has everything");
            for (from, word, bit, name) in FEATURES.iter().filter(|(_, word, ..)| *word != XSAVE_A) {
                assert_eq!(value(&mut entries, *word) >> bit & 1 == 1, *from <= level, "{baseline}: {name}");
            }
            assert!(
                !entries
                    .iter()
                    .any(|e| [0xa, 0x14, 0x8000_0021].contains(&e.function) || (e.function, e.index) == (7, 1))
            );
            assert_eq!(value(&mut entries, (7, 0, C)), 0);
        }
        let mut entries = all();
        apply(&mut entries, CpuBaseline::Host).expect("the host");
        assert_eq!(entries, all());
    }

    #[test]
    fn what_a_host_lacks_is_named() {
        let mut entries = all();
        entries.iter_mut().filter(|e| (e.function, e.index) == (7, 0)).for_each(|e| e.ebx = !(1 << 5));
        let refused = apply(&mut entries.clone(), CpuBaseline::V3).expect_err("no AVX2");
        assert_eq!(refused.lacks, "avx2");
        assert!(refused.to_string().contains("x86-64-v3"));
        assert_eq!(apply(&mut entries, CpuBaseline::V2), Ok(()));
    }

    #[test]
    fn extended_state_has_the_room_that_its_parts_need() {
        let room = |baseline| {
            let mut entries = all();
            apply(&mut entries, baseline).expect("a processor that has everything");
            let parts = entries.iter().filter(|e| e.function == XSAVE).count();
            (parts, value(&mut entries, (XSAVE, 0, A)), value(&mut entries, (XSAVE, 0, C)))
        };
        assert_eq!(room(CpuBaseline::V2), (0, 0, 0));
        assert_eq!(room(CpuBaseline::V3), (3, 0b111, 832));
        assert_eq!(room(CpuBaseline::V4), (6, 0b1110_0111, 2432));
    }
}
