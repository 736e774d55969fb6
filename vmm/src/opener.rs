//! From names to descriptors, by a child process.
//!
//! Which files a VM needs stands in the sealed half of its file, so it is known only when the sandbox is closed and no path
//! can be opened any more. So a child is forked at the very beginning, before there are threads, keys or a KVM; it holds the
//! folder of the VM file and the `--map` paths, is confined to them by Landlock and to opening by its seccomp list, and
//! hands over descriptors until its socket closes. What a descriptor really is, a digest or a volume's identity proves.
//!
//! ```text
//! process -> child   1 byte access (0 read, 1 read a store, 2 write a store), then the name: one packet
//! child -> process   1 byte: 0 and a descriptor, or 1 and why not as text: one packet
//! ```

use crate::sandbox::{Filter, SandboxError, close_thread, descriptors, landlock, process};
use rustix::fs::{CWD, FileType, Mode, OFlags, ResolveFlags, fcntl_getfl, fcntl_setfl, fstat, open, openat2};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

/// The longest request or answer in bytes.
const PACKET: usize = 1024;

/// How a file is to be opened.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Access {
    /// To be read: a regular file.
    Read,
    /// To be read: a regular file or block device.
    ReadStore,
    /// To be read and written: a regular file or block device.
    WriteStore,
}

impl Access {
    /// Not blocking, so that a FIFO put there hangs nobody.
    fn flags(self) -> OFlags {
        let mode = if self == Self::WriteStore { OFlags::RDWR } else { OFlags::RDONLY };
        mode | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY
    }
}

/// `--map NAME=PATH`, parsed.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Mapping {
    /// The name that the configuration uses.
    pub name: policy::config::FileName,
    /// The file it means.
    pub path: PathBuf,
}

impl std::str::FromStr for Mapping {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (name, path) = text.split_once('=').ok_or("a mapping is NAME=PATH")?;
        let name = policy::config::FileName::try_from(name.to_owned()).map_err(|e| e.to_string())?;
        if path.is_empty() {
            return Err("a mapping is NAME=PATH".into());
        }
        Ok(Self { name, path: path.into() })
    }
}

/// Why a name gave no file.
#[derive(Debug, thiserror::Error)]
pub enum OpenerError {
    /// The child could not be made or confined.
    #[error(transparent)]
    Sandbox(#[from] SandboxError),
    /// The socket to the child failed.
    #[error("the process that opens files is gone")]
    Gone(#[source] std::io::Error),
    /// The folder can't be opened.
    #[error("cannot open the folder {path}")]
    Folder {
        /// Which.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: std::io::Error,
    },
    /// The child said why not.
    #[error("{0}")]
    Refused(String),
}

/// The process's end of the socket to its opener.
pub struct Opener {
    socket: OwnedFd,
    mapped: BTreeSet<String>,
}

impl Opener {
    /// Forks the child for names in `folder` and for `mappings`. The calling process must have one thread.
    pub fn start(folder: &Path, mappings: &[Mapping]) -> Result<Self, OpenerError> {
        let place = open(folder, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
            .map_err(|e| OpenerError::Folder { path: folder.into(), source: e.into() })?;
        let (ours, theirs) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
            .map_err(|e| OpenerError::Gone(e.into()))?;
        match process::fork()? {
            process::Forked::Parent => {
                Ok(Self { socket: ours, mapped: mappings.iter().map(|m| m.name.to_string()).collect() })
            }
            process::Forked::Child => {
                drop(ours);
                let mappings = mappings.iter().map(|m| (m.name.to_string(), m.path.clone())).collect();
                let child = Child { socket: theirs, folder: folder.into(), place, mappings };
                process::exit_now(i32::from(child.serve().is_err()))
            }
        }
    }

    /// The file called `name`.
    pub fn open(&self, name: &str, access: Access) -> Result<File, OpenerError> {
        let mut packet = vec![access as u8];
        packet.extend(name.as_bytes());
        descriptors::send(self.socket.as_fd(), &packet, None).map_err(OpenerError::Gone)?;
        let mut answer = [0; PACKET];
        let (length, descriptor) = descriptors::receive(self.socket.as_fd(), &mut answer).map_err(OpenerError::Gone)?;
        match (answer[..length].first(), descriptor) {
            (Some(0), Some(descriptor)) => Ok(File::from(descriptor)),
            (Some(1), None) => Err(OpenerError::Refused(String::from_utf8_lossy(&answer[1..length]).into_owned())),
            _ => Err(OpenerError::Gone(std::io::ErrorKind::UnexpectedEof.into())),
        }
    }
}

impl Opener {
    /// The file of a disk: what its name is mapped to, otherwise its file beside the VM file.
    pub fn open_disk(&self, disk: &policy::config::Disk, access: Access) -> Result<File, OpenerError> {
        if self.mapped.contains(disk.id.as_str()) {
            return self.open(disk.id.as_str(), access);
        }
        self.open(&disk.file_name(), access)
    }
}

struct Child {
    socket: OwnedFd,
    folder: PathBuf,
    place: OwnedFd,
    mappings: BTreeMap<String, PathBuf>,
}

impl Child {
    fn serve(self) -> Result<(), OpenerError> {
        process::end_with_parent()?;
        process::close_all_but(&[self.socket.as_fd(), self.place.as_fd()])?;
        process::harden()?;
        // Mapped files that don't exist yet, or can't be reached, are reported when they are asked for.
        let reached: Vec<OwnedFd> = self
            .mappings
            .values()
            .filter_map(|path| open(path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).ok())
            .collect();
        let mut places: Vec<BorrowedFd<'_>> = reached.iter().map(AsFd::as_fd).collect();
        places.push(self.place.as_fd());
        landlock::only_beneath(&places)?;
        drop(reached);
        close_thread(Filter::Opener)?;
        let mut packet = [0; PACKET];
        loop {
            let (length, _) = descriptors::receive(self.socket.as_fd(), &mut packet).map_err(OpenerError::Gone)?;
            if length == 0 {
                return Ok(());
            }
            let sent = match self.answer(&packet[..length]) {
                Ok(file) => descriptors::send(self.socket.as_fd(), &[0], Some(file.as_fd())),
                Err(reason) => {
                    let mut answer = vec![1];
                    answer.extend(reason.as_bytes().iter().take(PACKET - 1));
                    descriptors::send(self.socket.as_fd(), &answer, None)
                }
            };
            sent.map_err(OpenerError::Gone)?;
        }
    }

    fn answer(&self, packet: &[u8]) -> Result<OwnedFd, String> {
        let (access, name) = packet.split_first().ok_or("an empty request")?;
        let access = match access {
            0 => Access::Read,
            1 => Access::ReadStore,
            2 => Access::WriteStore,
            _ => return Err("a request of an unknown kind".into()),
        };
        let name = std::str::from_utf8(name).map_err(|_| "a name that is no text")?;
        let flags = access.flags();
        let (opened, path) = match self.mappings.get(name) {
            Some(path) => (openat2(CWD, path, flags, Mode::empty(), ResolveFlags::NO_MAGICLINKS), path.clone()),
            None => {
                let name = policy::config::FileName::try_from(name.to_owned()).map_err(|e| e.to_string())?;
                let only = ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS;
                (openat2(&self.place, name.as_str(), flags, Mode::empty(), only), self.folder.join(name.as_str()))
            }
        };
        let file =
            opened.map_err(|e| format!("cannot open {}: {}; say --map {name}=PATH", path.display(), words(e)))?;
        settle(file, access).map_err(|why| format!("{} {why}", path.display()))
    }
}

/// The file at `path` itself, for a process that needs no opener; or why not, in one line.
pub(crate) fn open_path(path: &Path, access: Access) -> Result<File, String> {
    let opened = open(path, access.flags(), Mode::empty());
    let file = opened.map_err(|e| format!("cannot open {}: {}", path.display(), std::io::Error::from(e)))?;
    settle(file, access).map(File::from).map_err(|why| format!("{} {why}", path.display()))
}

/// An open file, if it is what `access` says, as it is used from now on.
fn settle(file: OwnedFd, access: Access) -> Result<OwnedFd, String> {
    check_kind(&file, access)?;
    let changed = fcntl_getfl(&file).and_then(|flags| fcntl_setfl(&file, flags.difference(OFlags::NONBLOCK)));
    changed.map_err(|e| format!("can't be used: {e}"))?;
    Ok(file)
}

fn words(error: rustix::io::Errno) -> String {
    match error {
        rustix::io::Errno::ACCESS => "permission denied (or it leads out of its folder)".into(),
        rustix::io::Errno::XDEV => "it leads out of its folder".into(),
        other => std::io::Error::from(other).to_string(),
    }
}

/// Whether what is open is of the kind that `access` says.
pub(crate) fn check_kind(file: &OwnedFd, access: Access) -> Result<(), String> {
    let kind = FileType::from_raw_mode(fstat(file).map_err(|e| format!("can't be looked at: {e}"))?.st_mode);
    match (kind, access) {
        (FileType::RegularFile, _) | (FileType::BlockDevice, Access::ReadStore | Access::WriteStore) => Ok(()),
        (_, Access::Read) => Err("is no regular file".into()),
        _ => Err("is neither a regular file nor a block device".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn child(folder: &Path, mappings: &[(&str, &Path)]) -> Child {
        let place = open(folder, OFlags::PATH | OFlags::DIRECTORY, Mode::empty()).expect("folder");
        let (socket, _) =
            socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).expect("sockets");
        let mappings = mappings.iter().map(|(n, p)| ((*n).to_owned(), p.to_path_buf())).collect();
        Child { socket, folder: folder.into(), place, mappings }
    }

    fn packet(access: Access, name: &str) -> Vec<u8> {
        [&[access as u8], name.as_bytes()].concat()
    }

    #[test]
    fn names_stay_in_their_folder_and_mappings_go_where_they_say() {
        let inside = tempfile::tempdir().expect("folder");
        let outside = tempfile::tempdir().expect("folder");
        let other = outside.path().join("other");
        std::fs::write(inside.path().join("kernel"), b"k").expect("written");
        std::fs::write(&other, b"o").expect("written");
        std::os::unix::fs::symlink(&other, inside.path().join("link")).expect("link");
        let child = child(inside.path(), &[("mapped", &other)]);
        assert!(child.answer(&packet(Access::Read, "kernel")).is_ok());
        assert!(child.answer(&packet(Access::WriteStore, "mapped")).is_ok());
        for bad in ["../kernel", "missing", "link", "/etc/passwd", "", "."] {
            assert!(child.answer(&packet(Access::Read, bad)).is_err(), "{bad}");
        }
        assert!(child.answer(&[9, b'k']).is_err());
        assert!(child.answer(&[]).is_err());
    }

    #[test]
    fn what_is_no_file_is_refused_at_once() {
        let folder = tempfile::tempdir().expect("folder");
        std::fs::create_dir(folder.path().join("folder")).expect("made");
        rustix::fs::mknodat(CWD, folder.path().join("fifo"), FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).expect("fifo");
        let child = child(folder.path(), &[]);
        for bad in ["folder", "fifo"] {
            assert!(child.answer(&packet(Access::ReadStore, bad)).is_err(), "{bad}");
        }
    }
}
