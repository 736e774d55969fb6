//! Running the project's own programs in tests: found beside the test, bounded in time, never left behind.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

/// The path of a program of the project, beside the running test's own executable.
///
/// # Panics
/// Where it was not built.
pub fn program(name: &str) -> PathBuf {
    let me = std::env::current_exe().expect("the test knows its own path");
    let found = me.ancestors().skip(1).take(3).map(|folder| folder.join(name)).find(|path| path.is_file());
    found.unwrap_or_else(|| panic!("{name} is not built; run: cargo build --workspace --bins"))
}

/// What a program that ended left.
#[derive(Debug)]
pub struct Ended {
    /// Exit code; `None` after a signal.
    pub code: Option<i32>,
    /// Standard output, lossy.
    pub out: String,
    /// Standard error, lossy.
    pub err: String,
}

impl Ended {
    /// Itself, where the program succeeded.
    ///
    /// # Panics
    /// Where it did not.
    #[track_caller]
    pub fn good(self) -> Self {
        assert_eq!(self.code, Some(0), "it failed:\n{}\n{}", self.out, self.err);
        self
    }

    /// Itself, where the program refused: a code above 0, no signal, no panic.
    ///
    /// # Panics
    /// Where it succeeded, panicked or died.
    #[track_caller]
    pub fn refused(self) -> Self {
        let code = self.code.unwrap_or_else(|| panic!("it died of a signal:\n{}\n{}", self.out, self.err));
        assert!(code != 0 && code != 101, "it ended with {code}:\n{}\n{}", self.out, self.err);
        assert!(!self.err.contains("panicked"), "it panicked:\n{}", self.err);
        self
    }

    /// Itself, where `fealty` refused, no vCPU ran, and exactly one line, which holds one of `words` in small letters, says why; all other
    /// lines are steps.
    ///
    /// # Panics
    /// Where it is otherwise.
    #[track_caller]
    pub fn no_guest(self, words: &[&str]) -> Self {
        let ended = self.refused();
        assert!(!ended.out.contains("fealty-guest"), "the guest ran:\n{}", ended.out);
        let said: Vec<&str> = ended.err.lines().filter(|line| !line.starts_with('[')).collect();
        let &[line] = &said[..] else { panic!("not one line:\n{}", ended.err) };
        assert!(line.starts_with("fealty: "), "{line:?} is not this program's");
        let lower = line.to_lowercase();
        assert!(words.iter().any(|w| lower.contains(w)), "{line:?} says none of {words:?}");
        ended
    }
}

/// Runs `command` to its end; kills it after `limit`.
///
/// # Panics
/// Where it can't be started or runs longer.
#[track_caller]
pub fn run(command: &mut Command, limit: Duration) -> Ended {
    Background::start(command).end(limit)
}

/// A program that runs beside the test, killed when dropped. It prints into files without a name, so that whoever looks sees all that it
/// printed until then.
#[derive(Debug)]
pub struct Background {
    child: Child,
    out: File,
    err: File,
}

impl Background {
    /// Starts `command`, collecting what it prints.
    ///
    /// # Panics
    /// Where it can't be started.
    #[track_caller]
    pub fn start(command: &mut Command) -> Self {
        let file = || tempfile::tempfile().expect("a temporary file");
        let (out, err) = (file(), file());
        let theirs = |file: &File| file.try_clone().expect("another descriptor");
        command.stdin(Stdio::null()).stdout(theirs(&out)).stderr(theirs(&err));
        let child = command.spawn().unwrap_or_else(|e| panic!("{command:?}: {e}"));
        Self { child, out, err }
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// What it printed so far on standard output.
    pub fn out(&self) -> String {
        text(&self.out)
    }

    /// What it printed so far on standard error.
    pub fn err(&self) -> String {
        text(&self.err)
    }

    /// Waits until standard output or error holds `needle`.
    ///
    /// # Panics
    /// Where it does not come within `limit`, or the program ends before.
    #[track_caller]
    pub fn until(&mut self, needle: &str, limit: Duration) {
        let start = Instant::now();
        loop {
            let ended = self.child.try_wait().ok().flatten();
            if self.out().contains(needle) || self.err().contains(needle) {
                return;
            }
            let shown = || format!("{}\n{}", self.out(), self.err());
            assert!(ended.is_none(), "it ended ({ended:?}) before {needle:?}:\n{}", shown());
            assert!(start.elapsed() < limit, "{needle:?} did not come:\n{}", shown());
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Sends a signal by its number.
    pub fn signal(&self, signal: i32) {
        let pid = rustix::process::Pid::from_raw(self.child.id() as i32).expect("a pid");
        let signal = rustix::process::Signal::from_named_raw(signal).expect("a named signal");
        let _ = rustix::process::kill_process(pid, signal);
    }

    /// Waits for its end; kills it after `limit`.
    ///
    /// # Panics
    /// Where it runs longer.
    #[track_caller]
    pub fn end(mut self, limit: Duration) -> Ended {
        let Some(status) = self.wait(limit) else {
            let _ = self.child.kill();
            panic!("it still ran after {limit:?}:\n{}\n{}", self.out(), self.err());
        };
        Ended { code: status.code(), out: self.out(), err: self.err() }
    }

    fn wait(&mut self, limit: Duration) -> Option<ExitStatus> {
        let start = Instant::now();
        while start.elapsed() < limit {
            if let Ok(Some(status)) = self.child.try_wait() {
                return Some(status);
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        None
    }
}

impl Drop for Background {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// All that a file holds; where its writer is does not change.
fn text(file: &File) -> String {
    let mut bytes = vec![0; file.metadata().expect("a file").len() as usize];
    let length = file.read_at(&mut bytes, 0).expect("readable");
    String::from_utf8_lossy(&bytes[..length]).into_owned()
}

/// Copies a folder's files, one level deep.
///
/// # Errors
/// Those of the file system.
pub fn copy_files(from: &Path, to: &Path) -> std::io::Result<()> {
    std::fs::create_dir_all(to)?;
    for entry in std::fs::read_dir(from)? {
        let entry = entry?;
        if entry.file_type()?.is_file() {
            std::fs::copy(entry.path(), to.join(entry.file_name()))?;
        }
    }
    Ok(())
}
