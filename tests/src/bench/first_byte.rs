//! From process start to the guest's first byte.

use super::BenchError;
use std::io::Read;
use std::process::{Child, Command, Stdio};
use std::time::Instant;

/// A program whose guest has spoken.
#[derive(Debug)]
pub(super) struct Speaking {
    /// Milliseconds from before the process was made.
    pub(super) ms: f64,
    child: Child,
    name: String,
}

/// Starts `command`, whose standard output is the guest's serial line, and waits for the first byte of it.
pub(super) fn start(command: &mut Command) -> Result<Speaking, BenchError> {
    let name = command.get_program().to_string_lossy().into_owned();
    let io = |error| BenchError::Io(name.clone().into(), error);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let began = Instant::now();
    let mut child = command.spawn().map_err(io)?;
    let mut byte = [0];
    let read = child.stdout.as_mut().map_or(Ok(0), |out| out.read(&mut byte)).map_err(io)?;
    let ms = began.elapsed().as_secs_f64() * 1e3;
    if read == 0 {
        let ended = child.wait_with_output().map_err(io)?;
        let last = String::from_utf8_lossy(&ended.stderr).lines().last().unwrap_or_default().to_owned();
        return Err(BenchError::Silent(name, ended.status.to_string(), last));
    }
    Ok(Speaking { ms, child, name })
}

impl Speaking {
    /// The process.
    pub(super) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Waits for its end, which must be a good one; what it said on standard error.
    pub(super) fn end(self) -> Result<String, BenchError> {
        let ended = self.child.wait_with_output().map_err(|error| BenchError::Io(self.name.clone().into(), error))?;
        let told = String::from_utf8_lossy(&ended.stderr).into_owned();
        if !ended.status.success() {
            let last = told.lines().last().unwrap_or_default().to_owned();
            return Err(BenchError::Failed(self.name, ended.status.to_string(), last));
        }
        Ok(told)
    }

    /// Asks it to end, twice as fealty understands it, and waits. It must not have ended before.
    pub(super) fn stop(mut self) -> Result<(), BenchError> {
        if let Ok(Some(_)) = self.child.try_wait() {
            let name = self.name.clone();
            self.end()?;
            return Err(BenchError::Failed(name, "no error".into(), "it ended while its guest slept".into()));
        }
        if let Some(pid) = rustix::process::Pid::from_raw(self.child.id().cast_signed()) {
            for _ in 0..2 {
                let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
                std::thread::sleep(std::time::Duration::from_millis(50));
            }
        }
        self.child.wait().map(|_| ()).map_err(|error| BenchError::Io(self.name.into(), error))
    }
}
