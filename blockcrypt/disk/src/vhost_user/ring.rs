//! A queue's ring and its two descriptors, which the front end chose and has too.
#![allow(unsafe_code)]

use super::signal::Signal;
use rustix::io::{Errno, ReadWriteFlags, preadv2};
use std::fs::File;
use std::io::{self, IoSliceMut};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::MutexGuard;
use vhost_user_backend::{VringMutex, VringState, VringStateGuard, VringStateMutGuard, VringT};
use virtio_queue::Error;
use vm_memory::{GuestMemoryAtomic, GuestMemoryMmap};

/// Guest memory, as the front end shares it.
pub(super) type Memory = GuestMemoryAtomic<GuestMemoryMmap>;

/// The crate's ring, whose own reads of a kick and writes of a call wait for whoever has the other ends, under its lock: the queue's
/// thread and the front end's would both wait for ever. This one never waits, whatever the descriptors are and whoever uses them meanwhile.
#[derive(Clone)]
pub(super) struct Ring(VringMutex);

impl Ring {
    /// Tells the front end that requests are done, if it wants to be told.
    ///
    /// # Errors
    /// See [`Signal::raise`].
    pub(super) fn tell(&self, signal: &Signal) -> io::Result<()> {
        let state = self.get_ref();
        let Some(call) = state.get_call() else { return Ok(()) };
        // SAFETY: the notifier owns the descriptor, and `state`'s lock keeps it.
        signal.raise(unsafe { BorrowedFd::borrow_raw(call.as_raw_fd()) })
    }
}

impl VringT<Memory> for Ring {
    fn new(memory: Memory, max_queue_size: u16) -> Result<Self, Error> {
        VringMutex::new(memory, max_queue_size).map(Self)
    }

    /// Not without a [`Signal`]: see [`Ring::tell`].
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
        self.0.get_ref()
    }

    fn get_mut(&self) -> MutexGuard<'_, VringState> {
        self.0.get_mut()
    }

    fn add_used(&self, head: u16, written: u32) -> Result<(), Error> {
        self.0.add_used(head, written)
    }

    fn enable_notification(&self) -> Result<bool, Error> {
        self.0.enable_notification()
    }

    fn disable_notification(&self) -> Result<(), Error> {
        self.0.disable_notification()
    }

    fn needs_notification(&self) -> Result<bool, Error> {
        self.0.needs_notification()
    }

    fn set_enabled(&self, enabled: bool) {
        self.0.set_enabled(enabled);
    }

    fn set_queue_info(&self, descriptors: u64, available: u64, used: u64) -> Result<(), Error> {
        self.0.set_queue_info(descriptors, available, used)
    }

    fn queue_next_avail(&self) -> u16 {
        self.0.queue_next_avail()
    }

    fn set_queue_next_avail(&self, base: u16) {
        self.0.set_queue_next_avail(base);
    }

    fn set_queue_next_used(&self, index: u16) {
        self.0.set_queue_next_used(index);
    }

    fn queue_used_idx(&self) -> Result<u16, Error> {
        self.0.queue_used_idx()
    }

    fn set_queue_size(&self, size: u16) {
        self.0.set_queue_size(size);
    }

    fn set_queue_event_idx(&self, enabled: bool) {
        self.0.set_queue_event_idx(enabled);
    }

    fn set_queue_ready(&self, ready: bool) {
        self.0.set_queue_ready(ready);
    }

    fn set_kick(&self, file: Option<File>) {
        self.0.set_kick(file);
    }

    fn set_call(&self, file: Option<File>) {
        self.0.set_call(file);
    }

    fn set_err(&self, file: Option<File>) {
        self.0.set_err(file);
    }
}

impl<'a> VringStateGuard<'a, Memory> for Ring {
    type G = MutexGuard<'a, VringState>;
}

impl<'a> VringStateMutGuard<'a, Memory> for Ring {
    type G = MutexGuard<'a, VringState>;
}
