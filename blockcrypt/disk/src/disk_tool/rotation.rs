//! A volume that is sealed anew under another key while it is lent to others: by a thread of the lowest priority.

use super::change::rekeyed;
use super::error::ToolError;
use super::holder::{Holder, HolderError, Leave};
use super::progress::Progress;
use super::report::{self, Reporter};
use blockcrypt::{Volume, VolumeError, VolumeInfo};
use policy::disk::{VolumeGrant, VolumeOperation, VolumeRequest};
use policy::{KeyId, VolumeAnchor};
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

/// Asks whether the volume may be rekeyed; what is written under `grant` is sealed under the new key then. Says whether that is the key of
/// a rekey that was begun before and goes on. Where that one came to its end, and only its outcome was never heard of, the volume has no
/// older keys: then it is told of now, and another is begun. Where its key is used up, it goes on under the next one.
pub(super) fn permitted(
    holder: &Holder,
    grant: &mut VolumeGrant,
    look: impl FnOnce(&VolumeGrant) -> Result<VolumeInfo, ToolError>,
) -> Result<bool, ToolError> {
    let anchored = grant.anchor.as_ref().map(VolumeAnchor::key_id);
    let mut id = ask(holder)?;
    let mut goes_on = Some(id) == anchored;
    if goes_on {
        let info = look(grant).inspect_err(|error| holder.outcome(false, &report::chain(error)))?;
        goes_on = info.older_keys > 0;
        let over = match (goes_on, info.key_used_up) {
            (false, _) => Some("it was done before, and its end was not told"),
            (true, true) => Some("its key has sealed as much as one key may, and what is left comes under the next"),
            (true, false) => None,
        };
        if let Some(over) = over {
            holder.outcome(true, over);
            id = ask(holder)?;
            if Some(id) == anchored {
                holder.outcome(false, "no new key");
                return Err(no_key("it brought a key that is not new"));
            }
        }
    }
    grant.key_id = id;
    Ok(goes_on)
}

fn ask(holder: &Holder) -> Result<KeyId, ToolError> {
    match holder.ask(VolumeRequest::plain(VolumeOperation::Rekey))? {
        Leave::Key(id) => Ok(id),
        _ => Err(no_key("it brought no key id")),
    }
}

fn no_key(why: &str) -> ToolError {
    HolderError::NoPermit(VolumeOperation::Rekey, why.to_owned()).into()
}

impl Rotation {
    /// Begins, or goes on; tells the holder how it ended, whether it came to its end or was stopped.
    pub(super) fn start(
        volume: impl AsRef<Volume> + Send + 'static,
        goes_on: bool,
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
                    let _ = rekeyed(report, &volume.info(), goes_on);
                }
                Ok(false) => holder.outcome(false, "stopped; the next rekey goes on"),
                Err(error) => {
                    let why = report::chain(&error);
                    holder.outcome(false, &why);
                    report::line(&format!("the rekey came to nothing, the next one goes on: {why}"));
                }
            }
        };
        let thread =
            std::thread::Builder::new().name("rekey".into()).spawn(work).map_err(|e| ToolError::Thread("rekey", e))?;
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

/// Seals everything anew, unless `stop` is set first; tells how far it has come.
pub(super) fn rotate(volume: &Volume, report: Reporter, stop: &AtomicBool) -> Result<bool, VolumeError> {
    let mut progress = Progress::of("rekey", volume.size(), report.json);
    volume.rotate(&mut |done, all| {
        progress.share(done, all);
        !stop.load(Ordering::Relaxed)
    })
}
