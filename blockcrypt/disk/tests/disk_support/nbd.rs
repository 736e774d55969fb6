//! An NBD client that says what it likes, also what none should.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

pub(crate) const READ: u16 = 0;
pub(crate) const WRITE: u16 = 1;
pub(crate) const DISCONNECT: u16 = 2;
pub(crate) const FLUSH: u16 = 3;
pub(crate) const TRIM: u16 = 4;
pub(crate) const WRITE_ZEROES: u16 = 6;
pub(crate) const FUA: u16 = 1;
pub(crate) const NO_HOLE: u16 = 2;

/// A client in transmission, with simple replies.
pub(crate) struct Client {
    pub(crate) stream: UnixStream,
    pub(crate) size: u64,
    cookie: u64,
}

impl Client {
    pub(crate) fn connect(socket: &Path) -> Self {
        let mut stream = UnixStream::connect(socket).expect("connects");
        // Far beyond what anything takes: a server that says nothing fails the test instead of hanging it.
        stream.set_read_timeout(Some(Duration::from_secs(120))).expect("set");
        let mut hello = [0; 18];
        stream.read_exact(&mut hello).expect("a hello");
        assert!(hello.starts_with(b"NBDMAGICIHAVEOPT"));
        // Fixed newstyle, no zeroes; NBD_OPT_EXPORT_NAME with no name.
        stream.write_all(&3_u32.to_be_bytes()).expect("sent");
        stream.write_all(&[&b"IHAVEOPT"[..], &1_u32.to_be_bytes(), &0_u32.to_be_bytes()].concat()).expect("sent");
        let mut export = [0; 10];
        stream.read_exact(&mut export).expect("an export");
        let size = u64::from_be_bytes(export[..8].try_into().expect("eight"));
        Self { stream, size, cookie: 0 }
    }

    /// Sends a request; its cookie.
    pub(crate) fn send(&mut self, kind: u16, flags: u16, offset: u64, length: u32, payload: &[u8]) -> io::Result<u64> {
        self.cookie += 1;
        let mut out = 0x2560_9513_u32.to_be_bytes().to_vec();
        out.extend(flags.to_be_bytes());
        out.extend(kind.to_be_bytes());
        out.extend(self.cookie.to_be_bytes());
        out.extend(offset.to_be_bytes());
        out.extend(length.to_be_bytes());
        out.extend(payload);
        self.stream.write_all(&out)?;
        Ok(self.cookie)
    }

    /// The next reply's error and cookie.
    pub(crate) fn reply(&mut self) -> io::Result<(u32, u64)> {
        let mut header = [0; 16];
        self.stream.read_exact(&mut header)?;
        assert_eq!(header[..4], 0x6744_6698_u32.to_be_bytes());
        let error = u32::from_be_bytes(header[4..8].try_into().expect("four"));
        Ok((error, u64::from_be_bytes(header[8..].try_into().expect("eight"))))
    }

    /// A request and its reply's error; nothing else may be in flight.
    pub(crate) fn ask(&mut self, kind: u16, flags: u16, offset: u64, length: u32, payload: &[u8]) -> io::Result<u32> {
        let cookie = self.send(kind, flags, offset, length, payload)?;
        let (error, answered) = self.reply()?;
        assert_eq!(answered, cookie);
        Ok(error)
    }

    pub(crate) fn write(&mut self, offset: u64, data: &[u8]) -> io::Result<u32> {
        self.ask(WRITE, 0, offset, data.len() as u32, data)
    }

    pub(crate) fn flush(&mut self) -> io::Result<u32> {
        self.ask(FLUSH, 0, 0, 0, &[])
    }

    pub(crate) fn read(&mut self, offset: u64, length: u32) -> Result<Vec<u8>, u32> {
        let error = self.ask(READ, 0, offset, length, &[]).expect("an answer");
        if error != 0 {
            return Err(error);
        }
        let mut data = vec![0; length as usize];
        self.stream.read_exact(&mut data).expect("the data");
        Ok(data)
    }
}
