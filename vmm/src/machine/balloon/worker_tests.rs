//! The balloon with a mock driver.

use crate::machine::balloon::{BalloonDevice, BalloonSettings};
use crate::machine::virtio::VirtioDevice;
use crate::machine::virtio::mock::WRITE;
use crate::machine::virtio::rig::{Rig, eventually};
use std::sync::Arc;

const PAGE: u64 = 4096;
const REPORTING: u64 = 1 << 5;

fn rig(free_page_reporting: bool) -> (Arc<BalloonDevice>, Rig) {
    let settings = BalloonSettings { size: 8 << 20, deflate_on_oom: true, free_page_reporting };
    let device = Arc::new(BalloonDevice::new(settings).expect("eventfd"));
    let rig = Rig::new(device.clone(), |crew| device.hire(crew));
    rig.bring_up(device.features());
    (device, rig)
}

/// Fills pages with their numbers, from the first free one on.
fn fill(rig: &Rig, pages: u64) -> u64 {
    let first = Rig::FREE / PAGE;
    for page in first..first + pages {
        rig.put_bytes(page * PAGE, &[page as u8; PAGE as usize]);
    }
    first
}

/// What a page is filled with.
fn filling(rig: &Rig, page: u64) -> u8 {
    let bytes = rig.bytes(page * PAGE, PAGE as usize);
    assert!(bytes.iter().all(|byte| *byte == bytes[0]), "page {page}");
    bytes[0]
}

#[test]
fn pages_in_the_balloon_are_given_back_and_no_others() {
    let (device, rig) = rig(false);
    let first = fill(&rig, 8);
    let numbers: Vec<u8> =
        [first + 1, first + 2, first + 5].into_iter().flat_map(|n| (n as u32).to_le_bytes()).collect();
    rig.put_bytes(Rig::FREE + 0x1_0000, &numbers);
    rig.offer(0, &[(Rig::FREE + 0x1_0000, 12, 0)]);
    assert_eq!(rig.await_used(0).length, 0);
    let found: Vec<u8> = (0..8).map(|n| filling(&rig, first + n)).collect();
    let f = first as u8;
    assert_eq!(found, [f, 0, 0, f + 3, f + 4, 0, f + 6, f + 7]);
    rig.offer(1, &[(Rig::FREE + 0x1_0000, 8, 0)]);
    rig.await_used(1);
    let counters = device.counters();
    assert_eq!((counters.inflated_pages, counters.deflated_pages, counters.kept_bytes), (3, 2, 0));
}

#[test]
fn free_pages_are_taken_whole_on_whichever_queue_they_are_reported() {
    let (device, rig) = rig(true);
    for (round, queue) in (1..).zip([2, 3, 4]) {
        let first = fill(&rig, 8);
        let at = first * PAGE;
        // A page and two halves, then two whole ones.
        rig.offer(queue, &[(at + PAGE / 2, 2 * PAGE as u32, WRITE), (at + 4 * PAGE, 2 * PAGE as u32, WRITE)]);
        rig.await_used(queue);
        let found: Vec<u8> = (0..8).map(|n| filling(&rig, first + n)).collect();
        let f = first as u8;
        assert_eq!(found, [f, 0, f + 2, f + 3, 0, 0, f + 6, f + 7]);
        assert_eq!(device.counters().reported_bytes, round * 3 * PAGE);
    }
}

#[test]
fn the_driver_reads_the_target_and_writes_what_it_has() {
    let (device, rig) = rig(false);
    assert_eq!((rig.config::<4>(0), rig.config::<4>(4)), (2048, 0));
    rig.pci_write_config(0, &[0xff; 4]);
    rig.pci_write_config(4, &77_u32.to_le_bytes());
    assert_eq!((rig.config::<4>(0), rig.config::<4>(4)), (2048, 77));
    device.resize(4 << 20);
    assert_eq!(rig.config::<4>(0), 1024);
    assert_eq!(rig.offered() & (REPORTING | 1 << 2), 1 << 2, "no reports unless they were asked for");
}

#[test]
fn what_is_no_page_breaks_this_balloon_only_and_touches_nothing() {
    let (device, rig) = rig(true);
    let first = fill(&rig, 4);
    let outside = (Rig::BYTES / PAGE) as u32;
    let cases: [(usize, Vec<u8>, u16); 5] = [
        (0, [first as u32, outside].into_iter().flat_map(u32::to_le_bytes).collect(), 0),
        (0, u32::MAX.to_le_bytes().to_vec(), 0),
        (0, vec![0; 6], 0),
        (1, vec![0; 8], WRITE),
        (2, vec![0; 8], 0),
    ];
    for (round, (queue, bytes, flags)) in (1..).zip(cases) {
        rig.put_bytes(Rig::FREE + 0x1_0000, &bytes);
        rig.offer(queue, &[(Rig::FREE + 0x1_0000, bytes.len() as u32, flags)]);
        eventually("needs a reset", || rig.status() == 15 | 64);
        assert_eq!((device.counters().breaks, filling(&rig, first)), (round, first as u8));
        rig.reset();
        rig.bring_up(device.features());
    }
    rig.put_bytes(Rig::FREE + 0x1_0000, &(first as u32).to_le_bytes());
    rig.offer(0, &[(Rig::FREE + 0x1_0000, 4, 0)]);
    rig.await_used(0);
    assert_eq!(filling(&rig, first), 0);
}
