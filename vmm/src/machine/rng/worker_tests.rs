//! The source with a mock driver.

use crate::machine::pci::PciFunction;
use crate::machine::rate::Rate;
use crate::machine::rng::RngDevice;
use crate::machine::virtio::mock::WRITE;
use crate::machine::virtio::rig::{Rig, eventually};
use std::sync::Arc;
use std::time::Duration;

fn rig() -> (Arc<RngDevice>, Rig) {
    put(RngDevice::new().expect("eventfd"))
}

fn put(device: RngDevice) -> (Arc<RngDevice>, Rig) {
    let device = Arc::new(device);
    let rig = Rig::new(device.clone(), |crew| device.hire(crew));
    rig.bring_up(0);
    (device, rig)
}

#[test]
fn a_guest_gets_bytes_that_differ() {
    let (device, rig) = rig();
    let mut seen = std::collections::BTreeSet::new();
    for round in 1..=40 {
        rig.offer(0, &[(Rig::FREE, 30, WRITE), (Rig::FREE + 0x100, 34, WRITE)]);
        assert_eq!(rig.await_used(0).length, 64);
        let bytes = [rig.bytes(Rig::FREE, 30), rig.bytes(Rig::FREE + 0x100, 34)].concat();
        assert!(seen.insert(bytes), "64 random bytes twice");
        assert_eq!(device.counters().requests, round);
    }
    assert_eq!(rig.bytes(Rig::FREE + 30, 16), [0; 16], "nothing beyond the buffer");
}

#[test]
fn a_device_without_configuration_has_no_structure_for_it() {
    let (_, rig) = rig();
    let mut space = [0; 256];
    rig.pci.config_read(0, &mut space);
    let (mut at, mut kinds) = (usize::from(space[0x34]), vec![]);
    while at != 0 {
        kinds.push((space[at], space[at + 3]));
        at = usize::from(space[at + 1]);
    }
    assert!(kinds.contains(&(9, 1)) && !kinds.contains(&(9, 4)), "{kinds:?}");
}

#[test]
fn a_large_request_gets_a_piece() {
    let (device, rig) = rig();
    rig.offer(0, &[(Rig::FREE, 0x1_0000, WRITE)]);
    assert_eq!(rig.await_used(0).length, 4096);
    assert_eq!(rig.bytes(Rig::FREE + 4096, 64), [0; 64]);
    assert_eq!(device.counters().bytes, 4096);
}

#[test]
fn a_greedy_guest_waits_and_still_gets_its_bytes() {
    let limit = Rate { size: 100, one_time_burst: 0, refill: Duration::from_secs(2) };
    let (device, rig) = put(RngDevice::with_limit(limit).expect("eventfd"));
    for n in 0..3 {
        rig.offer(0, &[(Rig::FREE + n * 0x100, 100, WRITE)]);
    }
    for n in 0..3 {
        assert_eq!(rig.await_used(0).length, 100);
        assert_ne!(rig.bytes(Rig::FREE + n * 0x100, 100), [0; 100]);
    }
    assert!(device.counters().throttled > 0, "{:?}", device.counters());
}

#[test]
fn a_pause_holds_requests_and_a_reset_forgets_them() {
    let (device, rig) = rig();
    rig.worker.pause();
    rig.offer(0, &[(Rig::FREE, 16, WRITE)]);
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!((rig.used(0), device.counters().requests), (None, 0));
    rig.worker.resume();
    assert_eq!(rig.await_used(0).length, 16);
    rig.reset();
    rig.bring_up(0);
    rig.offer(0, &[(Rig::FREE, 16, WRITE)]);
    assert_eq!(rig.await_used(0).length, 16);
}

#[test]
fn a_buffer_that_is_not_to_be_written_breaks_this_device_only() {
    let (device, rig) = rig();
    rig.offer(0, &[(Rig::FREE, 16, 0), (Rig::FREE, 16, WRITE)]);
    eventually("needs a reset", || rig.status() == 15 | 64);
    assert_eq!((device.counters().breaks, rig.used(0)), (1, None));
    rig.reset();
    rig.bring_up(0);
    rig.offer(0, &[(Rig::FREE, 16, WRITE)]);
    assert_eq!(rig.await_used(0).length, 16);
}
