//! The thread that watches over a running VM: signals, the terminal, the machine's own end, the lease's clock, and what the
//! other threads tell. It never waits for a store or a network.

use crate::console::Keyboard;
use crate::console::escape::{HELP, Key, Keys};
use crate::guard::Guard;
use crate::machine::MachineEvent;
use crate::operations::Operations;
use crate::post::{Inbox, Message};
use crate::signals::Signals;
use crate::steps::Steps;
use policy::Operation;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::io::Write;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How a VM's life ended.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum End {
    /// The guest powered off.
    PowerOff,
    /// The guest asked for a reset.
    Reset,
    /// The guest's kernel panicked, and said so.
    Panicked,
    /// The guest failed; one line, with the state of the vCPU.
    Failed(String),
    /// The operator ended it through the socket.
    Shutdown,
    /// Signals or keys ended it.
    Stopped,
    /// Its lease ended, or a newer instance exists; one line.
    Lease(String),
    /// A part of this process failed; one line.
    Broken(String),
}

/// What is watched.
pub struct Watch {
    /// Tells people and scripts.
    pub steps: Steps,
    /// Signals that ask to end.
    pub signals: Signals,
    /// What other threads tell.
    pub inbox: Inbox,
    /// What is done to the VM.
    pub operations: Arc<Operations>,
    /// Where typed bytes come from and go.
    pub keyboard: Keyboard,
    /// Whether standard input is typed from, and whether it is a terminal, whose escapes count.
    pub typing: Typing,
    /// How long the guest may take to power off after it was asked to.
    pub grace: Duration,
    /// The lease of a protected VM.
    pub guard: Option<Guard>,
}

/// Where the guest's input comes from.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Typing {
    /// Nowhere (any more).
    No,
    /// Standard input, byte for byte.
    Plain,
    /// A terminal in raw mode.
    Terminal,
}

/// What is ready.
struct Ready {
    signals: bool,
    machine: bool,
    inbox: bool,
    input: bool,
}

impl Watch {
    /// Watches until the VM's life ends.
    pub fn until_end(&mut self, machine: &crate::machine::Events) -> End {
        let mut keys = Keys::default();
        let mut deadline: Option<Instant> = None;
        loop {
            let ready = self.wait(machine, deadline);
            if let Some(end) = self.guard.as_mut().and_then(|guard| guard.look(self.steps)) {
                return end;
            }
            if ready.machine
                && let Some(event) = machine.take()
            {
                return match event {
                    MachineEvent::PowerOff => End::PowerOff,
                    MachineEvent::Reset => End::Reset,
                    MachineEvent::Panicked => End::Panicked,
                    MachineEvent::Failed(why) => End::Failed(why),
                    MachineEvent::Broken(why) => End::Broken(why),
                };
            }
            if ready.inbox
                && let Some(end) = self.messages()
            {
                return end;
            }
            if ready.input && self.typed(&mut keys) {
                self.steps.step("stopping", "Ctrl-A x");
                return End::Stopped;
            }
            let asked = if ready.signals { self.signals.count() } else { 0 };
            for _ in 0..asked {
                if deadline.is_some() {
                    self.steps.step("stopping", "asked a second time");
                    return End::Stopped;
                }
                self.press_button();
                deadline = Some(Instant::now() + self.grace);
            }
            if deadline.is_some_and(|d| d <= Instant::now()) {
                self.steps.step("stopping", "the guest did not power off in time");
                return End::Stopped;
            }
        }
    }

    fn wait(&self, machine: &crate::machine::Events, deadline: Option<Instant>) -> Ready {
        let mut fds = vec![
            PollFd::new(&self.signals, PollFlags::IN),
            PollFd::from_borrowed_fd(machine.as_fd(), PollFlags::IN),
            PollFd::new(&self.inbox, PollFlags::IN),
        ];
        if let Some(guard) = &self.guard {
            fds.push(PollFd::from_borrowed_fd(guard.as_fd(), PollFlags::IN));
        }
        let typed = self.keyboard.typed.as_ref().filter(|_| self.typing != Typing::No);
        fds.extend(typed.map(|typed| PollFd::new(typed, PollFlags::IN)));
        let left = deadline.map(|d| d.saturating_duration_since(Instant::now()));
        let left = left.and_then(|left| Timespec::try_from(left).ok());
        // A poll that was interrupted found nothing; the loop asks everybody again.
        let _ = poll(&mut fds, left.as_ref());
        let is = |fd: Option<&PollFd<'_>>| fd.is_some_and(|fd| !fd.revents().is_empty());
        Ready {
            signals: is(fds.first()),
            machine: is(fds.get(1)),
            inbox: is(fds.get(2)),
            input: typed.is_some() && is(fds.last()),
        }
    }

    fn messages(&mut self) -> Option<End> {
        while let Some(message) = self.inbox.take() {
            match (message, &mut self.guard) {
                (Message::Shutdown, _) => return Some(End::Shutdown),
                (Message::Died(why), _) => return Some(End::Broken(why)),
                (Message::Superseded(why), _) => return Some(End::Lease(why)),
                (Message::DiskRemoved(name, Ok(())), _) => self.steps.step("disk-removed", &name),
                (Message::DiskRemoved(name, Err(why)), _) => {
                    self.steps.step("disk-removed", &format!("{name}, but it is not flushed: {why}"));
                }
                (Message::Renewed(renewal), Some(guard)) => guard.renewed(*renewal, self.steps),
                (Message::Quiet(result), Some(guard)) => guard.quiet(result, self.steps),
                (Message::Renewed(_) | Message::Quiet(_), None) => {}
            }
        }
        None
    }

    fn press_button(&self) {
        match self.operations.free(Operation::PowerButton) {
            Ok(()) => {
                self.steps.step("power-button", &format!("the guest has {} s to power off", self.grace.as_secs()))
            }
            Err(error) => self.steps.step("power-button", &crate::exit::chain(&error)),
        }
    }

    /// Hands what was typed to the guest; true if the key that ends the VM was among it.
    fn typed(&mut self, keys: &mut Keys) -> bool {
        let mut bytes = [0; 1024];
        let Some(typed) = &self.keyboard.typed else { return false };
        let length = match rustix::io::read(typed, &mut bytes) {
            Ok(0) | Err(rustix::io::Errno::IO | rustix::io::Errno::BADF) => {
                self.typing = Typing::No;
                return false;
            }
            Ok(length) => length,
            Err(_) => return false,
        };
        let mut guest = Vec::new();
        let mut end = false;
        if self.typing == Typing::Terminal {
            for key in keys.sort(&bytes[..length], &mut guest) {
                match key {
                    Key::End => end = true,
                    Key::Status => self.steps.step("status", &self.operations.status_line()),
                    Key::Help => self.steps.step("keys", HELP),
                }
            }
        } else {
            guest.extend_from_slice(&bytes[..length]);
        }
        // A guest that does not read loses what is typed, as on any serial line.
        let _ = self.keyboard.guest.write_all(&guest);
        end
    }
}
