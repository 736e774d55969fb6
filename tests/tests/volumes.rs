//! A volume's life between `fealty-disk` and its key provider, both as real processes: operations that the customer's policy tells
//! apart, keys that are issued, changed and retired, clones.

use fealty_tests::keys::{ALL, Keys, LIMIT, MIB, image};
use fealty_tests::process::{Background, program, run};
use std::path::Path;
use std::process::Command;

#[test]
fn operations_are_told_apart_and_logged_before_and_after() {
    let (mut keys, image) = Keys::with_volume("");
    let (volume, copy) = (keys.volume("root"), keys.volume("copy"));
    let snapshot = keys.json("root", &["snapshot", "take", &volume, "--name", "s"])["snapshot"].to_string();
    let operations: [(&str, Vec<&str>); 5] = [
        ("volume.revert", vec!["snapshot", "revert", &volume, &snapshot]),
        ("volume.rekey", vec!["rekey", &volume]),
        ("volume.rewrap", vec!["rewrap", &volume]),
        ("volume.clone", vec!["clone", &volume, &copy, "--name", "copy"]),
        ("volume.erase", vec!["erase", &volume, "--force"]),
    ];
    let mut told = keys.story();
    for (permitted, _) in &operations {
        let _ = std::fs::remove_file(&copy);
        keys.set_policy(&format!(
            "permit (principal, action == Action::\"{permitted}\", resource == Volume::\"root\");"
        ));
        for (operation, words) in &operations {
            let ended = keys.exec("root", words);
            if operation == permitted {
                ended.good();
                told.push(format!("{operation} permitted"));
                told.extend((*operation == "volume.rewrap").then(|| "volume-rewrapped".to_owned()));
                told.extend((*operation == "volume.clone").then(|| "volume-resized".to_owned()));
                told.extend((*operation == "volume.erase").then(|| "volume-retired".to_owned()));
                told.push(format!("{operation} ended: true"));
            } else {
                assert_eq!(ended.code, Some(4), "{}", ended.err);
                assert!(
                    ended.err.contains(&format!("no rule of the policy permits {operation} of volume root")),
                    "{}",
                    ended.err
                );
                assert_eq!(ended.err.trim_end().lines().count(), 1, "{}", ended.err);
                told.push(format!("{operation} refused"));
            }
            assert_eq!(keys.story(), told);
        }
        if *permitted != "volume.erase" {
            keys.holds("root", &image);
        }
    }
    let refused = keys.event("operation-refused");
    assert_eq!(refused["volume"], keys.listed("root")["volume"]);
    assert!(refused["actor"]["admin"].is_string(), "{refused}");
}

#[test]
fn a_rekey_gets_a_key_id_of_its_own_each_time() {
    let (keys, image) = Keys::with_volume(ALL);
    let volume = keys.volume("root");
    let mut ids = vec![keys.plain("root")["key_id"].clone()];
    for _ in 0..2 {
        let rekeyed = keys.json("root", &["rekey", &volume]);
        assert_eq!((&rekeyed["older_keys"], &rekeyed["key_id"]), (&0.into(), &keys.plain("root")["key_id"]));
        assert_eq!(keys.event("operation-permitted")["details"]["key_id"], rekeyed["key_id"]);
        assert!(!ids.contains(&rekeyed["key_id"]), "a key id twice");
        ids.push(rekeyed["key_id"].clone());
        keys.holds("root", &image);
        assert_eq!(keys.plain("root")["key_id"], rekeyed["key_id"], "nobody asked for another");
    }
}

#[test]
fn a_rewrapped_volume_opens_with_its_new_key_and_the_old_one_is_gone() {
    let (mut keys, image) = Keys::with_volume(ALL);
    let volume = keys.volume("root");
    let before = keys.plain("root")["kek_id"].clone();
    let rewrapped = keys.json("root", &["rewrap", &volume]);
    assert_eq!(rewrapped["kek_id"], keys.plain("root")["kek_id"]);
    assert_ne!(rewrapped["kek_id"], before);
    let event = keys.event("volume-rewrapped");
    assert_eq!((&event["details"]["old_kek"], &event["details"]["kek"]), (&before, &rewrapped["kek_id"]));
    keys.holds("root", &image);
    // It stands in no place of the provider's any more: not by its id either.
    keys.provider = None;
    keys.serve();
    keys.holds("root", &image);
    assert_ne!(keys.json("root", &["rewrap", &volume])["kek_id"], rewrapped["kek_id"]);
    let said = keys.exec("root", &["rewrap", &volume]).good().out;
    assert!(said.contains("take a backup of the provider now"), "{said}");
}

#[test]
fn an_erased_volume_is_retired_and_never_released_again() {
    let (keys, _) = Keys::with_volume(ALL);
    let (volume, copy) = (keys.volume("root"), keys.text("copied-before"));
    std::fs::copy(&volume, &copy).expect("copied");
    // Not another volume's file.
    keys.import("other", &image(2));
    let refused = keys.exec("root", &["erase", &keys.volume("other"), "--force"]).refused();
    assert!(refused.err.contains("but the keys are for volume"), "{}", refused.err);
    keys.holds("other", &image(2));
    assert_eq!(keys.json("root", &["erase", &volume, "--force"])["retired"], true);
    assert_eq!(keys.listed("root")["retired"], true);
    for path in [&volume, &copy] {
        let refused = keys.exec("root", &["export", path, "-"]).refused();
        assert!(refused.err.contains("retired, for good"), "{}", refused.err);
    }
    assert_eq!(keys.tool("fealty-disk", &["info", &volume]).code, Some(3));
    // A file that is lost.
    keys.keys(&["volume", "retire", "acme", "other"]).refused();
    keys.keys(&["volume", "retire", "acme", "other", "--force"]).good();
    keys.exec("other", &["check", &keys.volume("other")]).refused();
    assert!(keys.keys(&["volume", "list", "acme"]).good().out.lines().all(|line| line.ends_with("erased")));
    keys.keys(&["volume", "retire", "acme", "other", "--force"]).refused();
}

#[test]
fn the_provider_learns_a_volumes_size() {
    let (keys, image) = Keys::with_volume(ALL);
    assert_eq!(keys.listed("root")["size"], image.len());
    let volume = keys.volume("root");
    keys.exec("root", &["resize", &volume, "--size", "8M"]).good();
    assert_eq!(keys.listed("root")["size"], 8 * MIB);
    let event = keys.event("volume-resized");
    let (before, size) = (image.len().to_string(), (8 * MIB).to_string());
    assert_eq!((&event["details"]["before"], &event["details"]["size"]), (&before.into(), &size.into()));
    let told = keys.story().len();
    keys.exec("root", &["snapshot", "take", &volume, "--name", "s"]).good();
    assert_eq!(keys.story().len(), told, "nothing new");
    keys.holds("root", &image);
    // A smaller one too, and where data would be lost, nothing.
    keys.exec("root", &["resize", &volume, "--size", "5M"]).good();
    assert_eq!(keys.listed("root")["size"], 5 * MIB);
    let refused = keys.exec("root", &["resize", &volume, "--size", "1M"]).refused();
    assert!(refused.err.contains("--discard-tail"), "{}", refused.err);
    assert_eq!(keys.listed("root")["size"], 5 * MIB);
    keys.holds("root", &image);
    keys.exec("root", &["resize", &volume, "--size", "1M", "--discard-tail"]).good();
    assert_eq!(keys.listed("root")["size"], MIB);
    let event = keys.event("volume-resized");
    let (before, size) = ((5 * MIB).to_string(), MIB.to_string());
    assert_eq!((&event["details"]["before"], &event["details"]["size"]), (&before.into(), &size.into()));
    keys.holds("root", &image[..MIB]);
}

#[test]
fn a_clone_is_a_volume_of_its_own() {
    let (keys, image) = Keys::with_volume(ALL);
    let (volume, copy) = (keys.volume("root"), keys.volume("copy"));
    let cloned = keys.json("root", &["clone", &volume, &copy, "--name", "copy"]);
    assert_eq!(cloned["volume"], keys.listed("copy")["volume"]);
    assert_eq!((&cloned["of"], &cloned["data"]), (&keys.listed("root")["volume"], &(image.len() / 2).into()));
    assert_eq!(keys.event("operation-permitted")["details"]["clone"], cloned["volume"]);
    for id in ["volume", "key_id", "kek_id"] {
        assert_ne!(keys.plain("copy")[id], keys.plain("root")[id], "{id}");
    }
    // Each opens with its own session only, and lives when the other is gone.
    assert_eq!(keys.exec("root", &["check", &copy]).code, Some(3));
    let refused = keys.exec("root", &["clone", &volume, &keys.volume("more"), "--name", "copy"]).refused();
    assert!(refused.err.contains("has a volume copy already"), "{}", refused.err);
    assert!(!Path::new(&keys.volume("more")).exists());
    assert_eq!(keys.json("copy", &["info", &copy])["older_keys"], 0, "no key of its source");
    keys.exec("root", &["erase", &volume, "--force"]).good();
    keys.holds("copy", &image);
    assert_eq!(keys.listed("copy")["size"], image.len());
}

/// The provider has done its part before the store turns out to take too little: it is said, and not in the way of the next run.
#[test]
fn a_clone_that_fails_once_it_is_permitted_says_what_the_provider_has() {
    let (keys, image) = Keys::with_volume(ALL);
    let (volume, copy) = (keys.volume("root"), keys.volume("copy"));
    let words = ["clone", &volume, &copy, "--name", "copy"];
    // Files of 1 MiB at most.
    let limited = ["-c", "ulimit -f 2048; exec \"$0\" \"$@\""];
    let whole = keys.command("root", &words);
    let mut part = Command::new("sh");
    part.args(limited).arg(program("fealty-keys")).args(whole.get_args()).current_dir(keys.path(""));
    let refused = run(&mut part, LIMIT).refused();
    assert_eq!((refused.code, refused.err.trim_end().lines().count()), (Some(1), 1), "{}", refused.err);
    let said = "there is no clone, but the key provider has its name copy, and takes it from the next run, once this is mended";
    assert!(refused.err.contains(&format!("{said}: {copy}: ")), "{}", refused.err);
    assert!(!Path::new(&copy).exists() && !keys.is_anchored("copy"));
    let made = keys.listed("copy")["volume"].clone();
    assert_eq!(keys.json("root", &words)["volume"], made);
    keys.holds("copy", &image);
    keys.holds("root", &image);
}

#[test]
fn a_clone_of_a_snapshot_fills_a_volume_that_was_never_filled() {
    let (keys, image) = Keys::with_volume(ALL);
    let volume = keys.volume("root");
    let snapshot = keys.json("root", &["snapshot", "take", &volume, "--name", "s"])["snapshot"].to_string();
    keys.exec("root", &["resize", &volume, "--size", "8M"]).good();
    let waiting = keys.keys(&["volume", "create", "acme", "copy"]).good().out;
    let words = ["clone", &volume, &keys.volume("copy"), "--name", "copy", "--snapshot", &snapshot];
    assert!(waiting.contains(keys.json("root", &words)["volume"].as_str().expect("an id")), "{waiting}");
    assert!(keys.content("copy") == image, "the snapshot's size and content");
    let refused = keys.exec("root", &["clone", &volume, &volume, "--name", "more", "--force"]).refused();
    assert!(refused.err.contains("are the same file"), "{}", refused.err);
}

#[test]
fn a_volume_that_was_not_closed_is_recovered_before_it_is_cloned() {
    let (keys, image) = Keys::with_volume(ALL);
    let (volume, socket) = (keys.volume("root"), keys.text("socket"));
    let mut serving = Background::start(&mut keys.command("root", &["serve", &volume, "--nbd", &socket]));
    serving.until("ready: volume", LIMIT);
    let pid = std::fs::read_to_string(keys.path("pid")).expect("a number");
    Command::new("kill").args(["-9", pid.trim()]).output().expect("killed");
    assert_eq!(serving.end(LIMIT).code, Some(128 + 9));
    assert_eq!(keys.plain("root")["closed"], false);
    keys.exec("root", &["clone", &volume, &keys.volume("copy"), "--name", "copy"]).good();
    keys.holds("copy", &image);
    keys.holds("root", &image);
}

#[test]
fn a_volume_is_rekeyed_while_it_is_lent_and_goes_on_after_each_stop() {
    let (keys, image) = Keys::with_volume(ALL);
    let (volume, socket) = (keys.volume("root"), keys.text("socket"));
    let words = ["serve", &volume, "--nbd", &socket, "--rekey"];
    let first = keys.plain("root")["key_id"].clone();
    for signal in ["-9", "-TERM"] {
        let mut serving = Background::start(&mut keys.command("root", &words));
        serving.until("ready: volume", LIMIT);
        let pid = std::fs::read_to_string(keys.path("pid")).expect("a number");
        Command::new("kill").args([signal, pid.trim()]).output().expect("killed");
        serving.end(LIMIT);
        keys.holds("root", &image);
    }
    let mut serving = Background::start(&mut keys.command("root", &words));
    serving.until("no older key is needed any more", LIMIT);
    let pid = std::fs::read_to_string(keys.path("pid")).expect("a number");
    Command::new("kill").args(["-TERM", pid.trim()]).output().expect("asked");
    serving.end(LIMIT).good();
    let found = keys.plain("root")["key_id"].clone();
    assert_ne!(found, first);
    keys.holds("root", &image);
    assert_eq!(keys.json("root", &["info", &volume])["older_keys"], 0);
    assert_eq!(keys.story().last().map(String::as_str), Some("volume.rekey ended: true"));
    let refused = keys.exec("root", &[&words[..], &["--read-only"]].concat());
    assert_eq!(refused.code, Some(2), "{}", refused.err);
}
