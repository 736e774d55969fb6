//! The volume's own thread: it keeps anchors, makes checkpoints, and goes on with deletions that nobody else goes on with.

use super::anchoring::{Anchoring, INTERVAL};
use super::shared::Shared;
use crate::VolumeError;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::thread;
use std::time::Instant;

/// Rounds between two tries at a deletion that fails, at most: five minutes.
const LONGEST_PAUSE: u32 = 300;

/// What the thread is told.
#[derive(Default)]
pub(super) struct Housekeeper {
    orders: Mutex<Orders>,
    changed: Condvar,
    /// Held by the thread while it has the volume.
    work: Mutex<()>,
}

#[derive(Default)]
struct Orders {
    /// Checkpoints that were asked for, and how many of these are made, or came to nothing.
    asked: u64,
    answered: u64,
    stop: bool,
}

/// Starts the thread of `shared`.
pub(super) fn start(shared: &Arc<Shared>) -> Result<(), VolumeError> {
    let (told, anchoring, volume) = (shared.housekeeper.clone(), shared.anchoring.clone(), Arc::downgrade(shared));
    let thread = thread::Builder::new().name("volume".to_owned()).stack_size(256 * 1024);
    thread.spawn(move || told.keep_house(&anchoring, &volume)).map_err(|_| VolumeError::System("thread"))?;
    Ok(())
}

impl Housekeeper {
    fn orders(&self) -> MutexGuard<'_, Orders> {
        self.orders.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Has a checkpoint made.
    pub(super) fn ask_for_checkpoint(&self) {
        self.orders().asked += 1;
        self.changed.notify_all();
    }

    /// The thread ends, and has let go of the volume when this returns: whoever opens the store next finds it at rest and unlocked. It may
    /// wait for the provider's answer for longer, but without the volume.
    pub(super) fn stop(&self) {
        self.orders().stop = true;
        self.changed.notify_all();
        drop(self.at_work());
    }

    fn at_work(&self) -> MutexGuard<'_, ()> {
        self.work.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns when no checkpoint is asked for any more, and the thread does nothing else with the volume.
    pub(super) fn rest(&self) {
        let busy = |orders: &mut Orders| !orders.stop && orders.asked > orders.answered;
        drop(self.changed.wait_while(self.orders(), busy));
        drop(self.at_work());
    }

    /// Sleeps until `round`, or until there is something else to do: how many checkpoints were ever asked for. `None` once it is to end.
    fn sleep(&self, round: Instant) -> Option<u64> {
        let (orders, left) = (self.orders(), round.saturating_duration_since(Instant::now()));
        let idle = |orders: &mut Orders| !orders.stop && orders.asked == orders.answered;
        let (orders, _) = self.changed.wait_timeout_while(orders, left, idle).unwrap_or_else(PoisonError::into_inner);
        (!orders.stop).then_some(orders.asked)
    }

    /// Holds the volume itself only while it works on it, so that a provider who does not answer keeps no store locked.
    fn keep_house(&self, anchoring: &Anchoring, volume: &Weak<Shared>) {
        // Rounds without a try at a deletion that failed, and how many of them are left.
        let (mut pause, mut left) = (0, 0);
        // Whether the last checkpoint that time asked for was made.
        let mut checkpointed = true;
        let mut round = Instant::now() + INTERVAL;
        while let Some(asked) = self.sleep(round) {
            if asked > self.orders().answered {
                self.with(volume, Shared::asked_checkpoint);
                self.orders().answered = asked;
                self.changed.notify_all();
            }
            if Instant::now() < round {
                continue;
            }
            anchoring.tick();
            // From the answer on: asked again at once, whoever waits to ask, as `close` does, would not get its turn for as long as the
            // provider hangs.
            round = Instant::now() + INTERVAL;
            checkpointed = self.with(volume, |volume| volume.timed_checkpoint(!checkpointed)).unwrap_or(true);
            if left > 0 {
                left -= 1;
                continue;
            }
            let Some(done) = self.with(volume, |volume| volume.timed_deletion(pause > 0)) else { return };
            pause = if done { 0 } else { (2 * pause + 1).min(LONGEST_PAUSE) };
            left = pause;
        }
    }

    /// Does `work` with the volume; nothing once it is to end.
    fn with<R>(&self, volume: &Weak<Shared>, work: impl FnOnce(&Shared) -> R) -> Option<R> {
        let _held = self.at_work();
        if self.orders().stop {
            return None;
        }
        let volume = volume.upgrade()?;
        Some(work(&volume))
    }
}
