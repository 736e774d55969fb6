//! `fealty-disk`: stopped in the middle, it leaves nothing that anybody takes for a volume or an image.

mod disk_support;

use disk_support::{Folder, Keeper, Manner, Running, alone, image, room, with_small_store};
use rustix::fs::{CWD, FileType, Mode};
use rustix::process::Signal;
use std::fs::{File, read};
use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::{Duration, Instant};

const BLOCKS: usize = 2048;

/// An import of 8 MiB that has taken in most of the first half, and waits for the second. Dropping the file ends its image.
fn half_way(keeper: &mut Keeper, folder: &Folder, manner: Manner) -> (Running, File) {
    half_way_with(keeper, folder, manner, "")
}

/// The same with a piece of shell before the tool.
fn half_way_with(keeper: &mut Keeper, folder: &Folder, manner: Manner, shell: &str) -> (Running, File) {
    let pipe = folder.path("pipe");
    rustix::fs::mknodat(CWD, &pipe, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).expect("a pipe");
    // Open for both, so that neither end waits for the other.
    let mut image_end = File::options().read(true).write(true).open(&pipe).expect("opens");
    let words = ["import", &folder.name("pipe"), &folder.name("a.vol"), "--size", "8M"];
    let running = keeper.start(&words, manner, shell);
    image_end.write_all(&first_half()).expect("the tool reads");
    (running, image_end)
}

fn first_half() -> Vec<u8> {
    image(BLOCKS / 2, &(0..BLOCKS / 2).collect::<Vec<_>>())
}

/// Bytes that a file takes up, if it is there.
fn written(path: &Path) -> u64 {
    std::fs::metadata(path).map_or(0, |file| file.blocks() * 512)
}

/// Until an import has written the first half, and has nothing to do before more comes.
fn until_it_waits(folder: &Folder) {
    let begun = Instant::now();
    while written(&folder.path(".a.vol.fealty-partial")) < first_half().len() as u64 {
        assert!(begun.elapsed() < Duration::from_secs(60), "the first half is not written");
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn names(folder: &Folder) -> Vec<String> {
    folder.names().into_iter().filter(|name| name != "pipe").collect()
}

#[test]
fn a_killed_import_leaves_no_volume_and_no_anchor() {
    let folder = Folder::new();
    let mut keeper = Keeper::new();
    let (running, _image) = half_way(&mut keeper, &folder, Manner::Good);
    running.signal(Signal::KILL);
    let ended = running.end();
    assert_eq!((ended.code, ended.anchors.len()), (128 + 9, 0));
    // Under its name there is nothing; what is left beside it opens for nobody.
    assert_eq!(names(&folder), [".a.vol.fealty-partial"]);
    let left = folder.name(".a.vol.fealty-partial");
    keeper.run(&["export", &left, "-"]).failed(4);
    assert!(!read(&left).expect("there").windows(10).any(|w| w == b"plain text"));

    // One with another name is somebody's.
    let (from, other) = (folder.write("from.img", &first_half()), folder.name("other"));
    std::fs::hard_link(&left, &other).expect("linked");
    let ended = keeper.run(&["import", &from, &folder.name("a.vol")]);
    assert!(ended.failed(1).contains(&format!("{left} is in the way")), "{ended:?}");
    assert!(read(&left).expect("there") == read(&other).expect("there"));
    std::fs::remove_file(&other).expect("there");

    // The next run clears it away.
    keeper.good(&["import", &from, &folder.name("a.vol")]);
    assert_eq!(names(&folder), ["a.vol", "from.img"]);
    assert!(keeper.good(&["export", &folder.name("a.vol"), "-"]) == first_half());
}

#[test]
fn an_import_killed_at_its_anchor_leaves_a_volume_that_does_not_open() {
    let folder = Folder::new();
    let from = folder.write("from.img", &image(64, &[1]));
    let volume = folder.name("a.vol");
    let mut keeper = Keeper::new();
    let ended = keeper.run_with(&["import", &from, &volume], Manner::KillsAtAnchor, "");
    assert_eq!((ended.code, ended.anchors.len()), (128 + 9, 1));
    keeper.run(&["check", &volume]).failed(4);
    assert_eq!(alone(&["info", &volume], "").code, 0);
    keeper.good(&["import", &from, &volume, "--force"]);
    assert!(keeper.good(&["export", &volume, "-"]) == image(64, &[1]));
}

/// Whether this process, and with it the tool that it starts, ignores a signal: what it does then can't be tested, which is said.
fn untested(signal: Signal) -> bool {
    let status = std::fs::read_to_string("/proc/self/status").expect("proc(5)");
    let ignored = status.lines().find_map(|line| line.strip_prefix("SigIgn:")).expect("a mask").trim();
    let ignored = u64::from_str_radix(ignored, 16).expect("a mask in hex");
    let ignored = ignored & (1 << (signal.as_raw() - 1)) != 0;
    if ignored {
        eprintln!("NOT TESTED: {signal:?} is ignored here, as under nohup, and stays so");
    }
    ignored
}

#[test]
fn an_interrupted_import_cleans_up_and_says_so() {
    for (signal, code) in [(Signal::INT, 130), (Signal::TERM, 143), (Signal::HUP, 129)] {
        if untested(signal) {
            continue;
        }
        let folder = Folder::new();
        let mut keeper = Keeper::new();
        let (running, _image) = half_way(&mut keeper, &folder, Manner::Good);
        running.signal(signal);
        let ended = running.end();
        assert!(ended.failed(code).contains("nothing was changed"), "{ended:?}");
        assert!(ended.anchors.is_empty() && names(&folder).is_empty());
    }
}

#[test]
fn an_interrupted_replacement_leaves_the_old_volume() {
    if untested(Signal::INT) {
        return;
    }
    let folder = Folder::new();
    let volume = folder.name("a.vol");
    let mut old = Keeper::new();
    old.good(&["create", &volume, "--size", "1M"]);
    let before = read(&volume).expect("there");
    let from = folder.path("pipe");
    rustix::fs::mknodat(CWD, &from, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).expect("a pipe");
    let mut image_end = File::options().read(true).write(true).open(&from).expect("opens");
    let mut keeper = Keeper::new();
    let words = ["import", &folder.name("pipe"), &volume, "--size", "8M", "--force"];
    let running = keeper.start(&words, Manner::Good, "");
    image_end.write_all(&first_half()).expect("the tool reads");
    running.signal(Signal::INT);
    running.end().failed(130);
    assert!(read(&volume).expect("there") == before);
    assert_eq!(names(&folder), ["a.vol"]);
}

#[test]
fn what_was_ignored_stays_ignored() {
    let folder = Folder::new();
    let pipe = folder.path("pipe");
    rustix::fs::mknodat(CWD, &pipe, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).expect("a pipe");
    let mut image_end = File::options().read(true).write(true).open(&pipe).expect("opens");
    let mut keeper = Keeper::new();
    let words = ["import", &folder.name("pipe"), &folder.name("a.vol"), "--size", "8M"];
    // As nohup does.
    let running = keeper.start(&words, Manner::Good, "trap '' HUP");
    image_end.write_all(&first_half()).expect("the tool reads");
    running.signal(Signal::HUP);
    image_end.write_all(&first_half()).expect("the tool still reads");
    drop(image_end);
    let ended = running.end();
    assert_eq!(ended.code, 0, "{}", ended.error);
}

#[test]
fn a_holder_that_leaves_ends_what_waits_for_a_pipe() {
    let folder = Folder::new();
    let mut keeper = Keeper::new();
    let (running, image_end) = half_way(&mut keeper, &folder, Manner::Good);
    until_it_waits(&folder);
    running.holder_leaves();
    let ended = running.end_by_itself();
    let said = ended.failed(4);
    assert!(said.contains("the key holder is gone") && said.contains("nothing was changed"), "{said}");
    assert!(ended.anchors.is_empty() && names(&folder).is_empty());

    // Nobody has opened it for writing.
    drop(image_end);
    let running =
        keeper.start(&["import", &folder.name("pipe"), &folder.name("a.vol"), "--size", "8M"], Manner::Good, "");
    running.holder_leaves();
    assert!(running.end_by_itself().failed(4).contains("the key holder"));
    assert!(names(&folder).is_empty());

    // More than a pipe holds, and nobody reads it.
    let from = folder.write("from.img", &first_half());
    keeper.good(&["import", &from, &folder.name("a.vol")]);
    let running = keeper.start(&["export", &folder.name("a.vol"), "-"], Manner::Good, "");
    running.wait_for_output();
    running.holder_leaves();
    assert!(running.end_by_itself().failed(4).contains("the key holder is gone"));
}

/// Neither an interruption nor the holder's end waits for whoever is to read of it.
#[test]
fn what_nobody_reads_keeps_nothing_from_ending() {
    for (leaves, code) in [(true, 4), (false, 143)] {
        let folder = Folder::new();
        let mut keeper = Keeper::new();
        // As much as a pipe holds.
        let (running, _image) = half_way_with(&mut keeper, &folder, Manner::Good, "head -c 65536 /dev/zero >&2");
        until_it_waits(&folder);
        match leaves {
            true => running.holder_leaves(),
            false => running.signal(Signal::TERM),
        }
        let ended = running.end_by_itself();
        assert_eq!((ended.code, names(&folder)), (code, vec![]));
    }
}

/// What can't be written is said at once, whether or not more is to come.
#[test]
fn a_store_that_fills_up_ends_an_import_that_waits_for_a_pipe() {
    let test = "a_store_that_fills_up_ends_an_import_that_waits_for_a_pipe";
    // Full after little of a piece, and after most of one, never between two; twice, for the order of threads is chance.
    with_small_store(test, 7 << 20, |small| (0..12).for_each(|part| store_that_fills_up(small, part % 6 * 40)));
}

/// In a store that has room for all but so many blocks.
fn store_that_fills_up(small: &str, taken: usize) {
    let (folder, mut keeper) = (Folder::new(), Keeper::new());
    let other = format!("{small}other");
    std::fs::write(&other, image(taken, &[])).expect("room");
    let pipe = folder.path("pipe");
    rustix::fs::mknodat(CWD, &pipe, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).expect("a pipe");
    let words = ["import", &folder.name("pipe"), &format!("{small}a.vol"), "--size", "64M"];
    let mut running = keeper.start(&words, Manner::Good, "");
    let mut image_end = File::options().write(true).open(&pipe).expect("opens");
    let free = || rustix::fs::statvfs(small).expect("known").f_bavail;
    let piece = image(256, &(0..256).collect::<Vec<_>>());
    let mut pieces = 0;
    while !running.is_over() {
        image_end.write_all(&piece).expect("the tool reads");
        pieces += 1;
        while !running.is_over() && !running.is_asleep() {}
        assert!(running.is_over() || free() > 0, "it waits for more, and can't write what it has");
    }
    let ended = running.end();
    assert!(ended.failed(1).contains("full") && ended.anchors.is_empty(), "{ended:?}");
    assert!((2..6).contains(&pieces), "{pieces}");
    std::fs::remove_file(&other).expect("there");
    assert_eq!(std::fs::read_dir(small).expect("there").count(), 0);
}

#[test]
fn two_imports_of_one_volume_do_not_mix() {
    let folder = Folder::new();
    let from = folder.write("from.img", &image(8, &[1]));
    let mut keeper = Keeper::new();
    let (running, mut image_end) = half_way(&mut keeper, &folder, Manner::Good);
    let mut second = Keeper::new();
    let ended = second.run(&["import", &from, &folder.name("a.vol")]);
    assert!(ended.failed(1).contains("another process"), "{ended:?}");
    image_end.write_all(&first_half()).expect("the tool reads");
    drop(image_end);
    let ended = running.end();
    assert_eq!(ended.code, 0, "{}", ended.error);
    keeper.anchor = ended.anchors.last().cloned();
    assert_eq!(names(&folder), ["a.vol", "from.img"]);
    assert!(keeper.good(&["export", &folder.name("a.vol"), "-"]) == [first_half(), first_half()].concat());
}

#[test]
fn an_interrupted_export_leaves_no_image() {
    let folder = Folder::new();
    let volume = folder.name("a.vol");
    let mut keeper = Keeper::new();
    // Many times what a machine copies before the signal arrives.
    keeper.good(&["create", &volume, "--size", "64G"]);
    let running = keeper.start(&["export", &volume, &folder.name("to.img")], Manner::Good, "");
    let begun = Instant::now();
    while !folder.path(".to.img.fealty-partial").exists() {
        assert!(begun.elapsed() < Duration::from_secs(60), "the export does not begin");
        std::thread::sleep(Duration::from_millis(1));
    }
    running.signal(Signal::TERM);
    running.end().failed(143);
    assert_eq!(names(&folder), ["a.vol"]);
}

#[test]
fn an_interrupted_rekey_leaves_a_whole_volume_and_goes_on() {
    if untested(Signal::INT) {
        return;
    }
    let folder = Folder::new();
    let content = image(BLOCKS * 8, &(0..BLOCKS * 8).collect::<Vec<_>>());
    let (from, volume) = (folder.write("from.img", &content), folder.name("a.vol"));
    let mut keeper = Keeper::new();
    keeper.good(&["import", &from, &volume, "--room", "100%"]);
    let before = room(folder.path("a.vol").as_ref());
    keeper.key = 3;
    let mut running = keeper.start(&["rekey", &volume], Manner::Good, "");
    let begun = Instant::now();
    while room(folder.path("a.vol").as_ref()) < before + (4 << 20) {
        assert!(begun.elapsed() < Duration::from_secs(60) && !running.is_over(), "the rekey does not begin");
        std::thread::sleep(Duration::from_millis(1));
    }
    running.signal(Signal::INT);
    let ended = running.end();
    assert_eq!(ended.code, 130, "{ended:?}");
    assert!(ended.error.contains("the volume is whole: run this again, and it goes on"), "{ended:?}");
    keeper.anchor = ended.anchors.last().cloned().or(keeper.anchor);
    assert_eq!(keeper.json(&["check", &volume])["good"], true);
    let rekeyed = keeper.json(&["rekey", &volume]);
    assert_eq!((&rekeyed["begun_before"], &rekeyed["older_keys"]), (&true.into(), &0.into()), "{rekeyed}");
    assert!(keeper.good(&["export", &volume, "-"]) == content);
}

/// The key provider has made its part by then: nothing is not what was changed.
#[test]
fn an_interrupted_clone_says_what_is_left_of_it() {
    if untested(Signal::INT) {
        return;
    }
    let folder = Folder::new();
    let content = image(BLOCKS * 8, &(0..BLOCKS * 8).collect::<Vec<_>>());
    let (from, volume, copy) = (folder.write("from.img", &content), folder.name("a.vol"), folder.name("b.vol"));
    let mut keeper = Keeper::new();
    keeper.good(&["import", &from, &volume]);
    let mut running = keeper.start(&["clone", &volume, &copy, "--name", "copy", "--json"], Manner::Good, "");
    let begun = Instant::now();
    while !std::fs::metadata(folder.path(".b.vol.fealty-partial")).is_ok_and(|partial| partial.len() > 0) {
        assert!(begun.elapsed() < Duration::from_secs(60) && !running.is_over(), "the clone does not begin");
        std::thread::sleep(Duration::from_millis(1));
    }
    running.signal(Signal::INT);
    let ended = running.end();
    let last: serde_json::Value = serde_json::from_str(ended.error.lines().last().expect("a line")).expect("JSON");
    assert_eq!((ended.code, &last["event"], &last["exit"]), (130, &"error".into(), &130.into()), "{ended:?}");
    let said = last["message"].as_str().expect("text");
    assert!(said.contains("there is no clone, and the volume is as it was") && said.contains("next run"), "{said}");
    assert_eq!(names(&folder), ["a.vol", "from.img"]);
    assert!(keeper.good(&["export", &volume, "-"]) == content);
}

/// Whether the key provider has done its part is not known before it answers.
#[test]
fn a_clone_that_is_interrupted_before_it_is_permitted_does_not_say_that_nothing_was_changed() {
    if untested(Signal::INT) {
        return;
    }
    let folder = Folder::new();
    let (volume, copy) = (folder.name("a.vol"), folder.name("b.vol"));
    let mut keeper = Keeper::new();
    keeper.good(&["create", &volume, "--size", "1M"]);
    let mut running = keeper.start(&["clone", &volume, &copy, "--name", "copy"], Manner::Ponders, "");
    let begun = Instant::now();
    while running.anchors() == 0 {
        assert!(begun.elapsed() < Duration::from_secs(60) && !running.is_over(), "it does not ask");
        std::thread::sleep(Duration::from_millis(1));
    }
    running.signal(Signal::INT);
    let ended = running.end();
    let said = ended.failed(130);
    assert!(
        said.contains("there is no clone") && said.contains("the key provider may have the clone's name"),
        "{said}"
    );
    assert_eq!(names(&folder), ["a.vol"]);
}
