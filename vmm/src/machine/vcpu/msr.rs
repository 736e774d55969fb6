//! Model-specific registers that a guest may touch. KVM answers for those that it knows; of these the guest gets the ones
//! below, and a general protection fault for all others: what is not listed can neither tell it of the host nor be lost when
//! its state is saved. x2APIC registers are not subject to the filter.

use kvm_ioctls::{Error, MsrFilterDefaultAction, MsrFilterRange, MsrFilterRangeFlags, VmFd};

/// Registers by range of 512: first and last of each run.
const ALLOWED: &[(u32, &[(u32, u32)])] = &[
    (
        0,
        &[
            (0x00, 0x01),   // machine check address and type of the Pentium, read at boot
            (0x10, 0x12),   // TSC; kvm-clock's first numbers
            (0x1b, 0x1b),   // APIC base
            (0x3a, 0x3b),   // feature control, TSC adjust
            (0x48, 0x49),   // speculation control, prediction command
            (0x8b, 0x8b),   // microcode revision
            (0xe1, 0xe1),   // umwait control
            (0xfe, 0xfe),   // MTRR capability
            (0x10a, 0x10b), // architecture capabilities, cache flush
            (0x122, 0x122), // TSX control
            (0x140, 0x140), // features' enables
            (0x174, 0x176), // sysenter
            (0x179, 0x17b), // machine check capability, status, control
            (0x1a0, 0x1a0), // miscellaneous enables
            (0x1d9, 0x1d9), // debug control
        ],
    ),
    (
        0x200,
        &[
            (0x200, 0x20f), // variable MTRRs
            (0x250, 0x250),
            (0x258, 0x259),
            (0x268, 0x26f), // fixed MTRRs
            (0x277, 0x277), // PAT
            (0x2ff, 0x2ff), // default memory type
        ],
    ),
    (0x400, &[(0x400, 0x47f)]),                   // machine check banks
    (0x6e0, &[(0x6e0, 0x6e0)]),                   // TSC deadline
    (0xda0, &[(0xda0, 0xda0)]),                   // supervisor states
    (0x4b56_4d00, &[(0x4b56_4d00, 0x4b56_4d08)]), // KVM's own
    (0xc000_0000, &[(0xc000_0080, 0xc000_0084), (0xc000_0100, 0xc000_0104)]), // EFER, syscall, bases, TSC_AUX, TSC ratio
    (
        0xc001_0000,
        &[
            (0xc001_0010, 0xc001_0010), // SYSCFG
            (0xc001_0015, 0xc001_0015), // HWCR
            (0xc001_001f, 0xc001_001f), // northbridge configuration
            (0xc001_0055, 0xc001_0055), // interrupt pending
            (0xc001_0058, 0xc001_0058), // ECAM base of AMD
            (0xc001_011f, 0xc001_011f), // virtual speculation control
            (0xc001_0140, 0xc001_0141), // OS visible workarounds
        ],
    ),
    (0xc001_1000, &[(0xc001_1020, 0xc001_1023), (0xc001_1029, 0xc001_102a)]), // load/store, caches, decode
];
const RANGE: u32 = 512;

/// Puts the filter in force for all vCPUs of `vm`.
pub(in crate::machine) fn filter(vm: &VmFd) -> Result<(), Error> {
    let maps: Vec<_> = ALLOWED.iter().map(|(base, runs)| bitmap(*base, runs)).collect();
    let ranges: Vec<_> = ALLOWED
        .iter()
        .zip(&maps)
        .map(|((base, _), bitmap)| MsrFilterRange {
            flags: MsrFilterRangeFlags::READ | MsrFilterRangeFlags::WRITE,
            base: *base,
            msr_count: RANGE,
            bitmap,
        })
        .collect();
    vm.set_msr_filter(MsrFilterDefaultAction::DENY, &ranges)
}

fn bitmap(base: u32, runs: &[(u32, u32)]) -> [u8; RANGE as usize / 8] {
    let mut map = [0; RANGE as usize / 8];
    for bit in runs.iter().flat_map(|(first, last)| *first - base..=*last - base) {
        map[bit as usize / 8] |= 1 << (bit % 8);
    }
    map
}

#[cfg(test)]
mod tests {
    use super::*;

    fn allowed(register: u32) -> bool {
        ALLOWED.iter().filter(|(base, _)| (*base..*base + RANGE).contains(&register)).any(|(base, runs)| {
            let bit = register - base;
            bitmap(*base, runs)[bit as usize / 8] >> (bit % 8) & 1 == 1
        })
    }

    #[test]
    fn ranges_are_sorted_apart_and_hold_their_registers() {
        assert!(ALLOWED.len() <= 16, "KVM takes 16");
        for (base, runs) in ALLOWED {
            assert!(
                runs.iter().all(|(first, last)| first >= base && first <= last && *last < base + RANGE),
                "{base:#x}"
            );
        }
        assert!(ALLOWED.windows(2).all(|pair| pair[0].0 + RANGE <= pair[1].0 || pair[1].0 == 0x6e0));
    }

    #[test]
    fn clocks_are_there_and_counters_are_not() {
        for register in [0x10, 0x1b, 0x2ff, 0x6e0, 0x4b56_4d01, 0xc000_0080, 0xc000_0103] {
            assert!(allowed(register), "{register:#x}");
        }
        // Performance counters, platform information, energy, SVM.
        for register in [0xc1, 0xce, 0x186, 0x38f, 0x606, 0xc001_0007, 0xc001_0114, 0xc001_0117] {
            assert!(!allowed(register), "{register:#x}");
        }
    }
}
