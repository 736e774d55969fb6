//! Messages to the thread that watches over the VM, with a descriptor it can poll for.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use vmm_sys_util::eventfd::EventFd;

/// What others tell the watching thread.
pub enum Message {
    /// The operator ended the VM through its socket.
    Shutdown,
    /// The provider released the VM's keys again: a renewed lease.
    Renewed(Box<crate::provider::Renewal>),
    /// The provider's answer says that this instance is not the newest any more; one line.
    Superseded(String),
    /// The machine is quiet and its volumes are flushed, or why not.
    Quiet(Result<(), String>),
    /// The guest has let go of a disk that was added: its name, and why its last flush failed, if it did.
    DiskRemoved(String, Result<(), String>),
    /// A thread that nothing works without has died; one line.
    Died(String),
}

/// Where messages are put.
#[derive(Clone)]
pub struct Post {
    sender: Sender<Message>,
    wake: Arc<EventFd>,
}

/// Where they are taken.
pub struct Inbox {
    receiver: Receiver<Message>,
    wake: Arc<EventFd>,
}

/// A post and its inbox.
pub fn office() -> std::io::Result<(Post, Inbox)> {
    let wake = Arc::new(EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?);
    let (sender, receiver) = channel();
    Ok((Post { sender, wake: wake.clone() }, Inbox { receiver, wake }))
}

impl Post {
    /// Puts a message; where nobody watches any more it is dropped.
    pub fn put(&self, message: Message) {
        if self.sender.send(message).is_ok() {
            // A full counter is as readable as any other.
            let _ = self.wake.write(1);
        }
    }
}

impl Inbox {
    /// The oldest message, if any.
    pub fn take(&self) -> Option<Message> {
        // Nothing to read is fine.
        let _ = self.wake.read();
        let message = self.receiver.try_recv().ok();
        if message.is_some() {
            // There may be more behind it.
            let _ = self.wake.write(1);
        }
        message
    }
}

impl AsFd for Inbox {
    #[allow(unsafe_code)]
    fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the descriptor is open as long as `wake` lives, which the borrow of `self` guarantees.
        unsafe { BorrowedFd::borrow_raw(self.wake.as_raw_fd()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_come_in_order_and_none_is_forgotten() {
        let (post, inbox) = office().expect("eventfd");
        assert!(inbox.take().is_none());
        post.put(Message::Shutdown);
        post.put(Message::Died("x".into()));
        assert!(matches!(inbox.take(), Some(Message::Shutdown)));
        assert!(matches!(inbox.take(), Some(Message::Died(_))));
        assert!(inbox.take().is_none());
    }
}
