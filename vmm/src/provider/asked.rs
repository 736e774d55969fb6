//! An attestation under way, and how it is given up: keys that were released to a process that does not want them any more
//! hold its VM and its volumes until somebody says that the instance has ended.

use super::gone;
use crate::exit::Failure;
use crate::steps::Steps;
use attest::flow::{Follow, OpenedRelease, Step};
use policy::InstanceNumber;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::Duration;

/// How often whoever waits looks whether to wait still.
const LOOK: Duration = Duration::from_millis(100);

/// How long an answer is waited for that only tells which instance is to be ended: as long as the client waits for one.
const ANSWER_WAIT: Duration = Duration::from_secs(30);

/// Why there are no keys.
#[derive(Debug)]
pub struct Denied {
    /// Why.
    pub failure: Failure,
    /// The instance that the provider has released keys to all the same: its end is to be reported.
    pub instance: Option<InstanceNumber>,
}

impl From<Failure> for Denied {
    fn from(failure: Failure) -> Self {
        Self { failure, instance: None }
    }
}

/// An attestation under way.
pub struct Asked {
    answer: Receiver<Result<OpenedRelease, Denied>>,
    stage: Arc<Stage>,
}

impl Asked {
    pub(super) fn new(answer: Receiver<Result<OpenedRelease, Denied>>, stage: Arc<Stage>) -> Self {
        Self { answer, stage }
    }

    /// Waits for what is released, or until `stop` gives a reason not to.
    pub fn wait(self, mut stop: impl FnMut() -> Option<Failure>) -> Result<OpenedRelease, Denied> {
        loop {
            match self.answer.recv_timeout(LOOK) {
                Ok(answer) => return answer,
                Err(RecvTimeoutError::Disconnected) => return Err(gone().into()),
                Err(RecvTimeoutError::Timeout) => {
                    if let Some(failure) = stop() {
                        return Err(self.give_up(failure));
                    }
                }
            }
        }
    }

    /// Gives up because of `failure`: at once, unless evidence has left. Then keys may be released by now, and the answer is
    /// waited for, which says to whom.
    pub fn give_up(self, failure: Failure) -> Denied {
        if self.stage.give_up() {
            return failure.into();
        }
        match self.answer.recv_timeout(ANSWER_WAIT) {
            Ok(Ok(opened)) => Denied { failure, instance: Some(opened.release.instance) },
            Ok(Err(denied)) => Denied { failure, instance: denied.instance },
            Err(_) => {
                let unknown = "the key provider's answer did not come: if it released keys, the VM may start elsewhere once their lease is past";
                Failure::new(failure.exit, format!("{failure}; {unknown}")).into()
            }
        }
    }
}

/// Whether evidence has left: once, unless it was given up before.
#[derive(Default)]
pub(super) struct Stage(AtomicU8);

const ASKING: u8 = 0;
const SENT: u8 = 1;
const GIVEN_UP: u8 = 2;

impl Stage {
    /// Evidence is about to leave; false where it must not.
    fn send(&self) -> bool {
        self.0.compare_exchange(ASKING, SENT, Ordering::SeqCst, Ordering::SeqCst).is_ok()
    }

    /// No evidence leaves any more; false where it has.
    fn give_up(&self) -> bool {
        self.0.compare_exchange(ASKING, GIVEN_UP, Ordering::SeqCst, Ordering::SeqCst).is_ok()
    }
}

/// Follows an attestation for whoever asked for it.
pub(super) struct Following<'a> {
    pub(super) steps: Steps,
    pub(super) stage: &'a Stage,
}

impl Follow for Following<'_> {
    fn done(&mut self, step: Step) {
        self.steps.timed(step.name, &step.detail, step.took);
    }

    fn may_send(&mut self) -> bool {
        self.stage.send()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::exit::Exit;
    use std::sync::mpsc::channel;

    fn stopped() -> Failure {
        Failure::new(Exit::Stopped, "stopped")
    }

    #[test]
    fn what_is_given_up_before_evidence_leaves_sends_none() {
        let (_answer, wait) = channel();
        let asked = Asked::new(wait, Arc::default());
        let stage = asked.stage.clone();
        let denied = asked.wait(|| Some(stopped())).err().expect("no keys");
        assert_eq!((denied.failure.exit, denied.instance), (Exit::Stopped, None));
        assert!(!Following { steps: Steps::new(false), stage: &stage }.may_send());
    }

    #[test]
    fn what_is_given_up_after_evidence_has_left_says_whose_end_is_to_be_reported() {
        let (answer, wait) = channel();
        let asked = Asked::new(wait, Arc::default());
        assert!(Following { steps: Steps::new(false), stage: &asked.stage }.may_send());
        let instance = InstanceNumber::try_from(7).ok();
        let judged = std::thread::spawn(move || {
            std::thread::sleep(2 * LOOK);
            let late = Failure::new(Exit::Lease, "the keys came too late");
            answer.send(Err(Denied { failure: late, instance })).unwrap_or(());
        });
        let denied = asked.give_up(stopped());
        assert_eq!((denied.failure.exit, denied.instance), (Exit::Stopped, instance));
        judged.join().expect("it answered");
    }
}
