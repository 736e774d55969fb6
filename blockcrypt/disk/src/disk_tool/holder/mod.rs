//! The conversation with whoever holds the volume's session with the key provider: `policy::disk` draws it.
//!
//! | module | what it holds |
//! | --- | --- |
//! | `wire` | messages on the socket |
//! | `handover` | what the holder says first |
//! | `talk` | questions and answers |
//! | `events` | what happened to the volume, and waits to be told |
//! | `presence` | whether the holder is still there |
//! | `error` | why the conversation failed |

mod error;
mod events;
mod handover;
mod presence;
mod talk;
#[cfg(test)]
mod testing;
mod wire;

pub(crate) use error::HolderError;
pub(crate) use handover::Handover;
pub(crate) use talk::{Answer, Leave};

use super::report;
use blockcrypt::{AnchorRefused, Anchors};
use events::Side;
use policy::disk::{ToolMessage, VolumeRequest};
use policy::{VolumeAnchor, VolumeId};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use talk::{TEXT, Talk};

/// The holder, to be told of anchors and events.
pub(crate) struct Holder {
    /// To see whether it is still there while the conversation is in use.
    line: UnixStream,
    side: Arc<Side>,
}

impl Holder {
    fn new(stream: UnixStream) -> Result<Self, HolderError> {
        let line = stream.try_clone().map_err(HolderError::Io)?;
        Ok(Self { line, side: Arc::new(Side::new(Talk::new(stream))) })
    }

    /// Asks for `anchor` to be kept.
    pub(crate) fn anchor(&self, anchor: &VolumeAnchor) -> Answer {
        self.side.talk().ask(&ToolMessage::Anchor(anchor.clone()))
    }

    /// Asks whether an operation may be done. Its [`outcome`](Self::outcome) is to follow.
    pub(crate) fn ask(&self, request: VolumeRequest) -> Result<Leave, HolderError> {
        self.side.talk().request(request)
    }

    /// Tells how the operation that was permitted ended.
    pub(crate) fn outcome(&self, done: bool, detail: &str) {
        self.side.talk().inform(&ToolMessage::Outcome { done, detail: report::one_line(detail, TEXT) });
    }

    /// Tells a volume's size. Where that fails, the next command that changes the volume tells it.
    pub(crate) fn size(&self, volume: VolumeId, bytes: u64) {
        if let Answer::Refused(why) | Answer::Unknown(why) = self.side.talk().ask(&ToolMessage::Size { volume, bytes })
        {
            report::note(&format!("the key provider was not told the volume's size: {why}"));
        }
    }
}

impl Anchors for Holder {
    fn keep(&self, anchor: &VolumeAnchor) -> Result<(), AnchorRefused> {
        let mut talk = self.side.talk();
        match talk.ask(&ToolMessage::Anchor(anchor.clone())) {
            Answer::Kept => Ok(()),
            Answer::Unknown(why) if talk.over.is_none() => Err(AnchorRefused::Away(why)),
            // No conversation, no later answer either.
            Answer::Refused(why) | Answer::Unknown(why) => Err(AnchorRefused::Refused(why)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::testing::{anchor, answered, framed};
    use super::*;

    /// The provider may have kept it: it is asked again.
    #[test]
    fn an_anchor_of_which_nothing_is_known_is_not_refused() {
        let answers = [framed(br#"{"unknown":"a proxy\nanswered"}"#), framed(br#""kept""#)].concat();
        answered(&answers, |h| {
            assert!(matches!(h.keep(&anchor()), Err(AnchorRefused::Away(why)) if why == "a proxy answered"));
            assert!(h.keep(&anchor()).is_ok());
        });
    }
}
