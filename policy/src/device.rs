//! What a machine may have beside processors, memory and disks. Names follow Cloud Hypervisor's configuration where it has them.

use crate::config::{ConfigError, FileName, RateLimiterConfig};
use serde::{Deserialize, Serialize};

/// Networks of one VM, at most.
pub const NETS_MAX: usize = 8;
/// Queue pairs of one network, at most.
pub const QUEUE_PAIRS_MAX: u16 = 8;

/// The devices of a configuration of either kind.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Devices<'a> {
    /// Network cards.
    pub net: &'a [Net],
    /// A source of random numbers.
    pub rng: Option<Rng>,
    /// Sockets between guest and host.
    pub vsock: Option<&'a Vsock>,
    /// A memory balloon.
    pub balloon: Option<Balloon>,
    /// A virtio console.
    pub console: Option<&'a Console>,
    /// Whether a kernel that panics ends the VM.
    pub pvpanic: bool,
}

/// A source of random numbers (virtio-rng). It has no settings: what it gives is the host kernel's.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rng {}

/// A memory balloon (virtio-balloon): what the guest puts into it, or reports as free, is the host's again.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Balloon {
    /// Bytes that it is to hold: a multiple of 4096, less than the memory.
    #[serde(default)]
    pub size: u64,
    /// Whether the guest may take memory out of it rather than end a process.
    #[serde(default)]
    pub deflate_on_oom: bool,
    /// Whether the guest is asked to report free pages.
    #[serde(default)]
    pub free_page_reporting: bool,
}

impl Balloon {
    pub(crate) fn check(&self, memory: u64) -> Result<(), ConfigError> {
        let good = self.size.is_multiple_of(4096) && self.size < memory;
        if good { Ok(()) } else { Err(ConfigError::Balloon(self.size)) }
    }
}

/// Sockets between guest and host (virtio-vsock).
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Vsock {
    /// The guest's address: from 3 to 2^32 - 2.
    pub cid: u32,
    /// Path of the host's unix socket. For unprotected VMs only: for others the operator says it with `--vsock-socket PATH`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub socket: Option<String>,
}

impl Vsock {
    pub(crate) fn check(&self, whose: Whose) -> Result<(), ConfigError> {
        match (self.cid, &self.socket, whose) {
            (0..=2 | u32::MAX, ..) => Err(ConfigError::Vsock("cid is not between 3 and 4294967294")),
            (_, None, Whose::Unprotected) => Err(ConfigError::Vsock("it has no socket")),
            (_, Some(_), Whose::Protected) => {
                Err(ConfigError::Vsock("the socket of a protected VM is the operator's to name, with --vsock-socket"))
            }
            _ => Ok(()),
        }
    }
}

/// A console (virtio-console) beside the serial line, or in its place.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Console {
    /// What it is connected to.
    pub mode: ConsoleMode,
    /// Path of the socket. For unprotected VMs only: for others the operator says it with `--console-socket PATH`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub socket: Option<String>,
}

/// Where a console's bytes go.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum ConsoleMode {
    /// Where the serial line's would, which then goes nowhere.
    Tty,
    /// To whoever connects to a unix socket, one at a time.
    Socket,
}

impl Console {
    pub(crate) fn check(&self, whose: Whose) -> Result<(), ConfigError> {
        match (self.mode, &self.socket, whose) {
            (ConsoleMode::Tty, Some(_), _) => Err(ConfigError::Console("a console in mode Tty has no socket")),
            (ConsoleMode::Socket, None, Whose::Unprotected) => Err(ConfigError::Console("it has no socket")),
            (ConsoleMode::Socket, Some(_), Whose::Protected) => Err(ConfigError::Console(
                "the socket of a protected VM is the operator's to name, with --console-socket",
            )),
            _ => Ok(()),
        }
    }
}

/// A network card (virtio-net) on a TAP of the host, which carries frames as the guest sends them: in plain.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Net {
    /// Its name in the API and in `--attach`.
    pub id: FileName,
    /// The host's TAP. For unprotected VMs only: for others the operator says it with `--attach ID=TAP`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tap: Option<InterfaceName>,
    /// The customer's word that frames may leave the VM process in plain: a protected VM has no such card without it.
    #[serde(default)]
    pub plain: bool,
    /// Its MAC address; without one each start makes one up.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mac: Option<MacAddress>,
    /// The largest packet, in bytes without the Ethernet header, that the guest is told of: 68 to 65520.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mtu: Option<u16>,
    /// Receive and transmit queues together: an even number from 2 to 16. More than 2 need a TAP made with `multi_queue`.
    #[serde(default = "two")]
    pub num_queues: u16,
    /// Buffers in a queue: a power of two from 16 to 1024.
    #[serde(default = "two_hundred_fifty_six")]
    pub queue_size: u16,
    /// Limits, for each direction.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rate_limiter_config: Option<RateLimiterConfig>,
}

fn two() -> u16 {
    2
}

fn two_hundred_fifty_six() -> u16 {
    256
}

impl Net {
    /// Receive queues, each with its transmit queue.
    pub fn queue_pairs(&self) -> u16 {
        self.num_queues / 2
    }

    fn check(&self) -> Result<(), ConfigError> {
        let wrong = |why| Err(ConfigError::Net { id: self.id.to_string(), why });
        let pairs = 1..=QUEUE_PAIRS_MAX;
        match self {
            Self { num_queues, .. } if !num_queues.is_multiple_of(2) || !pairs.contains(&self.queue_pairs()) => {
                wrong("num_queues is not an even number from 2 to 16")
            }
            Self { queue_size, .. } if !queue_size.is_power_of_two() || !(16..=1024).contains(queue_size) => {
                wrong("queue_size is not a power of two from 16 to 1024")
            }
            Self { mtu: Some(mtu), .. } if !(68..=65520).contains(mtu) => wrong("mtu is not between 68 and 65520"),
            Self { rate_limiter_config: Some(limits), id, .. } => limits.check(&format!("network {id}")),
            _ => Ok(()),
        }
    }
}

/// The name of a network interface: 1 to 15 bytes of ASCII without '/', ':', '%' and white space, neither "." nor "..".
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct InterfaceName(String);

impl InterfaceName {
    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl TryFrom<String> for InterfaceName {
    type Error = ConfigError;
    fn try_from(text: String) -> Result<Self, ConfigError> {
        // '%' would make the kernel number the interface.
        let allowed = |b: u8| b.is_ascii_graphic() && !matches!(b, b'/' | b':' | b'%');
        let good = (1..=15).contains(&text.len()) && text.bytes().all(allowed) && text != "." && text != "..";
        if good { Ok(Self(text)) } else { Err(ConfigError::Interface) }
    }
}

impl From<InterfaceName> for String {
    fn from(name: InterfaceName) -> String {
        name.0
    }
}

impl std::fmt::Display for InterfaceName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

/// A MAC address that a network card may have: no group address, and not zero. As text six hexadecimal bytes with colons.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct MacAddress([u8; 6]);

impl MacAddress {
    /// The address of six bytes.
    pub fn new(bytes: [u8; 6]) -> Result<Self, ConfigError> {
        if bytes == [0; 6] || bytes[0] & 1 != 0 { Err(ConfigError::Mac) } else { Ok(Self(bytes)) }
    }

    /// A locally administered address (IEEE 802, 8.4) made from random bytes.
    pub fn local(random: [u8; 6]) -> Self {
        let [first, rest @ ..] = random;
        let [a, b, c, d, e] = rest;
        Self([first & !1 | 2, a, b, c, d, e])
    }

    /// Its bytes, as in a frame.
    pub fn bytes(self) -> [u8; 6] {
        self.0
    }
}

impl TryFrom<String> for MacAddress {
    type Error = ConfigError;
    fn try_from(text: String) -> Result<Self, ConfigError> {
        let mut bytes = [0; 6];
        let mut parts = text.split(':');
        for byte in &mut bytes {
            let part = parts.next().filter(|part| part.len() == 2 && !part.starts_with('+')).ok_or(ConfigError::Mac)?;
            *byte = u8::from_str_radix(part, 16).map_err(|_| ConfigError::Mac)?;
        }
        if parts.next().is_some() { Err(ConfigError::Mac) } else { Self::new(bytes) }
    }
}

impl From<MacAddress> for String {
    fn from(mac: MacAddress) -> String {
        mac.to_string()
    }
}

impl std::fmt::Display for MacAddress {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

/// Whose machine it is, which decides how a network may be reached.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Whose {
    /// A customer's: what leaves it in plain needs his word, and the operator says where it goes.
    Protected,
    /// Nobody's: the file says everything.
    Unprotected,
}

pub(crate) fn check_nets(nets: &[Net], whose: Whose) -> Result<(), ConfigError> {
    if nets.len() > NETS_MAX {
        return Err(ConfigError::Nets);
    }
    let mut seen = std::collections::BTreeSet::new();
    for net in nets {
        net.check()?;
        if !seen.insert(&net.id) {
            return Err(ConfigError::NetTwice(net.id.to_string()));
        }
        let wrong = |why| Err(ConfigError::Net { id: net.id.to_string(), why });
        match (whose, net) {
            (Whose::Protected, Net { plain: false, .. }) => {
                return wrong("a TAP carries frames in plain; say \"plain\": true where that is meant");
            }
            (Whose::Protected, Net { tap: Some(_), .. }) => {
                return wrong("the TAP of a protected VM is the operator's to name, with --attach");
            }
            (Whose::Unprotected, Net { tap: None, .. }) => return wrong("it has no tap"),
            _ => {}
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn net(more: &str) -> Result<Net, serde_json::Error> {
        serde_json::from_str(&format!(r#"{{"id":"net0"{more}}}"#))
    }

    fn check(more: &str, whose: Whose) -> Result<(), String> {
        let net = net(more).map_err(|e| e.to_string())?;
        check_nets(&[net], whose).map_err(|e| e.to_string())
    }

    #[test]
    fn a_protected_vm_reaches_a_tap_only_by_the_customers_word() {
        assert!(check("", Whose::Protected).is_err_and(|e| e.contains("plain")));
        assert_eq!(check(r#","plain":true"#, Whose::Protected), Ok(()));
        assert!(check(r#","plain":true,"tap":"tap0""#, Whose::Protected).is_err_and(|e| e.contains("--attach")));
        assert!(check("", Whose::Unprotected).is_err());
        assert_eq!(check(r#","tap":"tap0""#, Whose::Unprotected), Ok(()));
    }

    #[test]
    fn what_no_card_has_is_refused() {
        for bad in [
            r#""num_queues":1"#,
            r#""num_queues":0"#,
            r#""num_queues":3"#,
            r#""num_queues":18"#,
            r#""queue_size":8"#,
            r#""queue_size":100"#,
            r#""queue_size":2048"#,
            r#""mtu":67"#,
            r#""mtu":65521"#,
            r#""mac":"ff:ff:ff:ff:ff:ff""#,
            r#""rate_limiter_config":{"ops":{"size":0,"refill_time":1}}"#,
            r#""rate_limiter_config":{"bandwidth":{"size":1,"refill_time":0}}"#,
            r#""key":"x""#,
        ] {
            assert!(check(&format!(r#","tap":"tap0",{bad}"#), Whose::Unprotected).is_err(), "{bad}");
        }
        let twice = [net(r#","tap":"a""#).expect("a card"), net(r#","tap":"b""#).expect("a card")];
        assert_eq!(check_nets(&twice, Whose::Unprotected), Err(ConfigError::NetTwice("net0".into())));
    }

    #[test]
    fn a_guests_address_is_no_reserved_one() {
        let check =
            |cid, socket: Option<&str>, whose| Vsock { cid, socket: socket.map(Into::into) }.check(whose).is_ok();
        for cid in [0, 1, 2, u32::MAX] {
            assert!(!check(cid, Some("s"), Whose::Unprotected) && !check(cid, None, Whose::Protected), "{cid}");
        }
        assert!(check(3, Some("s"), Whose::Unprotected) && check(3, None, Whose::Protected));
        assert!(!check(3, None, Whose::Unprotected) && !check(3, Some("s"), Whose::Protected));
    }

    #[test]
    fn a_balloon_is_smaller_than_the_memory() {
        let check = |size| Balloon { size, deflate_on_oom: true, free_page_reporting: true }.check(16 << 20).is_ok();
        assert_eq!(
            [0, 4096, 1, (16 << 20) - 4096, 16 << 20, u64::MAX].map(check),
            [true, true, false, true, false, false]
        );
    }

    #[test]
    fn a_console_has_a_socket_where_it_says_so() {
        let check = |text: &str, whose| {
            let console: Console = serde_json::from_str(text).expect("a console");
            console.check(whose).is_ok()
        };
        let (tty, named) = (r#"{"mode":"Tty"}"#, r#"{"mode":"Socket","socket":"s"}"#);
        let (unnamed, odd) = (r#"{"mode":"Socket"}"#, r#"{"mode":"Tty","socket":"s"}"#);
        let results = |whose| [tty, named, unnamed, odd].map(|text| check(text, whose));
        assert_eq!(results(Whose::Unprotected), [true, true, false, false]);
        assert_eq!(results(Whose::Protected), [true, false, true, false]);
        assert!(serde_json::from_str::<Console>(r#"{"mode":"Pty"}"#).is_err());
    }

    #[test]
    fn names_and_addresses_are_what_they_say() {
        for bad in ["", ".", "..", "a/b", "tap%d", "a b", "a:b", "sixteen-letters-", "é"] {
            assert!(InterfaceName::try_from(bad.to_owned()).is_err(), "{bad}");
        }
        assert!(InterfaceName::try_from("fifteen-letters".to_owned()).is_ok());
        for bad in [
            "",
            "02:00:00:00:00",
            "02:00:00:00:00:00:00",
            "2:0:0:0:0:0",
            "03:00:00:00:00:00",
            "00:00:00:00:00:00",
            "+2:00:00:00:00:00",
            "é2:00:00:00:00:0",
        ] {
            assert!(MacAddress::try_from(bad.to_owned()).is_err(), "{bad}");
        }
        let mac = MacAddress::try_from("52:54:00:Ab:00:01".to_owned()).expect("a MAC");
        assert_eq!((mac.bytes(), mac.to_string()), ([0x52, 0x54, 0, 0xab, 0, 1], "52:54:00:ab:00:01".into()));
        assert_eq!(MacAddress::local([0xff; 6]).bytes()[0], 0xfe);
        assert!(MacAddress::new(MacAddress::local([0; 6]).bytes()).is_ok());
    }
}
