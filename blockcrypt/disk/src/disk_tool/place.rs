//! Files that get their name when they are complete: nothing half-made ever stands under it.

use super::signals::Interrupts;
use blockcrypt::{FileStore, VolumeError};
use rustix::fs::{CWD, FlockOperation, RenameFlags, flock, renameat_with};
use rustix::io::Errno;
use std::ffi::OsString;
use std::fs::{self, File, Metadata, OpenOptions};
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// What follows the name of a file that is not complete.
const TEMPORARY: &str = "fealty-partial";
/// How often a file is made that others remove meanwhile, or that others' are removed for.
const LOOKS: u32 = 8;

/// Why a file can't be made, or can't get its name.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PlaceError {
    #[error("{0} exists; name another file, or replace it with --force")]
    Exists(PathBuf),
    #[error("{0} is a block device, whose content would be lost; say --force if it may be")]
    Device(PathBuf),
    #[error("{0} is neither a file nor a block device")]
    Kind(PathBuf),
    #[error("{0} can't be replaced")]
    InUse(PathBuf, #[source] VolumeError),
    #[error("{0} is being made by another process; wait for that one")]
    BeingMade(PathBuf),
    #[error("{0} names no file")]
    NoName(PathBuf),
    #[error("{0} is in the way, and was not left by a run of yours that was killed; remove it if nobody needs it")]
    InTheWay(PathBuf),
    #[error("{0} was taken away while it was being written; do it again")]
    TakenAway(PathBuf),
    #[error("{0} was left by a run that was cut short while it replaced a volume; move it back or away")]
    LeftOver(PathBuf),
    #[error("{path} can't be {what}")]
    Io {
        path: PathBuf,
        what: &'static str,
        #[source]
        source: io::Error,
    },
}

/// What is to be made.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Content {
    /// A volume: ciphertext, readable as the umask says.
    Volume,
    /// An image: plain text, readable by its owner.
    Image,
}

/// A file or device that is being written.
pub(crate) struct Place {
    path: PathBuf,
    file: File,
    draft: Option<Draft>,
    interrupts: Interrupts,
}

struct Draft {
    temporary: Temporary,
    replaces: bool,
}

/// A file that has no name of its own yet.
#[derive(Clone)]
pub(crate) struct Temporary {
    path: PathBuf,
    dev: u64,
    ino: u64,
}

impl Place {
    /// Begins at `path`: a temporary file beside it, or the block device itself. What exists is replaced only with `force`, and
    /// only when the new file is complete.
    pub(crate) fn begin(
        path: &Path,
        content: Content,
        force: bool,
        interrupts: &Interrupts,
    ) -> Result<Self, PlaceError> {
        let interrupts = interrupts.clone();
        let path = &match existing(path)? {
            None => return Self::draft(path, content, false, interrupts),
            Some(_) if !force && is_device(path) => return Err(PlaceError::Device(path.to_owned())),
            Some(_) if !force => return Err(PlaceError::Exists(path.to_owned())),
            // What a link points to is replaced, not the link.
            Some(_) => fs::canonicalize(path).map_err(failed(path, "found"))?,
        };
        let metadata = fs::metadata(path).map_err(failed(path, "looked at"))?;
        if metadata.file_type().is_block_device() {
            // O_EXCL: not one that is mounted or otherwise in use.
            let opened = OpenOptions::new().read(true).write(true).custom_flags(libc::O_EXCL).open(path);
            let file = opened.map_err(failed(path, "opened for writing"))?;
            return Ok(Self { path: path.clone(), file, draft: None, interrupts });
        }
        if !metadata.is_file() {
            return Err(PlaceError::Kind(path.clone()));
        }
        if content == Content::Volume {
            let file =
                OpenOptions::new().read(true).write(true).open(path).map_err(failed(path, "opened for writing"))?;
            FileStore::exclusive(file).map_err(|e| PlaceError::InUse(path.clone(), e))?;
        }
        Self::draft(path, content, true, interrupts)
    }

    fn draft(path: &Path, content: Content, replaces: bool, interrupts: Interrupts) -> Result<Self, PlaceError> {
        let temporary = beside(path, TEMPORARY)?;
        let mode = if content == Content::Image { 0o600 } else { 0o666 };
        let (file, temporary) = interrupts.drafting(|| Temporary::make(path, temporary, mode))?;
        Ok(Self { path: path.to_owned(), file, draft: Some(Draft { temporary, replaces }), interrupts })
    }

    /// The file, to be written.
    pub(crate) fn file(&self) -> &File {
        &self.file
    }

    /// Where the file lies while it has no name of its own.
    pub(crate) fn draft_path(&self) -> &Path {
        self.draft.as_ref().map_or(&self.path, |draft| &draft.temporary.path)
    }

    /// The file, once more.
    pub(crate) fn another(&self) -> Result<File, PlaceError> {
        self.file.try_clone().map_err(failed(&self.path, "opened"))
    }

    /// Whether it is a device, which is written in place and holds what it held before.
    pub(crate) fn is_device(&self) -> bool {
        self.draft.is_none()
    }

    /// What is to be written begins now.
    pub(crate) fn overwrite(&self) {
        if self.is_device() {
            self.interrupts.overwriting(&self.path);
        }
    }

    /// Makes the file durable and gives it its name, in the place of what stood there before.
    pub(crate) fn finish(mut self) -> Result<(), PlaceError> {
        self.complete()?;
        self.interrupts.committing();
        match self.draft.take() {
            Some(draft) if draft.replaces => {
                fs::rename(&draft.temporary.path, &self.path).map_err(|e| self.lost(&draft, "replaced", e))?;
            }
            Some(draft) => self.name(&draft)?,
            None => {}
        }
        sync_folder(&self.path)?;
        self.interrupts.done();
        Ok(())
    }

    /// Makes the file durable and gives it its name, in a way that can be taken back.
    pub(crate) fn publish(mut self) -> Result<Published, PlaceError> {
        self.complete()?;
        let Some(draft) = &self.draft else {
            self.interrupts.committing();
            return Ok(Published { place: self, named: false, moved: None });
        };
        let moved = if draft.replaces { Some(beside(&self.path, "replaced")?) } else { None };
        self.interrupts.committing();
        if let Some(aside) = &moved {
            rename_to_free(&self.path, aside).map_err(|e| match e.kind() {
                io::ErrorKind::AlreadyExists => PlaceError::LeftOver(aside.clone()),
                _ => failed(&self.path, "moved aside")(e),
            })?;
        }
        let draft = self.draft.take();
        let named = draft.map_or(Ok(()), |draft| self.name(&draft)).and_then(|()| sync_folder(&self.path));
        let published = Published { place: self, named: named.is_ok(), moved };
        match named {
            Ok(()) => Ok(published),
            Err(error) => {
                published.retract();
                Err(error)
            }
        }
    }

    fn name(&self, draft: &Draft) -> Result<(), PlaceError> {
        rename_to_free(&draft.temporary.path, &self.path).map_err(|e| match e.kind() {
            io::ErrorKind::AlreadyExists => {
                let _ = draft.temporary.remove();
                PlaceError::Exists(self.path.clone())
            }
            _ => self.lost(draft, "given its name", e),
        })
    }

    fn lost(&self, draft: &Draft, what: &'static str, error: io::Error) -> PlaceError {
        let _ = draft.temporary.remove();
        failed(&self.path, what)(error)
    }

    /// Makes the file durable; it is still the one that gets the name.
    fn complete(&self) -> Result<(), PlaceError> {
        self.file.sync_all().map_err(failed(&self.path, "made durable"))?;
        match &self.draft {
            Some(Draft { temporary, .. }) if !temporary.is_there() => {
                Err(PlaceError::TakenAway(temporary.path.clone()))
            }
            _ => Ok(()),
        }
    }
}

impl Drop for Place {
    /// Without a name the file goes.
    fn drop(&mut self) {
        if let Some(draft) = self.draft.take() {
            let _ = draft.temporary.remove();
            self.interrupts.abandoned();
        }
    }
}

impl Temporary {
    /// A new file at `temporary`, which is to be `path`; locked, so that a second run sees that it is being made. What a killed run left
    /// there is removed.
    fn make(path: &Path, temporary: PathBuf, mode: u32) -> Result<(File, Self), PlaceError> {
        let mut new = OpenOptions::new();
        new.read(true).write(true).create_new(true).mode(mode);
        for _ in 0..LOOKS {
            match new.open(&temporary) {
                Ok(file) => {
                    let known = file.metadata().map_err(failed(&temporary, "looked at"))?;
                    let made = Self { path: temporary.clone(), dev: known.dev(), ino: known.ino() };
                    // Before it is locked, another run may take it for one that was left.
                    if lock(&file, path).inspect_err(|_| _ = made.remove())? && made.is_there() {
                        return Ok((file, made));
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => remove_left_over(path, &temporary)?,
                Err(error) => return Err(failed(path, "made")(error)),
            }
        }
        Err(PlaceError::BeingMade(path.to_owned()))
    }

    /// Removes it, and nothing that somebody put there instead.
    pub(crate) fn remove(&self) -> io::Result<()> {
        if self.is_there() { fs::remove_file(&self.path) } else { Ok(()) }
    }

    /// Where it lies.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    fn is_there(&self) -> bool {
        fs::symlink_metadata(&self.path).is_ok_and(|m| (m.dev(), m.ino()) == (self.dev, self.ino))
    }
}

/// A file that has its name, and may still lose it.
pub(crate) struct Published {
    place: Place,
    named: bool,
    /// Where that lies which it replaced.
    moved: Option<PathBuf>,
}

impl Published {
    /// It stays.
    pub(crate) fn settle(self) {
        if let Some(aside) = &self.moved {
            let _ = fs::remove_file(aside);
        }
        self.place.interrupts.done();
    }

    /// Takes its name back: what stood there before stands there again.
    pub(crate) fn retract(self) {
        if self.named && is_at(&self.place.file, &self.place.path) {
            let _ = fs::remove_file(&self.place.path);
        }
        if let Some(aside) = &self.moved {
            let _ = rename_to_free(aside, &self.place.path);
        }
        let _ = sync_folder(&self.place.path);
        self.place.interrupts.abandoned();
    }
}

/// Whether making `path` would take `one` away: they are one file, or it lies where a killed run would have left its own.
pub(crate) fn same_file(one: &impl std::os::fd::AsFd, path: &Path) -> bool {
    let Ok(one) = rustix::fs::fstat(one) else { return false };
    let is_one = |path: &Path| fs::metadata(path).is_ok_and(|m| (m.dev(), m.ino()) == (one.st_dev, one.st_ino));
    is_one(path) || beside(path, TEMPORARY).is_ok_and(|temporary| is_one(&temporary))
}

fn existing(path: &Path) -> Result<Option<Metadata>, PlaceError> {
    match fs::symlink_metadata(path) {
        Ok(metadata) => Ok(Some(metadata)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(failed(path, "looked at")(error)),
    }
}

/// Whether `path` is a block device.
pub(crate) fn is_device(path: &Path) -> bool {
    fs::metadata(path).is_ok_and(|m| m.file_type().is_block_device())
}

/// `.NAME.suffix` beside `path`.
fn beside(path: &Path, suffix: &str) -> Result<PathBuf, PlaceError> {
    let mut name = OsString::from(".");
    name.push(path.file_name().ok_or_else(|| PlaceError::NoName(path.to_owned()))?);
    name.push(format!(".{suffix}"));
    Ok(folder(path).join(name))
}

fn folder(path: &Path) -> &Path {
    path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// Removes what a killed run left: a file of ours with one name that nobody has locked. Anything else is somebody's, and stays.
fn remove_left_over(path: &Path, temporary: &Path) -> Result<(), PlaceError> {
    let mut old = OpenOptions::new();
    old.read(true).custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK);
    let in_the_way = || PlaceError::InTheWay(temporary.to_owned());
    let old = match old.open(temporary) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        other => other.map_err(|_| in_the_way())?,
    };
    let known = old.metadata().map_err(failed(temporary, "looked at"))?;
    if !known.is_file() || known.nlink() > 1 || known.uid() != rustix::process::geteuid().as_raw() {
        return Err(in_the_way());
    }
    if !lock(&old, path)? {
        return Err(PlaceError::BeingMade(path.to_owned()));
    }
    if is_at(&old, temporary) {
        fs::remove_file(temporary).map_err(failed(temporary, "removed; move it away"))?;
    }
    Ok(())
}

/// Locks `file` for as long as any copy of it is open; `false` if another process has.
fn lock(file: &File, path: &Path) -> Result<bool, PlaceError> {
    match flock(file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(true),
        Err(Errno::WOULDBLOCK) => Ok(false),
        Err(error) => Err(failed(path, "locked")(error.into())),
    }
}

fn is_at(file: &File, path: &Path) -> bool {
    let (Ok(one), Ok(other)) = (file.metadata(), fs::symlink_metadata(path)) else { return false };
    (one.dev(), one.ino()) == (other.dev(), other.ino())
}

/// Renames, but never over something; by a second link where the file system knows no better way.
fn rename_to_free(from: &Path, to: &Path) -> io::Result<()> {
    match renameat_with(CWD, from, CWD, to, RenameFlags::NOREPLACE) {
        Err(Errno::INVAL | Errno::NOSYS | Errno::NOTSUP) => {
            fs::hard_link(from, to)?;
            fs::remove_file(from)
        }
        other => Ok(other?),
    }
}

fn sync_folder(path: &Path) -> Result<(), PlaceError> {
    match File::open(folder(path)).and_then(|folder| folder.sync_all()) {
        // Some file systems know no such thing.
        Err(error) if error.kind() == io::ErrorKind::InvalidInput => Ok(()),
        other => other.map_err(failed(path, "made durable in its folder")),
    }
}

fn failed(path: &Path, what: &'static str) -> impl FnOnce(io::Error) -> PlaceError {
    let path = path.to_owned();
    move |source| PlaceError::Io { path, what, source }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::os::unix::fs::PermissionsExt;

    fn begin(path: &Path, force: bool) -> Result<Place, PlaceError> {
        Place::begin(path, Content::Volume, force, &Interrupts::default())
    }

    fn written(path: &Path, force: bool) -> Place {
        let place = begin(path, force).expect("begins");
        place.file().write_all(b"new").expect("written");
        place
    }

    fn names(folder: &Path) -> Vec<String> {
        let mut names: Vec<_> = fs::read_dir(folder)
            .expect("a folder")
            .map(|entry| entry.expect("an entry").file_name().to_string_lossy().into_owned())
            .collect();
        names.sort();
        names
    }

    #[test]
    fn a_file_has_no_name_before_it_is_complete() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("v");
        let place = written(&path, false);
        assert_eq!(names(folder.path()), [".v.fealty-partial"]);
        place.finish().expect("named");
        assert_eq!(names(folder.path()), ["v"]);
        drop(written(&folder.path().join("w"), false));
        assert_eq!(names(folder.path()), ["v"]);
    }

    #[test]
    fn nothing_is_replaced_without_force_not_even_at_the_last_moment() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("v");
        let (one, two) = (written(&path, false), folder.path().join("other"));
        fs::write(&path, "old").expect("written");
        assert!(matches!(begin(&path, false), Err(PlaceError::Exists(_))));
        assert!(matches!(one.finish(), Err(PlaceError::Exists(_))));
        let three = written(&two, false);
        fs::write(&two, "old").expect("written");
        assert!(matches!(three.publish(), Err(PlaceError::Exists(_))));
        assert_eq!(names(folder.path()), ["other", "v"]);
        assert_eq!((fs::read(&path).expect("old"), fs::read(&two).expect("old")), (b"old".to_vec(), b"old".to_vec()));
    }

    #[test]
    fn what_was_published_can_be_taken_back() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("v");
        written(&path, false).publish().expect("published").retract();
        assert_eq!(names(folder.path()), Vec::<String>::new());

        fs::write(&path, "old").expect("written");
        let published = written(&path, true).publish().expect("published");
        assert_eq!(fs::read(&path).expect("there"), b"new");
        published.retract();
        assert_eq!((names(folder.path()), fs::read(&path).expect("there")), (vec!["v".to_owned()], b"old".to_vec()));

        written(&path, true).publish().expect("published").settle();
        assert_eq!((names(folder.path()), fs::read(&path).expect("there")), (vec!["v".to_owned()], b"new".to_vec()));
    }

    #[test]
    fn a_volume_that_is_in_use_is_not_replaced() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("v");
        let user = File::create(&path).expect("made");
        flock(&user, FlockOperation::LockShared).expect("locked");
        assert!(matches!(begin(&path, true), Err(PlaceError::InUse(_, VolumeError::Busy))));
        drop(user);
        written(&path, true).finish().expect("free now");
    }

    #[test]
    fn two_runs_do_not_mix_and_a_killed_one_does_not_block() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("v");
        let first = begin(&path, false).expect("begins");
        assert!(matches!(begin(&path, false), Err(PlaceError::BeingMade(_))));
        drop(first);
        fs::write(folder.path().join(".v.fealty-partial"), "left over").expect("written");
        let second = begin(&path, false).expect("begins");
        assert_eq!(second.file().metadata().expect("known").len(), 0);
    }

    #[test]
    fn a_link_in_the_way_is_not_followed() {
        let folder = tempfile::tempdir().expect("a folder");
        let (path, victim) = (folder.path().join("v"), folder.path().join("victim"));
        fs::write(&victim, "precious").expect("written");
        let temporary = folder.path().join(".v.fealty-partial");
        std::os::unix::fs::symlink(&victim, &temporary).expect("linked");
        assert!(matches!(begin(&path, false), Err(PlaceError::InTheWay(_))));
        fs::remove_file(&temporary).expect("removed");
        fs::hard_link(&victim, &temporary).expect("linked");
        assert!(matches!(begin(&path, false), Err(PlaceError::InTheWay(_))));
        fs::remove_file(&temporary).expect("removed");
        written(&path, false).finish().expect("named");
        assert_eq!(fs::read(&victim).expect("there"), b"precious");
    }

    #[test]
    fn what_somebody_puts_in_its_place_is_neither_removed_nor_named() {
        let folder = tempfile::tempdir().expect("a folder");
        let (path, temporary) = (folder.path().join("v"), folder.path().join(".v.fealty-partial"));
        let begun = || {
            let place = written(&path, true);
            fs::rename(&temporary, folder.path().join("aside")).expect("moved");
            fs::write(&temporary, "another's").expect("written");
            place
        };
        let check = |old: &[&str]| {
            assert_eq!(names(folder.path()), [&[".v.fealty-partial", "aside"], old].concat());
            assert_eq!(fs::read(&temporary).expect("there"), b"another's");
            fs::remove_file(&temporary).expect("removed");
        };
        for old in [&[][..], &["v"]] {
            old.iter().for_each(|_| fs::write(&path, "old").expect("written"));
            drop(begun());
            check(old);
            assert!(matches!(begun().finish(), Err(PlaceError::TakenAway(_))));
            check(old);
            assert!(begun().publish().is_err_and(|e| matches!(e, PlaceError::TakenAway(_))));
            check(old);
        }
        assert_eq!(fs::read(&path).expect("there"), b"old");

        // Nor what stands under its name when that is taken back.
        let published = written(&folder.path().join("w"), false).publish().expect("published");
        fs::rename(folder.path().join("w"), folder.path().join("aside")).expect("moved");
        fs::write(folder.path().join("w"), "another's").expect("written");
        published.retract();
        assert_eq!(fs::read(folder.path().join("w")).expect("there"), b"another's");
    }

    #[test]
    fn an_image_is_for_its_owner_alone() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("i");
        Place::begin(&path, Content::Image, false, &Interrupts::default()).expect("begins").finish().expect("named");
        assert_eq!(fs::metadata(&path).expect("there").permissions().mode() & 0o777, 0o600);
    }

    #[test]
    fn what_is_no_file_is_not_replaced() {
        let folder = tempfile::tempdir().expect("a folder");
        assert!(matches!(begin(folder.path(), false), Err(PlaceError::Exists(_))));
        assert!(matches!(begin(folder.path(), true), Err(PlaceError::Kind(_))));
        assert!(matches!(begin(Path::new("/dev/null"), true), Err(PlaceError::Kind(_))));
        assert!(begin(&folder.path().join("none/v"), false).is_err());
        assert!(matches!(begin(Path::new(".."), true), Err(PlaceError::Kind(_))));
    }
}
