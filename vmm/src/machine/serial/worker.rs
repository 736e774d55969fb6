//! What wakes the serial line: somebody typed, or the guest has read.

use super::device::SerialPort;
use crate::machine::event::borrow;
use crate::machine::thread::{Background, Crew, Task, ThreadKind};
use crate::machine::wires::{WireError, new_event};
use rustix::event::{PollFd, PollFlags, poll};
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use vmm_sys_util::eventfd::EventFd;

/// The thread that carries input.
pub(crate) struct ConsoleInput {
    shared: Arc<Shared>,
    task: Task,
}

struct Shared {
    port: Arc<SerialPort>,
    wake: EventFd,
    paused: AtomicBool,
    closing: AtomicBool,
}

impl ConsoleInput {
    /// Starts it between `input` and `port`.
    pub(crate) fn hire(port: Arc<SerialPort>, input: OwnedFd, crew: &Crew) -> Result<Arc<dyn Background>, WireError> {
        let wake = new_event()?;
        let shared = Arc::new(Shared { port, wake, paused: AtomicBool::new(false), closing: AtomicBool::new(false) });
        let own = shared.clone();
        let task =
            crew.spawn(ThreadKind::Console, "console".into(), move || carry(&own, &input)).map_err(WireError::Event)?;
        Ok(Arc::new(Self { shared, task }))
    }
}

impl Background for ConsoleInput {
    fn pause(&self) {
        self.shared.paused.store(true, Ordering::SeqCst);
        // Whoever holds the port now is the last who did not see the flag.
        self.shared.port.room();
        let _ = self.shared.wake.write(1);
    }

    fn resume(&self) {
        self.shared.paused.store(false, Ordering::SeqCst);
        let _ = self.shared.wake.write(1);
    }

    fn stop(&self) {
        self.shared.closing.store(true, Ordering::SeqCst);
        let _ = self.shared.wake.write(1);
        self.task.join();
    }
}

/// Reads no more than the guest has room for, so that nothing typed is lost and nothing piles up here.
fn carry(shared: &Shared, input: &OwnedFd) {
    let (mut open, mut held) = (true, Vec::new());
    while !shared.closing.load(Ordering::SeqCst) {
        let paused = shared.paused.load(Ordering::SeqCst);
        let listen = open && !paused && held.is_empty() && shared.port.room() > 0;
        let mut fds = vec![
            PollFd::from_borrowed_fd(borrow(&shared.wake), PollFlags::IN),
            PollFd::from_borrowed_fd(borrow(shared.port.space()), PollFlags::IN),
        ];
        if listen {
            fds.push(PollFd::new(input, PollFlags::IN));
        }
        if poll(&mut fds, None).is_err() {
            continue;
        }
        let typed = fds.get(2).is_some_and(|fd| !fd.revents().is_empty());
        let _ = (shared.wake.read(), shared.port.space().read());
        if typed {
            open = take(input, shared.port.room(), &mut held);
        }
        let taken = shared.port.enqueue(&held, || shared.paused.load(Ordering::SeqCst));
        held.drain(..taken);
    }
}

/// Reads up to `room` bytes; false at the end of the input.
fn take(input: &OwnedFd, room: usize, held: &mut Vec<u8>) -> bool {
    let mut bytes = [0; 64];
    let room = room.min(bytes.len());
    match rustix::io::read(input, &mut bytes[..room]) {
        Ok(0) => room == 0,
        Ok(count) => {
            held.extend(&bytes[..count]);
            true
        }
        Err(error) => matches!(io::Error::from(error).kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lease::LeaseGate;
    use crate::machine::control::Control;
    use crate::machine::event::Events;
    use std::io::Write;
    use std::time::{Duration, Instant};

    fn receive(port: &SerialPort, count: usize) -> Vec<u8> {
        let (start, mut bytes) = (Instant::now(), vec![]);
        while bytes.len() < count && start.elapsed() < Duration::from_secs(60) {
            match port.read(5) & 1 {
                1 => bytes.push(port.read(0)),
                _ => std::thread::sleep(Duration::from_millis(1)),
            }
        }
        bytes
    }

    #[test]
    fn what_is_typed_arrives_whole_and_waits_while_paused() {
        let port = Arc::new(SerialPort::new(new_event().expect("eventfd"), Box::new(io::sink())).expect("eventfd"));
        let (input, mut keyboard) = io::pipe().expect("a pipe");
        let control = Arc::new(Control::new(Arc::new(Events::new().expect("eventfd"))));
        let crew = Crew::new(Arc::new(|_| Ok(())), Arc::new(LeaseGate::unlimited()), control);
        let console = ConsoleInput::hire(port.clone(), input.into(), &crew).expect("a thread");
        let text: Vec<u8> = (0..1000_u32).map(|i| i as u8).collect();
        keyboard.write_all(&text).expect("typing");
        assert_eq!(receive(&port, text.len()), text);
        console.pause();
        keyboard.write_all(b"x").expect("typing");
        std::thread::sleep(Duration::from_millis(50));
        assert_eq!(port.read(5) & 1, 0);
        console.resume();
        assert_eq!(receive(&port, 1), b"x");
        drop(keyboard);
        console.stop();
    }
}
