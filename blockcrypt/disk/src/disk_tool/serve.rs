//! `serve`: a volume as a disk of other programs.

use super::cli::{Serve, Way};
use super::error::ToolError;
use super::holder::{Handover, Holder};
use super::rotation::{self, Rotation};
use super::{Context, control, report};
use blockcrypt::{FileStore, OpenOptions, Volume, VolumeError};
use fealty_disk::{Disk, Fault, Socket, nbd, vhost_user};
use policy::VolumeId;
use serde::Serialize;
use std::fs::OpenOptions as FileOptions;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Failed requests that are told one by one; of further ones only the number.
const FAILURES: u64 = 16;

#[derive(Serialize)]
struct Ready<'a> {
    volume: VolumeId,
    size: u64,
    read_only: bool,
    socket: &'a Path,
}

#[derive(Serialize)]
struct Served {
    volume: VolumeId,
    failed_requests: u64,
}

pub(super) fn serve(context: &Context, words: &Serve) -> Result<(), ToolError> {
    let path = &words.volume;
    let failed = |e| ToolError::Volume(path.clone(), e);
    let mut options = FileOptions::new();
    options.read(true).write(!words.read_only).custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY);
    let file = options.open(path).map_err(|e| ToolError::Open(path.clone(), e))?;
    let Handover { mut grant, kek, holder, .. } = context.handover("serve")?;
    grant.anchor_mode = words.anchor_mode.into();
    // Whoever waits for the disk's socket finds this one there.
    let control = words.control.as_deref().map(Socket::listen).transpose()?;
    let socket = Socket::listen(words.socket())?;
    let again = file.try_clone().map_err(|e| ToolError::Open(path.clone(), e))?;
    let store = if words.read_only { FileStore::shared(file) } else { FileStore::exclusive(file) }.map_err(failed)?;
    // Clients come back to the next server, and know of no crash.
    let options = OpenOptions { read_only: words.read_only, outlive: true, ..Default::default() };
    let goes_on = match words.rekey {
        true => rotation::permitted(&holder, &mut grant, |grant| super::look(path, again, grant, &kek, &holder))?,
        false => {
            drop(again);
            false
        }
    };
    let store = if words.direct { store.direct().map_err(failed)? } else { store };
    // From here on an interruption closes the volume.
    let asked = context.interrupts.serving().map_err(ToolError::Signals)?;
    let volume = Volume::open(store, &grant, &kek, options, holder.clone(), holder.clone()).map_err(failed)?;
    drop(kek);
    let lent = Arc::new(Lent { volume, failures: AtomicU64::new(0) });
    let id = grant.volume;
    let ready = Ready { volume: id, size: lent.size(), read_only: words.read_only, socket: words.socket() };
    context.report.result(&ready, &format!("ready: volume {id} on {}", words.socket().display()))?;
    let rotation = words.rekey.then(|| Rotation::start(Rotated(lent.clone()), goes_on, holder.clone(), context.report));
    let rotation = rotation.transpose()?;
    let served = lend_and_attend(&lent, words, socket, control.as_ref(), &holder, asked.as_fd());
    drop(control);
    if let Some(rotation) = rotation {
        rotation.stop();
    }
    // Whatever ended it, what was written becomes durable before anything is said.
    let closed = if words.read_only { Ok(()) } else { lent.volume.close().map(drop) };
    closed.map_err(failed)?;
    served?;
    holder.still_there()?;
    holder.finish()?;
    context.interrupts.done();
    let failures = lent.failures.load(Ordering::Relaxed);
    let text = match failures {
        0 => format!("volume {id} is closed"),
        n => format!("volume {id} is closed; {n} requests failed"),
    };
    context.report.result(&Served { volume: id, failed_requests: failures }, &text)
}

impl Serve {
    fn socket(&self) -> &Path {
        let Way { nbd, vhost_user } = &self.way;
        // The command line has one of them.
        nbd.as_deref().or(vhost_user.as_deref()).unwrap_or(Path::new(""))
    }
}

/// Lends the volume until the server is asked to end, or the holder leaves, and does meanwhile what comes by the control socket.
fn lend_and_attend(
    lent: &Arc<Lent>,
    words: &Serve,
    socket: Socket,
    control: Option<&Socket>,
    holder: &Holder,
    asked: BorrowedFd<'_>,
) -> Result<(), ToolError> {
    let (left, leave) = io::pipe().map_err(ToolError::Serve)?;
    std::thread::scope(|scope| {
        if let Some(control) = control {
            let until = [asked, holder.as_fd(), left.as_fd()];
            let attend = move || control::attend(&lent.volume, holder, control, &until);
            let thread = std::thread::Builder::new().name("control".into());
            thread.spawn_scoped(scope, attend).map_err(|e| ToolError::Thread("control socket", e))?;
        }
        let served = lend(lent, words, socket, &[asked, holder.as_fd()]).map_err(ToolError::Serve);
        drop(leave);
        served
    })
}

fn lend(lent: &Arc<Lent>, words: &Serve, socket: Socket, until: &[BorrowedFd<'_>]) -> io::Result<()> {
    let id = lent.volume.id();
    if words.way.nbd.is_some() {
        return nbd::serve(&**lent, &format!("volume {id}"), socket, until);
    }
    let serial = id.to_string().replace('-', "");
    let device = vhost_user::Device { queues: words.queues, serial };
    let disk: Arc<dyn Disk> = lent.clone();
    vhost_user::serve(&disk, &device, &socket, until, &report::line)
}

/// The volume, with somebody who tells of what fails.
struct Lent {
    volume: Volume,
    failures: AtomicU64,
}

/// The volume, for the thread that rekeys it.
struct Rotated(Arc<Lent>);

impl AsRef<Volume> for Rotated {
    fn as_ref(&self) -> &Volume {
        &self.0.volume
    }
}

impl Lent {
    fn told<T>(&self, doing: &'static str, offset: u64, done: Result<T, VolumeError>) -> Result<T, Fault> {
        done.map_err(|error| {
            let before = self.failures.fetch_add(1, Ordering::Relaxed);
            if before < FAILURES {
                report::line(&format!("a {doing} at {offset} failed: {}", report::chain(&error)));
            }
            if before + 1 == FAILURES {
                report::line("further failures are only counted");
            }
            Fault::from(&error)
        })
    }
}

impl Disk for Lent {
    fn size(&self) -> u64 {
        self.volume.size()
    }

    fn read_only(&self) -> bool {
        self.volume.read_only()
    }

    fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<(), Fault> {
        self.told("read", offset, self.volume.read(offset, buffer))
    }

    fn write(&self, offset: u64, data: &[u8]) -> Result<(), Fault> {
        self.told("write", offset, self.volume.write(offset, data))
    }

    fn read_many(&self, requests: &mut [(u64, &mut [u8])]) -> Vec<Result<(), Fault>> {
        let done = self.volume.read_many(requests);
        done.into_iter().zip(requests).map(|(done, (offset, _))| self.told("read", *offset, done)).collect()
    }

    fn write_many(&self, requests: &[(u64, &[u8])]) -> Vec<Result<(), Fault>> {
        let done = self.volume.write_many(requests);
        done.into_iter().zip(requests).map(|(done, (offset, _))| self.told("write", *offset, done)).collect()
    }

    fn flush(&self) -> Result<(), Fault> {
        self.told("flush", 0, self.volume.flush())
    }

    fn discard(&self, offset: u64, length: u64) -> Result<(), Fault> {
        self.told("discard", offset, self.volume.discard(offset, length))
    }

    fn write_zeroes(&self, offset: u64, length: u64, may_unmap: bool) -> Result<(), Fault> {
        self.told("write of zeroes", offset, self.volume.write_zeroes(offset, length, may_unmap))
    }
}
