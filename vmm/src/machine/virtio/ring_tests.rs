//! The ring with a mock driver, right and wrong, and with another implementation beside it.

use super::super::mock::{Descriptor, INDIRECT, MockDriver, NEXT, WRITE};
use super::*;
use proptest::prelude::*;
use virtio_queue::{QueueOwnedT, QueueT};

fn ring(driver: &MockDriver) -> Ring {
    let ring = Ring::new(64, MockDriver::SIZE, MockDriver::RING, feature::ALL, 16).expect("a good ring");
    ring.check(&driver.memory).expect("in RAM");
    ring
}

fn take(driver: &MockDriver, descriptors: &[Descriptor]) -> Result<Chain, RingError> {
    driver.offer(descriptors);
    let mut chain = Chain::default();
    ring(driver).next(&driver.memory, &mut chain).map(|_| chain)
}

#[test]
fn a_chain_is_taken_apart_in_order() {
    let driver = MockDriver::new();
    let chain = take(
        &driver,
        &[(0x4000, 16, NEXT, 1), (0x5000, 0, NEXT, 2), (0x6000, 512, NEXT | WRITE, 3), (0x7000, 1, WRITE, 0)],
    );
    let chain = chain.expect("a good chain");
    assert_eq!((chain.readable.len(), chain.readable_length(), chain.writable_length()), (1, 16, 513));
    assert!(chain.copy_out(&driver.memory, 510, &[1, 2, 3]));
    assert_eq!(driver.memory.read_obj::<u16>(GuestAddress(0x61fe)).ok(), Some(0x0201));
    assert_eq!(driver.memory.read_obj::<u8>(GuestAddress(0x7000)).ok(), Some(3));
    assert!(!chain.copy_out(&driver.memory, 511, &[1, 2, 3]));
    assert!(!chain.copy_in(&driver.memory, 1, &mut [0; 16]));
}

#[test]
fn an_indirect_table_is_followed_once() {
    let driver = MockDriver::new();
    driver.table(0x8000, &[(0x4000, 16, NEXT, 1), (0x6000, 1, WRITE, 0)]);
    let chain = take(&driver, &[(0x8000, 32, INDIRECT, 0)]).expect("a good table");
    assert_eq!((chain.readable.len(), chain.writable.len()), (1, 1));
    driver.table(0x8000, &[(0x9000, 32, INDIRECT, 0)]);
    assert_eq!(take(&driver, &[(0x8000, 16, INDIRECT, 0)]).err(), Some(RingError::Chain), "a table in a table");
    assert_eq!(take(&driver, &[(0x8000, 17, INDIRECT, 0)]).err(), Some(RingError::Chain), "half a descriptor");
    assert_eq!(take(&driver, &[(0x8000, 0, INDIRECT, 0)]).err(), Some(RingError::Chain), "an empty table");
    driver.table(0x8000, &[(0x4000, 16, 0, 0)]);
    let more = [(0x8000, 16, INDIRECT | NEXT, 1), (0x4000, 1, WRITE, 0)];
    assert_eq!(take(&driver, &more).err(), Some(RingError::Chain), "something after a table");
    assert!(take(&driver, &[(0x5000, 1, NEXT, 1), (0x8000, 16, INDIRECT, 0)]).is_ok(), "a table at the end");
    let end = MockDriver::BYTES - 16;
    driver.table(end, &[(0x4000, 16, NEXT, 1)]);
    assert_eq!(take(&driver, &[(end, 32, INDIRECT, 0)]).err(), Some(RingError::Chain), "a link out of RAM");
    assert_eq!(take(&driver, &[(!0xf, 32, INDIRECT, 0)]).err(), Some(RingError::Chain));
    let mut plain = Ring::new(64, 16, MockDriver::RING, feature::VERSION_1, 16).expect("a good ring");
    driver.set_available(0);
    driver.offer(&[(0x8000, 16, INDIRECT, 0)]);
    assert_eq!(plain.next(&driver.memory, &mut Chain::default()), Err(RingError::Chain), "not negotiated");
}

#[test]
fn a_driver_that_breaks_the_rules_is_told_which() {
    let end = MockDriver::BYTES;
    let cases: [(&[Descriptor], RingError); 8] = [
        (&[(0x4000, 16, NEXT, 0)], RingError::Chain),
        (&[(0x4000, 16, NEXT, 1), (0x5000, 16, NEXT, 0)], RingError::Chain),
        (&[(0x4000, 16, NEXT, MockDriver::SIZE)], RingError::Chain),
        (&[(end, 1, 0, 0)], RingError::Buffer),
        (&[(end - 1, 2, 0, 0)], RingError::Buffer),
        (&[(u64::MAX, 2, 0, 0)], RingError::Buffer),
        (&[(0x4000, u32::MAX, 0, 0)], RingError::Buffer),
        (&[(0x4000, 16, NEXT | WRITE, 1), (0x5000, 16, 0, 0)], RingError::Order),
    ];
    for (descriptors, error) in cases {
        let answer = take(&MockDriver::new(), descriptors).err();
        assert!(answer == Some(error) || answer == Some(RingError::Long) && error == RingError::Chain, "{answer:?}");
    }
}

#[test]
fn an_index_that_runs_ahead_is_refused() {
    let driver = MockDriver::new();
    driver.set_available(MockDriver::SIZE + 1);
    assert_eq!(ring(&driver).next(&driver.memory, &mut Chain::default()), Err(RingError::Available));
}

#[test]
fn a_request_that_was_put_back_comes_again() {
    let driver = MockDriver::new();
    driver.offer(&[(0x4000, 16, 0, 0)]);
    let (mut ring, mut chain) = (ring(&driver), Chain::default());
    assert_eq!(ring.next(&driver.memory, &mut chain), Ok(true));
    ring.put_back(&chain);
    assert_eq!(ring.in_hand(), 0);
    assert_eq!(ring.next(&driver.memory, &mut chain), Ok(true));
    assert_eq!(ring.complete(&driver.memory, &chain, 0), Ok(()));
    assert_eq!((driver.used(), ring.show(&driver.memory), driver.used()), (0, Ok(true), 1));
    assert_eq!(ring.next(&driver.memory, &mut chain), Ok(false));
}

#[test]
fn indices_wrap() {
    let driver = MockDriver::new();
    let (mut ring, mut chain) = (ring(&driver), Chain::default());
    for round in 0..0x1_0010_u32 {
        driver.offer(&[(0x4000, 16, 0, 0)]);
        assert_eq!(ring.next(&driver.memory, &mut chain), Ok(true), "{round}");
        ring.complete(&driver.memory, &chain, round).expect("used");
        ring.show(&driver.memory).expect("shown");
    }
    assert_eq!(driver.used(), 0x10);
}

#[test]
fn a_queue_outside_of_ram_is_refused() {
    let driver = MockDriver::new();
    for part in 0..3 {
        for address in [MockDriver::BYTES, MockDriver::BYTES - 16, !0xf, 1] {
            let mut at = MockDriver::RING;
            at[part] = address;
            let ring = Ring::new(64, 16, at, 0, 16).and_then(|ring| ring.check(&driver.memory));
            assert_eq!(ring, Err(RingError::Place), "{part} {address:#x}");
        }
    }
    assert!(Ring::new(64, 3, MockDriver::RING, 0, 16).is_err());
    assert!(Ring::new(64, 128, MockDriver::RING, 0, 16).is_err());
    assert!(Ring::new(64, 0, MockDriver::RING, 0, 16).is_err());
}

proptest! {
    /// Whatever stands in the rings and tables: no panic, no endless loop, and a chain that is taken lies in RAM.
    #[test]
    fn any_memory_is_survived(
        descriptors in prop::collection::vec((0_u64..0x1_1000, 0_u32..0x2000, 0_u16..8, 0_u16..20), 16),
        heads in prop::collection::vec(0_u16..20, 16),
        index in 0_u16..20,
    ) {
        let driver = MockDriver::new();
        driver.table(MockDriver::RING[0], &descriptors);
        driver.set_heads(&heads);
        driver.set_available(index);
        let (mut ring, mut chain) = (ring(&driver), Chain::default());
        for _ in 0..64 {
            match ring.next(&driver.memory, &mut chain) {
                Err(_) | Ok(false) => break,
                Ok(true) => {
                    for s in chain.readable.iter().chain(&chain.writable) {
                        prop_assert!(s.address.0 + s.length as u64 <= MockDriver::BYTES);
                    }
                    prop_assert!(chain.readable.len() + chain.writable.len() <= 16);
                    let _ = ring.complete(&driver.memory, &chain, 0).and_then(|()| ring.show(&driver.memory));
                }
            }
        }
    }
}

#[test]
fn a_request_in_hand_can_not_be_offered_again() {
    let driver = MockDriver::new();
    driver.table(MockDriver::RING[0], &[(0x4000, 16, 0, 0), (0x5000, 16, 0, 0)]);
    driver.set_heads(&[0, 1, 0, 1, 1]);
    driver.set_available(5);
    let (mut ring, mut chain, mut other) = (ring(&driver), Chain::default(), Chain::default());
    assert_eq!(ring.next(&driver.memory, &mut chain), Ok(true));
    assert_eq!(ring.next(&driver.memory, &mut other), Ok(true));
    ring.complete(&driver.memory, &chain, 0).expect("used");
    assert_eq!((ring.in_hand(), ring.next(&driver.memory, &mut chain)), (1, Ok(true)));
    ring.complete(&driver.memory, &other, 0).expect("used out of order");
    assert_eq!(ring.next(&driver.memory, &mut other), Ok(true));
    assert_eq!((ring.in_hand(), ring.next(&driver.memory, &mut other)), (2, Err(RingError::Twice)));
}

#[test]
fn what_is_completed_together_is_shown_together() {
    let driver = MockDriver::new();
    driver.table(MockDriver::RING[0], &[(0x4000, 16, 0, 0); 3]);
    driver.set_heads(&[2, 0, 1]);
    driver.set_available(3);
    let (mut ring, mut chain) = (ring(&driver), Chain::default());
    for length in 1..=3 {
        assert_eq!(ring.next(&driver.memory, &mut chain), Ok(true));
        ring.complete(&driver.memory, &chain, length).expect("used");
        assert_eq!(driver.used(), 0);
    }
    assert_eq!((ring.show(&driver.memory), ring.show(&driver.memory)), (Ok(true), Ok(false)));
    assert_eq!((driver.used(), [0, 1, 2].map(|slot| driver.used_length(slot))), (3, [1, 2, 3]));
}

#[test]
fn interrupts_and_doorbells_come_when_they_are_wanted() {
    for events in [0, feature::EVENT_INDEX] {
        let driver = MockDriver::new();
        let mut ring = Ring::new(64, 16, MockDriver::RING, events, 16).expect("a good ring");
        let mut serve = |driver: &MockDriver| {
            driver.offer(&[(0x4000, 16, 0, 0)]);
            let mut chain = Chain::default();
            assert_eq!(ring.next(&driver.memory, &mut chain), Ok(true));
            ring.complete(&driver.memory, &chain, 0).expect("used");
            ring.show(&driver.memory).expect("shown")
        };
        // Without event indices a flag; with them, the index of the used element that is worth an interrupt.
        driver.put(MockDriver::RING[1], 1_u16);
        driver.put(MockDriver::RING[1] + 4 + 2 * 16, 2_u16);
        let wanted = [serve(&driver), serve(&driver), serve(&driver), serve(&driver)];
        assert_eq!(wanted, if events == 0 { [false; 4] } else { [false, false, true, false] });
        driver.put(MockDriver::RING[1], 0_u16);
        assert_eq!(serve(&driver), events == 0);

        ring.hush(&driver.memory).expect("hushed");
        assert_eq!(driver.get::<u16>(MockDriver::RING[2]), if events == 0 { 1 } else { 0 });
        assert_eq!(ring.listen(&driver.memory), Ok(false));
        let event: u16 = driver.get(MockDriver::RING[2] + 4 + 8 * 16);
        assert_eq!((driver.get::<u16>(MockDriver::RING[2]), event), (0, if events == 0 { 0 } else { 5 }));
        driver.offer(&[(0x4000, 16, 0, 0)]);
        assert_eq!(ring.listen(&driver.memory), Ok(true), "it came in the meantime");
    }
}

/// `passed` against its meaning: walking from `before` to `now`, `event` is one of the indices that were used.
#[test]
fn event_indices_wrap_as_they_should() {
    let edges = [0_u16, 1, 2, 3, 0x7fff, 0x8000, 0x8001, 0xfffd, 0xfffe, 0xffff];
    for before in edges {
        for steps in 0..40_u16 {
            for offset in 0..44_u16 {
                let (now, event) = (before.wrapping_add(steps), before.wrapping_add(offset).wrapping_sub(2));
                let walked = (0..steps).any(|step| before.wrapping_add(step) == event);
                assert_eq!(passed(event, before, now), walked, "{before} {steps} {event}");
            }
        }
    }
}

/// Every size, and every place of each part around the edges of a small guest: `check` says yes exactly where each byte of
/// the three parts lies in RAM.
#[test]
fn queue_addresses_are_judged_right_at_every_edge() {
    let driver = MockDriver::new();
    let end = MockDriver::BYTES;
    for exponent in 0..=6 {
        let size = 1_u16 << exponent;
        let lengths = [16 * u64::from(size), 6 + 2 * u64::from(size), 6 + 8 * u64::from(size)];
        for (part, length) in lengths.into_iter().enumerate() {
            let edge = (end - 1200..end + 64).chain(0..64).chain(u64::MAX - 1200..=u64::MAX);
            for address in edge {
                let mut at = MockDriver::RING;
                at[part] = address;
                let aligned = address % [16, 2, 4][part] == 0 && (part == 0 || address != 0);
                let inside = address.checked_add(length).is_some_and(|to| to <= end);
                let ring = Ring::new(64, size, at, 0, 16).and_then(|ring| ring.check(&driver.memory));
                assert_eq!(ring.is_ok(), aligned && inside, "{size} {part} {address:#x}");
            }
        }
    }
}

proptest! {
    /// A well-behaved driver gets from this ring what it gets from the `virtio-queue` crate: same chains, same interrupts, same
    /// used ring.
    #[test]
    fn another_implementation_agrees(
        batches in prop::collection::vec((1_u16..6, 0_u32..9000, any::<bool>(), any::<u16>()), 1..40),
        events: bool,
    ) {
        let (ours, theirs) = (MockDriver::new(), MockDriver::new());
        let features = if events { feature::ALL } else { feature::INDIRECT_DESCRIPTORS };
        let mut ring = Ring::new(64, MockDriver::SIZE, MockDriver::RING, features, 16).expect("a good ring");
        let mut queue = virtio_queue::Queue::new(64).expect("a size");
        queue.set_size(MockDriver::SIZE);
        queue.set_desc_table_address(Some(MockDriver::RING[0] as u32), None);
        queue.set_avail_ring_address(Some(MockDriver::RING[1] as u32), None);
        queue.set_used_ring_address(Some(MockDriver::RING[2] as u32), None);
        queue.set_event_idx(events);
        queue.set_ready(true);
        let mut chain = Chain::default();
        for (count, length, indirect, event) in batches {
            for driver in [&ours, &theirs] {
                driver.put(MockDriver::RING[1] + 4 + 2 * 16, event);
                for _ in 0..count {
                    let parts = [(0x4000, 16, NEXT, 1), (0x5000, length, NEXT | WRITE, 2), (0x8000, 1, WRITE, 0)];
                    driver.table(0x9000, &parts);
                    if indirect { driver.offer(&[(0x9000, 48, INDIRECT, 0)]) } else { driver.offer(&parts) }
                }
            }
            for _ in 0..count {
                let theirs_is = queue.iter(&theirs.memory).expect("good indices").next().expect("a chain");
                let head = theirs_is.head_index();
                let parts: Vec<_> = theirs_is.filter(|d| d.len() > 0).map(|d| (d.addr(), d.len() as usize, d.is_write_only())).collect();
                prop_assert_eq!(ring.next(&ours.memory, &mut chain), Ok(true));
                let mut found: Vec<_> = chain.readable.iter().map(|s| (s.address, s.length, false)).collect();
                found.extend(chain.writable.iter().map(|s| (s.address, s.length, true)));
                prop_assert_eq!((chain.head, found), (head, parts));
                ring.complete(&ours.memory, &chain, length).expect("used");
                queue.add_used(&theirs.memory, head, length).expect("used");
            }
            prop_assert_eq!(ring.show(&ours.memory).ok(), queue.needs_notification(&theirs.memory).ok());
            prop_assert_eq!(ring.listen(&ours.memory).ok(), queue.enable_notification(&theirs.memory).ok());
            let rings = |driver: &MockDriver| driver.get::<[u8; 32]>(MockDriver::RING[2]);
            prop_assert_eq!(rings(&ours), rings(&theirs));
        }
    }
}
