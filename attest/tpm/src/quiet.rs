//! The C library prints its own view of each error to standard error; ours says what to do, in one line.
#![allow(unsafe_code)]

/// Keeps libtss2 from printing. Does nothing where TSS2_LOG is set.
///
/// # Safety
///
/// Must be called while the process has one thread: it sets an environment variable (see [`std::env::set_var`]).
pub unsafe fn silence_library() {
    if std::env::var_os("TSS2_LOG").is_none() {
        // SAFETY: the caller promises that no other thread exists that could read or write the environment.
        unsafe { std::env::set_var("TSS2_LOG", "all+NONE") };
    }
}
