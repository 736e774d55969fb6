//! The card with a mock driver and a wire to look at.

use super::*;
use crate::machine::net::header::{HEADER, LONGEST};
use crate::machine::net::{NetCounters, NetDevice, NetSlot};
use crate::machine::rate::Rate;
use crate::machine::sync::lock;
use crate::machine::virtio::mock::WRITE;
use crate::machine::virtio::rig::{Rig, eventually};
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, send, socketpair};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Mutex;

const MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
const OTHER: [u8; 6] = [2, 0, 0, 0, 0, 2];
const GUEST: u64 = Rig::FREE;

/// A port that is one end of a socket pair, and that remembers what it was told.
struct Wire {
    fd: OwnedFd,
    told: Arc<Mutex<Told>>,
}

#[derive(Default)]
struct Told {
    offload: u64,
    active: bool,
}

impl Port for Wire {
    fn send(&mut self, frame: &[u8]) -> io::Result<()> {
        Ok(send(&self.fd, frame, SendFlags::NOSIGNAL).map(drop)?)
    }
    fn receive(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match recv(&self.fd, buffer, RecvFlags::empty())? {
            (0, _) => Err(io::ErrorKind::BrokenPipe.into()),
            (length, _) => Ok(length),
        }
    }
    fn offload(&mut self, features: u64) -> io::Result<()> {
        lock(&self.told).offload = features;
        Ok(())
    }
    fn set_active(&mut self, active: bool) -> io::Result<()> {
        lock(&self.told).active = active;
        Ok(())
    }
}

impl AsFd for Wire {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

struct Bench {
    rig: Rig,
    device: Arc<NetDevice>,
    wires: Vec<OwnedFd>,
    told: Vec<Arc<Mutex<Told>>>,
}

impl Bench {
    fn new(pairs: usize, limits: RateLimits, features: u64) -> Self {
        let (mut ports, mut wires, mut told) = (vec![], vec![], vec![]);
        for _ in 0..pairs {
            let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
            let (ours, theirs) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).expect("sockets");
            let note = Arc::<Mutex<Told>>::default();
            ports.push(Box::new(Wire { fd: theirs, told: note.clone() }) as Box<dyn Port>);
            wires.push(ours);
            told.push(note);
        }
        let mac = MacAddress::new(MAC).expect("a MAC");
        let slot = NetSlot { id: "n".into(), mac, mtu: Some(1400), queue_size: 256, limits, ports };
        let device = Arc::new(NetDevice::new(slot).expect("eventfd"));
        let rig = Rig::new(device.clone(), |crew| device.hire(crew));
        rig.bring_up(features);
        Self { rig, device, wires, told }
    }

    fn plain(features: u64) -> Self {
        Self::new(1, RateLimits::default(), features)
    }

    fn counters(&self) -> NetCounters {
        self.device.counters()
    }

    /// The guest sends `frame` with `header` in two buffers.
    fn guest_sends(&self, header: [u8; HEADER], frame: &[u8]) {
        self.rig.put_bytes(GUEST, &header);
        self.rig.put_bytes(GUEST + 0x100, frame);
        self.rig.offer(1, &[(GUEST, HEADER as u32, 0), (GUEST + 0x100, frame.len() as u32, 0)]);
        assert_eq!(self.rig.await_used(1).length, 0);
    }

    fn host_gets(&self) -> Option<Vec<u8>> {
        let mut buffer = vec![0; LONGEST + 1];
        let (length, _) = recv(&self.wires[0], &mut buffer[..], RecvFlags::empty()).ok()?;
        buffer.truncate(length);
        Some(buffer)
    }

    fn host_sends(&self, header: [u8; HEADER], frame: &[u8]) {
        send(&self.wires[0], &[&header, frame].concat(), SendFlags::NOSIGNAL).expect("sent");
    }

    /// The control queue, which lies behind `pairs` pairs, answers.
    fn command(&self, pairs: usize, request: &[u8]) -> u8 {
        let at = GUEST + 0x1000;
        self.rig.put_bytes(at, request);
        self.rig.put(at + 0x800, 0xaa_u8);
        self.rig.offer(2 * pairs, &[(at, 2, 0), (at + 2, request.len() as u32 - 2, 0), (at + 0x800, 1, WRITE)]);
        self.rig.await_used(2 * pairs);
        self.rig.get(at + 0x800)
    }
}

fn frame(to: [u8; 6], length: usize) -> Vec<u8> {
    let head = [&to[..], &OTHER, &[0x88, 0xb5]].concat();
    head.into_iter().chain((0..).map(|i: u32| (i % 251) as u8)).take(length).collect()
}

fn header(flags: u8, gso: u8, words: [u16; 5]) -> [u8; HEADER] {
    let mut bytes = [flags, gso, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    bytes[2..].chunks_mut(2).zip(words).for_each(|(to, word)| to.copy_from_slice(&word.to_le_bytes()));
    bytes
}

#[test]
fn the_card_says_who_it_is() {
    let bench = Bench::plain(0);
    let mac: Vec<u8> = (0..6).map(|at| bench.rig.config::<1>(at) as u8).collect();
    assert_eq!(mac, MAC);
    assert_eq!((bench.rig.config::<2>(6), bench.rig.config::<2>(8), bench.rig.config::<2>(10)), (1, 1, 1400));
    let offered = bench.rig.offered();
    assert!(offered & feature::MTU != 0 && offered & feature::MQ == 0, "{offered:#x}");
}

#[test]
fn frames_go_both_ways() {
    let bench = Bench::plain(0);
    for length in [14, 60, 1514, 9000] {
        let sent = frame(OTHER, length);
        bench.guest_sends([0; HEADER], &sent);
        let got = bench.host_gets().expect("a frame");
        assert!(got[..HEADER] == [0; HEADER] && got[HEADER..] == sent, "{length}");

        bench.rig.offer(0, &[(GUEST + 0x1_0000, 12, WRITE), (GUEST + 0x2_0000, 10_000, WRITE)]);
        bench.host_sends([0; HEADER], &sent);
        assert_eq!(bench.rig.await_used(0).length as usize, HEADER + length);
        assert!(bench.rig.bytes(GUEST + 0x2_0000, length) == sent, "{length}");
        assert_eq!(bench.rig.bytes(GUEST + 0x1_0000, 12), header(0, 0, [0, 0, 0, 0, 1]));
    }
    let counters = bench.counters();
    assert_eq!((counters.tx_frames, counters.rx_frames, counters.tx_bytes), (4, 4, 14 + 60 + 1514 + 9000));
}

#[test]
fn a_large_frame_is_spread_over_merged_buffers_that_appear_at_once() {
    let features = feature::MRG_RXBUF | feature::GUEST_CSUM | feature::GUEST_TSO4;
    let bench = Bench::plain(features);
    let wanted = feature::GUEST_CSUM | feature::GUEST_TSO4;
    eventually("offloads", || lock(&bench.told[0]).offload == wanted);
    let (large, tso) = (frame(MAC, 60_000), header(1, 1, [54, 1448, 34, 16, 0]));
    let buffer = |n: u64| (GUEST + 0x1_0000 + n * 0x1000, 4096, WRITE);
    (0..10).for_each(|n| _ = bench.rig.offer(0, &[buffer(n)]));
    bench.host_sends(tso, &large);
    std::thread::sleep(Duration::from_millis(30));
    assert_eq!(bench.rig.used(0), None, "ten buffers are too few, and none is shown");
    (10..15).for_each(|n| _ = bench.rig.offer(0, &[buffer(n)]));
    let lengths: Vec<_> = (0..15).map(|_| bench.rig.await_used(0).length as usize).collect();
    assert_eq!((lengths[..14].iter().all(|l| *l == 4096), lengths.iter().sum::<usize>()), (true, HEADER + 60_000));
    let got = bench.rig.bytes(GUEST + 0x1_0000, HEADER + 60_000);
    assert_eq!(got[..HEADER], header(1, 1, [54, 1448, 34, 16, 15]));
    assert!(got[HEADER..] == large);
}

#[test]
fn a_frame_that_never_fits_is_dropped_and_the_next_one_comes() {
    let bench = Bench::plain(0);
    bench.rig.offer(0, &[(GUEST, 100, WRITE)]);
    bench.host_sends([0; HEADER], &frame(MAC, 500));
    bench.host_sends([0; HEADER], &frame(MAC, 60));
    assert_eq!(bench.rig.await_used(0).length, 72);
    assert_eq!((bench.counters().rx_dropped, bench.counters().rx_frames), (1, 1));
}

#[test]
fn what_was_not_negotiated_does_not_pass() {
    let bench = Bench::plain(0);
    bench.guest_sends(header(1, 0, [0, 0, 34, 16, 0]), &frame(OTHER, 60));
    bench.guest_sends(header(0, 1, [54, 1448, 34, 16, 0]), &frame(OTHER, 60));
    bench.guest_sends([0; HEADER], &frame(OTHER, 13));
    assert_eq!((bench.host_gets(), bench.counters().tx_malformed), (None, 3));
    bench.rig.offer(0, &[(GUEST, 2000, WRITE)]);
    bench.host_sends(header(1, 1, [54, 1448, 34, 16, 0]), &frame(MAC, 1000));
    bench.host_sends(header(2, 0, [0; 5]), &frame(MAC, 100));
    assert_eq!(bench.rig.await_used(0).length, 112);
    assert_eq!((bench.rig.get::<u8>(GUEST), bench.counters().rx_dropped), (0, 1));
}

#[test]
fn the_driver_chooses_what_it_receives() {
    let control = feature::CTRL_VQ | feature::CTRL_RX | feature::CTRL_MAC_ADDR | feature::GUEST_CSUM;
    let bench = Bench::plain(control | feature::CTRL_GUEST_OFFLOADS);
    assert_eq!(bench.command(1, &[0, 0, 0]), ACK);
    bench.rig.offer(0, &[(GUEST, 200, WRITE)]);
    bench.host_sends([0; HEADER], &frame(OTHER, 60));
    bench.host_sends([0; HEADER], &frame(MAC, 61));
    assert_eq!(bench.rig.await_used(0).length, 73);
    assert_eq!(bench.counters().rx_filtered, 1);
    assert_eq!(bench.command(1, &[&[1, 1][..], &OTHER].concat()), ACK);
    assert_eq!(bench.rig.config::<1>(5), 2, "the new address stands in the configuration");
    bench.rig.offer(0, &[(GUEST, 200, WRITE)]);
    bench.host_sends([0; HEADER], &frame(MAC, 60));
    bench.host_sends([0; HEADER], &frame(OTHER, 62));
    assert_eq!(bench.rig.await_used(0).length, 74);
    assert_eq!(bench.command(1, &[5, 0, 0, 0, 0, 0, 0, 0, 0, 0]), ACK);
    assert_eq!(lock(&bench.told[0]).offload, 0);
    assert_eq!(bench.command(1, &[4, 0, 1, 0]), ERROR, "one pair has no MQ");
    bench.rig.reset();
    bench.rig.bring_up(0);
    eventually("the old address again", || bench.rig.config::<1>(5) == 1);
}

#[test]
fn pairs_are_used_as_the_driver_says() {
    let bench = Bench::new(2, RateLimits::default(), feature::CTRL_VQ | feature::MQ);
    let active = || bench.told.iter().map(|told| lock(told).active).collect::<Vec<_>>();
    assert_eq!(bench.rig.config::<2>(8), 2);
    eventually("one pair at first", || active() == [true, false]);
    bench.rig.put_bytes(GUEST, &[&[0; HEADER][..], &frame(OTHER, 60)].concat());
    bench.rig.offer(3, &[(GUEST, 72, 0)]);
    assert_eq!(bench.command(2, &[4, 0, 3, 0]), ERROR);
    assert_eq!((bench.command(2, &[4, 0, 2, 0]), active()), (ACK, vec![true, true]));
    bench.rig.await_used(3);
    let mut buffer = [0; 100];
    assert_eq!(recv(&bench.wires[1], &mut buffer[..], RecvFlags::empty()).map(|(length, _)| length), Ok(72));
    bench.rig.reset();
    bench.rig.bring_up(0);
    eventually("one pair after a reset", || active() == [true, false]);
}

#[test]
fn limits_hold_in_both_directions_and_nothing_is_lost() {
    let operations = Some(Rate { size: 1, one_time_burst: 0, refill: Duration::from_secs(1) });
    let bench = Bench::new(1, RateLimits { bandwidth: None, operations }, 0);
    for length in 60..63 {
        let at = GUEST + 0x1000 * (length - 60);
        bench.rig.put_bytes(at, &[&[0; HEADER][..], &frame(OTHER, length as usize)].concat());
        bench.rig.offer(1, &[(at, HEADER as u32 + length as u32, 0)]);
        bench.rig.offer(0, &[(at + 0x800, 200, WRITE)]);
        bench.host_sends([0; HEADER], &frame(MAC, length as usize));
    }
    for length in 60..63 {
        assert_eq!(bench.rig.await_used(0).length as usize, HEADER + length);
        bench.rig.await_used(1);
        assert_eq!(bench.host_gets().map(|got| got.len()), Some(HEADER + length));
    }
    let counters = bench.counters();
    assert!(counters.tx_throttled > 0 && counters.rx_throttled > 0, "{counters:?}");
}

#[test]
fn a_wire_that_is_cut_takes_the_link_down() {
    let mut bench = Bench::plain(feature::STATUS);
    bench.wires.clear();
    eventually("down", || bench.rig.config::<2>(6) == 0);
    bench.guest_sends([0; HEADER], &frame(OTHER, 60));
    assert_eq!(bench.counters().tx_dropped, 1);
}

#[test]
fn a_driver_that_breaks_the_rules_breaks_its_own_card_only() {
    let bench = Bench::plain(feature::CTRL_VQ);
    let cases = [
        (0, vec![(GUEST, 100, 0)]),
        (0, vec![(GUEST, 11, WRITE)]),
        (1, vec![(GUEST, 11, 0)]),
        (1, vec![(GUEST, 100, 0), (GUEST, 1, WRITE)]),
        (2, vec![(GUEST, 3, 0)]),
    ];
    for (round, (queue, buffers)) in (1..).zip(cases) {
        bench.rig.offer(queue, &buffers);
        if queue == 0 {
            bench.host_sends([0; HEADER], &frame(MAC, 60));
        }
        eventually("needs a reset", || bench.rig.status() == 15 | 64);
        assert_eq!(bench.counters().breaks, round);
        bench.rig.reset();
        bench.rig.bring_up(feature::CTRL_VQ);
    }
    bench.guest_sends([0; HEADER], &frame(OTHER, 60));
    assert!(bench.host_gets().is_some());
}
