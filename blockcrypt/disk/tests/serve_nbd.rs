//! `fealty-disk serve --nbd` with the clients that people use, and with one that none should be like.

mod disk_support;

use disk_support::nbd::{Client, DISCONNECT, FLUSH, FUA, NO_HOLE, READ, TRIM, WRITE, WRITE_ZEROES};
use disk_support::server::{Server, system};
use disk_support::{Folder, Keeper, image};
use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::os::unix::net::UnixStream;

const EPERM: u32 = 1;
const EIO: u32 = 5;
const EINVAL: u32 = 22;
const ENOSPC: u32 = 28;
const MIB: u64 = 1 << 20;

/// A volume of 64 MiB, served.
fn served(more: &[&str]) -> (Folder, Keeper, String, Server) {
    let (folder, mut keeper) = (Folder::new(), Keeper::new());
    let volume = folder.name("a.vol");
    keeper.good(&["create", &volume, "--size", "64M"]);
    let server = Server::start(&mut keeper, &folder, &volume, "--nbd", more);
    (folder, keeper, volume, server)
}

#[test]
fn qemu_and_libnbd_use_it_as_a_disk() {
    used_as_a_disk(&[]);
}

/// Where tests run, file systems know O_DIRECT.
#[test]
fn qemu_and_libnbd_use_it_past_the_page_cache() {
    used_as_a_disk(&["--direct"]);
}

fn used_as_a_disk(more: &[&str]) {
    let (folder, mut keeper, volume, server) = served(more);
    let mode = std::fs::symlink_metadata(&server.socket).expect("there").permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let uri = server.uri();
    let info = system("nbdinfo", &["--json", "--list", &uri]);
    let info: serde_json::Value = serde_json::from_str(&info).expect("JSON");
    let export = &info["exports"][0];
    assert_eq!(export["export-size"], 64 * MIB);
    for (what, value) in [("can_flush", true), ("can_fua", true), ("can_multi_conn", true), ("can_trim", true)] {
        assert_eq!(export[what], value, "{what}: {export}");
    }
    assert_eq!((&export["block_size_minimum"], &export["block_size_maximum"]), (&512.into(), &(32 * MIB).into()));
    assert!(export["is_read_only"] == false && export["can_zero"] == true && info["structured"] == true, "{info}");

    let io = |commands: &[&str]| {
        let words: Vec<_> = ["-f", "raw"].into_iter().chain(commands.iter().flat_map(|c| ["-c", c])).collect();
        system("qemu-io", &[&words[..], &[&uri]].concat())
    };
    io(&["write -P 0x5a 1M 3M", "write -f -P 0xa5 5M 512", "flush"]);
    // 8 MiB at once is more than a reply's chunk, and not a whole number of blocks at either end.
    io(&["write -P 0x33 15728128 8M", "read -P 0x33 15728128 8M", "write -z -u 16M 1M", "read -P 0 16M 1M"]);
    io(&["discard 2M 1M", "read -P 0 2M 1M", "read -P 0x5a 1M 1M", "read -P 0xa5 5M 512", "read -P 0 5243392 512"]);
    io(&["aio_write -P 1 32M 1M", "aio_write -P 2 33M 1M", "aio_read -P 0x5a 3M 1M", "aio_flush", "read -P 2 33M 1M"]);
    // What is in it comes out of it, whoever reads.
    let image = folder.name("by-qemu.img");
    system("qemu-img", &["convert", "-f", "raw", "-O", "raw", &uri, &image]);
    assert_eq!(server.stop(&mut keeper).code, 0);
    assert!(!folder.names().contains(&"sock".to_owned()));
    let exported = keeper.good(&["export", &volume, "-"]);
    assert!(std::fs::read(&image).expect("there") == exported);
    assert!(exported[MIB as usize..2 * MIB as usize].iter().all(|b| *b == 0x5a));
}

#[test]
fn fio_verifies_what_it_wrote_over_several_connections() {
    let (_folder, mut keeper, volume, server) = served(&[]);
    let uri = format!("--uri={}", server.uri());
    let common = ["--ioengine=nbd", &uri, "--name=v", "--verify=crc32c", "--verify_fatal=1", "--verify_state_save=0"];
    let small = ["--rw=randwrite", "--bs=4k", "--iodepth=32", "--size=16m", "--numjobs=2", "--offset_increment=16m"];
    system("fio", &[&common[..], &small, &["--fsync=64"]].concat());
    let mixed = ["--rw=randrw", "--bsrange=512-128k", "--blockalign=512", "--iodepth=16", "--offset=32m", "--size=24m"];
    system("fio", &[&common[..], &mixed].concat());
    assert_eq!(server.stop(&mut keeper).code, 0);
    assert_eq!(keeper.json(&["check", &volume])["good"], true);
}

#[test]
fn bad_requests_get_errors_of_their_own_and_the_connection_goes_on() {
    let (_folder, mut keeper, _volume, server) = served(&[]);
    let mut client = Client::connect(&server.socket);
    let end = client.size;
    for (kind, flags, offset, length, error) in [
        (READ, 0, end, 512, EINVAL),
        (READ, 0, end - 512, 1024, EINVAL),
        (READ, 0, u64::MAX - 511, 512, EINVAL),
        (READ, 0, 100, 512, EINVAL),
        (READ, 0, 0, 100, EINVAL),
        (READ, 0, 0, 0, EINVAL),
        (READ, 0, 0, 33 << 20, EINVAL),
        (READ, 0, 0, u32::MAX, EINVAL),
        (READ, 0x80, 0, 512, EINVAL),
        (TRIM, 0, end - 512, 1024, ENOSPC),
        (TRIM, 0, 1, 512, EINVAL),
        (WRITE_ZEROES, 0, end, 512, ENOSPC),
        (WRITE_ZEROES, NO_HOLE, 0, 1, EINVAL),
        (FLUSH, 0, 4096, 4096, EINVAL),
        (5, 0, 0, 512, EINVAL),
        (7, 0, 0, 512, EINVAL),
        (4711, 0, 0, u32::MAX, EINVAL),
    ] {
        assert_eq!(client.ask(kind, flags, offset, length, &[]).expect("answered"), error, "{kind} {offset} {length}");
    }
    // A write's payload is there whether the write is good or not.
    for (offset, length, error) in [(end, 512, ENOSPC), (7, 512, EINVAL), (0, 700, EINVAL), (0, 33 << 20, EINVAL)] {
        let payload = vec![7; length as usize];
        assert_eq!(client.ask(WRITE, 0, offset, length, &payload).expect("answered"), error, "{offset} {length}");
    }
    assert_eq!(client.ask(WRITE, FUA, 512, 512, &[9; 512]).expect("answered"), 0);
    let sector = client.read(512, 512).expect("good");
    assert!(sector == [9; 512] && client.read(0, 512).expect("good") == [0; 512]);
    // What is no request ends this connection, and no other.
    let mut other = Client::connect(&server.socket);
    client.stream.write_all(&[0; 28]).expect("sent");
    assert_eq!(client.stream.read(&mut [0]).expect("the end"), 0);
    assert_eq!(other.read(512, 512).expect("good"), [9; 512]);
    other.send(DISCONNECT, 0, 0, 0, &[]).expect("sent");
    assert_eq!(other.stream.read(&mut [0]).expect("the end"), 0);
    // A handshake that makes no sense ends too.
    let mut babbler = UnixStream::connect(&server.socket).expect("connects");
    babbler.write_all(&[0xff; 64]).expect("sent");
    let mut heard = Vec::new();
    let _ = babbler.read_to_end(&mut heard);
    assert_eq!(server.stop(&mut keeper).code, 0);
}

#[test]
fn a_client_that_dies_takes_nothing_with_it() {
    let (_folder, mut keeper, volume, server) = served(&[]);
    let mut steady = Client::connect(&server.socket);
    for round in 0..20_u8 {
        let mut client = Client::connect(&server.socket);
        for i in 0..40_u64 {
            client.send(WRITE, 0, 4096 * i, 4096, &[round; 4096]).expect("sent");
            client.send(READ, 0, 4096 * i, 4096, &[]).expect("sent");
        }
        // The beginning of a write that never comes whole: none of it is written.
        client.send(WRITE, 0, MIB, 65536, &[0xee; 4096]).expect("sent");
        drop(client);
        assert_eq!(steady.write(8 * MIB + u64::from(round) * 512, &[round; 512]).expect("answered"), 0);
    }
    assert_eq!(steady.read(MIB, 65536).expect("good"), [0; 65536]);
    for round in 0..20_u8 {
        assert_eq!(steady.read(8 * MIB + u64::from(round) * 512, 512).expect("good"), [round; 512]);
    }
    drop(steady);
    let ended = server.stop(&mut keeper);
    assert_eq!(ended.code, 0, "{}", ended.error);
    assert_eq!(keeper.json(&["check", &volume])["good"], true);
}

#[test]
fn what_is_read_only_stays_as_it_is() {
    let (folder, mut keeper) = (Folder::new(), Keeper::new());
    let (from, volume) = (folder.write("from.img", &image(64, &[1, 9])), folder.name("a.vol"));
    keeper.good(&["import", &from, &volume]);
    let before = std::fs::read(&volume).expect("there");
    let server = Server::start(&mut keeper, &folder, &volume, "--nbd", &["--read-only"]);
    let mut client = Client::connect(&server.socket);
    assert_eq!(client.write(0, &[1; 512]).expect("answered"), EPERM);
    for kind in [TRIM, WRITE_ZEROES] {
        assert_eq!(client.ask(kind, 0, 0, 4096, &[]).expect("answered"), EPERM);
    }
    assert_eq!(client.flush().expect("answered"), 0);
    assert!(client.read(0, 64 * 4096).expect("good") == image(64, &[1, 9]));
    // Others may read it too.
    assert!(keeper.good(&["export", &volume, "-"]) == image(64, &[1, 9]));
    drop(client);
    let ended = server.stop(&mut keeper);
    assert!(ended.code == 0 && ended.anchors.is_empty(), "{ended:?}");
    assert!(std::fs::read(&volume).expect("there") == before);
}

#[test]
fn whatever_was_sent_before_sigterm_is_done_and_anchored() {
    let (_folder, mut keeper, volume, server) = served(&[]);
    let mut client = Client::connect(&server.socket);
    // All in flight at once when the server is told to end; the replies are read afterwards.
    let sent: u64 = 30;
    for i in 0..sent {
        client.send(WRITE, 0, i * 4096, 4096, &[i as u8 + 1; 4096]).expect("sent");
    }
    server.running.signal(rustix::process::Signal::TERM);
    let mut replies: Vec<_> = (0..sent).map(|_| client.reply().expect("a reply")).collect();
    replies.sort_unstable();
    assert!(replies.into_iter().eq((1..=sent).map(|cookie| (0, cookie))));
    assert!(client.reply().is_err(), "the server ends");
    let ended = server.end(&mut keeper);
    assert_eq!((ended.code, ended.error.lines().count()), (0, 1), "{}", ended.error);
    let exported = keeper.good(&["export", &volume, "-"]);
    for i in 0..sent as usize {
        assert!(exported[i * 4096..][..4096].iter().all(|b| *b == i as u8 + 1), "block {i}");
    }
}

#[test]
fn when_the_key_holder_leaves_the_server_ends() {
    let (folder, mut keeper, volume, server) = served(&[]);
    let mut client = Client::connect(&server.socket);
    assert_eq!(client.ask(WRITE, FUA, 4096, 4096, &[3; 4096]).expect("answered"), 0);
    server.running.holder_leaves();
    assert!(client.reply().is_err(), "the server ends");
    let ended = server.end(&mut keeper);
    assert!(ended.code == 4 && ended.error.contains("key holder"), "{ended:?}");
    assert_eq!(folder.names(), ["a.vol"]);
    let exported = keeper.good(&["export", &volume, "-"]);
    assert!(exported[4096..8192].iter().all(|b| *b == 3));
}

#[test]
fn a_store_that_loses_its_end_is_an_io_error() {
    let (_folder, mut keeper, volume, server) = served(&[]);
    let mut client = Client::connect(&server.socket);
    assert_eq!(client.write(0, &[1; 4096]).expect("answered"), 0);
    assert_eq!(client.write(MIB, &vec![2; 4 << 20]).expect("answered"), 0);
    assert_eq!(client.flush().expect("answered"), 0);
    let whole = std::fs::read(&volume).expect("there");
    let file = File::options().write(true).open(&volume).expect("opens");
    file.set_len(2 * MIB).expect("cut");
    assert_eq!(client.read(4 * MIB, 4096), Err(EIO));
    assert_eq!(client.read(32 * MIB, 512).expect("nothing is there to be lost"), [0; 512]);
    file.set_len(whole.len() as u64).expect("as before");
    file.write_all_at(&whole, 0).expect("as before");
    assert_eq!(client.read(MIB, 4 << 20).expect("good"), vec![2; 4 << 20]);
    drop(client);
    assert_eq!(server.stop(&mut keeper).code, 0);
    assert_eq!(keeper.json(&["check", &volume])["good"], true);
}

#[test]
fn a_path_in_use_is_refused_and_nothing_changes() {
    let (folder, mut keeper, volume, server) = served(&[]);
    let other = folder.name("b.vol");
    Keeper::new().good(&["create", &other, "--size", "1M"]);
    let mut second = keeper.clone();
    let words = ["serve", &other, "--nbd", server.socket.to_str().expect("text")];
    assert!(second.run(&words).failed(1).contains("a server that runs"));
    // The volume itself has one writer.
    let words = ["serve", &volume, "--nbd", &folder.name("other.sock")];
    assert!(second.run(&words).failed(1).contains("in use"));
    let words = ["serve", &volume, "--nbd", &other];
    assert!(second.run(&words).failed(1).contains("no socket"));
    assert_eq!(Client::connect(&server.socket).flush().expect("answered"), 0);
    assert_eq!(server.stop(&mut keeper).code, 0);
    let words = ["serve", &volume];
    assert!(keeper.run(&words).failed(2).contains("--nbd"));
    assert_eq!(folder.names(), ["a.vol", "b.vol"]);
}
