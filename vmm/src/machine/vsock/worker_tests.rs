//! The switchboard with a mock driver and clients.

use super::*;
use crate::machine::virtio::mock::WRITE;
use crate::machine::virtio::rig::{Rig, eventually};
use crate::machine::vsock::{VsockCounters, VsockDevice};
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::time::Duration;

const CID: u64 = 42;
const GUEST: u64 = Rig::FREE;
const INPUT: u64 = Rig::FREE + 0x2_0000;

struct Bench {
    device: Arc<VsockDevice>,
    rig: Rig,
    folder: tempfile::TempDir,
}

impl Bench {
    fn new() -> Self {
        let folder = tempfile::tempdir().expect("folder");
        let listener = UnixListener::bind(folder.path().join("vsock")).expect("bound");
        listener.set_nonblocking(true).expect("set");
        let device = Arc::new(VsockDevice::new(CID as u32, listener).expect("eventfd"));
        let rig = Rig::new(device.clone(), |crew| device.hire(crew));
        rig.bring_up(0);
        Self { device, rig, folder }
    }

    fn client(&self, greeting: &str) -> UnixStream {
        let mut client = UnixStream::connect(self.folder.path().join("vsock")).expect("connected");
        client.set_read_timeout(Some(Duration::from_secs(60))).expect("set");
        client.write_all(greeting.as_bytes()).expect("greeted");
        client
    }

    fn counters(&self) -> VsockCounters {
        self.device.counters()
    }

    /// The guest sends a packet from its port `theirs` to `ours`.
    fn sends(&self, op: Op, (ours, theirs): Ends, flags: u32, fwd_cnt: u32, data: &[u8]) {
        let header = Header {
            src_cid: CID,
            dst_cid: HOST_CID,
            src_port: theirs,
            dst_port: ours,
            len: data.len() as u32,
            kind: STREAM,
            op: Some(op),
            flags,
            buf_alloc: 4096,
            fwd_cnt,
        };
        self.rig.put_bytes(GUEST, &[&header.bytes(), data].concat());
        self.rig.offer(1, &[(GUEST, HEADER as u32, 0), (GUEST + HEADER as u64, data.len() as u32, 0)]);
        assert_eq!(self.rig.await_used(1).length, 0);
    }

    /// The guest offers a buffer and gets the next packet.
    fn gets(&self) -> (Header, Vec<u8>) {
        self.rig.offer(0, &[(INPUT, 0x8000, WRITE)]);
        let length = self.rig.await_used(0).length as usize;
        let bytes = self.rig.bytes(INPUT, length);
        let header = Header::parse(bytes.first_chunk().expect("a header"));
        assert_eq!((header.src_cid, header.dst_cid, header.kind), (HOST_CID, CID, STREAM));
        assert_eq!(header.len as usize, length - HEADER);
        (header, bytes[HEADER..].to_vec())
    }

    fn gets_op(&self, op: Op) -> Header {
        let (header, data) = self.gets();
        assert_eq!((header.op, data.len()), (Some(op), 0), "{header:?}");
        header
    }

    /// A stream that a client asked for.
    fn connected(&self) -> (UnixStream, Ends) {
        let mut client = self.client("CONNECT 1234\n");
        let request = self.gets_op(Op::Request);
        assert_eq!(request.dst_port, 1234);
        let ends = (request.src_port, 1234);
        self.sends(Op::Response, ends, 0, 0, b"");
        assert_eq!(line(&mut client), format!("OK {}", ends.0));
        (client, ends)
    }
}

fn line(client: &mut UnixStream) -> String {
    let mut text = String::new();
    let mut byte = [0];
    while client.read_exact(&mut byte).is_ok() && byte != *b"\n" {
        text.push(byte[0] as char);
    }
    text
}

#[test]
fn a_client_reaches_a_port_of_the_guest() {
    let bench = Bench::new();
    let (mut client, ends) = bench.connected();
    client.write_all(b"question").expect("sent");
    let (header, data) = bench.gets();
    assert_eq!((header.op, &data[..]), (Some(Op::Data), &b"question"[..]));
    bench.sends(Op::Data, ends, 0, 8, b"answer");
    let mut answer = [0; 6];
    client.read_exact(&mut answer).expect("read");
    assert_eq!(&answer, b"answer");
    // An orderly end: the client sends no more, the guest neither.
    client.shutdown(Shutdown::Write).expect("shut down");
    assert_eq!(bench.gets_op(Op::Shutdown).flags, SHUTDOWN_SEND);
    bench.sends(Op::Data, ends, 0, 8, b"last");
    bench.sends(Op::Shutdown, ends, SHUTDOWN_SEND | SHUTDOWN_RECEIVE, 8, b"");
    assert_eq!(bench.gets_op(Op::Reset).dst_port, 1234);
    let mut rest = Vec::new();
    client.read_to_end(&mut rest).expect("read");
    assert_eq!(rest, b"last");
    let counters = bench.counters();
    assert_eq!((counters.connections, counters.resets), (1, 0));
    assert_eq!((counters.input_bytes, counters.output_bytes), (8, 10));
}

#[test]
fn the_guest_reaches_whoever_waits_for_it() {
    let bench = Bench::new();
    bench.sends(Op::Request, (99, 5000), 0, 0, b"");
    assert_eq!(bench.gets_op(Op::Reset).dst_port, 5000, "nobody waits");
    let gone = bench.client("LISTEN 99\n");
    drop(gone);
    let mut client = bench.client("LISTEN 99\n");
    // Who waits is not told when it does.
    let mut port = 5001;
    eventually("taken", || {
        bench.sends(Op::Request, (99, port), 0, 0, b"");
        port += 1;
        bench.gets().0.op == Some(Op::Response)
    });
    assert_eq!(line(&mut client), format!("OK {}", port - 1));
    bench.sends(Op::Request, (99, 6000), 0, 0, b"");
    assert_eq!(bench.gets_op(Op::Reset).dst_port, 6000, "one connection for each that waits");
}

#[test]
fn nobody_sends_more_than_the_other_end_takes() {
    let bench = Bench::new();
    let (mut client, ends) = bench.connected();
    client.write_all(&[7; 10_000]).expect("sent");
    let (header, data) = bench.gets();
    assert_eq!((header.op, data.len()), (Some(Op::Data), 4096), "as much as the guest's buffer takes");
    bench.rig.offer(0, &[(INPUT, 0x8000, WRITE)]);
    std::thread::sleep(Duration::from_millis(30));
    assert_eq!(bench.rig.used(0), None);
    bench.sends(Op::CreditUpdate, ends, 0, 4096, b"");
    assert_eq!(bench.rig.await_used(0).length as usize, HEADER + 4096);

    // What the client does not take stays here, up to a limit; the guest hears of room when it is taken.
    let piece = vec![9; 0x4000];
    let mut sent = 0;
    while sent < 64 * piece.len() {
        bench.sends(Op::Data, ends, 0, 4096, &piece);
        sent += piece.len();
        if bench.counters().resets > 0 {
            break;
        }
    }
    assert_eq!(bench.counters().resets, 1, "more than there is room for breaks the stream");
    loop {
        let header = bench.gets().0;
        match header.op {
            Some(Op::CreditUpdate) => assert!(header.fwd_cnt > 0),
            other => break assert_eq!(other, Some(Op::Reset)),
        }
    }
}

#[test]
fn clients_that_talk_nonsense_are_sent_away() {
    let bench = Bench::new();
    for greeting in ["HELLO\n", "CONNECT\n", "CONNECT x\n", &"x".repeat(40)] {
        let mut client = bench.client(greeting);
        let mut rest = Vec::new();
        // Closed with bytes unread it may also be a reset.
        let _ = client.read_to_end(&mut rest);
        assert!(rest.is_empty(), "{greeting}");
    }
    let mut client = bench.client("CONN");
    std::thread::sleep(Duration::from_millis(20));
    client.write_all(b"ECT 7\nearly").expect("sent");
    let request = bench.gets_op(Op::Request);
    let ends = (request.src_port, 7);
    bench.sends(Op::Reset, ends, 0, 0, b"");
    assert_eq!(line(&mut client), "", "the guest refused");
    assert_eq!(bench.counters().resets, 1);
}

#[test]
fn packets_that_fit_no_stream_are_answered_with_a_reset() {
    let bench = Bench::new();
    bench.sends(Op::Data, (1, 2), 0, 0, b"x");
    assert_eq!(bench.gets_op(Op::Reset).dst_port, 2);
    let (_client, ends) = bench.connected();
    bench.sends(Op::Response, ends, 0, 0, b"");
    assert_eq!(bench.gets_op(Op::Reset).src_port, ends.0, "twice");
    bench.sends(Op::Reset, (1, 2), 0, 0, b"");
    bench.rig.offer(0, &[(INPUT, 0x8000, WRITE)]);
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(bench.rig.used(0), None, "no reset for a reset");
}

#[test]
fn a_driver_that_breaks_the_rules_breaks_its_own_sockets_only() {
    let bench = Bench::new();
    let long = Header { len: 100, ..Header::parse(&[0; HEADER]) };
    bench.rig.put_bytes(GUEST, &long.bytes());
    for (round, (queue, buffer)) in (1..).zip([
        (1, (GUEST, 43, 0)),
        (1, (GUEST, 50, 0)),
        (1, (GUEST, 60, WRITE)),
        (0, (GUEST, 44, WRITE)),
        (0, (GUEST, 100, 0)),
    ]) {
        bench.rig.offer(queue, &[buffer]);
        eventually("needs a reset", || bench.rig.status() == 15 | 64);
        assert_eq!(bench.counters().breaks, round);
        bench.rig.reset();
        bench.rig.bring_up(0);
    }
    bench.connected();
}
