//! A TAP of the host (Linux' Documentation/networking/tuntap.rst), opened before the sandbox closes.
#![allow(unsafe_code)]

use super::Port;
use super::feature;
use super::header::HEADER;
use policy::device::InterfaceName;
use rustix::fs::{Mode, OFlags, open};
use rustix::net::{AddressFamily, SocketFlags, SocketType, netdevice, socket_with};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

const TUNSETIFF: libc::c_ulong = 0x4004_54ca;
const TUNSETOFFLOAD: libc::c_ulong = 0x4004_54d0;
const TUNSETVNETHDRSZ: libc::c_ulong = 0x4004_54d8;
const TUNSETQUEUE: libc::c_ulong = 0x4004_54d9;
const IFF_ATTACH_QUEUE: u16 = 0x0200;
const IFF_DETACH_QUEUE: u16 = 0x0400;
const TUN_F_CSUM: libc::c_ulong = 1;
const TUN_F_TSO4: libc::c_ulong = 2;
const TUN_F_TSO6: libc::c_ulong = 4;
const TUN_F_TSO_ECN: libc::c_ulong = 8;

/// An open TAP with one queue or several.
pub struct Tap {
    queues: Vec<OwnedFd>,
}

/// A TAP can't be used.
#[derive(Debug, thiserror::Error)]
pub enum TapError {
    /// There is none of this name. None is made: a name that was mistyped would get a TAP that leads nowhere.
    #[error(
        "there is no interface {0}; make it with: ip tuntap add {0} mode tap vnet_hdr (and multi_queue for more than one queue)"
    )]
    Missing(InterfaceName),
    /// No TUN driver.
    #[error("cannot open /dev/net/tun")]
    Driver(#[source] io::Error),
    /// Not a TAP, in use, of the wrong kind, or somebody else's.
    #[error(
        "cannot use {name} as a TAP with {queues} queue(s): it must be a TAP that nobody uses and this process may, made with multi_queue for more than one queue and without it for one"
    )]
    Attach {
        /// Which.
        name: InterfaceName,
        /// How many were wanted.
        queues: u16,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
}

impl Tap {
    /// Opens `queues` queues of the TAP called `name`.
    pub fn open(name: &InterfaceName, queues: u16) -> Result<Self, TapError> {
        let asks = socket_with(AddressFamily::UNIX, SocketType::DGRAM, SocketFlags::CLOEXEC, None)
            .map_err(|e| TapError::Driver(e.into()))?;
        netdevice::name_to_index(&asks, name.as_str()).map_err(|_| TapError::Missing(name.clone()))?;
        let open = |_| open_queue(name, queues);
        Ok(Self { queues: (0..queues).map(open).collect::<Result<_, _>>()? })
    }

    /// How many queues it has.
    pub fn queues(&self) -> u16 {
        self.queues.len() as u16
    }

    /// Its queues as ports.
    pub fn into_ports(self) -> Vec<Box<dyn Port>> {
        self.queues.into_iter().map(|fd| Box::new(TapQueue { fd, active: true }) as Box<dyn Port>).collect()
    }
}

fn open_queue(name: &InterfaceName, queues: u16) -> Result<OwnedFd, TapError> {
    let flags = OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let fd = open("/dev/net/tun", flags, Mode::empty()).map_err(|e| TapError::Driver(e.into()))?;
    let several = if queues > 1 { libc::IFF_MULTI_QUEUE } else { 0 };
    let mut request = request((libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR | several) as u16);
    // A name has at most 15 bytes, so the NUL stays.
    for (to, byte) in request.ifr_name.iter_mut().zip(name.as_str().bytes()) {
        *to = byte.cast_signed();
    }
    let length = HEADER as libc::c_int;
    // SAFETY: each pointer is to a live value of the type that the request names; the kernel writes no more than an ifreq.
    let done = unsafe {
        ioctl(&fd, TUNSETIFF, (&raw mut request).addr())
            .and_then(|()| ioctl(&fd, TUNSETVNETHDRSZ, (&raw const length).addr()))
    };
    done.map_err(|source| TapError::Attach { name: name.clone(), queues, source })?;
    Ok(fd)
}

/// One queue of a TAP.
struct TapQueue {
    fd: OwnedFd,
    active: bool,
}

impl Port for TapQueue {
    fn send(&mut self, frame: &[u8]) -> io::Result<()> {
        // A TAP takes a frame whole or not at all.
        rustix::io::write(&self.fd, frame).map(drop).map_err(Into::into)
    }

    fn receive(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        Ok(rustix::io::read(&self.fd, buffer)?)
    }

    fn offload(&mut self, features: u64) -> io::Result<()> {
        let bits = [
            (feature::GUEST_CSUM, TUN_F_CSUM),
            (feature::GUEST_TSO4, TUN_F_TSO4),
            (feature::GUEST_TSO6, TUN_F_TSO6),
            (feature::GUEST_ECN, TUN_F_TSO_ECN),
        ];
        // The kernel takes ECN with TSO, and TSO with checksums only; so does virtio (5.1.3.1).
        let missing = match features {
            _ if features & feature::GUEST_CSUM == 0 => u64::MAX,
            _ if features & (feature::GUEST_TSO4 | feature::GUEST_TSO6) == 0 => feature::GUEST_ECN,
            _ => 0,
        };
        let wanted =
            bits.iter().filter(|(bit, _)| features & bit & !missing != 0).map(|(_, tun)| tun).sum::<libc::c_ulong>();
        // SAFETY: the argument is a number.
        unsafe { ioctl(&self.fd, TUNSETOFFLOAD, wanted as usize) }
    }

    fn set_active(&mut self, active: bool) -> io::Result<()> {
        if self.active == active {
            return Ok(());
        }
        let request = request(if active { IFF_ATTACH_QUEUE } else { IFF_DETACH_QUEUE });
        // SAFETY: the pointer is to a live ifreq, which the kernel reads.
        unsafe { ioctl(&self.fd, TUNSETQUEUE, (&raw const request).addr()) }?;
        self.active = active;
        Ok(())
    }
}

impl AsFd for TapQueue {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

fn request(flags: u16) -> libc::ifreq {
    libc::ifreq {
        ifr_name: [0; libc::IFNAMSIZ],
        ifr_ifru: libc::__c_anonymous_ifr_ifru { ifru_flags: flags.cast_signed() },
    }
}

/// # Safety
/// `argument` must be what `request` asks for: a number, or the address of a live value of the right type.
unsafe fn ioctl(fd: &OwnedFd, request: libc::c_ulong, argument: usize) -> io::Result<()> {
    // SAFETY: the descriptor is open; the argument is right by the caller's word.
    match unsafe { libc::ioctl(fd.as_raw_fd(), request, argument) } {
        0.. => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
