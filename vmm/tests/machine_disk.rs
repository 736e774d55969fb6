//! The guest's disk: what it reads and writes is what lies behind it.

mod machine;

use fealty_vmm::lease::LeaseGate;
use fealty_vmm::machine::{Disk, DiskError, MachineEvent, RawDisk};
use machine::Plan;
use policy::Digest;
use std::fs::File;
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

const BLOCK: usize = 4096;

fn image(bytes: usize) -> (File, Vec<u8>) {
    let content: Vec<u8> = (0..bytes as u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
    let mut file = tempfile::tempfile().expect("a file");
    file.write_all(&content).expect("written");
    (file, content)
}

fn raw(file: &File) -> Arc<RawDisk> {
    Arc::new(RawDisk::new(file.try_clone().expect("a descriptor"), "root").expect("a disk"))
}

#[test]
fn the_guest_reads_the_whole_disk() {
    let (file, content) = image(3 << 20);
    let guest = Plan::new("hash,poweroff").disk(raw(&file), true).boot();
    assert_eq!(guest.ends(), MachineEvent::PowerOff);
    assert_eq!(guest.screen.lines("sha256"), [format!("sha256 {}", Digest::of(&content))], "{}", guest.screen.text());
    let counters = &guest.running.counters().disks["disk0"];
    assert_eq!((counters.read_bytes, counters.writes, counters.errors, counters.breaks), (3 << 20, 0, 0, 0));
}

#[test]
fn what_the_guest_writes_is_there() {
    let (file, mut content) = image(1 << 20);
    let guest = Plan::new("write:5:0xab,flush,verify:5:0xab,hash,poweroff").disk(raw(&file), false).boot();
    assert_eq!(guest.ends(), MachineEvent::PowerOff);
    content[5 * BLOCK..6 * BLOCK].fill(0xab);
    let text = guest.screen.text();
    assert!(text.contains("write 5 ok") && text.contains("flush ok") && text.contains("verify 5 ok"), "{text}");
    assert_eq!(guest.screen.lines("sha256"), [format!("sha256 {}", Digest::of(&content))]);
    let mut found = vec![0; content.len()];
    file.read_exact_at(&mut found, 0).expect("the file");
    assert!(found == content, "the file is what the guest wrote");
}

#[test]
fn a_read_only_disk_stays_as_it_is() {
    let (file, content) = image(1 << 20);
    let guest = Plan::new("write:5:0xab,read:5,poweroff").disk(raw(&file), true).boot();
    assert_eq!(guest.ends(), MachineEvent::PowerOff);
    let text = guest.screen.text();
    assert!(!text.contains("write 5 ok"), "{text}");
    assert!(text.contains(&format!("read 5 {}", Digest::of(&content[5 * BLOCK..6 * BLOCK]))), "{text}");
    let mut found = vec![0; content.len()];
    file.read_exact_at(&mut found, 0).expect("the file");
    assert!(found == content);
}

/// A disk whose keys can be taken away.
struct KeyedDisk {
    disk: Arc<RawDisk>,
    keys: AtomicBool,
}

impl KeyedDisk {
    fn check(&self) -> Result<(), DiskError> {
        if self.keys.load(Ordering::SeqCst) { Ok(()) } else { Err(DiskError::NotNow) }
    }
}

impl Disk for KeyedDisk {
    fn size(&self) -> u64 {
        self.disk.size()
    }
    fn read(&self, offset: u64, data: &mut [u8]) -> Result<(), DiskError> {
        self.check().and_then(|()| self.disk.read(offset, data))
    }
    fn write(&self, offset: u64, data: &[u8]) -> Result<(), DiskError> {
        self.check().and_then(|()| self.disk.write(offset, data))
    }
    fn flush(&self) -> Result<(), DiskError> {
        self.check().and_then(|()| self.disk.flush())
    }
    fn id(&self) -> [u8; 20] {
        self.disk.id()
    }
}

#[test]
fn a_guest_loses_nothing_while_its_disk_has_no_keys() {
    let (file, _) = image(4 << 20);
    let disk = Arc::new(KeyedDisk { disk: raw(&file), keys: AtomicBool::new(true) });
    let guest = Plan::new("load:3,poweroff").disk(disk.clone(), false).boot();
    guest.sees("load started");
    for _ in 0..20 {
        std::thread::sleep(std::time::Duration::from_millis(50));
        disk.keys.store(false, Ordering::SeqCst);
        std::thread::sleep(std::time::Duration::from_millis(20));
        guest.running.pause();
        disk.keys.store(true, Ordering::SeqCst);
        guest.running.resume();
    }
    assert_eq!(guest.ends(), MachineEvent::PowerOff);
    assert_eq!(guest.screen.lines("load ok").len(), 1, "{}", guest.screen.text());
    let counters = &guest.running.counters().disks["disk0"];
    assert!(counters.parked > 0 && counters.errors == 0 && counters.breaks == 0, "{counters:?}");
}

#[test]
fn a_lease_that_ends_and_comes_back_costs_nothing() {
    let (file, _) = image(4 << 20);
    let gate = Arc::new(LeaseGate::unlimited());
    let plan = Plan { gate: gate.clone(), ..Plan::new("load:2,poweroff") };
    let guest = plan.disk(raw(&file), false).boot();
    guest.sees("load started");
    gate.close();
    guest.running.pause();
    let before = guest.running.counters();
    guest.running.resume();
    std::thread::sleep(std::time::Duration::from_millis(200));
    assert_eq!(guest.running.counters().disks["disk0"].writes, before.disks["disk0"].writes, "the gate is closed");
    gate.open_until(u64::MAX, u64::MAX);
    guest.running.resume();
    assert_eq!(guest.ends(), MachineEvent::PowerOff);
    assert_eq!(guest.screen.lines("load ok").len(), 1, "{}", guest.screen.text());
}
