//! Evidence is megabytes, and whoever sends it may take his time. So room for it is taken by its announced length before a byte of
//! it is read, and held until it is judged: of one's own share first, then of what all have. Instances, which must renew their leases,
//! have a room of their own that no stranger gets into, and small evidence another than large.

use attest::protocol::REQUEST_LIMIT;
use policy::{Digest, HostId};
use std::collections::HashMap;
use std::net::{IpAddr, Ipv6Addr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::sync::{AcquireError, OwnedSemaphorePermit, Semaphore, SemaphorePermit};

/// Lanes that are remembered before those without a body in them are forgotten.
const REMEMBERED: usize = 256;

/// The unit of room, in bytes, and the least that a body counts.
const UNIT: usize = 64 << 10;

/// The longest body that counts as small, in bytes: one with little or nothing of an IMA log.
const SMALL: usize = 1 << 20;

/// Room for all small bodies, in bytes; once for instances, once for strangers.
const ALL_SMALL: usize = 64 << 20;

/// Room for all others, in bytes, likewise.
const ALL_LARGE: usize = 256 << 20;

/// Evidence that is judged at once, likewise: each may take its length several times over.
const JUDGED: usize = 16;

/// How long a body waits for room.
const WAIT: Duration = Duration::from_secs(20);

/// Whose share a body takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Lane {
    /// An instance's own, by its client key: it asks for what only it can ask for.
    Instance(Digest),
    /// A host's, as far as it was named from one network: whoever asks for a start there.
    Host(HostId, IpAddr),
}

impl Lane {
    /// The lane of whoever asks from `address` for a start on a host.
    pub fn start(host: HostId, address: IpAddr) -> Self {
        // Whoever has one IPv6 address has a network of them.
        let network = match address {
            IpAddr::V4(_) => address,
            IpAddr::V6(all) => Ipv6Addr::from_bits(all.to_bits() >> 64 << 64).into(),
        };
        Self::Host(host, network)
    }

    /// Its share, in bytes.
    fn share(self) -> usize {
        match self {
            Self::Instance(_) => REQUEST_LIMIT,
            Self::Host(..) => 2 * REQUEST_LIMIT,
        }
    }

    /// The most bodies that have room or wait for it.
    fn bodies(self) -> usize {
        match self {
            Self::Instance(_) => 8,
            Self::Host(..) => 512,
        }
    }
}

/// What all instances have together, or all strangers.
struct Room {
    small: Arc<Semaphore>,
    large: Arc<Semaphore>,
    judged: Semaphore,
}

impl Default for Room {
    fn default() -> Self {
        Self {
            small: Arc::new(Semaphore::new(ALL_SMALL / UNIT)),
            large: Arc::new(Semaphore::new(ALL_LARGE / UNIT)),
            judged: Semaphore::new(JUDGED),
        }
    }
}

/// Who has how much room.
#[derive(Default)]
pub struct Lanes {
    shares: Mutex<HashMap<Lane, Arc<Semaphore>>>,
    instances: Room,
    strangers: Room,
}

/// A body's room; dropping it frees it.
pub struct Place {
    _own: OwnedSemaphorePermit,
    _of_all: OwnedSemaphorePermit,
}

impl Lanes {
    /// Waits for room for a body of `length` bytes, at most [`REQUEST_LIMIT`], in the order of asking. None where too many wait in
    /// this lane, or it takes too long.
    pub async fn enter(&self, lane: Lane, length: usize) -> Option<Place> {
        let share = {
            let mut all = self.shares.lock().unwrap_or_else(PoisonError::into_inner);
            if all.len() >= REMEMBERED {
                // Whoever waits or has room holds the share as well.
                all.retain(|_, share| Arc::strong_count(share) > 1);
            }
            let share = all.entry(lane).or_insert_with(|| Arc::new(Semaphore::new(lane.share() / UNIT)));
            if Arc::strong_count(share) > lane.bodies() {
                return None;
            }
            share.clone()
        };
        let room = self.room(lane);
        let of_all = if length <= SMALL { &room.small } else { &room.large };
        let units = u32::try_from(length.div_ceil(UNIT).max(1)).ok()?;
        let both = async {
            let own = share.acquire_many_owned(units).await?;
            Ok::<_, AcquireError>(Place { _own: own, _of_all: of_all.clone().acquire_many_owned(units).await? })
        };
        tokio::time::timeout(WAIT, both).await.ok()?.ok()
    }

    /// Waits until evidence of this lane may be judged. None when the provider ends.
    pub async fn judge(&self, lane: Lane) -> Option<SemaphorePermit<'_>> {
        self.room(lane).judged.acquire().await.ok()
    }

    fn room(&self, lane: Lane) -> &Room {
        match lane {
            Lane::Instance(_) => &self.instances,
            Lane::Host(..) => &self.strangers,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::pin::pin;
    use std::task::{Context, Poll, Waker};

    async fn at_once(lanes: &Lanes, lane: Lane, length: usize) -> Option<Place> {
        // A task that never yields is made to wait by the runtime.
        tokio::task::yield_now().await;
        match pin!(lanes.enter(lane, length)).poll(&mut Context::from_waker(Waker::noop())) {
            Poll::Ready(place) => place,
            Poll::Pending => None,
        }
    }

    async fn fill(lanes: &Lanes, lane: Lane, length: usize) -> Vec<Place> {
        let mut held = Vec::new();
        while let Some(place) = at_once(lanes, lane, length).await {
            held.push(place);
        }
        held
    }

    fn host(n: u8) -> Lane {
        Lane::start(HostId(Digest([1; 32])), IpAddr::from([10, 0, 0, n]))
    }

    fn instance(n: u8) -> Lane {
        Lane::Instance(Digest([n; 32]))
    }

    #[tokio::test]
    async fn attack_39_a_full_lane_holds_up_no_other() {
        let lanes = Lanes::default();
        let mut held = fill(&lanes, host(1), REQUEST_LIMIT).await;
        assert_eq!(held.len(), 2);
        assert!(at_once(&lanes, host(2), REQUEST_LIMIT).await.is_some(), "the same host, from elsewhere");
        assert!(at_once(&lanes, instance(1), REQUEST_LIMIT).await.is_some());
        held.pop();
        assert!(at_once(&lanes, host(1), REQUEST_LIMIT).await.is_some());
        let v6 = |last| Lane::start(HostId(Digest([1; 32])), IpAddr::from([0x2001, 0xdb8, 0, 1, 2, 3, 4, last]));
        assert_eq!(v6(5), v6(6));
    }

    #[tokio::test]
    async fn attack_39_strangers_and_large_bodies_leave_instances_their_room() {
        let lanes = Lanes::default();
        let mut held = Vec::new();
        for n in 0..20 {
            held.extend(fill(&lanes, host(n), REQUEST_LIMIT).await);
        }
        assert_eq!(held.len(), ALL_LARGE / REQUEST_LIMIT, "what all strangers hold is bounded");
        assert!(at_once(&lanes, host(99), SMALL).await.is_some(), "a start without a long log");
        for n in 0..20 {
            held.extend(fill(&lanes, instance(n), REQUEST_LIMIT).await);
        }
        assert_eq!(held.len(), 2 * (ALL_LARGE / REQUEST_LIMIT));
        assert!(at_once(&lanes, instance(99), SMALL).await.is_some(), "a renewal");
        let mut judged = Vec::new();
        for _ in 0..JUDGED {
            judged.push(lanes.judge(host(1)).await);
        }
        assert!(lanes.strangers.judged.try_acquire().is_err());
        assert!(lanes.judge(instance(1)).await.is_some());
    }

    #[tokio::test]
    async fn attack_39_few_wait_in_a_lane() {
        let lanes = Lanes::default();
        let _held = fill(&lanes, instance(1), REQUEST_LIMIT).await;
        let mut waiting: Vec<_> = (0..7).map(|_| Box::pin(lanes.enter(instance(1), 1))).collect();
        let context = &mut Context::from_waker(Waker::noop());
        assert!(waiting.iter_mut().all(|w| w.as_mut().poll(context).is_pending()));
        let one_more = pin!(lanes.enter(instance(1), 1));
        assert!(matches!(one_more.poll(context), Poll::Ready(None)), "refused at once");
    }

    #[tokio::test]
    async fn lanes_are_forgotten_once_nobody_is_in_them() {
        let lanes = Lanes::default();
        let key = |n: u16| Lane::Instance(Digest::of(&n.to_le_bytes()));
        let held = at_once(&lanes, key(0), 1).await.expect("room");
        for n in 1..2000 {
            assert!(at_once(&lanes, key(n), 1).await.is_some());
        }
        let all = lanes.shares.lock().expect("whole");
        assert!(all.len() <= REMEMBERED, "{}", all.len());
        assert!(all.contains_key(&key(0)));
        drop(held);
    }
}
