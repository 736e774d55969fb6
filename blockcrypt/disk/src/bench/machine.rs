//! What the figures are measured on.

use std::fs::read_to_string;

/// Processor, cores, memory, kernel, and how busy it is before it begins, in one line.
pub fn machine() -> String {
    let text = |path: &str| read_to_string(path).unwrap_or_default();
    let cpus = text("/proc/cpuinfo");
    let model = cpus.lines().find(|line| line.starts_with("model name"));
    let model = model.and_then(|line| line.split(':').nth(1)).unwrap_or_default().trim();
    let cores = cpus.lines().filter(|line| line.starts_with("processor")).count();
    let memory = text("/proc/meminfo");
    let kib = memory.split_whitespace().nth(1).and_then(|word| word.parse().ok()).unwrap_or(0u64);
    let kernel = text("/proc/sys/kernel/osrelease");
    let gib = (kib as f64 / f64::from(1 << 20)).round();
    let load = text("/proc/loadavg");
    let load = load.split(' ').next().unwrap_or_default();
    format!("{model}, {cores} cores, {gib} GiB, Linux {}, load {load}", kernel.trim())
}
