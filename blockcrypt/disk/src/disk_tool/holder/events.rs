//! What happened to the volume, told to the holder without keeping the one waiting who noticed it.

use super::super::report;
use super::Holder;
use super::error::HolderError;
use super::talk::Talk;
use blockcrypt::Events;
use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;

/// Findings that are told one by one; of further ones only the number. A store that is wrong everywhere has millions.
const FINDINGS: u64 = 64;
/// Events that wait while the holder is busy; of further ones only the number is told.
const WAITING: usize = 256;

/// Our side of the conversation.
pub(super) struct Side {
    talk: Mutex<Talk>,
    waiting: Mutex<Waiting>,
}

/// What happened to the volume and is not told yet. Whoever notices it holds locks of the volume, and must not wait for an answer.
#[derive(Default)]
struct Waiting {
    texts: VecDeque<String>,
    /// A thread is about to tell them.
    told: bool,
    /// How many found no room.
    lost: u64,
    /// Findings so far.
    findings: u64,
    /// Notes are told, but not shown: the command itself says how it ends.
    hushed: bool,
}

impl Holder {
    /// Tells what was not told one by one; an error if anything did not reach the audit log.
    pub(crate) fn finish(&self) -> Result<(), HolderError> {
        let mut talk = self.side.talk();
        let (findings, lost) = {
            let waiting = self.side.waiting();
            (waiting.findings, waiting.lost)
        };
        if let Some(more) = findings.checked_sub(FINDINGS).filter(|more| *more > 0) {
            talk.tell(&format!("integrity: {more} more findings like these"));
        }
        if lost > 0 {
            talk.tell(&format!("{lost} more events came while the key holder was busy"));
        }
        talk.unheard.take().map_or(Ok(()), |why| Err(HolderError::Unheard(why)))
    }

    /// Returns when nothing waits to be told any more.
    pub(crate) fn tell_all(&self) {
        drop(self.side.talk());
    }

    /// From now on notes go to the audit log alone.
    pub(crate) fn hush(&self) {
        self.side.waiting().hushed = true;
    }

    /// Has `text` told, soon and before anything that is said later.
    fn tell(&self, mut waiting: MutexGuard<Waiting>, text: String) {
        if waiting.texts.len() >= WAITING {
            waiting.lost += 1;
            return;
        }
        waiting.texts.push_back(text);
        if waiting.told {
            return;
        }
        let side = self.side.clone();
        // Without a thread, whoever says something next tells it.
        waiting.told = thread::Builder::new().name("events".to_owned()).spawn(move || side.tell()).is_ok();
    }
}

impl Events for Holder {
    fn integrity(&self, lba: Option<u64>, physical: Option<u64>, reason: &str) {
        let mut waiting = self.side.waiting();
        waiting.findings += 1;
        if waiting.findings <= FINDINGS {
            self.tell(waiting, finding(lba, physical, reason));
        }
    }

    fn note(&self, text: &str) {
        let waiting = self.side.waiting();
        if !waiting.hushed {
            report::note(text);
        }
        self.tell(waiting, text.to_owned());
    }
}

fn finding(lba: Option<u64>, physical: Option<u64>, reason: &str) -> String {
    let block = lba.map(|lba| format!("block {lba}"));
    let store = physical.map(|physical| format!("store block {physical}"));
    let place: Vec<_> = block.into_iter().chain(store).collect();
    if place.is_empty() { format!("integrity: {reason}") } else { format!("integrity: {}: {reason}", place.join(", ")) }
}

impl Side {
    pub(super) fn new(talk: Talk) -> Self {
        Self { talk: Mutex::new(talk), waiting: Mutex::default() }
    }

    /// The conversation, once everything that waits has been told.
    pub(super) fn talk(&self) -> MutexGuard<'_, Talk> {
        let mut talk = self.talk.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            let next = self.waiting().texts.pop_front();
            let Some(text) = next else { return talk };
            talk.tell(&text);
        }
    }

    fn waiting(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells what waits, until nothing does.
    fn tell(&self) {
        loop {
            drop(self.talk());
            let mut waiting = self.waiting();
            waiting.told = !waiting.texts.is_empty();
            if !waiting.told {
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::talk::Answer;
    use super::super::testing::{anchor, answered, framed};
    use super::super::wire::read_message;
    use super::*;
    use std::io::Write;
    use std::os::unix::net::UnixStream;

    #[test]
    fn findings_are_told_up_to_a_limit_and_then_counted() {
        let kept = framed(br#""kept""#).repeat(FINDINGS as usize + 1);
        let heard = answered(&kept, |h| {
            (0..1000).for_each(|lba| h.integrity(Some(lba), None, "its tag"));
            h.finish().expect("all heard");
        });
        let text = String::from_utf8_lossy(&heard);
        assert_eq!(text.matches("integrity: block").count(), FINDINGS as usize);
        assert!(text.contains("integrity: 936 more findings"), "{text}");
    }

    /// The volume's locks are held where an event is noticed: a holder that does not answer must hold up nobody.
    #[test]
    fn an_event_does_not_wait_for_the_holder_and_comes_before_what_is_said_later() {
        let (ours, mut theirs) = UnixStream::pair().expect("a pair");
        let holder = Holder::new(ours).expect("a holder");
        holder.hush();
        let many = WAITING + 100;
        (0..many).for_each(|i| holder.note(&format!("note {i}")));
        let answers = thread::spawn(move || {
            let mut heard = Vec::new();
            while let Ok(text) = read_message(&mut theirs) {
                heard.push(String::from_utf8_lossy(&text).into_owned());
                theirs.write_all(&framed(br#""kept""#)).expect("answered");
            }
            heard
        });
        assert_eq!(holder.anchor(&anchor()), Answer::Kept);
        holder.finish().expect("all heard");
        drop(holder);
        let heard = answers.join().expect("answers");
        let anchored = heard.iter().position(|text| text.contains("anchor")).expect("an anchor");
        assert!(heard[..anchored].iter().enumerate().all(|(i, text)| text.contains(&format!("note {i}"))), "{heard:?}");
        // One of them may be with the thread that tells them while the others wait.
        let lost = many - anchored;
        assert!(anchored == WAITING || anchored == WAITING + 1, "{anchored}");
        assert!(heard[anchored + 1].contains(&format!("{lost} more events")), "{heard:?}");
    }

    #[test]
    fn an_event_that_nobody_takes_is_an_error_at_the_end() {
        answered(&framed(br#"{"refused":"no"}"#), |h| {
            h.integrity(None, None, "something");
            assert!(matches!(h.finish(), Err(HolderError::Unheard(why)) if why == "no"));
        });
    }
}
