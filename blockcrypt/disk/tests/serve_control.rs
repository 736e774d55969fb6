//! `fealty-disk serve --control` and `resize --served`: a volume that grows while it is lent.

mod disk_support;

use disk_support::nbd::Client;
use disk_support::server::{LIMIT, Server};
use disk_support::{Folder, Keeper, alone};
use rustix::process::{Resource, Rlimit, Signal, prlimit};
use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;

const MIB: u64 = 1 << 20;
const EINVAL: u32 = 22;

#[test]
fn a_volume_grows_under_its_clients_and_each_sees_it_when_it_connects() {
    let (folder, mut keeper) = (Folder::new(), Keeper::new());
    let (volume, control) = (folder.name("a.vol"), folder.name("control"));
    keeper.good(&["create", &volume, "--size", "8M"]);
    let server = Server::start(&mut keeper, &folder, &volume, "--nbd", &["--control", &control]);
    let mode = std::fs::symlink_metadata(&control).expect("there").permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let mut before = Client::connect(&server.socket);
    assert_eq!(before.write(0, &[1; 512]).expect("answered"), 0);
    let grown = alone(&["resize", &volume, "--size", "24M", "--served", &control], "");
    assert_eq!((grown.code, String::from_utf8_lossy(&grown.out).contains("24 MiB now")), (0, true), "{grown:?}");
    // One who was there keeps to what he was told.
    assert_eq!(before.read(8 * MIB, 512), Err(EINVAL));
    assert_eq!(before.read(0, 512).expect("good"), [1; 512]);
    let mut after = Client::connect(&server.socket);
    assert_eq!(after.size, 24 * MIB);
    assert_eq!(after.read(24 * MIB - 4096, 4096).expect("new"), [0; 4096]);
    assert_eq!(after.write(24 * MIB - 512, &[2; 512]).expect("answered"), 0);
    assert_eq!(after.flush().expect("answered"), 0);
    // To the same size again: nothing to do. It was durable before it was said.
    let again = alone(&["resize", &volume, "--size", "24M", "--served", &control, "--json"], "");
    assert_eq!(again.code, 0, "{}", again.error);
    server.running.signal(Signal::KILL);
    assert_eq!(server.end(&mut keeper).code, 128 + 9);
    let server = Server::start(&mut keeper, &folder, &volume, "--nbd", &["--control", &control]);
    let mut client = Client::connect(&server.socket);
    assert_eq!((client.size, client.read(24 * MIB - 512, 512).expect("good")), (24 * MIB, vec![2; 512]));
    drop(client);
    assert_eq!(server.stop(&mut keeper).code, 0);
    assert_eq!(folder.names(), ["a.vol"]);
    assert_eq!(keeper.json(&["check", &volume])["good"], true);
}

#[test]
fn what_makes_no_sense_is_refused_and_the_volume_keeps_its_size() {
    let (folder, mut keeper) = (Folder::new(), Keeper::new());
    let (volume, other, control) = (folder.name("a.vol"), folder.name("b.vol"), folder.name("control"));
    keeper.good(&["create", &volume, "--size", "8M"]);
    Keeper::new().good(&["create", &other, "--size", "8M"]);
    let server = Server::start(&mut keeper, &folder, &volume, "--nbd", &["--control", &control]);
    let refused = |volume: &str, size: &str, socket: &str, code, words: &str| {
        let ended = alone(&["resize", volume, "--size", size, "--served", socket], "");
        assert!(ended.failed(code).contains(words), "{}", ended.error);
    };
    refused(&volume, "4M", &control, 1, "stop the server first");
    refused(&volume, "8388609", &control, 1, "a multiple of 512");
    refused(&volume, "5000T", &control, 1, "refused");
    refused(&other, "16M", &control, 1, "is served here, not");
    refused(&volume, "16M", &folder.name("nobody"), 1, "no server answers");
    refused(&folder.name("nothing"), "16M", &control, 1, "can't be opened");
    for said in ["\n", "{}\n", "{\"resize\":{\"size\":16777216}}\n", "\u{1}\u{2}", &"x".repeat(10_000)] {
        let mut stream = UnixStream::connect(&control).expect("connects");
        stream.set_read_timeout(Some(LIMIT)).expect("set");
        let _ = stream.write_all(said.as_bytes());
        let _ = stream.shutdown(std::net::Shutdown::Write);
        let mut heard = String::new();
        // What was sent and not read makes the end of the stream an error.
        let _ = stream.read_to_string(&mut heard);
        assert!(heard.is_empty() || heard.starts_with("{\"refused\":\"the request can't be read"), "{heard}");
        assert!(said.len() > 5000 || !heard.is_empty(), "{said:?}");
    }
    // One who says nothing keeps no server from ending.
    let _silent = UnixStream::connect(&control).expect("connects");
    assert_eq!(Client::connect(&server.socket).size, 8 * MIB);
    assert_eq!(server.stop(&mut keeper).code, 0);
    assert_eq!(keeper.json(&["info", &volume])["size"], 8 * MIB);
}

#[test]
fn while_there_are_no_descriptors_a_resize_waits() {
    let (folder, mut keeper) = (Folder::new(), Keeper::new());
    let (volume, control) = (folder.name("a.vol"), folder.name("control"));
    keeper.good(&["create", &volume, "--size", "8M"]);
    let server = Server::start(&mut keeper, &folder, &volume, "--nbd", &["--control", &control]);
    // It is ready, all its threads have begun, and none needs any for itself any more.
    server.running.wait_for_output();
    let begun = std::time::Instant::now();
    while !server.running.is_asleep() {
        assert!(begun.elapsed() < LIMIT, "it does not come to rest");
    }
    // As many as it has: poll(2) takes no more than the limit, which must not become the reason.
    let opened = |fd: &u64| std::fs::symlink_metadata(format!("/proc/{}/fd/{fd}", server.running.pid())).is_ok();
    let all = (0..).find(|fd| !opened(fd)).expect("an end");
    assert!(all > 5, "{all}");
    let served = Some(server.running.pid());
    let none = Rlimit { current: Some(all), ..rustix::process::getrlimit(Resource::Nofile) };
    let before = prlimit(served, Resource::Nofile, none).expect("set");
    let asked = std::thread::scope(|scope| {
        let words = ["resize", &volume, "--size", "16M", "--served", &control];
        let asked = scope.spawn(move || alone(&words, ""));
        let begun = std::time::Instant::now();
        // The connection is there, and whoever it woke has looked at it.
        while !(connected(&control) && server.running.is_asleep()) {
            assert!(begun.elapsed() < LIMIT, "nobody connects");
            assert!(!asked.is_finished(), "it does not wait: {:?}", asked.join());
        }
        prlimit(served, Resource::Nofile, before).expect("set");
        asked.join().expect("no panic")
    });
    assert_eq!(asked.code, 0, "{}", asked.error);
    assert_eq!(Client::connect(&server.socket).size, 16 * MIB);
    assert_eq!(server.stop(&mut keeper).code, 0);
}

/// Whether somebody has connected to the socket at `path`, accepted or not.
fn connected(path: &str) -> bool {
    let sockets = std::fs::read_to_string("/proc/net/unix").expect("a list");
    // The one that listens, and the other end of each connection.
    sockets.lines().filter(|line| line.ends_with(path)).count() > 1
}

#[test]
fn with_vhost_user_the_next_front_end_sees_it() {
    let (folder, mut keeper) = (Folder::new(), Keeper::new());
    let (volume, control) = (folder.name("a.vol"), folder.name("control"));
    keeper.good(&["create", &volume, "--size", "8M"]);
    let server = Server::start(&mut keeper, &folder, &volume, "--vhost-user", &["--control", &control]);
    let sectors = || {
        let mut stream = UnixStream::connect(&server.socket).expect("connects");
        stream.set_read_timeout(Some(LIMIT)).expect("set");
        let mut say = |request: u32, payload: &[u8]| {
            let header = [request, 1, payload.len() as u32].map(u32::to_le_bytes).concat();
            stream.write_all(&[&header, payload].concat()).expect("sent");
        };
        // SET_FEATURES with the protocol features' bit, SET_PROTOCOL_FEATURES with CONFIG, GET_CONFIG of the capacity.
        say(2, &(1_u64 << 30).to_le_bytes());
        say(16, &(1_u64 << 9).to_le_bytes());
        say(24, &[&[0, 8, 0].map(u32::to_le_bytes).concat()[..], &[0; 8]].concat());
        let mut answer = [0; 32];
        stream.read_exact(&mut answer).expect("an answer");
        u64::from_le_bytes(answer[24..].try_into().expect("eight"))
    };
    assert_eq!(sectors(), 8 * MIB / 512);
    let grown = alone(&["resize", &volume, "--size", "16M", "--served", &control], "");
    assert_eq!(grown.code, 0, "{}", grown.error);
    assert_eq!(sectors(), 16 * MIB / 512);
    assert_eq!(server.stop(&mut keeper).code, 0);
}
