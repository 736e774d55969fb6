//! Requests under way together, on a real file, with a mock driver.

use crate::lease::LeaseGate;
use crate::machine::block::{BlockDevice, DiskSettings, RawDisk};
use crate::machine::control::Control;
use crate::machine::event::Events;
use crate::machine::pci::PciFunction;
use crate::machine::thread::{Background, Crew};
use crate::machine::virtio::mock::{Descriptor, INDIRECT, MockDriver, NEXT, WRITE};
use crate::machine::virtio::{VirtioDevice, VirtioPci, feature};
use crate::machine::wires::mock::MockWires;
use proptest::prelude::*;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use vm_memory::{Bytes, GuestAddress};

const SIZE: u64 = 1 << 20;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;

/// A disk in a file behind two queues; the driver uses the first.
struct Bench {
    driver: MockDriver,
    file: File,
    device: Arc<BlockDevice>,
    pci: VirtioPci,
    threads: Vec<Arc<dyn Background>>,
}

impl Bench {
    fn new() -> Self {
        Self::on(true)
    }

    /// With rings, or with threads alone.
    fn on(rings: bool) -> Self {
        let file = tempfile::tempfile().expect("a file");
        let content: Vec<u8> = (0..SIZE).map(|at| (at / 512) as u8).collect();
        file.write_all_at(&content, 0).expect("room");
        let settings = DiskSettings { queues: 2, queue_size: 16, ..DiskSettings::default() };
        let mut disk = RawDisk::new(file.try_clone().expect("a descriptor"), "disk").expect("a disk");
        if rings {
            let (with, made) = disk.with_rings(settings.queues, settings.queue_size);
            made.expect("this test needs io_uring");
            disk = with;
        }
        let device = Arc::new(BlockDevice::new("d", Arc::new(disk), &settings).expect("eventfds"));
        let driver = MockDriver::new();
        let wires = Arc::new(MockWires::default());
        let pci = VirtioPci::new(device.clone(), 1, driver.memory.clone(), wires).expect("eventfds");
        let control = Arc::new(Control::new(Arc::new(Events::new().expect("eventfd"))));
        let crew = Crew::new(Arc::new(|_| Ok(())), Arc::new(LeaseGate::unlimited()), control);
        let threads = device.hire(&crew).expect("threads");
        let bench = Self { driver, file, device, pci, threads };
        bench.bring_up();
        bench
    }

    fn bring_up(&self) {
        self.start();
        assert_eq!(self.status(), 15);
    }

    /// What a driver does, whatever becomes of it.
    fn start(&self) {
        let write = |at: u64, value: u64, width: usize| self.pci.bar_write(at, &value.to_le_bytes()[..width]);
        write(0x14, 3, 1);
        let features = feature::VERSION_1 | feature::INDIRECT_DESCRIPTORS;
        for (select, value) in [(0, features & 0xffff_ffff), (1, features >> 32)] {
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
    }

    fn status(&self) -> u8 {
        let mut status = [0];
        self.pci.bar_read(0x14, &mut status);
        status[0]
    }

    fn knock(&self) {
        self.pci.bar_write(0x3000, &[0, 0]);
    }

    /// Offers request `slot` (0 to 4), of `length` bytes at `sector`, without a knock. Its data lie at [`data`].
    fn offer(&self, slot: u64, kind: u32, sector: u64, length: u32) {
        let (header, status) = (0x4000 + 32 * slot, 0x4000 + 32 * slot + 16);
        self.driver.put(header, kind);
        self.driver.put(header + 8, sector);
        self.driver.put(status, 0xee_u8);
        let data = if kind == 0 { NEXT | WRITE } else { NEXT };
        let whole: [Descriptor; 3] = [(header, 16, NEXT, 1), (data_at(slot), length, data, 2), (status, 1, WRITE, 0)];
        let table = 0x4800 + 48 * slot;
        self.driver.table(table, &whole);
        self.driver.offer_at(slot as u16, (table, 48, INDIRECT, 0));
    }

    /// Offers one request, knocks, and waits for its status.
    fn ask(&self, kind: u32, sector: u64, length: u32) -> u8 {
        let before = self.driver.used();
        self.offer(0, kind, sector, length);
        self.knock();
        eventually("answered", || self.driver.used() == before.wrapping_add(1));
        self.answer(0)
    }

    fn answer(&self, slot: u64) -> u8 {
        self.driver.get(0x4000 + 32 * slot + 16)
    }

    fn extent(&self, sector: u64, count: u32, flags: u32) {
        self.driver.put(data_at(0), sector);
        self.driver.put(data_at(0) + 8, count);
        self.driver.put(data_at(0) + 12, flags);
    }

    fn on_disk(&self, sector: u64) -> Vec<u8> {
        let mut data = vec![0; 512];
        self.file.read_exact_at(&mut data, 512 * sector).expect("inside");
        data
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        self.threads.iter().for_each(|thread| thread.stop());
    }
}

fn data_at(slot: u64) -> u64 {
    0x6000 + 0x2000 * slot
}

fn eventually(what: &str, mut done: impl FnMut() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < Duration::from_secs(60), "never: {what}");
        std::thread::yield_now();
    }
}

#[test]
fn both_engines_read_write_flush_and_forget() {
    for rings in [true, false] {
        let bench = Bench::on(rings);
        assert_eq!(bench.ask(0, 9, 1024), 0);
        assert_eq!([0, 511, 512, 1023].map(|at| bench.driver.get::<u8>(data_at(0) + at)), [9, 9, 10, 10]);
        bench.driver.put(data_at(0), [0xab_u8; 32]);
        assert_eq!((bench.ask(1, 3, 512), bench.ask(4, 0, 0)), (0, 0));
        assert_eq!(bench.on_disk(3)[..33], [[0xab; 32].as_slice(), &[9]].concat());
        assert_eq!((bench.ask(1, SIZE / 512, 512), bench.ask(0, 0, 100), bench.ask(99, 0, 0)), (1, 1, 2));
        bench.extent(20, 2, 0);
        assert_eq!(bench.ask(DISCARD, 0, 16), 0);
        bench.extent(26, 1, 1);
        assert_eq!(bench.ask(WRITE_ZEROES, 0, 16), 0);
        bench.extent(24, 1, 0);
        // A file system that has holes may not know how to zero and keep the room: then the guest is told so.
        let knows = match bench.ask(WRITE_ZEROES, 0, 16) {
            0 => true,
            2 => false,
            other => panic!("status {other}"),
        };
        let sums = [19, 20, 21, 22, 24, 25, 26, 27].map(|sector| bench.on_disk(sector)[511]);
        assert_eq!(sums, [19, 0, 0, 22, if knows { 0 } else { 24 }, 25, 0, 27], "rings: {rings}");
        let counters = bench.device.counters();
        let counted = [counters.reads, counters.writes, counters.flushes, counters.discards, counters.write_zeroes];
        assert_eq!((counted, counters.errors), ([1, 1, 1, 1, 1 + u64::from(knows)], 4 - u64::from(knows)));
    }
}

#[test]
fn a_file_that_was_cut_short_gives_errors_and_nothing_worse() {
    let bench = Bench::new();
    bench.file.set_len(700).expect("shorter");
    assert_eq!((bench.ask(0, 0, 512), bench.ask(0, 1, 512), bench.ask(0, 100, 4096)), (0, 1, 1));
    assert_eq!(bench.status(), 15, "the device works on");
}

#[test]
fn many_requests_are_under_way_together() {
    let bench = Bench::new();
    for round in 0..200_u16 {
        for slot in 0..5 {
            bench.offer(slot, 0, u64::from(round) + slot, 512);
        }
        bench.knock();
        eventually("all answered", || bench.driver.used() == 5 * (round + 1));
        for slot in 0..5 {
            let first: u8 = bench.driver.get(data_at(slot));
            assert_eq!((bench.answer(slot), first), (0, (u64::from(round) + slot) as u8));
        }
    }
}

#[test]
fn a_reset_finds_nothing_under_way() {
    let bench = Bench::new();
    for _ in 0..100 {
        for slot in 0..5 {
            bench.offer(slot, 0, slot, 4096);
        }
        bench.knock();
        bench.pci.bar_write(0x14, &[0]);
        eventually("reset", || bench.status() == 0);
        // From here on the device may write nothing.
        let mark = [0x5a_u8; 32];
        (0..5).for_each(|slot| bench.driver.put(data_at(slot), mark));
        std::thread::yield_now();
        (0..5).for_each(|slot| assert_eq!(bench.driver.get::<[u8; 32]>(data_at(slot)), mark));
        bench.driver.set_available(0);
        bench.driver.put(MockDriver::RING[2] + 2, 0_u16);
        bench.bring_up();
    }
    assert_eq!((bench.ask(0, 7, 512), bench.driver.get::<u8>(data_at(0))), (0, 7));
}

#[test]
fn a_pause_finds_nothing_under_way_and_loses_nothing() {
    let bench = Bench::new();
    let mut sent = 0;
    for _ in 0..50 {
        for slot in 0..5 {
            bench.offer(slot, 1, 8 * slot, 4096);
        }
        sent += 5;
        bench.knock();
        bench.threads.iter().for_each(|thread| thread.pause());
        let counters = bench.device.counters();
        let used = bench.driver.used();
        std::thread::yield_now();
        assert_eq!((bench.device.counters(), bench.driver.used()), (counters, used));
        bench.threads.iter().for_each(|thread| thread.resume());
        eventually("all answered", || bench.driver.used() == sent);
    }
}

#[test]
fn a_driver_that_breaks_its_queue_under_load_gets_no_more_answers() {
    let bench = Bench::new();
    for slot in 0..5 {
        bench.offer(slot, 0, slot, 4096);
    }
    bench.driver.offer_at(5, (0x4000, 16, NEXT, 5));
    bench.knock();
    eventually("needs a reset", || bench.status() == 15 | 64);
    assert_eq!(bench.device.counters().breaks, 1);
    bench.pci.bar_write(0x14, &[0]);
    eventually("reset", || bench.status() == 0);
    bench.driver.set_available(0);
    bench.driver.put(MockDriver::RING[2] + 2, 0_u16);
    bench.bring_up();
    assert_eq!(bench.ask(0, 7, 512), 0);
}

/// Requests that need no disk, offered as fast as they are answered: the device's threads are busy, and obey all the same.
#[test]
fn a_driver_that_floods_its_queue_holds_up_no_pause_and_no_reset() {
    for rings in [true, false] {
        let bench = Bench::on(rings);
        for slot in 0..MockDriver::SIZE {
            let (header, status) = (0x4000, 0x4100 + u64::from(slot));
            bench.driver.put(header, 8_u32);
            let table = 0x4800 + 48 * u64::from(slot);
            bench.driver.table(table, &[(header, 16, NEXT, 1), (0x6000, 20, NEXT | WRITE, 2), (status, 1, WRITE, 0)]);
            bench.driver.table(MockDriver::RING[0] + 16 * u64::from(slot), &[(table, 48, INDIRECT, 0)]);
        }
        bench.driver.set_heads(&(0..MockDriver::SIZE).collect::<Vec<_>>());
        let (memory, over) = (bench.driver.memory.clone(), Arc::new(AtomicBool::new(false)));
        let (ends, device) = (over.clone(), bench.device.clone());
        let flood = std::thread::spawn(move || {
            while !ends.load(Ordering::SeqCst) {
                let used: u16 = memory.load(GuestAddress(MockDriver::RING[2] + 2), Ordering::SeqCst).expect("in RAM");
                let next = used.wrapping_add(MockDriver::SIZE);
                memory.store(next, GuestAddress(MockDriver::RING[1] + 2), Ordering::SeqCst).expect("in RAM");
                device.doorbell(0).expect("a queue").write(1).expect("rung");
            }
        });
        bench.knock();
        eventually("under load", || bench.driver.used() > 100);
        for _ in 0..20 {
            bench.threads.iter().for_each(|thread| thread.pause());
            let used = bench.driver.used();
            std::thread::yield_now();
            assert_eq!(bench.driver.used(), used);
            bench.threads.iter().for_each(|thread| thread.resume());
        }
        bench.pci.bar_write(0x14, &[0]);
        eventually("reset", || bench.status() == 0);
        over.store(true, Ordering::SeqCst);
        flood.join().expect("the flood ends");
        assert_eq!(bench.device.counters().breaks, 0);
    }
}

/// Another processor of the guest writes over rings, tables and headers while they are read.
#[test]
fn rings_that_move_while_they_are_read_cost_a_reset_at_most() {
    for rings in [true, false] {
        let bench = Bench::on(rings);
        let (memory, over) = (bench.driver.memory.clone(), Arc::new(AtomicBool::new(false)));
        let (ends, device) = (over.clone(), bench.device.clone());
        let scribbler = std::thread::spawn(move || {
            let mut random = 0x2545_f491_4f6c_dd1d_u64;
            while !ends.load(Ordering::SeqCst) {
                random ^= random << 13;
                random ^= random >> 7;
                random ^= random << 17;
                let at =
                    [0x1000 + random % 0x100, 0x4000 + random % 0xb00, 0x2000 + random % 0x24][random as usize % 3];
                memory.write_obj((random >> 32) as u8 & 0x1f, GuestAddress(at)).expect("in RAM");
                if random.is_multiple_of(64) {
                    device.doorbell(0).expect("a queue").write(1).expect("rung");
                }
            }
        });
        for round in 0..300 {
            for slot in 0..5 {
                bench.offer(slot, [0, 1, 4, DISCARD, WRITE_ZEROES][(slot as usize + round) % 5], 8 * slot, 512);
            }
            bench.knock();
            std::thread::yield_now();
            bench.pci.bar_write(0x14, &[0]);
            eventually("reset", || bench.status() == 0);
            bench.driver.set_available(0);
            bench.driver.put(MockDriver::RING[2] + 2, 0_u16);
            bench.start();
        }
        over.store(true, Ordering::SeqCst);
        scribbler.join().expect("it ends");
        bench.pci.bar_write(0x14, &[0]);
        eventually("reset", || bench.status() == 0);
        bench.driver.set_available(0);
        bench.driver.put(MockDriver::RING[2] + 2, 0_u16);
        bench.bring_up();
        assert_eq!(bench.ask(0, 2000, 512), 0);
        assert_eq!(bench.file.metadata().expect("metadata").len(), SIZE);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// Whatever stands in rings, tables and headers: the device answers or gives up, the disk keeps its length, and after a reset
    /// everything works.
    #[test]
    fn any_rings_are_survived(
        bytes in prop::collection::vec(any::<u8>(), 0x600),
        spots in prop::collection::vec((0_u64..0x900, 0_u16..0x400), 0..24),
        index in 0_u16..17,
    ) {
        let bench = Bench::new();
        for slot in 0..5 {
            bench.offer(slot, [0, 1, 4, DISCARD, WRITE_ZEROES][slot as usize], 8 * slot, 16 + 496 * u32::from(slot < 2));
        }
        for (at, value) in &spots {
            // Descriptors, the available ring, headers and indirect tables.
            let at = match at { 0..0x100 => 0x1000 + at, 0x100..0x140 => 0x1f00 + at, _ => 0x3f00 + at };
            bench.driver.put(at, *value);
        }
        if spots.len() > 12 {
            bytes.chunks_exact(4).enumerate().for_each(|(n, word)| {
                bench.driver.put(0x1000 + 4 * (n as u64 % 64), [word[0], word[1], word[2], word[3]]);
            });
        }
        bench.driver.put(MockDriver::RING[1] + 2, index);
        bench.knock();
        eventually("served or given up", || bench.status() & 64 != 0 || bench.driver.used() == index);
        bench.pci.bar_write(0x14, &[0]);
        eventually("reset", || bench.status() == 0);
        prop_assert_eq!(bench.file.metadata().expect("metadata").len(), SIZE);
        bench.driver.set_available(0);
        bench.driver.put(MockDriver::RING[2] + 2, 0_u16);
        bench.bring_up();
        prop_assert_eq!(bench.ask(0, 2000, 512), 0);
    }
}
