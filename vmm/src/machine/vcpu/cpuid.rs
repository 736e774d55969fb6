//! What the guest learns of its processors: what KVM supports, with numbers and places put right.

use super::baseline::{self, BaselineError};
use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};
use policy::config::CpuBaseline;

const ECX1_VMX: u32 = 1 << 5;
const ECX1_PDCM: u32 = 1 << 15;
const ECX1_TSC_DEADLINE: u32 = 1 << 24;
const ECX1_HYPERVISOR: u32 = 1 << 31;
const EDX1_HTT: u32 = 1 << 28;
const ECX7_SHADOW_STACKS: u32 = 1 << 7;
const EDX7_BRANCH_TRACKING: u32 = 1 << 20;
const ECX8000_0001_SVM: u32 = 1 << 2;
/// Performance counters: the core's, the northbridge's, the cache's.
const ECX8000_0001_COUNTERS: u32 = 1 << 23 | 1 << 24 | 1 << 28;
const KVM_BASE: u32 = 0x4000_0000;
const KVM_TIMING: u32 = 0x4000_0010;
/// KVM's local APIC timer ticks each nanosecond.
const APIC_BUS_KHZ: u32 = 1_000_000;

/// What stands behind the table.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Facts {
    /// What the guest's processors are to be.
    pub baseline: CpuBaseline,
    /// Processors of the machine.
    pub count: u8,
    /// Whether KVM's local APIC has the TSC deadline timer.
    pub tsc_deadline: bool,
}

/// The table for all vCPUs, from what KVM supports: one package, a core for each processor, no nested virtualization.
pub(crate) fn common(supported: &CpuId, facts: Facts) -> Result<Vec<kvm_cpuid_entry2>, BaselineError> {
    let topology = |entry: &kvm_cpuid_entry2| matches!(entry.function, 0xb | 0x1f | 0x8000_0026 | KVM_TIMING);
    let mut entries: Vec<_> = supported.as_slice().iter().copied().filter(|entry| !topology(entry)).collect();
    baseline::apply(&mut entries, facts.baseline)?;
    entries.iter_mut().for_each(|entry| adapt(entry, facts));
    // Two levels each: a thread a core, and all cores (Intel SDM 2A, CPUID).
    let shift = id_bits(facts.count);
    entries.push(level(0, 0, 1, 1));
    entries.push(level(1, shift, facts.count.into(), 2));
    entries.push(level(2, 0, 0, 0));
    Ok(entries)
}

/// Puts the APIC id of vCPU `index` into its table, and the frequency of its TSC where KVM knows it, so that no guest needs
/// to measure it with a PIT.
pub(crate) fn personalize(entries: &mut Vec<kvm_cpuid_entry2>, index: u8, tsc_khz: Option<u32>) {
    if let Some(eax) = tsc_khz {
        entries.push(kvm_cpuid_entry2 { function: KVM_TIMING, eax, ebx: APIC_BUS_KHZ, ..Default::default() });
    }
    for entry in entries {
        match entry.function {
            KVM_BASE if tsc_khz.is_some() => entry.eax = entry.eax.max(KVM_TIMING),
            0x1 => entry.ebx = entry.ebx & 0x00ff_ffff | u32::from(index) << 24,
            0xb => entry.edx = index.into(),
            0x8000_001e => {
                entry.eax = index.into();
                entry.ebx = index.into();
            }
            _ => {}
        }
    }
}

fn adapt(entry: &mut kvm_cpuid_entry2, facts: Facts) {
    let count = u32::from(facts.count);
    match entry.function {
        0x0 => entry.eax = entry.eax.max(0xb),
        0x1 => {
            entry.ebx = entry.ebx & 0xff00_ffff | count << 16;
            entry.ecx = entry.ecx & !(ECX1_VMX | ECX1_PDCM) | ECX1_HYPERVISOR;
            if facts.tsc_deadline {
                entry.ecx |= ECX1_TSC_DEADLINE;
            }
            entry.edx = if count > 1 { entry.edx | EDX1_HTT } else { entry.edx & !EDX1_HTT };
        }
        // Intel's caches: none is shared by threads, the largest by all; and cores in the package.
        0x4 if entry.eax & 0x1f != 0 => {
            let last = entry.eax >> 5 & 7 == 3;
            let sharers = if last { (1 << id_bits(facts.count)) - 1 } else { 0 };
            entry.eax = entry.eax & 0x3fff | sharers << 14 | ((1 << id_bits(facts.count)) - 1) << 26;
        }
        // AMD's, likewise.
        0x8000_001d if entry.eax & 0x1f != 0 => {
            let last = entry.eax >> 5 & 7 == 3;
            entry.eax = entry.eax & 0x3fff | if last { (count - 1) << 14 } else { 0 };
        }
        // What needs registers that `msr` does not list: control-flow enforcement, performance counters.
        0x7 if entry.index == 0 => {
            entry.ecx &= !ECX7_SHADOW_STACKS;
            entry.edx &= !EDX7_BRANCH_TRACKING;
        }
        0xa | 0x8000_0022 => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0),
        0x8000_0001 => entry.ecx &= !(ECX8000_0001_SVM | ECX8000_0001_COUNTERS),
        0x8000_0008 => entry.ecx = entry.ecx & !0xf0ff | id_bits(facts.count) << 12 | (count - 1),
        0x8000_000a => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0),
        // A thread a core, one node.
        0x8000_001e => (entry.ebx, entry.ecx) = (0, 0),
        _ => {}
    }
}

fn level(index: u32, shift: u32, processors: u32, kind: u32) -> kvm_cpuid_entry2 {
    kvm_cpuid_entry2 {
        function: 0xb,
        index,
        flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
        eax: shift,
        ebx: processors,
        ecx: index | kind << 8,
        ..Default::default()
    }
}

/// Bits that number `count` processors.
fn id_bits(count: u8) -> u32 {
    u32::from(count.max(1)).next_power_of_two().trailing_zeros()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table(count: u8) -> Vec<kvm_cpuid_entry2> {
        let entry = |function, eax, ecx| kvm_cpuid_entry2 { function, eax, ecx, ..Default::default() };
        let supported = [
            entry(0, 0x7, 0),
            entry(1, 0, ECX1_VMX),
            entry(0xb, 9, 9),
            entry(0x8000_0001, 0, u32::MAX),
            entry(0x8000_0008, 0x3030, 0x7001),
            entry(KVM_BASE, 0x4000_0001, 0),
        ];
        let supported = CpuId::from_entries(&supported).expect("a small table");
        let facts = Facts { baseline: CpuBaseline::Host, count, tsc_deadline: true };
        let mut entries = common(&supported, facts).expect("the host's own");
        personalize(&mut entries, 2, Some(2_000_000));
        entries
    }

    fn get(entries: &[kvm_cpuid_entry2], function: u32, index: u32) -> kvm_cpuid_entry2 {
        *entries.iter().find(|e| (e.function, e.index) == (function, index)).expect("an entry")
    }

    #[test]
    fn each_processor_has_its_place() {
        let four = table(4);
        let one = get(&four, 1, 0);
        assert_eq!((one.ebx >> 24, one.ebx >> 16 & 0xff, one.edx >> 28 & 1), (2, 4, 1));
        let cores = get(&four, 0xb, 1);
        assert_eq!((cores.eax, cores.ebx, cores.ecx, cores.edx), (2, 4, 0x201, 2));
        assert_eq!(get(&four, 0xb, 0).eax, 0);
        assert_eq!(get(&four, 0x8000_0008, 0).ecx, 0x2003);
        assert_eq!(get(&table(3), 0xb, 1).eax, 2, "three processors need two bits");
        assert_eq!(get(&table(1), 1, 0).edx >> 28 & 1, 0);
    }

    /// Every number of processors, by each of the ways in which guests read it: Intel's leaves 1, 4 and 0xb, AMD's 0x8000_0008,
    /// 0x8000_001d and 0x8000_001e. All say the same: one package, a core for each processor, a last cache for all of them.
    #[test]
    fn every_number_of_processors_is_one_package_of_cores() {
        for count in 1..=16_u8 {
            let cache = |function, index, level: u32| kvm_cpuid_entry2 {
                function,
                index,
                eax: u32::MAX << 14 | level << 5 | 1,
                ..Default::default()
            };
            let entry = |function| kvm_cpuid_entry2 { function, ecx: u32::MAX, ebx: u32::MAX, ..Default::default() };
            let supported: Vec<_> = [0, 1, 0xb, 0x1f, 0x8000_0008, 0x8000_001e, 0x8000_0026].map(entry).into();
            let caches = [cache(4, 0, 1), cache(4, 1, 3), cache(0x8000_001d, 0, 1), cache(0x8000_001d, 1, 3)];
            let supported = CpuId::from_entries(&[supported, caches.into()].concat()).expect("a small table");
            let common = common(&supported, Facts { baseline: CpuBaseline::Host, count, tsc_deadline: true });
            let common = common.expect("the host's own");
            let bits = (0..8).find(|bits| 1_u32 << bits >= u32::from(count)).expect("few bits");
            let mut ids = std::collections::BTreeSet::new();
            for index in 0..count {
                let mut table = common.clone();
                personalize(&mut table, index, None);
                let id = get(&table, 1, 0).ebx >> 24;
                assert!(ids.insert(id) && id >> bits == 0, "{count} {id}");
                for level in 0..3 {
                    assert_eq!(get(&table, 0xb, level).edx, id, "{count}");
                }
                let place = get(&table, 0x8000_001e, 0);
                assert_eq!((place.eax, place.ebx & 0xff, place.ebx >> 8 & 0xff, place.ecx & 0x7ff), (id, id, 0, 0));
                let (threads, cores) = (get(&table, 0xb, 0), get(&table, 0xb, 1));
                assert_eq!((threads.eax, threads.ebx, threads.ecx >> 8), (0, 1, 1), "a thread a core");
                assert_eq!((cores.eax, cores.ebx, cores.ecx >> 8), (bits, count.into(), 2), "all cores");
                assert_eq!(get(&table, 1, 0).ebx >> 16 & 0xff, u32::from(count));
                let sizes = get(&table, 0x8000_0008, 0).ecx;
                assert_eq!((sizes & 0xff, sizes >> 12 & 0xf), (u32::from(count) - 1, bits));
                let sharers = |function, index| get(&table, function, index).eax >> 14 & 0xfff;
                assert_eq!((sharers(4, 0), sharers(0x8000_001d, 0)), (0, 0), "the first cache is a core's own");
                // Intel counts places for processors, AMD processors: either way all fall into one.
                assert_eq!((sharers(4, 1), sharers(0x8000_001d, 1)), ((1 << bits) - 1, u32::from(count) - 1));
                assert_eq!(get(&table, 4, 1).eax >> 26, (1 << bits) - 1, "places for cores");
                let leaves = |function| table.iter().filter(|entry| entry.function == function).count();
                assert_eq!((leaves(0xb), leaves(0x1f), leaves(0x8000_0026)), (3, 0, 0), "no topology of the host's");
            }
        }
    }

    #[test]
    fn no_nested_virtualization_but_a_clock() {
        let table = table(1);
        let one = get(&table, 1, 0);
        assert_eq!(one.ecx & (ECX1_VMX | ECX1_HYPERVISOR | ECX1_TSC_DEADLINE), ECX1_HYPERVISOR | ECX1_TSC_DEADLINE);
        assert_eq!(get(&table, 0x8000_0001, 0).ecx & ECX8000_0001_SVM, 0);
        assert_eq!((get(&table, KVM_BASE, 0).eax, get(&table, KVM_TIMING, 0).eax), (KVM_TIMING, 2_000_000));
        assert_eq!(table.iter().filter(|e| e.function == 0xb).count(), 3);
    }
}
