//! `fealty-disk` where the system gives little: one line, a promised exit code, and nothing half-made.

mod disk_support;

use disk_support::{Device, Folder, Keeper, Manner, image};
use std::fs::{File, Permissions, read, set_permissions};
use std::os::unix::fs::{FileExt, PermissionsExt};

/// A user of whom nobody else has a process.
const USER: u32 = 54_321;

/// A piece of shell that runs the tool, which stands in `folder`, as a user who may have so many threads in all.
fn with_threads(folder: &Folder, threads: usize) -> String {
    let who = format!("setpriv --reuid {USER} --regid {USER} --clear-groups prlimit --nproc={threads}");
    format!("cd {}; exec {who} ./fealty-disk \"$@\" --keys-fd 7", folder.name(""))
}

#[test]
fn too_few_threads_are_one_line_and_no_panic() {
    if !rustix::process::geteuid().is_root() {
        eprintln!("NOT TESTED: only root can become a user who has no threads yet");
        return;
    }
    let folder = Folder::new();
    set_permissions(folder.path(""), Permissions::from_mode(0o777)).expect("set");
    std::fs::copy(env!("CARGO_BIN_EXE_fealty-disk"), folder.path("fealty-disk")).expect("copied");
    let content = image(512, &(0..512).collect::<Vec<_>>());
    let from = folder.write("from.img", &content);
    let mut keeper = Keeper::new();
    keeper.good(&["import", &from, &folder.name("a.vol")]);
    set_permissions(folder.path("a.vol"), Permissions::from_mode(0o666)).expect("set");
    let before = folder.names();
    let mut good = 0;
    for (words, made) in [
        (&["check", "a.vol"][..], ""),
        (&["export", "a.vol", "to.img"], "to.img"),
        (&["export", "--format", "qcow2", "a.vol", "to.qcow2"], "to.qcow2"),
        (&["snapshot", "list", "a.vol"], ""),
        (&["resize", "a.vol", "--size", "2M"], ""),
    ] {
        for threads in 1..12 {
            let ended = keeper.run_with(words, Manner::Good, &with_threads(&folder, threads));
            if ended.code == 0 {
                good += 1;
                let _ = std::fs::remove_file(folder.path(made));
            } else {
                ended.failed(1);
            }
            assert_eq!(folder.names(), before, "{words:?} with {threads} threads");
        }
    }
    assert!(good > 10, "{good}");
    assert!(keeper.good(&["export", &folder.name("a.vol"), "-"]) == content);
    // Enough for its volume, and not for 32 requests at a time. It has measured the ciphers by then.
    let words = ["bench", ".", "--size", "16M", "--rounds", "1"];
    let ended = keeper.run_with(&words, Manner::Good, &with_threads(&folder, 8));
    assert!(ended.error.contains("no thread for the benchmark"), "{ended:?}");
    assert_eq!(ended.code, 1);
}

/// What a device held is gone, however it ends.
#[test]
fn a_device_that_was_overwritten_is_named() {
    let Some(device) = Device::new(16 << 20) else { return };
    let folder = Folder::new();
    let content = image(2048, &(0..2048).collect::<Vec<_>>());
    let (from, volume) = (folder.write("from.img", &content), folder.name("a.vol"));
    let mut keeper = Keeper::new();
    keeper.good(&["import", &from, &volume]);
    keeper.good(&["export", &volume, device.name(), "--force"]);
    let file = File::options().read(true).write(true).open(&volume).expect("there");
    // Somewhere in its data.
    let at = read(&volume).expect("there").len() as u64 / 2;
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).expect("read");
    file.write_all_at(&[byte[0] ^ 1], at).expect("written");
    let ended = keeper.run(&["export", &volume, device.name(), "--force"]);
    let said = ended.failed(3);
    assert!(said.contains(&format!("{} was overwritten in part", device.name())), "{said}");
    assert!(said.contains("integrity"), "{said}");
    let ended = keeper.run_with(&["export", &volume, device.name(), "--force", "--salvage"], Manner::Deaf, "");
    assert!(ended.error.contains("was overwritten in part"), "{ended:?}");
    // Before anything is written, it is as it was.
    let small = Device::new(1 << 20).expect("another");
    let ended = keeper.run(&["export", &volume, small.name(), "--force"]);
    assert!(!ended.failed(1).contains("overwritten"), "{ended:?}");
}
