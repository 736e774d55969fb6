//! The host's ends of a VM's lines: TAPs and sockets, opened before the sandbox closes.

use crate::api::listen;
use crate::exit::{Exit, Failure};
use crate::machine::console::Line;
use crate::machine::{BalloonSettings, Machine, MachineError, NetSlot, Tap};
use crate::run::disks::limits;
use policy::config::FileName;
use policy::device::{Balloon, ConsoleMode, Devices, InterfaceName, MacAddress, Net, QUEUE_PAIRS_MAX};
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;
use std::os::unix::net::UnixListener;
use std::path::Path;

/// `--attach NAME=TAP[,queues=N]`, parsed: what a network that a VM file names is connected to. The file is sealed, so that
/// the operator says it before anybody knows what the file says.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Attachment {
    /// The network's name in the configuration.
    pub name: FileName,
    /// The host's TAP.
    pub tap: InterfaceName,
    /// Its queues: as many as the network has pairs.
    pub queues: u16,
}

impl std::str::FromStr for Attachment {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let shape = || format!("an attachment is NAME=TAP or NAME=TAP,queues=N with N from 1 to {QUEUE_PAIRS_MAX}");
        let (name, tap) = text.split_once('=').ok_or_else(shape)?;
        let (tap, queues) = match tap.split_once(',') {
            None => (tap, 1),
            Some((tap, more)) => (tap, more.strip_prefix("queues=").and_then(|n| n.parse().ok()).ok_or_else(shape)?),
        };
        let name = FileName::try_from(name.to_owned()).map_err(|e| e.to_string())?;
        let tap = InterfaceName::try_from(tap.to_owned()).map_err(|e| e.to_string())?;
        if (1..=QUEUE_PAIRS_MAX).contains(&queues) { Ok(Self { name, tap, queues }) } else { Err(shape()) }
    }
}

/// TAPs, open, by the names of their networks.
#[derive(Default)]
pub struct Taps {
    open: BTreeMap<FileName, Tap>,
    /// Whose each is: one with several queues could be attached again, and would spread one network's frames over two cards.
    whose: BTreeMap<InterfaceName, FileName>,
}

impl Taps {
    /// Opens what the operator attached.
    pub fn attached(attachments: &[Attachment]) -> Result<Self, Failure> {
        let mut taps = Self::default();
        for Attachment { name, tap, queues } in attachments {
            taps.open(name, tap, *queues)?;
        }
        Ok(taps)
    }

    /// Opens what the configuration of an unprotected VM names.
    pub fn configured(nets: &[Net]) -> Result<Self, Failure> {
        let mut taps = Self::default();
        for net in nets {
            if let Some(tap) = &net.tap {
                taps.open(&net.id, tap, net.queue_pairs())?;
            }
        }
        Ok(taps)
    }

    fn open(&mut self, name: &FileName, tap: &InterfaceName, queues: u16) -> Result<(), Failure> {
        let bad = |why: String| Failure::new(Exit::Host, format!("network {name}: {why}"));
        if let Some(other) = self.whose.insert(tap.clone(), name.clone()) {
            return Err(bad(format!("its TAP {} is that of network {other} already", tap.as_str())));
        }
        let tap = Tap::open(tap, queues).map_err(|e| bad(crate::exit::chain(&e)))?;
        match self.open.insert(name.clone(), tap) {
            None => Ok(()),
            Some(_) => Err(bad("attached twice".into())),
        }
    }

    /// Adds the cards of `nets` to `machine`, each on its TAP. No TAP may be missing, and none left.
    fn into_machine(mut self, nets: &[Net], machine: &mut Machine) -> Result<(), Failure> {
        for net in nets {
            let bad = |why: String| Failure::new(Exit::Host, format!("network {}: {why}", net.id));
            let tap = self.open.remove(&net.id);
            let tap = tap.ok_or_else(|| bad(format!("say which TAP it is, with --attach {}=TAP", net.id)))?;
            if tap.queues() != net.queue_pairs() {
                let (has, needs) = (tap.queues(), net.queue_pairs());
                return Err(bad(format!("it has {needs} queue pair(s), and {has} queue(s) were attached")));
            }
            let mac = match net.mac {
                Some(mac) => mac,
                None => made_up().map_err(|e| bad(format!("cannot make up a MAC address: {e}")))?,
            };
            let slot = NetSlot {
                id: net.id.to_string(),
                mac,
                mtu: net.mtu,
                queue_size: net.queue_size,
                limits: net.rate_limiter_config.map(limits).unwrap_or_default(),
                ports: tap.into_ports(),
            };
            machine.add_net(slot).map_err(|e: MachineError| Failure::of(Exit::Host, &e))?;
        }
        match self.open.keys().next() {
            None => Ok(()),
            Some(name) => Err(Failure::new(Exit::Usage, format!("--attach {name}: the VM has no such network"))),
        }
    }
}

/// All ends but the serial line's.
#[derive(Default)]
pub struct Ends {
    taps: Taps,
    console: Option<UnixListener>,
    vsock: Option<UnixListener>,
}

impl Ends {
    /// Opens what the operator attached.
    pub fn attached(attachments: &[Attachment], console: Option<&Path>, vsock: Option<&Path>) -> Result<Self, Failure> {
        let taps = Taps::attached(attachments)?;
        Ok(Self { taps, console: console.map(listen).transpose()?, vsock: vsock.map(listen).transpose()? })
    }

    /// Opens what the configuration of an unprotected VM names; relative paths count from `folder`.
    pub fn configured(devices: Devices<'_>, folder: &Path) -> Result<Self, Failure> {
        let socket = |path: Option<&String>| path.map(|path| listen(&folder.join(path))).transpose();
        let console = socket(devices.console.and_then(|console| console.socket.as_ref()))?;
        let vsock = socket(devices.vsock.and_then(|vsock| vsock.socket.as_ref()))?;
        Ok(Self { taps: Taps::configured(devices.net)?, console, vsock })
    }
}

/// Adds what a configuration has beside disks, which come first, each connected to its end here. A virtio console that takes
/// the serial line's place comes later.
pub fn add_devices(devices: Devices<'_>, ends: Ends, machine: &mut Machine) -> Result<(), Failure> {
    ends.taps.into_machine(devices.net, machine)?;
    let wanted = devices.console.is_some_and(|console| console.mode == ConsoleMode::Socket);
    match (wanted, ends.console) {
        (true, Some(listener)) => {
            machine.add_console(Line::socket(listener)).map_err(|e| Failure::of(Exit::Host, &e))?;
        }
        (true, None) => {
            return Err(Failure::new(Exit::Host, "say where its virtio console is, with --console-socket PATH"));
        }
        (false, Some(_)) => {
            return Err(Failure::new(Exit::Usage, "--console-socket: the VM has no console on a socket"));
        }
        (false, None) => {}
    }
    if devices.rng.is_some() {
        machine.add_rng().map_err(|e| Failure::of(Exit::Host, &e))?;
    }
    match (devices.vsock, ends.vsock) {
        (Some(vsock), Some(listener)) => {
            machine.add_vsock(vsock.cid, listener).map_err(|e| Failure::of(Exit::Host, &e))?;
        }
        (Some(_), None) => return Err(Failure::new(Exit::Host, "say where its vsock is, with --vsock-socket PATH")),
        (None, Some(_)) => return Err(Failure::new(Exit::Usage, "--vsock-socket: the VM has no vsock")),
        (None, None) => {}
    }
    if let Some(Balloon { size, deflate_on_oom, free_page_reporting }) = devices.balloon {
        let settings = BalloonSettings { size, deflate_on_oom, free_page_reporting };
        machine.add_balloon(settings).map_err(|e| Failure::of(Exit::Host, &e))?;
    }
    if devices.pvpanic {
        machine.add_panic();
    }
    Ok(())
}

/// What a configuration has beside disks, as `vm.info` shows it: nothing of where it leads on the host.
pub fn describe(devices: Devices<'_>) -> Map<String, Value> {
    let net = |net: &Net| json!({ "id": net.id, "num_queues": net.num_queues, "queue_size": net.queue_size });
    let nets: Vec<_> = devices.net.iter().map(net).collect();
    let all = [
        ("net", (!nets.is_empty()).then(|| json!(nets))),
        ("rng", devices.rng.map(|rng| json!(rng))),
        ("console", devices.console.map(|console| json!({ "mode": console.mode }))),
        ("vsock", devices.vsock.map(|vsock| json!({ "cid": vsock.cid }))),
        ("balloon", devices.balloon.map(|balloon| json!(balloon))),
        ("pvpanic", devices.pvpanic.then_some(Value::Bool(true))),
    ];
    all.into_iter().filter_map(|(key, value)| Some((key.to_owned(), value?))).collect()
}

fn made_up() -> Result<MacAddress, getrandom::Error> {
    let mut random = [0; 6];
    getrandom::fill(&mut random)?;
    Ok(MacAddress::local(random))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_attachment_is_a_name_and_a_tap() {
        let parse = |text: &str| text.parse::<Attachment>().map(|a| (a.name.to_string(), a.tap.to_string(), a.queues));
        assert_eq!(parse("net0=tap7"), Ok(("net0".into(), "tap7".into(), 1)));
        assert_eq!(parse("net0=tap7,queues=4"), Ok(("net0".into(), "tap7".into(), 4)));
        for bad in
            ["", "net0", "net0=", "=tap7", "../x=tap7", "a=b/c", "a=b,queues=0", "a=b,queues=9", "a=b,queue=1", "a=b,"]
        {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }
}
