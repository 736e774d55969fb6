//! `fealty-disk serve --anchor-mode`: how old a copy of the volume is let through in the place of the newest.

mod disk_support;

use disk_support::nbd::Client;
use disk_support::server::{LIMIT, Server};
use disk_support::{Folder, Keeper};
use policy::AnchorMode;
use rustix::process::Signal;
use std::time::Instant;

/// Serves a volume with `more`, flushes one sector after the other, and kills the server; returns what a copy of the volume from before
/// the last but one FLUSH is taken for. `settled` says when the server may be killed.
fn rolled_back(more: &[&str], settled: impl Fn(&Server, usize)) -> (Keeper, Folder, String) {
    let (folder, mut keeper) = (Folder::new(), Keeper::new());
    let volume = folder.name("a.vol");
    // As the key provider grants it to a session.
    keeper.mode = AnchorMode::Close;
    keeper.good(&["create", &volume, "--size", "8M"]);
    let server = Server::start(&mut keeper, &folder, &volume, "--nbd", more);
    let mut client = Client::connect(&server.socket);
    let mut old = Vec::new();
    for i in 0..4_u8 {
        let anchors = server.running.anchors();
        assert_eq!(client.write(u64::from(i) * 512, &[i + 1; 512]).expect("answered"), 0);
        assert_eq!(client.flush().expect("answered"), 0);
        settled(&server, anchors);
        if i == 1 {
            old = std::fs::read(&volume).expect("readable");
        }
    }
    server.running.signal(Signal::KILL);
    assert_eq!(server.end(&mut keeper).code, 128 + 9);
    std::fs::write(&volume, old).expect("put back");
    (keeper, folder, volume)
}

#[test]
fn in_mode_flush_no_acknowledged_flush_can_be_taken_back() {
    let anchored =
        |server: &Server, before: usize| assert_eq!(server.running.anchors(), before + 1, "each FLUSH waits");
    let (mut keeper, _folder, volume) = rolled_back(&["--anchor-mode", "flush"], anchored);
    assert!(keeper.run(&["check", &volume]).failed(3).contains("older than its anchor"));
}

#[test]
fn without_a_word_anchors_follow_within_seconds() {
    let follows = |server: &Server, before: usize| {
        let begun = Instant::now();
        while server.running.anchors() == before {
            assert!(begun.elapsed() < LIMIT, "no anchor came");
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
    };
    let (mut keeper, _folder, volume) = rolled_back(&[], follows);
    assert!(keeper.run(&["check", &volume]).failed(3).contains("older than its anchor"));
}

#[test]
fn in_mode_close_any_state_since_the_server_began_passes() {
    let silent = |server: &Server, _| assert_eq!(server.running.anchors(), 1, "the opener's alone");
    let (mut keeper, _folder, volume) = rolled_back(&["--anchor-mode", "close"], silent);
    let exported = keeper.good(&["export", &volume, "-"]);
    let sector = |i: u8| &exported[usize::from(i) * 512..][..512];
    assert!(sector(0) == [1; 512] && sector(1) == [2; 512] && sector(2) == [0; 512], "the older state");
}
