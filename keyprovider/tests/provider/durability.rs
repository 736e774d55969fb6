//! SIGKILL, full disks, backups: no number is given out twice, and the log stays whole.

use crate::support::vm::SoftVm;
use crate::support::{Lab, Provider, anchor, anchor_of, keys_command};
use attest::protocol::{AnchorUpdate, ProblemType};
use std::collections::HashSet;
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

#[test]
fn killed_at_any_moment_the_provider_gives_out_no_number_twice() {
    let mut lab = Lab::new();
    let names: Vec<String> = (0..4).map(|n| format!("vm-{n}")).collect();
    let files: Vec<_> = names
        .iter()
        .map(|name| {
            let volume = lab.make_volume(name);
            lab.anchor_volume(name, 1);
            lab.keys(&["vm", "create", "acme", name]);
            lab.seal(name, &[volume])
        })
        .collect();
    let mut seen = HashSet::new();
    let mut releases = 0;
    for round in 0..4u64 {
        let (stop, released) = (AtomicBool::new(false), AtomicUsize::new(0));
        let got: Vec<_> = std::thread::scope(|scope| {
            let tasks: Vec<_> = names
                .iter()
                .zip(&files)
                .map(|(name, file)| {
                    let mut vm = SoftVm::of(&lab, "acme", name, *file);
                    let (host, stop, released) = (&lab.host, &stop, &released);
                    scope.spawn(move || {
                        let mut got = Vec::new();
                        while !stop.load(Ordering::SeqCst) {
                            let Ok(keys) = vm.attest(host) else { break };
                            let volume = &keys.release.volumes[0];
                            got.push((name.clone(), keys.release.instance.get(), volume.open_number.get()));
                            released.fetch_add(1, Ordering::SeqCst);
                        }
                        got
                    })
                })
                .collect();
            // Amid releases, however slow this machine is, and each round a little later.
            let until = Instant::now() + Duration::from_secs(60);
            while released.load(Ordering::SeqCst) < 2 && Instant::now() < until {
                std::thread::sleep(Duration::from_millis(1));
            }
            std::thread::sleep(Duration::from_millis(7 * round));
            let pid = lab.provider.pid();
            rustix::process::kill_process(pid, rustix::process::Signal::KILL).expect("killed");
            stop.store(true, Ordering::SeqCst);
            tasks.into_iter().flat_map(|t| t.join().expect("joined")).collect()
        });
        releases += got.len();
        for (name, instance, open) in got {
            assert!(seen.insert((name.clone(), "instance", instance)), "instance {instance} of {name} twice");
            assert!(seen.insert((name.clone(), "opening", u64::from(open))), "opening {open} of {name} twice");
        }
        lab.restart();
        // The chain is checked by the tool; every release that anybody got stands in it.
        assert!(lab.events("keys-released").len() >= releases);
    }
    assert!(releases > 4, "only {releases} releases: the test showed nothing");
    assert_eq!(lab.integrity(), "ok");
}

#[test]
fn a_full_disk_stops_the_provider_from_releasing_and_nothing_else() {
    let mut lab = Lab::new();
    let mut vm = SoftVm::new(&lab);
    let instance = vm.start(&lab.host).release.instance;
    vm.end(instance).expect("ended");
    lab.provider.kill();
    // No file may grow beyond 2 MiB: a write beyond fails as on a full disk, first of the write-ahead log.
    let limited = "ulimit -f 4096; trap '' XFSZ; exec \"$@\"";
    let mut command = Command::new("sh");
    command.args(["-c", limited, "sh", env!("CARGO_BIN_EXE_fealty-keys")]);
    lab.provider = Provider::start_as(command, &lab.path("keys"), "/dev/null".as_ref());
    let mut refused = 0;
    for _ in 0..400 {
        let mut vm = SoftVm::new(&lab);
        if let Err(error) = vm.attest(&lab.host) {
            assert_eq!(error.problem(), Some(ProblemType::Unavailable), "{error}");
            refused += 1;
            break;
        }
    }
    assert_eq!(refused, 1, "the disk never got full");
    lab.restart();
    assert_eq!(lab.integrity(), "ok");
    lab.audit();
    SoftVm::new(&lab).start(&lab.host);
}

#[test]
fn one_provider_serves_from_a_folder() {
    let lab = Lab::new();
    let second = keys_command().args(["serve", "--listen", "127.0.0.1:0", "--dir"]).arg(lab.path("keys")).output();
    let second = second.expect("runs");
    assert_eq!(second.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&second.stderr).contains("another process"));
}

#[test]
fn a_restored_provider_voids_what_it_can_not_know() {
    let mut lab = Lab::with(3, crate::support::GO);
    let mut running = SoftVm::new(&lab);
    let before = running.start(&lab.host).release;
    let key_id = before.volumes[0].key_id;
    lab.keys(&["backup", "--out", "backup.db"]);
    // After the backup the VM goes on, and a second instance starts.
    let mut lost = SoftVm::new(&lab);
    let lost_instance = lost.start(&lab.host).release;
    let lost_volume = &lost_instance.volumes[0];
    let newer = anchor_of(lab.volume, lost_volume.open_number.get(), 4, lost_volume.key_id);
    lost.anchor(lost_instance.instance, &AnchorUpdate { anchor: newer.clone(), closed: false }).expect("kept");
    lab.provider.kill();
    std::fs::create_dir(lab.path("again")).expect("a folder");
    // A backup serves nobody as it is, and opens nothing without the master key.
    std::fs::copy(lab.path("backup.db"), lab.path("again/keys.db")).expect("copied");
    let text = |name: &str| lab.text(name);
    let restore = || keys_command().args(["restore", "--dir", &text("again"), "--from", &text("backup.db")]).output();
    let restore = || restore().expect("runs");
    std::fs::write(lab.path("again/master.key"), [0; 32]).expect("written");
    rustix::fs::chmod(lab.path("again/master.key"), 0o600.into()).expect("chmod");
    let serve = keys_command().args(["serve", "--listen", "127.0.0.1:0", "--dir", &lab.text("again")]).output();
    assert!(String::from_utf8_lossy(&serve.expect("runs").stderr).contains("is a backup"));
    assert!(!restore().status.success(), "never over a database");
    for file in ["keys.db", "keys.db-wal", "keys.db-shm"] {
        let _ = std::fs::remove_file(lab.path("again").join(file));
    }
    assert!(!restore().status.success(), "another master key");
    std::fs::remove_file(lab.path("again/master.key")).expect("removed");
    assert!(!restore().status.success(), "no master key");
    std::fs::copy(lab.path("keys/master.key"), lab.path("again/master.key")).expect("copied");
    let done = restore();
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    lab.provider = Provider::start(&lab.path("again"));

    // Leases of before are void, for the instance that the backup knows and for the one that it does not.
    running.reconnect(&lab);
    lost.reconnect(&lab);
    for vm in [&mut running, &mut lost] {
        vm.operation = policy::operation::OperationRequest::plain(policy::Operation::Renew);
        assert_eq!(vm.refused(&lab.host), ProblemType::OldInstance);
    }
    lab.keys(&["customer", "confirm", "acme", "--policy", "1", "--reference", "1"]);
    // A new instance waits until whoever was never seen has surely lost its lease …
    let mut vm = SoftVm::new(&lab);
    assert_eq!(vm.refused(&lab.host), ProblemType::StillRuns);
    lab.keys(&["vm", "confirm", "acme", "payroll"]);
    vm.earlier_peer = policy::instance::EarlierPeer::Unknown;
    // … and for an administrator to say that the anchor is the volume's newest, or what that is.
    assert_eq!(vm.refused(&lab.host), ProblemType::VolumeHeld);
    let stale = crate::support::text_of(&anchor(lab.volume, 1, 0));
    lab.refused(&["volume", "confirm", "acme", "root", "--anchor", &stale]);
    lab.keys(&["volume", "confirm", "acme", "root", "--anchor", &crate::support::text_of(&newer)]);
    lab.refused(&["volume", "confirm", "acme", "root"]);
    let after = vm.start(&lab.host).release;
    assert!(after.instance.get() > 1_700_000_000_000_000, "above the time of the restore: {}", after.instance);
    assert!(after.volumes[0].open_number > lost_instance.volumes[0].open_number);
    assert_ne!(after.volumes[0].key_id, key_id, "new writes have a new key");
    assert_eq!(after.volumes[0].anchor, Some(newer));
    assert_eq!(lab.events("provider-restored").len(), 1);
    assert_eq!(lab.events("anchor-confirmed").len(), 2);
}

#[test]
fn a_killed_provider_s_write_ahead_log_does_not_undo_a_restore() {
    let mut lab = Lab::new();
    lab.keys(&["backup", "--out", "backup.db"]);
    let lost = SoftVm::new(&lab).start(&lab.host).release;
    lab.provider.kill();
    let restore =
        || keys_command().args(["restore", "--dir", &lab.text("keys"), "--from", &lab.text("backup.db")]).output();
    let log = lab.path("keys/keys.db-wal");
    assert!(std::fs::metadata(&log).expect("a killed provider leaves it").len() > 0);
    std::fs::remove_file(lab.path("keys/keys.db")).expect("removed");
    for left in ["keys.db-wal", "keys.db-shm"] {
        let refused = restore().expect("runs");
        let said = String::from_utf8_lossy(&refused.stderr).into_owned();
        assert!(!refused.status.success() && said.contains(left) && said.contains("move it away"), "{said}");
        assert!(!lab.path("keys/keys.db").exists());
        std::fs::remove_file(lab.path("keys").join(left)).expect("removed");
    }
    // Neither does what a killed restore left.
    std::fs::write(lab.path("keys/restoring.db-journal"), b"left").expect("written");
    crate::support::good(restore().expect("runs"));
    assert!(!lab.path("keys/restoring.db-journal").exists());
    lab.provider = Provider::start(&lab.path("keys"));
    lab.keys(&["customer", "confirm", "acme", "--policy", "1", "--reference", "1"]);
    let mut vm = SoftVm::new(&lab);
    assert_eq!(vm.refused(&lab.host), ProblemType::StillRuns);
    lab.keys(&["vm", "confirm", "acme", "payroll"]);
    lab.keys(&["volume", "confirm", "acme", "root"]);
    let after = vm.start(&lab.host).release;
    assert!(after.volumes[0].open_number > lost.volumes[0].open_number);
}

#[test]
fn a_restored_provider_waits_for_leases_that_no_policy_of_the_backup_gave() {
    let mut lab = Lab::with(2, crate::support::GO);
    lab.keys(&["backup", "--out", "backup.db"]);
    // The backup knows only the short lease.
    lab.set_policy(604_800, crate::support::GO);
    SoftVm::new(&lab).start(&lab.host);
    lab.restore("backup.db");
    lab.keys(&["customer", "confirm", "acme", "--policy", "1", "--reference", "1"]);
    lab.keys(&["volume", "confirm", "acme", "root"]);
    let listed: serde_json::Value =
        serde_json::from_str(lab.keys(&["vm", "list", "acme", "--json"]).trim()).expect("a VM");
    let restored = lab.events("provider-restored").pop().expect("an event");
    let waits =
        listed["unconfirmed_until_us"].as_u64().expect("it waits") - restored["time_us"].as_u64().expect("time");
    assert!(waits > 604_800_000_000, "{waits}");
    assert_eq!(SoftVm::new(&lab).refused(&lab.host), ProblemType::StillRuns);
    // When that time is past, nobody needs to confirm anything.
    lab.stopped_sql("UPDATE vms SET unconfirmed_until_us = 1");
    SoftVm::new(&lab).start(&lab.host);
}

#[test]
fn a_confirmation_that_comes_too_late_ends_no_instance() {
    let mut lab = Lab::new();
    lab.keys(&["backup", "--out", "backup.db"]);
    lab.restore("backup.db");
    lab.keys(&["customer", "confirm", "acme", "--policy", "1", "--reference", "1"]);
    lab.keys(&["volume", "confirm", "acme", "root"]);
    lab.stopped_sql("UPDATE vms SET unconfirmed_until_us = 1");
    let mut vm = SoftVm::new(&lab);
    let instance = vm.start(&lab.host).release.instance;
    let said = lab.refused(&["vm", "confirm", "acme", "payroll"]);
    assert!(said.contains("waits for no confirmation"), "{said}");
    vm.report(instance, policy::report::ReportEvent::Runs).expect("it lives");
    vm.operation = policy::operation::OperationRequest::plain(policy::Operation::Renew);
    assert_eq!(vm.start(&lab.host).release.instance, instance);
    // Nor does the confirmation itself end what was started since the restore.
    lab.stopped_sql("UPDATE vms SET unconfirmed_until_us = 9000000000000000");
    lab.keys(&["vm", "confirm", "acme", "payroll"]);
    vm.reconnect(&lab);
    assert_eq!(vm.start(&lab.host).release.instance, instance);
}

#[test]
fn a_volume_that_was_filled_after_the_backup_opens_once_its_anchor_is_confirmed() {
    let mut lab = Lab::new();
    let volume = lab.make_volume("data");
    lab.make_volume("empty");
    let file = lab.seal("payroll", &[volume]);
    lab.keys(&["backup", "--out", "backup.db"]);
    let newest = lab.anchor_volume("data", 2);
    lab.restore("backup.db");
    lab.keys(&["customer", "confirm", "acme", "--policy", "1", "--reference", "1"]);
    lab.keys(&["vm", "confirm", "acme", "payroll"]);
    lab.keys(&["volume", "confirm", "acme", "data", "--anchor", &crate::support::text_of(&newest)]);
    let mut vm = SoftVm::of(&lab, "acme", "payroll", file);
    assert_eq!(vm.start(&lab.host).release.volumes[0].anchor, Some(newest));
    // One that was never filled waits too: the provider can't know.
    let one_time = fealty_keyprovider::client::OneTimeKey::generate().expect("memory");
    let open = "/v1/customers/acme/volumes/empty/sessions";
    let refused: Result<fealty_keyprovider::api::SessionView, _> = lab.admin().post(open, &one_time.request());
    assert!(refused.is_err());
    lab.keys(&["volume", "confirm", "acme", "empty"]);
    lab.anchor_volume("empty", 1);
}

#[test]
fn what_a_backup_brings_back_is_named_and_releases_nothing_before_somebody_confirms_it() {
    let mut lab = Lab::new();
    lab.keys(&["admin", "add", "ann", "--role", "admin", "--out", "ann.json"]);
    lab.keys(&["admin", "add", "bob", "--role", "auditor", "--customer", "acme", "--out", "bob.json"]);
    lab.keys(&["backup", "--out", "backup.db"]);
    // Taken away since: an administrator, a policy that lets a VM start, and reference values.
    lab.keys(&["admin", "revoke", "ann"]);
    lab.set_policy(600, "");
    lab.set_reference();
    assert_eq!(SoftVm::new(&lab).refused(&lab.host), ProblemType::PolicyRefuses);
    lab.provider.kill();
    for file in ["keys.db", "keys.db-wal", "keys.db-shm"] {
        let _ = std::fs::remove_file(lab.path("keys").join(file));
    }
    let restore = |more: &[&str]| {
        let mut command = keys_command();
        command.args(["restore", "--dir", &lab.text("keys"), "--from", &lab.text("backup.db")]).args(more);
        command.output().expect("runs")
    };
    let unknown = restore(&["--revoke", "nobody"]);
    assert!(String::from_utf8_lossy(&unknown.stderr).contains("no administrator nobody"));
    let said = crate::support::good(restore(&["--revoke", "ann"]));
    assert!(said.trim_end().ends_with("administrators: admin, bob"), "{said}");
    lab.provider = Provider::start(&lab.path("keys"));
    assert!(!lab.try_keys_as(&lab.text("ann.json"), &["customer", "list"]).status.success());
    lab.keys(&["vm", "confirm", "acme", "payroll"]);
    lab.keys(&["volume", "confirm", "acme", "root"]);
    assert_eq!(SoftVm::new(&lab).refused(&lab.host), ProblemType::PolicyRefuses);
    let event = lab.events("provider-restored").pop().expect("an event");
    assert_eq!(event["details"]["policy"], "1");
    assert_eq!(event["details"]["reference"], "1");
    assert_eq!(event["details"]["admins"], "admin (admin), bob (auditor)");
    assert_eq!(event["details"]["hosts.lab"], "1");
    assert_eq!(event["details"]["vm_file.payroll"], lab.file.to_string());
    let wrong = lab.refused(&["customer", "confirm", "acme", "--policy", "2", "--reference", "2"]);
    assert!(wrong.contains("policy version 1 and reference values version 1"), "{wrong}");
    lab.keys(&["customer", "confirm", "acme", "--policy", "1", "--reference", "1"]);
    lab.refused(&["customer", "confirm", "acme", "--policy", "1", "--reference", "1"]);
    assert_eq!(lab.events("restore-confirmed").len(), 1);
    SoftVm::new(&lab).start(&lab.host);
}

#[test]
fn an_init_that_was_killed_is_made_anew_or_is_finished() {
    let dir = tempfile::tempdir().expect("a folder");
    let keys = dir.path().join("keys");
    let init = || {
        let mut command = keys_command();
        command.args(["init", "--name", "localhost", "--dir"]).arg(&keys);
        command
    };
    // Killed at any moment, it leaves a provider, or nothing that stops the next one.
    for round in 0..6 {
        let mut child = init().stdout(std::process::Stdio::null()).spawn().expect("starts");
        std::thread::sleep(Duration::from_millis(5 + 25 * round));
        let _ = child.kill();
        child.wait().expect("ended");
        let again = init().output().expect("runs");
        let exists = String::from_utf8_lossy(&again.stderr).contains("exists already");
        assert!(again.status.success() || exists, "{}", String::from_utf8_lossy(&again.stderr));
        Provider::start_as(keys_command(), &keys, "/dev/null".as_ref());
        std::fs::remove_dir_all(&keys).expect("removed");
    }
    // The last moments of all, one after the other.
    crate::support::good(init().output().expect("runs"));
    let to = |from: &str, to: &str| std::fs::rename(keys.join(from), keys.join(to)).expect("renamed");
    to("master.key", "master.key.new");
    to("keys.db", "keys.db.new");
    crate::support::good(init().output().expect("runs"));
    assert!(!keys.join("keys.db.new").exists() && !keys.join("master.key.new").exists());
    to("master.key", "master.key.new");
    Provider::start_as(keys_command(), &keys, "/dev/null".as_ref());
    assert!(keys.join("master.key").exists());
    // A master key that somebody put there is never overwritten.
    std::fs::remove_file(keys.join("keys.db")).expect("removed");
    for end in ["-wal", "-shm"] {
        let _ = std::fs::remove_file(keys.join(format!("keys.db{end}")));
    }
    let kept = std::fs::read(keys.join("master.key")).expect("a key");
    assert!(!init().output().expect("runs").status.success());
    assert_eq!(std::fs::read(keys.join("master.key")).expect("a key"), kept);
}
