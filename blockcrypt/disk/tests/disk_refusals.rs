//! `fealty-disk`: what is refused, with which code, in one line, and with nothing changed.

mod disk_support;

use disk_support::{Folder, Keeper, Manner, alone, framed, image};
use std::fs;

#[test]
fn without_keys_one_line_says_how_to_get_them() {
    let folder = Folder::new();
    let from = folder.write("from.img", &image(4, &[1]));
    let (volume, to) = (folder.name("a.vol"), folder.name("to.img"));
    for words in [
        vec!["import", &from, &volume],
        vec!["create", &volume, "--size", "1M"],
        vec!["export", &from, &to],
        vec!["check", &from],
    ] {
        let ended = alone(&words, "");
        assert!(ended.failed(2).contains("fealty-keys volume exec"), "{ended:?}");
    }
    assert_eq!(folder.names(), ["from.img"]);
}

#[test]
fn a_descriptor_that_is_no_conversation_is_refused() {
    let folder = Folder::new();
    let volume = folder.name("a.vol");
    let words = |fd: &'static str| ["create", &volume, "--size", "1M", "--keys-fd", fd].map(str::to_owned);
    for (fd, shell, says) in [
        ("9", "", "not an open descriptor"),
        ("-1", "", "standard input"),
        ("0", "", "standard input"),
        ("2", "", "standard input"),
        ("9", "exec 9</dev/zero", "not a unix stream socket"),
        ("2147483647", "", "not an open descriptor"),
        ("many", "", "--keys-fd"),
    ] {
        let words = words(fd);
        let words: Vec<_> = words.iter().map(String::as_str).collect();
        // clap takes `-1` for an option unless it is joined.
        let joined = format!("--keys-fd={fd}");
        let ended = alone(&[&words[..4], &[&joined]].concat(), shell);
        assert!(ended.failed(2).contains(says), "{fd}: {ended:?}");
    }
    assert!(folder.names().is_empty());
}

#[test]
fn a_handover_that_is_cut_or_makes_no_sense_makes_nothing() {
    let folder = Folder::new();
    let volume = folder.name("a.vol");
    let mut keeper = Keeper::new();
    keeper.opened = 1;
    let good = keeper.handover();
    let json = &good[4..good.len() - 32];
    let unknown = String::from_utf8(json.to_vec()).expect("text").replacen("{\"grant\"", "{\"more\":1,\"grant\"", 1);
    for (bytes, says) in [
        (vec![], "hung up before"),
        (good[..2].to_vec(), "broke off in its length"),
        (good[..90].to_vec(), "broke off in its text"),
        (good[..good.len() - 1].to_vec(), "broke off in the key"),
        (vec![0xff; 64], "4294967295 bytes"),
        (vec![0; 64], "0 bytes"),
        (framed(b"garbage"), "can't be read"),
        (framed(&[0xc3, 0x28]), "can't be read"),
        (framed(unknown.as_bytes()), "unknown field `more`"),
    ] {
        let ended = keeper.run_with(&["create", &volume, "--size", "1M"], Manner::Says(bytes), "");
        assert!(ended.failed(4).contains(says), "{says}: {ended:?}");
        assert!(folder.names().is_empty() && ended.anchors.is_empty());
    }
}

#[test]
fn a_wrong_key_number_or_anchor_is_refused() {
    let folder = Folder::new();
    let (from, volume, to) = (folder.write("from.img", &image(8, &[1])), folder.name("a.vol"), folder.name("to.img"));
    let mut keeper = Keeper::new();
    keeper.good(&["import", &from, &volume]);

    let mut other_key = keeper.clone();
    other_key.kek = [1; 32];
    let ended = other_key.run(&["export", &volume, &to]);
    assert!(ended.failed(3).contains("the slot of key"), "{ended:?}");
    assert!(ended.events.iter().any(|e| e.starts_with("integrity: ")), "the audit log hears of it: {ended:?}");

    let mut old_number = keeper.clone();
    old_number.opened = 0;
    assert!(old_number.run(&["export", &volume, &to]).failed(4).contains("open number 1"));

    let mut none = keeper.clone();
    none.anchor = None;
    assert!(none.run(&["export", &volume, &to]).failed(4).contains("no anchor"));

    let mut another = keeper.clone();
    another.volume = policy::VolumeId::random();
    another.run(&["export", &volume, &to]).failed(4);

    // The provider knows a newer state than this copy.
    let mut ahead = keeper.clone();
    ahead.opened = 9;
    ahead.anchor = keeper.anchor.as_ref().map(|anchor| {
        let mut bytes = *anchor.as_bytes();
        bytes[31] += 1;
        policy::VolumeAnchor::from_bytes(&bytes).expect("an anchor")
    });
    let ended = ahead.run(&["export", &volume, &to]);
    assert!(ended.failed(3).contains("older than its anchor"), "{ended:?}");
    assert!(ended.events.iter().any(|e| e.starts_with("integrity: ")), "the audit log hears of it: {ended:?}");

    // A volume that exists already is not made a second time: its anchor says so.
    let again = folder.name("b.vol");
    keeper.run(&["create", &again, "--size", "1M"]).failed(4);
    assert_eq!(folder.names(), ["a.vol", "from.img"]);
}

#[test]
fn what_is_no_whole_volume_is_refused() {
    let folder = Folder::new();
    let (from, volume) = (folder.write("from.img", &image(64, &[1])), folder.name("a.vol"));
    let mut keeper = Keeper::new();
    keeper.good(&["import", &from, &volume]);
    let whole = fs::read(&volume).expect("there");

    let file = fs::File::options().write(true).open(&volume).expect("there");
    file.set_len(whole.len() as u64 / 2).expect("cut");
    assert!(keeper.run(&["check", &volume]).failed(3).contains("truncated"));
    let seen = alone(&["info", &volume], "");
    assert!(seen.code == 0 && String::from_utf8_lossy(&seen.out).contains("truncated"), "{seen:?}");

    file.set_len(0).expect("cut");
    keeper.run(&["check", &volume]).failed(3);
    assert!(alone(&["info", &from], "").failed(3).contains("no fealty volume"));
    assert!(alone(&["info", &folder.name("none")], "").failed(1).contains("can't be opened"));
    alone(&["info", &folder.name("")], "").failed(1);
    keeper.run(&["check", &folder.name("")]).failed(3);
    let mut other = Keeper::new();
    fs::write(&volume, &whole).expect("written");
    other.anchor = keeper.anchor.clone();
    other.run(&["check", &volume]).failed(4);
}

#[test]
fn an_image_that_does_not_fit_makes_nothing() {
    let folder = Folder::new();
    let volume = folder.name("a.vol");
    let odd = folder.write("odd.img", &[7; 1000]);
    let empty = folder.write("empty.img", b"");
    let missing = folder.name("missing.img");
    let before = folder.names();
    let mut keeper = Keeper::new();
    for (words, shell, code, says) in [
        (vec!["import", &odd, &volume], "", 1, "--size 1024"),
        (vec!["import", &odd, &volume, "--size", "512"], "", 1, "more than --size 512"),
        (vec!["import", &empty, &volume], "", 1, "is empty"),
        (vec!["import", &missing, &volume], "", 1, "can't be opened"),
        (vec!["import", "-", &volume], "", 1, "give --size"),
        (vec!["import", "-", &volume, "--size", "2K"], &*format!("exec <{odd}"), 1, "ended after 1000 of 2048"),
        (vec!["import", "-", &volume, "--size", "512"], &*format!("exec <{odd}"), 1, "goes on after"),
        (vec!["import", &volume, &volume], "", 1, "can't be opened"),
        (vec!["create", &volume, "--size", "0"], "", 2, "multiple of 512"),
        (vec!["create", &volume, "--size", "1000"], "", 2, "multiple of 512"),
        (vec!["create", &volume, "--size", "4096T"], "", 2, "multiple of 512"),
        (vec!["create", &volume, "--size", "much"], "", 2, "--size"),
        (vec!["create", &volume], "", 2, "--size"),
        (vec!["paint", &volume], "", 2, "paint"),
    ] {
        let ended = keeper.run_with(&words, Manner::Good, shell);
        assert!(ended.failed(code).contains(says), "{words:?}: {ended:?}");
        assert!(folder.names() == before && ended.anchors.is_empty(), "{words:?} left something");
    }
}

#[test]
fn what_exists_stays_without_force() {
    let folder = Folder::new();
    let (from, volume, to) = (folder.write("from.img", &image(8, &[1])), folder.name("a.vol"), folder.name("to.img"));
    let mut keeper = Keeper::new();
    keeper.good(&["import", &from, &volume]);
    keeper.good(&["export", &volume, &to]);
    let before = fs::read(&volume).expect("there");
    let mut other = Keeper::new();
    assert!(other.run(&["import", &from, &volume]).failed(1).contains("--force"));
    assert!(other.run(&["create", &volume, "--size", "1M"]).failed(1).contains("--force"));
    assert!(keeper.run(&["export", &volume, &to]).failed(1).contains("--force"));
    assert!(keeper.run(&["export", &volume, &volume, "--force"]).failed(1).contains("the same file"));
    assert!(keeper.run(&["import", &volume, &volume, "--force"]).failed(1).contains("the same file"));
    // Nor what lies where a killed run leaves its own, and is what is read.
    let (left, made) = (folder.name(".b.fealty-partial"), folder.name("b"));
    fs::copy(&volume, &left).expect("copied");
    for words in [&["import", &left, &made][..], &["export", &left, &made], &["clone", &left, &made, "--name", "copy"]]
    {
        assert!(keeper.run(words).failed(1).contains("before it is complete"), "{words:?}");
    }
    fs::remove_file(&left).expect("it is still there");

    // In use by somebody: not even with force.
    let user = fs::File::open(&volume).expect("there");
    rustix::fs::flock(&user, rustix::fs::FlockOperation::LockExclusive).expect("locked");
    assert!(other.run(&["import", &from, &volume, "--force"]).failed(1).contains("in use"));
    assert!(keeper.run(&["check", &volume]).failed(1).contains("in use"));
    assert_eq!(alone(&["info", &volume], "").code, 0, "a look needs no lock");
    drop(user);
    assert!(fs::read(&volume).expect("there") == before);
    assert_eq!(folder.names(), ["a.vol", "from.img", "to.img"]);
}

#[test]
fn a_volume_without_its_anchor_is_not_made() {
    let folder = Folder::new();
    let (from, volume) = (folder.write("from.img", &image(8, &[1])), folder.name("a.vol"));
    let mut keeper = Keeper::new();
    let ended = keeper.run_with(&["import", &from, &volume], Manner::RefusesAnchors, "");
    assert!(ended.failed(4).contains("another holder has it"), "{ended:?}");
    assert_eq!((folder.names(), ended.anchors.len()), (vec!["from.img".to_owned()], 1));

    // What was to be replaced is back in its place.
    let mut first = Keeper::new();
    first.good(&["create", &volume, "--size", "1M"]);
    let before = fs::read(&volume).expect("there");
    let ended = keeper.run_with(&["import", &from, &volume, "--force"], Manner::RefusesAnchors, "");
    ended.failed(4);
    assert!(fs::read(&volume).expect("there") == before);
    assert_eq!(folder.names(), ["a.vol", "from.img"]);
    first.good(&["check", &volume]);
}

#[test]
fn an_anchor_whose_fate_is_unknown_keeps_the_volume() {
    for manner in [Manner::LeavesAtAnchor, Manner::BabblesAtAnchor, Manner::UnsureOfAnchors] {
        let folder = Folder::new();
        let volume = folder.name("a.vol");
        let mut keeper = Keeper::new();
        let ended = keeper.run_with(&["create", &volume, "--size", "1M"], manner, "");
        assert!(ended.failed(1).contains("whether the provider keeps its anchor is not known"), "{ended:?}");
        assert_eq!(folder.names(), ["a.vol"]);
        // The provider did keep it, and only the answer was lost: the volume is whole.
        keeper.anchor = ended.anchors.last().cloned();
        keeper.good(&["check", &volume]);
    }
}

#[test]
fn a_holder_that_leaves_ends_the_work() {
    let folder = Folder::new();
    let (from, volume) = (folder.write("from.img", &image(512, &[1, 500])), folder.name("a.vol"));
    let mut keeper = Keeper::new();
    for words in [vec!["import", &from, &volume], vec!["create", &volume, "--size", "1M"]] {
        let ended = keeper.run_with(&words, Manner::Leaves, "");
        assert!(ended.failed(4).contains("the key holder is gone"), "{words:?}: {ended:?}");
        assert_eq!(folder.names(), ["from.img"]);
    }
    keeper.good(&["import", &from, &volume]);
    let to = folder.name("to.img");
    assert!(keeper.run_with(&["export", &volume, &to], Manner::Leaves, "").failed(4).contains("gone"));
    assert_eq!(folder.names(), ["a.vol", "from.img"]);
}

#[test]
fn a_finding_that_the_audit_log_does_not_take_is_an_error() {
    let folder = Folder::new();
    let (from, volume) = (folder.write("from.img", &image(8, &[1])), folder.name("a.vol"));
    let mut keeper = Keeper::new();
    keeper.good(&["import", &from, &volume]);
    let mut bytes = fs::read(&volume).expect("there");
    let at = keeper.json(&["info", &volume])["store_size"].as_u64().expect("a size") as usize;
    // Both superblock slots at the end and the front stay; everything between is spoilt.
    bytes[2 * 4096..at - 2 * 4096].iter_mut().for_each(|b| *b ^= 1);
    fs::write(&volume, &bytes).expect("written");
    let ended = keeper.run_with(&["check", &volume], Manner::Deaf, "");
    assert!(ended.failed(4).contains("audit log"), "{ended:?}");
    keeper.run(&["check", &volume]).failed(3);
}

/// The command ends long before the holder has taken the first of them: none may go with it.
#[test]
fn what_was_found_is_told_to_the_end_where_a_command_fails() {
    let folder = Folder::new();
    let (from, volume, to) = (folder.write("from.img", &image(8, &[1])), folder.name("a.vol"), folder.name("to.img"));
    let mut keeper = Keeper::new();
    keeper.good(&["import", &from, &volume]);
    let mut bytes = fs::read(&volume).expect("there");
    let end = bytes.len();
    // One end's superblocks, and all that is neither.
    bytes[..2 * 4096].fill(0);
    bytes[2 * 4096..end - 2 * 4096].iter_mut().for_each(|b| *b ^= 1);
    fs::write(&volume, &bytes).expect("written");
    let ended = keeper.run_with(&["export", &volume, &to], Manner::Slow, "");
    ended.failed(3);
    let heard = ended.events;
    assert!(heard.len() > 1 && heard.iter().all(|event| event.starts_with("integrity: ")), "{heard:?}");
    assert!(heard[0].contains("superblock") && heard[1].contains("map page"), "{heard:?}");
    // Nor where it does not open at all.
    bytes[end - 2 * 4096..].fill(0);
    fs::write(&volume, &bytes).expect("written");
    for command in [&["export", &volume, &to][..], &["check", &volume]] {
        let ended = keeper.run_with(command, Manner::Slow, "");
        ended.failed(3);
        assert!(matches!(&ended.events[..], [one] if one.contains("no fealty volume")), "{ended:?}");
    }
}

#[test]
fn a_full_store_is_one_line_and_leaves_nothing() {
    let folder = Folder::new();
    let full = (0..2048).collect::<Vec<_>>();
    let (from, volume, to) =
        (folder.write("from.img", &image(2048, &full)), folder.name("a.vol"), folder.name("to.img"));
    let mut keeper = Keeper::new();
    // Units of 512 bytes: 4 MiB, where 8 are needed.
    let ended = keeper.run_with(&["import", &from, &volume], Manner::Good, "ulimit -f 8192");
    ended.failed(1);
    assert!(ended.anchors.is_empty() && folder.names() == ["from.img"], "{ended:?}");
    keeper.good(&["import", &from, &volume]);
    let ended = keeper.run_with(&["export", &volume, &to], Manner::Good, "ulimit -f 8192");
    ended.failed(1);
    assert_eq!(folder.names(), ["a.vol", "from.img"]);
    let ended = keeper.run_with(&["export", &volume, "-"], Manner::Good, "exec >/dev/full");
    assert!(ended.failed(1).contains("standard output can't be written: No space left"), "{ended:?}");
    let ended = keeper.run_with(&["info", &volume], Manner::Good, "exec >/dev/full");
    assert!(ended.failed(1).contains("standard output"), "{ended:?}");
}

#[test]
fn a_name_with_a_new_line_still_gives_one_line() {
    let ended = alone(&["info", "no\nsuch\x1b[31mfile"], "");
    assert!(ended.failed(1).contains("no such [31mfile"));
}

#[test]
fn no_part_of_the_key_is_in_what_is_printed() {
    let folder = Folder::new();
    let (from, volume) = (folder.write("from.img", &image(8, &[1])), folder.name("a.vol"));
    let mut keeper = Keeper::new();
    keeper.kek = *b"canary-canary-canary-canary-9876";
    let mut told = Vec::new();
    for words in [
        vec!["import", &from, &volume, "--json"],
        vec!["info", &volume],
        vec!["check", &volume],
        vec!["import", &from, &volume],
    ] {
        let ended = keeper.run(&words);
        told.extend(ended.out);
        told.extend(ended.error.bytes());
        told.extend(ended.events.concat().bytes());
    }
    told.extend(fs::read(&volume).expect("there"));
    assert!(!told.windows(6).any(|w| w == b"canary"));
    let hex = "63616e617279";
    assert!(!String::from_utf8_lossy(&told).contains(hex));
}

/// Standard error is for scripts too, from the first line to the last.
#[test]
fn with_json_each_line_is_an_object() {
    let folder = Folder::new();
    let volume = folder.name("a.vol");
    let mut keeper = Keeper::new();
    keeper.good(&["create", &volume, "--size", "1M"]);
    // A copy of the superblock that is gone is a note; the check fails.
    let mut bytes = std::fs::read(&volume).expect("there");
    bytes[..8192].fill(0);
    std::fs::write(&volume, bytes).expect("written");
    for (words, code) in [
        (&["check", &volume][..], 3),
        (&["export", &volume, &volume], 1),
        (&["check", &folder.name("none")], 1),
        (&["create", &volume, "--size", "nonsense"], 2),
        (&["nonsense"], 2),
    ] {
        let ended = keeper.run(&[words, &["--json"]].concat());
        assert_eq!(ended.code, code, "{words:?}: {}", ended.error);
        let parse = |line: &str| serde_json::from_str(line).unwrap_or_else(|e| panic!("{words:?}: {e}: {line}"));
        let lines: Vec<serde_json::Value> = ended.error.lines().map(parse).collect();
        let last = lines.last().expect("it says why");
        assert_eq!((&last["event"], &last["exit"]), (&"error".into(), &code.into()), "{words:?}");
        assert!(last["message"].as_str().is_some_and(|text| !text.is_empty()), "{words:?}");
        let others = lines[..lines.len() - 1].iter().all(|line| line["event"] == "note" && line["message"].is_string());
        assert!(others, "{words:?}: {lines:?}");
    }
}
