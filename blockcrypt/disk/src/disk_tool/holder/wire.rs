//! Messages on the socket: their length in four bytes, then JSON.

use super::error::HolderError;
use policy::disk::MESSAGE_LIMIT;
use std::io::{self, ErrorKind, Read};

/// One message's JSON, at most [`MESSAGE_LIMIT`] bytes.
pub(super) fn read_message(from: &mut impl Read) -> Result<Vec<u8>, HolderError> {
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

/// Fills `part`; `what` it is, should the holder hang up before.
pub(super) fn read_part(from: &mut impl Read, part: &mut [u8], what: &'static str) -> Result<(), HolderError> {
    from.read_exact(part).map_err(broken(what))
}

fn broken(what: &'static str) -> impl FnOnce(io::Error) -> HolderError {
    move |error| match error.kind() {
        ErrorKind::UnexpectedEof | ErrorKind::ConnectionReset => HolderError::Truncated(what),
        ErrorKind::WouldBlock | ErrorKind::TimedOut => HolderError::Silent,
        _ => HolderError::Io(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_length_beyond_the_limit_reads_nothing_more() {
        for length in [0, MESSAGE_LIMIT as u32 + 1, u32::MAX] {
            let mut bytes = length.to_be_bytes().to_vec();
            bytes.extend([b' '; 8]);
            let mut rest = &bytes[..];
            assert!(matches!(read_message(&mut rest), Err(HolderError::Length(n)) if n == length));
            assert_eq!(rest.len(), 8);
        }
    }
}
