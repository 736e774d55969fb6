//! A queue's ring and its two descriptors, which the front end chose and has too.
#![allow(unsafe_code)]

use super::signal::Signal;
use rustix::io::{Errno, ReadWriteFlags, preadv2};
use std::fs::File;
use std::io::{self, IoSliceMut};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::{Arc, MutexGuard, OnceLock};
use vhost_user_backend::{VringMutex, VringState, VringStateGuard, VringStateMutGuard, VringT};
use virtio_queue::Error;
use vm_memory::{GuestMemoryAtomic, GuestMemoryMmap};

/// Guest memory, as the front end shares it.
pub(super) type Memory = GuestMemoryAtomic<GuestMemoryMmap>;

/// The crate's ring, whose own reads of a kick and writes of a call wait for whoever has the other ends, under its lock: the queue's
/// thread and the front end's would both wait for ever. This one never waits, whatever the descriptors are and whoever uses them meanwhile.
///
/// It also takes over from a back end that died: see [`Ring::set_queue_ready`] and [`Ring::set_call`].
#[derive(Clone)]
pub(super) struct Ring {
    ring: VringMutex,
    signal: Arc<OnceLock<Arc<Signal>>>,
}

impl Ring {
    /// Takes what its front end is told with; and tells it, the first time.
    ///
    /// # Errors
    /// See [`Signal::raise`].
    pub(super) fn tells_with(&self, signal: &Arc<Signal>) -> io::Result<()> {
        if self.signal.set(signal.clone()).is_ok() { self.tell() } else { Ok(()) }
    }

    /// Tells the front end that requests are done, if it wants to be told.
    ///
    /// # Errors
    /// See [`Signal::raise`].
    pub(super) fn tell(&self) -> io::Result<()> {
        let state = self.get_ref();
        let (Some(signal), Some(call)) = (self.signal.get(), state.get_call()) else { return Ok(()) };
        // SAFETY: the notifier owns the descriptor, and `state`'s lock keeps it.
        signal.raise(unsafe { BorrowedFd::borrow_raw(call.as_raw_fd()) })
    }
}

impl VringT<Memory> for Ring {
    fn new(memory: Memory, max_queue_size: u16) -> Result<Self, Error> {
        Ok(Self { ring: VringMutex::new(memory, max_queue_size)?, signal: Arc::default() })
    }

    /// Waits: see [`Ring::tell`].
    fn signal_used_queue(&self) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn read_kick(&self) -> io::Result<bool> {
        let state = self.get_ref();
        if let Some(kick) = state.get_kick() {
            // SAFETY: the consumer owns the descriptor, and `state`'s lock keeps it.
            let kick = unsafe { BorrowedFd::borrow_raw(kick.as_raw_fd()) };
            // At no offset: it is no file.
            match preadv2(kick, &mut [IoSliceMut::new(&mut [0; 8])], u64::MAX, ReadWriteFlags::NOWAIT) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                // Somebody else took it: the queue is looked at once more than needed.
                Ok(_) | Err(Errno::AGAIN) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(state.is_enabled())
    }

    fn get_ref(&self) -> MutexGuard<'_, VringState> {
        self.ring.get_ref()
    }

    fn get_mut(&self) -> MutexGuard<'_, VringState> {
        self.ring.get_mut()
    }

    fn add_used(&self, head: u16, written: u32) -> Result<(), Error> {
        self.ring.add_used(head, written)
    }

    fn enable_notification(&self) -> Result<bool, Error> {
        self.ring.enable_notification()
    }

    fn disable_notification(&self) -> Result<(), Error> {
        self.ring.disable_notification()
    }

    fn needs_notification(&self) -> Result<bool, Error> {
        self.ring.needs_notification()
    }

    fn set_enabled(&self, enabled: bool) {
        self.ring.set_enabled(enabled);
    }

    fn set_queue_info(&self, descriptors: u64, available: u64, used: u64) -> Result<(), Error> {
        self.ring.set_queue_info(descriptors, available, used)
    }

    fn queue_next_avail(&self) -> u16 {
        self.ring.queue_next_avail()
    }

    fn set_queue_next_avail(&self, base: u16) {
        self.ring.set_queue_next_avail(base);
    }

    fn set_queue_next_used(&self, index: u16) {
        self.ring.set_queue_next_used(index);
    }

    fn queue_used_idx(&self) -> Result<u16, Error> {
        self.ring.queue_used_idx()
    }

    fn set_queue_size(&self, size: u16) {
        self.ring.set_queue_size(size);
    }

    fn set_queue_event_idx(&self, enabled: bool) {
        self.ring.set_queue_event_idx(enabled);
    }

    /// A ring that starts begins behind what is used. Requests are done in order, so that where one was stopped is there too. Where its
    /// back end died, requests may be under way: QEMU then says the same, but Cloud Hypervisor that all that are available are done. Both
    /// say where a ring lies, and where it stands, before they start it.
    fn set_queue_ready(&self, ready: bool) {
        if ready && let Ok(used) = self.queue_used_idx() {
            self.set_queue_next_avail(used);
            self.set_queue_next_used(used);
        }
        self.ring.set_queue_ready(ready);
    }

    fn set_kick(&self, file: Option<File>) {
        self.ring.set_kick(file);
    }

    /// Tells the front end there at once, for once too often does no harm: it may not have heard of what is done, from a back end that died
    /// before it could say so, or because it listens here only now.
    fn set_call(&self, file: Option<File>) {
        self.ring.set_call(file);
        // A descriptor that nothing can be told to is complained of when something must be.
        let _ = self.tell();
    }

    fn set_err(&self, file: Option<File>) {
        self.ring.set_err(file);
    }
}

impl<'a> VringStateGuard<'a, Memory> for Ring {
    type G = MutexGuard<'a, VringState>;
}

impl<'a> VringStateMutGuard<'a, Memory> for Ring {
    type G = MutexGuard<'a, VringState>;
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::event::{EventfdFlags, eventfd};

    #[test]
    fn whoever_listens_is_told_at_once() {
        let ring = Ring::new(Memory::new(GuestMemoryMmap::new()), 16).expect("a ring");
        let signal = Arc::new(Signal::new().expect("asynchronous I/O"));
        let listen = || {
            let event = eventfd(0, EventfdFlags::NONBLOCK).expect("an eventfd");
            ring.set_call(Some(event.try_clone().expect("a descriptor").into()));
            event
        };
        let first = listen();
        assert!(!told(&first), "nobody serves it");
        ring.tells_with(&signal).expect("told");
        assert!(told(&first));
        ring.tells_with(&signal).expect("nothing to do");
        assert!(!told(&first));
        assert!(told(&listen()), "by what is known now");
    }

    fn told(event: &impl std::os::fd::AsFd) -> bool {
        rustix::io::read(event, &mut [0; 8]).is_ok()
    }
}
