//! `fealty-disk bench`: figures, and nothing left behind.

mod disk_support;

use disk_support::{Folder, alone};
use serde_json::Value;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

fn lines(text: &str) -> Vec<Value> {
    text.lines().map(|line| serde_json::from_str(line).unwrap_or_else(|_| panic!("no JSON: {line}"))).collect()
}

#[test]
fn each_piece_of_work_has_its_figures_and_nothing_is_left() {
    let folder = Folder::new();
    let here = folder.name("");
    let ended = alone(&["bench", &here, "--size", "16M", "--rounds", "2", "--json"], "");
    assert_eq!(ended.code, 0, "{}", ended.error);
    assert!(folder.names().is_empty());
    let said = lines(&String::from_utf8(ended.out).expect("text"));
    assert_eq!(
        (&said[0]["size"], &said[0]["rounds"], &said[0]["direct"]),
        (&(16 << 20).into(), &2.into(), &false.into())
    );
    let (ciphers, works): (Vec<_>, Vec<_>) =
        said[1..].iter().partition(|figure| figure["name"].as_str().is_some_and(|name| name.starts_with("ciphers: ")));
    assert!(ciphers.len() >= 8, "{ciphers:?}");
    assert_eq!(works.len(), 24);
    for figure in &works {
        let number = |field: &str| figure[field].as_f64().unwrap_or_else(|| panic!("{field} of {figure}"));
        let (value, against) = (number("value"), number("against_value"));
        assert!(value > 0.0 && against > 0.0 && (number("ratio") / (value / against) - 1.0).abs() < 0.01, "{figure}");
        let against = if figure["name"].as_str().is_some_and(|name| name.ends_with(", wall")) {
            "plain file"
        } else {
            "ciphers alone"
        };
        assert_eq!(figure["against"], against);
    }
    for word in ["1 MiB sequential", "4 KiB random read, depth 1,", "4 KiB random write, depth 32, FLUSH every 32,"] {
        assert!(
            works.iter().any(|figure| figure["name"].as_str().is_some_and(|name| name.starts_with(word))),
            "{word}"
        );
    }
}

#[test]
fn people_see_a_table() {
    let folder = Folder::new();
    let ended = alone(&["bench", &folder.name(""), "--size", "16M", "--rounds", "1"], "");
    assert_eq!(ended.code, 0, "{}", ended.error);
    let text = String::from_utf8(ended.out).expect("text");
    assert!(text.lines().any(|line| line.starts_with("what ") && line.contains("against")), "{text}");
    assert!(!text.contains("target"), "there is none: {text}");
}

#[test]
fn one_that_is_killed_leaves_nothing() {
    let folder = Folder::new();
    let mut tool = Command::new(env!("CARGO_BIN_EXE_fealty-disk"));
    tool.args(["bench", &folder.name(""), "--size", "4G", "--rounds", "1"]).stdout(Stdio::null());
    let mut tool = tool.stderr(Stdio::null()).spawn().expect("starts");
    let (files, begun) = (format!("/proc/{}/fd", tool.id()), Instant::now());
    let at_work = || {
        let open =
            std::fs::read_dir(&files).expect("alive").filter_map(|entry| std::fs::read_link(entry.ok()?.path()).ok());
        open.filter(|file| file.starts_with(folder.path(""))).count() == 2
    };
    let mut is_at_work = at_work();
    while !is_at_work && begun.elapsed() < Duration::from_secs(60) {
        std::thread::sleep(Duration::from_millis(5));
        is_at_work = at_work();
    }
    let names = folder.names();
    tool.kill().expect("alive");
    tool.wait().expect("ends");
    assert!(is_at_work, "it opens no files");
    assert!(names.is_empty() && folder.names().is_empty(), "not even while it is at work: {names:?}");
}

#[test]
fn what_can_not_be_measured_is_one_line() {
    let folder = Folder::new();
    let (here, file) = (folder.name(""), folder.write("file", b"precious"));
    for (words, shell, code, says) in [
        (vec!["bench", &here, "--size", "1M"], "", 2, "16M to 1T"),
        (vec!["bench", &here, "--size", "16777215T"], "", 2, "16M to 1T"),
        (vec!["bench", &here, "--size", "16777217"], "", 2, "multiple of 1M"),
        (vec!["bench", &here, "--rounds", "0"], "", 2, "--rounds"),
        (vec!["bench", &file, "--force"], "", 2, "neither a folder nor a block device"),
        (vec!["bench", "/dev/null", "--force"], "", 2, "neither a folder nor a block device"),
        (vec!["bench", "/proc"], "", 1, "no scratch file can be made in /proc"),
        (vec!["bench", &here, "--size", "16M"], "ulimit -f 8192", 1, "failed to"),
    ] {
        let mut ended = alone(&words, shell);
        // On a busy machine it may come to tell of progress.
        ended.error = ended.error.split_inclusive('\n').filter(|line| !line.starts_with("bench: ")).collect();
        assert!(ended.failed(code).contains(says), "{words:?}: {ended:?}");
    }
    // A machine that is busy says meanwhile how far it is.
    let ended = alone(&["bench", &here, "--size", "16M", "--rounds", "1"], "exec >/dev/full");
    assert!(
        ended.code == 1 && ended.error.lines().last().is_some_and(|line| line.contains("standard output")),
        "{ended:?}"
    );
    assert_eq!((folder.names(), std::fs::read(&file).expect("there")), (vec!["file".to_owned()], b"precious".to_vec()));
}
