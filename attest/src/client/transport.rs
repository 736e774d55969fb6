//! TLS over a socket as `ureq` wants it: a connector that pins, and a transport that keeps time limits.

use super::ClientError;
use policy::header::ProviderUrl;
use rustls::pki_types::ServerName;
use rustls::{CertificateError, ClientConfig, ClientConnection, StreamOwned};
use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::sync::Arc;
use std::time::{Duration, Instant};
use ureq::unversioned::transport::{Buffers, ConnectionDetails, Connector, LazyBuffers, NextTimeout, Transport};

/// The most pieces of TLS housekeeping that an idle connection may bring at once.
const HOUSEKEEPING: usize = 16;

/// Opens TLS connections to the pinned provider, and nothing else.
#[derive(Debug)]
pub(super) struct PinnedConnector {
    config: Arc<ClientConfig>,
}

impl PinnedConnector {
    pub(super) fn new(config: Arc<ClientConfig>) -> Self {
        Self { config }
    }
}

/// Says of a failed request whose fault it was.
pub(super) fn explain(url: &ProviderUrl, error: ureq::Error) -> ClientError {
    let url = url.to_string();
    let tls = |e: &rustls::Error| match e {
        rustls::Error::InvalidCertificate(CertificateError::NotValidForName) => {
            "its certificate is for another name".to_owned()
        }
        rustls::Error::InvalidCertificate(CertificateError::UnknownIssuer) => {
            "its certificate does not come from the CA that the VM file pins".to_owned()
        }
        rustls::Error::InvalidCertificate(CertificateError::Expired) => "its certificate has expired".to_owned(),
        rustls::Error::InvalidCertificate(CertificateError::NotValidYet) => {
            "its certificate is not valid yet; is this host's clock right?".to_owned()
        }
        rustls::Error::General(text) => text.clone(),
        other => format!("TLS failed: {other}"),
    };
    match error {
        ureq::Error::Io(e) => match e.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>()) {
            Some(e) => ClientError::WrongProvider { url, reason: tls(e) },
            None => ClientError::Unreachable { url, reason: e.to_string() },
        },
        ureq::Error::Timeout(_) => ClientError::Unreachable { url, reason: "no answer in time".into() },
        ureq::Error::HostNotFound => ClientError::Unreachable { url, reason: "its name can't be resolved".into() },
        ureq::Error::Other(e) => ClientError::Unreachable { url, reason: e.to_string() },
        ureq::Error::ConnectionFailed => ClientError::Unreachable { url, reason: "no connection".into() },
        other => ClientError::BadAnswer { url, reason: other.to_string() },
    }
}

impl Connector<()> for PinnedConnector {
    type Out = TlsTransport;

    fn connect(&self, details: &ConnectionDetails<'_>, _: Option<()>) -> Result<Option<TlsTransport>, ureq::Error> {
        let host = details.uri.host().unwrap_or_default().trim_matches(['[', ']']).to_owned();
        let name = ServerName::try_from(host).map_err(|_| ureq::Error::HostNotFound)?;
        let limit = details.timeout.not_zero().map_or(super::CONNECT, |t| *t).min(super::CONNECT);
        let start = Instant::now();
        let mut last = io::Error::from(io::ErrorKind::AddrNotAvailable);
        for address in details.addrs.iter() {
            let left = limit.saturating_sub(start.elapsed()).max(Duration::from_millis(1));
            match TcpStream::connect_timeout(address, left) {
                Ok(socket) => {
                    let left = limit.saturating_sub(start.elapsed()).max(Duration::from_millis(1));
                    return self.handshake(socket, name, left).map(Some).map_err(ureq::Error::Io);
                }
                Err(error) => last = error,
            }
        }
        Err(ureq::Error::Io(last))
    }
}

impl PinnedConnector {
    fn handshake(&self, socket: TcpStream, name: ServerName<'static>, left: Duration) -> io::Result<TlsTransport> {
        socket.set_nodelay(true)?;
        let mut socket = Timed { socket, until: Instant::now() + left };
        let mut connection = ClientConnection::new(self.config.clone(), name).map_err(io::Error::other)?;
        // A limit (the library's default) on what an unread peer can make this process hold.
        connection.set_buffer_limit(Some(64 * 1024));
        while connection.is_handshaking() {
            connection.complete_io(&mut socket)?;
        }
        let buffers = LazyBuffers::new(16 * 1024, 16 * 1024);
        Ok(TlsTransport { buffers, stream: StreamOwned::new(connection, socket) })
    }
}

/// A socket that ends at a moment, however slowly bytes drip in: TLS reads until a record is whole, and a limit for each read
/// would begin anew with every byte.
#[derive(Debug)]
struct Timed {
    socket: TcpStream,
    until: Instant,
}

impl Timed {
    fn left(&self) -> io::Result<Option<Duration>> {
        let left = self.until.saturating_duration_since(Instant::now());
        if left.is_zero() { Err(io::ErrorKind::TimedOut.into()) } else { Ok(Some(left)) }
    }
}

impl Read for Timed {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        self.socket.set_read_timeout(self.left()?)?;
        self.socket.read(out).map_err(in_time)
    }
}

impl Write for Timed {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.socket.set_write_timeout(self.left()?)?;
        self.socket.write(bytes).map_err(in_time)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.socket.flush()
    }
}

fn in_time(error: io::Error) -> io::Error {
    if error.kind() == io::ErrorKind::WouldBlock { io::ErrorKind::TimedOut.into() } else { error }
}

/// One TLS connection.
#[derive(Debug)]
pub(super) struct TlsTransport {
    buffers: LazyBuffers,
    stream: StreamOwned<ClientConnection, Timed>,
}

impl TlsTransport {
    fn limit(&mut self, timeout: NextTimeout) {
        let left = timeout.not_zero().map_or(super::REQUEST, |t| *t).max(Duration::from_millis(1));
        self.stream.sock.until = Instant::now() + left;
    }
}

impl Transport for TlsTransport {
    fn buffers(&mut self) -> &mut dyn Buffers {
        &mut self.buffers
    }

    fn transmit_output(&mut self, amount: usize, timeout: NextTimeout) -> Result<(), ureq::Error> {
        self.limit(timeout);
        let output = self.buffers.output().get(..amount).unwrap_or_default();
        self.stream.write_all(output)?;
        self.stream.flush()?;
        Ok(())
    }

    fn await_input(&mut self, timeout: NextTimeout) -> Result<bool, ureq::Error> {
        if timeout.after.is_zero() {
            return Err(ureq::Error::Timeout(timeout.reason));
        }
        self.limit(timeout);
        let input = self.buffers.input_append_buf();
        let count = match self.stream.read(input) {
            Ok(count) => count,
            // A peer that ends the connection without a close_notify: the length of the body decides whether all came.
            Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => 0,
            Err(e) if e.kind() == io::ErrorKind::TimedOut => return Err(ureq::Error::Timeout(timeout.reason)),
            Err(e) => return Err(ureq::Error::Io(e)),
        };
        self.buffers.input_appended(count);
        Ok(count > 0)
    }

    /// Whether an idle connection still stands: nothing but TLS housekeeping may have come on it.
    fn is_open(&mut self) -> bool {
        let socket = &mut self.stream.sock.socket;
        if socket.set_nonblocking(true).is_err() {
            return false;
        }
        // What came may be followed by the end, so all of it is read; a peer that keeps this busy is no idle one.
        let idle = (0..HOUSEKEEPING).find_map(|_| match self.stream.conn.read_tls(socket) {
            Ok(0) => Some(false),
            Ok(_) => {
                let kept = self
                    .stream
                    .conn
                    .process_new_packets()
                    .is_ok_and(|state| state.plaintext_bytes_to_read() == 0 && !state.peer_has_closed());
                (!kept).then_some(false)
            }
            Err(e) => Some(e.kind() == io::ErrorKind::WouldBlock),
        });
        let idle = idle.unwrap_or(false);
        self.stream.sock.socket.set_nonblocking(false).is_ok() && idle
    }

    fn is_tls(&self) -> bool {
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;

    #[test]
    fn attack_39_a_peer_that_drips_is_given_up() {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let address = listener.local_addr().expect("an address");
        let dripping = std::thread::spawn(move || {
            let (mut socket, _) = listener.accept().expect("a client");
            // Far longer than the limit, in steps far below it; it ends when the client does.
            for _ in 0..2000 {
                if socket.write_all(b"x").is_err() {
                    return true;
                }
                std::thread::sleep(Duration::from_millis(10));
            }
            false
        });
        let socket = TcpStream::connect(address).expect("connected");
        let mut timed = Timed { socket, until: Instant::now() + Duration::from_millis(200) };
        let end = timed.read_exact(&mut [0; 4096]).expect_err("not all of it comes");
        assert_eq!(end.kind(), io::ErrorKind::TimedOut);
        drop(timed);
        assert!(dripping.join().expect("joined"), "given up before the peer was done");
    }
}
