//! Names without NSS: address literals, `/etc/hosts`, then DNS over UDP at the servers of `/etc/resolv.conf`. Both files are
//! read once, so that a closed sandbox need not open them. An answer decides only whom the client talks to; who that is,
//! the certificate decides.

use std::collections::BTreeMap;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::time::{Duration, Instant};
use ureq::http::Uri;
use ureq::unversioned::resolver::{ResolvedSocketAddrs, Resolver};
use ureq::unversioned::transport::NextTimeout;

/// The most addresses that one name yields.
const MOST: usize = 8;

/// How long one question to one server may wait.
const ANSWER: Duration = Duration::from_secs(2);

/// What is known of names.
#[derive(Debug, Default)]
pub struct Names {
    hosts: BTreeMap<String, Vec<IpAddr>>,
    servers: Vec<IpAddr>,
}

impl Names {
    /// Reads the machine's two files, at most 64 KiB of each; a missing one is empty.
    pub fn read() -> Self {
        let text = |path| {
            let mut bytes = std::fs::read(path).unwrap_or_default();
            bytes.truncate(64 * 1024);
            String::from_utf8_lossy(&bytes).into_owned()
        };
        Self::parse(&text("/etc/hosts"), &text("/etc/resolv.conf"))
    }

    /// The same from their texts.
    pub fn parse(hosts: &str, resolv: &str) -> Self {
        let mut names = Self::default();
        for line in hosts.lines() {
            let mut words = line.split('#').next().unwrap_or_default().split_whitespace();
            let Some(address) = words.next().and_then(|w| w.parse::<IpAddr>().ok()) else { continue };
            for name in words {
                names.hosts.entry(name.to_ascii_lowercase()).or_default().push(address);
            }
        }
        for line in resolv.lines() {
            let mut words = line.split_whitespace();
            if words.next() == Some("nameserver") {
                names.servers.extend(words.next().and_then(|w| w.parse::<IpAddr>().ok()));
            }
        }
        names.servers.truncate(3);
        names
    }

    /// Addresses of `host`, at most 8; none where it has none.
    pub fn look_up(&self, host: &str) -> Vec<IpAddr> {
        if let Ok(address) = host.parse() {
            return vec![address];
        }
        let host = host.to_ascii_lowercase();
        let mut found = self.hosts.get(&host).cloned().unwrap_or_default();
        if found.is_empty() && host == "localhost" {
            found = vec![Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into()];
        }
        for kind in [Kind::A, Kind::Aaaa] {
            if found.is_empty() {
                let asked =
                    self.servers.iter().find_map(|server| ask(*server, &host, kind).ok().filter(|a| !a.is_empty()));
                found.extend(asked.unwrap_or_default());
            }
        }
        found.truncate(MOST);
        found
    }
}

impl Resolver for Names {
    fn resolve(
        &self,
        uri: &Uri,
        _config: &ureq::config::Config,
        _timeout: NextTimeout,
    ) -> Result<ResolvedSocketAddrs, ureq::Error> {
        let host = uri.host().unwrap_or_default().trim_matches(['[', ']']);
        let mut found = self.empty();
        for address in self.look_up(host) {
            found.push(SocketAddr::new(address, uri.port_u16().unwrap_or(443)));
        }
        if found.is_empty() { Err(ureq::Error::HostNotFound) } else { Ok(found) }
    }
}

/// Kinds of records (RFC 1035, 3.2.2; RFC 3596, 2.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u16)]
pub enum Kind {
    /// An IPv4 address.
    A = 1,
    /// An IPv6 address.
    Aaaa = 28,
}

fn ask(server: IpAddr, host: &str, kind: Kind) -> io::Result<Vec<IpAddr>> {
    let any: IpAddr = if server.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    let mut id = [0; 2];
    getrandom::fill(&mut id).map_err(io::Error::other)?;
    let question = question(id, host, kind).ok_or(io::ErrorKind::InvalidInput)?;
    // Connected: the kernel drops what others send. The kernel's random port and the id are what a forger must guess.
    let socket = UdpSocket::bind((any, 0))?;
    socket.connect((server, 53))?;
    let start = Instant::now();
    socket.send(&question)?;
    let mut buffer = [0; 1500];
    loop {
        let left = ANSWER.checked_sub(start.elapsed()).filter(|l| !l.is_zero()).ok_or(io::ErrorKind::TimedOut)?;
        socket.set_read_timeout(Some(left))?;
        let length = socket.recv(&mut buffer)?;
        if let Some(found) = answer(&buffer[..length], &question, kind) {
            return Ok(found);
        }
    }
}

/// A question (RFC 1035, 4.1): header, one name, recursion wanted.
fn question(id: [u8; 2], host: &str, kind: Kind) -> Option<Vec<u8>> {
    let mut message = vec![id[0], id[1], 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
    for label in host.trim_end_matches('.').split('.') {
        let length = u8::try_from(label.len()).ok().filter(|l| (1..=63).contains(l))?;
        message.push(length);
        message.extend_from_slice(label.as_bytes());
    }
    message.push(0);
    message.extend_from_slice(&(kind as u16).to_be_bytes());
    message.extend_from_slice(&1u16.to_be_bytes());
    (message.len() <= 12 + 255 + 4).then_some(message)
}

/// The addresses in `message`, where it answers `question`; `None` where it is something else. Aliases need no following:
/// a resolver puts the records of the last name into the same answer.
pub fn answer(message: &[u8], question: &[u8], kind: Kind) -> Option<Vec<IpAddr>> {
    let header = message.get(..12)?;
    let same = header.get(..2)? == question.get(..2)? && header[2] & 0x80 != 0 && header[4..6] == [0, 1];
    let body = question.get(12..)?;
    if !same || !message.get(12..12 + body.len())?.eq_ignore_ascii_case(body) {
        return None;
    }
    let mut rest = &message[12 + body.len()..];
    let mut found = Vec::new();
    for _ in 0..u16::from_be_bytes([header[6], header[7]]).min(64) {
        let Some(after) = skip_name(rest) else { break };
        let (Some(fixed), Some(length)) = (after.get(..10), after.get(8..10)) else { break };
        let length = usize::from(u16::from_be_bytes([length[0], length[1]]));
        let Some(data) = after.get(10..10 + length) else { break };
        if fixed[..2] == (kind as u16).to_be_bytes() && fixed[2..4] == [0, 1] {
            match (kind, <[u8; 4]>::try_from(data), <[u8; 16]>::try_from(data)) {
                (Kind::A, Ok(bytes), _) => found.push(bytes.into()),
                (Kind::Aaaa, _, Ok(bytes)) => found.push(bytes.into()),
                _ => {}
            }
        }
        rest = &after[10 + length..];
    }
    found.truncate(MOST);
    Some(found)
}

/// What follows a name: labels up to the root, or up to a compression pointer (RFC 1035, 4.1.4), which need not be followed.
fn skip_name(mut rest: &[u8]) -> Option<&[u8]> {
    loop {
        match *rest.first()? {
            0 => return rest.get(1..),
            length @ 1..=63 => rest = rest.get(1 + usize::from(length)..)?,
            192..=255 => return rest.get(2..),
            _ => return None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn reply(question: &[u8], records: &[(u16, &[u8])]) -> Vec<u8> {
        let mut message = question.to_vec();
        message[2] |= 0x80;
        message[6..8].copy_from_slice(&u16::try_from(records.len()).expect("few").to_be_bytes());
        for (kind, data) in records {
            message.extend([0xc0, 12]);
            message.extend(kind.to_be_bytes());
            message.extend([0, 1, 0, 0, 0, 9]);
            message.extend(u16::try_from(data.len()).expect("short").to_be_bytes());
            message.extend_from_slice(data);
        }
        message
    }

    #[test]
    fn files_and_literals_come_before_dns() {
        let names = Names::parse("10.0.0.7 Keys keys.example # note\nbad line\n::1 six\n", "nameserver x\n");
        assert_eq!(names.look_up("keys.EXAMPLE"), ["10.0.0.7".parse::<IpAddr>().expect("address")]);
        assert_eq!(names.look_up("192.0.2.1").len(), 1);
        assert_eq!(names.look_up("localhost").len(), 2);
        assert!(names.look_up("nobody.example").is_empty());
    }

    #[test]
    fn addresses_are_read_past_aliases() {
        let question = question([1, 2], "a.example", Kind::A).expect("short");
        let message = reply(&question, &[(5, &[1, b'b', 0]), (1, &[192, 0, 2, 9])]);
        assert_eq!(answer(&message, &question, Kind::A), Some(vec![Ipv4Addr::new(192, 0, 2, 9).into()]));
    }

    #[test]
    fn answers_to_other_questions_are_not_answers() {
        let ours = question([1, 2], "a.example", Kind::A).expect("short");
        let other_id = question([9, 2], "a.example", Kind::A).expect("short");
        let other_name = question([1, 2], "b.example", Kind::A).expect("short");
        for other in [&other_id, &other_name] {
            assert_eq!(answer(&reply(other, &[(1, &[1, 2, 3, 4])]), &ours, Kind::A), None);
        }
        assert_eq!(answer(&ours, &ours, Kind::A), None, "a question is no answer");
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_without_a_panic(bytes in prop::collection::vec(any::<u8>(), 0..600), cut in 0usize..600) {
            let question = question([1, 2], "a.example", Kind::Aaaa).expect("short");
            let mut message = reply(&question, &[(28, &[0; 16])]);
            message.truncate(cut);
            message.extend_from_slice(&bytes);
            let _ = answer(&message, &question, Kind::Aaaa);
            let _ = answer(&bytes, &question, Kind::A);
        }

        #[test]
        fn hosts_files_are_read_without_a_panic(text in "\\PC{0,200}") {
            let _ = Names::parse(&text, &text).look_up("x.invalid.literal/");
        }
    }
}
