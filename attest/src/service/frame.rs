//! Frames of the TPM service's sockets: a big-endian `u32` length and that many bytes of JSON. Descriptors travel with
//! the first byte of a frame.

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::io::{self, ErrorKind, IoSlice, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;

/// The most descriptors a frame may bring.
pub const MAX_FDS: usize = 2;

/// A frame that did not come, or is none.
#[derive(Debug, thiserror::Error)]
pub enum FrameError {
    /// The other side is gone: an orderly end between two frames.
    #[error("the other side closed the socket")]
    Closed,
    /// A read or write failed, or timed out.
    #[error("the socket failed")]
    Io(#[source] io::Error),
    /// A length above what this side takes.
    #[error("a message of {0} bytes is longer than the {1} allowed")]
    TooLong(usize, usize),
    /// Bytes that are not the message they should be.
    #[error("a message can't be read")]
    Json(#[source] serde_json::Error),
}

/// Writes one message.
pub fn write<T: Serialize>(stream: &mut impl Write, message: &T) -> Result<(), FrameError> {
    stream.write_all(&encode(message)?).map_err(FrameError::Io)
}

/// Reads one message of at most `limit` bytes.
pub fn read<T: DeserializeOwned>(stream: &mut impl Read, limit: usize) -> Result<T, FrameError> {
    let mut length = [0; 4];
    let got = read_some(stream, &mut length)?;
    stream.read_exact(&mut length[got..]).map_err(FrameError::Io)?;
    read_body(stream, length, limit)
}

/// Writes one message with descriptors (at most [`MAX_FDS`]) beside it.
pub fn write_with_fds<T: Serialize>(
    stream: &mut UnixStream,
    message: &T,
    fds: &[BorrowedFd<'_>],
) -> Result<(), FrameError> {
    let bytes = encode(message)?;
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if fds.len() > MAX_FDS || !ancillary.push(SendAncillaryMessage::ScmRights(fds)) {
        return Err(FrameError::Io(ErrorKind::InvalidInput.into()));
    }
    let flags = SendFlags::NOSIGNAL;
    let sent = rustix::net::sendmsg(stream.as_fd(), &[IoSlice::new(&bytes)], &mut ancillary, flags)
        .map_err(|e| FrameError::Io(e.into()))?;
    stream.write_all(&bytes[sent..]).map_err(FrameError::Io)
}

fn encode<T: Serialize>(message: &T) -> Result<Vec<u8>, FrameError> {
    let mut bytes = vec![0; 4];
    serde_json::to_writer(&mut bytes, message).map_err(FrameError::Json)?;
    let body = bytes.len() - 4;
    let length = u32::try_from(body).map_err(|_| FrameError::TooLong(body, u32::MAX as usize))?;
    bytes[..4].copy_from_slice(&length.to_be_bytes());
    Ok(bytes)
}

fn read_some(stream: &mut impl Read, buffer: &mut [u8]) -> Result<usize, FrameError> {
    loop {
        match stream.read(buffer) {
            Ok(0) => return Err(FrameError::Closed),
            Ok(count) => return Ok(count),
            Err(e) if e.kind() == ErrorKind::Interrupted => {}
            Err(e) => return Err(FrameError::Io(e)),
        }
    }
}

fn read_body<T: DeserializeOwned>(stream: &mut impl Read, length: [u8; 4], limit: usize) -> Result<T, FrameError> {
    let length = u32::from_be_bytes(length) as usize;
    if length > limit {
        return Err(FrameError::TooLong(length, limit));
    }
    let mut body = Vec::new();
    // Grows with what comes, not with what was announced.
    stream.take(length as u64).read_to_end(&mut body).map_err(FrameError::Io)?;
    if body.len() < length {
        return Err(FrameError::Io(ErrorKind::UnexpectedEof.into()));
    }
    serde_json::from_slice(&body).map_err(FrameError::Json)
}

#[cfg(test)]
mod tests {
    use super::super::{REQUEST_LIMIT, VmRequest};
    use super::*;

    #[test]
    fn messages_come_through_in_order() {
        let (mut a, mut b) = UnixStream::pair().expect("pair");
        write(&mut a, &VmRequest::Identity).expect("written");
        write(&mut a, &VmRequest::Ecdh { point: vec![4; 65].into() }).expect("written");
        drop(a);
        assert_eq!(read::<VmRequest>(&mut b, REQUEST_LIMIT).ok(), Some(VmRequest::Identity));
        assert!(matches!(read::<VmRequest>(&mut b, REQUEST_LIMIT), Ok(VmRequest::Ecdh { .. })));
        assert!(matches!(read::<VmRequest>(&mut b, REQUEST_LIMIT), Err(FrameError::Closed)));
    }

    #[test]
    fn attack_39_what_is_too_long_cut_or_unknown_is_refused() {
        let read = |bytes: &[u8]| read::<VmRequest>(&mut &bytes[..], 64);
        assert!(matches!(read(&[0, 0, 0, 65]), Err(FrameError::TooLong(65, 64))));
        assert!(matches!(read(&[0xff; 4]), Err(FrameError::TooLong(..))));
        assert!(matches!(read(&[0, 0, 0, 2, b'{']), Err(FrameError::Io(_))));
        assert!(matches!(read(&[0, 0]), Err(FrameError::Io(_))));
        let message = br#"{"request":"ecdh","point":"","x":1}"#;
        assert!(matches!(read(&[&[0, 0, 0, message.len() as u8], &message[..]].concat()), Err(FrameError::Json(_))));
    }
}
