//! VM processes that the service serves or has served: who lives is known by pidfd, not by what anyone says.

use policy::{CustomerId, Digest, VmId, instance::EarlierPeer};
use rustix::event::{PollFd, PollFlags, Timespec};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Mutex, MutexGuard};

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
    customer: CustomerId,
    vm: VmId,
    pidfd: OwnedFd,
}

impl Peers {
    /// No peers; `unknown_before` says whether some may live that an earlier service of this boot knew.
    pub(super) fn new(unknown_before: bool) -> Self {
        Self { list: Mutex::default(), unknown_before }
    }

    /// Remembers a VM process; `None` where there are too many.
    pub(super) fn add(&self, registration: &Registration, pidfd: OwnedFd) -> Option<PeerId> {
        let mut list = self.living();
        if list.peers.len() >= MOST_PEERS {
            return None;
        }
        list.last += 1;
        let id = PeerId(list.last);
        let (customer, vm) = (registration.customer.clone(), registration.vm.clone());
        list.peers.push(Peer { id, customer, vm, pidfd });
        Some(id)
    }

    /// Whether another process of the same VM lives. Also one that was registered after `id`: whoever was registered first and
    /// then waited must not be told that it is alone, for the other may have got keys meanwhile.
    pub(super) fn earlier(&self, id: PeerId, registration: &Registration) -> EarlierPeer {
        let list = self.living();
        let other = |p: &Peer| p.id != id && p.customer == registration.customer && p.vm == registration.vm;
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
    use std::os::fd::AsRawFd;
    let info = std::fs::read_to_string(format!("/proc/self/fdinfo/{}", fd.as_raw_fd())).unwrap_or_default();
    info.lines().any(|line| line.starts_with("Pid:"))
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
        peers.add(&vm, a.1).expect("room");
        let second = peers.add(&vm, b.1).expect("room");
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
        let first = peers.add(&vm, a.1).expect("room");
        assert_eq!(peers.earlier(first, &vm), EarlierPeer::None);
        peers.add(&vm, b.1).expect("room");
        assert_eq!(peers.earlier(first, &vm), EarlierPeer::Lives, "the later one may hold the keys");
        end(b.0);
        assert_eq!(peers.earlier(first, &vm), EarlierPeer::None);
        end(a.0);
    }

    #[test]
    fn after_a_restart_nobody_knows() {
        let peers = Peers::new(true);
        let (child, pidfd) = process();
        let id = peers.add(&registration("a"), pidfd).expect("room");
        assert_eq!(peers.earlier(id, &registration("a")), EarlierPeer::Unknown);
        end(child);
        assert!(peers.may_live());
    }

    #[test]
    fn only_a_pidfd_is_one() {
        let (child, pidfd) = process();
        assert!(is_pidfd(&pidfd));
        end(child);
        let file: OwnedFd = std::fs::File::open("/dev/null").expect("opens").into();
        assert!(!is_pidfd(&file));
    }
}
