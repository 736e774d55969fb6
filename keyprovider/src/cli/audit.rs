//! `audit`, `dump`, `backup`.

use super::args::{AuditCommand, DumpCommand};
use super::files::Pending;
use super::{CliError, Session};
use crate::api::{AuditPage, BackupView, Done, StreamView};
use crate::clock::utc;
use crate::server::problem::chain;
use attest::stream::{Direction, Opener, StreamError, StreamInfo};
use policy::Digest;
use policy::audit::{Actor, AuditEvent};
use sha2::Digest as _;
use std::fs::File;
use std::io::{BufReader, Read, Seek, SeekFrom};
use std::path::Path;

/// `audit …`
pub(super) fn audit(mut s: Session, command: AuditCommand) -> Result<(), CliError> {
    let AuditCommand::List { customer, from } = command;
    let broken = |sequence: u64| {
        CliError::Input(format!(
            "the log is broken at event {sequence}: it does not continue its chain; keep what you have"
        ))
    };
    let (mut next, mut previous) = (1, Digest::of(b""));
    loop {
        let page: AuditPage = s.client.get(&format!("/v1/customers/{customer}/audit?from={next}"))?;
        if page.events.is_empty() {
            return Ok(());
        }
        for bytes in page.events {
            let event: AuditEvent = serde_json::from_slice(&bytes).map_err(|_| broken(next))?;
            if event.sequence != next || event.previous != previous || event.customer != customer {
                return Err(broken(next));
            }
            (next, previous) = (next + 1, Digest::of(&bytes));
            if event.sequence >= from {
                s.out.print(line(&event), &event)?;
            }
        }
    }
}

fn line(event: &AuditEvent) -> String {
    let actor = match &event.actor {
        Actor::Provider => "provider",
        Actor::Admin(name) => name,
        Actor::Instance => "instance",
        Actor::Stranger => "stranger",
    };
    let kind = serde_json::to_value(event.kind).ok().and_then(|v| v.as_str().map(str::to_owned)).unwrap_or_default();
    let mut text = format!("{} {} {kind} by {actor}", event.sequence, utc(event.time_us));
    let mut add = |name: &str, value: Option<String>| {
        if let Some(value) = value {
            // Names too can come from a VM process: none may look like another field or move the cursor.
            let name = name.replace(|c: char| !c.is_ascii_alphanumeric() && !"._-".contains(c), "?");
            text.push_str(&format!(" {name}={}", value.replace(char::is_control, " ")));
        }
    };
    add("vm", event.vm.as_ref().map(ToString::to_string));
    add("instance", event.instance.map(|i| i.to_string()));
    add("host", event.host.map(|h| h.to_string()[..16].to_owned()));
    add("volume", event.volume.map(|v| v.to_string()));
    add("attestation", event.attestation.map(|a| a.to_string()));
    for (name, value) in &event.details {
        add(name, Some(value.clone()));
    }
    text
}

/// `dump …`
pub(super) fn dump(mut s: Session, command: DumpCommand) -> Result<(), CliError> {
    let DumpCommand::Open { customer, input, key, out } = command;
    let bad = |e: StreamError| CliError::Input(format!("{}: {}", input.display(), chain(&e)));
    let failed = |e| CliError::Read(input.clone(), e);
    let mut file = File::open(&input).map_err(failed)?;
    let tag = last_bytes(&mut file).map_err(failed)?;
    let streams: Vec<StreamView> = s.client.get(&format!("/v1/customers/{customer}/streams"))?;
    let wanted = |s: &&StreamView| key.map_or(s.tag.as_deref() == Some(&tag), |key| s.key_id == key);
    let stream = streams.iter().find(wanted).ok_or_else(|| {
        let known: Vec<String> = streams.iter().take(5).map(|s| format!("{} of {}", s.key_id, s.vm)).collect();
        let what = "no core dump of this customer is known to end as this file does; name its key with --key";
        CliError::Input(format!("{what} (newest: {})", known.join(", ")))
    })?;
    let ask = format!("/v1/customers/{customer}/streams/{}/open", stream.key_id);
    let (key_id, key) = s.client.key(&ask, &customer, stream.vm.as_str())?;
    let direction = Direction::CoreDump;
    let info = StreamInfo { customer: &customer, vm: &stream.vm, key_id, direction, connection: 0 };
    let opener = Opener::new(BufReader::new(file), &key, &info).map_err(bad)?;
    let mut pending = Pending::beside(&out, 0o600)?;
    // Only a stream that is whole gets its name.
    let (length, _) = opener.copy_to(pending.file()).map_err(bad)?;
    pending.finish()?;
    let line = format!("opened the core dump of VM {}, instance {}: {length} bytes", stream.vm, stream.instance);
    s.out.print(line, stream)
}

/// The last 16 bytes of a stream in hex: its final tag. The file is at its start again.
fn last_bytes(file: &mut File) -> std::io::Result<String> {
    let mut tag = [0; 16];
    if file.seek(SeekFrom::End(-16)).is_ok() {
        file.read_exact(&mut tag)?;
    }
    file.seek(SeekFrom::Start(0))?;
    Ok(hex::encode(tag))
}

/// `backup`
pub(super) fn backup(mut s: Session, out: &Path) -> Result<(), CliError> {
    let view: BackupView = s.client.post("/v1/backups", &())?;
    let fetched = fetch(&mut s, &view, out);
    let _: Result<Done, _> = s.client.delete(&format!("/v1/backups/{}", view.id));
    fetched?;
    let line = format!(
        "backup of {} bytes in {}; it opens nothing without master.key, whose copy belongs in another place",
        view.length,
        out.display()
    );
    s.out.print(line, &view)
}

fn fetch(s: &mut Session, view: &BackupView, out: &Path) -> Result<(), CliError> {
    let mut pending = Pending::beside(out, 0o600)?;
    let mut hash = sha2::Sha256::new();
    for chunk in 0..view.length.div_ceil(view.chunk.max(1)) {
        let bytes = s.client.bytes(&format!("/v1/backups/{}/{chunk}", view.id))?;
        hash.update(&bytes);
        pending.write(&bytes)?;
    }
    if Digest(hash.finalize().into()) != view.digest {
        return Err(CliError::Input("the backup changed on its way; fetch it again".into()));
    }
    pending.finish()
}

#[cfg(test)]
mod tests {
    use super::*;
    use policy::audit::AuditKind;

    #[test]
    fn neither_name_nor_value_of_a_detail_steers_the_terminal_or_poses_as_another_field() {
        let event = AuditEvent {
            sequence: 7,
            previous: Digest([0; 32]),
            time_us: 0,
            customer: "acme".parse().expect("label"),
            actor: Actor::Instance,
            kind: AuditKind::OperationPermitted,
            vm: None,
            instance: None,
            host: None,
            volume: None,
            attestation: None,
            details: [("parameter.a\u{1b}[2J vm=b\n9".to_owned(), "x\u{1b}\r\ny".to_owned())].into(),
        };
        assert_eq!(line(&event), "7 1970-01-01 00:00:00Z operation-permitted by instance parameter.a??2J?vm?b?9=x   y");
    }
}
