//! Boots the small guest on real KVM, and watches its console.
#![allow(dead_code, reason = "each test binary uses a part")]

use fealty_vmm::lease::LeaseGate;
use fealty_vmm::machine::{
    Boot, ConsoleBackend, Disk, DiskSettings, DiskSlot, Image, Machine, MachineEvent, Running, Shape, open_kvm,
};
use fealty_vmm::permit::StartPermit;
use policy::config::PlainConfig;
use std::fs::File;
use std::io::{self, PipeWriter, Write};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Condvar, Mutex, OnceLock};
use std::time::{Duration, Instant};

/// Far beyond anything that works.
pub(crate) const LIMIT: Duration = Duration::from_secs(120);

/// The guest's two images.
pub(crate) struct Images {
    pub(crate) elf: PathBuf,
    pub(crate) bzimage: PathBuf,
}

/// Builds the guest where that is still to do.
pub(crate) fn images() -> &'static Images {
    static IMAGES: OnceLock<Images> = OnceLock::new();
    IMAGES.get_or_init(|| {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../scripts/guest");
        let built = Command::new(&script).output().expect("scripts/guest runs");
        assert!(built.status.success(), "{}", String::from_utf8_lossy(&built.stderr));
        let printed = String::from_utf8(built.stdout).expect("paths in UTF-8");
        let mut paths = printed.lines().map(PathBuf::from);
        let mut next = || paths.next().expect("scripts/guest prints its images");
        Images { elf: next(), bzimage: next() }
    })
}

/// Adds something to a machine.
type Add = Box<dyn FnOnce(&mut Machine)>;

/// What a test's machine is made of.
pub(crate) struct Plan {
    pub(crate) kernel: File,
    pub(crate) initrd: Option<File>,
    pub(crate) words: String,
    pub(crate) shape: Shape,
    pub(crate) disks: Vec<DiskSlot>,
    /// What else goes into the machine.
    pub(crate) more: Option<Add>,
    pub(crate) gate: Arc<LeaseGate>,
}

impl Plan {
    /// The ELF image, one vCPU, 64 MiB, `words` to do.
    pub(crate) fn new(words: &str) -> Self {
        Self {
            kernel: File::open(&images().elf).expect("the guest"),
            initrd: None,
            words: words.into(),
            shape: Shape { vcpus: 1, memory: 64 << 20, hotplug: 0 },
            disks: vec![],
            more: None,
            gate: Arc::new(LeaseGate::unlimited()),
        }
    }

    /// Another disk.
    pub(crate) fn disk(self, disk: Arc<dyn Disk>, read_only: bool) -> Self {
        self.disk_with(disk, DiskSettings { read_only, ..DiskSettings::default() })
    }

    /// With a disk that is shown and served as `settings` say.
    pub(crate) fn disk_with(mut self, disk: Arc<dyn Disk>, settings: DiskSettings) -> Self {
        let id = format!("disk{}", self.disks.len());
        self.disks.push(DiskSlot { id, disk, settings });
        self
    }

    /// With what `add` puts into the machine.
    pub(crate) fn with(mut self, add: impl FnOnce(&mut Machine) + 'static) -> Self {
        self.more = Some(Box::new(add));
        self
    }

    /// Boots it.
    pub(crate) fn boot(self) -> Guest {
        let kvm = open_kvm().expect("these tests need /dev/kvm");
        let mut machine = Machine::prepare(kvm, self.shape).expect("a machine");
        let cmdline = format!("console=ttyS0 fealty.do={}", self.words);
        let image = |file| Image { file, digest: None };
        let boot = Boot { kernel: image(&self.kernel), initrd: self.initrd.as_ref().map(image), cmdline: &cmdline };
        machine.load(&boot).expect("the guest fits");
        self.disks.into_iter().for_each(|disk| machine.add_disk(disk).expect("a slot"));
        if let Some(add) = self.more {
            add(&mut machine);
        }
        let (input, keyboard) = io::pipe().expect("a pipe");
        let screen = Screen::default();
        machine.set_console(ConsoleBackend { input: Some(input.into()), output: Box::new(screen.clone()) });
        let running = machine.start(permit(), self.gate, Arc::new(|_| Ok(()))).expect("it starts");
        Guest { running, screen, keyboard, end: OnceLock::new() }
    }
}

/// Leave to run an unprotected machine.
pub(crate) fn permit() -> StartPermit {
    let config: PlainConfig = serde_json::from_str(
        r#"{"cpus": {"boot_vcpus": 1}, "memory": {"size": 67108864}, "payload": {"kernel": "guest"}}"#,
    )
    .expect("a plain configuration");
    StartPermit::from_plain(&config)
}

/// A booted guest; it ends with the test.
pub(crate) struct Guest {
    pub(crate) running: Running,
    pub(crate) screen: Screen,
    keyboard: PipeWriter,
    end: OnceLock<MachineEvent>,
}

impl Guest {
    /// Waits until the console shows `text`.
    pub(crate) fn sees(&self, text: &str) {
        self.shows(text, 1);
    }

    /// Waits until the console shows `text` `times` times.
    pub(crate) fn shows(&self, text: &str, times: usize) {
        let start = Instant::now();
        while self.screen.text().matches(text).count() < times {
            let failed = self.end().filter(|end| matches!(end, MachineEvent::Failed(_) | MachineEvent::Broken(_)));
            let over = failed.is_some() || start.elapsed() > LIMIT;
            assert!(!over, "never {text:?}, but {failed:?} and:\n{}", self.screen.text());
            self.screen.await_change();
        }
    }

    /// Types on the console.
    pub(crate) fn types(&mut self, text: &str) {
        self.keyboard.write_all(text.as_bytes()).expect("typed");
    }

    /// Waits for the machine's end.
    pub(crate) fn ends(&self) -> MachineEvent {
        let start = Instant::now();
        loop {
            if let Some(end) = self.end() {
                return end;
            }
            assert!(start.elapsed() < LIMIT, "no end, but:\n{}", self.screen.text());
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// The machine's first event, once there is one.
    fn end(&self) -> Option<MachineEvent> {
        if let Some(event) = self.running.events().take() {
            let _ = self.end.set(event);
        }
        self.end.get().cloned()
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        self.running.stop();
    }
}

/// What the guest has printed.
#[derive(Clone, Default)]
pub(crate) struct Screen(Arc<(Mutex<Vec<u8>>, Condvar)>);

impl Screen {
    /// All of it.
    pub(crate) fn text(&self) -> String {
        String::from_utf8_lossy(&self.0.0.lock().expect("no panic in a vCPU")).into_owned()
    }

    /// Lines that begin with `word`.
    pub(crate) fn lines(&self, word: &str) -> Vec<String> {
        self.text().lines().filter(|line| line.starts_with(word)).map(Into::into).collect()
    }

    fn await_change(&self) {
        let shown = self.0.0.lock().expect("no panic in a vCPU");
        drop(self.0.1.wait_timeout(shown, Duration::from_millis(20)));
    }
}

impl Write for Screen {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.0.lock().expect("no panic in a test").extend(bytes);
        self.0.1.notify_all();
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
