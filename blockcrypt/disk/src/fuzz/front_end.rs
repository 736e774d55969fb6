//! A front end that says what it likes to a vhost-user server: messages, descriptors, memory.

use super::Checked;
use crate::vhost_user::{Device, serve};
use crate::{Disk, Socket};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use std::fs::File;
use std::io::{self, IoSlice, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

/// Bytes of memory that the front end has to share.
const MEMORY: usize = 64 << 10;
/// Steps that one front end takes, at most.
const STEPS: usize = 64;
/// Descriptors that go with one message, at most.
const DESCRIPTORS: usize = 40;
/// Far beyond what anything takes.
const LIMIT: Duration = Duration::from_secs(60);

/// A front end of the real server, step by step; then one that makes sense, which must be served; then the server is asked to end, and
/// must. Gives what the front end's memory holds then, and how many interrupts it waited for.
///
/// ```text
/// step      kind u8 │ length u16 LE │ body
/// 0         bytes as they are
/// 1         a message: request u8 │ flags u8 │ which descriptors u8 │ how many u8 │ payload
///           with flag 0x80 the payload's last four bytes are the size that the header claims
/// 2         into the memory: offset u16 LE │ bytes
/// 3         a kick
/// 4         waits for an interrupt, and something that is used, not for long
/// ```
pub fn fuzz_vhost_user(data: &[u8]) -> (Vec<u8>, u64) {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    let path = std::env::temp_dir().join(format!("fealty-fuzz-{}-{number}", std::process::id()));
    let socket = Socket::listen(&path).expect("a socket");
    let (until, end) = io::pipe().expect("a pipe");
    let disk = Arc::new(Checked::default());
    let server = {
        let disk: Arc<dyn Disk> = disk.clone();
        let device = Device { queues: 2, serial: "fuzz".to_owned() };
        thread::spawn(move || serve(&disk, &device, &socket, &[until.as_fd()], &|_: &str| {}))
    };
    // What it gave away and kept the other end of stays open until the server has ended.
    let mut front_end = FrontEnd::connect(&path);
    let told = front_end.run(data);
    make_sense(&path);
    drop(end);
    let begun = Instant::now();
    while !server.is_finished() {
        assert!(begun.elapsed() < LIMIT, "the server does not end");
        thread::sleep(Duration::from_micros(200));
    }
    server.join().expect("no panic").expect("it served to the end");
    assert!(!disk.wronged.load(Ordering::Relaxed), "the disk was asked for what can't be");
    told
}

struct FrontEnd {
    stream: UnixStream,
    memory: File,
    kick: OwnedFd,
    call: OwnedFd,
    kept: Vec<OwnedFd>,
    interrupts: u64,
}

impl FrontEnd {
    fn connect(path: &PathBuf) -> Self {
        let stream = UnixStream::connect(path).expect("connects");
        let event = || eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC).expect("an eventfd");
        Self { stream, memory: memory(MEMORY as u64), kick: event(), call: event(), kept: Vec::new(), interrupts: 0 }
    }

    fn run(&mut self, mut data: &[u8]) -> (Vec<u8>, u64) {
        for _ in 0..STEPS {
            let Some(([kind, low, high], rest)) = data.split_first_chunk() else { break };
            let (body, rest) = rest.split_at(usize::from(u16::from_le_bytes([*low, *high])).min(rest.len()));
            data = rest;
            if !self.step(*kind, body) {
                break;
            }
        }
        // Its side of the connection is over: so must the other be, whatever it was told.
        let _ = self.stream.shutdown(std::net::Shutdown::Write);
        self.stream.set_nonblocking(false).expect("set");
        self.stream.set_read_timeout(Some(LIMIT)).expect("set");
        if let Err(error) = self.stream.read_to_end(&mut Vec::new()) {
            assert!(error.kind() != io::ErrorKind::WouldBlock, "the server does not hang up");
        }
        let mut held = vec![0; MEMORY];
        self.memory.read_exact_at(&mut held, 0).expect("its own memory");
        (held, self.interrupts)
    }

    /// False once nobody listens.
    fn step(&mut self, kind: u8, body: &[u8]) -> bool {
        match kind {
            0 => return self.send(body, &[]),
            1 => return self.message(body),
            2 => {
                if let Some(([low, high], bytes)) = body.split_first_chunk() {
                    let at = usize::from(u16::from_le_bytes([*low, *high]));
                    let bytes = &bytes[..bytes.len().min(MEMORY - at)];
                    self.memory.write_all_at(bytes, at as u64).expect("its own memory");
                }
            }
            3 => drop(rustix::io::write(&self.kick, &1_u64.to_ne_bytes())),
            _ => self.wait(),
        }
        true
    }

    /// Not every interrupt means that something was done.
    fn wait(&mut self) {
        let begun = Instant::now();
        while self.interrupts == 0 || !self.used() {
            let Some(left) = Duration::from_millis(20).checked_sub(begun.elapsed()) else { return };
            let limit = Timespec { tv_sec: 0, tv_nsec: left.as_nanos() as i64 };
            let _ = poll(&mut [PollFd::new(&self.call, PollFlags::IN)], Some(&limit));
            let mut count = [0; 8];
            if rustix::io::read(&self.call, &mut count).is_ok() {
                self.interrupts += u64::from_ne_bytes(count);
            }
        }
    }

    /// Whether anything is used, in a ring where the corpus has it.
    fn used(&self) -> bool {
        let mut index = [0; 2];
        self.memory.read_exact_at(&mut index, 0x302).expect("its own memory");
        index != [0; 2]
    }

    fn message(&mut self, body: &[u8]) -> bool {
        let Some(([request, flags, which, count], mut payload)) = body.split_first_chunk() else { return true };
        let mut size = payload.len() as u32;
        if flags & 0x80 != 0
            && let Some((rest, claimed)) = payload.split_last_chunk()
        {
            (payload, size) = (rest, u32::from_le_bytes(*claimed));
        }
        let header = [u32::from(*request), u32::from(flags & 0x7f), size].map(u32::to_le_bytes);
        let (own, kept) = descriptor(*which);
        self.kept.extend(kept);
        let fd = match which {
            0 => self.memory.as_fd(),
            1 => self.kick.as_fd(),
            2 => self.call.as_fd(),
            _ => own.as_fd(),
        };
        let fds = vec![fd; usize::from(*count).min(DESCRIPTORS)];
        self.send(&[header.as_flattened(), payload].concat(), &fds)
    }

    fn send(&self, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> bool {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS))];
        let mut with = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() {
            with.push(SendAncillaryMessage::ScmRights(fds));
        }
        let sent = sendmsg(&self.stream, &[IoSlice::new(bytes)], &mut with, SendFlags::NOSIGNAL);
        // Answers are not waited for, and must not fill the socket.
        self.stream.set_nonblocking(true).expect("set");
        while (&self.stream).read(&mut [0; 4096]).is_ok_and(|count| count > 0) {}
        self.stream.set_nonblocking(false).expect("set");
        sent.is_ok()
    }
}

fn memory(bytes: u64) -> File {
    let file = memfd_create("fuzz", MemfdFlags::CLOEXEC).expect("memory");
    ftruncate(&file, bytes).expect("room");
    File::from(file)
}

/// Something that has no business in a message, or only seems to; and its other end.
fn descriptor(which: u8) -> (OwnedFd, Option<OwnedFd>) {
    let alone = match which % 10 {
        3 => memory(0).into(),
        4 => memory(1 << 40).into(),
        5 => File::open("/dev/null").expect("opens").into(),
        6 => io::pipe().expect("a pipe").1.into(),
        7 => eventfd(7, EventfdFlags::CLOEXEC).expect("an eventfd"),
        // To write to it is to wait until somebody reads it, and nobody does.
        8 => {
            let full = eventfd(0, EventfdFlags::CLOEXEC).expect("an eventfd");
            rustix::io::write(&full, &(u64::MAX - 1).to_ne_bytes()).expect("room");
            full
        }
        // It can be read, but who wants eight bytes waits for more.
        9 => {
            let (reader, mut writer) = io::pipe().expect("a pipe");
            writer.write_all(&[0]).expect("room");
            return (reader.into(), Some(writer.into()));
        }
        _ => File::open("/proc/self/maps").expect("opens").into(),
    };
    (alone, None)
}

/// Whoever comes next is served.
fn make_sense(path: &Path) {
    let mut stream = UnixStream::connect(path).expect("connects");
    stream.set_read_timeout(Some(LIMIT)).expect("set");
    // GET_FEATURES, version 1, no payload.
    stream.write_all([1_u32, 1, 0].map(u32::to_le_bytes).as_flattened()).expect("sent");
    let mut answer = [0; 20];
    stream.read_exact(&mut answer).expect("the next front end is served");
    assert!(answer[15] & 0x40 != 0, "the answer to GET_FEATURES names the protocol's features: {answer:?}");
}
