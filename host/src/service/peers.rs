//! VM processes that the service serves or has served: who lives is known by pidfd, not by what anyone says.

use policy::{CustomerId, Digest, VmId, instance::EarlierPeer};
use rustix::event::{PollFd, PollFlags, Timespec};
use std::net::Shutdown;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard, Weak};

/// More VM processes than a host has.
const MOST_PEERS: usize = 4096;

/// What was registered with a VM's socket: what its quotes say, whatever its process says.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Registration {
    pub(super) customer: CustomerId,
    pub(super) vm: VmId,
    pub(super) vm_file: Digest,
}

/// A peer's number: rising.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(super) struct PeerId(u64);

/// All peers that live.
#[derive(Debug)]
pub(super) struct Peers {
    list: Mutex<List>,
    unknown_before: bool,
}

#[derive(Debug, Default)]
struct List {
    last: u64,
    peers: Vec<Peer>,
}

#[derive(Debug)]
struct Peer {
    id: PeerId,
    registration: Registration,
    pidfd: OwnedFd,
    connection: Weak<UnixStream>,
}

impl Peer {
    /// Whether it is the process behind `pidfd`, registered as the same.
    fn is(&self, registration: &Registration, pidfd: &OwnedFd) -> bool {
        self.registration == *registration && pid(pidfd).is_some_and(|other| pid(&self.pidfd) == Some(other))
    }

    /// Whether it is a process of this VM.
    fn is_of(&self, registration: &Registration) -> bool {
        (&self.registration.customer, &self.registration.vm) == (&registration.customer, &registration.vm)
    }
}

impl Peers {
    /// No peers; `unknown_before` says whether some may live that an earlier service of this boot knew.
    pub(super) fn new(unknown_before: bool) -> Self {
        Self { list: Mutex::default(), unknown_before }
    }

    /// Remembers a VM process, which asks over `connection`; `None` where there are too many. One that is registered again has
    /// lost its connection, and is no second one: that connection is closed, so that each has one.
    pub(super) fn add(
        &self,
        registration: &Registration,
        pidfd: OwnedFd,
        connection: &Arc<UnixStream>,
    ) -> Option<PeerId> {
        let mut list = self.living();
        list.peers.retain(|peer| {
            let again = peer.is(registration, &pidfd);
            if again && let Some(old) = peer.connection.upgrade() {
                // Where it is closed already, nothing is left to do.
                let _ = old.shutdown(Shutdown::Both);
            }
            !again
        });
        if list.peers.len() >= MOST_PEERS {
            return None;
        }
        list.last += 1;
        let id = PeerId(list.last);
        list.peers.push(Peer { id, registration: registration.clone(), pidfd, connection: Arc::downgrade(connection) });
        Some(id)
    }

    /// Whether another process of the same VM lives. Also one that was registered after `id`: whoever was registered first and
    /// then waited must not be told that it is alone, for the other may have got keys meanwhile.
    pub(super) fn earlier(&self, id: PeerId, registration: &Registration) -> EarlierPeer {
        let list = self.living();
        let other = |p: &Peer| p.id != id && p.is_of(registration);
        if list.peers.iter().any(other) {
            EarlierPeer::Lives
        } else if self.unknown_before {
            EarlierPeer::Unknown
        } else {
            EarlierPeer::None
        }
    }

    /// How many live.
    pub(super) fn count(&self) -> usize {
        self.living().peers.len()
    }

    /// Whether a process that some service of this boot served may live.
    pub(super) fn may_live(&self) -> bool {
        self.unknown_before || self.count() > 0
    }

    fn living(&self) -> MutexGuard<'_, List> {
        let mut list = self.list.lock().unwrap_or_else(|e| e.into_inner());
        list.peers.retain(|p| lives(&p.pidfd));
        list
    }
}

/// Whether a descriptor is a pidfd (of a process that may have ended).
pub(super) fn is_pidfd(fd: &OwnedFd) -> bool {
    pid_line(fd).is_some()
}

/// The process behind a pidfd, which no other process is while it lives; `None` where it has ended, or is not to be seen from here.
fn pid(pidfd: &OwnedFd) -> Option<u32> {
    pid_line(pidfd)?.parse().ok().filter(|pid| *pid > 0)
}

/// What the kernel says of the process behind a pidfd (proc_pid_fdinfo(5)): its id, -1 once it has ended.
fn pid_line(fd: &OwnedFd) -> Option<String> {
    let info = std::fs::read_to_string(format!("/proc/self/fdinfo/{}", fd.as_raw_fd())).ok()?;
    info.lines().find_map(|line| Some(line.strip_prefix("Pid:")?.trim().to_owned()))
}

/// A pidfd becomes readable when its process ends (pidfd_open(2)).
fn lives(pidfd: &OwnedFd) -> bool {
    let mut polled = [PollFd::from_borrowed_fd(pidfd.as_fd(), PollFlags::IN)];
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    !matches!(rustix::event::poll(&mut polled, Some(&now)), Ok(1..))
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::process::{Pid, PidfdFlags, pidfd_open};
    use std::process::{Child, Command};

    fn process() -> (Child, OwnedFd) {
        let child = Command::new("sleep").arg("60").spawn().expect("sleep");
        let pid = Pid::from_raw(child.id() as i32).expect("a pid");
        let pidfd = pidfd_open(pid, PidfdFlags::empty()).expect("a pidfd");
        (child, pidfd)
    }

    fn line() -> Arc<UnixStream> {
        Arc::new(UnixStream::pair().expect("a pair").0)
    }

    fn end(mut child: Child) {
        child.kill().expect("killed");
        child.wait().expect("waited");
    }

    fn registration(vm: &str) -> Registration {
        Registration {
            customer: "acme".parse().expect("a label"),
            vm: vm.parse().expect("a label"),
            vm_file: Digest::of(b""),
        }
    }

    #[test]
    fn an_earlier_process_counts_while_it_lives() {
        let peers = Peers::new(false);
        let (a, b) = (process(), process());
        let vm = registration("a");
        peers.add(&vm, a.1, &line()).expect("room");
        let second = peers.add(&vm, b.1, &line()).expect("room");
        assert_eq!(peers.earlier(second, &vm), EarlierPeer::Lives);
        assert_eq!(peers.earlier(second, &registration("b")), EarlierPeer::None);
        end(a.0);
        assert_eq!(peers.earlier(second, &vm), EarlierPeer::None);
        assert_eq!(peers.count(), 1);
        end(b.0);
        assert!(!peers.may_live());
    }

    #[test]
    fn a_process_that_waited_learns_of_a_later_one() {
        let peers = Peers::new(false);
        let (a, b) = (process(), process());
        let vm = registration("a");
        let first = peers.add(&vm, a.1, &line()).expect("room");
        assert_eq!(peers.earlier(first, &vm), EarlierPeer::None);
        peers.add(&vm, b.1, &line()).expect("room");
        assert_eq!(peers.earlier(first, &vm), EarlierPeer::Lives, "the later one may hold the keys");
        end(b.0);
        assert_eq!(peers.earlier(first, &vm), EarlierPeer::None);
        end(a.0);
    }

    #[test]
    fn after_a_restart_nobody_knows() {
        let peers = Peers::new(true);
        let (child, pidfd) = process();
        let id = peers.add(&registration("a"), pidfd, &line()).expect("room");
        assert_eq!(peers.earlier(id, &registration("a")), EarlierPeer::Unknown);
        end(child);
        assert!(peers.may_live());
    }

    #[test]
    fn a_process_that_registers_again_is_the_same_and_has_one_connection() {
        let peers = Peers::new(false);
        let (a, b) = (process(), process());
        let again = a.1.try_clone().expect("a copy");
        let vm = registration("a");
        let (first_line, mut client) = UnixStream::pair().expect("a pair");
        let first_line = Arc::new(first_line);
        let first = peers.add(&vm, a.1, &first_line).expect("room");
        let second_line = line();
        let second = peers.add(&vm, again.try_clone().expect("a copy"), &second_line).expect("room");
        assert_eq!((peers.count(), peers.earlier(second, &vm)), (1, EarlierPeer::None));
        assert_eq!(peers.earlier(first, &vm), EarlierPeer::Lives, "whoever asks on the old connection is not alone");
        assert_eq!(std::io::Read::read(&mut client, &mut [0]).expect("closed"), 0);
        // Neither another process, nor the same one as another VM, takes its place.
        peers.add(&vm, b.1, &line()).expect("room");
        assert_eq!(peers.earlier(second, &vm), EarlierPeer::Lives);
        peers.add(&registration("b"), again, &line()).expect("room");
        assert_eq!(peers.count(), 3);
        end(a.0);
        end(b.0);
        assert_eq!(peers.count(), 0);
    }

    #[test]
    fn only_a_pidfd_is_one() {
        let (child, pidfd) = process();
        assert!(is_pidfd(&pidfd));
        assert_eq!(pid(&pidfd), Some(child.id()));
        end(child);
        assert_eq!(pid(&pidfd), None);
        let file: OwnedFd = std::fs::File::open("/dev/null").expect("opens").into();
        assert!(!is_pidfd(&file));
    }
}
