//! `fealty-disk`: what goes in comes out, and what it says about it is so.

mod disk_support;

use disk_support::server::system;
use disk_support::{Folder, Keeper, Manner, alone, image, room};
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::PermissionsExt;
use std::process::{Command, Stdio};

const FILLED: [usize; 7] = [0, 1, 2, 77, 300, 1023, 1279];

#[test]
fn an_imported_image_is_exported_as_it_was() {
    let folder = Folder::new();
    let mut content = image(1280, &FILLED);
    content.extend([9; 512]);
    let (from, volume, to) = (folder.write("from.img", &content), folder.name("a.vol"), folder.name("to.img"));
    let mut keeper = Keeper::new();

    let made = keeper.json(&["import", &from, &volume]);
    assert_eq!(made["size"], content.len());
    assert_eq!(made["data"], FILLED.len() * 4096 + 512);
    assert_eq!(made["volume"], keeper.volume.to_string());
    let stored = fs::read(&volume).expect("there");
    assert!(!stored.windows(10).any(|w| w == b"plain text"), "plain text in the volume");
    assert!(room(&folder.path("a.vol")) < 2 << 20, "zeroes take up room");

    let exported = keeper.json(&["export", &volume, &to]);
    assert_eq!(exported["data"], FILLED.len() * 4096 + 512);
    assert!(fs::read(&to).expect("there") == content);
    assert!(room(&folder.path("to.img")) < 1 << 20, "the image is not sparse");
    assert_eq!(folder.names(), ["a.vol", "from.img", "to.img"]);
}

/// Several threads work on it, and each has many pieces.
#[test]
fn an_image_of_many_pieces_comes_back_in_order() {
    let folder = Folder::new();
    let mut content: Vec<u8> = (0..24_u64 << 20).map(|i| (i.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 40) as u8).collect();
    content[5 << 20..9 << 20].fill(0);
    content.extend([9; 512]);
    let (from, volume, to) = (folder.write("from.img", &content), folder.name("a.vol"), folder.name("to.img"));
    for pipe in [false, true] {
        let mut keeper = Keeper::new();
        if pipe {
            let words = ["import", "-", &volume, "--force", "--size", &content.len().to_string()];
            let made = keeper.run_with(&words, Manner::Good, &format!("exec <{from}"));
            assert_eq!(made.code, 0, "{}", made.error);
        } else {
            let made = keeper.json(&["import", &from, &volume]);
            assert_eq!(made["data"], content.len() - (4 << 20));
        }
        assert!(keeper.good(&["export", &volume, "-"]) == content, "as a stream");
        keeper.good(&["export", &volume, &to, "--force"]);
        assert!(fs::read(&to).expect("there") == content, "as a file");
        // Nobody takes it: all of them stop.
        let failed = keeper.run_with(&["export", &volume, "-"], Manner::Good, "exec >/dev/full");
        assert!(failed.code == 1 && failed.error.contains("can't be written"), "{}", failed.error);
    }
}

#[test]
fn pipes_do_as_well_as_files() {
    let folder = Folder::new();
    let content = image(300, &[0, 5, 299]);
    let (from, volume) = (folder.write("from.img", &content), folder.name("a.vol"));
    let mut keeper = Keeper::new();
    let size = content.len().to_string();
    let words = ["import", "-", &volume, "--size", &size];
    let made = keeper.run_with(&words, Manner::Good, &format!("exec <{from}"));
    assert_eq!(made.code, 0, "{}", made.error);
    let exported = keeper.run(&["export", &volume, "-"]);
    assert!(exported.code == 0 && exported.out == content);
    assert!(exported.error.starts_with("exported volume "), "its report goes elsewhere: {}", exported.error);
}

#[test]
fn a_larger_volume_is_zero_behind_the_image() {
    let folder = Folder::new();
    let content = &image(3, &[0, 1, 2])[..10_000];
    let (from, volume) = (folder.write("from.img", content), folder.name("a.vol"));
    let mut keeper = Keeper::new();
    keeper.good(&["import", &from, &volume, "--size", "64K"]);
    let out = keeper.good(&["export", &volume, "-"]);
    assert!(out.len() == 64 << 10 && out[..10_000] == *content && out[10_000..].iter().all(|b| *b == 0));
}

#[test]
fn a_new_volume_is_empty_whole_and_described() {
    let folder = Folder::new();
    let volume = folder.name("a.vol");
    let mut keeper = Keeper::new();
    let made = keeper.run(&["create", &volume, "--size", "8M"]);
    assert_eq!((made.code, made.anchors.len()), (0, 1), "{}", made.error);
    assert!(keeper.good(&["export", &volume, "-"]) == vec![0; 8 << 20]);

    let seen = alone(&["info", &volume, "--json"], "");
    let facts: serde_json::Value = serde_json::from_slice(&seen.out).expect("JSON");
    assert_eq!(facts["authenticated"], false);
    assert_eq!((&facts["size"], &facts["closed"]), (&(8 << 20).into(), &true.into()));
    assert_eq!(facts["anchor"], serde_json::to_value(&made.anchors[0]).expect("JSON"));
    let known = keeper.json(&["info", &volume]);
    assert_eq!((&known["authenticated"], &known["size"]), (&true.into(), &(8 << 20).into()));
    assert_eq!(known["volume"], facts["volume"]);
    let text = String::from_utf8(keeper.good(&["info", &volume])).expect("text");
    assert!(text.contains(&keeper.volume.to_string()) && text.contains("8 MiB"), "{text}");

    let checked = keeper.json(&["check", &volume]);
    assert_eq!((&checked["good"], &checked["data_blocks"]), (&true.into(), &0.into()));
}

#[test]
fn looking_changes_neither_volume_nor_anchor() {
    let folder = Folder::new();
    let (from, volume) = (folder.write("from.img", &image(64, &[3])), folder.name("a.vol"));
    let mut keeper = Keeper::new();
    keeper.good(&["import", &from, &volume]);
    let before = fs::read(&volume).expect("there");
    for words in [vec!["info", &volume], vec!["check", &volume], vec!["export", &volume, "-"]] {
        let ended = keeper.run(&words);
        assert!(ended.code == 0 && ended.anchors.is_empty() && ended.events.is_empty(), "{words:?}: {ended:?}");
    }
    assert!(fs::read(&volume).expect("there") == before);
}

#[test]
fn check_finds_every_flipped_bit_of_the_data_and_names_its_block() {
    let folder = Folder::new();
    let filled = [0, 1, 2, 9, 70, 71, 127];
    let (from, volume) = (folder.write("from.img", &image(128, &filled)), folder.name("a.vol"));
    let mut keeper = Keeper::new();
    keeper.good(&["import", &from, &volume]);
    let good = fs::read(&volume).expect("there");
    let mut named = Vec::new();
    let mut other = 0;
    for (at, block) in good.chunks(4096).enumerate().filter(|(_, block)| block.iter().any(|b| *b != 0)) {
        let mut bad = good.clone();
        bad[at * 4096 + at % block.len()] ^= 1 << (at % 8);
        fs::write(&volume, &bad).expect("written");
        let ended = keeper.run(&["check", &volume, "--json"]);
        let lines: Vec<serde_json::Value> =
            ended.out.split(|b| *b == b'\n').filter_map(|line| serde_json::from_slice(line).ok()).collect();
        match lines.first().and_then(|line| line.get("bad")) {
            Some(bad) => {
                ended.failed(3);
                assert_eq!((&bad["first"], &bad["physical"]), (&bad["last"], &at.into()));
                assert!(ended.events[0].contains(&format!("block {}", bad["first"])), "{:?}", ended.events);
                named.push(bad["first"].as_u64().expect("a number") as usize);
                // Neither does an export pass it over, nor leave an image.
                let to = folder.name("to.img");
                let line = keeper.run(&["export", &volume, &to]);
                assert!(line.failed(3).contains(&format!("block {}", bad["first"])));
                assert!(!folder.path("to.img").exists());
            }
            // A page of the map, or a spare copy of the superblock: never an image that is wrong.
            None => {
                other += usize::from(ended.code == 3);
                let out = keeper.run(&["export", &volume, "-"]);
                assert!(out.code == 3 || out.out == fs::read(&from).expect("there"), "block {at}");
            }
        }
    }
    named.sort_unstable();
    assert_eq!(named, filled);
    assert!(other > 0, "no page of the map was hit");
}

#[test]
fn force_replaces_a_volume_and_an_image() {
    let folder = Folder::new();
    let (from, volume, to) = (folder.write("from.img", &image(16, &[3])), folder.name("a.vol"), folder.name("to.img"));
    let mut keeper = Keeper::new();
    keeper.good(&["create", &volume, "--size", "1M"]);
    let mut second = Keeper::new();
    second.good(&["import", &from, &volume, "--force"]);
    fs::write(&to, "old").expect("written");
    second.good(&["export", &volume, &to, "--force"]);
    assert!(fs::read(&to).expect("there") == image(16, &[3]));
    assert_eq!(folder.names(), ["a.vol", "from.img", "to.img"]);
}

#[test]
fn help_teaches_and_needs_no_keys() {
    for words in [vec!["--help"], vec!["import", "--help"], vec!["--version"]] {
        let ended = alone(&words, "");
        assert!(ended.code == 0 && !ended.out.is_empty() && ended.error.is_empty(), "{words:?}");
    }
    let text = String::from_utf8(alone(&["--help"], "").out).expect("text");
    for needed in ["fealty-keys volume exec", "Exit codes:", "Examples:"] {
        assert!(text.contains(needed), "{needed} is missing");
    }
}

#[test]
fn qcow2_goes_in_and_out_through_qemu_img() {
    let folder = Folder::new();
    let content = image(512, &[0, 7, 8, 300, 511]);
    let raw = folder.write("from.img", &content);
    let (qcow2, volume, back) = (folder.name("from.qcow2"), folder.name("a.vol"), folder.name("back.qcow2"));
    system("qemu-img", &["convert", "-f", "raw", "-O", "qcow2", &raw, &qcow2]);
    let mut keeper = Keeper::new();
    let made = keeper.json(&["import", "--format", "qcow2", &qcow2, &volume]);
    // Holes are not written.
    assert!(made["size"] == content.len() && made["data"].as_u64().expect("a number") < 1 << 20, "{made}");
    assert!(keeper.good(&["export", &volume, "-"]) == content);
    let exported = keeper.json(&["export", "--format", "qcow2", &volume, &back]);
    assert!(exported["data"] == 5 * 4096, "what is zero is no data: {exported}");
    assert_eq!(std::fs::metadata(&back).expect("there").permissions().mode() & 0o777, 0o600);
    system("qemu-img", &["compare", "-f", "raw", "-F", "qcow2", &raw, &back]);
    assert!(room(back.as_ref()) < 1 << 20, "zeroes take no room");
    assert_eq!(keeper.json(&["check", &volume])["good"], true);
    // What is no such image, or a part of one, makes nothing.
    let (part, other) = (folder.name("part.qcow2"), folder.name("b.vol"));
    system("qemu-img", &["create", "-q", "-f", "qcow2", "-b", &raw, "-F", "raw", &part]);
    let (head, data) = (folder.name("head.qcow2"), folder.name("head.data"));
    system("qemu-img", &["create", "-q", "-f", "qcow2", "-o", &format!("data_file={data}"), &head, "1M"]);
    let mut another = Keeper::new();
    for part in [&part, &head] {
        assert!(another.run(&["import", "--format", "qcow2", part, &other]).failed(1).contains("part of an image"));
    }
    std::fs::remove_file(head).and_then(|()| std::fs::remove_file(data)).expect("removed");
    assert!(another.run(&["import", "--format", "qcow2", &raw, &other]).failed(1).contains("is no qcow2 image"));
    another.run(&["import", "--format", "qcow2", "-", &other]).failed(2);
    assert!(
        another.run(&["import", "--format", "qcow2", &qcow2, &other, "--size", "1M"]).failed(1).contains("more than")
    );
    let ended = another.run_with(&["import", "--format", "qcow2", &qcow2, &other], Manner::Good, "PATH=/nowhere");
    assert!(ended.failed(1).contains("qemu-utils"), "{ended:?}");
    assert_eq!(folder.names(), ["a.vol", "back.qcow2", "from.img", "from.qcow2", "part.qcow2"]);
}

/// Somebody writes to an image that was looked at, so that it names another file by the time `qemu-img` opens it.
#[test]
fn a_qcow2_image_that_changes_gives_nothing_but_itself() {
    let folder = Folder::new();
    let secret = vec![0x5e; 1 << 20];
    let (good, image) = (folder.name("good.qcow2"), folder.name("image.qcow2"));
    system("qemu-img", &["create", "-q", "-f", "qcow2", &good, "1M"]);
    for option in ["data_file={},data_file_raw=on", "backing_file={},backing_fmt=raw"] {
        let (bad, other) = (folder.name("bad.qcow2"), folder.name("other.img"));
        std::fs::write(&other, &secret).expect("written");
        system("qemu-img", &["create", "-q", "-f", "qcow2", "-o", &option.replace("{}", &other), &bad, "1M"]);
        std::fs::write(&other, &secret).expect("written");
        system("qemu-img", &["compare", "-q", "-f", "raw", "-F", "qcow2", &other, &bad]);
        std::fs::copy(&good, &image).expect("copied");
        // As long as what it becomes, so that nothing of that is out of reach.
        let length = std::fs::metadata(&bad).expect("there").len();
        fs::OpenOptions::new().write(true).open(&image).and_then(|file| file.set_len(length)).expect("lengthened");
        let tools = folder.name("tools");
        std::fs::create_dir_all(&tools).expect("made");
        let script =
            format!("#!/bin/sh\n[ $1 != convert ] || cat '{bad}' >'{image}'\nPATH=${{PATH#*:}} exec qemu-img \"$@\"\n");
        let tool = format!("{tools}/qemu-img");
        std::fs::write(&tool, script).expect("written");
        std::fs::set_permissions(&tool, std::fs::Permissions::from_mode(0o755)).expect("executable");

        let (mut keeper, volume) = (Keeper::new(), folder.name("a.vol"));
        let words = ["import", "--format", "qcow2", &image, &volume, "--force"];
        let ended = keeper.run_with(&words, Manner::Good, &format!("PATH={tools}:$PATH"));
        assert!(std::fs::read(&image).expect("read") == std::fs::read(&bad).expect("read"), "it did not change");
        if ended.code == 0 {
            let held = keeper.good(&["export", &volume, "-"]);
            assert!(!held.chunks(512).any(|sector| sector == &secret[..512]), "{option}: another file was read");
        }
    }
}

#[test]
fn a_qcow2_image_that_a_machine_writes_to_is_left_alone() {
    let folder = Folder::new();
    let (image, volume) = (folder.name("image.qcow2"), folder.name("a.vol"));
    system("qemu-img", &["create", "-q", "-f", "qcow2", &image, "1M"]);
    let mut machine = Command::new("qemu-io");
    let machine = machine.args(["-f", "qcow2", &image]).stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut machine = machine.spawn().expect("runs");
    // It answers when it has opened the image.
    machine.stdin.as_mut().expect("a pipe").write_all(b"length\n").expect("asked");
    let mut answer = String::new();
    let answers = machine.stdout.take().expect("a pipe");
    BufReader::new(answers).read_line(&mut answer).expect("answered");
    assert!(answer.contains("1 MiB"), "{answer}");
    let words = ["import", "--format", "qcow2", &image, &volume];
    let mut keeper = Keeper::new();
    assert!(keeper.run(&words).failed(1).contains("another program writes to"));
    drop(machine.stdin.take());
    machine.wait().expect("ends");
    keeper.good(&words);
}
