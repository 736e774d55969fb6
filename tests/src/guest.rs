//! The small guest (`tests/guest`), built.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

/// Where its images are.
#[derive(Debug)]
pub struct Images {
    /// ELF, with the 64-bit Linux entry and a PVH note.
    pub elf: PathBuf,
    /// The same as a bzImage.
    pub bzimage: PathBuf,
    /// The least program that boots the ELF image on KVM: `bare [--pvh | --linux32] IMAGE COMMAND-LINE`.
    pub bare: PathBuf,
}

/// Builds the guest where that is still to do, as `scripts/guest` does; the first call in a process waits for it.
///
/// # Panics
/// Where it can't be built.
pub fn images() -> &'static Images {
    static IMAGES: OnceLock<Images> = OnceLock::new();
    IMAGES.get_or_init(build)
}

fn build() -> Images {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../scripts/guest");
    let built = Command::new(&script).output().unwrap_or_else(|e| panic!("{}: {e}", script.display()));
    assert!(built.status.success(), "the guest can't be built:\n{}", String::from_utf8_lossy(&built.stderr));
    let printed = String::from_utf8_lossy(&built.stdout).into_owned();
    let mut paths = printed.lines().map(PathBuf::from);
    let mut next = || paths.next().expect("scripts/guest prints three paths");
    Images { elf: next(), bzimage: next(), bare: next() }
}
