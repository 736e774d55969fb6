//! OpenSSL as libtss2 uses it.

use std::ffi::c_void;

#[link(name = "crypto")]
unsafe extern "C" {
    /// The default library context (OSSL_LIB_CTX(3)).
    safe fn OSSL_LIB_CTX_get0_global_default() -> *mut c_void;
}

/// Stands before OpenSSL's function of this name, in this program alone: whoever asks for a new library context gets the default
/// one, which OSSL_LIB_CTX_free leaves alone (OSSL_LIB_CTX(3)).
///
/// libtss2 3.2 makes a context for each hash, HMAC and random number of a session, and each new context registers all of OpenSSL's
/// algorithms before it computes anything: most of the time of a command in a salted session. What is computed stays the same. A libtss2
/// that asks for no contexts calls nothing of this.
#[unsafe(no_mangle)]
extern "C" fn OSSL_LIB_CTX_new() -> *mut c_void {
    OSSL_LIB_CTX_get0_global_default()
}
