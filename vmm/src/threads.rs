//! The process's own threads beside the machine's.

use crate::exit::{Exit, Failure};
use crate::post::{Message, Post};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::Duration;

/// Stack of one of them in bytes. Only touched pages cost memory.
const STACK: usize = 2 << 20;

/// How long whoever waits for disks takes their stores for ones that answer.
const PATIENCE: Duration = Duration::from_secs(1);

/// Does `act`, and what is to be done `meanwhile` where that takes long; returns when both are done.
pub fn patiently(act: &(dyn Fn() + Sync), meanwhile: impl FnOnce()) {
    let (acting, done) = channel::<()>();
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().name("act".into()).stack_size(STACK).spawn_scoped(scope, move || {
            let _acting = acting;
            act();
        });
        match thread {
            Ok(_) if done.recv_timeout(PATIENCE) == Err(RecvTimeoutError::Timeout) => meanwhile(),
            Ok(_) => {}
            Err(_) => act(),
        }
    });
}

/// Starts a thread whose death by panic the watching thread hears of.
pub fn spawn(name: &'static str, post: Post, body: impl FnOnce() + Send + 'static) -> Result<(), Failure> {
    let run = move || {
        if catch_unwind(AssertUnwindSafe(body)).is_err() {
            post.put(Message::Died(format!("thread {name} panicked: this is a bug of this program")));
        }
    };
    std::thread::Builder::new()
        .name(name.into())
        .stack_size(STACK)
        .spawn(run)
        .map(drop)
        .map_err(|e| Failure::new(Exit::Host, format!("cannot start thread {name}: {e}")))
}
