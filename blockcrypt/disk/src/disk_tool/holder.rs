//! The conversation with whoever holds the volume's session with the key provider: `policy::disk` draws it.

use super::report;
use blockcrypt::{AnchorRefused, Anchors, Events, Kek};
use policy::disk::{
    DiskSession, HolderAnswer, MESSAGE_LIMIT, Permit, ToolMessage, VolumeGrant, VolumeOperation, VolumeRequest,
};
use policy::{KeyId, VolumeAnchor, VolumeId};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use secretmem::{Secret, SecretError};
use std::collections::VecDeque;
use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

/// How often it is looked whether the holder is still there, and how long after it has left work may still end by itself.
const LOOK: Duration = Duration::from_millis(200);
const GRACE: Duration = Duration::from_millis(500);

/// How long the holder may take to hand over the volume.
const HANDOVER: Duration = Duration::from_secs(60);
/// How long it may take to answer: it asks the key provider first, and again while that is away.
const ANSWER: Duration = Duration::from_secs(300);
/// Findings that are told one by one; of further ones only the number. A store that is wrong everywhere has millions.
const FINDINGS: u64 = 64;
/// Events that wait while the holder is busy; of further ones only the number is told.
const WAITING: usize = 256;
/// The longest text of an event, in bytes: what the key provider takes.
const TEXT: usize = 500;

/// Why the conversation with the holder failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum HolderError {
    #[error("the key holder hung up before it handed over the volume's key; see what it says")]
    NoHandover,
    #[error("the key holder's hand-over broke off in {0}; let fealty-keys volume exec start this")]
    Truncated(&'static str),
    #[error("the key holder sent nothing for {} s; stop it and start again", HANDOVER.as_secs())]
    Silent,
    #[error("the key holder's message has {0} bytes; 1 to {MESSAGE_LIMIT} are allowed")]
    Length(u32),
    #[error("the key holder's message can't be read; let a fealty-keys of this version start this")]
    Message(#[source] serde_json::Error),
    #[error("the conversation with the key holder failed")]
    Io(#[source] io::Error),
    #[error("no memory for the volume's key")]
    Secret(#[from] SecretError),
    #[error("the key holder is gone, and with it the right to use the volume; start again")]
    Gone,
    #[error("the audit log did not take what was found: {0}; repeat this when it does")]
    Unheard(String),
    #[error("{0} is not permitted, and nothing was done: {1}")]
    Forbidden(VolumeOperation, String),
    #[error(
        "whether {0} is permitted is not known: {1}; nothing was done here, but the key provider may have done its part: start again"
    )]
    NoPermit(VolumeOperation, String),
}

/// What the holder hands over.
pub(crate) struct Handover {
    pub(crate) grant: VolumeGrant,
    pub(crate) kek: Kek,
    pub(crate) holder: Arc<Holder>,
    /// The volume's size as the provider knows it, in bytes.
    pub(crate) size: Option<u64>,
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

impl Handover {
    /// Takes the hand-over from `stream`; the key goes from the socket straight into locked memory.
    pub(crate) fn receive(stream: UnixStream) -> Result<Self, HolderError> {
        stream.set_read_timeout(Some(HANDOVER)).map_err(HolderError::Io)?;
        stream.set_write_timeout(Some(HANDOVER)).map_err(HolderError::Io)?;
        let (session, key) = read_handover(&mut &stream)?;
        stream.set_read_timeout(Some(ANSWER)).map_err(HolderError::Io)?;
        let kek = Kek::new(session.grant.kek_id, key);
        let holder = Arc::new(Holder::new(stream)?);
        Ok(Self { grant: session.grant, kek, holder, size: session.size })
    }
}

fn read_handover(from: &mut impl Read) -> Result<(DiskSession, Secret<32>), HolderError> {
    let text = read_message(from)?;
    let session = serde_json::from_slice(&text).map_err(HolderError::Message)?;
    let mut key = Secret::<32>::zeroed()?;
    read_part(from, key.expose_mut(), "the key")?;
    Ok((session, key))
}

/// One message's JSON, at most [`MESSAGE_LIMIT`] bytes.
fn read_message(from: &mut impl Read) -> Result<Vec<u8>, HolderError> {
    let mut length = [0; 4];
    let first = loop {
        match from.read(&mut length) {
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            other => break other.map_err(broken("its length"))?,
        }
    };
    if first == 0 {
        return Err(HolderError::NoHandover);
    }
    read_part(from, &mut length[first..], "its length")?;
    let length = u32::from_be_bytes(length);
    if length == 0 || length as usize > MESSAGE_LIMIT {
        return Err(HolderError::Length(length));
    }
    let mut text = vec![0; length as usize];
    read_part(from, &mut text, "its text")?;
    Ok(text)
}

fn read_part(from: &mut impl Read, part: &mut [u8], what: &'static str) -> Result<(), HolderError> {
    from.read_exact(part).map_err(broken(what))
}

fn broken(what: &'static str) -> impl FnOnce(io::Error) -> HolderError {
    move |error| match error.kind() {
        ErrorKind::UnexpectedEof | ErrorKind::ConnectionReset => HolderError::Truncated(what),
        ErrorKind::WouldBlock | ErrorKind::TimedOut => HolderError::Silent,
        _ => HolderError::Io(error),
    }
}

/// The holder, to be told of anchors and events.
pub(crate) struct Holder {
    /// To see whether it is still there while the conversation is in use.
    line: UnixStream,
    side: Arc<Side>,
}

/// Our side of the conversation.
struct Side {
    talk: Mutex<Talk>,
    waiting: Mutex<Waiting>,
}

struct Talk {
    stream: UnixStream,
    /// Why no more can be said.
    over: Option<String>,
    /// Why an event is not in the audit log.
    unheard: Option<String>,
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

impl Holder {
    fn new(stream: UnixStream) -> Result<Self, HolderError> {
        let line = stream.try_clone().map_err(HolderError::Io)?;
        let talk = Mutex::new(Talk { stream, over: None, unheard: None });
        Ok(Self { line, side: Arc::new(Side { talk, waiting: Mutex::default() }) })
    }

    /// Whether the holder is still there: without it, the right to use the volume ends.
    pub(crate) fn still_there(&self) -> Result<(), HolderError> {
        let mut line = [PollFd::new(&self.line, PollFlags::RDHUP)];
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        match poll(&mut line, Some(&now)) {
            Ok(0) | Err(rustix::io::Errno::INTR) => Ok(()),
            _ => Err(HolderError::Gone),
        }
    }

    /// Does `work`, which may be long and tell the holder nothing, and has it `cut_off` if the holder leaves meanwhile: the volume
    /// may be another's then, and what he writes would be written over.
    ///
    /// # Errors
    /// The system's, if it has no thread to watch: then nothing is done.
    pub(crate) fn while_there<R>(
        &self,
        work: impl FnOnce() -> R,
        cut_off: impl FnOnce(HolderError) + Send,
    ) -> io::Result<R> {
        let over = AtomicBool::new(false);
        thread::scope(|scope| {
            let watch = || {
                while !over.load(Ordering::Acquire) {
                    thread::park_timeout(LOOK);
                    let Err(gone) = self.still_there() else { continue };
                    // Work that ends by itself says how.
                    thread::park_timeout(GRACE);
                    if !over.load(Ordering::Acquire) {
                        cut_off(gone);
                    }
                    return;
                }
            };
            let watch = thread::Builder::new().name("holder".to_owned()).spawn_scoped(scope, watch)?;
            let _over = Over(&over, watch.thread());
            Ok(work())
        })
    }

    /// Asks for `anchor` to be kept.
    pub(crate) fn anchor(&self, anchor: &VolumeAnchor) -> Answer {
        self.side.talk().ask(&ToolMessage::Anchor(anchor.clone()))
    }

    /// Asks whether an operation may be done. Its [`outcome`](Self::outcome) is to follow.
    pub(crate) fn ask(&self, request: VolumeRequest) -> Result<Leave, HolderError> {
        let operation = request.operation;
        let unknown = |why: String| HolderError::NoPermit(operation, why);
        let mut talk = self.side.talk();
        match talk.exchange_once(&ToolMessage::Operation(request)).map_err(unknown)? {
            HolderAnswer::Refused(why) => Err(HolderError::Forbidden(operation, report::one_line(&why, TEXT))),
            HolderAnswer::Permitted(permit) => {
                talk.leave(permit).inspect_err(|error| _ = talk.end(&report::chain(error)))
            }
            HolderAnswer::Unknown(why) => Err(unknown(report::one_line(&why, TEXT))),
            HolderAnswer::Kept => Err(unknown("the key holder's answer makes no sense".to_owned())),
        }
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

/// Says when work is over, also where it panics, lest it be watched for ever.
struct Over<'a>(&'a AtomicBool, &'a thread::Thread);

impl Drop for Over<'_> {
    fn drop(&mut self) {
        let Self(over, watch) = self;
        over.store(true, Ordering::Release);
        watch.unpark();
    }
}

impl Side {
    /// The conversation, once everything that waits has been told.
    fn talk(&self) -> MutexGuard<'_, Talk> {
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

impl AsFd for Holder {
    /// What hangs up when the holder leaves. Not to be read.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.line.as_fd()
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

impl Talk {
    fn tell(&mut self, text: &str) {
        self.inform(&ToolMessage::Event(report::one_line(text, TEXT)));
    }

    /// For the audit log: what it does not take, is remembered.
    fn inform(&mut self, message: &ToolMessage) {
        if let Answer::Refused(why) | Answer::Unknown(why) = self.ask(message) {
            self.unheard.get_or_insert(why);
        }
    }

    fn ask(&mut self, message: &ToolMessage) -> Answer {
        match self.exchange_once(message) {
            Ok(HolderAnswer::Kept) => Answer::Kept,
            Ok(HolderAnswer::Refused(why)) => Answer::Refused(report::one_line(&why, TEXT)),
            Ok(HolderAnswer::Unknown(why)) => Answer::Unknown(report::one_line(&why, TEXT)),
            Ok(HolderAnswer::Permitted(_)) => Answer::Unknown(self.end("the key holder's answer makes no sense")),
            Err(why) => Answer::Unknown(why),
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
    use super::*;
    use policy::disk::CipherSuite;
    use policy::{AnchorMode, KeyId, OpenNumber, VolumeId};
    use std::panic::{AssertUnwindSafe, catch_unwind};
    use std::sync::mpsc::RecvTimeoutError;

    fn session() -> DiskSession {
        let grant = VolumeGrant {
            volume: VolumeId([7; 16]),
            customer: "acme".parse().expect("a name"),
            cipher: CipherSuite::Aes256XtsHmacSha256,
            kek_id: KeyId(1),
            key_id: KeyId(2),
            open_number: OpenNumber::try_from(3).expect("a number"),
            anchor: None,
            anchor_mode: AnchorMode::Interval,
        };
        DiskSession { grant, size: Some(1 << 30) }
    }

    fn framed(text: &[u8]) -> Vec<u8> {
        let mut out = (text.len() as u32).to_be_bytes().to_vec();
        out.extend(text);
        out
    }

    fn handover() -> Vec<u8> {
        let mut out = framed(&serde_json::to_vec(&session()).expect("JSON"));
        out.extend([0x5a; 32]);
        out
    }

    #[test]
    fn a_handover_is_read_to_its_last_byte() {
        let bytes = handover();
        let mut rest = &bytes[..];
        let (read, key) = read_handover(&mut rest).expect("good");
        assert!(read == session() && key.expose() == &[0x5a; 32] && rest.is_empty());
    }

    #[test]
    fn a_handover_cut_anywhere_is_refused() {
        let bytes = handover();
        assert!(matches!(read_handover(&mut &bytes[..0]), Err(HolderError::NoHandover)));
        for end in 1..bytes.len() {
            assert!(matches!(read_handover(&mut &bytes[..end]), Err(HolderError::Truncated(_))), "{end}");
        }
    }

    #[test]
    fn a_length_beyond_the_limit_reads_nothing_more() {
        for length in [0, MESSAGE_LIMIT as u32 + 1, u32::MAX] {
            let mut bytes = length.to_be_bytes().to_vec();
            bytes.extend([b' '; 8]);
            let mut rest = &bytes[..];
            assert!(matches!(read_handover(&mut rest), Err(HolderError::Length(n)) if n == length));
            assert_eq!(rest.len(), 8);
        }
    }

    /// Whatever comes: an error or a session, never a panic and never more than the limit. Seeds are a good hand-over and its
    /// relatives; mutations overwrite, cut, double and insert.
    #[test]
    fn no_handover_breaks_the_parser() {
        let unknown = framed(br#"{"grant":{},"more":1}"#);
        let seeds = [handover(), unknown, framed(b"null"), framed(b"[[[[[[[["), vec![0xff; 64]];
        let mut state = 0x9e37_79b9_7f4a_7c15_u64;
        let mut random = |below: usize| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state % below.max(1) as u64) as usize
        };
        let mut good = 0;
        for round in 0..20_000 {
            let mut bytes = seeds[round % seeds.len()].clone();
            for _ in 0..random(4) {
                let at = random(bytes.len());
                match random(4) {
                    0 => bytes[at] = random(256) as u8,
                    1 => bytes.truncate(at.max(1)),
                    2 => bytes.insert(at, random(256) as u8),
                    _ => bytes.extend_from_within(at..),
                }
            }
            good += usize::from(read_handover(&mut &bytes[..]).is_ok());
        }
        assert!(good > 0, "the unmutated seed passes");
    }

    fn answered(answer: &[u8], ask: impl FnOnce(&Holder)) -> Vec<u8> {
        let (ours, mut theirs) = UnixStream::pair().expect("a pair");
        theirs.write_all(answer).expect("written");
        theirs.shutdown(std::net::Shutdown::Write).expect("shut");
        let holder = Holder::new(ours).expect("a holder");
        ask(&holder);
        drop(holder);
        let mut heard = Vec::new();
        // An end that was closed with something unread says so once, before what it had sent.
        if theirs.read_to_end(&mut heard).is_err() {
            theirs.read_to_end(&mut heard).expect("read");
        }
        heard
    }

    fn anchor() -> VolumeAnchor {
        let mut bytes = [0; VolumeAnchor::LENGTH];
        (bytes[0], bytes[23]) = (1, 1);
        VolumeAnchor::from_bytes(&bytes).expect("good")
    }

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

    /// The provider may have kept it: it is asked again.
    #[test]
    fn an_anchor_of_which_nothing_is_known_is_not_refused() {
        let answers = [framed(br#"{"unknown":"a proxy\nanswered"}"#), framed(br#""kept""#)].concat();
        answered(&answers, |h| {
            assert!(matches!(h.keep(&anchor()), Err(AnchorRefused::Away(why)) if why == "a proxy answered"));
            assert!(h.keep(&anchor()).is_ok());
        });
    }

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

    #[test]
    fn a_holder_that_leaves_is_noticed() {
        let (ours, theirs) = UnixStream::pair().expect("a pair");
        let holder = Holder::new(ours).expect("a holder");
        holder.still_there().expect("there");
        drop(theirs);
        assert!(matches!(holder.still_there(), Err(HolderError::Gone)));
    }

    #[test]
    fn work_is_cut_off_when_the_holder_leaves_and_not_before() {
        let (ours, theirs) = UnixStream::pair().expect("a pair");
        let holder = Holder::new(ours).expect("a holder");
        let (told, heard) = std::sync::mpsc::channel();
        let cut_off = |gone: HolderError| told.send(gone.to_string()).expect("somebody hears");
        let pause = 2 * (LOOK + GRACE);
        let waited = holder.while_there(|| heard.recv_timeout(pause), cut_off).expect("watched");
        assert_eq!(waited, Err(RecvTimeoutError::Timeout));
        drop(theirs);
        let said = holder.while_there(|| heard.recv(), cut_off).expect("watched").expect("cut off");
        assert!(said.contains("the key holder is gone"), "{said}");
    }

    #[test]
    fn work_that_panics_is_watched_no_longer() {
        let (ours, _theirs) = UnixStream::pair().expect("a pair");
        let holder = Holder::new(ours).expect("a holder");
        let panics = || holder.while_there(|| panic!("its own"), |_| ());
        assert!(catch_unwind(AssertUnwindSafe(panics)).is_err());
    }
}
