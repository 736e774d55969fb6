//! Changes of a volume, cut off by SIGKILL at moments of no choice: whenever it was, nothing is lost and nobody is locked out.

use fealty_tests::keys::{ALL, Keys, LIMIT, MIB, image, random};
use fealty_tests::process::Ended;

/// How often each operation is killed.
const KILLS: usize = 4;

/// Does rounds, by their number, until so many of them were killed before they came to their end.
fn until_killed(mut round: impl FnMut(usize) -> Ended) {
    let mut kills = 0;
    for number in 0..100 {
        match round(number).code {
            Some(137) => kills += 1,
            other => assert_eq!(other, Some(0), "neither killed nor done"),
        }
        if kills == KILLS {
            return;
        }
    }
    panic!("only {kills} of 100 rounds were killed");
}

/// Kills `words` at random moments of its work on a volume that was prepared so. Whenever it was, the volume is whole and holds the same,
/// and `words` goes on to its end.
fn killed_again_and_again(prepare: &[&[&str]], words: &[&str]) -> Keys {
    let (keys, image) = Keys::with_volume(ALL);
    let volume = keys.volume("root");
    let filled = |words: &[&str]| words.iter().map(|word| word.replace("VOLUME", &volume)).collect::<Vec<_>>();
    for words in prepare {
        keys.exec("root", &text(&filled(words))).good();
    }
    let words = filled(words);
    let words = text(&words);
    let (mut random, whole) = (random(), keys.duration("root", &words));
    until_killed(|_| {
        let ended = keys.killed("root", &words, random.moment(whole));
        keys.holds("root", &image);
        ended
    });
    keys.exec("root", &words).good();
    keys.holds("root", &image);
    keys
}

#[test]
fn a_killed_rekey_goes_on_under_the_same_key() {
    let keys = killed_again_and_again(&[], &["rekey", "VOLUME"]);
    let volume = keys.volume("root");
    assert_eq!(keys.json("root", &["info", &volume])["older_keys"], 0);
    // What was cut off between its permission and its outcome is told of.
    let words = ["rekey", &volume];
    let (mut random, whole) = (random(), keys.duration("root", &words));
    for round in 0.. {
        if keys.story().contains(&"volume.rekey ended: not said".to_owned()) {
            break;
        }
        assert!(round < 50, "{:?}", keys.story());
        keys.killed("root", &words, random.moment(whole));
    }
    // Whoever asks for a new key gets one, or hears that he did not.
    let before = keys.plain("root")["key_id"].clone();
    let rekeyed = keys.json("root", &words);
    assert!(rekeyed["begun_before"] == true || rekeyed["key_id"] != before, "{rekeyed}");
    assert_ne!(keys.json("root", &words)["key_id"], rekeyed["key_id"]);
}

const SNAPSHOT: &[&str] = &["snapshot", "take", "VOLUME", "--name", "s"];

/// Of a volume that has older keys too.
#[test]
fn a_killed_rewrap_never_locks_anybody_out() {
    let keys = killed_again_and_again(&[SNAPSHOT, &["rekey", "VOLUME"]], &["rewrap", "VOLUME"]);
    assert!(keys.story().contains(&"volume-rewrapped".to_owned()));
}

#[test]
fn a_killed_snapshot_leaves_a_whole_volume() {
    killed_again_and_again(&[], SNAPSHOT);
}

#[test]
fn a_killed_revert_leaves_one_of_both() {
    let (keys, image) = Keys::with_volume(ALL);
    let volume = keys.volume("root");
    let snapshot = keys.json("root", &["snapshot", "take", &volume, "--name", "s"])["snapshot"].to_string();
    let words = ["snapshot", "revert", &volume, &snapshot];
    let (mut random, whole) = (random(), keys.duration("root", &words));
    until_killed(|_| {
        let ended = keys.killed("root", &words, random.moment(whole));
        keys.holds("root", &image);
        ended
    });
    keys.exec("root", &words).good();
    keys.holds("root", &image);
}

#[test]
fn a_killed_resize_has_one_of_both_sizes() {
    let (keys, image) = Keys::with_volume(ALL);
    let (volume, mut random) = (keys.volume("root"), random());
    let whole = keys.duration("root", &["resize", &volume, "--size", "5M"]);
    until_killed(|round| {
        let size = 6 + round;
        let words = ["resize", &volume, "--size", &format!("{size}M")];
        let ended = keys.killed("root", &words, random.moment(whole));
        let found = keys.content("root");
        assert!(found.len() == size * MIB || found.len() == (size - 1) * MIB, "{}", found.len());
        assert!(found[..image.len()] == image[..] && found[image.len()..].iter().all(|b| *b == 0));
        // The provider learns what it missed.
        keys.exec("root", &words).good();
        assert_eq!(keys.listed("root")["size"], size * MIB);
        ended
    });
}

#[test]
fn a_killed_shrink_has_one_of_both_sizes() {
    let (keys, image) = Keys::with_volume(ALL);
    let (volume, mut random) = (keys.volume("root"), random());
    let words =
        |size: usize| ["resize", &volume, "--size", &size.to_string(), "--discard-tail"].map(str::to_owned).to_vec();
    let mut size = image.len() - 30 * 512;
    let whole = keys.duration("root", &text(&words(size)));
    until_killed(|_| {
        let next = size - 30 * 512;
        let ended = keys.killed("root", &text(&words(next)), random.moment(whole));
        let found = keys.content("root");
        assert!(found.len() == size || found.len() == next, "{}", found.len());
        // The rest of the block that the new end cuts may be zero.
        let cut = next.next_multiple_of(4096).min(found.len());
        assert!(found[..next] == image[..next] && found[cut..] == image[cut..found.len()]);
        size = next;
        keys.exec("root", &text(&words(size))).good();
        keys.holds("root", &image[..size]);
        assert_eq!(keys.listed("root")["size"], size);
        ended
    });
}

#[test]
fn a_killed_clone_is_begun_again_under_its_name() {
    let (keys, image) = Keys::with_volume(ALL);
    let volume = keys.volume("root");
    let clone = |name: &str| ["clone", &volume, &keys.volume(name), "--name", name].map(str::to_owned).to_vec();
    let whole = keys.duration("root", &text(&clone("first")));
    let mut random = random();
    until_killed(|round| {
        let name = format!("copy{round}");
        let again = clone(&name);
        let ended = keys.killed("root", &text(&again), random.moment(whole));
        keys.holds("root", &image);
        if !keys.is_anchored(&name) {
            assert_ne!(ended.code, Some(0));
            // Killed between its name and its anchor, it stands there and opens for nobody.
            keys.exec("root", &[&text(&again)[..], &["--force"]].concat()).good();
        }
        keys.holds(&name, &image);
        ended
    });
}

fn text(words: &[String]) -> Vec<&str> {
    words.iter().map(String::as_str).collect()
}

#[test]
fn a_killed_erasure_is_none_or_can_be_done_again_by_anybody() {
    let keys = Keys::new(ALL);
    let (mut random, image) = (random(), image(3));
    keys.import("first", &image);
    let whole = keys.duration("first", &["erase", &keys.volume("first"), "--force"]);
    until_killed(|round| {
        let name = format!("v{round}");
        keys.import(&name, &image);
        let volume = keys.volume(&name);
        let ended = keys.killed(&name, &["erase", &volume, "--force"], random.moment(whole));
        if keys.listed(&name)["retired"] == false {
            keys.holds(&name, &image);
            return ended;
        }
        keys.exec(&name, &["export", &volume, "-"]).refused();
        let again = keys.tool("fealty-disk", &["erase", &volume, "--force"]);
        assert!(again.code == Some(0) || again.err.contains("this is no fealty volume"), "{}", again.err);
        assert_eq!(keys.tool("fealty-disk", &["info", &volume]).code, Some(3));
        ended
    });
}

/// The provider is killed and comes back: whoever waits for its answer waits, and what it did is done once.
#[test]
fn operations_outlive_a_killed_provider() {
    let (mut keys, image) = Keys::with_volume(ALL);
    let (volume, mut random) = (keys.volume("root"), random());
    for operation in ["rekey", "rewrap", "rewrap", "rekey"] {
        let whole = keys.duration("root", &[operation, &volume]);
        let running = keys.started("root", &[operation, &volume]);
        std::thread::sleep(random.moment(whole));
        keys.provider = None;
        keys.serve();
        running.end(LIMIT).good();
        keys.holds("root", &image);
    }
}
