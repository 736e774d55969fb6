//! Registration with the host's TPM service, by a child process.
//!
//! The service may end while a VM runs, and with it the VM's way to a new lease; by then this process starts no program and opens
//! no path any more. So a child is forked at the very beginning, before there are threads, keys or a KVM. It joins the service
//! or starts it, and registers *this* process, by a pidfd that this process opened of itself, as the VM whose file it has read: at
//! once, and again each time it is asked. All that was settled before the fork: a request is a byte without a meaning, so that
//! whoever takes this process over gets registered as what it is, and nothing else. The child is under no filter, for the
//! service that it starts would be under it too.
//!
//! ```text
//! process -> child   1 byte: once more
//! child -> process   1 byte: 0 and the process's end of a socket pair, or 1 and why not as text: one packet
//! ```

use crate::exit::{Exit, Failure, chain};
use crate::run::Host;
use crate::sandbox::{descriptors, process};
use attest::service::{Client, ServiceError, spawn_or_join};
use attest::tcti::Tcti;
use attest::vmfile::VmFile;
use policy::{CustomerId, Digest, VmId};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{AddressFamily, SendFlags, SocketFlags, SocketType, socketpair};
use rustix::process::{PidfdFlags, getpid, pidfd_open};
use std::error::Error;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// The longest answer in bytes.
const PACKET: usize = 1024;

/// Time between two registrations: a VM process that was taken over must not keep the service busy with them.
const PAUSE: Duration = Duration::from_secs(1);

/// How long the thread that talks to the provider waits for a registration: it has reports to deliver meanwhile. A service that
/// is not there by then is looked for again at the next try.
const PATIENCE: Timespec = Timespec { tv_sec: 10, tv_nsec: 0 };

/// The process's end of the socket to its registrar.
pub struct Registrar {
    socket: OwnedFd,
    /// Whether an answer is to come.
    asked: bool,
}

impl Registrar {
    /// Forks the child, which registers this process as the VM of `file`. The calling process must have one thread.
    pub fn start(file: &VmFile, host: &Host) -> Result<Self, Failure> {
        let failed = |e: &(dyn Error + 'static)| Failure::of(Exit::Host, e);
        let pidfd = pidfd_open(getpid(), PidfdFlags::empty()).map_err(|e| failed(&e))?;
        let (ours, theirs) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
            .map_err(|e| failed(&e))?;
        let own =
            std::env::current_exe().map_err(|e| Failure::new(Exit::Host, format!("cannot find this program: {e}")))?;
        let child = Child {
            socket: theirs,
            pidfd,
            tcti: host.tcti.clone(),
            runtime_dir: host.runtime_dir.clone(),
            program: own.with_file_name("fealty-host"),
            customer: file.header.customer.clone(),
            vm: file.header.vm.clone(),
            vm_file: file.digest,
        };
        match process::fork().map_err(|e| failed(&e))? {
            process::Forked::Parent => Ok(Self { socket: ours, asked: true }),
            process::Forked::Child => {
                drop(ours);
                process::exit_now(i32::from(child.live().is_err()))
            }
        }
    }

    /// This process's end of the first socket pair, once the service serves the other.
    pub fn registered(&mut self) -> Result<Client, Failure> {
        self.answer().map_err(|why| Failure::new(Exit::Tpm, why))
    }

    /// The same of another one: by the service that serves now, which is started where there is none.
    pub fn again(&mut self) -> Result<Client, ServiceError> {
        let gone = |e: rustix::io::Errno| ServiceError::Lost(lost(&e.into()));
        if !self.asked {
            rustix::net::send(&self.socket, &[0], SendFlags::NOSIGNAL).map_err(gone)?;
            self.asked = true;
        }
        if poll(&mut [PollFd::new(&self.socket, PollFlags::IN)], Some(&PATIENCE)).map_err(gone)? == 0 {
            return Err(ServiceError::Lost("it takes its time to start".into()));
        }
        self.answer().map_err(ServiceError::Lost)
    }

    fn answer(&mut self) -> Result<Client, String> {
        let mut packet = [0; PACKET];
        let (length, descriptor) = descriptors::receive(self.socket.as_fd(), &mut packet).map_err(|e| lost(&e))?;
        self.asked = false;
        match (packet[..length].first(), descriptor) {
            (Some(0), Some(end)) => Ok(Client::with_asked_identity(UnixStream::from(end))),
            (Some(1), None) => Err(String::from_utf8_lossy(&packet[1..length]).into_owned()),
            _ => Err(lost(&io::ErrorKind::UnexpectedEof.into())),
        }
    }
}

fn lost(error: &io::Error) -> String {
    format!("the process that registers this one is gone ({error})")
}

struct Child {
    socket: OwnedFd,
    pidfd: OwnedFd,
    tcti: Tcti,
    runtime_dir: Option<PathBuf>,
    program: PathBuf,
    customer: CustomerId,
    vm: VmId,
    vm_file: Digest,
}

impl Child {
    fn live(&self) -> Result<(), Box<dyn Error>> {
        process::end_with_parent()?;
        process::close_all_but(&[self.socket.as_fd(), self.pidfd.as_fd()])?;
        secretmem::harden_process()?;
        rustix::thread::set_name(c"registrar")?;
        // What is typed on a terminal is for the VM process: on Ctrl-C that goes on for a while, and may need this one.
        rustix::process::setpgid(None, None)?;
        Ok(self.serve()?)
    }

    fn serve(&self) -> io::Result<()> {
        loop {
            let begun = Instant::now();
            process::await_children();
            let registered = self.register();
            // A service that this process started may end when nobody waits for it.
            process::forget_children();
            match registered {
                Ok(client) => descriptors::send(self.socket.as_fd(), &[0], Some(client.as_fd()))?,
                Err(error) => {
                    let mut answer = vec![1];
                    answer.extend(chain(error.as_ref()).as_bytes().iter().take(PACKET - 1));
                    descriptors::send(self.socket.as_fd(), &answer, None)?;
                }
            }
            if descriptors::receive(self.socket.as_fd(), &mut [0])?.0 == 0 {
                return Ok(());
            }
            std::thread::sleep(PAUSE.saturating_sub(begun.elapsed()));
        }
    }

    /// The process's end of a socket pair whose other end the service serves, and has been asked for the host's identity on: that will
    /// be the first question.
    fn register(&self) -> Result<Client, Box<dyn Error>> {
        let control = spawn_or_join(&self.tcti, self.runtime_dir.as_deref(), &self.program)?;
        let (ours, theirs) = UnixStream::pair()?;
        let mut client = Client::new(ours);
        client.ask_identity()?;
        control.register(&self.customer, &self.vm, self.vm_file, theirs.as_fd(), self.pidfd.as_fd())?.done()?;
        Ok(client)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_is_a_socket_or_a_reason() {
        let (ours, theirs) =
            socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).expect("sockets");
        let mut registrar = Registrar { socket: ours, asked: true };
        descriptors::send(theirs.as_fd(), b"\x01no TPM", None).expect("sent");
        assert!(matches!(registrar.again(), Err(ServiceError::Lost(why)) if why == "no TPM"));
        let (end, _other) = UnixStream::pair().expect("a pair");
        for (packet, descriptor, good) in [(b"\x00", true, true), (b"\x00", false, false), (b"\x07", true, false)] {
            descriptors::send(theirs.as_fd(), packet, descriptor.then(|| end.as_fd())).expect("sent");
            assert_eq!(registrar.again().is_ok(), good, "{packet:?} {descriptor}");
            // It was asked, each time with one byte.
            let asked = descriptors::receive(theirs.as_fd(), &mut [0; 8]).expect("a request");
            assert!(asked.0 == 1 && asked.1.is_none());
        }
        drop(theirs);
        assert!(matches!(registrar.again(), Err(ServiceError::Lost(why)) if why.contains("is gone")));
        assert_eq!(registrar.registered().err().map(|f| f.exit), Some(Exit::Tpm));
    }
}
