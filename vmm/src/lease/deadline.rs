//! Something that is done at a moment, whatever hangs.

use super::boottime_ms;
use crate::exit::Failure;
use crate::post::Post;
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::time::Duration;

/// How often the clock is looked at, which runs on while the host sleeps; waiting does not.
const LOOK: Duration = Duration::from_secs(1);

/// An act that comes at a moment of the boot-time clock, by a thread of its own, unless this is dropped before. It guards the
/// stretches of a VM's life in which the watching thread waits for a store: volumes that are opened, volumes that are closed.
pub struct Deadline(#[expect(dead_code, reason = "its drop is what the thread waits for")] Sender<()>);

impl Deadline {
    /// Has `act` done at `at_ms`, milliseconds of CLOCK_BOOTTIME; at once where that is past.
    pub fn new(at_ms: u64, post: Post, act: impl FnOnce() + Send + 'static) -> Result<Self, Failure> {
        let (held, dropped) = channel();
        crate::threads::spawn("deadline", post, move || {
            loop {
                let left = Duration::from_millis(at_ms.saturating_sub(boottime_ms()));
                if left.is_zero() {
                    return act();
                }
                if dropped.recv_timeout(left.min(LOOK)) != Err(RecvTimeoutError::Timeout) {
                    return;
                }
            }
        })?;
        Ok(Self(held))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_act_comes_at_its_time_or_not_at_all() {
        let (post, _inbox) = crate::post::office().expect("an office");
        let (acted, seen) = channel();
        let early = acted.clone();
        let cancelled = Deadline::new(boottime_ms() + 200, post.clone(), move || early.send("cancelled").unwrap_or(()));
        drop(cancelled.expect("a thread"));
        let begun = boottime_ms();
        let kept = Deadline::new(begun + 300, post, move || acted.send("kept").unwrap_or(())).expect("a thread");
        assert_eq!(seen.recv_timeout(Duration::from_secs(60)), Ok("kept"));
        assert!(boottime_ms() >= begun + 300);
        drop(kept);
        assert!(seen.recv().is_err(), "the other one never comes");
    }
}
