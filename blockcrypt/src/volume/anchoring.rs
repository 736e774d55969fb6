//! Telling the key provider which state is the newest.

use crate::{AnchorRefused, Anchors, Events, VolumeError};
use policy::{AnchorMode, VolumeAnchor};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// How often anchors are kept in mode `interval`.
pub(crate) const INTERVAL: Duration = Duration::from_secs(1);
/// How late an anchor may be in mode `interval` before FLUSH waits for it; how long `open` and `close` ask for an answer.
const PATIENCE: Duration = Duration::from_secs(30);

/// One volume's anchors. Its locks are never held while the volume's own are taken, nor over a call of [`Anchors::keep`],
/// except `keeping`, which is there to make these calls one at a time.
pub(crate) struct Anchoring {
    anchors: Arc<dyn Anchors>,
    events: Arc<dyn Events>,
    mode: AnchorMode,
    patience: Duration,
    keeping: Mutex<()>,
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    /// The newest durable state.
    durable: Option<VolumeAnchor>,
    /// The newest kept one.
    kept: Option<VolumeAnchor>,
    /// Since when the two differ.
    late_since: Option<Instant>,
    /// No anchor leaves before `close`: a new volume.
    silent: bool,
    refused: Option<String>,
    /// Nobody waited for the last one that was asked for.
    given_up: Option<String>,
    keys_wiped: bool,
    /// FLUSH does not wait for the provider.
    hasty: bool,
    stopped: bool,
}

impl Anchoring {
    pub(crate) fn new(
        anchors: Arc<dyn Anchors>,
        events: Arc<dyn Events>,
        mode: AnchorMode,
        kept: Option<VolumeAnchor>,
    ) -> Self {
        let state = State {
            durable: kept.clone(),
            silent: kept.is_none(),
            kept,
            late_since: None,
            refused: None,
            given_up: None,
            keys_wiped: false,
            hasty: false,
            stopped: false,
        };
        Self {
            anchors,
            events,
            mode,
            patience: PATIENCE,
            keeping: Mutex::new(()),
            state: Mutex::new(state),
            changed: Condvar::new(),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A newer state is durable.
    pub(crate) fn durable(&self, anchor: VolumeAnchor) {
        let mut state = self.state();
        if state.durable.as_ref() != Some(&anchor) {
            state.durable = Some(anchor);
            state.late_since.get_or_insert_with(Instant::now);
        }
    }

    /// The newest anchor that is kept.
    pub(crate) fn kept(&self) -> Option<VolumeAnchor> {
        self.state().kept.clone()
    }

    /// An error once the provider refused an anchor: then this process is not the holder any more.
    pub(crate) fn check(&self) -> Result<(), VolumeError> {
        match &self.state().refused {
            None => Ok(()),
            Some(why) => Err(VolumeError::Anchor(AnchorRefused::Refused(why.clone()))),
        }
    }

    pub(crate) fn set_wiped(&self, wiped: bool) {
        self.state().keys_wiped = wiped;
        self.changed.notify_all();
    }

    /// Nobody asks for what is late any more.
    pub(crate) fn give_up(&self, why: &str) {
        self.state().given_up = Some(why.to_owned());
        self.changed.notify_all();
    }

    pub(crate) fn set_hasty(&self, hasty: bool) {
        self.state().hasty = hasty;
        self.changed.notify_all();
    }

    pub(crate) fn stop(&self) {
        self.state().stopped = true;
        self.changed.notify_all();
    }

    /// What FLUSH owes to the mode, after its data is durable.
    pub(crate) fn after_flush(&self) -> Result<(), VolumeError> {
        match self.mode {
            AnchorMode::Close => Ok(()),
            AnchorMode::Flush => self.keep(None),
            AnchorMode::Interval => self.wait_if_late(),
        }
    }

    /// One round of the volume's thread.
    pub(crate) fn tick(&self) {
        let (silent, late) = {
            let state = self.state();
            (state.silent || state.refused.is_some(), state.late_since.is_some())
        };
        if self.mode == AnchorMode::Interval && late && !silent {
            // Away: the next round asks again, and FLUSH waits in time. Refused: noted by `keep`.
            let _ = self.keep_once(false);
        }
    }

    /// Keeps the newest state before it returns, whatever the mode; from now on the volume has an anchor.
    pub(crate) fn keep_now(&self) -> Result<(), VolumeError> {
        self.state().silent = false;
        self.keep(Some(self.patience))
    }

    /// Asks until the newest state is kept, or refused, or given up, or the keys are gone, or for `patience`; for FLUSH, which has none, also
    /// until it is not to wait any more.
    fn keep(&self, patience: Option<Duration>) -> Result<(), VolumeError> {
        if self.state().silent {
            return Ok(());
        }
        let begun = Instant::now();
        loop {
            let flush = patience.is_none();
            match self.keep_once(flush) {
                Err(VolumeError::Anchor(AnchorRefused::Away(why))) => {
                    let state = self.state();
                    if patience.is_some_and(|p| begun.elapsed() >= p) || state.stopped || flush && state.hasty {
                        return Err(VolumeError::Anchor(AnchorRefused::Away(why)));
                    }
                }
                other => return other,
            }
            let state = self.state();
            let (state, _) = self
                .changed
                .wait_timeout_while(state, INTERVAL, |s| !(s.stopped || s.keys_wiped || flush && s.hasty))
                .unwrap_or_else(PoisonError::into_inner);
            if state.keys_wiped {
                return Err(VolumeError::NoKeys);
            }
        }
    }

    fn keep_once(&self, flush: bool) -> Result<(), VolumeError> {
        let _one_at_a_time = self.keeping.lock().unwrap_or_else(PoisonError::into_inner);
        self.check()?;
        let newest = {
            let state = self.state();
            match &state.durable {
                // Several FLUSHes that wait for their turn here all go at once.
                Some(anchor) if flush && state.hasty && state.kept.as_ref() != Some(anchor) => {
                    return Err(not_waited_for());
                }
                Some(anchor) if state.kept.as_ref() != Some(anchor) => anchor.clone(),
                _ => return Ok(()),
            }
        };
        let asked = Instant::now();
        let answer = self.anchors.keep(&newest);
        let mut state = self.state();
        match answer {
            Ok(()) => {
                state.late_since = (state.durable.as_ref() != Some(&newest)).then_some(asked);
                state.kept = Some(newest);
                state.given_up = None;
                self.changed.notify_all();
                Ok(())
            }
            Err(AnchorRefused::Away(why)) => Err(VolumeError::Anchor(AnchorRefused::Away(why))),
            Err(AnchorRefused::GivenUp(why)) => {
                state.given_up = Some(why.clone());
                self.changed.notify_all();
                Err(VolumeError::Anchor(AnchorRefused::GivenUp(why)))
            }
            Err(AnchorRefused::Refused(why)) => {
                state.refused = Some(why.clone());
                self.changed.notify_all();
                drop(state);
                self.events.note(&format!("the provider refused the volume's anchor: {why}"));
                Err(VolumeError::Anchor(AnchorRefused::Refused(why)))
            }
        }
    }

    /// Waits while the provider has not answered for long.
    fn wait_if_late(&self) -> Result<(), VolumeError> {
        let late = |s: &State| s.late_since.is_some_and(|since| since.elapsed() >= self.patience) && !s.silent;
        let (mut state, mut told) = (self.state(), false);
        while late(&state) && state.refused.is_none() {
            if let Some(why) = &state.given_up {
                return Err(VolumeError::Anchor(AnchorRefused::GivenUp(why.clone())));
            }
            if state.keys_wiped {
                return Err(VolumeError::NoKeys);
            }
            if state.stopped {
                return Err(VolumeError::Closed);
            }
            if state.hasty {
                return Err(not_waited_for());
            }
            if !std::mem::replace(&mut told, true) {
                self.events.note("FLUSH waits: the provider has kept no anchor of this volume for 30 s");
            }
            (state, _) = self.changed.wait_timeout(state, INTERVAL).unwrap_or_else(PoisonError::into_inner);
        }
        drop(state);
        self.check()
    }
}

fn not_waited_for() -> VolumeError {
    VolumeError::Anchor(AnchorRefused::Away("FLUSH does not wait for the provider".to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Nobody;
    use std::sync::mpsc;

    fn anchor(epoch: u8) -> VolumeAnchor {
        let mut bytes = [0; VolumeAnchor::LENGTH];
        (bytes[0], bytes[23], bytes[31]) = (1, 1, epoch);
        VolumeAnchor::from_bytes(&bytes).expect("an anchor")
    }

    /// A provider who answers each anchor when the test says what.
    struct Slow {
        asked: mpsc::SyncSender<VolumeAnchor>,
        answers: Mutex<mpsc::Receiver<Result<(), AnchorRefused>>>,
    }

    impl Anchors for Slow {
        fn keep(&self, anchor: &VolumeAnchor) -> Result<(), AnchorRefused> {
            self.asked.send(anchor.clone()).map_err(|_| AnchorRefused::Away("over".to_owned()))?;
            self.answers.lock().expect("one").recv().unwrap_or(Err(AnchorRefused::Away("over".to_owned())))
        }
    }

    type Ends = (Arc<Anchoring>, mpsc::Receiver<VolumeAnchor>, mpsc::Sender<Result<(), AnchorRefused>>);

    fn anchoring(mode: AnchorMode) -> Ends {
        anchoring_heard(mode, Arc::new(Nobody))
    }

    fn anchoring_heard(mode: AnchorMode, events: Arc<dyn Events>) -> Ends {
        let (asked, heard) = mpsc::sync_channel(8);
        let (answer, answers) = mpsc::channel();
        let slow = Arc::new(Slow { asked, answers: Mutex::new(answers) });
        let mut made = Anchoring::new(slow, events, mode, Some(anchor(1)));
        made.patience = Duration::from_millis(60);
        (Arc::new(made), heard, answer)
    }

    #[test]
    fn in_mode_interval_flush_waits_only_when_the_provider_is_silent_for_long() {
        let (ours, heard, answer) = anchoring(AnchorMode::Interval);
        ours.after_flush().expect("nothing to anchor");
        ours.durable(anchor(2));
        let thread = {
            let ours = ours.clone();
            std::thread::spawn(move || ours.tick())
        };
        assert_eq!(heard.recv().expect("asked"), anchor(2));
        std::thread::sleep(Duration::from_millis(80));
        let flush = {
            let ours = ours.clone();
            std::thread::spawn(move || ours.after_flush())
        };
        std::thread::sleep(Duration::from_millis(80));
        assert!(!flush.is_finished(), "late: it waits");
        answer.send(Ok(())).expect("heard");
        flush.join().expect("joined").expect("goes on");
        thread.join().expect("joined");
        assert_eq!(ours.kept(), Some(anchor(2)));
    }

    #[test]
    fn a_flush_that_waits_goes_on_with_an_error_when_keys_go_or_the_volume_does() {
        for stop in [false, true] {
            let (ours, _heard, _answer) = anchoring(AnchorMode::Interval);
            ours.durable(anchor(2));
            std::thread::sleep(Duration::from_millis(80));
            let flush = {
                let ours = ours.clone();
                std::thread::spawn(move || ours.after_flush())
            };
            std::thread::sleep(Duration::from_millis(50));
            if stop {
                ours.stop()
            } else {
                ours.set_wiped(true)
            }
            let ended = flush.join().expect("joined");
            assert!(matches!(ended, Err(VolumeError::NoKeys | VolumeError::Closed)), "{ended:?}");
        }
    }

    #[test]
    fn a_flush_that_is_not_to_wait_goes_at_once_and_one_that_may_again_asks_again() {
        for mode in [AnchorMode::Interval, AnchorMode::Flush] {
            let (ours, heard, answer) = anchoring(mode);
            ours.durable(anchor(2));
            std::thread::sleep(Duration::from_millis(80));
            let flush = || {
                let ours = ours.clone();
                std::thread::spawn(move || ours.after_flush())
            };
            let waits = [flush(), flush()];
            std::thread::sleep(Duration::from_millis(50));
            assert!(waits.iter().all(|flush| !flush.is_finished()), "{mode:?}: they wait");
            ours.set_hasty(true);
            if mode == AnchorMode::Flush {
                // Only the one that has asked hears an answer.
                answer.send(Err(AnchorRefused::Away("no route".to_owned()))).expect("heard");
            }
            for flush in waits {
                let ended = flush.join().expect("joined");
                assert!(matches!(ended, Err(VolumeError::Anchor(AnchorRefused::Away(_)))), "{mode:?}: {ended:?}");
            }
            assert_eq!(heard.try_iter().count(), usize::from(mode == AnchorMode::Flush));
            ours.set_hasty(false);
            answer.send(Ok(())).expect("heard");
            ours.tick();
            ours.after_flush().expect("kept");
            assert_eq!(ours.kept(), Some(anchor(2)));
        }
    }

    #[test]
    fn what_is_given_up_is_not_asked_for_again_and_a_flush_that_waits_ends_with_it() {
        let given_up = || Err(AnchorRefused::GivenUp("the VM ends".to_owned()));
        for mode in [AnchorMode::Interval, AnchorMode::Flush, AnchorMode::Close] {
            let (ours, heard, answer) = anchoring(mode);
            ours.durable(anchor(2));
            std::thread::sleep(Duration::from_millis(80));
            answer.send(given_up()).expect("heard");
            let ended = if mode == AnchorMode::Interval {
                let flush = {
                    let ours = ours.clone();
                    std::thread::spawn(move || ours.after_flush())
                };
                std::thread::sleep(Duration::from_millis(50));
                assert!(!flush.is_finished(), "late: it waits");
                ours.tick();
                flush.join().expect("joined")
            } else {
                ours.keep_now()
            };
            assert!(matches!(ended, Err(VolumeError::Anchor(AnchorRefused::GivenUp(_)))), "{mode:?}: {ended:?}");
            assert_eq!(heard.try_iter().count(), 1, "{mode:?}: once");
            // Nothing was refused: where there is time again, it is asked for again.
            answer.send(Ok(())).expect("heard");
            ours.keep_now().expect("kept");
            ours.after_flush().expect("nothing is owed");
        }
    }

    #[derive(Default)]
    struct Notes(Mutex<u32>);

    impl Events for Notes {
        fn integrity(&self, _: Option<u64>, _: Option<u64>, _: &str) {}
        fn note(&self, _: &str) {
            *self.0.lock().expect("no panic") += 1;
        }
    }

    #[test]
    fn a_flush_that_ends_with_what_was_given_up_does_not_say_that_it_waits() {
        let notes = Arc::new(Notes::default());
        let (ours, _heard, _answer) = anchoring_heard(AnchorMode::Interval, notes.clone());
        ours.durable(anchor(2));
        ours.give_up("the VM ends");
        std::thread::sleep(Duration::from_millis(80));
        for _ in 0..3 {
            ours.after_flush().expect_err("given up");
        }
        assert_eq!(*notes.0.lock().expect("no panic"), 0);
    }

    #[test]
    fn a_state_that_became_durable_meanwhile_is_late_from_then_on() {
        let (ours, heard, answer) = anchoring(AnchorMode::Interval);
        ours.durable(anchor(2));
        let thread = {
            let ours = ours.clone();
            std::thread::spawn(move || ours.tick())
        };
        heard.recv().expect("asked");
        ours.durable(anchor(3));
        answer.send(Ok(())).expect("heard");
        thread.join().expect("joined");
        assert!(ours.state().late_since.is_some() && ours.kept() == Some(anchor(2)));
        answer.send(Ok(())).expect("heard");
        ours.tick();
        assert!(ours.state().late_since.is_none() && ours.kept() == Some(anchor(3)));
    }

    #[test]
    fn keep_now_gives_up_after_its_patience() {
        let (ours, _heard, answer) = anchoring(AnchorMode::Close);
        ours.durable(anchor(2));
        for _ in 0..8 {
            answer.send(Err(AnchorRefused::Away("no route".to_owned()))).expect("heard");
        }
        assert!(matches!(ours.keep_now(), Err(VolumeError::Anchor(AnchorRefused::Away(_)))));
        assert_eq!(ours.kept(), Some(anchor(1)));
    }
}
