//! `fealty run --unprotected` with devices beside disks: under its sandbox, on this host's kernel.
#![allow(unsafe_code)]

mod common;

use common::namespace::{in_namespace, ip, make_tap};
use common::{LIMIT, Program, configuration_with, fealty};
use fealty_vmm::machine::{Tap, TapError};
use policy::device::InterfaceName;
use rustix::net::{RecvFlags, SendFlags, recv, send};
use rustix::process::Signal;
use serde_json::json;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

const GUEST: [u8; 6] = [0x02, 0, 0, 0, 0, 0x10];
const HOST: [u8; 6] = [0x02, 0, 0, 0, 0, 0x20];
/// `struct virtio_net_hdr`, which a packet socket puts before each frame.
const HEADER: usize = 10;

/// A packet socket on interface `name` that sends and receives frames with their offload header (packet(7)).
struct Packets(OwnedFd);

impl Packets {
    fn on(name: &str) -> Self {
        const PACKET_VNET_HDR: libc::c_int = 15;
        const ETH_P_ALL: u16 = 3;
        let index = {
            let name = std::ffi::CString::new(name).expect("a name");
            // SAFETY: the pointer is to a string with its NUL.
            unsafe { libc::if_nametoindex(name.as_ptr()) }
        };
        // SAFETY: the call takes numbers.
        let fd =
            unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, ETH_P_ALL.to_be().into()) };
        assert!(fd >= 0 && index > 0, "{}", std::io::Error::last_os_error());
        // SAFETY: the call succeeded, so this is a descriptor that nobody else owns.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        let on: libc::c_int = 1;
        let address = libc::sockaddr_ll {
            sll_family: libc::AF_PACKET as u16,
            sll_protocol: ETH_P_ALL.to_be(),
            sll_ifindex: index as i32,
            sll_hatype: 0,
            sll_pkttype: 0,
            sll_halen: 0,
            sll_addr: [0; 8],
        };
        let time = libc::timeval { tv_sec: 1, tv_usec: 0 };
        // SAFETY: each pointer is to a live value of the length that is given with it.
        let done = unsafe {
            let size = |bytes: usize| bytes as libc::socklen_t;
            [
                libc::setsockopt(fd.as_raw_fd(), libc::SOL_PACKET, PACKET_VNET_HDR, (&raw const on).cast(), size(4)),
                libc::setsockopt(
                    fd.as_raw_fd(),
                    libc::SOL_SOCKET,
                    libc::SO_RCVTIMEO,
                    (&raw const time).cast(),
                    size(size_of_val(&time)),
                ),
                libc::bind(fd.as_raw_fd(), (&raw const address).cast(), size(size_of_val(&address))),
            ]
        };
        assert_eq!(done, [0; 3], "{}", std::io::Error::last_os_error());
        Self(fd)
    }

    fn send(&self, header: [u8; HEADER], frame: &[u8]) {
        send(&self.0, &[&header, frame].concat(), SendFlags::empty()).expect("sent");
    }

    /// The next frame to [`HOST`], with its header.
    fn receive(&self) -> (Vec<u8>, Vec<u8>) {
        let start = Instant::now();
        let mut buffer = vec![0; 70_000];
        while start.elapsed() < LIMIT {
            // Nothing for a second: the machine may be slow.
            let Ok((length, _)) = recv(&self.0, &mut buffer[..], RecvFlags::empty()) else { continue };
            let (header, frame) = buffer[..length].split_at(HEADER);
            if frame.starts_with(&HOST) {
                return (header.to_vec(), frame.to_vec());
            }
        }
        panic!("no frame came back");
    }
}

fn frame(kind: u16, payload: &[u8]) -> Vec<u8> {
    [&GUEST[..], &HOST, &kind.to_be_bytes(), payload].concat()
}

/// A TCP segment of `length` bytes in IPv4, whose checksum is still to be completed.
fn segment(length: usize) -> Vec<u8> {
    let mut packet = vec![0; 40 + length];
    packet[0] = 0x45;
    packet[2..4].copy_from_slice(&(40 + length as u16).to_be_bytes());
    packet[8..10].copy_from_slice(&[64, 6]);
    packet[12..20].copy_from_slice(&[10, 9, 8, 1, 10, 9, 8, 2]);
    let sum = |words: &[u8]| words.chunks(2).map(|w| u32::from(u16::from_be_bytes([w[0], w[1]]))).sum::<u32>();
    let fold = |sum: u32| ((sum & 0xffff) + (sum >> 16)) as u16;
    let header = !fold(sum(&packet[..20]));
    packet[10..12].copy_from_slice(&header.to_be_bytes());
    packet[20..24].copy_from_slice(&[0x13, 0x88, 0x13, 0x89]);
    packet[32] = 0x50;
    packet[33] = 0x10;
    // The pseudo header's part of the checksum.
    let pseudo = fold(sum(&packet[12..20]) + 6 + 20 + length as u32);
    packet[36..38].copy_from_slice(&pseudo.to_be_bytes());
    packet[40..].iter_mut().enumerate().for_each(|(at, byte)| *byte = (at % 251) as u8);
    frame(0x0800, &packet)
}

#[test]
fn frames_and_large_segments_cross_a_tap_both_ways() {
    in_namespace("frames_and_large_segments_cross_a_tap_both_ways", || {
        make_tap("tap0", &[]);
        let folder = tempfile::tempdir().expect("folder");
        let net = json!({ "net": [{ "id": "lan", "tap": "tap0", "mac": "02:00:00:00:00:10" }], "rng": {} });
        let path = configuration_with(folder.path(), "rng,net:4,poweroff", net);
        let mut vm = Program::start(&mut fealty(&["run", "--unprotected", path.to_str().expect("UTF-8")]));
        vm.until("net up 020000000010");
        let packets = Packets::on("tap0");
        for length in [46, 1500] {
            let payload: Vec<u8> = (0..length).map(|i: u32| (i % 253) as u8).collect();
            packets.send([0; HEADER], &frame(0x88b5, &payload));
            let (_, back) = packets.receive();
            assert_eq!(back, [&HOST[..], &GUEST, &[0x88, 0xb5], &payload].concat());
        }
        // One large segment: neither the host's kernel nor the card cuts it, on either way.
        let large = segment(60_000);
        let tso = [1, 1, 54, 0, 0xa8, 5, 34, 0, 16, 0];
        packets.send(tso, &large);
        let (header, back) = packets.receive();
        assert_eq!(back.len(), large.len());
        assert!(back[12..] == large[12..] && header[..2] == [1, 1] && header[4..6] == tso[4..6], "{header:?}");
        packets.send([1, 0, 0, 0, 0, 0, 34, 0, 16, 0], &segment(100));
        let (header, back) = packets.receive();
        assert!(back.len() == 154 && header[..2] == [1, 0], "its checksum was left to whoever needs it: {header:?}");
        let ended = vm.end().code(0);
        assert!(ended.out.contains("net echoed 60054") && ended.out.contains("rng "), "{}", ended.out);
    });
}

#[test]
fn a_tap_is_what_the_configuration_says_or_nothing_starts() {
    in_namespace("a_tap_is_what_the_configuration_says_or_nothing_starts", || {
        make_tap("single", &[]);
        make_tap("multi", &["multi_queue"]);
        ip(&["link", "add", "bridge", "type", "bridge"]);
        let name = |text: &str| InterfaceName::try_from(text.to_owned()).expect("a name");
        let mut ports = Tap::open(&name("multi"), 4).expect("four queues").into_ports();
        for port in &mut ports[1..] {
            port.set_active(false).expect("detached");
            port.set_active(true).expect("attached");
        }
        ports[0].offload(fealty_vmm::machine::net::feature::GUEST_OFFLOADS).expect("offloads");
        ports[0].offload(0).expect("none");
        drop(ports);
        let attach = |error| matches!(error, Err(TapError::Attach { .. }));
        assert!(attach(Tap::open(&name("single"), 2)) && attach(Tap::open(&name("bridge"), 1)));
        assert!(matches!(Tap::open(&name("none"), 1), Err(TapError::Missing(_))));
        let held = Tap::open(&name("single"), 1).expect("one queue");
        assert!(attach(Tap::open(&name("single"), 1)), "in use");
        drop(held);

        let folder = tempfile::tempdir().expect("folder");
        for (net, code) in [
            (json!({ "id": "lan", "tap": "none" }), 13),
            (json!({ "id": "lan", "tap": "bridge" }), 13),
            (json!({ "id": "lan", "tap": "single", "num_queues": 4 }), 13),
            (json!({ "id": "lan" }), 3),
            (json!({ "id": "lan", "tap": "single", "num_queues": 3 }), 3),
        ] {
            let path = configuration_with(folder.path(), "poweroff", json!({ "net": [net] }));
            let ended =
                Program::start(&mut fealty(&["run", "--unprotected", path.to_str().expect("UTF-8")])).end().code(code);
            assert!(ended.why().contains("lan") && ended.out.is_empty(), "{}", ended.err);
        }
        // A TAP with several queues could be attached twice.
        let card = |id: &str| json!({ "id": id, "tap": "multi", "num_queues": 4 });
        let path = configuration_with(folder.path(), "poweroff", json!({ "net": [card("lan"), card("wan")] }));
        let ended = Program::start(&mut fealty(&["run", "--unprotected", path.to_str().expect("UTF-8")])).end();
        assert_eq!(ended.code(13).why(), "network wan: its TAP multi is that of network lan already");
    });
}

#[test]
fn a_hostile_driver_breaks_its_network_card_only() {
    in_namespace("a_hostile_driver_breaks_its_network_card_only", || {
        make_tap("tap0", &["multi_queue"]);
        let folder = tempfile::tempdir().expect("folder");
        std::fs::write(folder.path().join("root.img"), vec![0; 1 << 20]).expect("written");
        let devices = json!({
            "disks": [{ "id": "root", "path": "root.img" }],
            "net": [{ "id": "lan", "tap": "tap0", "num_queues": 4 }],
        });
        let path = configuration_with(folder.path(), "hostile:6000:3,write:5:7,flush,verify:5:7,tick", devices);
        let socket = folder.path().join("api.sock").display().to_string();
        let words = ["run", "--unprotected", path.to_str().expect("UTF-8"), "--api-socket", &socket];
        let mut vm = Program::start(&mut fealty(&words));
        // Frames come all the while.
        vm.until("hostile to 1");
        let packets = Packets::on("tap0");
        let payload = [0x55; 1000];
        while !vm.out().contains("tick 1") {
            let _ = send(&packets.0, &[&[0; HEADER][..], &frame(0x88b5, &payload)].concat(), SendFlags::empty());
            assert!(vm.runs(), "{}\n{}", vm.out(), vm.err());
            std::thread::sleep(Duration::from_millis(1));
        }
        assert!(vm.out().contains("verify 5 ok"), "{}", vm.out());
        let told = Program::start(&mut fealty(&["ctl", &socket, "info", "--json"])).end().code(0);
        let told: serde_json::Value = serde_json::from_str(&told.out).expect("JSON");
        let breaks = |device: &serde_json::Value| device["breaks"].as_u64().expect("a number");
        let counters = &told["counters"];
        assert!(breaks(&counters["net"]["lan"]) > 0 && breaks(&counters["disks"]["root"]) == 0, "{counters:#}");
        vm.signal(Signal::TERM);
        vm.until_step("power-button");
        vm.signal(Signal::TERM);
        vm.end().code(14);
    });
}

#[test]
fn a_panic_has_its_own_exit_code_and_one_line() {
    let folder = tempfile::tempdir().expect("folder");
    let path = configuration_with(folder.path(), "say-panic", json!({ "pvpanic": true }));
    let ended = Program::start(&mut fealty(&["run", "--unprotected", path.to_str().expect("UTF-8")])).end().code(15);
    assert!(ended.why().contains("panicked"), "{}", ended.err);
}

/// A client of the virtio console's socket in `folder`, once there is one.
fn on_console(folder: &Path) -> UnixStream {
    let start = Instant::now();
    loop {
        match UnixStream::connect(folder.join("hvc.sock")) {
            Ok(client) => return client,
            Err(error) => assert!(start.elapsed() < LIMIT, "{error}"),
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn a_virtio_console_is_on_a_socket_or_in_the_serial_lines_place() {
    let folder = tempfile::tempdir().expect("folder");
    let on_socket = json!({ "console": { "mode": "Socket", "socket": "hvc.sock" } });
    let path = configuration_with(folder.path(), "hvc,poweroff", on_socket);
    let vm = Program::start(&mut fealty(&["run", "--unprotected", path.to_str().expect("UTF-8")]));
    let mut client = on_console(folder.path());
    client.write_all(b"good morning").expect("typed");
    let mut seen = Vec::new();
    while !seen.ends_with(b"good morning") {
        let mut bytes = [0; 64];
        let length = client.read(&mut bytes).expect("read");
        assert!(length > 0, "{}", String::from_utf8_lossy(&seen));
        seen.extend(&bytes[..length]);
    }
    client.write_all(b"quit").expect("typed");
    assert!(vm.end().code(0).out.contains("hvc done"), "the serial line goes on beside it");

    let path = configuration_with(folder.path(), "hvc,poweroff", json!({ "console": { "mode": "Tty" } }));
    let mut command = fealty(&["run", "--unprotected", path.to_str().expect("UTF-8")]);
    command.stdin(Stdio::piped());
    let mut vm = Program::start(&mut command);
    vm.until("hvc ready");
    let mut keyboard = vm.stdin();
    keyboard.write_all(b"good evening").expect("typed");
    vm.until("good evening");
    keyboard.write_all(b"quit").expect("typed");
    let ended = vm.end().code(0);
    assert!(!ended.out.contains("ealty-guest"), "the serial line goes nowhere: {}", ended.out);
}

#[test]
fn the_last_words_on_a_virtio_console_arrive_however_the_vm_ends() {
    // The guest says half a megabyte, more than a socket holds, and ends. Nobody reads before that.
    for (ending, last_step, code) in [
        ("poweroff", "powering off", 0),
        ("reset", "resetting", 12),
        ("panic", "panicking", 10),
        ("say-panic", "saying panic", 15),
        ("spin", "spinning", 14),
    ] {
        let folder = tempfile::tempdir().expect("folder");
        let devices = json!({ "console": { "mode": "Socket", "socket": "hvc.sock" }, "pvpanic": true });
        let path = configuration_with(folder.path(), &format!("hvc,hvc-pour,{ending}"), devices);
        let mut vm = Program::start(&mut fealty(&["run", "--unprotected", path.to_str().expect("UTF-8")]));
        let mut client = on_console(folder.path());
        client.write_all(b"quit").expect("typed");
        vm.until(last_step);
        if ending == "spin" {
            vm.signal(Signal::TERM);
            vm.until_step("power-button");
            vm.signal(Signal::TERM);
            vm.until_step("stopping");
        }
        let mut said = String::new();
        client.read_to_string(&mut said).expect("read");
        assert!(said.ends_with(".last words\n"), "{ending}: {} bytes", said.len());
        assert_eq!(said.matches('.').count(), 31 * 16384, "{ending}");
        vm.end().code(code);
    }
}

#[test]
fn the_last_words_on_standard_output_arrive_before_a_panic_ends_the_vm() {
    let folder = tempfile::tempdir().expect("folder");
    let devices = json!({ "console": { "mode": "Tty" }, "pvpanic": true });
    let path = configuration_with(folder.path(), "hvc-pour,say-panic", devices);
    let vm = Program::start(&mut fealty(&["run", "--unprotected", path.to_str().expect("UTF-8")]));
    let ended = vm.end().code(15);
    assert!(ended.out.ends_with(".last words\n"), "{} bytes", ended.out.len());
}

#[test]
fn a_balloon_gives_memory_back() {
    let folder = tempfile::tempdir().expect("folder");
    let balloon = json!({ "balloon": { "size": 8 << 20, "free_page_reporting": true } });
    let path = configuration_with(folder.path(), "balloon,poweroff", balloon);
    let ended = Program::start(&mut fealty(&["run", "--unprotected", path.to_str().expect("UTF-8")])).end().code(0);
    assert!(ended.out.contains("balloon target=2048") && ended.out.contains("balloon kept 0 0"), "{}", ended.out);
}

#[test]
fn a_client_of_the_host_speaks_with_the_guest() {
    let folder = tempfile::tempdir().expect("folder");
    let vsock = json!({ "vsock": { "cid": 77, "socket": "vsock" } });
    let path = configuration_with(folder.path(), "vsock,poweroff", vsock);
    let mut vm = Program::start(&mut fealty(&["run", "--unprotected", path.to_str().expect("UTF-8")]));
    vm.until("vsock cid=77");
    let mut client = UnixStream::connect(folder.path().join("vsock")).expect("connected");
    client.write_all(b"CONNECT 1234\n").expect("asked");
    let mut answer = BufReader::new(client.try_clone().expect("a descriptor"));
    let mut line = String::new();
    answer.read_line(&mut line).expect("read");
    assert!(line.starts_with("OK "), "{line}");
    let text: Vec<u8> = (0..100_000_u32).map(|i| (i % 251) as u8).collect();
    let sent = text.clone();
    let writer = std::thread::spawn(move || {
        client.write_all(&sent).expect("sent");
        client.shutdown(Shutdown::Write).expect("shut down");
    });
    let mut back = Vec::new();
    answer.read_to_end(&mut back).expect("read");
    writer.join().expect("sent");
    assert!(back == text);
    assert!(vm.end().code(0).out.contains("vsock echoed 100000"));
}
