//! `fealty-disk serve --nbd`, killed and started again for a client that comes back: to it the disk has lost nothing, since no machine
//! has. What was acknowledged before, and is covered by a FLUSH that the next server acknowledges, is durable.

mod disk_support;

use disk_support::nbd::{Client, FLUSH, NO_HOLE, TRIM, WRITE, WRITE_ZEROES};
use disk_support::server::Server;
use disk_support::{Folder, Keeper};
use rustix::process::Signal;
use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};

const BLOCK: u64 = 4096;
const BLOCKS: u64 = 2048;
/// Requests of a round, all under way at once.
const ROUND: u64 = 24;

/// What a block holds: what a round wrote there, or with 0 nothing.
type Held = u64;

fn content(held: Held, block: u64) -> Vec<u8> {
    if held == 0 {
        return vec![0; BLOCK as usize];
    }
    let words = (1..BLOCK / 8).map(|i| (held << 40 | block << 16 | i).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    std::iter::once(held).chain(words).flat_map(u64::to_le_bytes).collect()
}

/// The block of a round's `i`th request: each is another.
fn place(round: u64, i: u64) -> u64 {
    (round.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 20).wrapping_add(i * 37) % BLOCKS
}

/// A client's view: what each block may hold, all that it may be where a request was not answered.
type Model = HashMap<u64, Vec<Held>>;

/// Sends rounds of writes, discards and zeroes, few FLUSHes among them, until the server dies.
fn load(client: &mut Client, model: &mut Model, rounds: &AtomicU64) {
    loop {
        let round = rounds.load(Ordering::Relaxed) + 1;
        let mut asked = HashMap::new();
        for i in 0..ROUND {
            let block = place(round, i);
            let (kind, flags, held, payload) = match i {
                3 => (TRIM, 0, 0, vec![]),
                9 => (WRITE_ZEROES, 0, 0, vec![]),
                15 => (WRITE_ZEROES, NO_HOLE, 0, vec![]),
                _ => (WRITE, 0, round, content(round, block)),
            };
            // As soon as it is sent it may be done.
            model.entry(block).or_insert_with(|| vec![0]).push(held);
            match client.send(kind, flags, block * BLOCK, BLOCK as u32, &payload) {
                Ok(cookie) => asked.insert(cookie, (block, held)),
                Err(_) => return,
            };
        }
        for _ in 0..ROUND {
            let Ok((error, cookie)) = client.reply() else { return };
            assert_eq!(error, 0);
            let (block, held) = asked.remove(&cookie).expect("asked");
            model.insert(block, vec![held]);
        }
        if round.is_multiple_of(64) && client.ask(FLUSH, 0, 0, 0, &[]).is_err() {
            return;
        }
        rounds.store(round, Ordering::Relaxed);
    }
}

#[test]
fn what_was_acknowledged_before_a_kill_and_flushed_after_it_is_durable() {
    survives(&[]);
}

/// Where tests run, file systems know O_DIRECT.
#[test]
fn so_it_is_past_the_page_cache() {
    survives(&["--direct"]);
}

fn survives(more: &[&str]) {
    let (folder, mut keeper) = (Folder::new(), Keeper::new());
    let volume = folder.name("a.vol");
    keeper.good(&["create", &volume, "--size", "8M"]);
    let (mut model, rounds) = (Model::new(), AtomicU64::new(0));
    for life in 0..4_u64 {
        let server = Server::start(&mut keeper, &folder, &volume, "--nbd", more);
        let mut client = Client::connect(&server.socket);
        let until = rounds.load(Ordering::Relaxed) + 5 + 50 * life;
        std::thread::scope(|scope| {
            let load = scope.spawn(|| load(&mut client, &mut model, &rounds));
            while rounds.load(Ordering::Relaxed) < until && !load.is_finished() {
                std::thread::yield_now();
            }
            server.running.signal(Signal::KILL);
            load.join().expect("no panic");
        });
        assert_eq!(server.end(&mut keeper).code, 128 + 9);
        assert!(rounds.load(Ordering::Relaxed) >= until, "it worked until it was killed");
        // The client comes back, and is told that all of it is durable.
        let server = Server::start(&mut keeper, &folder, &volume, "--nbd", more);
        assert_eq!(Client::connect(&server.socket).flush().expect("answered"), 0);
        server.running.signal(Signal::KILL);
        assert_eq!(server.end(&mut keeper).code, 128 + 9);

        let server = Server::start(&mut keeper, &folder, &volume, "--nbd", more);
        let mut client = Client::connect(&server.socket);
        for block in 0..BLOCKS {
            let found = client.read(block * BLOCK, BLOCK as u32).expect("readable");
            let may = model.get(&block).cloned().unwrap_or_else(|| vec![0]);
            let held = may.iter().find(|held| found == content(**held, block));
            let first = u64::from_le_bytes(found[..8].try_into().expect("eight"));
            let held = held.unwrap_or_else(|| panic!("block {block} after life {life}: {first}, not of {may:?}"));
            model.insert(block, vec![*held]);
        }
        drop(client);
        assert_eq!(server.stop(&mut keeper).code, 0);
    }
    assert_eq!(keeper.json(&["check", &volume])["good"], true);
}
