//! One message after the other, and what the holder answers to each.

use super::super::report;
use super::error::HolderError;
use super::wire::{read_message, read_part};
use blockcrypt::Kek;
use policy::KeyId;
use policy::disk::{HolderAnswer, MESSAGE_LIMIT, Permit, ToolMessage, VolumeGrant, VolumeRequest};
use secretmem::Secret;
use std::io::{self, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

/// How long the holder may take to answer: it asks the key provider first, and again while that is away.
pub(super) const ANSWER: Duration = Duration::from_secs(300);
/// The longest text of an event, in bytes: what the key provider takes.
pub(super) const TEXT: usize = 500;

/// What came of a message.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Answer {
    /// The holder did what was asked.
    Kept,
    /// It refused, and why.
    Refused(String),
    /// There was no answer, or only that nobody knows: whether it did it is not known.
    Unknown(String),
}

/// What comes with a permission.
pub(crate) enum Leave {
    Plain,
    /// For a rekey: the key id for new writes.
    Key(KeyId),
    /// For a rewrap: the next key-encryption key.
    Kek(Kek),
    /// For a clone: its grant and its key-encryption key.
    Clone(Box<VolumeGrant>, Kek),
}

/// The conversation.
pub(super) struct Talk {
    stream: UnixStream,
    /// Why no more can be said.
    pub(super) over: Option<String>,
    /// Why an event is not in the audit log.
    pub(super) unheard: Option<String>,
}

impl Talk {
    pub(super) fn new(stream: UnixStream) -> Self {
        Self { stream, over: None, unheard: None }
    }

    pub(super) fn tell(&mut self, text: &str) {
        self.inform(&ToolMessage::Event(report::one_line(text, TEXT)));
    }

    /// For the audit log: what it does not take, is remembered.
    pub(super) fn inform(&mut self, message: &ToolMessage) {
        if let Answer::Refused(why) | Answer::Unknown(why) = self.ask(message) {
            self.unheard.get_or_insert(why);
        }
    }

    pub(super) fn ask(&mut self, message: &ToolMessage) -> Answer {
        match self.exchange_once(message) {
            Ok(HolderAnswer::Kept) => Answer::Kept,
            Ok(HolderAnswer::Refused(why)) => Answer::Refused(report::one_line(&why, TEXT)),
            Ok(HolderAnswer::Unknown(why)) => Answer::Unknown(report::one_line(&why, TEXT)),
            Ok(HolderAnswer::Permitted(_)) => Answer::Unknown(self.end("the key holder's answer makes no sense")),
            Err(why) => Answer::Unknown(why),
        }
    }

    /// Asks whether an operation may be done, and takes what comes with the permission.
    pub(super) fn request(&mut self, request: VolumeRequest) -> Result<Leave, HolderError> {
        let operation = request.operation;
        let unknown = |why: String| HolderError::NoPermit(operation, why);
        match self.exchange_once(&ToolMessage::Operation(request)).map_err(unknown)? {
            HolderAnswer::Refused(why) => Err(HolderError::Forbidden(operation, report::one_line(&why, TEXT))),
            HolderAnswer::Permitted(permit) => {
                self.leave(permit).inspect_err(|error| _ = self.end(&report::chain(error)))
            }
            HolderAnswer::Unknown(why) => Err(unknown(report::one_line(&why, TEXT))),
            HolderAnswer::Kept => Err(unknown("the key holder's answer makes no sense".to_owned())),
        }
    }

    /// An answer, or why there is none: then there is none to any later message either.
    fn exchange_once(&mut self, message: &ToolMessage) -> Result<HolderAnswer, String> {
        match &self.over {
            Some(why) => Err(why.clone()),
            None => self.exchange(message).map_err(|error| self.end(&report::chain(&error))),
        }
    }

    fn end(&mut self, why: &str) -> String {
        self.over = Some(why.to_owned());
        why.to_owned()
    }

    /// What a permission brings along; a key goes from the socket straight into locked memory.
    fn leave(&mut self, permit: Permit) -> Result<Leave, HolderError> {
        let mut key = || {
            let mut key = Secret::<32>::zeroed()?;
            read_part(&mut self.stream, key.expose_mut(), "the key")?;
            Ok::<_, HolderError>(key)
        };
        Ok(match permit {
            Permit::Plain => Leave::Plain,
            Permit::Key(id) => Leave::Key(id),
            Permit::Kek(id) => Leave::Kek(Kek::new(id, key()?)),
            Permit::Clone(grant) => {
                let kek = Kek::new(grant.kek_id, key()?);
                Leave::Clone(Box::new(grant), kek)
            }
        })
    }

    fn exchange(&mut self, message: &ToolMessage) -> Result<HolderAnswer, ExchangeError> {
        let text = serde_json::to_vec(message).map_err(ExchangeError::Message)?;
        let length = u32::try_from(text.len()).ok().filter(|n| *n as usize <= MESSAGE_LIMIT);
        let length = length.ok_or(ExchangeError::TooLong)?;
        let mut framed = length.to_be_bytes().to_vec();
        framed.extend(text);
        self.stream.write_all(&framed).map_err(ExchangeError::Io)?;
        let answer = read_message(&mut self.stream).map_err(|error| match error {
            HolderError::Io(error) => ExchangeError::Io(error),
            HolderError::Silent => ExchangeError::Silent,
            HolderError::NoHandover | HolderError::Truncated(_) => ExchangeError::Gone,
            _ => ExchangeError::Nonsense,
        })?;
        serde_json::from_slice(&answer).map_err(ExchangeError::Message)
    }
}

/// Why a message got no answer.
#[derive(Debug, thiserror::Error)]
enum ExchangeError {
    #[error("the key holder hung up without an answer")]
    Gone,
    #[error("the key holder gave no answer for {} s", ANSWER.as_secs())]
    Silent,
    #[error("the key holder's answer makes no sense")]
    Nonsense,
    #[error("a message for the key holder is too long")]
    TooLong,
    #[error("the key holder's answer can't be read")]
    Message(#[source] serde_json::Error),
    #[error("the conversation with the key holder failed")]
    Io(#[source] io::Error),
}

#[cfg(test)]
mod tests {
    use super::super::Holder;
    use super::super::testing::{anchor, answered, framed};
    use super::*;
    use policy::disk::VolumeOperation;

    #[test]
    fn only_a_clear_yes_is_a_yes() {
        answered(&framed(br#""kept""#), |h| assert_eq!(h.anchor(&anchor()), Answer::Kept));
        let refused = framed(br#"{"refused":"another\nholder"}"#);
        answered(&refused, |h| assert_eq!(h.anchor(&anchor()), Answer::Refused("another holder".into())));
        for nonsense in [&b""[..], &[0, 0], &framed(b"\"yes\""), &[0xff; 8], &framed(b"")] {
            answered(nonsense, |h| {
                assert!(matches!(h.anchor(&anchor()), Answer::Unknown(_)));
                assert!(matches!(h.anchor(&anchor()), Answer::Unknown(_)), "and so it stays");
            });
        }
    }

    #[test]
    fn a_permission_brings_its_key_to_the_last_byte() {
        let ask = |h: &Holder| h.ask(VolumeRequest::plain(VolumeOperation::Rewrap));
        let permit = serde_json::to_vec(&HolderAnswer::Permitted(Permit::Kek(KeyId(7)))).expect("JSON");
        let with = |key: &[u8]| [&framed(&permit), key].concat();
        answered(&with(&[0x5a; 32]), |h| assert!(matches!(ask(h), Ok(Leave::Kek(kek)) if kek.id() == KeyId(7))));
        for cut in [0, 1, 31] {
            answered(&with(&[0x5a; 32][..cut]), |h| {
                assert!(matches!(ask(h), Err(HolderError::Truncated("the key"))));
                assert!(matches!(h.anchor(&anchor()), Answer::Unknown(_)), "no conversation after that");
            });
        }
        answered(&framed(br#"{"refused":"no"}"#), |h| {
            assert!(matches!(ask(h), Err(HolderError::Forbidden(_, why)) if why == "no"))
        });
        answered(&framed(br#"{"unknown":"no answer"}"#), |h| {
            assert!(matches!(ask(h), Err(HolderError::NoPermit(_, why)) if why == "no answer"))
        });
        for nonsense in [&b""[..], &framed(br#""kept""#), &framed(br#"{"permitted":"all"}"#)] {
            answered(nonsense, |h| assert!(matches!(ask(h), Err(HolderError::NoPermit(..)))));
        }
        answered(&with(&[]), |h| {
            assert!(matches!(h.anchor(&anchor()), Answer::Unknown(_)), "a permission keeps nothing")
        });
    }
}
