//! Evidence is megabytes, and whoever sends it may take his time. So each party has places of its own for bodies that are being
//! read or wait to be judged: strangers on one host, of which there can be any number, don't hold up another host, nor an instance
//! that must renew its lease.

use policy::{Digest, HostId};
use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Lanes that are remembered before those without a body in them are forgotten.
const REMEMBERED: usize = 256;

/// Whose places a body takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Lane {
    /// An instance's own, by its client key: it asks for what only it can ask for.
    Instance(Digest),
    /// A host's: whoever asks for a start there.
    Host(HostId),
}

impl Lane {
    /// Bodies that are read or judged at once.
    fn places(self) -> usize {
        match self {
            Self::Instance(_) => 2,
            Self::Host(_) => 16,
        }
    }
}

/// Who reads how many bodies.
#[derive(Default)]
pub struct Lanes(Mutex<HashMap<Lane, Arc<Semaphore>>>);

/// A place; dropping it frees it.
pub struct Place {
    _permit: OwnedSemaphorePermit,
}

impl Lanes {
    /// Waits for a place, in the order of asking. None when the provider ends.
    pub async fn enter(&self, lane: Lane) -> Option<Place> {
        let places = {
            let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            if all.len() >= REMEMBERED {
                // Whoever waits or reads has a share of its own.
                all.retain(|_, places| Arc::strong_count(places) > 1);
            }
            all.entry(lane).or_insert_with(|| Arc::new(Semaphore::new(lane.places()))).clone()
        };
        places.acquire_owned().await.ok().map(|permit| Place { _permit: permit })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::future::Future;
    use std::pin::pin;
    use std::task::{Context, Poll, Waker};

    fn at_once(lanes: &Lanes, lane: Lane) -> Option<Place> {
        match pin!(lanes.enter(lane)).poll(&mut Context::from_waker(Waker::noop())) {
            Poll::Ready(place) => place,
            Poll::Pending => None,
        }
    }

    #[test]
    fn attack_39_a_full_lane_holds_up_no_other() {
        let lanes = Lanes::default();
        let (host, other) = (Lane::Host(HostId(Digest([1; 32]))), Lane::Host(HostId(Digest([2; 32]))));
        let mut held: Vec<Place> = std::iter::from_fn(|| at_once(&lanes, host)).collect();
        assert_eq!(held.len(), host.places());
        assert!(at_once(&lanes, other).is_some());
        assert!(at_once(&lanes, Lane::Instance(Digest([1; 32]))).is_some());
        held.pop();
        assert!(at_once(&lanes, host).is_some());
    }

    #[test]
    fn lanes_are_forgotten_once_nobody_is_in_them() {
        let lanes = Lanes::default();
        let key = |n: u16| Lane::Instance(Digest::of(&n.to_le_bytes()));
        let held = at_once(&lanes, key(0)).expect("room");
        for n in 1..2000 {
            assert!(at_once(&lanes, key(n)).is_some());
        }
        let all = lanes.0.lock().expect("whole");
        assert!(all.len() <= REMEMBERED, "{}", all.len());
        assert!(all.contains_key(&key(0)));
        drop(held);
    }
}
