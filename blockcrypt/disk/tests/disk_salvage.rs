//! `fealty-disk export --salvage`: what can be read of a damaged volume is saved, and what can't is named.

mod disk_support;

use disk_support::{Ended, Folder, Keeper, alone, image};
use serde_json::Value;
use std::fs;
use std::process::Command;

const BLOCKS: usize = 128;
const FILLED: [usize; 7] = [0, 1, 2, 9, 70, 71, 127];

/// A volume, where in the store each of its blocks lies, and one page of its map.
struct Made {
    folder: Folder,
    keeper: Keeper,
    volume: String,
    whole: Vec<u8>,
    places: Vec<(usize, usize)>,
    page: usize,
}

impl Made {
    fn new() -> Self {
        let folder = Folder::new();
        let (from, volume) = (folder.write("from.img", &image(BLOCKS, &FILLED)), folder.name("a.vol"));
        let mut keeper = Keeper::new();
        keeper.good(&["import", &from, &volume]);
        let whole = fs::read(&volume).expect("there");
        let (mut places, mut page) = (Vec::new(), None);
        for (at, _) in whole.chunks(4096).enumerate().filter(|(_, block)| block.iter().any(|b| *b != 0)) {
            fs::write(&volume, flipped(&whole, &[at])).expect("written");
            let ended = keeper.run(&["check", &volume, "--json"]);
            match said(&ended.out).first().and_then(|line| line.get("bad")?["first"].as_u64()) {
                Some(block) => places.push((block as usize, at)),
                // Another problem. One of the map keeps what it leads to from being read; one of the free space does not.
                None if ended.code == 3 && !said(&ended.out).is_empty() => {
                    let is_of_the_map = keeper.run(&["export", &volume, "-"]).code == 3;
                    page = page.or(is_of_the_map.then_some(at));
                }
                None => {}
            }
        }
        places.sort_unstable();
        assert!(places.iter().map(|(block, _)| *block).eq(FILLED), "{places:?}");
        Self { folder, keeper, volume, whole, places, page: page.expect("a page") }
    }

    /// Spoils what holds these blocks of the volume.
    fn spoil(&self, blocks: &[usize]) {
        let places = self.places.iter().filter(|(block, _)| blocks.contains(block));
        let places: Vec<usize> = places.map(|(_, at)| *at).collect();
        assert_eq!(places.len(), blocks.len());
        fs::write(&self.volume, flipped(&self.whole, &places)).expect("written");
    }

    fn export(&mut self, to: &str, more: &[&str]) -> Ended {
        let volume = self.volume.clone();
        self.keeper.run(&[&["export", &volume, to], more].concat())
    }
}

fn flipped(whole: &[u8], blocks: &[usize]) -> Vec<u8> {
    let mut bytes = whole.to_vec();
    blocks.iter().for_each(|at| bytes[at * 4096 + 99] ^= 1);
    bytes
}

/// The lines that are JSON.
fn said(out: &[u8]) -> Vec<Value> {
    out.split(|b| *b == b'\n').filter_map(|line| serde_json::from_slice(line).ok()).collect()
}

/// The ranges of bad blocks that it names on standard error, as JSON.
fn named(ended: &Ended) -> Vec<(u64, u64)> {
    let bad = |line: Value| Some((line.get("bad")?["first"].as_u64()?, line["bad"]["last"].as_u64()?));
    said(ended.error.as_bytes()).into_iter().filter_map(bad).collect()
}

/// Several threads read; what is written, and what is told, is as if there were one.
#[test]
fn a_strict_export_ends_before_the_first_damage() {
    const PIECE: usize = 1 << 20;
    let (folder, blocks) = (Folder::new(), 12 * PIECE / 4096);
    let content = image(blocks, &(0..blocks).collect::<Vec<_>>());
    let (from, volume) = (folder.write("from.img", &content), folder.name("a.vol"));
    let mut keeper = Keeper::new();
    keeper.good(&["import", &from, &volume]);
    let whole = fs::read(&volume).expect("there");
    let middle = whole.len() / 4096 / 2;
    fs::write(&volume, flipped(&whole, &[middle, middle + 600, middle + 1200])).expect("written");
    let checked = keeper.run(&["check", &volume, "--json"]);
    let bad: Vec<usize> =
        said(&checked.out).iter().filter_map(|line| Some(line.get("bad")?["first"].as_u64()? as usize)).collect();
    let first = *bad.iter().min().expect("damage");
    assert!(bad.len() == 3 && first * 4096 > 2 * PIECE, "{bad:?}");
    for _ in 0..5 {
        let ended = keeper.run(&["export", &volume, "-"]);
        assert!(ended.code == 3 && ended.error.contains(&format!("block {first}")), "{}", ended.error);
        assert!(ended.out == content[..first * 4096 / PIECE * PIECE], "{} bytes", ended.out.len());
    }
}

#[test]
fn all_but_the_bad_blocks_is_saved() {
    let mut made = Made::new();
    made.spoil(&[1, 2, 70, 127]);
    let left = image(BLOCKS, &[0, 9, 71]);
    let (raw, qcow2) = (made.folder.name("to.img"), made.folder.name("to.qcow2"));

    // Not unless it is asked for.
    assert!(made.export(&raw, &[]).failed(3).contains("block 1 "));
    assert!(!made.folder.path("to.img").exists());

    let ended = made.export(&raw, &["--salvage"]);
    let lines: Vec<&str> = ended.error.lines().collect();
    assert_eq!(ended.code, 3, "{ended:?}");
    assert!(fs::read(&raw).expect("made") == left);
    assert_eq!(&lines[..2], ["blocks 1 to 2: fails its integrity check", "block 70: fails its integrity check"]);
    assert!(lines[3].contains("4 blocks of") && lines[3].contains("zeroes in the image, which is made"), "{lines:?}");
    assert!(ended.events.iter().any(|event| event.contains("block 70")), "the audit log hears of it: {ended:?}");

    let ended = made.export("-", &["--salvage", "--json"]);
    assert!(ended.code == 3 && ended.out == left, "{}", ended.error);
    assert_eq!(named(&ended), [(1, 2), (70, 70), (127, 127)]);
    let mut lines = said(ended.error.as_bytes());
    assert_eq!(lines.pop().expect("why it failed")["exit"], 3);
    let result = lines.pop().expect("a line");
    assert_eq!((&result["lost"], &result["size"]), (&4.into(), &(BLOCKS * 4096).into()));

    let ended = made.export(&qcow2, &["--salvage", "--format", "qcow2", "--json"]);
    assert_eq!(ended.code, 3, "{ended:?}");
    assert_eq!(said(&ended.out).pop().expect("a line")["lost"], 4);
    let all: u64 = named(&ended).iter().map(|(first, last)| last - first + 1).sum();
    assert_eq!(all, 4, "{}", ended.error);
    let same = Command::new("qemu-img").args(["compare", "-q", "-f", "raw", "-F", "qcow2", &raw, &qcow2]).status();
    assert!(same.expect("runs").success());
}

#[test]
fn a_damaged_page_of_the_map_costs_what_hangs_from_it() {
    let mut made = Made::new();
    fs::write(&made.volume, flipped(&made.whole, &[made.page])).expect("written");
    let ended = made.export("-", &["--salvage", "--json"]);
    assert_eq!((ended.code, ended.out.len()), (3, BLOCKS * 4096), "{}", ended.error);
    let named = named(&ended);
    let is_lost = |block: usize| named.iter().any(|(first, last)| (*first..=*last).contains(&(block as u64)));
    for (block, (found, was)) in ended.out.chunks(4096).zip(image(BLOCKS, &FILLED).chunks(4096)).enumerate() {
        assert!(if is_lost(block) { found.iter().all(|b| *b == 0) } else { found == was }, "block {block}");
    }
    assert!(FILLED.iter().any(|block| is_lost(*block)), "{}", ended.error);
}

#[test]
fn a_good_volume_is_exported_as_ever_and_one_that_does_not_open_is_not() {
    let mut made = Made::new();
    fs::write(&made.volume, &made.whole).expect("written");
    let ended = made.export("-", &["--salvage"]);
    assert!(ended.code == 0 && ended.out == image(BLOCKS, &FILLED), "{}", ended.error);
    fs::write(&made.volume, vec![7; made.whole.len()]).expect("written");
    assert!(made.export("-", &["--salvage"]).failed(3).contains("no fealty volume"));
    assert!(alone(&["export", "--help"], "").out.windows(9).any(|word| word == b"--salvage"));
}
