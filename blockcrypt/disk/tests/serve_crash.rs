//! `fealty-disk serve --nbd`, killed under load and on a store that runs full: nothing that was acknowledged as durable is lost.

mod disk_support;

use disk_support::nbd::{Client, FLUSH, WRITE};
use disk_support::server::Server;
use disk_support::{Folder, Keeper, with_small_store};
use rustix::process::Signal;
use std::collections::HashMap;

const BLOCK: u64 = 4096;
const BLOCKS: u64 = 2048;
const ENOSPC: u32 = 28;

/// A block as a round writes it: the round, then what only this round writes there.
fn content(round: u64, block: u64) -> Vec<u8> {
    let words = (1..BLOCK / 8).map(|i| (round << 40 | block << 16 | i).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    std::iter::once(round).chain(words).flat_map(u64::to_le_bytes).collect()
}

/// Which block a round's `i`th write goes to.
fn place(round: u64, i: u64) -> u64 {
    (round.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 20).wrapping_add(i * 37) % BLOCKS
}

/// Writes rounds with many requests in flight until the server dies; the last round whose FLUSH was acknowledged.
fn load(client: &mut Client, first: u64) -> u64 {
    let mut durable = first - 1;
    for round in first.. {
        let sent = (0..24).try_for_each(|i| {
            let block = place(round, i);
            client.send(WRITE, 0, block * BLOCK, BLOCK as u32, &content(round, block)).map(drop)
        });
        // Every write is acknowledged before the FLUSH is sent, so that the FLUSH covers it.
        let written =
            sent.and_then(|()| (0..24).try_for_each(|_| client.reply().map(|(error, _)| assert_eq!(error, 0))));
        let flushed = written.and_then(|()| client.send(FLUSH, 0, 0, 0, &[])).and_then(|_| client.reply());
        match flushed {
            Ok((error, _)) => assert_eq!(error, 0),
            Err(_) => return durable,
        }
        durable = round;
    }
    durable
}

#[test]
fn a_server_killed_under_load_loses_nothing_that_was_flushed() {
    let (folder, mut keeper) = (Folder::new(), Keeper::new());
    let volume = folder.name("a.vol");
    keeper.good(&["create", &volume, "--size", "8M"]);
    // The newest round that a block must have.
    let mut newest: HashMap<u64, u64> = HashMap::new();
    let mut first = 1;
    for life in 0..3_u64 {
        let server = Server::start(&mut keeper, &folder, &volume, "--nbd", &[]);
        let mut client = Client::connect(&server.socket);
        let durable = std::thread::scope(|scope| {
            let load = scope.spawn(move || load(&mut client, first));
            // Killed when the store has grown by some rounds, at no point in particular.
            let begun = disk_support::room(volume.as_ref());
            let grown = || disk_support::room(volume.as_ref()) >= begun + (life + 1) * 100 * BLOCK;
            while !grown() && !load.is_finished() {
                std::thread::yield_now();
            }
            server.running.signal(Signal::KILL);
            load.join().expect("no panic")
        });
        let ended = server.end(&mut keeper);
        assert_eq!(ended.code, 128 + 9, "{}", ended.error);
        for round in first..=durable {
            (0..24).for_each(|i| _ = newest.insert(place(round, i), round));
        }
        // The socket that it left is no obstacle.
        let server = Server::start(&mut keeper, &folder, &volume, "--nbd", &[]);
        let mut client = Client::connect(&server.socket);
        let mut seen = 0;
        for block in 0..BLOCKS {
            let found = client.read(block * BLOCK, BLOCK as u32).expect("readable");
            // What was written after the last FLUSH may be there or not, but never another round's.
            let round = u64::from_le_bytes(found[..8].try_into().expect("eight"));
            let least = newest.get(&block).copied().unwrap_or(0);
            assert!((least..=durable + 1).contains(&round), "block {block} after life {life}: {round}, not {least}");
            if round == 0 {
                assert!(found.iter().all(|b| *b == 0), "block {block} after life {life}");
                continue;
            }
            assert!(found == content(round, block), "block {block} after life {life}");
            newest.insert(block, round);
            seen += 1;
        }
        assert!(seen > 0 && durable >= first, "it did some work before it was killed");
        first = durable + 2;
        drop(client);
        assert_eq!(server.stop(&mut keeper).code, 0);
        assert_eq!(keeper.json(&["check", &volume])["good"], true);
    }
}

#[test]
fn a_full_store_is_no_space_left_and_loses_nothing() {
    with_small_store("a_full_store_is_no_space_left_and_loses_nothing", 6 << 20, full_store);
}

fn full_store(small: &str) {
    let (folder, mut keeper) = (Folder::new(), Keeper::new());
    let volume = format!("{small}a.vol");
    keeper.good(&["create", &volume, "--size", "64M"]);
    let server = Server::start(&mut keeper, &folder, &volume, "--nbd", &[]);
    let mut client = Client::connect(&server.socket);
    let mut written = Vec::new();
    let full =
        (0..BLOCKS * 4).find(|block| match client.write(block * BLOCK, &content(1, *block)).expect("answered") {
            0 => {
                written.push(*block);
                false
            }
            error => {
                assert_eq!(error, ENOSPC);
                true
            }
        });
    assert!(full.is_some() && written.len() > 100, "{} blocks fit", written.len());
    assert_eq!(client.flush().expect("answered"), 0);
    // What was written can be read, given back, and its room be used again.
    for block in &written {
        assert!(client.read(block * BLOCK, BLOCK as u32).expect("good") == content(1, *block), "{block}");
    }
    let half = written.len() as u64 / 2;
    let trimmed = client.ask(disk_support::nbd::TRIM, 0, 0, (half * BLOCK) as u32, &[]).expect("answered");
    assert_eq!((trimmed, client.flush().expect("answered")), (0, 0));
    for block in 0..half / 2 {
        assert_eq!(client.write(block * BLOCK, &content(2, block)).expect("answered"), 0, "{block}");
    }
    drop(client);
    let ended = server.stop(&mut keeper);
    assert_eq!(ended.code, 0, "{}", ended.error);
    assert!(ended.error.contains("full"), "{}", ended.error);
    let exported = keeper.good(&["export", &volume, "-"]);
    let at = |block: u64| &exported[(block * BLOCK) as usize..][..BLOCK as usize];
    assert!((0..half / 2).all(|block| at(block) == content(2, block)));
    assert!((half..written.len() as u64).all(|block| at(block) == content(1, block)));
}
