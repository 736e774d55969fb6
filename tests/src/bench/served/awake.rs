//! Processors that don't sleep.

use crate::bench::BenchError;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

/// A thread for each processor that does nothing without end, and that every other thread displaces at once (SCHED_IDLE), as long as
/// this lives. Where processors are two threads of one core, or their time is rationed, it takes from what is measured.
pub(super) struct Awake {
    over: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl Awake {
    /// Keeps all processors awake.
    pub(super) fn all() -> Result<Self, BenchError> {
        let count = std::thread::available_parallelism().map_or(1, usize::from);
        let mut awake = Self { over: Arc::default(), threads: Vec::with_capacity(count) };
        for _ in 0..count {
            let (over, (say, said)) = (awake.over.clone(), std::sync::mpsc::channel());
            awake.threads.push(std::thread::spawn(move || {
                let idle = idle();
                let turn = idle.is_ok();
                let _ = say.send(idle);
                while turn && !over.load(Ordering::Relaxed) {
                    std::hint::spin_loop();
                }
            }));
            said.recv().unwrap_or(Ok(())).map_err(|error| BenchError::Io("SCHED_IDLE".into(), error))?;
        }
        Ok(awake)
    }
}

impl Drop for Awake {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
        self.threads.drain(..).for_each(|thread| _ = thread.join());
    }
}

/// This thread runs only where no other would.
#[allow(unsafe_code)]
fn idle() -> io::Result<()> {
    let parameters = libc::sched_param { sched_priority: 0 };
    // SAFETY: the call reads `parameters` and changes nothing but how this thread is scheduled.
    match unsafe { libc::sched_setscheduler(0, libc::SCHED_IDLE, &raw const parameters) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
