//! The machine's threads: each puts on its sandbox first, and none can die unnoticed.

use super::control::Control;
use super::event::MachineEvent;
use super::sync::lock;
use crate::lease::LeaseGate;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex};
use std::thread::{Builder, JoinHandle};

/// What a thread does, and so which system calls it needs.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum ThreadKind {
    /// Runs a vCPU and emulates what it touches: KVM ioctls, writes to the console and to event descriptors.
    Vcpu,
    /// Serves a disk: event descriptors, and whatever the disk behind it needs.
    Disk,
    /// Gives random numbers.
    Rng,
    /// Carries frames of a network card: poll, read and write, and the ioctls of a TAP that runs.
    Net,
    /// Carries bytes of a virtio console: poll, read and write, accept and socket calls.
    VirtioConsole,
    /// Gives guest memory back to the host: madvise.
    Balloon,
    /// Carries bytes of sockets between guest and host: poll, accept and socket calls.
    Vsock,
    /// Carries the console's input: poll, read, writes to event descriptors.
    Console,
    /// Readies disks that come later and clears away those that went: makes and ends their threads, and what they need of KVM.
    Slots,
}

/// Called first in each new thread: this is where its sandbox closes. On an error the machine fails and the thread does nothing.
pub type ThreadHook = Arc<dyn Fn(ThreadKind) -> io::Result<()> + Send + Sync>;

/// Something with a thread of its own that a pause must quiet.
pub trait Background: Send + Sync {
    /// Returns when nothing is in hand and nothing new will be begun.
    fn pause(&self);
    /// Goes on, with whatever came in the meantime.
    fn resume(&self);
    /// Finishes what is in hand and ends the thread; returns when it has ended.
    fn stop(&self);
}

/// Hires threads.
pub struct Crew {
    hook: ThreadHook,
    gate: Arc<LeaseGate>,
    control: Arc<Control>,
}

impl Crew {
    /// A crew that puts on the sandbox of `hook`, minds `gate`, and reports the death of a thread to `control`.
    pub fn new(hook: ThreadHook, gate: Arc<LeaseGate>, control: Arc<Control>) -> Self {
        Self { hook, gate, control }
    }

    /// The lease.
    pub fn gate(&self) -> &Arc<LeaseGate> {
        &self.gate
    }

    /// Starts a thread (its name is cut to what the kernel shows).
    pub fn spawn(&self, kind: ThreadKind, name: String, body: impl FnOnce() + Send + 'static) -> io::Result<Task> {
        let (hook, control, label) = (self.hook.clone(), self.control.clone(), name.clone());
        let thread = Builder::new().name(name).spawn(move || {
            if let Err(error) = hook(kind) {
                control.end(MachineEvent::Broken(format!("the sandbox of thread {label} did not close: {error}")));
                return;
            }
            if catch_unwind(AssertUnwindSafe(body)).is_err() {
                control.end(MachineEvent::Broken(format!("thread {label} panicked: this is a bug of the monitor")));
            }
        })?;
        Ok(Task(Mutex::new(Some(thread))))
    }
}

/// A running thread.
pub struct Task(Mutex<Option<JoinHandle<()>>>);

impl Task {
    /// Returns when the thread has ended.
    pub fn join(&self) {
        if let Some(thread) = lock(&self.0).take() {
            // A panic was reported when it happened.
            let _ = thread.join();
        }
    }

    /// Does something with the thread unless it was joined.
    pub(super) fn with(&self, act: impl FnOnce(&JoinHandle<()>)) {
        if let Some(thread) = lock(&self.0).as_ref() {
            act(thread);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::event::Events;

    #[test]
    fn a_thread_that_panics_ends_the_machine_as_a_fault_of_this_program() {
        let events = Arc::new(Events::new().expect("eventfd"));
        let control = Arc::new(Control::new(events.clone()));
        let crew = Crew::new(Arc::new(|_| Ok(())), Arc::new(LeaseGate::unlimited()), control.clone());
        let body = || panic!("this line of a test's is expected");
        crew.spawn(ThreadKind::Rng, "rng".into(), body).expect("a thread").join();
        let Some(MachineEvent::Broken(why)) = events.take() else { panic!("nobody was told") };
        assert!(why.contains("thread rng panicked"), "{why}");
        assert!(control.ends());
    }
}
