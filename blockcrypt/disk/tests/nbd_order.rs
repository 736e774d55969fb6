//! The NBD server over a disk that does what the test tells it to: what waits for what, and what does not.

#[path = "disk_support/nbd.rs"]
#[allow(dead_code, reason = "each test uses a part")]
mod nbd;

use fealty_disk::{Disk, Fault, Socket};
use nbd::{Client, FLUSH, READ, TRIM, WRITE};
use std::io::Read;
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::{Condvar, Mutex};

const SIZE: usize = 8 << 20;

/// Bytes in memory. A FLUSH waits until it is let through.
struct Gated {
    bytes: Mutex<Vec<u8>>,
    /// FLUSHes that wait, and those that may go.
    gate: Mutex<(usize, usize)>,
    moved: Condvar,
}

impl Gated {
    fn new() -> Self {
        Self { bytes: Mutex::new(vec![0; SIZE]), gate: Mutex::default(), moved: Condvar::new() }
    }

    /// Returns when `count` FLUSHes wait.
    fn until_waiting(&self, count: usize) {
        drop(self.moved.wait_while(self.gate.lock().expect("whole"), |(waiting, _)| *waiting < count).expect("whole"));
    }

    fn let_through(&self, count: usize) {
        self.gate.lock().expect("whole").1 += count;
        self.moved.notify_all();
    }
}

impl Disk for Gated {
    fn size(&self) -> u64 {
        SIZE as u64
    }

    fn read_only(&self) -> bool {
        false
    }

    /// The last MiB can't be read.
    fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<(), Fault> {
        let (begin, end) = (offset as usize, offset as usize + buffer.len());
        if end > SIZE - (1 << 20) {
            buffer.fill(0xbb);
            return Err(Fault::Io);
        }
        buffer.copy_from_slice(&self.bytes.lock().expect("whole")[begin..end]);
        Ok(())
    }

    fn write(&self, offset: u64, data: &[u8]) -> Result<(), Fault> {
        self.bytes.lock().expect("whole")[offset as usize..offset as usize + data.len()].copy_from_slice(data);
        Ok(())
    }

    fn flush(&self) -> Result<(), Fault> {
        let mut gate = self.gate.lock().expect("whole");
        gate.0 += 1;
        self.moved.notify_all();
        let mut gate = self.moved.wait_while(gate, |(_, through)| *through == 0).expect("whole");
        gate.0 -= 1;
        gate.1 -= 1;
        Ok(())
    }

    fn discard(&self, _: u64, _: u64) -> Result<(), Fault> {
        Err(Fault::Full)
    }

    fn write_zeroes(&self, _: u64, _: u64, _: bool) -> Result<(), Fault> {
        Err(Fault::Gone)
    }
}

/// Lends a gated disk to a client for as long as `f` runs; all that it left in flight is let through.
fn with_server(f: impl FnOnce(&Gated, &Path)) {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("s");
    let (disk, socket) = (Gated::new(), Socket::listen(&path).expect("listens"));
    let (until, teller) = std::io::pipe().expect("a pipe");
    std::thread::scope(|scope| {
        let server = scope.spawn(|| fealty_disk::nbd::serve(&disk, "gated", socket, &[until.as_fd()]));
        f(&disk, &path);
        disk.let_through(1000);
        drop(teller);
        server.join().expect("no panic").expect("served");
    });
}

#[test]
fn a_flush_keeps_no_read_waiting() {
    with_server(|disk, path| {
        let mut client = Client::connect(path);
        let flushes: Vec<u64> = (0..3).map(|_| client.send(FLUSH, 0, 0, 0, &[]).expect("sent")).collect();
        disk.until_waiting(3);
        assert_eq!(client.send(READ, 0, 4096, 512, &[]).expect("sent"), 4);
        assert_eq!(client.reply().expect("the read's"), (0, 4));
        client.stream.read_exact(&mut [0; 512]).expect("data");
        disk.let_through(3);
        let mut after: Vec<_> = (0..3).map(|_| client.reply().expect("the flushes'")).collect();
        after.sort_unstable();
        assert!(after.into_iter().eq(flushes.into_iter().map(|cookie| (0, cookie))));
    });
}

#[test]
fn what_comes_before_a_flush_is_answered_before_it() {
    with_server(|disk, path| {
        let mut client = Client::connect(path);
        // One batch, if the server takes it as one.
        let first = client.send(WRITE, 0, 0, 512, &[1; 512]).expect("sent");
        client.send(FLUSH, 0, 0, 0, &[]).expect("sent");
        assert_eq!(client.reply().expect("the write's"), (0, first));
        disk.until_waiting(1);
    });
}

/// As many as a batch holds and more, sent at once: each is answered, and one that fails fails alone.
#[test]
fn requests_that_come_together_are_each_answered_as_if_alone() {
    with_server(|_, path| {
        let mut client = Client::connect(path);
        let bad = SIZE as u64 - 4096;
        for round in 0..20_u8 {
            let mut expected = std::collections::HashMap::new();
            for i in 0..50_u8 {
                let (offset, block) = (u64::from(i) * 4096, [round ^ i; 4096]);
                let (cookie, error, data) = match i % 5 {
                    0 => (client.send(READ, 0, bad, 4096, &[]), 5, None),
                    1 => (client.send(WRITE, 0, 100, 512, &block[..512]), 22, None),
                    2 => (client.send(READ, 0, offset - 4096 * 2, 512, &[]), 0, Some(512)),
                    _ => (client.send(WRITE, 0, offset, 4096, &block), 0, None),
                };
                expected.insert(cookie.expect("sent"), (error, data));
            }
            for _ in 0..50 {
                let (error, cookie) = client.reply().expect("a reply");
                let (wanted, data) = expected.remove(&cookie).expect("one that was asked for, once");
                assert_eq!(error, wanted);
                if let Some(length) = data {
                    let mut found = vec![1; length];
                    client.stream.read_exact(&mut found).expect("data");
                    assert!(found.iter().all(|b| *b == 0), "nobody writes there");
                }
            }
            for i in (0..50_u8).filter(|i| i % 5 > 2) {
                assert_eq!(client.read(u64::from(i) * 4096, 4096).expect("good"), [round ^ i; 4096]);
            }
        }
    });
}

#[test]
fn another_clients_flush_keeps_nobody_waiting() {
    with_server(|disk, path| {
        let (mut one, mut other) = (Client::connect(path), Client::connect(path));
        one.send(FLUSH, 0, 0, 0, &[]).expect("sent");
        disk.until_waiting(1);
        assert_eq!(other.write(512, &[7; 512]).expect("answered"), 0);
        assert_eq!(other.read(512, 512).expect("good"), [7; 512]);
    });
}

#[test]
fn every_failure_has_its_number_and_no_data() {
    with_server(|_, path| {
        let mut client = Client::connect(path);
        assert_eq!(client.read(SIZE as u64 - 4096, 4096), Err(5));
        // So long that it is read in pieces, of which the last fails.
        assert_eq!(client.read(2 << 20, 6 << 20), Err(5));
        assert_eq!(client.ask(TRIM, 0, 0, 4096, &[]).expect("answered"), 28);
        assert_eq!(client.ask(nbd::WRITE_ZEROES, 0, 0, 4096, &[]).expect("answered"), 108);
        assert_eq!(client.read(0, 5 << 20).expect("good").len(), 5 << 20);
        let long: Vec<u8> = (0..5 << 20).map(|i: u32| (i >> 9) as u8).collect();
        assert_eq!(client.write(1 << 20, &long).expect("answered"), 0);
        assert!(client.read(1 << 20, 5 << 20).expect("good") == long);
    });
}

#[test]
fn one_client_too_many_is_hung_up_on_and_room_comes_back() {
    with_server(|_, path| {
        let mut clients: Vec<Client> = (0..16).map(|_| Client::connect(path)).collect();
        let mut late = std::os::unix::net::UnixStream::connect(path).expect("connects");
        assert_eq!(late.read(&mut [0]).expect("the end"), 0);
        clients.pop();
        // It is gone when its end of the stream is; the server notices a moment later.
        let mut hello = [0; 18];
        let admitted = || std::os::unix::net::UnixStream::connect(path).and_then(|mut s| s.read_exact(&mut hello));
        assert!(std::iter::repeat_with(admitted).take(100_000).any(|r| r.is_ok()));
        assert_eq!(clients[0].read(0, 512).expect("good"), [0; 512]);
    });
}
