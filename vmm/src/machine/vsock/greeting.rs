//! The line with which a client of the host's socket says what it wants.

use rustix::net::{RecvFlags, recv};
use std::os::fd::OwnedFd;

/// The longest line, with its end.
const LONGEST: usize = 32;

/// What a client wants.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Greeting {
    /// To be connected to this port of the guest.
    Connect(u32),
    /// The next connection of the guest to this port.
    Listen(u32),
}

/// How far a client is.
pub(super) enum Heard {
    /// It has said it.
    Greeting(Greeting),
    /// The line is not whole.
    NotYet,
    /// It says something else, or hung up.
    Nonsense,
}

/// A client that has not said it yet.
pub(super) struct Silent {
    pub(super) client: OwnedFd,
    line: Vec<u8>,
}

impl Silent {
    /// A client that was just let in.
    pub(super) fn new(client: OwnedFd) -> Self {
        Self { client, line: vec![] }
    }

    /// Takes what there is of its line, and no byte that follows it.
    pub(super) fn hear(&mut self) -> Heard {
        while self.line.len() < LONGEST {
            let mut byte = [0];
            match recv(&self.client, &mut byte[..], RecvFlags::empty()) {
                Ok((1, _)) if byte == *b"\n" => return parse(&self.line).map_or(Heard::Nonsense, Heard::Greeting),
                Ok((1, _)) => self.line.extend(byte),
                Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => return Heard::NotYet,
                Ok(_) | Err(_) => return Heard::Nonsense,
            }
        }
        Heard::Nonsense
    }
}

/// The greeting in a line without its end.
pub(super) fn parse(line: &[u8]) -> Option<Greeting> {
    let text = std::str::from_utf8(line).ok()?;
    let (word, port) = text.split_once(' ')?;
    let digits = !port.is_empty() && port.bytes().all(|byte| byte.is_ascii_digit());
    let port = port.parse().ok().filter(|_| digits)?;
    match word {
        "CONNECT" => Some(Greeting::Connect(port)),
        "LISTEN" => Some(Greeting::Listen(port)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_greeting_is_a_word_and_a_port() {
        assert_eq!(parse(b"CONNECT 1234"), Some(Greeting::Connect(1234)));
        assert_eq!(parse(b"LISTEN 4294967295"), Some(Greeting::Listen(u32::MAX)));
        let bad: [&[u8]; 9] = [
            b"",
            b"CONNECT",
            b"CONNECT ",
            b"CONNECT +1",
            b"CONNECT -1",
            b"CONNECT 4294967296",
            b"connect 1",
            b"CONNECT  1",
            b"\xff 1",
        ];
        for line in bad {
            assert_eq!(parse(line), None, "{line:?}");
        }
    }
}
