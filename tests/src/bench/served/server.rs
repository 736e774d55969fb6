//! Servers, each a process of its own with a disk in a file.

use crate::bench::BenchError;
use crate::process::program;
use fealty_disk::{Disk, Fault, Socket, nbd};
use policy::disk::{CipherSuite, DiskSession, HolderAnswer, VolumeGrant};
use policy::{AnchorMode, KeyId, OpenNumber, VolumeAnchor, VolumeId};
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

const SECRET: &str = "secret,id=key,data=benchmark";
/// How long a server may take until it listens.
const LIMIT: Duration = Duration::from_secs(60);

/// A running server.
pub(super) struct Server {
    child: Child,
    /// What a client connects to.
    pub(super) uri: String,
}

impl Server {
    /// `fealty-disk serve` with a new volume called `name`.
    pub(super) fn fealty(folder: &Path, name: &str, size: u64) -> Result<Self, BenchError> {
        let (volume, socket) = (folder.join(name), folder.join(format!("{name}.sock")));
        let mut keeper = Keeper { volume: VolumeId::random(), opened: 0, anchor: None };
        let mut create = Command::new(program("fealty-disk"));
        create.arg("create").arg(&volume).arg("--size").arg(size.to_string()).stdout(Stdio::null());
        let (child, holder) = keeper.start(&create)?;
        ended("fealty-disk create", child)?;
        keeper.anchor = holder.join().ok().flatten();
        let mut serve = Command::new(program("fealty-disk"));
        serve.arg("serve").arg(&volume).arg("--nbd").arg(&socket);
        let (child, _) = keeper.start(&serve)?;
        Self::listening(child, &socket, "")
    }

    /// This program again, which serves a plain file: our server without ciphers and without a map.
    pub(super) fn plain(folder: &Path, size: u64) -> Result<Self, BenchError> {
        let (file, socket) = (empty(folder, "plain", size)?, folder.join("plain.sock"));
        let me = std::env::current_exe().map_err(|error| BenchError::Io("bench".into(), error))?;
        let mut command = Command::new(me);
        command.arg("serve-plain").arg(file).arg(&socket);
        Self::listening(spawn(&mut command)?, &socket, "")
    }

    /// QEMU's LUKS driver.
    pub(super) fn luks(folder: &Path, size: u64) -> Result<Self, BenchError> {
        let file = folder.join("luks");
        make_luks(&file, size)?;
        let block = format!("driver=luks,node-name=d,key-secret=key,file.driver=file,file.filename={}", file.display());
        Self::storage_daemon(folder, "luks", &block)
    }

    /// QEMU without ciphers.
    pub(super) fn raw(folder: &Path, size: u64) -> Result<Self, BenchError> {
        let file = empty(folder, "raw", size)?;
        let block = format!("driver=raw,node-name=d,file.driver=file,file.filename={file}");
        Self::storage_daemon(folder, "raw", &block)
    }

    fn storage_daemon(folder: &Path, name: &str, block: &str) -> Result<Self, BenchError> {
        let socket = folder.join(format!("{name}.sock"));
        let mut command = Command::new("qemu-storage-daemon");
        command.args(["--object", SECRET, "--blockdev", block]);
        command.arg("--nbd-server").arg(format!("addr.type=unix,addr.path={}", socket.display()));
        command.args(["--export", "type=nbd,id=e,node-name=d,name=d,writable=on"]);
        Self::listening(spawn(&mut command)?, &socket, "d")
    }

    /// nbdkit's LUKS filter over a file.
    pub(super) fn nbdkit(folder: &Path, size: u64) -> Result<Self, BenchError> {
        let (file, socket) = (folder.join("nbdkit"), folder.join("nbdkit.sock"));
        make_luks(&file, size)?;
        let mut command = Command::new("nbdkit");
        command.args(["--foreground", "--filter=luks", "--unix"]).arg(&socket);
        command.arg("file").arg(&file).arg("passphrase=benchmark");
        Self::listening(spawn(&mut command)?, &socket, "")
    }

    fn listening(child: Child, socket: &Path, export: &str) -> Result<Self, BenchError> {
        let uri = format!("nbd+unix:///{export}?socket={}", socket.display());
        let mut server = Self { child, uri };
        let begun = Instant::now();
        while UnixStream::connect(socket).is_err() {
            let over = server.child.try_wait().ok().flatten();
            if over.is_some() || begun.elapsed() > LIMIT {
                let how = over.map_or("still running".to_owned(), |status| status.to_string());
                return Err(BenchError::Failed(server.uri.clone(), how, "it does not listen".to_owned()));
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(server)
    }

    /// Writes zeroes from `offset` on, for which the server keeps the room.
    pub(super) fn zero(&self, offset: u64, length: u64) -> Result<(), BenchError> {
        let mut command = Command::new("qemu-io");
        command.args(["-f", "raw", &self.uri, "-c", &format!("write -z {offset} {length}"), "-c", "flush"]);
        ended("qemu-io", spawn(&mut command)?)
    }

    /// Seconds that its threads have spent on processors, in all, those that have ended too.
    #[allow(unsafe_code)]
    pub(super) fn processor_time(&self) -> Result<f64, BenchError> {
        let failed = |error| BenchError::Io("the server's clock".into(), error);
        let mut clock = 0;
        // SAFETY: this call writes to `clock` and nothing else.
        let error = unsafe { libc::clock_getcpuclockid(self.child.id() as libc::pid_t, &raw mut clock) };
        if error != 0 {
            return Err(failed(io::Error::from_raw_os_error(error)));
        }
        let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        // SAFETY: this call writes to `time` and nothing else.
        if unsafe { libc::clock_gettime(clock, &raw mut time) } != 0 {
            return Err(failed(io::Error::last_os_error()));
        }
        Ok(time.tv_sec as f64 + time.tv_nsec as f64 / 1e9)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Serves `file` on `socket` until it is killed.
pub(in crate::bench) fn serve_plain(file: &Path, socket: &Path) -> Result<(), BenchError> {
    let failed = |error| BenchError::Io(file.into(), error);
    let opened = File::options().read(true).write(true).open(file).map_err(failed)?;
    let size = opened.metadata().map_err(failed)?.len();
    let socket = Socket::listen(socket).map_err(|error| failed(io::Error::other(error)))?;
    let (never, _held) = io::pipe().map_err(failed)?;
    nbd::serve(&Plain { file: opened, size }, "plain", socket, &[never.as_fd()]).map_err(failed)
}

/// A file as it is.
struct Plain {
    file: File,
    size: u64,
}

impl Disk for Plain {
    fn size(&self) -> u64 {
        self.size
    }

    fn read_only(&self) -> bool {
        false
    }

    fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<(), Fault> {
        self.file.read_exact_at(buffer, offset).map_err(|_| Fault::Io)
    }

    fn write(&self, offset: u64, data: &[u8]) -> Result<(), Fault> {
        self.file.write_all_at(data, offset).map_err(|_| Fault::Io)
    }

    fn flush(&self) -> Result<(), Fault> {
        self.file.sync_data().map_err(|_| Fault::Io)
    }

    fn discard(&self, _: u64, _: u64) -> Result<(), Fault> {
        Err(Fault::Io)
    }

    fn write_zeroes(&self, _: u64, _: u64, _: bool) -> Result<(), Fault> {
        Err(Fault::Io)
    }
}

/// The key holder's side: one volume, under a key that is no secret.
struct Keeper {
    volume: VolumeId,
    opened: u64,
    anchor: Option<VolumeAnchor>,
}

impl Keeper {
    /// Starts `command` with a hand-over; the holder ends with the newest anchor.
    fn start(&mut self, command: &Command) -> Result<(Child, JoinHandle<Option<VolumeAnchor>>), BenchError> {
        self.opened += 1;
        let invalid = || BenchError::Io("fealty-disk".into(), io::ErrorKind::InvalidInput.into());
        let grant = VolumeGrant {
            volume: self.volume,
            customer: "bench".parse().map_err(|_| invalid())?,
            cipher: CipherSuite::Aes256XtsHmacSha256,
            kek_id: KeyId(1),
            key_id: KeyId(2),
            open_number: OpenNumber::try_from(self.opened).map_err(|_| invalid())?,
            anchor: self.anchor.clone(),
            anchor_mode: AnchorMode::Interval,
        };
        let failed = |error| BenchError::Io("fealty-disk".into(), error);
        let mut handover = framed(&DiskSession { grant, size: None });
        handover.extend([0x4b; 32]);
        let (mut ours, theirs) = UnixStream::pair().map_err(failed)?;
        // The shell moves its standard input, the socket, to descriptor 7.
        let mut shell = Command::new("sh");
        shell.args(["-c", "exec 7<&0 </dev/null; exec \"$0\" \"$@\" --keys-fd 7"]);
        shell.arg(command.get_program()).args(command.get_args()).stdin(OwnedFd::from(theirs)).stdout(Stdio::null());
        let child = spawn(&mut shell)?;
        drop(shell);
        ours.write_all(&handover).map_err(failed)?;
        Ok((child, std::thread::spawn(move || hold(ours))))
    }
}

/// Keeps whatever anchor comes, until the tool hangs up.
fn hold(mut stream: UnixStream) -> Option<VolumeAnchor> {
    let mut kept = None;
    let mut length = [0; 4];
    while stream.read_exact(&mut length).is_ok() {
        let mut text = vec![0; u32::from_be_bytes(length) as usize];
        stream.read_exact(&mut text).ok()?;
        if let Ok(policy::disk::ToolMessage::Anchor(anchor)) = serde_json::from_slice(&text) {
            kept = Some(anchor);
        }
        stream.write_all(&framed(&HolderAnswer::Kept)).ok()?;
    }
    kept
}

fn framed(message: &impl serde::Serialize) -> Vec<u8> {
    let text = serde_json::to_vec(message).unwrap_or_default();
    let mut out = (text.len() as u32).to_be_bytes().to_vec();
    out.extend(text);
    out
}

fn spawn(command: &mut Command) -> Result<Child, BenchError> {
    let name = command.get_program().to_owned();
    command.stdout(Stdio::null()).spawn().map_err(|error| BenchError::Io(name.into(), error))
}

fn ended(name: &str, mut child: Child) -> Result<(), BenchError> {
    let status = child.wait().map_err(|error| BenchError::Io(name.into(), error))?;
    if status.success() { Ok(()) } else { Err(BenchError::Failed(name.into(), status.to_string(), String::new())) }
}

fn empty(folder: &Path, name: &str, size: u64) -> Result<String, BenchError> {
    let path = folder.join(name);
    let made = File::create(&path).and_then(|file| file.set_len(size));
    made.map_err(|error| BenchError::Io(path.clone(), error))?;
    Ok(path.display().to_string())
}

fn make_luks(path: &Path, size: u64) -> Result<(), BenchError> {
    let mut make = Command::new("qemu-img");
    make.args(["create", "-q", "-f", "luks", "--object", SECRET]);
    make.args(["-o", "key-secret=key,iter-time=10,cipher-alg=aes-256,cipher-mode=xts,ivgen-alg=plain64"]);
    ended("qemu-img create", spawn(make.arg(path).arg(size.to_string()))?)
}
