//! The disk's thread with a mock driver: who may make it rest, and what a broken driver costs.

use super::*;
use crate::lease::{LeaseGate, boottime_ms};
use crate::machine::block::{BlockDevice, DiskError, DiskSettings};
use crate::machine::control::Control;
use crate::machine::event::Events;
use crate::machine::pci::PciFunction;
use crate::machine::rate::{Rate, RateLimits};
use crate::machine::thread::{Background, Crew};
use crate::machine::virtio::mock::{MockDriver, NEXT, WRITE};
use crate::machine::virtio::{VirtioPci, feature};
use crate::machine::wires::mock::MockWires;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

const HOUR_MS: u64 = 3_600_000;

/// A disk that counts its flushes, and that holds them up while `held`.
#[derive(Default)]
struct SlowDisk {
    flushes: AtomicU64,
    held: AtomicBool,
    inside: AtomicBool,
    size: AtomicU64,
    /// How many reads came together, each time.
    together: Mutex<Vec<usize>>,
}

impl Disk for SlowDisk {
    fn size(&self) -> u64 {
        self.size.load(Ordering::SeqCst)
    }
    fn read(&self, _offset: u64, _data: &mut [u8]) -> Result<(), DiskError> {
        Ok(())
    }
    fn write(&self, _offset: u64, _data: &[u8]) -> Result<(), DiskError> {
        Ok(())
    }
    fn read_many(&self, requests: &mut [(u64, &mut [u8])]) -> Vec<Result<(), DiskError>> {
        self.together.lock().expect("no test panicked").push(requests.len());
        requests.iter_mut().map(|(offset, data)| self.read(*offset, data)).collect()
    }
    fn flush(&self) -> Result<(), DiskError> {
        self.inside.store(true, Ordering::SeqCst);
        while self.held.load(Ordering::SeqCst) {
            std::thread::sleep(Duration::from_millis(1));
        }
        self.inside.store(false, Ordering::SeqCst);
        self.flushes.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }
    fn id(&self) -> [u8; 20] {
        [0; 20]
    }
}

struct Bench {
    driver: MockDriver,
    disk: Arc<SlowDisk>,
    device: Arc<BlockDevice>,
    pci: VirtioPci,
    gate: Arc<LeaseGate>,
    worker: Vec<Arc<dyn Background>>,
}

impl Bench {
    fn new() -> Self {
        Self::with(DiskSettings::default())
    }

    fn with(settings: DiskSettings) -> Self {
        let driver = MockDriver::new();
        let disk = Arc::new(SlowDisk { size: AtomicU64::new(4096), ..SlowDisk::default() });
        let device = Arc::new(BlockDevice::new("d", disk.clone(), &settings).expect("eventfd"));
        let wires = Arc::new(MockWires::default());
        let pci = VirtioPci::new(device.clone(), 1, driver.memory.clone(), wires).expect("eventfds");
        let gate = Arc::new(LeaseGate::unlimited());
        let control = Arc::new(Control::new(Arc::new(Events::new().expect("eventfd"))));
        let worker = device.hire(&Crew::new(Arc::new(|_| Ok(())), gate.clone(), control)).expect("a thread");
        Self { driver, disk, device, pci, gate, worker }
    }

    fn bring_up(&self) {
        let write = |at: u64, value: u64, width: usize| self.pci.bar_write(at, &value.to_le_bytes()[..width]);
        write(0x14, 3, 1);
        for (select, value) in [(0, 0), (1, feature::VERSION_1 >> 32)] {
            write(0x08, select, 4);
            write(0x0c, value, 4);
        }
        write(0x14, 11, 1);
        write(0x18, u64::from(MockDriver::SIZE), 2);
        for (at, address) in [0x20, 0x28, 0x30].into_iter().zip(MockDriver::RING) {
            write(at, address, 8);
        }
        write(0x1c, 1, 2);
        write(0x14, 15, 1);
        assert_eq!(self.status(), 15);
    }

    fn status(&self) -> u8 {
        let mut status = [0];
        self.pci.bar_read(0x14, &mut status);
        status[0]
    }

    fn flush(&self) {
        self.driver.put(0x4000, 4_u32);
        self.driver.offer(&[(0x4000, 16, NEXT, 1), (0x5000, 1, WRITE, 0)]);
        self.knock();
    }

    fn knock(&self) {
        self.pci.bar_write(0x3000, &[0, 0]);
    }

    fn pause(&self) {
        self.worker.iter().for_each(|worker| worker.pause());
    }

    fn resume(&self) {
        self.worker.iter().for_each(|worker| worker.resume());
    }

    fn flushes(&self) -> u64 {
        self.disk.flushes.load(Ordering::SeqCst)
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        self.disk.held.store(false, Ordering::SeqCst);
        self.worker.iter().for_each(|worker| worker.stop());
    }
}

fn eventually(what: &str, mut done: impl FnMut() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < Duration::from_secs(60), "never: {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn requests_are_served_and_answered() {
    let bench = Bench::new();
    bench.bring_up();
    for round in 1..=40 {
        bench.flush();
        eventually("served", || bench.driver.used() == round);
        assert_eq!(bench.driver.used_length(round - 1), 1);
    }
    assert_eq!((bench.flushes(), bench.device.counters().flushes), (40, 40));
}

/// What waits is taken together as far as it can be, in order, and all of it is answered.
#[test]
fn reads_that_wait_are_served_together() {
    let bench = Bench::new();
    bench.bring_up();
    bench.pause();
    // Two reads, a FLUSH, a read: each of three descriptors.
    for (slot, kind) in (0..4).zip([0_u32, 0, 4, 0]) {
        let (first, header) = (3 * slot as u16, 0x4000 + 64 * slot);
        bench.driver.put(header, kind);
        let chain = [(header, 16, NEXT, first + 1), (0x5000 + 512 * slot, 512, NEXT | WRITE, first + 2)];
        let status = (0x8000 + slot, 1, WRITE, 0);
        bench.driver.table(MockDriver::RING[0] + 48 * slot, &[chain[0], chain[1], status]);
    }
    bench.driver.set_heads(&[0, 3, 6, 9]);
    bench.driver.set_available(4);
    bench.resume();
    bench.knock();
    eventually("all served", || bench.driver.used() == 4);
    assert_eq!(*bench.disk.together.lock().expect("no test panicked"), [2, 1]);
    assert_eq!(bench.flushes(), 1);
    let counters = bench.device.counters();
    assert_eq!((counters.reads, counters.flushes, counters.errors), (3, 1, 0));
}

#[test]
fn a_paused_disk_is_quiet_and_forgets_nothing() {
    let bench = Bench::new();
    bench.bring_up();
    bench.disk.held.store(true, Ordering::SeqCst);
    bench.flush();
    eventually("in hand", || bench.disk.inside.load(Ordering::SeqCst));
    std::thread::scope(|scope| {
        let worker = bench.worker[0].clone();
        let pause = scope.spawn(move || worker.pause());
        bench.disk.held.store(false, Ordering::SeqCst);
        pause.join().expect("pause returns");
    });
    assert_eq!(bench.driver.used(), 1, "the request in hand was finished");
    bench.flush();
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!(bench.driver.used(), 1, "and no other begun");
    bench.resume();
    eventually("served after the pause", || bench.driver.used() == 2);
}

#[test]
fn without_a_lease_requests_stay_queued() {
    let bench = Bench::new();
    bench.bring_up();
    bench.gate.close();
    bench.flush();
    eventually("parked", || bench.device.counters().parked > 0);
    bench.knock();
    assert_eq!((bench.driver.used(), bench.flushes()), (0, 0));
    bench.gate.open_until(boottime_ms() + HOUR_MS, boottime_ms() + HOUR_MS);
    bench.resume();
    eventually("served once the keys are back", || bench.driver.used() == 1);
    assert_eq!((bench.flushes(), bench.device.counters().errors), (1, 0));
}

#[test]
fn a_reset_waits_for_the_request_in_hand_but_no_vcpu_does() {
    let bench = Bench::new();
    bench.bring_up();
    bench.disk.held.store(true, Ordering::SeqCst);
    bench.flush();
    eventually("in hand", || bench.disk.inside.load(Ordering::SeqCst));
    bench.pci.bar_write(0x14, &[0]);
    assert_ne!(bench.status(), 0);
    bench.disk.held.store(false, Ordering::SeqCst);
    eventually("reset", || bench.status() == 0);
    bench.driver.set_available(0);
    bench.bring_up();
    bench.flush();
    eventually("served after the reset", || bench.flushes() == 2);
}

#[test]
fn a_broken_driver_breaks_its_own_device_only() {
    let bench = Bench::new();
    bench.bring_up();
    bench.driver.offer(&[(0x4000, 16, NEXT, 0)]);
    bench.knock();
    eventually("needs a reset", || bench.status() == 15 | 64);
    assert_eq!((bench.device.counters().breaks, bench.driver.used()), (1, 0));
    bench.flush();
    bench.knock();
    bench.pci.bar_write(0x14, &[0]);
    eventually("reset", || bench.status() == 0);
    bench.driver.set_available(0);
    bench.bring_up();
    bench.flush();
    eventually("served again", || bench.driver.used() > 0 && bench.flushes() == 1);
}

#[test]
fn a_limited_disk_is_slow_and_can_be_paused_meanwhile() {
    let hour = Rate { size: 1, one_time_burst: 2, refill: Duration::from_secs(3600) };
    let limits = RateLimits { bandwidth: None, operations: Some(hour) };
    let bench = Bench::with(DiskSettings { limits, ..DiskSettings::default() });
    bench.bring_up();
    for _ in 0..3 {
        bench.flush();
    }
    eventually("the burst and a full bucket", || bench.flushes() == 3);
    bench.flush();
    eventually("held", || bench.device.counters().held > 0);
    bench.pause();
    bench.resume();
    assert_eq!((bench.flushes(), bench.driver.used()), (3, 3));
    bench.pci.bar_write(0x14, &[0]);
    eventually("reset", || bench.status() == 0);
    let quick = Rate { size: 1, one_time_burst: 0, refill: Duration::from_millis(20) };
    let limits = RateLimits { bandwidth: None, operations: Some(quick) };
    let bench = Bench::with(DiskSettings { limits, ..DiskSettings::default() });
    bench.bring_up();
    for _ in 0..5 {
        bench.flush();
    }
    eventually("all, one after the other", || bench.flushes() == 5);
}

#[test]
fn a_disk_that_is_resized_tells_the_driver() {
    let bench = Bench::new();
    bench.bring_up();
    let capacity = || {
        let mut data = [0; 8];
        bench.pci.bar_read(0x2000, &mut data);
        u64::from_le_bytes(data)
    };
    let generation = || {
        let mut data = [0];
        bench.pci.bar_read(0x15, &mut data);
        data[0]
    };
    assert_eq!((capacity(), generation(), bench.device.look_again(), generation()), (8, 0, 4096, 0));
    bench.disk.size.store(8192 + 511, Ordering::SeqCst);
    assert_eq!((bench.device.look_again(), capacity(), generation()), (8192, 16, 1));
    let mut isr = [0];
    bench.pci.bar_read(0x1000, &mut isr);
    assert_eq!(isr, [2], "a configuration change");
}
