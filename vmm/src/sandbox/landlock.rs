//! Landlock: which paths a process may still open (landlock(7)). Used for the opener child only; the VM process itself can
//! open none, by its seccomp list.
#![allow(unsafe_code)]

use super::SandboxError;
use super::process::step;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

const ACCESS_FS_WRITE_FILE: u64 = 1 << 1;
const ACCESS_FS_READ_FILE: u64 = 1 << 2;
/// Everything that Landlock's first version can forbid.
const ACCESS_FS_ALL: u64 = (1 << 13) - 1;
const RULE_PATH_BENEATH: u32 = 1;

#[repr(C)]
struct RulesetAttr {
    handled_access_fs: u64,
}

#[repr(C, packed)]
struct PathBeneathAttr {
    allowed_access: u64,
    parent_fd: i32,
}

/// From now on this process may read and write files beneath `places` (folders or files) that it has the right to, and
/// open no others. Where the kernel has no Landlock this does nothing: what else confines the caller must then do.
pub fn only_beneath(places: &[BorrowedFd<'_>]) -> Result<(), SandboxError> {
    let attr = RulesetAttr { handled_access_fs: ACCESS_FS_ALL };
    // SAFETY: pointer and size are those of a live structure that the kernel copies.
    let made =
        unsafe { libc::syscall(libc::SYS_landlock_create_ruleset, &raw const attr, size_of::<RulesetAttr>(), 0u32) };
    if made < 0 {
        let error = io::Error::last_os_error();
        return match error.raw_os_error() {
            Some(libc::ENOSYS | libc::EOPNOTSUPP) => Ok(()),
            _ => Err(SandboxError::Step { step: "landlock_create_ruleset", source: error }),
        };
    }
    // SAFETY: the call succeeded, so this is a descriptor that nobody else owns.
    let rules = unsafe { OwnedFd::from_raw_fd(made as i32) };
    for place in places {
        let rule = PathBeneathAttr {
            allowed_access: ACCESS_FS_READ_FILE | ACCESS_FS_WRITE_FILE,
            parent_fd: place.as_raw_fd(),
        };
        // SAFETY: the pointer is to a live structure of the type that the rule type names; the kernel copies it.
        let added = unsafe {
            libc::syscall(
                libc::SYS_landlock_add_rule,
                rules.as_fd().as_raw_fd(),
                RULE_PATH_BENEATH,
                &raw const rule,
                0u32,
            )
        };
        step("landlock_add_rule", added)?;
    }
    super::process::no_new_privs()?;
    // SAFETY: the call takes a descriptor and a number.
    let closed = unsafe { libc::syscall(libc::SYS_landlock_restrict_self, rules.as_raw_fd(), 0u32) };
    step("landlock_restrict_self", closed)
}
