//! A whole device under test: behind its PCI function, with its thread, driven by a mock driver with as many queues as the
//! device has.

use super::mock::Descriptor;
use super::{VirtioDevice, VirtioPci, feature};
use crate::lease::LeaseGate;
use crate::machine::control::Control;
use crate::machine::event::Events;
use crate::machine::memory::GuestRam;
use crate::machine::pci::PciFunction;
use crate::machine::thread::{Background, Crew};
use crate::machine::wires::mock::MockWires;
use std::cell::Cell;
use std::sync::Arc;
use std::time::{Duration, Instant};
use vm_memory::{Bytes, GuestAddress};

/// The driver, the device and its thread.
pub(crate) struct Rig {
    pub(crate) memory: GuestRam,
    pub(crate) pci: VirtioPci,
    pub(crate) worker: Arc<dyn Background>,
    queues: Vec<Queue>,
}

#[derive(Default)]
struct Queue {
    available: Cell<u16>,
    /// The next free descriptor.
    free: Cell<u16>,
    seen: Cell<u16>,
}

/// Entries of each queue.
const SIZE: u16 = 16;

/// What the device gave back.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Used {
    pub(crate) head: u16,
    pub(crate) length: u32,
}

impl Rig {
    /// Guest memory that the rings don't use begins here.
    pub(crate) const FREE: u64 = 0x4_0000;
    pub(crate) const BYTES: u64 = 0x20_0000;

    /// Puts `device` into slot 1; `hire` starts its thread.
    pub(crate) fn new(
        device: Arc<dyn VirtioDevice>,
        hire: impl FnOnce(&Crew) -> std::io::Result<Arc<dyn Background>>,
    ) -> Self {
        let memory = GuestRam::from_ranges(&[(GuestAddress(0), Self::BYTES as usize)]).expect("2 MiB");
        let queues = (0..device.queues().len()).map(|_| Queue::default()).collect();
        let pci = VirtioPci::new(device, 1, memory.clone(), Arc::new(MockWires::default())).expect("eventfds");
        let control = Arc::new(Control::new(Arc::new(Events::new().expect("eventfd"))));
        let gate = Arc::new(LeaseGate::unlimited());
        let worker = hire(&Crew::new(Arc::new(|_| Ok(())), gate, control)).expect("a thread");
        Self { memory, pci, worker, queues }
    }

    /// Descriptor table, available ring, used ring.
    pub(crate) fn ring(queue: usize) -> [u64; 3] {
        let base = 0x1000 + 0x1000 * queue as u64;
        [base, base + 0x400, base + 0x800]
    }

    /// Negotiates `features` and the version, sets all queues up, and starts the device.
    pub(crate) fn bring_up(&self, features: u64) {
        let write = |at: u64, value: u64, width: usize| self.pci.bar_write(at, &value.to_le_bytes()[..width]);
        write(0x14, 3, 1);
        let features = features | feature::VERSION_1;
        for (select, value) in [(0, features & 0xffff_ffff), (1, features >> 32)] {
            write(0x08, select, 4);
            write(0x0c, value, 4);
        }
        write(0x14, 11, 1);
        for (index, queue) in self.queues.iter().enumerate() {
            self.memory.write_slice(&[0; 0x1000], GuestAddress(Self::ring(index)[0])).expect("in RAM");
            [&queue.available, &queue.free, &queue.seen].into_iter().for_each(|cell| cell.set(0));
            write(0x16, index as u64, 2);
            write(0x18, u64::from(SIZE), 2);
            for (at, address) in [0x20, 0x28, 0x30].into_iter().zip(Self::ring(index)) {
                write(at, address, 8);
            }
            write(0x1c, 1, 2);
        }
        write(0x14, 15, 1);
        assert_eq!(self.status(), 15);
    }

    pub(crate) fn offered(&self) -> u64 {
        let half = |select: u64| {
            self.pci.bar_write(0x00, &select.to_le_bytes()[..4]);
            u64::from(self.read::<4>(0x04))
        };
        half(0) | half(1) << 32
    }

    pub(crate) fn status(&self) -> u8 {
        self.read::<1>(0x14) as u8
    }

    /// Asks for a reset and waits until the device says that it is done.
    pub(crate) fn reset(&self) {
        self.pci.bar_write(0x14, &[0]);
        eventually("reset", || self.status() == 0);
    }

    /// Device configuration from `at` on.
    pub(crate) fn config<const N: usize>(&self, at: u64) -> u32 {
        self.read::<N>(0x2000 + at)
    }

    /// Writes the device configuration at `at`.
    pub(crate) fn pci_write_config(&self, at: u64, data: &[u8]) {
        self.pci.bar_write(0x2000 + at, data);
    }

    fn read<const N: usize>(&self, at: u64) -> u32 {
        let mut data = [0; N];
        self.pci.bar_read(at, &mut data);
        data.iter().rev().fold(0, |value, byte| value << 8 | u32::from(*byte))
    }

    /// Makes a chain available on `queue` and rings; its links are filled in here. Gives its head.
    pub(crate) fn offer(&self, queue: usize, buffers: &[(u64, u32, u16)]) -> u16 {
        let count = buffers.len() as u16;
        let head = self.queues[queue].free.get();
        let last = buffers.len() - 1;
        let descriptors: Vec<Descriptor> = (0..)
            .zip(buffers)
            .map(|(n, (address, length, flags))| {
                let next = u16::from(usize::from(n) < last);
                (*address, *length, flags | next, (head + n + 1) % SIZE)
            })
            .collect();
        self.queues[queue].free.set((head + count) % SIZE);
        self.offer_raw(queue, head, &descriptors);
        head
    }

    /// Writes `descriptors` from `head` on, wrapping, and makes that available, right or wrong.
    pub(crate) fn offer_raw(&self, queue: usize, head: u16, descriptors: &[Descriptor]) {
        let [table, available, _] = Self::ring(queue);
        for (slot, (address, length, flags, next)) in (head..).zip(descriptors) {
            let at = table + 16 * u64::from(slot % SIZE);
            self.put(at, *address);
            self.put(at + 8, *length);
            self.put(at + 12, *flags);
            self.put(at + 14, *next);
        }
        let index = self.queues[queue].available.get();
        self.put(available + 4 + 2 * u64::from(index % SIZE), head);
        self.queues[queue].available.set(index.wrapping_add(1));
        self.put(available + 2, index.wrapping_add(1));
        self.knock(queue);
    }

    /// Rings the doorbell.
    pub(crate) fn knock(&self, queue: usize) {
        self.pci.bar_write(0x3000 + 4 * queue as u64, &[0, 0]);
    }

    /// The next used buffer, if there is one.
    pub(crate) fn used(&self, queue: usize) -> Option<Used> {
        let at = Self::ring(queue)[2];
        let seen = &self.queues[queue].seen;
        if self.get::<u16>(at + 2) == seen.get() {
            return None;
        }
        let element = at + 4 + 8 * u64::from(seen.get() % SIZE);
        seen.set(seen.get().wrapping_add(1));
        Some(Used { head: self.get::<u32>(element) as u16, length: self.get(element + 4) })
    }

    /// Waits for the next used buffer.
    pub(crate) fn await_used(&self, queue: usize) -> Used {
        let mut used = None;
        eventually("used", || {
            used = self.used(queue);
            used.is_some()
        });
        used.expect("waited for")
    }

    pub(crate) fn put<T: vm_memory::ByteValued>(&self, at: u64, value: T) {
        self.memory.write_obj(value, GuestAddress(at)).expect("in RAM");
    }

    pub(crate) fn get<T: vm_memory::ByteValued>(&self, at: u64) -> T {
        self.memory.read_obj(GuestAddress(at)).expect("in RAM")
    }

    pub(crate) fn put_bytes(&self, at: u64, bytes: &[u8]) {
        self.memory.write_slice(bytes, GuestAddress(at)).expect("in RAM");
    }

    pub(crate) fn bytes(&self, at: u64, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        self.memory.read_slice(&mut bytes, GuestAddress(at)).expect("in RAM");
        bytes
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        self.worker.stop();
    }
}

/// Waits until `done`, with a limit far beyond anything that works.
pub(crate) fn eventually(what: &str, mut done: impl FnMut() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < Duration::from_secs(60), "never: {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}
