//! The transport with a mock driver and a mock device.

use super::*;
use crate::machine::virtio::DeviceConfig;
use crate::machine::virtio::mock::MockDriver;
use crate::machine::wires::mock::MockWires;
use crate::machine::wires::new_event;
use proptest::prelude::*;
use std::sync::atomic::AtomicBool;
use vmm_sys_util::eventfd::EventFd;

/// A device with one queue that notes what it is given, and that is slow to stop if told so.
struct MockDevice {
    config: DeviceConfig,
    doorbell: EventFd,
    session: Mutex<Option<Session>>,
    slow: AtomicBool,
}

impl VirtioDevice for MockDevice {
    fn device_type(&self) -> u16 {
        2
    }
    fn class(&self) -> u32 {
        0x01_8000
    }
    fn features(&self) -> u64 {
        1 << 9
    }
    fn queues(&self) -> &[u16] {
        &[64]
    }
    fn config(&self) -> &DeviceConfig {
        &self.config
    }
    fn config_written(&self, offset: u64, data: &[u8]) {
        self.config.accept(offset, data, 6..7);
    }
    fn doorbell(&self, queue: u16) -> Option<&EventFd> {
        (queue == 0).then_some(&self.doorbell)
    }
    fn start(&self, session: Session) {
        *lock(&self.session) = Some(session);
    }
    fn stop(&self) -> bool {
        let slow = self.slow.load(Ordering::SeqCst);
        if !slow {
            *lock(&self.session) = None;
        }
        !slow
    }
}

struct Bench {
    driver: MockDriver,
    wires: Arc<MockWires>,
    device: Arc<MockDevice>,
    pci: VirtioPci,
}

impl Bench {
    fn new() -> Self {
        let driver = MockDriver::new();
        let wires = Arc::new(MockWires::default());
        let device = Arc::new(MockDevice {
            config: DeviceConfig::new(vec![1, 2, 3, 4, 5, 6, 7, 8]),
            doorbell: new_event().expect("eventfd"),
            session: Mutex::new(None),
            slow: AtomicBool::new(false),
        });
        let pci = VirtioPci::new(device.clone(), 1, driver.memory.clone(), wires.clone()).expect("eventfds");
        Self { driver, wires, device, pci }
    }

    fn write(&self, at: u64, value: u64, width: usize) {
        self.pci.bar_write(at, &value.to_le_bytes()[..width]);
    }

    fn read(&self, at: u64, width: usize) -> u64 {
        let mut data = [0; 8];
        self.pci.bar_read(at, &mut data[..width]);
        u64::from_le_bytes(data)
    }

    fn negotiate(&self, features: u64) {
        self.write(0x14, 0, 1);
        self.write(0x14, 1, 1);
        self.write(0x14, 3, 1);
        for (select, value) in [(0, features & 0xffff_ffff), (1, features >> 32)] {
            self.write(0x08, select, 4);
            self.write(0x0c, value, 4);
        }
        self.write(0x14, 11, 1);
    }

    fn set_up(&self, ring: [u64; 3]) {
        self.negotiate(feature::ALL);
        self.write(0x16, 0, 2);
        self.write(0x18, u64::from(MockDriver::SIZE), 2);
        for (at, address) in [0x20, 0x28, 0x30].into_iter().zip(ring) {
            self.write(at, address & 0xffff_ffff, 4);
            self.write(at + 4, address >> 32, 4);
        }
        self.write(0x1c, 1, 2);
        self.write(0x14, 15, 1);
    }

    fn running(&self) -> bool {
        lock(&self.device.session).as_ref().is_some_and(|s| s.queues.iter().flatten().count() == 1)
    }
}

#[test]
fn a_driver_finds_its_structures() {
    let bench = Bench::new();
    let mut space = [0; 256];
    bench.pci.config_read(0, &mut space);
    assert_eq!(&space[..4], &[0xf4, 0x1a, 0x42, 0x10]);
    let (mut at, mut kinds) = (usize::from(space[0x34]), vec![]);
    while at != 0 {
        kinds.push(if space[at] == 0x11 { 0x11 } else { space[at + 3] });
        at = usize::from(space[at + 1]);
    }
    assert_eq!(kinds, [1, 3, 4, 2, 0x11, 5]);
    assert_eq!(bench.read(DEVICE, 8), 0x0807_0605_0403_0201);
    assert_eq!(bench.read(0x12, 2), 1, "one queue");
}

#[test]
fn a_driver_comes_up_and_is_reset() {
    let bench = Bench::new();
    bench.set_up(MockDriver::RING);
    assert_eq!((bench.read(0x14, 1), bench.running()), (15, true));
    bench.write(0x18, 8, 2);
    assert_eq!(bench.read(0x18, 2), u64::from(MockDriver::SIZE), "not while it runs");
    bench.device.slow.store(true, Ordering::SeqCst);
    bench.write(0x14, 0, 1);
    assert_ne!(bench.read(0x14, 1), 0, "still in hand");
    bench.write(0x14, 15, 1);
    bench.device.slow.store(false, Ordering::SeqCst);
    assert_eq!((bench.read(0x14, 1), bench.running()), (0, false));
    bench.set_up(MockDriver::RING);
    assert!(bench.running());
}

#[test]
fn features_that_were_not_offered_are_refused() {
    let bench = Bench::new();
    for bad in [feature::VERSION_1 | 1 << 40, feature::VERSION_1 | 1, 1 << 9, 0] {
        bench.negotiate(bad);
        assert_eq!(bench.read(0x14, 1), 3, "{bad:#x}");
        bench.write(0x14, 15, 1);
        assert_eq!((bench.read(0x14, 1), bench.running()), (3, false), "{bad:#x}");
    }
    bench.negotiate(feature::VERSION_1 | 1 << 9);
    assert_eq!(bench.read(0x14, 1), 11);
}

#[test]
fn a_queue_outside_of_ram_needs_a_reset_and_nothing_more() {
    let bench = Bench::new();
    bench.set_up([0x1000, 0x2000, MockDriver::BYTES]);
    assert_eq!((bench.read(0x14, 1), bench.running()), (15 | 64, false));
    assert_eq!((bench.read(ISR, 1), bench.read(ISR, 1)), (2, 0));
    assert_eq!(bench.pci.link().breaks(), 1);
    bench.set_up(MockDriver::RING);
    assert_eq!((bench.read(0x14, 1), bench.running()), (15, true));
}

#[test]
fn doorbells_follow_the_bar() {
    let bench = Bench::new();
    assert!(bench.pci.window().is_empty());
    bench.pci.config_write(4, &[2, 0]);
    assert_eq!(bench.pci.window(), 0xc001_0000..0xc001_8000);
    assert_eq!(*lock(&bench.wires.doorbells), [0xc001_3000]);
    bench.pci.config_write(0x10, &0xd000_0000_u32.to_le_bytes());
    assert_eq!(*lock(&bench.wires.doorbells), [0xd000_3000]);
    bench.pci.config_write(4, &[0, 0]);
    assert!(lock(&bench.wires.doorbells).is_empty() && bench.pci.window().is_empty());
    bench.write(NOTIFY, 0, 2);
    assert!(bench.device.doorbell.read().is_ok(), "a doorbell without KVM");
    bench.write(NOTIFY + 4, 1, 2);
    assert!(bench.device.doorbell.read().is_err(), "no such queue");
}

#[test]
fn the_bar_can_be_reached_through_configuration_space() {
    let bench = Bench::new();
    let at = bench.pci.window_capability;
    for (offset, value) in [(8, DEVICE as u32 + 4), (12, 4)] {
        bench.pci.config_write(at + offset, &value.to_le_bytes());
    }
    let mut data = [0; 4];
    bench.pci.config_read(at + 16, &mut data);
    assert_eq!(data, [5, 6, 7, 8]);
    for (offset, value) in [(8, 0x14), (12, 1), (16, 3)] {
        bench.pci.config_write(at + offset, &u32::to_le_bytes(value));
    }
    assert_eq!(bench.read(0x14, 1), 3);
}

#[test]
fn a_configuration_that_changes_interrupts_the_driver() {
    let bench = Bench::new();
    bench.set_up(MockDriver::RING);
    bench.write(DEVICE + 4, 0xffff_ffff, 4);
    assert_eq!((bench.read(DEVICE, 8), bench.read(0x15, 1)), (0x08ff_0605_0403_0201, 0), "the driver's own write");
    bench.device.config.change(|bytes| bytes[0] = 9);
    assert_eq!((bench.read(DEVICE, 1), bench.read(0x15, 1), bench.read(ISR, 1)), (9, 1, 2));
    assert_eq!((bench.read(0x14, 1), bench.read(ISR, 1)), (15, 0), "and needs no reset");
}

proptest! {
    #[test]
    fn no_access_panics(accesses in prop::collection::vec((0_u64..0x8008, 0_u8..=255, 0_usize..4, any::<u64>(), any::<bool>()), 1..32)) {
        let bench = Bench::new();
        bench.set_up(MockDriver::RING);
        for (at, register, width, value, config) in accesses {
            let mut data = value.to_le_bytes();
            let data = &mut data[..1 << width];
            if config {
                bench.pci.config_write(register, data);
                bench.pci.config_read(register, data);
            } else {
                bench.pci.bar_write(at, data);
                bench.pci.bar_read(at, data);
            }
        }
        prop_assert!(bench.driver.used() == 0);
    }
}
