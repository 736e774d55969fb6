//! A volume that is sealed anew under another key while it is lent to others: by a thread of the lowest priority.

use super::change::rekeyed;
use super::error::ToolError;
use super::holder::{Holder, HolderError, Leave};
use super::progress::Progress;
use super::report::{self, Reporter};
use blockcrypt::{Volume, VolumeError};
use policy::disk::{VolumeGrant, VolumeOperation, VolumeRequest};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

/// The least urgent that a thread can be.
const NICE: i32 = 19;

/// The work, under way.
pub(super) struct Rotation {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<()>,
}

/// Asks whether the volume may be rekeyed; what is written under `grant` is sealed under the new key then.
pub(super) fn permitted(holder: &Holder, grant: &mut VolumeGrant) -> Result<(), ToolError> {
    let Leave::Key(id) = holder.ask(VolumeRequest::plain(VolumeOperation::Rekey))? else {
        return Err(HolderError::NoPermit(VolumeOperation::Rekey, "it brought no key id".into()).into());
    };
    grant.key_id = id;
    Ok(())
}

impl Rotation {
    /// Begins; tells the holder how it ended, whether it came to its end or was stopped.
    pub(super) fn start(
        volume: impl AsRef<Volume> + Send + 'static,
        holder: Arc<Holder>,
        report: Reporter,
    ) -> Result<Self, ToolError> {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let work = move || {
            // Linux gives each thread a priority of its own. Where that fails, the work is done all the same.
            let _ = rustix::process::setpriority_process(None, NICE);
            let volume = volume.as_ref();
            match rotate(volume, report, &stopped) {
                Ok(true) => {
                    holder.outcome(true, "done");
                    // Nobody who reads this: no reason to end the server.
                    let _ = rekeyed(report, &volume.info());
                }
                Ok(false) => holder.outcome(false, "stopped; the next rekey goes on"),
                Err(error) => {
                    let why = report::chain(&error);
                    holder.outcome(false, &why);
                    report::line(&format!("the rekey came to nothing, the next one goes on: {why}"));
                }
            }
        };
        let thread = std::thread::Builder::new().name("rekey".into()).spawn(work).map_err(ToolError::Thread)?;
        Ok(Self { stop, thread })
    }

    /// Stops it, if it is not at its end, and waits until it has.
    pub(super) fn stop(self) {
        self.stop.store(true, Ordering::Relaxed);
        if self.thread.join().is_err() {
            report::line("the rekey came to nothing, the next one goes on: its thread panicked");
        }
    }
}

fn rotate(volume: &Volume, report: Reporter, stop: &AtomicBool) -> Result<bool, VolumeError> {
    let size = volume.size();
    let mut progress = Progress::of("rekey", size, report.json);
    volume.rotate(&mut |done, _| {
        progress.at((done * 4096).min(size));
        !stop.load(Ordering::Relaxed)
    })
}
