//! What root tries to get at a key, from another process and from this one. Each test first shows that the same technique
//! does read an ordinary canary of the same process.
//!
//! Where a control fails, look at `kernel.yama.ptrace_scope`: with 3 nobody traces anything, and these tests can't tell
//! which of the two walls held.
#![allow(unsafe_code)]

mod techniques;
mod victim;

use crate::region::{Protection, best_protection};
use crate::{Secret, overlaps};
use std::io;
use techniques::{Bytes, Technique};
use victim::{Victim, canary_bytes, fill_with_key, holds, key_bytes};

/// The protections that this kernel offers.
pub(crate) fn offered() -> Vec<Protection> {
    let all = vec![Protection::MemfdSecret, Protection::Mlock];
    if has_memfd_secret() { all } else { all[1..].to_vec() }
}

/// Attacks on `memfd_secret` pages can't be tried on a kernel without it, which is said, not hidden.
fn has_memfd_secret() -> bool {
    let there = matches!(best_protection(), Ok(Protection::MemfdSecret));
    if !there {
        eprintln!("NOT TESTED: this kernel has no memfd_secret (secretmem.enable=1 on the command line of older ones)");
    }
    there
}

/// The technique reads the canary at `canary`, and of the key at `key` nothing.
fn reads_canary_but_not_key(technique: Technique, pid: libc::pid_t, canary: usize, key: usize) {
    assert_eq!(technique(pid, canary).expect("the control: this technique works here"), canary_bytes());
    let got = technique(pid, key);
    assert!(got.is_err(), "root read {got:?} of a key");
    assert_eq!(technique(pid, canary).expect("the control, again"), canary_bytes());
}

fn from_another_process(technique: Technique) {
    if has_memfd_secret() {
        let victim = Victim::start(Protection::MemfdSecret);
        reads_canary_but_not_key(technique, victim.pid(), victim.canary, victim.key);
    }
}

fn from_this_process(technique: Technique) {
    if has_memfd_secret() {
        let mut key = Secret::<32>::zeroed().expect("room");
        fill_with_key(key.expose_mut());
        let canary = Box::new(canary_bytes());
        let pid = libc::pid_t::try_from(std::process::id()).expect("a pid");
        reads_canary_but_not_key(technique, pid, canary.as_ptr().addr(), key.expose().as_ptr().addr());
        assert_eq!(*key.expose(), key_bytes());
    }
}

#[test]
fn process_vm_readv_reads_no_key() {
    from_another_process(techniques::process_vm_readv);
    from_this_process(techniques::process_vm_readv);
}

#[test]
fn proc_pid_mem_reads_no_key() {
    from_another_process(techniques::proc_mem);
    from_this_process(techniques::proc_mem);
}

#[test]
fn ptrace_reads_no_key() {
    from_another_process(techniques::ptrace_peek);
}

#[test]
fn map_files_opens_no_key() {
    if has_memfd_secret() {
        let victim = Victim::start(Protection::MemfdSecret);
        reads_canary_but_not_key(techniques::map_files, victim.pid(), victim.shared_canary, victim.key);
    }
}

/// The fallback hides nothing from root who may trace; were this to fail, its documentation would be wrong.
#[test]
fn the_fallback_is_readable_by_root_as_documented() {
    let victim = Victim::start(Protection::Mlock);
    for technique in [techniques::process_vm_readv, techniques::proc_mem, techniques::ptrace_peek] {
        assert_eq!(technique(victim.pid(), victim.key).expect("readable"), key_bytes());
    }
}

#[test]
fn pidfd_getfd_finds_no_descriptor_of_a_key() {
    if !has_memfd_secret() {
        return;
    }
    let victim = Victim::start(Protection::MemfdSecret);
    let found = techniques::stolen_descriptors(victim.pid()).expect("the control: descriptors can be taken here");
    let with = |wanted: Bytes| found.iter().filter(|content| holds(content, &wanted)).count();
    assert_eq!(with(canary_bytes()), 1, "the control: a memfd_secret left open is taken and read");
    assert_eq!(with(key_bytes()), 0);
}

#[test]
fn a_forked_child_has_no_key() {
    for protection in offered() {
        let key = Secret::<32>::zeroed_in(crate::arena::Arena::with_protection(protection)).expect("room");
        let canary = Box::new(canary_bytes());
        assert_eq!(techniques::child_reads(canary.as_ptr()), Ok(()), "the control: a child has its parent's memory");
        assert_eq!(techniques::child_reads(key.expose().as_ptr()), Err(libc::EFAULT));
    }
}

#[test]
fn guard_pages_stop_on_both_sides() {
    for protection in offered() {
        let region = crate::region::Region::map(1, protection).expect("room");
        let (start, len) = (region.start().as_ptr(), region.len());
        assert_eq!(techniques::kernel_reads(start.cast_const()), Ok(()), "the control: the pages themselves are there");
        assert_eq!(techniques::kernel_reads(start.wrapping_add(len - 1)), Ok(()));
        for guard in [start.wrapping_sub(1), start.wrapping_add(len)] {
            assert_eq!(techniques::kernel_reads(guard.cast_const()), Err(libc::EFAULT));
            assert!(overlaps(guard, 1));
        }
    }
}

#[test]
fn keys_are_locked_not_dumped_and_not_inherited() {
    for protection in offered() {
        let victim = Victim::start(protection);
        let flags = |address| techniques::mapping_flags(victim.pid(), address).expect("smaps");
        let (key, canary) = (flags(victim.key), flags(victim.canary));
        for (flag, meaning) in [("lo", "locked"), ("dd", "not dumped"), ("dc", "not copied on fork")] {
            assert!(key.iter().any(|f| f == flag), "{protection:?}: the key's pages are {meaning}: {key:?}");
            assert!(!canary.iter().any(|f| f == flag), "the control: ordinary pages are not {meaning}: {canary:?}");
        }
    }
}

/// The process is made dumpable again and its filter takes every kind of page, so that only the pages' own protection counts.
#[test]
fn a_core_dump_holds_no_key() {
    if !cores_come_as_files() {
        return;
    }
    for protection in offered() {
        let core = Victim::start(protection).dump_core(false).expect("the control: this process dumps core");
        assert!(holds(&core, &canary_bytes()), "the control: the core holds ordinary memory");
        assert!(!holds(&core, &key_bytes()), "{protection:?}: the core holds the key");
    }
}

#[test]
fn a_hardened_process_dumps_no_core() {
    if cores_come_as_files() {
        assert!(Victim::start(Protection::Mlock).dump_core(false).is_some(), "the control: without it there is a core");
    }
    assert!(Victim::start(Protection::Mlock).dump_core(true).is_none());
}

/// Whether `kernel.core_pattern` names a file in the working folder. Where a program takes the cores, what is left is the
/// page flags, which `keys_are_locked_not_dumped_and_not_inherited` checks.
fn cores_come_as_files() -> bool {
    let pattern = std::fs::read_to_string("/proc/sys/kernel/core_pattern").unwrap_or_default();
    let here = !pattern.trim().is_empty() && !pattern.starts_with('|') && !pattern.contains('/');
    if !here {
        eprintln!(
            "NOT TESTED with a real core: kernel.core_pattern is {:?}; only the pages' flags were",
            pattern.trim()
        );
    }
    here
}

#[test]
fn running_out_of_locked_memory_is_an_error_and_passes() {
    for protection in offered() {
        Victim::starve(protection);
    }
}

#[test]
fn the_fallback_makes_the_process_undumpable() {
    let _key = Secret::<32>::zeroed_in(crate::arena::Arena::with_protection(Protection::Mlock)).expect("room");
    // SAFETY: this prctl only reads one flag of the process.
    assert_eq!(unsafe { libc::prctl(libc::PR_GET_DUMPABLE) }, 0, "{}", io::Error::last_os_error());
}
