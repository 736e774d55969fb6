//! Volumes: held by one at a time, opened under numbers that never repeat, anchored forward only.

use crate::support::vm::SoftVm;
use crate::support::{Lab, anchor, anchor_of, keys_command};
use attest::protocol::{AnchorUpdate, ProblemType};
use fealty_keyprovider::api;
use fealty_keyprovider::client::OneTimeKey;
use policy::disk::{DiskSession, HolderAnswer, ToolMessage};
use std::io::{Read, Write};

#[test]
fn anchors_go_forward_only_and_only_by_the_holder() {
    let lab = Lab::new();
    let mut vm = SoftVm::new(&lab);
    let keys = vm.start(&lab.host);
    let (instance, grant) = (keys.release.instance, &keys.release.volumes[0]);
    let open = grant.open_number.get();
    let update =
        |writer, epoch, closed| AnchorUpdate { anchor: anchor_of(lab.volume, writer, epoch, grant.key_id), closed };
    let put = |vm: &mut SoftVm, update: AnchorUpdate| vm.anchor(instance, &update).map_err(|e| e.problem());
    assert_eq!(put(&mut vm, update(open, 5, false)), Ok(()));
    assert_eq!(put(&mut vm, update(open, 5, false)), Ok(()), "the same again");
    assert_eq!(put(&mut vm, update(open, 4, false)), Err(Some(ProblemType::AnchorBackward)));
    assert_eq!(put(&mut vm, update(open - 1, 9, false)), Err(Some(ProblemType::AnchorBackward)), "an older writer");
    assert_eq!(put(&mut vm, update(open + 1, 0, false)), Err(Some(ProblemType::AnchorBackward)), "a writer to come");
    let foreign = AnchorUpdate { anchor: anchor(policy::VolumeId([7; 16]), open, 9), closed: false };
    assert_eq!(put(&mut vm, foreign), Err(Some(ProblemType::VolumeHeld)), "another volume");
    let other = lab.make_volume("other");
    lab.anchor_volume("other", 1);
    let unheld = AnchorUpdate { anchor: anchor(other, 2, 9), closed: false };
    assert_eq!(put(&mut vm, unheld), Err(Some(ProblemType::VolumeHeld)), "a volume it does not hold");
    let mut stranger = SoftVm::new(&lab);
    assert_eq!(put(&mut stranger, update(open, 6, false)), Err(Some(ProblemType::Forbidden)), "no instance");
    // Closed: free for others, and the same closing anchor once more does no harm.
    assert_eq!(put(&mut vm, update(open, 7, true)), Ok(()));
    assert_eq!(put(&mut vm, update(open, 7, true)), Ok(()));
    assert_eq!(put(&mut vm, update(open, 8, false)), Err(Some(ProblemType::VolumeHeld)));
    assert_eq!(lab.anchor_volume("root", 1).writer().get(), open + 1);
}

#[test]
fn a_volume_has_one_holder() {
    let lab = Lab::new();
    lab.keys(&["vm", "create", "acme", "second"]);
    let file = lab.seal("second", &[lab.volume]);
    let mut vm = SoftVm::new(&lab);
    let keys = vm.start(&lab.host);
    let mut second = SoftVm::of(&lab, "acme", "second", file);
    assert_eq!(second.refused(&lab.host), ProblemType::VolumeHeld);
    let refused = lab.refused(&["volume", "exec", "acme", "root", "--", "true"]);
    assert!(refused.contains("instance 1 of VM payroll"), "{refused}");
    vm.end(keys.release.instance).expect("ended");
    // The end report freed it; while a session holds it, no VM starts.
    let one_time = OneTimeKey::generate().expect("memory");
    let mut admin = lab.admin();
    let path = "/v1/customers/acme/volumes/root/sessions";
    let session: api::SessionView = admin.post(path, &one_time.request()).expect("a session");
    assert_eq!(second.refused(&lab.host), ProblemType::VolumeHeld);
    // Another administrator's connection can't move or end this session.
    lab.keys(&["admin", "add", "bob", "--role", "admin", "--out", "bob.json"]);
    let end = api::SessionEnd { outcome: "done".into() };
    let path = format!("{path}/{}/end", session.session);
    let stolen: Result<api::Done, _> = lab.admin_as("bob.json").post(&path, &end);
    assert!(stolen.is_err());
    let _: api::Done = admin.post(&path, &end).expect("ended");
    let keys = second.start(&lab.host);
    assert!(keys.release.volumes[0].open_number > session.grant.open_number);
}

#[test]
fn a_lost_holder_frees_the_volume_when_its_lease_is_past() {
    let lab = Lab::with(2, crate::support::GO);
    SoftVm::new(&lab).start(&lab.host);
    let start = std::time::Instant::now();
    while !lab.try_keys(&["volume", "exec", "acme", "root", "--", "true"]).status.success() {
        assert!(start.elapsed().as_secs() < 60, "the volume is never free");
        std::thread::sleep(std::time::Duration::from_millis(300));
    }
}

#[test]
fn no_vm_starts_from_a_volume_without_an_anchor() {
    let lab = Lab::new();
    let empty = lab.make_volume("empty");
    let file = lab.seal("payroll", &[lab.volume, empty]);
    let mut vm = SoftVm::of(&lab, "acme", "payroll", file);
    assert_eq!(vm.refused(&lab.host), ProblemType::VolumeHeld);
    // The refusal spent nothing and holds nothing.
    assert_eq!(lab.anchor_volume("root", 1).writer().get(), 2);
    lab.anchor_volume("empty", 1);
    let keys = vm.start(&lab.host);
    assert_eq!(keys.release.volumes.len(), 2);
    assert_ne!(keys.release.volumes[0].key_id, keys.release.volumes[1].key_id);
}

#[test]
fn each_try_to_create_a_volume_has_a_key_id_and_number_of_its_own() {
    let lab = Lab::new();
    lab.make_volume("fresh");
    let mut admin = lab.admin();
    let path = "/v1/customers/acme/volumes/fresh/sessions";
    let mut seen = std::collections::HashSet::new();
    for number in 1..4 {
        let one_time = OneTimeKey::generate().expect("memory");
        let session: api::SessionView = admin.post(path, &one_time.request()).expect("a session");
        assert_eq!(session.grant.open_number.get(), number);
        assert_eq!(session.grant.anchor, None);
        assert!(seen.insert(session.grant.key_id), "a key id twice");
        let end = api::SessionEnd { outcome: "failed".into() };
        let _: api::Done = admin.post(&format!("{path}/{}/end", session.session), &end).expect("ended");
    }
    // Once anchored, the id stays.
    lab.anchor_volume("fresh", 1);
    let mut ids = std::collections::HashSet::new();
    for _ in 0..2 {
        let one_time = OneTimeKey::generate().expect("memory");
        let session: api::SessionView = admin.post(path, &one_time.request()).expect("a session");
        assert!(session.grant.anchor.is_some());
        ids.insert(session.grant.key_id);
        let end = api::SessionEnd { outcome: "done".into() };
        let _: api::Done = admin.post(&format!("{path}/{}/end", session.session), &end).expect("ended");
    }
    assert_eq!(ids.len(), 1);
    // Nobody brings a key of his own.
    let one_time = OneTimeKey::generate().expect("memory");
    let session: api::SessionView = admin.post(path, &one_time.request()).expect("a session");
    let grant = &session.grant;
    let update = api::SessionAnchor { anchor: anchor(grant.volume, grant.open_number.get(), 2) };
    let answer: Result<api::Done, _> = admin.put(&format!("{path}/{}/anchor", session.session), &update);
    assert!(answer.expect_err("refused").to_string().contains("which this provider did not issue"));
}

#[test]
fn volume_exec_hands_the_volume_to_its_command_and_ends_with_its_code() {
    let lab = Lab::new();
    let script = r#"KEYS_FD="$2" exec "$0" --exact volumes::plays_fealty_disk --nocapture"#;
    let this = std::env::current_exe().expect("this test").display().to_string();
    let url = lab.provider.url.to_string();
    let run = |mode: &str| {
        keys_command()
            .args(["volume", "exec", "acme", "root", "--profile", &lab.text("keys/admin.json"), "--url", &url])
            .args(["--", "sh", "-c", script, &this])
            .env("FAKE_DISK", mode)
            .output()
            .expect("runs")
    };
    let said = run("anchor");
    assert_eq!(said.status.code(), Some(0), "{}", String::from_utf8_lossy(&said.stderr));
    assert_eq!(run("backward").status.code(), Some(101), "the command's own code");
    assert_eq!(run("killed").status.code(), Some(128 + 6), "a signal");
    assert_eq!(lab.events("volume-event").len(), 1);
    let ended = lab.events("volume-session-ended");
    assert_eq!(ended.len(), 4, "each session ended: {ended:?}");
    lab.keys(&["volume", "exec", "acme", "root", "--", "true"]);
    let missing = lab.refused(&["volume", "exec", "acme", "root", "--", "/nowhere"]);
    assert!(missing.contains("/nowhere can't be started"), "{missing}");
    lab.keys(&["volume", "exec", "acme", "root", "--", "true"]);
}

#[test]
fn a_command_ends_once_its_session_is_lost() {
    let lab = Lab::new();
    let url = lab.provider.url.to_string();
    let child = keys_command()
        .args(["volume", "exec", "acme", "root", "--profile", &lab.text("keys/admin.json"), "--url", &url])
        .args(["--", "sh", "-c", "touch \"$0\"; exec sleep 600", &lab.text("started")])
        .stderr(std::process::Stdio::piped())
        .spawn()
        .expect("runs");
    let start = std::time::Instant::now();
    while !lab.path("started").exists() {
        assert!(start.elapsed().as_secs() < 60, "it never starts");
        std::thread::sleep(std::time::Duration::from_millis(50));
    }
    // As after a restore, or once an administrator gave the volume away: the next renewal is refused.
    lab.sql("DELETE FROM holders");
    let output = child.wait_with_output().expect("ended");
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(128 + 9), "{said}");
    assert!(said.contains("no longer holds volume root") && said.contains("the command was ended"), "{said}");
}

/// Not a test by itself: the command that `volume exec` runs above.
#[test]
fn plays_fealty_disk() {
    let (Ok(mode), Ok(fd)) = (std::env::var("FAKE_DISK"), std::env::var("KEYS_FD")) else { return };
    // Another descriptor of the same socket: opening it by path is not possible, taking it over needs no unsafe code.
    let fd: i32 = fd.parse().expect("a number");
    let own = rustix::process::pidfd_open(rustix::process::getpid(), rustix::process::PidfdFlags::empty()).expect("me");
    let socket = rustix::process::pidfd_getfd(&own, fd, rustix::process::PidfdGetfdFlags::empty()).expect("the socket");
    let mut stream = std::os::unix::net::UnixStream::from(socket);
    let mut length = [0; 4];
    stream.read_exact(&mut length).expect("a length");
    let mut text = vec![0; u32::from_be_bytes(length) as usize];
    stream.read_exact(&mut text).expect("a session");
    let session: DiskSession = serde_json::from_slice(&text).expect("a session");
    let mut kek = [0; 32];
    stream.read_exact(&mut kek).expect("a key");
    assert_ne!(kek, [0; 32]);
    let open = session.grant.open_number.get();
    let mut tell = |message: &ToolMessage| -> HolderAnswer {
        let text = serde_json::to_vec(message).expect("json");
        stream.write_all(&(text.len() as u32).to_be_bytes()).expect("sent");
        stream.write_all(&text).expect("sent");
        stream.read_exact(&mut length).expect("an answer");
        let mut text = vec![0; u32::from_be_bytes(length) as usize];
        stream.read_exact(&mut text).expect("an answer");
        serde_json::from_slice(&text).expect("an answer")
    };
    match mode.as_str() {
        "anchor" => {
            let anchor = anchor_of(session.grant.volume, open, 3, session.grant.key_id);
            assert_eq!(tell(&ToolMessage::Anchor(anchor)), HolderAnswer::Kept);
            assert_eq!(tell(&ToolMessage::Event("2 records dropped".into())), HolderAnswer::Kept);
        }
        "backward" => {
            let answer = tell(&ToolMessage::Anchor(anchor_of(session.grant.volume, open - 1, 3, session.grant.key_id)));
            assert!(matches!(answer, HolderAnswer::Refused(_)));
            panic!("the anchor was refused: {answer:?}");
        }
        _ => std::process::abort(),
    }
}
