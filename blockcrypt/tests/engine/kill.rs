//! SIGKILL of a real process that writes to a real file.

use crate::common::{MIB, Random};
use fealty_blockcrypt as blockcrypt;

use blockcrypt::{AnchorRefused, Anchors, FileStore, Kek, Nobody, OpenOptions, Volume, VolumeError};
use policy::disk::{CipherSuite, VolumeGrant};
use policy::{AnchorMode, KeyId, OpenNumber, VolumeAnchor, VolumeId};
use secretmem::Secret;
use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;

const FOLDER: &str = "FEALTY_TEST_KILL_FOLDER";
const NUMBER: &str = "FEALTY_TEST_KILL_NUMBER";
const SIZE: u64 = MIB;
const BLOCK: u64 = 4096;

/// Keeps the anchor in a file, as a provider would in its database.
struct Kept(PathBuf);

impl Anchors for Kept {
    fn keep(&self, anchor: &VolumeAnchor) -> Result<(), AnchorRefused> {
        let new = self.0.with_extension("new");
        let kept = std::fs::write(&new, anchor.as_bytes()).and_then(|()| std::fs::rename(&new, &self.0));
        kept.map_err(|e| AnchorRefused::Refused(e.to_string()))
    }
}

fn grant(folder: &Path, number: u64) -> VolumeGrant {
    let anchor = std::fs::read(folder.join("anchor")).ok();
    VolumeGrant {
        volume: VolumeId([7; 16]),
        customer: "acme".parse().expect("id"),
        cipher: CipherSuite::Aes256XtsHmacSha256,
        kek_id: KeyId(1),
        key_id: KeyId(2),
        open_number: OpenNumber::try_from(number).expect("number"),
        anchor: anchor.map(|bytes| VolumeAnchor::from_bytes(&bytes).expect("an anchor")),
        anchor_mode: AnchorMode::Interval,
    }
}

fn store(folder: &Path) -> Result<FileStore, VolumeError> {
    let mut options = File::options();
    options.read(true).write(true).create(true).truncate(false);
    FileStore::exclusive(options.open(folder.join("volume")).expect("a file"))
}

fn kek() -> Kek {
    Kek::new(KeyId(1), Secret::copy_of(&[3; 32]).expect("room"))
}

fn open(folder: &Path, number: u64) -> Volume {
    let anchors = Arc::new(Kept(folder.join("anchor")));
    // The kernel lets go of a killed process's lock a moment after its pipe.
    let store = std::iter::repeat_with(|| store(folder))
        .take(500)
        .find(|store| {
            let busy = matches!(store, Err(VolumeError::Busy));
            busy.then(|| std::thread::sleep(std::time::Duration::from_millis(20)));
            !busy
        })
        .expect("free within 10 s")
        .expect("a store");
    Volume::open(store, &grant(folder, number), &kek(), OpenOptions::default(), anchors, Arc::new(Nobody))
        .expect("the volume opens")
}

/// Block `lba` as round `round` writes it.
fn content(lba: u64, round: u64) -> Vec<u8> {
    let mut block = vec![0; BLOCK as usize];
    Random(lba << 32 | round).fill(&mut block);
    block[..8].copy_from_slice(&round.to_le_bytes());
    block
}

/// The process that is killed: writes rounds, and says which are flushed. As a test by itself it does nothing.
#[test]
fn the_process_that_is_killed() {
    let Some(folder) = std::env::var_os(FOLDER) else { return };
    let number: u64 = std::env::var(NUMBER).expect("a number").parse().expect("a number");
    let volume = open(Path::new(&folder), number);
    let mut random = Random(number);
    for round in number * 1_000_000.. {
        for _ in 0..random.below(12) {
            let lba = random.below(SIZE / BLOCK);
            volume.write(lba * BLOCK, &content(lba, round)).expect("written");
            println!("wrote {lba} {round}");
        }
        volume.flush().expect("flushed");
        println!("flushed");
        if random.chance(3) {
            volume.checkpoint().expect("checkpoint");
        }
        std::io::stdout().flush().expect("said");
    }
}

#[test]
fn a_killed_process_loses_nothing_that_it_was_told_is_durable() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path();
    let anchors = Arc::new(Kept(path.join("anchor")));
    let made = Volume::create(store(path).expect("a store"), SIZE, &grant(path, 1), &kek(), anchors, Arc::new(Nobody));
    made.expect("a volume").close().expect("closed");
    // What each block may hold: the acknowledged round, then those written since.
    let mut rounds = vec![vec![0]; (SIZE / BLOCK) as usize];
    let mut random = Random(99);
    for life in 0..6 {
        let mut child = Command::new(std::env::current_exe().expect("this test"))
            .args(["--exact", "kill::the_process_that_is_killed", "--nocapture"])
            .env(FOLDER, path)
            .env(NUMBER, (2 + 2 * life).to_string())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .expect("started");
        let lines = BufReader::new(child.stdout.take().expect("piped")).lines();
        let mut left = 20 + random.below(300);
        for line in lines.map_while(Result::ok) {
            let words: Vec<&str> = line.split(' ').collect();
            match words[..] {
                ["wrote", lba, round] => {
                    rounds[lba.parse::<usize>().expect("a block")].push(round.parse().expect("a round"));
                }
                ["flushed"] => rounds.iter_mut().for_each(|r| drop(r.drain(..r.len() - 1))),
                _ => continue,
            }
            left = left.saturating_sub(1);
            if left == 0 {
                // What is still in the pipe is read on: it was said before the kill.
                child.kill().expect("killed");
            }
        }
        child.wait().expect("ended");
        assert_eq!(left, 0, "the process worked until it was killed");
        // The last write may have been made and not said.
        let volume = open(path, 3 + 2 * life);
        for (lba, rounds) in rounds.iter_mut().enumerate() {
            let mut found = vec![0; BLOCK as usize];
            volume.read(lba as u64 * BLOCK, &mut found).expect("readable");
            let round = u64::from_le_bytes(found[..8].try_into().expect("eight"));
            let empty = round == 0 && found.iter().all(|b| *b == 0);
            assert!(empty || found == content(lba as u64, round), "block {lba}");
            let newest = rounds.last().copied().unwrap_or(0);
            assert!(rounds.contains(&round) || round >= newest, "block {lba}: {round} not in {rounds:?}");
            *rounds = vec![round];
        }
        crate::common::check_good(&volume);
    }
}
