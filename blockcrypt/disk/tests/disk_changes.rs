//! `fealty-disk`: commands that change a volume in its place.

mod disk_support;

use disk_support::{Folder, Keeper, Manner, image};
use std::fs;

fn made() -> (Folder, Keeper, String, Vec<u8>) {
    let folder = Folder::new();
    let content = image(300, &[0, 7, 299]);
    let (from, volume) = (folder.write("from.img", &content), folder.name("a.vol"));
    let mut keeper = Keeper::new();
    keeper.good(&["import", &from, &volume]);
    (folder, keeper, volume, content)
}

fn good(keeper: &mut Keeper, volume: &str) {
    assert_eq!(keeper.json(&["check", volume])["good"], true);
}

#[test]
fn snapshots_are_taken_listed_exported_gone_back_to_and_deleted() {
    let (_folder, mut keeper, volume, content) = made();
    assert_eq!(keeper.json(&["snapshot", "list", &volume])["snapshots"].as_array().map(Vec::len), Some(0));
    let taken = keeper.json(&["snapshot", "take", &volume, "--name", "before"]);
    assert_eq!((&taken["snapshot"], taken["volume"].as_str()), (&1.into(), Some(&*keeper.volume.to_string())));
    keeper.good(&["resize", &volume, "--size", "2M"]);
    let second = keeper.json(&["snapshot", "take", &volume, "--name", "larger"]);
    assert_eq!(second["snapshot"], 2);
    let listed = keeper.json(&["snapshot", "list", &volume]);
    assert_eq!(listed["snapshots"][0]["name"], "before");
    assert_eq!(listed["snapshots"][1]["size"], 2 << 20);
    let text = String::from_utf8(keeper.good(&["snapshot", "list", &volume])).expect("text");
    assert_eq!(text.lines().count(), 3, "{text}");
    assert!(keeper.good(&["export", &volume, "-", "--snapshot", "1"]) == content);
    let whole = keeper.good(&["export", &volume, "-"]);
    assert!(
        whole.len() == 2 << 20 && whole[..content.len()] == content && whole[content.len()..].iter().all(|b| *b == 0)
    );

    let refused = keeper.run(&["snapshot", "revert", &volume, "1"]);
    assert!(refused.code == 1 && refused.error.contains("snapshot 2 is newer"), "{}", refused.error);
    keeper.good(&["snapshot", "delete", &volume, "2"]);
    keeper.good(&["snapshot", "revert", &volume, "1"]);
    assert!(keeper.good(&["export", &volume, "-"]) == whole);
    good(&mut keeper, &volume);
    keeper.good(&["snapshot", "delete", &volume, "1"]);
    good(&mut keeper, &volume);
    for words in [["snapshot", "delete", &volume, "1"], ["export", &volume, "-", "--snapshot=9"]] {
        let refused = keeper.run(&words);
        assert!(refused.code == 1 && refused.error.contains("has no snapshot"), "{}", refused.error);
    }
    let refused = keeper.run(&["snapshot", "take", &volume, "--name", ""]);
    assert_eq!(refused.code, 2, "{}", refused.error);
}

#[test]
fn a_volume_becomes_larger_and_smaller() {
    let (_folder, mut keeper, volume, content) = made();
    let resized = keeper.json(&["resize", &volume, "--size", "64M"]);
    assert_eq!(resized["size"], 64 << 20);
    assert_eq!(keeper.json(&["info", &volume])["size"], 64 << 20);
    assert!(keeper.good(&["export", &volume, "-"])[..content.len()] == content);
    for wrong in ["0", "1000", "4096T"] {
        let refused = keeper.run(&["resize", &volume, "--size", wrong, "--discard-tail"]);
        assert_eq!(refused.code, 2, "{}", refused.error);
    }
    // Nothing lies behind that.
    keeper.good(&["resize", &volume, "--size", "2M"]);
    let refused = keeper.run(&["resize", &volume, "--size", "1M"]);
    let says = refused.failed(1);
    assert!(
        says.contains("as large as it was") && says.contains("--discard-tail") && says.contains("4096 bytes"),
        "{says}"
    );
    assert_eq!(keeper.good(&["export", &volume, "-"]).len(), 2 << 20);
    keeper.good(&["resize", &volume, "--size", "1M", "--discard-tail"]);
    assert!(keeper.good(&["export", &volume, "-"]) == content[..1 << 20]);
    good(&mut keeper, &volume);
    keeper.good(&["resize", &volume, "--size", "2M"]);
    let back = keeper.good(&["export", &volume, "-"]);
    assert!(back[..1 << 20] == content[..1 << 20] && back[1 << 20..].iter().all(|b| *b == 0));
    good(&mut keeper, &volume);
}

#[test]
fn a_volume_has_room_for_its_snapshots() {
    let (folder, mut keeper, volume, content) = made();
    let info = |keeper: &mut Keeper, volume: &str| {
        let info = keeper.json(&["info", volume]);
        ["size", "room", "free", "store_size"].map(|field| info[field].as_u64().expect("a number"))
    };
    let [size, room, ..] = info(&mut keeper, &volume);
    assert_eq!((size, room), (content.len() as u64, 0));
    let widened = keeper.json(&["resize", &volume, "--room", "3M"]);
    let [_, room, free, store] = info(&mut keeper, &volume);
    assert!(widened["size"] == size && widened["room"] == room && room >= 3 << 20 && free > room, "{widened}");
    assert_eq!(fs::metadata(&volume).expect("there").len(), store);
    let both = keeper.json(&["resize", &volume, "--size", "4M", "--room", "200%"]);
    assert!(both["size"] == 4 << 20 && both["room"].as_u64().is_some_and(|room| room >= 8 << 20), "{both}");
    let [.., store] = info(&mut keeper, &volume);
    // It does not become less, and what stays is not changed.
    let same = keeper.json(&["resize", &volume, "--room", "1K"]);
    assert_eq!((&same["room"], info(&mut keeper, &volume)[3]), (&both["room"], store));
    good(&mut keeper, &volume);
    assert!(keeper.good(&["export", &volume, "-"])[..content.len()] == content);
    for (words, says) in [
        (vec!["resize", &volume], "--size"),
        (vec!["resize", &volume, "--room", "half"], "room is a size"),
        (vec!["resize", &volume, "--room", "8000T"], "too much"),
    ] {
        assert!(keeper.run(&words).failed(2).contains(says), "{words:?}");
    }

    // From its beginning.
    let (from, wide) = (folder.name("from.img"), folder.name("wide.vol"));
    let mut other = Keeper::new();
    other.good(&["import", &from, &wide, "--room", "2M"]);
    let [.., store] = info(&mut other, &wide);
    assert!(info(&mut other, &wide)[1] >= 2 << 20 && fs::metadata(&wide).expect("there").len() == store);
    assert!(other.good(&["export", &wide, "-"]) == content);
    let mut third = Keeper::new();
    let empty = folder.name("empty.vol");
    third.good(&["create", &empty, "--size", "1M", "--room", "100%"]);
    assert!(info(&mut third, &empty)[1] >= 1 << 20);
    let before = folder.names();
    let refused = Keeper::new().run(&["create", &folder.name("no.vol"), "--size", "1M", "--room", "8000T"]);
    assert!(refused.failed(2).contains("too much") && folder.names() == before, "{refused:?}");
    let text = String::from_utf8(third.good(&["info", &empty])).expect("text");
    assert!(text.contains("room         for 1"), "{text}");
}

#[test]
fn rekey_leaves_no_older_key() {
    let (_folder, mut keeper, volume, content) = made();
    keeper.key = 3;
    let rekeyed = keeper.json(&["rekey", &volume]);
    assert_eq!(rekeyed["older_keys"], 0);
    assert_eq!(rekeyed["not_renewed"], 0);
    good(&mut keeper, &volume);
    assert!(keeper.good(&["export", &volume, "-"]) == content);
    keeper.kek[0] ^= 1;
    // A key that opens no slot that names it: which of the two is wrong, nobody can tell.
    assert_eq!(keeper.run(&["rekey", &volume]).code, 3);
}

/// The provider answers with the key of the rekey before as long as it has not heard of its end.
#[test]
fn a_rekey_never_passes_for_one_that_was_begun_before() {
    let (_folder, mut keeper, volume, content) = made();
    keeper.key = 3;
    assert_eq!(keeper.json(&["rekey", &volume])["key_id"], "0000000000000003");
    // It came to its end: another one is begun.
    let again = keeper.json(&["rekey", &volume]);
    assert_eq!(again["key_id"], "0000000000000004");
    assert_eq!((&again["older_keys"], &again["begun_before"]), (&0.into(), &false.into()));
    keeper.key = 4;
    good(&mut keeper, &volume);
    assert!(keeper.good(&["export", &volume, "-"]) == content);
    // Older keys are left, so that it may not have: it goes on, and says so.
    keeper.good(&["snapshot", "take", &volume, "--name", "s"]);
    keeper.key = 5;
    keeper.good(&["rekey", &volume]);
    let said = String::from_utf8(keeper.good(&["rekey", &volume])).expect("text");
    assert!(said.contains("under key 0000000000000005") && said.contains("rekey once more"), "{said}");
    assert_eq!(keeper.json(&["rekey", &volume])["begun_before"], true);
}

#[test]
fn an_erased_volume_is_gone_and_only_with_force() {
    let (_folder, mut keeper, volume, _) = made();
    let refused = keeper.run(&["erase", &volume]);
    assert!(refused.code == 2 && refused.error.contains("--force"), "{}", refused.error);
    good(&mut keeper, &volume);
    keeper.good(&["erase", &volume, "--force"]);
    let refused = keeper.run(&["check", &volume]);
    assert_eq!(refused.code, 3, "{}", refused.error);
    assert!(fs::metadata(&volume).expect("there").len() > 1 << 20);
}

#[test]
fn a_refused_anchor_is_said_and_harms_nothing() {
    let (_folder, mut keeper, volume, content) = made();
    for words in [vec!["resize", &volume, "--size", "4M"], vec!["snapshot", "take", &volume, "--name", "s"]] {
        let refused = keeper.run_with(&words, Manner::RefusesAnchors, "");
        assert_eq!(refused.code, 4, "{}", refused.error);
        assert!(keeper.good(&["export", &volume, "-"])[..content.len()] == content);
    }
    for command in ["resize", "rekey"] {
        let words = if command == "resize" { vec![command, &volume, "--size=4M"] } else { vec![command, &volume] };
        let ended = keeper.run_with(&words, Manner::Leaves, "");
        assert_ne!(ended.code, 0);
        good(&mut keeper, &volume);
    }
}

/// What is not in the audit log is an error, and no reason to do it again.
#[test]
fn what_is_done_and_not_logged_is_said_to_be_done() {
    let (_folder, mut keeper, volume, _) = made();
    keeper.good(&["snapshot", "take", &volume, "--name", "one"]);
    let ended = keeper.run_with(&["snapshot", "delete", &volume, "1"], Manner::Deaf, "");
    let said = ended.error.lines().last().expect("a line");
    assert!(ended.code == 4 && said.contains("it is done") && said.contains("audit log"), "{ended:?}");
    assert_eq!(keeper.json(&["info", &volume])["snapshots"], 0);
}

/// The key provider, which would make a volume of it, is not asked.
#[test]
fn a_snapshot_that_is_not_there_is_not_cloned() {
    let (folder, mut keeper, volume, _) = made();
    let words = ["clone", &volume, &folder.name("b.vol"), "--name", "copy", "--snapshot", "7"];
    let ended = keeper.run_with(&words, Manner::Forbids, "");
    assert!(ended.failed(1).contains("has no snapshot 7"), "{ended:?}");
}

/// Where the clone may be one, it is not said that there is none.
#[test]
fn a_clone_without_its_anchor_is_none_unless_that_is_not_known() {
    let (folder, mut keeper, volume, _) = made();
    let copy = folder.name("b.vol");
    let words = ["clone", &volume, &copy, "--name", "copy"];
    let none = "there is no clone, but the key provider has its name copy";
    let refused = keeper.run_with(&words, Manner::RefusesAnchors, "");
    assert!(refused.failed(4).contains(none) && fs::metadata(&copy).is_err(), "{refused:?}");
    let unsure = keeper.run_with(&words, Manner::UnsureOfAnchors, "");
    assert!(unsure.failed(1).contains("stands complete") && fs::metadata(&copy).is_ok(), "{unsure:?}");
    assert!(!unsure.error.contains(none), "{unsure:?}");
}

#[test]
fn what_is_not_permitted_is_not_done() {
    let (_folder, mut keeper, volume, content) = made();
    keeper.good(&["snapshot", "take", &volume, "--name", "s"]);
    let before = keeper.json(&["info", &volume])["key_id"].clone();
    let copy = format!("{volume}.copy");
    for words in [
        &["snapshot", "revert", &volume, "1"][..],
        &["rekey", &volume],
        &["rewrap", &volume],
        &["erase", &volume, "--force"],
        &["clone", &volume, &copy, "--name", "copy"],
        &["serve", &volume, "--nbd", &format!("{volume}.sock"), "--rekey"],
    ] {
        let refused = keeper.run_with(words, Manner::Forbids, "");
        assert!(refused.failed(4).contains("is not permitted, and nothing was done"), "{words:?}");
        assert!(refused.anchors.is_empty(), "{words:?}");
    }
    assert_eq!(keeper.json(&["info", &volume])["key_id"], before);
    // Nor is a volume recovered for a clone that nobody may make.
    assert_ne!(keeper.run_with(&["resize", &volume, "--size", "64M"], Manner::KillsAtAnchor, "").code, 0);
    let left = fs::read(&volume).expect("there");
    let refused = keeper.run_with(&["clone", &volume, &copy, "--name", "copy"], Manner::Forbids, "");
    assert!(refused.failed(4).contains("nothing was done") && refused.anchors.is_empty());
    assert!(fs::read(&volume).expect("there") == left, "the volume was opened for writing");
    assert!(fs::metadata(copy).is_err() && keeper.good(&["export", &volume, "-"]) == content);
    good(&mut keeper, &volume);
}
