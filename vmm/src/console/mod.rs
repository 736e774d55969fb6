//! The guest's serial line on this side: the terminal or a file, and the keys that speak to the VM process itself.

pub mod escape;
pub mod terminal;

use crate::exit::{Exit, Failure};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{Mode, OFlags, open};
use rustix::io::Errno;
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::stdio::stdin;
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;

/// Where the guest's serial line goes.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Target {
    /// Standard input and output.
    Stdio,
    /// Nowhere.
    Null,
    /// Into a file that is made or appended to.
    File(PathBuf),
}

impl std::str::FromStr for Target {
    type Err = &'static str;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text.split_once(':') {
            None if text == "stdio" => Ok(Self::Stdio),
            None if text == "null" => Ok(Self::Null),
            Some(("file", path)) if !path.is_empty() => Ok(Self::File(path.into())),
            _ => Err("a console is stdio, null or file:PATH"),
        }
    }
}

/// A console, open: what the guest reads and writes, and the end that this process types into.
pub struct Console {
    /// What the guest prints goes here.
    pub output: Box<dyn Write + Send>,
    /// What the guest reads comes from here; never blocks.
    pub input: OwnedFd,
    /// What this process types into.
    pub keyboard: Keyboard,
}

/// From whom typing comes, and where it goes.
pub struct Keyboard {
    /// Standard input, where it is typed on. Reading it never blocks, as far as the kernel opens it anew.
    pub typed: Option<OwnedFd>,
    /// What is written here the guest reads; never blocks.
    pub guest: File,
}

impl Console {
    /// Opens `target`. Standard streams that the console does not use stay as they are.
    pub fn open(target: &Target) -> Result<Self, Failure> {
        let output: Box<dyn Write + Send> = match target {
            Target::Stdio => Box::new(Unbuffered::default()),
            Target::Null => Box::new(std::io::sink()),
            Target::File(path) => Box::new(open_file(path)?),
        };
        let (input, keyboard) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK)
            .map_err(|e| Failure::new(Exit::Host, format!("cannot make a pipe for the console: {e}")))?;
        let typed = if *target == Target::Stdio { anew(stdin()) } else { None };
        Ok(Self { output, input, keyboard: Keyboard { typed, guest: keyboard.into() } })
    }
}

/// `fd`, a terminal or pipe, opened anew so that a read gives what there is and never blocks. Others have the description that this
/// process was given: they may take what it was told of, and would change its flags with it. What can't be opened anew (a socket, a
/// terminal of somebody else) is read as it is.
fn anew(fd: BorrowedFd<'_>) -> Option<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    let path = format!("/proc/self/fd/{}", fd.as_raw_fd());
    open(path, flags, Mode::empty()).or_else(|_| fd.try_clone_to_owned().map_err(|_| Errno::BADF)).ok()
}

fn open_file(path: &std::path::Path) -> Result<File, Failure> {
    OpenOptions::new()
        .create(true)
        .append(true)
        .open(path)
        .map_err(|e| Failure::new(Exit::Host, format!("cannot open {} for the console: {e}", path.display())))
}

/// How long a vCPU waits for whoever reads the console and does not: a VM whose reader sleeps can still be paused.
const PATIENCE: Timespec = Timespec { tv_sec: 2, tv_nsec: 0 };

/// Standard output without a buffer of its own: the guest's first byte is seen when it is written. What nobody reads for
/// long is lost.
#[derive(Default)]
struct Unbuffered {
    stuck: bool,
}

impl Write for Unbuffered {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let mut fds = [PollFd::from_borrowed_fd(rustix::stdio::stdout(), PollFlags::OUT)];
        let patience = if self.stuck { Timespec::default() } else { PATIENCE };
        self.stuck = poll(&mut fds, Some(&patience)) == Ok(0);
        if self.stuck {
            return Err(std::io::ErrorKind::WouldBlock.into());
        }
        Ok(rustix::io::write(rustix::stdio::stdout(), bytes)?)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    #[test]
    fn what_somebody_else_took_first_does_not_block() {
        let (given, mut writer) = std::io::pipe().expect("a pipe");
        let typed = anew(given.as_fd()).expect("opened anew");
        let mut bytes = [0; 8];
        // Announced, and gone before it is read.
        writer.write_all(b"x").expect("written");
        assert_eq!(rustix::io::read(&given, &mut bytes), Ok(1));
        assert_eq!(rustix::io::read(&typed, &mut bytes), Err(Errno::AGAIN));
        writer.write_all(b"yz").expect("written");
        assert_eq!(rustix::io::read(&typed, &mut bytes), Ok(2));
        let flags = rustix::fs::fcntl_getfl(&given).expect("flags");
        assert!(!flags.contains(OFlags::NONBLOCK), "the others' description stays as it is");
        drop(writer);
        assert_eq!(rustix::io::read(&typed, &mut bytes), Ok(0));
    }

    #[test]
    fn a_console_is_one_of_three() {
        assert_eq!("stdio".parse(), Ok(Target::Stdio));
        assert_eq!("file:/a:b".parse(), Ok(Target::File("/a:b".into())));
        for bad in ["", "file:", "file", "stdio:", "tty"] {
            assert!(bad.parse::<Target>().is_err(), "{bad}");
        }
    }
}
