//! `fealty-disk serve` at work.

use super::{Ended, Folder, Keeper, Manner, Running};
use std::path::PathBuf;
use std::process::{Command, Output};
use std::time::{Duration, Instant};

/// Far beyond what anything takes on a quiet machine.
pub(crate) const LIMIT: Duration = Duration::from_secs(120);

/// A server, and the path of its socket.
pub(crate) struct Server {
    pub(crate) running: Running,
    pub(crate) socket: PathBuf,
}

impl Server {
    /// Serves `volume` in the way of `flag` (`--nbd`), and waits until it is ready.
    #[track_caller]
    pub(crate) fn start(keeper: &mut Keeper, folder: &Folder, volume: &str, flag: &str, more: &[&str]) -> Self {
        let socket = folder.path("sock");
        let name = folder.name("sock");
        let words = [&["serve", volume, flag, &name][..], more].concat();
        let mut running = keeper.start(&words, Manner::Good, "");
        let begun = Instant::now();
        while !super::listens(&socket) {
            if running.is_over() {
                panic!("it ended: {:?}", running.end());
            }
            assert!(begun.elapsed() < LIMIT, "no socket came");
            std::thread::sleep(Duration::from_millis(5));
        }
        Self { running, socket }
    }

    /// Asks it to end, and keeps the anchor that it leaves.
    pub(crate) fn stop(self, keeper: &mut Keeper) -> Ended {
        self.running.signal(rustix::process::Signal::TERM);
        self.end(keeper)
    }

    /// Waits for its end, and keeps the anchor that it leaves.
    pub(crate) fn end(self, keeper: &mut Keeper) -> Ended {
        let ended = self.running.end();
        if let Some(anchor) = ended.anchors.last() {
            keeper.anchor = Some(anchor.clone());
        }
        ended
    }

    /// Its URI, as libnbd and QEMU read it.
    pub(crate) fn uri(&self) -> String {
        format!("nbd+unix:///?socket={}", self.socket.display())
    }
}

/// Runs a program of the system, which must succeed.
#[track_caller]
pub(crate) fn system(program: &str, words: &[&str]) -> String {
    let Output { status, stdout, stderr } = Command::new(program)
        .args(words)
        .output()
        .unwrap_or_else(|e| panic!("{program} does not run ({e}): scripts/test installs what it needs"));
    let (out, err) = (String::from_utf8_lossy(&stdout), String::from_utf8_lossy(&stderr));
    assert!(status.success(), "{program} {words:?}: {status}\n{out}\n{err}");
    out.into_owned()
}
