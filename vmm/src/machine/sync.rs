//! Locks that a panicking thread can't turn into further panics.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

/// Locks `mutex`. State behind these locks is consistent between any two statements that could panic, so a poisoned lock
/// is taken over.
pub(crate) fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Waits for a signal of `condition`.
pub(crate) fn wait<'a, T>(condition: &Condvar, guard: MutexGuard<'a, T>) -> MutexGuard<'a, T> {
    condition.wait(guard).unwrap_or_else(PoisonError::into_inner)
}
