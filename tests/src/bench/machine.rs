//! What the figures are measured on.

use std::fs::read_to_string;

/// The machine, and whether KVM has the processor's help, in one line.
pub(super) fn describe() -> String {
    let cpus = read_to_string("/proc/cpuinfo").unwrap_or_default();
    let flags = cpus.lines().find(|line| line.starts_with("flags")).unwrap_or_default();
    let has = |flag: &str| flags.split(' ').any(|word| word == flag);
    let kvm = match (has("vmx"), has("svm")) {
        (true, _) => "KVM with VT-x",
        (_, true) => "KVM with SVM",
        _ => "KVM without VT-x or SVM (the guest's ring 0 is emulated)",
    };
    format!("{}, {kvm}", fealty_disk::bench::machine())
}
