//! The console with a mock driver and somebody at the other end.

use crate::machine::ConsoleBackend;
use crate::machine::console::{ConsoleDevice, Line};
use crate::machine::sync::lock;
use crate::machine::virtio::mock::WRITE;
use crate::machine::virtio::rig::{Rig, eventually};
use std::io::{self, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::{Arc, Mutex};

const GUEST: u64 = Rig::FREE;

fn rig(line: Line) -> (Arc<ConsoleDevice>, Rig) {
    let device = Arc::new(ConsoleDevice::new(line).expect("eventfd"));
    let rig = Rig::new(device.clone(), |crew| device.hire(crew));
    rig.bring_up(0);
    (device, rig)
}

fn listening(path: &std::path::Path) -> Line {
    let listener = UnixListener::bind(path).expect("bound");
    listener.set_nonblocking(true).expect("set");
    Line::socket(listener)
}

fn says(rig: &Rig, text: &[u8]) {
    rig.put_bytes(GUEST, text);
    rig.offer(1, &[(GUEST, text.len() as u32, 0)]);
}

#[derive(Clone, Default)]
struct Screen(Arc<Mutex<Vec<u8>>>);

impl Write for Screen {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        lock(&self.0).extend(bytes);
        Ok(bytes.len())
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn a_console_takes_the_serial_ports_place() {
    let (input, mut keyboard) = io::pipe().expect("a pipe");
    let screen = Screen::default();
    let backend = ConsoleBackend { input: Some(input.into()), output: Box::new(screen.clone()) };
    let (device, rig) = rig(Line::Backend(backend));
    let text: Vec<u8> = (0..10_000_u32).map(|i| i as u8).collect();
    says(&rig, &text);
    assert_eq!(rig.await_used(1).length, 0);
    assert!(*lock(&screen.0) == text);

    keyboard.write_all(b"typed early").expect("typing");
    let at = GUEST + 0x1_0000;
    rig.offer(0, &[(at, 5, WRITE)]);
    assert_eq!((rig.await_used(0).length, rig.bytes(at, 5)), (5, b"typed".to_vec()));
    rig.offer(0, &[(at, 64, WRITE)]);
    assert_eq!((rig.await_used(0).length, rig.bytes(at, 6)), (6, b" early".to_vec()));
    rig.offer(0, &[(at, 64, WRITE)]);
    rig.worker.pause();
    keyboard.write_all(b"x").expect("typing");
    std::thread::sleep(std::time::Duration::from_millis(30));
    assert_eq!(rig.used(0), None, "nobody types into a paused machine");
    rig.worker.resume();
    assert_eq!(rig.await_used(0).length, 1);
    drop(keyboard);
    says(&rig, b"still there");
    rig.await_used(1);
    let counters = device.counters();
    assert_eq!((counters.output_bytes, counters.input_bytes, counters.lost_bytes), (10_011, 12, 0));
}

#[test]
fn clients_of_a_socket_come_and_go() {
    let folder = tempfile::tempdir().expect("folder");
    let path = folder.path().join("console");
    let (device, rig) = rig(listening(&path));
    says(&rig, b"nobody hears");
    rig.await_used(1);
    assert_eq!(device.counters().lost_bytes, 12);
    for round in 0..3 {
        let mut client = UnixStream::connect(&path).expect("connected");
        rig.offer(0, &[(GUEST + 0x1000, 64, WRITE)]);
        client.write_all(b"hello").expect("typed");
        assert_eq!(rig.await_used(0).length, 5, "{round}");
        let mut second = UnixStream::connect(&path).expect("connected");
        assert_eq!(second.read(&mut [0]).expect("closed"), 0, "one client at a time");
        says(&rig, b"answer");
        let mut answer = [0; 6];
        client.read_exact(&mut answer).expect("read");
        assert_eq!(&answer, b"answer");
        rig.await_used(1);
    }
}

/// A client that reads nothing, and 1 MiB that the guest says: some of it is with the client, the rest waits.
fn stuck() -> (Arc<ConsoleDevice>, Rig, UnixStream, Vec<u8>) {
    let folder = tempfile::tempdir().expect("folder");
    let path = folder.path().join("console");
    let (device, rig) = rig(listening(&path));
    let client = UnixStream::connect(&path).expect("connected");
    let text: Vec<u8> = (0..0x10_0000_u32).map(|i| (i % 251) as u8).collect();
    says(&rig, &text);
    eventually("stuck", || device.counters().output_bytes > 0);
    (device, rig, client, text)
}

#[test]
fn a_client_that_does_not_read_holds_the_guest_up_and_loses_nothing() {
    let (device, rig, mut client, text) = stuck();
    assert_eq!(rig.used(1), None);
    let mut got = vec![0; text.len()];
    client.read_exact(&mut got).expect("read");
    assert!(got == text);
    rig.await_used(1);
    assert_eq!(device.counters().lost_bytes, 0);
}

#[test]
fn what_was_said_before_the_end_arrives() {
    let (device, rig, mut client, text) = stuck();
    says(&rig, b"last words");
    let reader = std::thread::spawn(move || {
        std::thread::sleep(std::time::Duration::from_millis(100));
        let mut got = vec![];
        client.read_to_end(&mut got).expect("read");
        got
    });
    rig.worker.stop();
    drop((rig, device));
    let got = reader.join().expect("it read");
    assert!(got.starts_with(&text) && got.ends_with(b"last words"), "{} bytes of {}", got.len(), text.len() + 10);
}

#[test]
fn a_client_that_never_reads_does_not_hold_up_the_end() {
    let (_device, rig, client, _) = stuck();
    let begun = std::time::Instant::now();
    rig.worker.stop();
    assert!(begun.elapsed() < std::time::Duration::from_secs(20), "{:?}", begun.elapsed());
    drop(client);
}

#[test]
fn a_driver_that_breaks_the_rules_breaks_its_own_console_only() {
    let backend = ConsoleBackend { input: None, output: Box::new(io::sink()) };
    let (device, rig) = rig(Line::Backend(backend));
    for (round, (queue, flags)) in (1..).zip([(1, WRITE)]) {
        rig.offer(queue, &[(GUEST, 10, flags)]);
        eventually("needs a reset", || rig.status() == 15 | 64);
        assert_eq!(device.counters().breaks, round);
        rig.reset();
        rig.bring_up(0);
    }
    says(&rig, b"again");
    rig.await_used(1);
}
