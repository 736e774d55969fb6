//! The control socket of `serve`: what is done to a volume while it is lent, and `resize --served`, which asks for it.
//!
//! ```text
//! client -> server   one line: {"resize":{"volume":UUID,"size":BYTES}}
//! server -> client   one line: {"done":{"size":BYTES,"room":BYTES}} or {"refused":"why"}
//! ```
//!
//! A connection is one request. Whoever can connect (mode 0600) can use the disk as well.

use super::error::ToolError;
use super::holder::Holder;
use super::report;
use blockcrypt::Volume;
use fealty_disk::Socket;
use policy::VolumeId;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::io::{self, Read, Write};
use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// The longest line, in bytes.
const LINE: usize = 4096;
/// How long a client may take for its request, and for taking in the answer.
const TALK: Duration = Duration::from_secs(2);
/// How long the server may take: it waits for requests under way, and perhaps for the key provider.
const ANSWER: Duration = Duration::from_secs(300);

/// Why a server that has the volume open did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ControlError {
    #[error("no server answers at {0}; name the --control socket of the one that serves the volume")]
    Connect(PathBuf, #[source] io::Error),
    #[error("the conversation with the server at {0} failed; look at what it says, and whether it has grown")]
    Talk(PathBuf, #[source] io::Error),
    #[error("the server refused: {0}")]
    Refused(String),
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
enum Request {
    Resize { volume: VolumeId, size: u64 },
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
enum Answer {
    Done { size: u64, room: u64 },
    Refused(String),
}

/// Does what is asked for on `socket`, one request after the other, until one of `until` has hung up.
pub(super) fn attend(volume: &Volume, holder: &Holder, socket: &Socket, until: &[BorrowedFd<'_>]) {
    loop {
        match socket.accept(until) {
            Ok(Some(stream)) => {
                // Whoever goes away without an answer can ask what the volume's size is.
                let _ = converse(volume, holder, &stream);
            }
            Ok(None) => return,
            Err(error) => return report::line(&format!("the control socket is not served any more: {error}")),
        }
    }
}

/// Asks the server at `socket` to make `volume` as large as `size` bytes; the size that it has then, and the room beyond.
pub(super) fn resize(socket: &Path, volume: VolumeId, size: u64) -> Result<(u64, u64), ToolError> {
    let failed = |e| ControlError::Talk(socket.to_owned(), e);
    let stream = UnixStream::connect(socket).map_err(|e| ControlError::Connect(socket.to_owned(), e))?;
    say(&stream, &Request::Resize { volume, size }).map_err(failed)?;
    match hear(&stream, ANSWER).map_err(failed)? {
        Answer::Done { size, room } => Ok((size, room)),
        Answer::Refused(why) => Err(ControlError::Refused(report::one_line(&why, LINE)).into()),
    }
}

fn converse(volume: &Volume, holder: &Holder, stream: &UnixStream) -> io::Result<()> {
    stream.set_write_timeout(Some(TALK))?;
    let answer = match hear(stream, TALK) {
        Ok(request) => perform(volume, holder, &request).unwrap_or_else(Answer::Refused),
        Err(error) => Answer::Refused(format!("the request can't be read: {error}")),
    };
    say(stream, &answer)
}

fn perform(volume: &Volume, holder: &Holder, request: &Request) -> Result<Answer, String> {
    let Request::Resize { volume: id, size } = request;
    if *id != volume.id() {
        return Err(format!("volume {} is served here, not {id}", volume.id()));
    }
    if *size < volume.size() {
        return Err(format!("it has {} bytes; to make it smaller, stop the server first", volume.size()));
    }
    let before = volume.size();
    let grown = volume.grow(*size);
    if volume.size() != before {
        // Also where only its anchor is still to be kept.
        holder.size(volume.id(), volume.size());
    }
    grown.map_err(|error| report::chain(&error))?;
    let info = volume.info();
    Ok(Answer::Done { size: info.size, room: info.room })
}

fn say(mut stream: &UnixStream, message: &impl Serialize) -> io::Result<()> {
    let mut line = serde_json::to_vec(message)?;
    line.push(b'\n');
    stream.write_all(&line)
}

/// A line, which must be whole after `patience`, in however many pieces it comes.
fn hear<T: DeserializeOwned>(mut stream: &UnixStream, patience: Duration) -> io::Result<T> {
    let (begun, mut line, mut piece) = (Instant::now(), Vec::new(), [0; LINE]);
    while !line.ends_with(b"\n") {
        let left = patience.saturating_sub(begun.elapsed());
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        stream.set_read_timeout(Some(left))?;
        let read = stream.read(&mut piece)?;
        line.extend_from_slice(&piece[..read]);
        if read == 0 || line.len() > LINE {
            return Err(io::ErrorKind::InvalidData.into());
        }
    }
    Ok(serde_json::from_slice(&line)?)
}
