//! The process's own threads beside the machine's.

use crate::exit::{Exit, Failure};
use crate::post::{Message, Post};
use std::panic::{AssertUnwindSafe, catch_unwind};

/// Stack of one of them in bytes. Only touched pages cost memory.
const STACK: usize = 2 << 20;

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
