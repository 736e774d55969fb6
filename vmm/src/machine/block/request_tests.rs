//! Requests with a mock driver and a disk in memory.

use super::*;
use crate::machine::sync::lock;
use crate::machine::virtio::mock::{Descriptor, MockDriver, NEXT, WRITE};
use crate::machine::virtio::{Ring, feature};
use proptest::prelude::*;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

const HEADER_AT: u64 = 0x4000;
const DATA_AT: u64 = 0x5000;
const STATUS_AT: u64 = 0x9000;
const UNTOUCHED: u8 = 0xee;

/// Eight sectors and a half.
struct MemoryDisk {
    data: Mutex<Vec<u8>>,
    fails: Option<fn() -> DiskError>,
    flushes: AtomicU64,
}

impl MemoryDisk {
    fn new() -> Self {
        Self {
            data: Mutex::new((0..8 * 512 + 256).map(|i| (i / 512) as u8).collect()),
            fails: None,
            flushes: AtomicU64::new(0),
        }
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
        self.flushes.fetch_add(1, Ordering::SeqCst);
        self.check()
    }
    fn id(&self) -> [u8; 20] {
        *b"0123456789abcdefghij"
    }
    fn can_discard(&self) -> bool {
        true
    }
    fn discard(&self, offset: u64, length: u64) -> Result<(), DiskError> {
        self.write_zeroes(offset, length, true)
    }
    fn write_zeroes(&self, offset: u64, length: u64, _may_unmap: bool) -> Result<(), DiskError> {
        self.check()?;
        lock(&self.data)[offset as usize..][..length as usize].fill(0);
        Ok(())
    }
}

struct Bench {
    driver: MockDriver,
    disk: MemoryDisk,
    tally: Tally,
    read_only: bool,
    write_through: bool,
    open: bool,
}

impl Bench {
    fn new() -> Self {
        let bench = Self {
            driver: MockDriver::new(),
            disk: MemoryDisk::new(),
            tally: Tally::default(),
            read_only: false,
            write_through: false,
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
        // Each request has a ring of its own.
        self.driver.set_available(0);
        self.driver.offer(descriptors);
        let mut ring = Ring::new(64, MockDriver::SIZE, MockDriver::RING, feature::VERSION_1, 16).expect("a good ring");
        let mut chain = Chain::default();
        assert_eq!(ring.next(&self.driver.memory, &mut chain), Ok(true));
        let may_submit = || self.open;
        let server =
            Server { disk: &self.disk, tally: &self.tally, write_through: self.write_through, may_submit: &may_submit };
        let facts = Facts::of(&self.disk, self.read_only, self.disk.id());
        let memory = &self.driver.memory;
        match Request::parse(&facts, &chain, memory) {
            Some(request) => server.serve(&request, &facts, &chain, memory, &mut Vec::new()),
            None => Outcome::Malformed,
        }
    }

    /// A discard or a write of zeroes with one range: its status.
    fn unmap(&self, kind: u32, extents: &[(u64, u32, u32)], more: u32) -> u8 {
        self.header(kind, 0);
        for (at, (sector, count, flags)) in (DATA_AT..).step_by(16).zip(extents) {
            self.driver.put(at, *sector);
            self.driver.put(at + 8, *count);
            self.driver.put(at + 12, *flags);
        }
        let length = 16 * extents.len() as u32 + more;
        self.serve(&[(HEADER_AT, 16, NEXT, 1), (DATA_AT, length, NEXT, 2), (STATUS_AT, 1, WRITE, 0)]);
        self.driver.get(STATUS_AT)
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
    assert_eq!(ask(14, 0), STATUS_UNSUPPORTED);
    assert_eq!(bench.tally.snapshot().flushes, 1);
}

#[test]
fn a_driver_that_does_not_flush_gets_durable_writes() {
    let mut bench = Bench::new();
    bench.write_through = true;
    assert_eq!(bench.read(0, 512).1, STATUS_OK);
    assert_eq!(bench.disk.flushes.load(Ordering::SeqCst), 0);
    assert_eq!(bench.write(0, 512).1, STATUS_OK);
    assert_eq!(bench.disk.flushes.load(Ordering::SeqCst), 1);
    assert_eq!(bench.unmap(TYPE_WRITE_ZEROES, &[(6, 1, 1)], 0), STATUS_OK);
    assert_eq!(bench.disk.flushes.load(Ordering::SeqCst), 2);
}

#[test]
fn ranges_are_discarded_and_zeroed() {
    let bench = Bench::new();
    assert_eq!(bench.unmap(TYPE_DISCARD, &[(1, 1, 0), (3, 2, 0), (5, 0, 0)], 0), STATUS_OK);
    assert_eq!(bench.unmap(TYPE_WRITE_ZEROES, &[(6, 1, 1)], 0), STATUS_OK);
    let sectors: Vec<u8> = lock(&bench.disk.data).chunks_exact(512).map(|sector| sector[0]).collect();
    assert_eq!(sectors, [0, 0, 2, 0, 0, 5, 0, 7]);
    let tally = bench.tally.snapshot();
    assert_eq!((tally.discards, tally.write_zeroes, tally.errors), (1, 1, 0));
}

#[test]
fn ranges_that_make_no_sense_change_nothing() {
    let bench = Bench::new();
    for kind in [TYPE_DISCARD, TYPE_WRITE_ZEROES] {
        assert_eq!(bench.unmap(kind, &[], 0), STATUS_IOERR, "none");
        assert_eq!(bench.unmap(kind, &[(0, 1, 0)], 1), STATUS_IOERR, "half a range");
        assert_eq!(bench.unmap(kind, &[(0, 1, 0); 33], 0), STATUS_IOERR, "too many");
        for (sector, count) in [(8, 1), (7, 2), (0, u32::MAX), (u64::MAX, 1), (u64::MAX / 512, 1), (0, 9)] {
            assert_eq!(bench.unmap(kind, &[(sector, count, 0)], 0), STATUS_IOERR, "{sector} {count}");
        }
        assert_eq!(bench.unmap(kind, &[(0, 1, 2)], 0), STATUS_UNSUPPORTED, "a flag that nobody knows");
    }
    assert_eq!(bench.unmap(TYPE_DISCARD, &[(0, 1, 1)], 0), STATUS_UNSUPPORTED, "unmap is for zeroes");
    assert_eq!(*lock(&bench.disk.data), *lock(&MemoryDisk::new().data));
    let read_only = Bench { read_only: true, ..Bench::new() };
    assert_eq!(read_only.unmap(TYPE_WRITE_ZEROES, &[(0, 1, 0)], 0), STATUS_UNSUPPORTED);
}

/// Sectors and lengths around every edge: inside is exactly what lies inside.
#[test]
fn bounds_are_judged_right_at_every_edge() {
    for size in [0, 512, 8 * 512] {
        let facts = Facts { size, read_only: false, can_discard: true, id: [0; 20] };
        let edges = (0..20).chain(u64::MAX / 512 - 3..u64::MAX / 512 + 3).chain(u64::MAX - 3..=u64::MAX);
        for sector in edges {
            for length in (0..12 * 512).step_by(256).chain(u64::MAX - 1024..=u64::MAX) {
                let (start, end) = (u128::from(sector) * 512, u128::from(sector) * 512 + u128::from(length));
                let inside = end <= u128::from(size) && start <= u128::from(size) && length % 512 == 0;
                assert_eq!(facts.locate(sector, length).is_ok(), inside, "{size} {sector} {length}");
            }
        }
    }
}

#[test]
fn without_keys_a_request_waits() {
    let closed = Bench { open: false, ..Bench::new() };
    assert_eq!(closed.read(0, 512), (Outcome::Parked, UNTOUCHED));
    assert_eq!(closed.write(0, 512), (Outcome::Parked, UNTOUCHED));
    let mut wiped = Bench::new();
    wiped.disk.fails = Some(|| DiskError::NotNow);
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

impl Bench {
    /// Several requests of a sector at once, `(kind, sector)`, each with data and status of its own.
    fn serve_together(&self, requests: &[(u32, u64)]) -> Option<Vec<Outcome>> {
        self.driver.set_available(0);
        let mut ring = Ring::new(64, MockDriver::SIZE, MockDriver::RING, feature::VERSION_1, 16).expect("a good ring");
        let facts = Facts::of(&self.disk, self.read_only, self.disk.id());
        let mut asked = vec![];
        for (i, (kind, sector)) in (0..).zip(requests) {
            let (header, data, status) = (HEADER_AT + 16 * i, DATA_AT + 512 * i, STATUS_AT + i);
            self.driver.put(header, *kind);
            self.driver.put(header + 8, *sector);
            self.driver.put(status, UNTOUCHED);
            let way = if *kind == TYPE_IN { WRITE } else { 0 };
            // Each takes the same descriptors: what they say is remembered when the ring is looked at.
            self.driver.offer(&[(header, 16, NEXT, 1), (data, 512, NEXT | way, 2), (status, 1, WRITE, 0)]);
            let mut chain = Chain::default();
            assert_eq!(ring.next(&self.driver.memory, &mut chain), Ok(true));
            ring.complete(&self.driver.memory, &chain, 0).expect("room");
            let request = Request::parse(&facts, &chain, &self.driver.memory).expect("a header and a status");
            asked.push((chain, request));
        }
        let may_submit = || self.open;
        let server =
            Server { disk: &self.disk, tally: &self.tally, write_through: self.write_through, may_submit: &may_submit };
        server.serve_together(&asked, &self.driver.memory, &mut vec![])
    }

    fn status_of(&self, i: u64) -> u8 {
        self.driver.get(STATUS_AT + i)
    }
}

#[test]
fn requests_served_together_are_each_as_if_alone() {
    let mut bench = Bench::new();
    for i in 0..4_u64 {
        bench.driver.put(DATA_AT + 512 * i, 0x70 + i as u8);
    }
    let asked = [(TYPE_OUT, 2), (TYPE_OUT, 3), (TYPE_IN, 5), (TYPE_OUT, 3), (TYPE_IN, 3)];
    let done = bench.serve_together(&asked).expect("keys");
    assert_eq!(done, [1, 1, 513, 1, 513].map(Outcome::Done));
    assert!((0..5).all(|i| bench.status_of(i) == STATUS_OK));
    assert_eq!(bench.driver.get::<u8>(DATA_AT + 512 * 2), 5);
    assert_eq!(bench.driver.get::<u8>(DATA_AT + 512 * 4), 0x73, "the later of two writes");
    let sector = |i: usize| lock(&bench.disk.data)[512 * i];
    assert_eq!((sector(2), sector(3)), (0x70, 0x73));
    let tally = bench.tally.snapshot();
    assert_eq!((tally.reads, tally.writes, tally.written_bytes, tally.errors), (2, 3, 3 * 512, 0));
    assert_eq!(bench.disk.flushes.load(Ordering::SeqCst), 0);
    bench.write_through = true;
    assert!(bench.serve_together(&asked).is_some());
    assert_eq!(bench.disk.flushes.load(Ordering::SeqCst), 1, "one for all of them");
    bench.disk.fails = Some(|| DiskError::Io("broken".into()));
    let done = bench.serve_together(&asked).expect("answers");
    assert!(done.iter().all(|done| matches!(done, Outcome::Done(_))));
    assert!((0..5).all(|i| bench.status_of(i) == STATUS_IOERR));
}

#[test]
fn without_keys_all_that_came_together_waits() {
    let mut bench = Bench { open: false, ..Bench::new() };
    let asked = [(TYPE_IN, 1), (TYPE_OUT, 2)];
    assert_eq!(bench.serve_together(&asked), None);
    bench.open = true;
    bench.disk.fails = Some(|| DiskError::NotNow);
    assert_eq!(bench.serve_together(&asked), None);
    assert!((0..2).all(|i| bench.status_of(i) == UNTOUCHED));
    bench.disk.fails = None;
    assert!(bench.serve_together(&asked).is_some());
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
