//! Requests with a mock driver and a disk in memory.

use super::*;
use crate::machine::sync::lock;
use crate::machine::virtio::mock::{Descriptor, MockDriver, NEXT, WRITE};
use crate::machine::virtio::{Ring, feature};
use proptest::prelude::*;
use std::sync::Mutex;

const HEADER_AT: u64 = 0x4000;
const DATA_AT: u64 = 0x5000;
const STATUS_AT: u64 = 0x9000;
const UNTOUCHED: u8 = 0xee;

/// Eight sectors and a half.
struct MemoryDisk {
    data: Mutex<Vec<u8>>,
    fails: Option<fn() -> DiskError>,
}

impl MemoryDisk {
    fn new() -> Self {
        Self { data: Mutex::new((0..8 * 512 + 256).map(|i| (i / 512) as u8).collect()), fails: None }
    }

    fn check(&self) -> Result<(), DiskError> {
        self.fails.map_or(Ok(()), |fail| Err(fail()))
    }
}

impl Disk for MemoryDisk {
    fn size(&self) -> u64 {
        lock(&self.data).len() as u64
    }
    fn read(&self, offset: u64, data: &mut [u8]) -> Result<(), DiskError> {
        let at = offset as usize;
        data.copy_from_slice(&lock(&self.data)[at..at + data.len()]);
        self.check()
    }
    fn write(&self, offset: u64, data: &[u8]) -> Result<(), DiskError> {
        self.check()?;
        let at = offset as usize;
        lock(&self.data)[at..at + data.len()].copy_from_slice(data);
        Ok(())
    }
    fn flush(&self) -> Result<(), DiskError> {
        self.check()
    }
    fn id(&self) -> [u8; 20] {
        *b"0123456789abcdefghij"
    }
}

struct Bench {
    driver: MockDriver,
    disk: MemoryDisk,
    tally: Tally,
    read_only: bool,
    open: bool,
}

impl Bench {
    fn new() -> Self {
        let bench = Self {
            driver: MockDriver::new(),
            disk: MemoryDisk::new(),
            tally: Tally::default(),
            read_only: false,
            open: true,
        };
        bench.driver.put(STATUS_AT, UNTOUCHED);
        bench
    }

    fn header(&self, kind: u32, sector: u64) {
        self.driver.put(HEADER_AT, kind);
        self.driver.put(HEADER_AT + 8, sector);
    }

    fn serve(&self, descriptors: &[Descriptor]) -> Outcome {
        self.driver.offer(descriptors);
        let mut ring = Ring::new(64, MockDriver::SIZE, MockDriver::RING, feature::VERSION_1, 16).expect("a good ring");
        let mut chain = Chain::default();
        assert_eq!(ring.next(&self.driver.memory, &mut chain), Ok(true));
        let may_submit = || self.open;
        let server =
            Server { disk: &self.disk, read_only: self.read_only, tally: &self.tally, may_submit: &may_submit };
        server.serve(&chain, &self.driver.memory, &mut Vec::new())
    }

    fn read(&self, sector: u64, bytes: u32) -> (Outcome, u8) {
        self.header(TYPE_IN, sector);
        let done = self.serve(&[(HEADER_AT, 16, NEXT, 1), (DATA_AT, bytes, NEXT | WRITE, 2), (STATUS_AT, 1, WRITE, 0)]);
        (done, self.driver.get(STATUS_AT))
    }

    fn write(&self, sector: u64, bytes: u32) -> (Outcome, u8) {
        self.header(TYPE_OUT, sector);
        let done = self.serve(&[(HEADER_AT, 16, NEXT, 1), (DATA_AT, bytes, NEXT, 2), (STATUS_AT, 1, WRITE, 0)]);
        (done, self.driver.get(STATUS_AT))
    }
}

#[test]
fn sectors_are_read_and_written() {
    let bench = Bench::new();
    assert_eq!(bench.read(3, 1024), (Outcome::Done(1025), STATUS_OK));
    assert_eq!((bench.driver.get::<u8>(DATA_AT), bench.driver.get::<u8>(DATA_AT + 1023)), (3, 4));
    assert_eq!(bench.write(0, 512), (Outcome::Done(1), STATUS_OK));
    assert_eq!(lock(&bench.disk.data)[..513], [&[3; 512][..], &[1]].concat());
    let counters = bench.tally.snapshot();
    assert_eq!((counters.reads, counters.read_bytes, counters.written_bytes), (1, 1024, 512));
}

#[test]
fn what_lies_outside_of_the_disk_is_an_error() {
    let bench = Bench::new();
    for (sector, bytes) in [(8, 512), (7, 1024), (u64::MAX, 512), (u64::MAX / 512, 512), (1 << 55, 512), (0, 511)] {
        assert_eq!(bench.read(sector, bytes).1, STATUS_IOERR, "read {sector} {bytes}");
        assert_eq!(bench.write(sector, bytes).1, STATUS_IOERR, "write {sector} {bytes}");
    }
    assert_eq!(bench.tally.snapshot().errors, 12);
    assert_eq!(*lock(&bench.disk.data), *lock(&MemoryDisk::new().data));
}

#[test]
fn a_read_only_disk_is_not_written() {
    let bench = Bench { read_only: true, ..Bench::new() };
    assert_eq!(bench.write(0, 512).1, STATUS_IOERR);
    assert_eq!(bench.read(0, 512).1, STATUS_OK);
    assert_eq!(*lock(&bench.disk.data), *lock(&MemoryDisk::new().data));
}

#[test]
fn buffers_may_be_cut_anywhere() {
    let bench = Bench::new();
    bench.header(TYPE_IN, 5);
    let cut = [
        (HEADER_AT, 3, NEXT, 1),
        (HEADER_AT + 3, 13, NEXT, 2),
        (DATA_AT, 1, NEXT | WRITE, 3),
        (DATA_AT + 1, 512, WRITE, 0),
    ];
    assert_eq!(bench.serve(&cut), Outcome::Done(513));
    assert_eq!((bench.driver.get::<u8>(DATA_AT + 511), bench.driver.get::<u8>(DATA_AT + 512)), (5, STATUS_OK));
}

#[test]
fn flush_identity_and_unknown_requests() {
    let bench = Bench::new();
    let ask = |kind, room| {
        bench.header(kind, 0);
        bench.serve(&[(HEADER_AT, 16, NEXT, 1), (DATA_AT, room, NEXT | WRITE, 2), (STATUS_AT, 1, WRITE, 0)]);
        bench.driver.get::<u8>(STATUS_AT)
    };
    assert_eq!(ask(TYPE_FLUSH, 0), STATUS_OK);
    assert_eq!(ask(TYPE_GET_ID, 20), STATUS_OK);
    assert_eq!(bench.driver.get::<[u8; 20]>(DATA_AT), *b"0123456789abcdefghij");
    assert_eq!(ask(TYPE_GET_ID, 3), STATUS_OK);
    assert_eq!(ask(13, 0), STATUS_UNSUPPORTED);
    assert_eq!(bench.tally.snapshot().flushes, 1);
}

#[test]
fn without_keys_a_request_waits() {
    let closed = Bench { open: false, ..Bench::new() };
    assert_eq!(closed.read(0, 512), (Outcome::Parked, UNTOUCHED));
    assert_eq!(closed.write(0, 512), (Outcome::Parked, UNTOUCHED));
    let mut wiped = Bench::new();
    wiped.disk.fails = Some(|| DiskError::NoKeys);
    assert_eq!(wiped.read(0, 512), (Outcome::Parked, UNTOUCHED));
    wiped.disk.fails = Some(|| DiskError::Io("broken".into()));
    assert_eq!(wiped.read(0, 512).1, STATUS_IOERR);
    assert_eq!(wiped.tally.snapshot().errors, 1);
}

#[test]
fn a_request_without_header_or_status_breaks_the_device() {
    let bench = Bench::new();
    assert_eq!(bench.serve(&[(HEADER_AT, 16, 0, 0)]), Outcome::Malformed);
    assert_eq!(bench.serve(&[(STATUS_AT, 1, WRITE, 0)]), Outcome::Malformed);
    assert_eq!(bench.serve(&[(HEADER_AT, 15, NEXT, 1), (STATUS_AT, 1, WRITE, 0)]), Outcome::Malformed);
}

proptest! {
    #[test]
    fn any_request_is_survived(
        kind in prop_oneof![0_u32..16, any::<u32>()],
        sector in prop_oneof![0_u64..16, any::<u64>()],
        out in 0_u32..0x1000,
        room in 0_u32..0x1000,
    ) {
        let bench = Bench::new();
        bench.header(kind, sector);
        let descriptors = [(HEADER_AT, 16, NEXT, 1), (0x6000, out, NEXT, 2), (DATA_AT, room, NEXT | WRITE, 3), (STATUS_AT, 1, WRITE, 0)];
        prop_assert_eq!(bench.serve(&descriptors), Outcome::Done(room + 1));
        prop_assert!(bench.driver.get::<u8>(STATUS_AT) <= 2);
    }
}
