//! Ways to read another process's memory. Each returns 32 bytes or the kernel's refusal.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::FileExt;

pub(super) type Bytes = [u8; 32];
pub(super) type Technique = fn(libc::pid_t, usize) -> io::Result<Bytes>;

pub(super) fn process_vm_readv(pid: libc::pid_t, address: usize) -> io::Result<Bytes> {
    let mut bytes = [0; 32];
    let local = libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: 32 };
    let remote = libc::iovec { iov_base: std::ptr::without_provenance_mut(address), iov_len: 32 };
    // SAFETY: the local vector names `bytes`, which lives and is ours to write; the remote one is the kernel's to check.
    let got = unsafe { libc::process_vm_readv(pid, &local, 1, &remote, 1, 0) };
    if got == 32 { Ok(bytes) } else { Err(io::Error::last_os_error()) }
}

pub(super) fn proc_mem(pid: libc::pid_t, address: usize) -> io::Result<Bytes> {
    let mut bytes = [0; 32];
    File::open(format!("/proc/{pid}/mem"))?.read_exact_at(&mut bytes, address as u64)?;
    Ok(bytes)
}

pub(super) fn ptrace_peek(pid: libc::pid_t, address: usize) -> io::Result<Bytes> {
    ptrace(libc::PTRACE_SEIZE, pid, 0)?;
    ptrace(libc::PTRACE_INTERRUPT, pid, 0)?;
    let mut status = 0;
    // SAFETY: `status` lives and is ours to write.
    if unsafe { libc::waitpid(pid, &mut status, libc::__WALL) } != pid || !libc::WIFSTOPPED(status) {
        return Err(io::Error::other("the victim did not stop"));
    }
    let mut bytes = [0; 32];
    let mut read = || -> io::Result<()> {
        for (n, chunk) in bytes.chunks_exact_mut(8).enumerate() {
            chunk.copy_from_slice(&ptrace(libc::PTRACE_PEEKDATA, pid, address + 8 * n)?.to_ne_bytes());
        }
        Ok(())
    };
    let result = read();
    ptrace(libc::PTRACE_DETACH, pid, 0)?;
    result.map(|()| bytes)
}

fn ptrace(request: libc::c_uint, pid: libc::pid_t, address: usize) -> io::Result<libc::c_long> {
    // SAFETY: errno is this thread's own; the requests used here write nothing into this process.
    unsafe {
        *libc::__errno_location() = 0;
        let got = libc::ptrace(request, pid, address, 0_usize);
        if got == -1 && *libc::__errno_location() != 0 { Err(io::Error::last_os_error()) } else { Ok(got) }
    }
}

/// Opens the file behind a mapping, as root can even after its descriptor is closed.
pub(super) fn map_files(pid: libc::pid_t, address: usize) -> io::Result<Bytes> {
    let maps = std::fs::read_to_string(format!("/proc/{pid}/maps"))?;
    let (range, start, _) = maps
        .lines()
        .filter_map(|line| parse_range(line))
        .find(|(_, start, end)| (*start..*end).contains(&address))
        .ok_or_else(|| io::Error::other("no such mapping"))?;
    let file = File::open(format!("/proc/{pid}/map_files/{range}"))?;
    let mut bytes = [0; 32];
    file.read_exact_at(&mut bytes, (address - start) as u64)?;
    Ok(bytes)
}

fn parse_range(line: &str) -> Option<(&str, usize, usize)> {
    let range = line.split(' ').next()?;
    let (start, end) = range.split_once('-')?;
    Some((range, usize::from_str_radix(start, 16).ok()?, usize::from_str_radix(end, 16).ok()?))
}

/// Every descriptor of the process, taken with pidfd_getfd, and the first page of whatever of them can be mapped.
pub(super) fn stolen_descriptors(pid: libc::pid_t) -> io::Result<Vec<Vec<u8>>> {
    let pidfd = descriptor(|| {
        // SAFETY: pidfd_open takes numbers only.
        unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) }
    })?;
    let mut contents = Vec::new();
    for entry in std::fs::read_dir(format!("/proc/{pid}/fd"))? {
        let number: i32 = entry?.file_name().to_string_lossy().parse().map_err(io::Error::other)?;
        let stolen = descriptor(|| {
            // SAFETY: pidfd_getfd takes numbers only.
            unsafe { libc::syscall(libc::SYS_pidfd_getfd, pidfd.as_raw_fd(), number, 0) }
        })?;
        contents.extend(first_page(&stolen));
    }
    Ok(contents)
}

fn descriptor(call: impl FnOnce() -> libc::c_long) -> io::Result<OwnedFd> {
    let fd = call();
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel just made this descriptor for the caller, and it fits.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

fn first_page(fd: &OwnedFd) -> Option<Vec<u8>> {
    // A page past the end of a file would be a SIGBUS; pipes and devices have size 0.
    let size = File::from(fd.try_clone().ok()?).metadata().ok()?.len();
    if size < 4096 {
        return None;
    }
    // SAFETY: a new read-only mapping where the kernel likes; the file has the page (see above) and its owner keeps it while
    // it waits for this process; it is copied and unmapped here.
    unsafe {
        let page = libc::mmap(std::ptr::null_mut(), 4096, libc::PROT_READ, libc::MAP_SHARED, fd.as_raw_fd(), 0);
        if page == libc::MAP_FAILED {
            return None;
        }
        let copy = std::slice::from_raw_parts(page.cast::<u8>(), 4096).to_vec();
        libc::munmap(page, 4096);
        Some(copy)
    }
}

/// Flags of the mapping around `address` (proc_pid_smaps(5), VmFlags).
pub(super) fn mapping_flags(pid: libc::pid_t, address: usize) -> io::Result<Vec<String>> {
    let smaps = std::fs::read_to_string(format!("/proc/{pid}/smaps"))?;
    let mut inside = false;
    for line in smaps.lines() {
        if let Some((_, start, end)) = parse_range(line) {
            inside = (start..end).contains(&address);
        } else if let (true, Some(flags)) = (inside, line.strip_prefix("VmFlags:")) {
            return Ok(flags.split_whitespace().map(String::from).collect());
        }
    }
    Err(io::Error::other("no such mapping"))
}

/// Whether the kernel can read the byte at `address` for this process: Ok, or the errno.
pub(super) fn kernel_reads(address: *const u8) -> Result<(), i32> {
    let (_keep_open, to) = io::pipe().expect("a pipe");
    write_one(to.as_raw_fd(), address)
}

fn write_one(fd: i32, address: *const u8) -> Result<(), i32> {
    // SAFETY: write only reads, and checks the address itself: a bad one is EFAULT.
    let wrote = unsafe { libc::write(fd, address.cast(), 1) };
    if wrote == 1 { Ok(()) } else { Err(io::Error::last_os_error().raw_os_error().unwrap_or(-1)) }
}

/// The same, asked by a forked child of this process.
pub(super) fn child_reads(address: *const u8) -> Result<(), i32> {
    let (_keep_open, to) = io::pipe().expect("a pipe");
    let fd = to.as_raw_fd();
    // SAFETY: the child of this threaded process makes two system calls (write, _exit) and touches no lock or heap.
    let status = unsafe {
        let child = libc::fork();
        if child == 0 {
            libc::_exit(write_one(fd, address).err().unwrap_or(0));
        }
        let mut status = 0;
        assert_eq!(libc::waitpid(child, &mut status, 0), child);
        status
    };
    assert!(libc::WIFEXITED(status));
    match libc::WEXITSTATUS(status) {
        0 => Ok(()),
        errno => Err(errno),
    }
}
