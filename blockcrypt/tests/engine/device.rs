//! A volume on a block device: a loop device that this test makes. Who may make none says so; root must be able to.

use crate::common::{MIB, Provider, Random, check_good};
use fealty_blockcrypt::{FileStore, Volume, VolumeError};
use policy::AnchorMode;
use std::fs::File;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::process::Command;

/// A loop device over a file that goes with it.
struct Device {
    path: PathBuf,
    _file: tempfile::NamedTempFile,
}

impl Device {
    /// One of `bytes`; none where the kernel has no loop devices, or keeps them for root.
    fn new(bytes: u64) -> Option<Self> {
        let control = Path::new("/dev/loop-control");
        if let Err(error) = File::options().read(true).write(true).open(control) {
            let excused = match error.kind() {
                ErrorKind::NotFound => true,
                ErrorKind::PermissionDenied => !rustix::process::geteuid().is_root(),
                _ => false,
            };
            assert!(excused, "{}: {error}", control.display());
            eprintln!("NOT TESTED: no block device to be had: {}: {error}", control.display());
            return None;
        }
        let file = tempfile::NamedTempFile::new_in(".").expect("a file");
        file.as_file().set_len(bytes).expect("room");
        let made = Command::new("losetup").args(["--find", "--show"]).arg(file.path()).output().expect("losetup runs");
        assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
        let path = PathBuf::from(String::from_utf8_lossy(&made.stdout).trim());
        Some(Self { path, _file: file })
    }

    fn open(&self) -> File {
        File::options().read(true).write(true).open(&self.path).expect("the device opens")
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        let _ = Command::new("losetup").arg("--detach").arg(&self.path).status();
    }
}

fn content(lba: u64, round: u64) -> Vec<u8> {
    let mut block = vec![0; 4096];
    Random(lba << 8 | round).fill(&mut block);
    block
}

#[track_caller]
fn check(volume: &Volume, blocks: u64, holds: impl Fn(u64) -> Vec<u8>) {
    for lba in 0..blocks {
        let mut found = vec![0; 4096];
        volume.read(lba * 4096, &mut found).expect("read");
        assert!(found == holds(lba), "block {lba}");
    }
    check_good(volume);
}

#[test]
fn a_volume_on_a_block_device_through_the_page_cache_and_past_it() {
    let Some(device) = Device::new(24 * MIB) else { return };
    const BLOCKS: u64 = 2048;
    let store = |direct: bool| {
        let store = FileStore::exclusive(device.open()).expect("free");
        if direct { store.direct().expect("a loop device takes O_DIRECT") } else { store }
    };
    for direct in [false, true] {
        let provider = Provider::new(AnchorMode::Flush);
        let volume = provider.create(store(direct), BLOCKS * 4096).expect("a volume");
        assert!(matches!(FileStore::exclusive(device.open()), Err(VolumeError::Busy)), "one writer");
        for lba in 0..BLOCKS {
            volume.write(lba * 4096, &content(lba, 1)).expect("written");
        }
        volume.close().expect("closed");
        drop(volume);
        // What one way wrote the other reads; and what was not closed is recovered.
        let volume = provider.open(store(!direct)).expect("opens");
        check(&volume, BLOCKS, |lba| content(lba, 1));
        for lba in (0..BLOCKS).step_by(5) {
            volume.write(lba * 4096, &content(lba, 2)).expect("written");
        }
        volume.discard(4096, 3 * 4096).expect("discarded");
        volume.flush().expect("flushed");
        volume.write(7 * 4096, &content(7, 2)).expect("written");
        volume.flush().expect("flushed");
        drop(volume);
        let volume = provider.open(store(direct)).expect("opens");
        check(&volume, BLOCKS, |lba| match lba {
            1..4 => vec![0; 4096],
            lba if lba % 5 == 0 || lba == 7 => content(lba, 2),
            lba => content(lba, 1),
        });
        // A device is as long as it is.
        let refused = volume.grow(64 * MIB);
        assert!(matches!(refused, Err(VolumeError::TooShort { .. })), "{refused:?}");
        volume.grow(10 * MIB).expect("there is room for that");
        volume.write(9 * MIB, &[9; 4096]).expect("written");
        volume.close().expect("closed");
        drop(volume);
        let mut found = [0; 4096];
        provider.open(store(!direct)).expect("opens").read(9 * MIB, &mut found).expect("read");
        assert!(found == [9; 4096]);
    }
    let refused = Provider::new(AnchorMode::Close).create(store(false), 64 * MIB).err();
    assert!(matches!(refused, Some(VolumeError::TooShort { .. })), "{refused:?}");
}
