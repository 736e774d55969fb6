//! Disks with many requests under way: every way to serve them, and every way in which a driver uses its rings.

mod machine;

use fealty_vmm::machine::rate::{Rate, RateLimits};
use fealty_vmm::machine::{DiskSettings, MachineEvent, RawDisk, serial_number};
use machine::Plan;
use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::sync::Arc;
use std::time::Duration;

const BLOCK: u64 = 4096;

/// A file of 4 MiB without holes.
fn image() -> File {
    let file = tempfile::tempfile().expect("a file");
    file.write_all_at(&vec![0x77; 4 << 20], 0).expect("written");
    file
}

/// The disk in `file`, with a ring for each queue or with threads alone.
fn disk(file: &File, settings: &DiskSettings, rings: bool) -> Arc<RawDisk> {
    let disk = RawDisk::new(file.try_clone().expect("a descriptor"), "named-by-file").expect("a disk");
    if !rings {
        return Arc::new(disk);
    }
    let (disk, made) = disk.with_rings(settings.queues, settings.queue_size);
    made.expect("this test needs io_uring");
    Arc::new(disk)
}

fn plan(words: &str, file: &File, settings: DiskSettings, rings: bool) -> Plan {
    Plan::new(words).disk_with(disk(file, &settings, rings), settings)
}

#[test]
fn what_many_writes_at_once_leave_is_what_was_written() {
    for rings in [true, false] {
        for (queues, words) in [(1, "queues,storm:3000,poweroff"), (4, "queues,storm:3000,poweroff")] {
            let file = image();
            let settings = DiskSettings { queues, queue_size: 128, ..DiskSettings::default() };
            let guest = plan(words, &file, settings, rings).boot();
            assert_eq!(guest.ends(), MachineEvent::PowerOff);
            let text = guest.screen.text();
            assert_eq!(guest.screen.lines("queues"), [format!("queues {queues}")], "{text}");
            assert_eq!(guest.screen.lines("storm ok").len(), 1, "rings: {rings}, {text}");
            let counters = &guest.running.counters().disks["disk0"];
            assert_eq!((counters.writes, counters.flushes, counters.errors, counters.breaks), (3000, 1, 0, 0));
        }
    }
}

#[test]
fn a_driver_that_knows_little_is_served_as_well() {
    for rings in [true, false] {
        let file = image();
        let settings = DiskSettings { queues: 4, queue_size: 128, ..DiskSettings::default() };
        let guest = plan("simple-rings,queues,storm:1000,reads:32:1000,poweroff", &file, settings, rings).boot();
        assert_eq!(guest.ends(), MachineEvent::PowerOff);
        let text = guest.screen.text();
        assert_eq!(guest.screen.lines("queues"), ["queues 1"], "{text}");
        assert!(text.contains("storm ok") && text.contains("reads done 1000"), "{text}");
    }
}

#[test]
fn pauses_under_load_lose_nothing() {
    let file = image();
    let settings = DiskSettings { queues: 4, queue_size: 128, ..DiskSettings::default() };
    let guest = plan("writes:32:3000,storm:3000,poweroff", &file, settings, true).boot();
    guest.sees("writes started");
    for _ in 0..50 {
        guest.running.pause();
        let before = guest.running.counters();
        std::thread::sleep(Duration::from_millis(2));
        assert_eq!(guest.running.counters(), before, "nothing moves");
        guest.running.resume();
        std::thread::sleep(Duration::from_millis(2));
    }
    assert_eq!(guest.ends(), MachineEvent::PowerOff);
    assert_eq!(guest.screen.lines("storm ok").len(), 1, "{}", guest.screen.text());
}

#[test]
fn blocks_are_discarded_and_zeroed() {
    for rings in [true, false] {
        let file = image();
        let room = file.metadata().expect("metadata").blocks();
        let words = "discard:0:256,zeroes:300:10,unmap:400:256,verify:0:0,verify:300:0,verify:309:0,verify:400:0,\
                     verify:299:0x77,verify:310:0x77,verify:656:0x77,poweroff";
        let guest = plan(words, &file, DiskSettings::default(), rings).boot();
        assert_eq!(guest.ends(), MachineEvent::PowerOff);
        let text = guest.screen.text();
        assert!(
            text.contains("discard 0 ok") && text.contains("zeroes 300 ok") && text.contains("unmap 400 ok"),
            "{text}"
        );
        assert_eq!(text.matches("verify").count(), text.matches(" ok\r\n").count() - 3, "{text}");
        assert!(!text.contains("wrong"), "{text}");
        let left = file.metadata().expect("metadata").blocks();
        assert_eq!(room - left, 512 * BLOCK / 512, "the store has its room back");
        let counters = &guest.running.counters().disks["disk0"];
        assert_eq!((counters.discards, counters.write_zeroes, counters.errors), (1, 2, 0));
    }
}

#[test]
fn a_disk_has_the_serial_number_that_it_was_given() {
    for (serial, shown) in [(None, "named-by-file"), (Some(serial_number("SN 0042")), "SN 0042")] {
        let settings = DiskSettings { serial, ..DiskSettings::default() };
        let guest = plan("serial,poweroff", &image(), settings, true).boot();
        assert_eq!(guest.ends(), MachineEvent::PowerOff);
        assert_eq!(guest.screen.lines("serial"), [format!("serial {shown}")]);
    }
}

#[test]
fn a_disk_that_grows_tells_the_guest() {
    let file = image();
    let guest = plan("wait-resize,write:1024:1,verify:1024:1,poweroff", &file, DiskSettings::default(), true).boot();
    guest.sees("waiting for another size");
    assert_eq!(guest.running.look_again("disk0"), Some(4 << 20), "not yet");
    file.set_len(8 << 20).expect("larger");
    assert_eq!((guest.running.look_again("disk0"), guest.running.look_again("disk1")), (Some(8 << 20), None));
    assert_eq!(guest.ends(), MachineEvent::PowerOff);
    let text = guest.screen.text();
    assert!(text.contains("disk 0 bytes=8388608") && text.contains("verify 1024 ok"), "{text}");
}

#[test]
fn a_limited_disk_keeps_to_its_rate() {
    for rings in [true, false] {
        let rate = Rate { size: 10, one_time_burst: 50, refill: Duration::from_millis(200) };
        let limits = RateLimits { bandwidth: None, operations: Some(rate) };
        let settings = DiskSettings { limits, queues: 2, queue_size: 128, ..DiskSettings::default() };
        let start = std::time::Instant::now();
        let guest = plan("reads:32:100,poweroff", &image(), settings, rings).boot();
        assert_eq!(guest.ends(), MachineEvent::PowerOff);
        // 60 at once, and the other 40 need four times 200 ms, whatever the machine does meanwhile.
        assert!(start.elapsed() >= Duration::from_millis(780), "{:?}", start.elapsed());
        let counters = &guest.running.counters().disks["disk0"];
        assert!(counters.held > 0 && counters.reads == 100, "{counters:?}");
    }
}
