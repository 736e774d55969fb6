//! Long jobs of many pieces, by several threads: a volume seals and opens on the thread that asks.

use std::panic::resume_unwind;
use std::thread;

/// Threads that work on one job, at most: the machine has other things to do.
const MOST: usize = 4;

/// How many threads a job is worth here.
pub(crate) fn size() -> usize {
    thread::available_parallelism().map_or(1, usize::from).min(MOST)
}

/// Does `work`, which takes piece after piece until none is left, on so many threads: on fewer where the system has no more to give, and
/// on this one in any case. Errors are the job's own: whoever hands out pieces has none after one, and none once `give_up` was called,
/// which is where a thread panics.
pub(crate) fn together(threads: usize, work: impl Fn() + Sync, give_up: impl Fn() + Sync) {
    let work = || {
        let _guard = InPanic(&give_up);
        work();
    };
    thread::scope(|scope| {
        let spawn = |_| thread::Builder::new().name("crew".to_owned()).spawn_scoped(scope, work).ok();
        let others: Vec<_> = (1..threads).map_while(spawn).collect();
        work();
        others.into_iter().for_each(|other| other.join().unwrap_or_else(|panic| resume_unwind(panic)));
    });
}

/// Does something if its thread panics, lest others wait for it.
struct InPanic<'a, F: Fn()>(&'a F);

impl<F: Fn()> Drop for InPanic<'_, F> {
    fn drop(&mut self) {
        if thread::panicking() {
            (self.0)();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;
    use std::panic::{AssertUnwindSafe, catch_unwind};
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::sync::{Barrier, Mutex};

    #[test]
    fn all_of_them_work() {
        let (here, all) = (Mutex::new(HashSet::new()), Barrier::new(3));
        let work = || {
            here.lock().expect("no panic").insert(thread::current().id());
            // Ends only if there are three of them at once.
            all.wait();
        };
        together(3, work, || panic!("nobody panicked"));
        let here = here.into_inner().expect("no panic");
        assert!(here.len() == 3 && here.contains(&thread::current().id()));
    }

    #[test]
    fn who_panics_ends_the_others() {
        let main = thread::current().id();
        for panics_here in [false, true] {
            let over = AtomicBool::new(false);
            let work = || {
                assert!((thread::current().id() == main) != panics_here, "its own");
                while !over.load(Ordering::Relaxed) {
                    thread::yield_now();
                }
            };
            let give_up = || over.store(true, Ordering::Relaxed);
            assert!(catch_unwind(AssertUnwindSafe(|| together(2, work, give_up))).is_err());
        }
    }
}
