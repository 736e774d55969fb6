//! What a running machine tells the thread that watches over it.

use super::sync::lock;
use super::wires::{WireError, new_event};
use std::collections::VecDeque;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::Mutex;
use vmm_sys_util::eventfd::EventFd;

/// The end of a machine's life, as the guest or KVM brought it about. After the first of them no vCPU runs any more.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum MachineEvent {
    /// The guest powered off.
    PowerOff,
    /// The guest asked for a reset.
    Reset,
    /// The guest's kernel panicked, and said so.
    Panicked,
    /// The guest did what its processor, or KVM, can't go on with; one line, with the state of the vCPU.
    Failed(String),
    /// A part of this program failed; one line. The guest has nothing to do with it.
    Broken(String),
}

/// Events in the order in which they happened.
pub struct Events {
    wake: EventFd,
    queue: Mutex<VecDeque<MachineEvent>>,
}

impl Events {
    /// No events yet.
    pub fn new() -> Result<Self, WireError> {
        Ok(Self { wake: new_event()?, queue: Mutex::default() })
    }

    /// The oldest event that nobody took yet; it never blocks. The descriptor becomes unreadable when none is left.
    pub fn take(&self) -> Option<MachineEvent> {
        let mut queue = lock(&self.queue);
        let event = queue.pop_front();
        if queue.is_empty() {
            // Nothing to read is fine.
            let _ = self.wake.read();
        }
        event
    }

    /// Blocks until there is an event, and takes it.
    pub fn wait(&self) -> MachineEvent {
        loop {
            if let Some(event) = self.take() {
                return event;
            }
            let mut fds = [rustix::event::PollFd::new(self, rustix::event::PollFlags::IN)];
            // A failed poll is tried again.
            let _ = rustix::event::poll(&mut fds, None);
        }
    }

    pub(crate) fn put(&self, event: MachineEvent) {
        let mut queue = lock(&self.queue);
        queue.push_back(event);
        // The counter can't overflow: each put adds one.
        let _ = self.wake.write(1);
    }
}

/// Readable while events wait.
impl AsFd for Events {
    fn as_fd(&self) -> BorrowedFd<'_> {
        borrow(&self.wake)
    }
}

/// The event's descriptor, for polls.
#[allow(unsafe_code)]
pub(crate) fn borrow(event: &EventFd) -> BorrowedFd<'_> {
    // SAFETY: the descriptor stays open as long as `event` lives, and the borrow can't outlive it.
    unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn readable(events: &Events) -> bool {
        let mut fds = [rustix::event::PollFd::new(events, rustix::event::PollFlags::IN)];
        rustix::event::poll(&mut fds, Some(&rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 })).expect("poll") == 1
    }

    #[test]
    fn events_come_in_order_and_show_on_the_descriptor() {
        let events = Events::new().expect("eventfd");
        assert!(!readable(&events) && events.take().is_none());
        events.put(MachineEvent::Reset);
        events.put(MachineEvent::PowerOff);
        assert!(readable(&events));
        assert_eq!(events.take(), Some(MachineEvent::Reset));
        assert!(readable(&events));
        assert_eq!(events.wait(), MachineEvent::PowerOff);
        assert!(!readable(&events));
    }
}
