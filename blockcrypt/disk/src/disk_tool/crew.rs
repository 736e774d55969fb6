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
/// on this one in any case.
///
/// # Errors
/// The first thread's that has one. Others go on until they find no piece: whoever hands them out sees to it that there is none.
pub(crate) fn together<E: Send>(threads: usize, work: impl Fn() -> Result<(), E> + Sync) -> Result<(), E> {
    thread::scope(|scope| {
        let spawn = |_| thread::Builder::new().name("crew".to_owned()).spawn_scoped(scope, &work).ok();
        let others: Vec<_> = (1..threads).map_while(spawn).collect();
        let own = work();
        others.into_iter().map(|other| other.join().unwrap_or_else(|panic| resume_unwind(panic))).fold(own, Result::and)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;
    use std::sync::{Barrier, Mutex};

    #[test]
    fn all_of_them_work_and_every_error_is_heard() {
        let (here, all) = (Mutex::new(HashSet::new()), Barrier::new(3));
        let work = || {
            here.lock().expect("no panic").insert(thread::current().id());
            // Ends only if there are three of them at once.
            all.wait();
            Ok::<(), ()>(())
        };
        together(3, work).expect("good");
        let here = here.into_inner().expect("no panic");
        assert!(here.len() == 3 && here.contains(&thread::current().id()));
        let main = thread::current().id();
        let fails = |fails: bool| if fails { Err("an error") } else { Ok(()) };
        assert!(together(2, || fails(thread::current().id() == main)).is_err());
        assert!(together(2, || fails(thread::current().id() != main)).is_err());
        assert!(together(1, || fails(thread::current().id() != main)).is_ok());
    }
}
