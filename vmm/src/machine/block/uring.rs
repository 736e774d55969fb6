//! An io_uring that can do nothing but serve one disk.
//!
//! Submissions do not pass seccomp, so the ring itself is confined, before the sandbox closes: it knows two files, the disk and
//! the doorbell, by their places, and no others; and six operations. The kernel holds it to that for good
//! (IORING_REGISTER_RESTRICTIONS). It is enabled by the thread that serves it, the only one that may submit.
#![allow(unsafe_code)]

use crate::machine::memory::GuestRam;
use crate::machine::virtio::{Segment, pieces};
use io_uring::register::Restriction;
use io_uring::types::{Fixed, FsyncFlags, SubmitArgs, Timespec};
use io_uring::{Builder, IoUring, opcode, squeue};
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Duration;
use vm_memory::GuestMemoryBackend;
use vmm_sys_util::eventfd::EventFd;

const DISK: Fixed = Fixed(0);
const DOORBELL: Fixed = Fixed(1);
/// The doorbell's completions; others carry their slot.
const DOORBELL_DATA: u64 = u64::MAX;
/// The most that one operation moves, so that its result fits.
const LENGTH_MAX: u64 = 1 << 30;
/// Where doorbells are read to: by all rings, and nobody looks.
static RUNG: AtomicU64 = AtomicU64::new(0);

/// The ring of one queue of one disk.
pub struct DiskRing {
    ring: IoUring,
    slots: Vec<Slot>,
    armed: bool,
    in_hand: usize,
}

/// What the kernel refers to while an operation is under way.
#[derive(Default)]
struct Slot {
    vectors: Vec<libc::iovec>,
    memory: Option<Arc<GuestRam>>,
}

// SAFETY: the pointers in `vectors` are addresses for the kernel, into guest memory, which may be used by any
// thread; this program never reads through them.
unsafe impl Send for DiskRing {}

/// What was done in a slot: bytes, or the error.
pub(super) struct Completion {
    pub(super) slot: usize,
    pub(super) result: Result<u64, i32>,
}

impl DiskRing {
    /// A ring for `depth` operations at once on `file`, not enabled yet, and the event that wakes its thread.
    pub fn open(file: &File, depth: u16) -> io::Result<(Self, EventFd)> {
        let entries = u32::from(depth) + 1;
        let doorbell = EventFd::new(libc::EFD_CLOEXEC)?;
        let fast = |builder: &mut Builder| {
            builder.setup_single_issuer().setup_defer_taskrun();
        };
        // Older kernels know no tasks of their own thread; they do without.
        let ring = match build(entries, fast) {
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => build(entries, |_| ())?,
            other => other?,
        };
        let known = ring.params();
        if !(known.is_feature_nodrop() && known.is_feature_submit_stable() && known.is_feature_ext_arg()) {
            return Err(io::ErrorKind::Unsupported.into());
        }
        let submitter = ring.submitter();
        submitter.register_files(&[file.as_raw_fd(), doorbell.as_raw_fd()])?;
        submitter.register_restrictions(&mut restrictions())?;
        let slots = (0..depth).map(|_| Slot::default()).collect();
        Ok((Self { ring, slots, armed: false, in_hand: 0 }, doorbell))
    }

    /// Opens the ring for submissions of this thread.
    pub(super) fn enable(&self) -> io::Result<()> {
        self.ring.submitter().register_enable_rings()
    }

    /// Operations under way.
    pub(super) fn in_hand(&self) -> usize {
        self.in_hand
    }

    /// Slots: operations that can be under way at once.
    pub(super) fn depth(&self) -> usize {
        self.slots.len()
    }

    /// Begins to read from the disk's `offset` into bytes `from` to `to` of `segments`. False where these are none of RAM.
    #[must_use]
    pub(super) fn read(
        &mut self,
        slot: usize,
        offset: u64,
        memory: &Arc<GuestRam>,
        segments: &[Segment],
        span: std::ops::Range<u64>,
    ) -> bool {
        self.fill(slot, memory, segments, span) && {
            let vectors = &self.slots[slot].vectors;
            let entry = opcode::Readv::new(DISK, vectors.as_ptr(), vectors.len() as u32).offset(offset).build();
            self.push(slot, entry)
        }
    }

    /// Begins to write bytes `from` to `to` of `segments` at the disk's `offset`. False where these are none of RAM.
    #[must_use]
    pub(super) fn write(
        &mut self,
        slot: usize,
        offset: u64,
        memory: &Arc<GuestRam>,
        segments: &[Segment],
        span: std::ops::Range<u64>,
    ) -> bool {
        self.fill(slot, memory, segments, span) && self.push_write(slot, offset)
    }

    /// Begins to make durable all that was completed before.
    #[must_use]
    pub(super) fn sync(&mut self, slot: usize) -> bool {
        let entry = opcode::Fsync::new(DISK).flags(FsyncFlags::DATASYNC).build();
        self.push(slot, entry)
    }

    /// Begins fallocate(2) with `mode`.
    #[must_use]
    pub(super) fn allocate(&mut self, slot: usize, mode: i32, offset: u64, length: u64) -> bool {
        let entry = opcode::Fallocate::new(DISK, length).offset(offset).mode(mode).build();
        self.push(slot, entry)
    }

    /// Submits what was begun, and sleeps until something is completed, the doorbell rings, or `limit` is over. It may also
    /// return early.
    pub(super) fn wait(&mut self, limit: Option<Duration>) -> io::Result<()> {
        if !self.armed {
            let place: *mut u8 = RUNG.as_ptr().cast();
            let entry = opcode::Read::new(DOORBELL, place, 8).build().user_data(DOORBELL_DATA);
            // SAFETY: the kernel writes 8 bytes into a static of 8 bytes that is made to be written through a shared reference.
            self.armed = unsafe { self.submit(&entry) };
        }
        let answer = match limit {
            None => self.ring.submit_and_wait(1),
            Some(limit) => {
                let limit = Timespec::new().sec(limit.as_secs()).nsec(limit.subsec_nanos());
                self.ring.submitter().submit_with_args(1, &SubmitArgs::new().timespec(&limit))
            }
        };
        match answer.map_err(|error| (error.raw_os_error(), error)) {
            Ok(_) | Err((Some(libc::ETIME | libc::EINTR | libc::EAGAIN | libc::EBUSY), _)) => Ok(()),
            Err((_, error)) => Err(error),
        }
    }

    /// Something that was completed.
    pub(super) fn completed(&mut self) -> Option<Completion> {
        loop {
            let entry = self.ring.completion().next()?;
            if entry.user_data() == DOORBELL_DATA {
                self.armed = false;
                continue;
            }
            let slot = usize::try_from(entry.user_data()).ok().filter(|slot| *slot < self.slots.len())?;
            self.in_hand -= 1;
            self.slots[slot].memory = None;
            let result = u64::try_from(entry.result()).map_err(|_| -entry.result());
            return Some(Completion { slot, result });
        }
    }

    /// Fills a slot's vectors with where the bytes `span` of `segments` lie in this process.
    fn fill(&mut self, slot: usize, memory: &Arc<GuestRam>, segments: &[Segment], span: std::ops::Range<u64>) -> bool {
        let Some(place) = self.slots.get_mut(slot) else { return false };
        let count = span.end.saturating_sub(span.start).min(LENGTH_MAX) as usize;
        place.vectors.clear();
        for (address, _, length) in pieces(segments, span.start, count) {
            let Ok(slice) = memory.get_slice(address, length) else { return false };
            place.vectors.push(libc::iovec { iov_base: slice.ptr_guard_mut().as_ptr().cast(), iov_len: length });
        }
        place.memory = Some(memory.clone());
        true
    }

    fn push_write(&mut self, slot: usize, offset: u64) -> bool {
        let vectors = &self.slots[slot].vectors;
        let entry = opcode::Writev::new(DISK, vectors.as_ptr(), vectors.len() as u32).offset(offset).build();
        self.push(slot, entry)
    }

    fn push(&mut self, slot: usize, entry: squeue::Entry) -> bool {
        let entry = entry.user_data(slot as u64);
        // SAFETY: the entry refers to nothing but the slot's vectors, which are not touched before the slot is completed (the caller
        // uses a slot for one operation at a time, and the kernel takes its copy when they are submitted); these lie in guest
        // memory that the slot holds on to.
        let pushed = unsafe { self.submit(&entry) };
        self.in_hand += usize::from(pushed);
        pushed
    }

    /// # Safety
    /// What the entry points to must be valid until its completion.
    unsafe fn submit(&mut self, entry: &squeue::Entry) -> bool {
        // SAFETY: by the caller's word. There is room: each slot and the doorbell have one entry at most.
        unsafe { self.ring.submission().push(entry) }.is_ok()
    }
}

impl Drop for DiskRing {
    fn drop(&mut self) {
        // Only a thread that panicked leaves operations under way: then the memory they refer to must stay.
        if self.in_hand > 0 {
            self.slots.iter_mut().for_each(|slot| std::mem::forget(std::mem::take(slot)));
        }
    }
}

fn build(entries: u32, more: impl FnOnce(&mut Builder)) -> io::Result<IoUring> {
    let mut builder = IoUring::builder();
    builder.dontfork().setup_r_disabled();
    more(&mut builder);
    builder.build(entries)
}

fn restrictions() -> [Restriction; 8] {
    let fixed = squeue::Flags::FIXED_FILE.bits();
    [
        Restriction::sqe_op(opcode::Readv::CODE),
        Restriction::sqe_op(opcode::Writev::CODE),
        Restriction::sqe_op(opcode::Fsync::CODE),
        Restriction::sqe_op(opcode::Fallocate::CODE),
        // For the doorbell.
        Restriction::sqe_op(opcode::Read::CODE),
        Restriction::sqe_flags_allowed(fixed),
        Restriction::sqe_flags_required(fixed),
        // Not needed, but a list without any leaves all of them open.
        Restriction::register_op(REGISTER_ENABLE_RINGS),
    ]
}

/// IORING_REGISTER_ENABLE_RINGS.
const REGISTER_ENABLE_RINGS: u8 = 12;
