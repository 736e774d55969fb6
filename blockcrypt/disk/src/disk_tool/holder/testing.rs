//! The holder's side, for the tests of this folder.

use super::Holder;
use policy::VolumeAnchor;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;

/// A message as it is on the socket.
pub(super) fn framed(text: &[u8]) -> Vec<u8> {
    let mut out = (text.len() as u32).to_be_bytes().to_vec();
    out.extend(text);
    out
}

/// What a holder hears whose answers are `answer`, while we `ask`.
pub(super) fn answered(answer: &[u8], ask: impl FnOnce(&Holder)) -> Vec<u8> {
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

pub(super) fn anchor() -> VolumeAnchor {
    let mut bytes = [0; VolumeAnchor::LENGTH];
    (bytes[0], bytes[23]) = (1, 1);
    VolumeAnchor::from_bytes(&bytes).expect("good")
}
