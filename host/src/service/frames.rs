//! The service's side of a connection: frames of a bounded length that arrive within a bounded time.

use attest::service::frame::MAX_FDS;
use attest::service::{ANSWER_LIMIT, Answer, REQUEST_LIMIT};
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendFlags};
use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

/// How long the rest of a frame may take once its first byte came, and how long an answer may wait for its reader.
const FRAME_TIME: Duration = Duration::from_secs(10);

/// A frame, with the descriptors that came along.
#[derive(Debug)]
pub(super) struct Frame {
    pub(super) bytes: Vec<u8>,
    pub(super) descriptors: Vec<OwnedFd>,
}

/// Whether descriptors are taken from a connection.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Descriptors {
    /// The kernel closes what comes.
    Refused,
    /// At most [`MAX_FDS`].
    Taken,
}

/// Waits for a frame, however long; `None` at the end of the connection. Errors end the connection.
pub(super) fn receive(socket: BorrowedFd<'_>, take: Descriptors) -> io::Result<Option<Frame>> {
    let mut descriptors = Vec::new();
    let mut length = [0; 4];
    let mut receiver = Receiver { socket, take, descriptors: &mut descriptors, deadline: None };
    if !receiver.fill(&mut length)? {
        return Ok(None);
    }
    let length = u32::from_be_bytes(length) as usize;
    if length > REQUEST_LIMIT {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "the request is too long"));
    }
    let mut bytes = vec![0; length];
    if !receiver.fill(&mut bytes)? {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    Ok(Some(Frame { bytes, descriptors }))
}

/// Sends an answer.
pub(super) fn send(socket: BorrowedFd<'_>, answer: &Answer) -> io::Result<()> {
    let json = serde_json::to_vec(answer)?;
    if json.len() > ANSWER_LIMIT {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "the answer is too long"));
    }
    let mut frame = (json.len() as u32).to_be_bytes().to_vec();
    frame.extend_from_slice(&json);
    let deadline = Instant::now() + FRAME_TIME;
    let mut rest = &frame[..];
    while !rest.is_empty() {
        match rustix::net::send(socket, rest, SendFlags::NOSIGNAL | SendFlags::DONTWAIT) {
            Ok(sent) => rest = &rest[sent..],
            Err(Errno::AGAIN) => wait(socket, PollFlags::OUT, Some(deadline))?,
            Err(Errno::INTR) => {}
            Err(e) => return Err(e.into()),
        }
    }
    Ok(())
}

/// Reads all frames that `data` holds, as a connection would bring them.
pub(super) fn fuzz(data: &[u8]) {
    use std::io::Write;
    use std::os::fd::AsFd;
    let Ok((mut client, server)) = std::os::unix::net::UnixStream::pair() else { return };
    let _ = client.write_all(&data[..data.len().min(REQUEST_LIMIT)]);
    drop(client);
    let mut read = 0;
    while let Ok(Some(frame)) = receive(server.as_fd(), Descriptors::Taken) {
        read += 4 + frame.bytes.len();
        assert!(frame.descriptors.is_empty() && read <= data.len());
    }
}

struct Receiver<'a> {
    socket: BorrowedFd<'a>,
    take: Descriptors,
    descriptors: &'a mut Vec<OwnedFd>,
    deadline: Option<Instant>,
}

impl Receiver<'_> {
    /// Fills `buffer`; `false` where the connection ended before its first byte.
    fn fill(&mut self, buffer: &mut [u8]) -> io::Result<bool> {
        let mut filled = 0;
        while filled < buffer.len() {
            wait(self.socket, PollFlags::IN, self.deadline)?;
            match self.some(&mut buffer[filled..]) {
                Ok(0) if filled == 0 => return Ok(false),
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(count) => {
                    filled += count;
                    self.deadline.get_or_insert_with(|| Instant::now() + FRAME_TIME);
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock || e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        Ok(true)
    }

    fn some(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.take == Descriptors::Refused {
            // Without room for them, the kernel closes descriptors that come along.
            return Ok(rustix::net::recv(self.socket, buffer, RecvFlags::DONTWAIT).map(|(count, _)| count)?);
        }
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
        let got = rustix::net::recvmsg(self.socket, &mut [IoSliceMut::new(buffer)], &mut control, flags)?;
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(rights) = message {
                self.descriptors.extend(rights);
            }
        }
        if got.flags.contains(ReturnFlags::CTRUNC) || self.descriptors.len() > MAX_FDS {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "too many descriptors"));
        }
        Ok(got.bytes)
    }
}

fn wait(socket: BorrowedFd<'_>, events: PollFlags, deadline: Option<Instant>) -> io::Result<()> {
    let timeout = match deadline {
        None => None,
        Some(deadline) => {
            let left = deadline.checked_duration_since(Instant::now()).ok_or(io::ErrorKind::TimedOut)?;
            Some(Timespec { tv_sec: left.as_secs() as i64, tv_nsec: i64::from(left.subsec_nanos()) })
        }
    };
    let mut polled = [PollFd::from_borrowed_fd(socket, events)];
    match rustix::event::poll(&mut polled, timeout.as_ref()) {
        Ok(0) => Err(io::ErrorKind::TimedOut.into()),
        Ok(_) | Err(Errno::INTR) => Ok(()),
        Err(e) => Err(e.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;

    #[test]
    fn frames_come_whole_or_not_at_all() {
        let (mut client, server) = UnixStream::pair().expect("a pair");
        client.write_all(&[0, 0, 0, 2, b'{', b'}', 0, 0, 0]).expect("sent");
        let frame = receive(server.as_fd(), Descriptors::Refused).expect("good").expect("a frame");
        assert_eq!(frame.bytes, b"{}");
        drop(client);
        assert!(receive(server.as_fd(), Descriptors::Refused).is_err(), "half a length");
    }

    #[test]
    fn attack_39_a_frame_that_is_too_long_is_refused_before_it_is_read() {
        let (mut client, server) = UnixStream::pair().expect("a pair");
        client.write_all(&u32::MAX.to_be_bytes()).expect("sent");
        assert!(receive(server.as_fd(), Descriptors::Refused).is_err());
    }

    #[test]
    fn the_end_between_frames_is_an_end() {
        let (client, server) = UnixStream::pair().expect("a pair");
        drop(client);
        assert!(receive(server.as_fd(), Descriptors::Taken).expect("good").is_none());
    }

    #[test]
    fn descriptors_come_with_their_message() {
        let (mut client, server) = UnixStream::pair().expect("a pair");
        let file = std::fs::File::open("/proc/self/stat").expect("open");
        let both = [file.as_fd(), file.as_fd()];
        attest::service::frame::write_with_fds(&mut client, &Answer::Done, &both).expect("sent");
        attest::service::frame::write(&mut client, &Answer::Done).expect("sent");
        for count in [2, 0] {
            let frame = receive(server.as_fd(), Descriptors::Taken).expect("good").expect("a frame");
            assert_eq!(serde_json::from_slice::<Answer>(&frame.bytes).ok(), Some(Answer::Done));
            assert_eq!(frame.descriptors.len(), count);
        }
    }
}
