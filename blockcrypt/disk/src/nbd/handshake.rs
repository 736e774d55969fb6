//! The fixed newstyle handshake: the client asks, the server answers, until both go on to transmission.
//!
//! ```text
//! server   "NBDMAGIC" │ "IHAVEOPT" │ flags u16
//! client   flags u32
//! client   "IHAVEOPT" │ option u32 │ length u32 │ data                    any number of times
//! server   0x0003e889045565a9 u64 │ option u32 │ type u32 │ length u32 │ data
//! ```

use super::Export;
use super::wire::{LONGEST, PREFERRED, SECTOR};
use std::io::{self, Read, Write};

const MAGIC: &[u8; 8] = b"NBDMAGIC";
const OPTION_MAGIC: &[u8; 8] = b"IHAVEOPT";
const REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;

/// FIXED_NEWSTYLE and NO_ZEROES.
const SERVER_FLAGS: u16 = 0b11;
const CLIENT_FIXED: u32 = 0b01;
const CLIENT_NO_ZEROES: u32 = 0b10;

const EXPORT_NAME: u32 = 1;
const ABORT: u32 = 2;
const LIST: u32 = 3;
const INFO: u32 = 6;
const GO: u32 = 7;
const STRUCTURED_REPLY: u32 = 8;

const ACK: u32 = 1;
const SERVER: u32 = 2;
const INFO_REPLY: u32 = 3;
const UNSUPPORTED: u32 = (1 << 31) | 1;
const INVALID: u32 = (1 << 31) | 3;
const UNKNOWN: u32 = (1 << 31) | 6;
const TOO_BIG: u32 = (1 << 31) | 9;

const INFO_EXPORT: u16 = 0;
const INFO_NAME: u16 = 1;
const INFO_DESCRIPTION: u16 = 2;
const INFO_BLOCK_SIZE: u16 = 3;

/// HAS_FLAGS, SEND_FLUSH, SEND_FUA, SEND_TRIM, SEND_WRITE_ZEROES, SEND_DF and CAN_MULTI_CONN: a FLUSH covers what was
/// acknowledged on any connection.
const TRANSMISSION: u16 = 1 | 1 << 2 | 1 << 3 | 1 << 5 | 1 << 6 | 1 << 7 | 1 << 8;
const READ_ONLY: u16 = 1 << 1;

/// Bytes of data that an option may have. Names have 4096 at most.
const OPTION_LIMIT: u32 = 8192;
/// Options a client may send before it must make up its mind.
const OPTIONS: usize = 64;

/// What was agreed on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Agreed {
    /// Replies to reads come in chunks.
    pub(super) structured: bool,
}

/// Why there is no transmission.
#[derive(Debug, thiserror::Error)]
pub(crate) enum HandshakeError {
    /// It said goodbye.
    #[error("the client left")]
    Left,
    /// It speaks another language.
    #[error("the client does not speak fixed newstyle NBD")]
    Protocol,
    /// It asked for an export that is not there, in the old way that has no answer for that.
    #[error("the client asked for an export that is not there")]
    NoExport,
    /// It never stops asking.
    #[error("the client sent {OPTIONS} options and made no choice")]
    Endless,
    #[error("the conversation with the client broke off")]
    Io(#[from] io::Error),
}

/// Leads a client to transmission.
pub(crate) fn negotiate(stream: &mut (impl Read + Write), export: &Export) -> Result<Agreed, HandshakeError> {
    let mut hello = [&MAGIC[..], OPTION_MAGIC].concat();
    hello.extend(SERVER_FLAGS.to_be_bytes());
    stream.write_all(&hello)?;
    let flags = u32::from_be_bytes(take(stream)?);
    if flags & !(CLIENT_FIXED | CLIENT_NO_ZEROES) != 0 || flags & CLIENT_FIXED == 0 {
        return Err(HandshakeError::Protocol);
    }
    let mut talk = Talk { stream, export, zeroes: flags & CLIENT_NO_ZEROES == 0, structured: false };
    for _ in 0..OPTIONS {
        if let Some(agreed) = talk.option()? {
            return Ok(agreed);
        }
    }
    Err(HandshakeError::Endless)
}

struct Talk<'a, S> {
    stream: &'a mut S,
    export: &'a Export,
    /// The client wants 124 of them behind an export.
    zeroes: bool,
    structured: bool,
}

impl<S: Read + Write> Talk<'_, S> {
    /// Answers one option; what was agreed on, if it was the last.
    fn option(&mut self) -> Result<Option<Agreed>, HandshakeError> {
        if take(self.stream)? != *OPTION_MAGIC {
            return Err(HandshakeError::Protocol);
        }
        let option = u32::from_be_bytes(take(self.stream)?);
        let length = u32::from_be_bytes(take(self.stream)?);
        if length > OPTION_LIMIT {
            if option == EXPORT_NAME {
                return Err(HandshakeError::NoExport);
            }
            self.skip(length)?;
            self.reply(option, TOO_BIG, &[])?;
            return Ok(None);
        }
        let mut data = vec![0; length as usize];
        self.stream.read_exact(&mut data)?;
        match option {
            EXPORT_NAME => return self.export_name(&data).map(Some),
            ABORT => {
                self.reply(option, ACK, &[])?;
                return Err(HandshakeError::Left);
            }
            LIST if data.is_empty() => {
                // One export, whose name is empty.
                self.reply(option, SERVER, &0_u32.to_be_bytes())?;
                self.reply(option, ACK, &[])?;
            }
            INFO | GO => return self.info(option, &data),
            STRUCTURED_REPLY if data.is_empty() => {
                self.structured = true;
                self.reply(option, ACK, &[])?;
            }
            LIST | STRUCTURED_REPLY => self.reply(option, INVALID, &[])?,
            _ => self.reply(option, UNSUPPORTED, &[])?,
        }
        Ok(None)
    }

    /// The oldest option: the name alone, and no answer but the export itself.
    fn export_name(&mut self, name: &[u8]) -> Result<Agreed, HandshakeError> {
        if !name.is_empty() {
            return Err(HandshakeError::NoExport);
        }
        let mut answer = self.export.size.to_be_bytes().to_vec();
        answer.extend(transmission(self.export).to_be_bytes());
        if self.zeroes {
            answer.extend([0; 124]);
        }
        self.stream.write_all(&answer)?;
        Ok(self.agreed())
    }

    fn info(&mut self, option: u32, data: &[u8]) -> Result<Option<Agreed>, HandshakeError> {
        let Some(asked) = Asked::parse(data) else {
            self.reply(option, INVALID, &[])?;
            return Ok(None);
        };
        if !asked.name.is_empty() {
            self.reply(option, UNKNOWN, &[])?;
            return Ok(None);
        }
        let mut export = INFO_EXPORT.to_be_bytes().to_vec();
        export.extend(self.export.size.to_be_bytes());
        export.extend(transmission(self.export).to_be_bytes());
        self.reply(option, INFO_REPLY, &export)?;
        let mut sizes = INFO_BLOCK_SIZE.to_be_bytes().to_vec();
        [SECTOR, PREFERRED, LONGEST].iter().for_each(|size| sizes.extend(size.to_be_bytes()));
        self.reply(option, INFO_REPLY, &sizes)?;
        if asked.infos(INFO_NAME) {
            self.reply(option, INFO_REPLY, &INFO_NAME.to_be_bytes())?;
        }
        if asked.infos(INFO_DESCRIPTION) {
            let text = [&INFO_DESCRIPTION.to_be_bytes()[..], self.export.description.as_bytes()].concat();
            self.reply(option, INFO_REPLY, &text)?;
        }
        self.reply(option, ACK, &[])?;
        Ok((option == GO).then(|| self.agreed()))
    }

    fn agreed(&self) -> Agreed {
        Agreed { structured: self.structured }
    }

    fn reply(&mut self, option: u32, kind: u32, data: &[u8]) -> io::Result<()> {
        let mut out = REPLY_MAGIC.to_be_bytes().to_vec();
        out.extend(option.to_be_bytes());
        out.extend(kind.to_be_bytes());
        out.extend((data.len() as u32).to_be_bytes());
        out.extend(data);
        self.stream.write_all(&out)
    }

    fn skip(&mut self, length: u32) -> io::Result<()> {
        let mut piece = [0; 4096];
        let mut left = length as usize;
        while left > 0 {
            let n = left.min(piece.len());
            self.stream.read_exact(&mut piece[..n])?;
            left -= n;
        }
        Ok(())
    }
}

/// The data of INFO and GO: `length u32 │ name │ count u16 │ count times u16`.
struct Asked<'a> {
    name: &'a [u8],
    infos: &'a [[u8; 2]],
}

impl<'a> Asked<'a> {
    fn parse(data: &'a [u8]) -> Option<Self> {
        let (length, rest) = data.split_first_chunk::<4>()?;
        let (name, rest) = rest.split_at_checked(usize::try_from(u32::from_be_bytes(*length)).ok()?)?;
        let (count, rest) = rest.split_first_chunk::<2>()?;
        let (infos, more) = rest.as_chunks::<2>();
        (more.is_empty() && infos.len() == usize::from(u16::from_be_bytes(*count))).then_some(Self { name, infos })
    }

    fn infos(&self, kind: u16) -> bool {
        self.infos.contains(&kind.to_be_bytes())
    }
}

fn transmission(export: &Export) -> u16 {
    TRANSMISSION | if export.read_only { READ_ONLY } else { 0 }
}

fn take<const N: usize>(from: &mut impl Read) -> io::Result<[u8; N]> {
    let mut out = [0; N];
    from.read_exact(&mut out)?;
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Cursor;

    /// A client that says all it has to say at once.
    struct Client {
        says: Cursor<Vec<u8>>,
        heard: Vec<u8>,
    }

    impl Read for Client {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            self.says.read(buffer)
        }
    }

    impl Write for Client {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.heard.write(bytes)
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn option(kind: u32, data: &[u8]) -> Vec<u8> {
        [&OPTION_MAGIC[..], &kind.to_be_bytes(), &(data.len() as u32).to_be_bytes(), data].concat()
    }

    fn go(name: &str, infos: &[u16]) -> Vec<u8> {
        let mut data = (name.len() as u32).to_be_bytes().to_vec();
        data.extend(name.bytes());
        data.extend((infos.len() as u16).to_be_bytes());
        infos.iter().for_each(|kind| data.extend(kind.to_be_bytes()));
        data
    }

    /// What comes of `options`, and the types of the replies.
    fn said(flags: u32, options: &[Vec<u8>]) -> (Result<Agreed, HandshakeError>, Vec<u32>, usize) {
        let says = [&flags.to_be_bytes()[..], &options.concat()].concat();
        let mut client = Client { says: Cursor::new(says), heard: Vec::new() };
        let export = Export { size: 1 << 20, read_only: true, description: "a disk".into() };
        let agreed = negotiate(&mut client, &export);
        let mut rest = &client.heard[18..];
        let mut replies = Vec::new();
        while rest.len() >= 20 && rest[..8] == REPLY_MAGIC.to_be_bytes() {
            replies.push(u32::from_be_bytes(rest[12..16].try_into().expect("four")));
            rest = &rest[20 + u32::from_be_bytes(rest[16..20].try_into().expect("four")) as usize..];
        }
        (agreed, replies, rest.len())
    }

    #[test]
    fn a_client_of_today_gets_what_it_asks_for() {
        let asked = [
            option(STRUCTURED_REPLY, &[]),
            option(LIST, &[]),
            option(INFO, &go("", &[INFO_NAME, INFO_DESCRIPTION, INFO_BLOCK_SIZE, 77])),
            option(GO, &go("", &[])),
        ];
        let (agreed, replies, _) = said(3, &asked);
        assert!(agreed.expect("agreed").structured);
        let (i, a) = (INFO_REPLY, ACK);
        assert_eq!(replies, [a, SERVER, a, i, i, i, i, a, i, i, a]);
    }

    #[test]
    fn a_client_of_old_gets_the_export_and_its_zeroes() {
        let (agreed, replies, rest) = said(1, &[option(EXPORT_NAME, b"")]);
        assert!(!agreed.expect("agreed").structured && replies.is_empty());
        assert_eq!(rest, 10 + 124);
        assert_eq!(said(3, &[option(EXPORT_NAME, b"")]).2, 10);
        assert!(matches!(said(3, &[option(EXPORT_NAME, b"other")]).0, Err(HandshakeError::NoExport)));
    }

    #[test]
    fn what_can_not_be_answered_is_refused_and_the_talk_goes_on() {
        for (asked, reply) in [
            (option(99, b"anything"), UNSUPPORTED),
            (option(5, b""), UNSUPPORTED),
            (option(LIST, b"x"), INVALID),
            (option(STRUCTURED_REPLY, b"x"), INVALID),
            (option(GO, b""), INVALID),
            (option(GO, &[0xff; 6]), INVALID),
            (option(GO, &[go("", &[1]), vec![0]].concat()), INVALID),
            (option(GO, &go("other", &[])), UNKNOWN),
            (option(GO, &vec![0; OPTION_LIMIT as usize + 1]), TOO_BIG),
        ] {
            let (agreed, replies, _) = said(3, &[asked, option(GO, &go("", &[]))]);
            agreed.expect("the second time it is right");
            assert_eq!(replies[0], reply);
        }
    }

    #[test]
    fn other_talk_ends() {
        for flags in [0, 2, 4, u32::MAX] {
            assert!(matches!(said(flags, &[]).0, Err(HandshakeError::Protocol)));
        }
        assert!(matches!(said(3, &[b"IHAVENOT12345678".to_vec()]).0, Err(HandshakeError::Protocol)));
        assert!(matches!(said(3, &[option(ABORT, b"")]).0, Err(HandshakeError::Left)));
        assert!(matches!(said(3, &[]).0, Err(HandshakeError::Io(_))));
        let asks: Vec<_> = (0..=OPTIONS).map(|_| option(LIST, &[])).collect();
        assert!(matches!(said(3, &asks).0, Err(HandshakeError::Endless)));
    }
}
