//! Why a vCPU left the guest, read from the page it shares with the kernel. `kvm-ioctls` does the same, but does not tell the
//! width of a port access, without which `rep outsb` and `out dx, eax` look alike.
#![allow(unsafe_code)]

use kvm_bindings::{
    KVM_EXIT_FAIL_ENTRY, KVM_EXIT_INTERNAL_ERROR, KVM_EXIT_IO, KVM_EXIT_IO_IN, KVM_EXIT_MEMORY_FAULT, KVM_EXIT_MMIO,
    KVM_EXIT_SHUTDOWN, KVM_EXIT_SYSTEM_EVENT, KVM_EXIT_UNKNOWN, kvm_run,
};
use kvm_ioctls::VcpuFd;

/// Bytes of the shared pages that the kernel fills for a port access: data lies in the second page.
const SHARED_SIZE: usize = 2 * 4096;

/// What to do for the guest.
pub(super) enum Exit<'a> {
    /// Read `data.len() / width` times from a port.
    PortIn { port: u16, width: usize, data: &'a mut [u8] },
    /// Write them.
    PortOut { port: u16, width: usize, data: &'a [u8] },
    /// Read memory that is no RAM.
    MemoryRead { address: u64, data: &'a mut [u8] },
    /// Write it.
    MemoryWrite { address: u64, data: &'a [u8] },
    /// Nothing: a signal.
    Interrupted,
    /// The guest can't go on; why.
    Fatal(String),
}

/// Enters the guest until it needs something.
pub(super) fn enter(vcpu: &mut VcpuFd) -> Exit<'_> {
    // The parsed form of the exit is dropped, so that what follows is the only borrow of the shared page.
    let entered = vcpu.run().map(|_| ());
    let reason = vcpu.get_kvm_run().exit_reason;
    match entered {
        Err(error) => match error.errno() {
            libc::EINTR | libc::EAGAIN => Exit::Interrupted,
            libc::EFAULT => Exit::Fatal("it touched memory that the host can't give it".into()),
            _ => Exit::Fatal(format!("KVM_RUN failed: {error}")),
        },
        Ok(()) => match reason {
            KVM_EXIT_IO => port(vcpu),
            KVM_EXIT_MMIO => memory(vcpu),
            _ => Exit::Fatal(describe(vcpu.get_kvm_run(), reason)),
        },
    }
}

fn port(vcpu: &mut VcpuFd) -> Exit<'_> {
    let run = vcpu.get_kvm_run();
    // SAFETY: the exit reason is KVM_EXIT_IO, for which the kernel fills this member.
    let io = unsafe { run.__bindgen_anon_1.io };
    let (width, length) = (usize::from(io.size), usize::from(io.size) * io.count as usize);
    let start = io.data_offset as usize;
    if width == 0 || start.checked_add(length).is_none_or(|end| end > SHARED_SIZE) {
        return Exit::Fatal("KVM described a port access that makes no sense".into());
    }
    // SAFETY: `run` begins the shared mapping, which KVM makes at least two pages long on x86 (checked when the vCPU was made)
    // and whose pages stay mapped while `vcpu` lives. The range was checked to lie inside. The borrow of `vcpu` in the result keeps
    // everyone else, the kernel included (it writes only during KVM_RUN), from it.
    let data = unsafe { std::slice::from_raw_parts_mut(std::ptr::from_mut(run).cast::<u8>().add(start), length) };
    if u32::from(io.direction) == KVM_EXIT_IO_IN {
        Exit::PortIn { port: io.port, width, data }
    } else {
        Exit::PortOut { port: io.port, width, data }
    }
}

fn memory(vcpu: &mut VcpuFd) -> Exit<'_> {
    // SAFETY: the exit reason is KVM_EXIT_MMIO, for which the kernel fills this member.
    let mmio = unsafe { &mut vcpu.get_kvm_run().__bindgen_anon_1.mmio };
    let (address, write) = (mmio.phys_addr, mmio.is_write != 0);
    match mmio.data.get_mut(..mmio.len as usize) {
        None | Some([]) => Exit::Fatal("KVM described a memory access that makes no sense".into()),
        Some(data) if write => Exit::MemoryWrite { address, data },
        Some(data) => Exit::MemoryRead { address, data },
    }
}

fn describe(run: &kvm_run, reason: u32) -> String {
    match reason {
        KVM_EXIT_SHUTDOWN => "triple fault".into(),
        KVM_EXIT_INTERNAL_ERROR => {
            // SAFETY: the kernel fills this member for this exit reason.
            let internal = unsafe { run.__bindgen_anon_1.internal };
            let what = match internal.suberror {
                1 => "an instruction that KVM can't emulate",
                2 => "an exception while another was delivered",
                3 => "an exit while an event was delivered",
                _ => "internal error",
            };
            format!("KVM internal error, suberror {}: {what}", internal.suberror)
        }
        KVM_EXIT_FAIL_ENTRY => {
            // SAFETY: the kernel fills this member for this exit reason.
            let fail = unsafe { run.__bindgen_anon_1.fail_entry };
            format!("the processor refused to enter the guest, reason {:#x}", fail.hardware_entry_failure_reason)
        }
        KVM_EXIT_SYSTEM_EVENT => {
            // SAFETY: the kernel fills this member for this exit reason.
            let event = unsafe { run.__bindgen_anon_1.system_event };
            format!("unexpected system event {}", event.type_)
        }
        KVM_EXIT_MEMORY_FAULT => "a memory fault that KVM can't resolve".into(),
        KVM_EXIT_UNKNOWN => {
            // SAFETY: the kernel fills this member for this exit reason.
            let hw = unsafe { run.__bindgen_anon_1.hw };
            format!("an exit that KVM does not know, hardware reason {:#x}", hw.hardware_exit_reason)
        }
        other => format!("unhandled exit, reason {other}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kvm_bindings::KVM_EXIT_HYPERCALL;

    #[test]
    fn every_exit_that_ends_a_vcpu_has_a_name_or_a_number() {
        let described = |reason, fill: fn(&mut kvm_run)| {
            let mut run = kvm_run::default();
            fill(&mut run);
            describe(&run, reason)
        };
        let internal = |run: &mut kvm_run| run.__bindgen_anon_1.internal.suberror = 3;
        let refused = |run: &mut kvm_run| run.__bindgen_anon_1.fail_entry.hardware_entry_failure_reason = 0x8000_0021;
        let unknown = |run: &mut kvm_run| run.__bindgen_anon_1.hw.hardware_exit_reason = 0x7f;
        let event = |run: &mut kvm_run| run.__bindgen_anon_1.system_event.type_ = 2;
        for (said, words) in [
            (described(KVM_EXIT_SHUTDOWN, |_| ()), "triple fault"),
            (described(KVM_EXIT_INTERNAL_ERROR, internal), "suberror 3: an exit while an event was delivered"),
            (described(KVM_EXIT_FAIL_ENTRY, refused), "reason 0x80000021"),
            (described(KVM_EXIT_SYSTEM_EVENT, event), "system event 2"),
            (described(KVM_EXIT_MEMORY_FAULT, |_| ()), "memory fault"),
            (described(KVM_EXIT_HYPERCALL, |_| ()), "unhandled exit, reason 3"),
            (described(KVM_EXIT_UNKNOWN, unknown), "hardware reason 0x7f"),
            (described(u32::MAX, |_| ()), "unhandled exit, reason 4294967295"),
        ] {
            assert!(said.contains(words), "{words:?} is not in {said:?}");
        }
    }
}
