//! What requests of a guest can't do without: two threads that wake each other as ioeventfd and irqfd do, and the requests
//! themselves by io_uring. No guest, no exits, no rings to take apart, nothing that is checked.

use super::queue::Effort;
use io_uring::types::{Fd, Fixed};
use io_uring::{IoUring, opcode};
use rustix::event::{EventfdFlags, eventfd};
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Instant;

const BLOCK: usize = 4096;
const DOORBELL: u64 = u64::MAX;

/// The two threads' shared words, and the file.
pub(super) struct Floor {
    file: File,
    blocks: u64,
    write: bool,
    depth: u16,
    doorbell: OwnedFd,
    interrupt: OwnedFd,
}

/// What a ring's indices say: how far each side is, and whether it wants to be woken.
#[derive(Default)]
struct Indices {
    begun: AtomicU64,
    done: AtomicU64,
    device_sleeps: AtomicBool,
    driver_sleeps: AtomicBool,
}

impl Floor {
    pub(super) fn new(path: &Path, write: bool, depth: u16) -> io::Result<Self> {
        let file = File::options().read(true).write(write).open(path)?;
        let blocks = file.metadata()?.len() / BLOCK as u64;
        let event = || eventfd(0, EventfdFlags::CLOEXEC).map_err(io::Error::from);
        Ok(Self { file, blocks, write, depth, doorbell: event()?, interrupt: event()? })
    }

    /// `count` requests.
    pub(super) fn run(&mut self, count: u64) -> io::Result<Effort> {
        let indices = Indices::default();
        let before = cpu_seconds();
        let began = Instant::now();
        std::thread::scope(|scope| {
            let device = scope.spawn(|| self.device(&indices, count));
            self.driver(&indices, count)?;
            device.join().unwrap_or_else(|_| Err(io::ErrorKind::Other.into()))
        })?;
        Ok(Effort { requests: count, seconds: began.elapsed().as_secs_f64(), cpu_seconds: cpu_seconds() - before })
    }

    /// The guest's part: begins as many as were done, and sleeps.
    fn driver(&self, indices: &Indices, count: u64) -> io::Result<()> {
        let (mut begun, mut word) = (0, [0; 8]);
        loop {
            let done = indices.done.load(Ordering::SeqCst);
            if done == count {
                return Ok(());
            }
            let more = (done + u64::from(self.depth)).min(count);
            if more > begun {
                begun = more;
                indices.begun.store(begun, Ordering::SeqCst);
                if indices.device_sleeps.swap(false, Ordering::SeqCst) {
                    rustix::io::write(&self.doorbell, &1_u64.to_ne_bytes())?;
                }
            }
            indices.driver_sleeps.store(true, Ordering::SeqCst);
            if indices.done.load(Ordering::SeqCst) == done {
                rustix::io::read(&self.interrupt, &mut word)?;
            }
        }
    }

    /// The device's part.
    #[allow(unsafe_code)]
    fn device(&self, indices: &Indices, count: u64) -> io::Result<()> {
        let mut builder = IoUring::<io_uring::squeue::Entry>::builder();
        builder.setup_single_issuer().setup_defer_taskrun();
        let mut ring = builder.build(u32::from(self.depth) + 1)?;
        ring.submitter().register_files(&[self.file.as_raw_fd()])?;
        // Never freed, so that an error may leave requests under way.
        let buffers = vec![[0x5a_u8; BLOCK]; usize::from(self.depth)].leak();
        let word = Box::leak(Box::new([0_u8; 8]));
        let mut free: Vec<usize> = (0..buffers.len()).collect();
        let (mut armed, mut begun, mut done, mut random) = (false, 0, 0, 0x9e37_79b9_7f4a_7c15_u64);
        while done < count {
            loop {
                let wanted = indices.begun.load(Ordering::SeqCst);
                while begun < wanted {
                    let Some(slot) = free.pop() else { return Err(io::ErrorKind::Other.into()) };
                    random ^= random << 13;
                    random ^= random >> 7;
                    random ^= random << 17;
                    let (at, offset) = (buffers[slot].as_mut_ptr(), random % self.blocks * BLOCK as u64);
                    let entry = match self.write {
                        true => opcode::Write::new(Fixed(0), at, BLOCK as u32).offset(offset).build(),
                        false => opcode::Read::new(Fixed(0), at, BLOCK as u32).offset(offset).build(),
                    };
                    // SAFETY: the slot's buffer is this request's alone until it is done, and is never freed. There is room for each slot
                    // and the doorbell.
                    let _ = unsafe { ring.submission().push(&entry.user_data(slot as u64)) };
                    begun += 1;
                }
                indices.device_sleeps.store(true, Ordering::SeqCst);
                if indices.begun.load(Ordering::SeqCst) == begun {
                    break;
                }
            }
            if !armed {
                let doorbell = Fd(self.doorbell.as_raw_fd());
                let entry = opcode::Read::new(doorbell, word.as_mut_ptr(), 8).build().user_data(DOORBELL);
                // SAFETY: the word is never freed, and nobody looks at it.
                let _ = unsafe { ring.submission().push(&entry) };
                armed = true;
            }
            ring.submit_and_wait(1)?;
            let before = done;
            while let Some(entry) = ring.completion().next() {
                match entry.user_data() {
                    DOORBELL => armed = false,
                    slot if entry.result() == BLOCK as i32 => {
                        free.push(slot as usize);
                        done += 1;
                    }
                    _ => return Err(io::Error::from_raw_os_error(-entry.result())),
                }
            }
            if done > before {
                indices.done.store(done, Ordering::SeqCst);
                if indices.driver_sleeps.swap(false, Ordering::SeqCst) {
                    rustix::io::write(&self.interrupt, &1_u64.to_ne_bytes())?;
                }
            }
        }
        if armed {
            rustix::io::write(&self.doorbell, &1_u64.to_ne_bytes())?;
            ring.submit_and_wait(1)?;
        }
        Ok(())
    }
}

/// Of this process, with the kernel's workers for it.
fn cpu_seconds() -> f64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    now.tv_sec as f64 + now.tv_nsec as f64 / 1e9
}
