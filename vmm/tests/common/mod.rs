//! What tests of `fealty run` share: the small guest, a running program, bounded waits.
#![allow(dead_code, reason = "each test binary uses its part")]

pub(crate) mod namespace;

use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, OnceLock};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How long anything may take: far beyond what it takes on a quiet machine.
pub(crate) const LIMIT: Duration = Duration::from_secs(60);

/// The small guest's ELF image, built where that is still to do.
pub(crate) fn guest() -> &'static Path {
    static ELF: OnceLock<PathBuf> = OnceLock::new();
    ELF.get_or_init(|| {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../scripts/guest");
        let built = Command::new(script).output().expect("scripts/guest runs");
        assert!(built.status.success(), "{}", String::from_utf8_lossy(&built.stderr));
        String::from_utf8_lossy(&built.stdout).lines().next().expect("a path").into()
    })
}

/// A plain configuration in `folder` whose guest does `words`; its path.
pub(crate) fn configuration(folder: &Path, words: &str, disks: serde_json::Value) -> PathBuf {
    configuration_with(folder, words, serde_json::json!({ "disks": disks }))
}

/// A plain configuration with the fields of `more`.
pub(crate) fn configuration_with(folder: &Path, words: &str, more: serde_json::Value) -> PathBuf {
    let mut config = serde_json::json!({
        "cpus": { "boot_vcpus": 1 },
        "memory": { "size": 64u64 << 20 },
        "payload": { "kernel": guest(), "cmdline": format!("console=ttyS0 fealty.do={words}") },
    });
    let fields = config.as_object_mut().expect("an object");
    fields.extend(more.as_object().expect("an object").clone());
    let path = folder.join("plain.json");
    std::fs::write(&path, config.to_string()).expect("written");
    path
}

/// `fealty`, not yet started.
pub(crate) fn fealty(words: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_fealty"));
    command.args(words).stdin(Stdio::null());
    command
}

/// A program that runs; killed when dropped.
pub(crate) struct Program {
    child: Child,
    out: Arc<Mutex<Vec<u8>>>,
    err: Arc<Mutex<Vec<u8>>>,
    readers: Vec<JoinHandle<()>>,
}

/// What a program that ended left.
pub(crate) struct Ended {
    pub(crate) code: Option<i32>,
    pub(crate) signal: Option<i32>,
    pub(crate) out: String,
    pub(crate) err: String,
}

impl Program {
    pub(crate) fn start(command: &mut Command) -> Self {
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("it starts");
        let (out, err) = (Arc::default(), Arc::default());
        let readers = vec![
            collect(child.stdout.take().expect("piped"), &out),
            collect(child.stderr.take().expect("piped"), &err),
        ];
        Self { child, out, err, readers }
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    pub(crate) fn out(&self) -> String {
        text(&self.out)
    }

    pub(crate) fn err(&self) -> String {
        text(&self.err)
    }

    /// Whether it has not ended.
    pub(crate) fn runs(&mut self) -> bool {
        self.child.try_wait().expect("waited").is_none()
    }

    pub(crate) fn stdin(&mut self) -> std::process::ChildStdin {
        self.child.stdin.take().expect("piped")
    }

    /// Waits until standard output holds `needle`.
    #[track_caller]
    pub(crate) fn until(&mut self, needle: &str) {
        self.wait(needle, Self::out);
    }

    /// Waits until standard error tells a step that holds `needle`.
    #[track_caller]
    pub(crate) fn until_step(&mut self, needle: &str) {
        self.wait(needle, Self::err);
    }

    #[track_caller]
    fn wait(&mut self, needle: &str, printed: fn(&Self) -> String) {
        let start = Instant::now();
        while !printed(self).contains(needle) {
            let ended = self.child.try_wait().expect("waited").is_some();
            assert!(
                !ended && start.elapsed() < LIMIT,
                "no {needle:?} (ended: {ended}) in:\n{}\n{}",
                self.out(),
                self.err()
            );
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    pub(crate) fn signal(&self, signal: rustix::process::Signal) {
        let pid = rustix::process::Pid::from_raw(self.child.id().cast_signed()).expect("a pid");
        rustix::process::kill_process(pid, signal).expect("signalled");
    }

    /// Waits for its end.
    #[track_caller]
    pub(crate) fn end(mut self) -> Ended {
        use std::os::unix::process::ExitStatusExt;
        let start = Instant::now();
        let status = loop {
            if let Some(status) = self.child.try_wait().expect("waited") {
                break status;
            }
            assert!(start.elapsed() < LIMIT, "it does not end:\n{}\n{}", self.out(), self.err());
            std::thread::sleep(Duration::from_millis(10));
        };
        for reader in self.readers.drain(..) {
            reader.join().expect("read");
        }
        Ended { code: status.code(), signal: status.signal(), out: self.out(), err: self.err() }
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Ended {
    #[track_caller]
    pub(crate) fn code(self, code: i32) -> Self {
        assert_eq!((self.code, self.signal), (Some(code), None), "{}\n{}", self.out, self.err);
        self
    }

    /// The one line that says why, without its prefix.
    #[track_caller]
    pub(crate) fn why(&self) -> &str {
        let lines: Vec<_> = self.err.lines().filter_map(|l| l.strip_prefix("fealty: ")).collect();
        assert_eq!(lines.len(), 1, "{}", self.err);
        lines[0]
    }
}

fn collect(mut from: impl Read + Send + 'static, to: &Arc<Mutex<Vec<u8>>>) -> JoinHandle<()> {
    let to = to.clone();
    std::thread::spawn(move || {
        let mut piece = [0; 4096];
        while let Ok(length) = from.read(&mut piece) {
            if length == 0 {
                return;
            }
            to.lock().expect("lock").extend_from_slice(&piece[..length]);
        }
    })
}

fn text(bytes: &Mutex<Vec<u8>>) -> String {
    String::from_utf8_lossy(&bytes.lock().expect("lock")).into_owned()
}
