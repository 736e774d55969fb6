//! What ends a queue's thread.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::sync::{Mutex, OnceLock, PoisonError};
use vmm_sys_util::event::{EventConsumer, EventFlag, EventNotifier, new_event_consumer_and_notifier};

/// An event that is given to the thread which it ends.
///
/// The vhost-user-backend crate (0.24) makes a bare descriptor of the reader, for its epoll, and nobody closes that: each front end
/// would leave one for each queue behind, until there are none left.
pub(super) struct End {
    event: Mutex<Option<(EventConsumer, EventNotifier)>>,
    given: OnceLock<RawFd>,
}

impl End {
    pub(super) fn new() -> io::Result<Self> {
        let event = new_event_consumer_and_notifier(EventFlag::NONBLOCK | EventFlag::CLOEXEC)?;
        Ok(Self { event: Mutex::new(Some(event)), given: OnceLock::new() })
    }

    /// The event, the first time.
    pub(super) fn take(&self) -> Option<(EventConsumer, EventNotifier)> {
        let event = self.event.lock().unwrap_or_else(PoisonError::into_inner).take()?;
        let _ = self.given.set(event.0.as_raw_fd());
        Some(event)
    }
}

impl Drop for End {
    fn drop(&mut self) {
        if let Some(fd) = self.given.take() {
            // SAFETY: the descriptor was the consumer's, which was given away once, to be made a bare descriptor that nobody owns and
            // nobody closes (`VringEpollHandler::new`); so it is still open, and is not closed again. The handlers hold the back end
            // that holds this: none of them uses it any more.
            drop(unsafe { OwnedFd::from_raw_fd(fd) });
        }
    }
}
