//! Who may have how many connections. Whoever is not known yet stands: of those there are only so many, and the oldest gives way,
//! so that a client which shakes hands at once gets through. Afterwards he sits: on one of the strangers' seats while there are
//! any, and where strangers have taken them all, on one of those that are kept for instances and administrators.

use policy::Digest;
use std::collections::{HashMap, VecDeque};
use std::hash::Hash;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};
use tokio::sync::oneshot;

/// The most handshakes at once.
const STANDING: usize = 4096;

/// The most of one address.
const STANDING_PER_ADDRESS: usize = 512;

/// Seats for anybody.
const STRANGERS: usize = 4096;

/// The most of them for one address.
const STRANGERS_PER_ADDRESS: usize = 1024;

/// Seats kept for instances and administrators.
const KEPT: usize = 16_384;

/// The most of them for one client key.
const KEPT_PER_KEY: usize = 4;

/// Whose a handshake is, and how to end it.
type Handshake = (IpAddr, oneshot::Sender<()>);

/// All seats.
#[derive(Debug, Clone, Default)]
pub(super) struct Seats {
    standing: Arc<Mutex<VecDeque<Handshake>>>,
    strangers: Counts<IpAddr>,
    kept: Counts<Digest>,
}

/// A connection in its handshake.
pub(super) struct Standing(oneshot::Receiver<()>);

/// A connection's seat; dropped with it.
pub(super) struct Seat {
    _taken: Box<dyn Send + Sync>,
}

impl Seats {
    /// A new connection begins its handshake. Where there are too many, the oldest of this address ends, or of all.
    pub(super) fn stand(&self, address: IpAddr) -> Standing {
        let (sender, receiver) = oneshot::channel();
        let mut standing = self.standing.lock().unwrap_or_else(PoisonError::into_inner);
        // Those that are done have dropped their end.
        standing.retain(|(_, sender)| !sender.is_closed());
        let same = standing.iter().filter(|(of, _)| *of == address).count();
        if same >= STANDING_PER_ADDRESS {
            let oldest = standing.iter().position(|(of, _)| *of == address);
            oldest.and_then(|at| standing.remove(at));
        } else if standing.len() >= STANDING {
            standing.pop_front();
        }
        standing.push_back((address, sender));
        Standing(receiver)
    }

    /// A seat for whoever comes from `address`.
    pub(super) fn stranger(&self, address: IpAddr) -> Option<Seat> {
        self.strangers.take(address, STRANGERS, STRANGERS_PER_ADDRESS)
    }

    /// A seat for the instance or administrator with this key.
    pub(super) fn kept(&self, key: Digest) -> Option<Seat> {
        self.kept.take(key, KEPT, KEPT_PER_KEY)
    }
}

impl Standing {
    /// Does `handshake`, unless a newer connection needs the place.
    pub(super) async fn unless_pushed<T>(self, handshake: impl Future<Output = T>) -> Option<T> {
        tokio::select! {
            done = handshake => Some(done),
            _ = self.0 => None,
        }
    }
}

/// How many seats each party has.
#[derive(Debug)]
struct Counts<K>(Arc<Mutex<HashMap<K, usize>>>);

impl<K> Clone for Counts<K> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<K> Default for Counts<K> {
    fn default() -> Self {
        Self(Arc::default())
    }
}

struct Taken<K: Eq + Hash>(Counts<K>, K);

impl<K: Eq + Hash + Clone + Send + Sync + 'static> Counts<K> {
    fn take(&self, party: K, all: usize, each: usize) -> Option<Seat> {
        let mut counts = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let own = counts.get(&party).copied().unwrap_or(0);
        if own >= each || counts.values().sum::<usize>() >= all {
            return None;
        }
        counts.insert(party.clone(), own + 1);
        Some(Seat { _taken: Box::new(Taken(self.clone(), party)) })
    }
}

impl<K: Eq + Hash> Drop for Taken<K> {
    fn drop(&mut self) {
        let mut counts = self.0.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = counts.get_mut(&self.1) {
            *count -= 1;
            if *count == 0 {
                counts.remove(&self.1);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::pin::pin;
    use std::task::{Context, Poll, Waker};

    fn address(n: u32) -> IpAddr {
        IpAddr::from(n.to_be_bytes())
    }

    fn pushed(standing: Standing) -> bool {
        let waiting = pin!(standing.unless_pushed(std::future::pending::<()>()));
        waiting.poll(&mut Context::from_waker(Waker::noop())) == Poll::Ready(None)
    }

    #[test]
    fn attack_39_strangers_leave_the_kept_seats_alone() {
        let seats = Seats::default();
        let mut held: Vec<Seat> = std::iter::from_fn(|| seats.stranger(address(1))).collect();
        assert_eq!(held.len(), STRANGERS_PER_ADDRESS);
        held.extend((2..99).flat_map(|n| std::iter::from_fn(|| seats.stranger(address(n))).collect::<Vec<_>>()));
        assert_eq!(held.len(), STRANGERS);
        let own: Vec<Seat> = std::iter::from_fn(|| seats.kept(Digest([1; 32]))).collect();
        assert_eq!(own.len(), KEPT_PER_KEY);
        assert!(seats.kept(Digest([2; 32])).is_some(), "one instance does not take another's");
        held.pop();
        assert!(seats.stranger(address(99)).is_some());
        drop((held, own));
        assert!(seats.kept.0.lock().expect("whole").is_empty());
        assert!(seats.strangers.0.lock().expect("whole").is_empty());
    }

    #[test]
    fn attack_39_the_oldest_handshake_gives_way() {
        let seats = Seats::default();
        let mine: Vec<Standing> = (0..STANDING_PER_ADDRESS + 1).map(|_| seats.stand(address(1))).collect();
        let other = seats.stand(address(2));
        let pushed_out: Vec<bool> = mine.into_iter().map(pushed).collect();
        assert!(pushed_out[0] && !pushed_out[1..].contains(&true));
        assert!(!pushed(other));
        let all: Vec<Standing> = (0..STANDING as u32 + 1).map(|n| seats.stand(address(n))).collect();
        let pushed_out: Vec<bool> = all.into_iter().map(pushed).collect();
        assert!(pushed_out[0] && !pushed_out[1..].contains(&true));
    }
}
