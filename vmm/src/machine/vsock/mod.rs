//! Sockets between guest and host (virtio 1.3, 5.10): [`VsockDevice`] is what the guest sees, its worker carries bytes between
//! the queues and clients of one unix socket of the host. Whoever connects there says first, in one line, what for:
//!
//! ```text
//! client ─► CONNECT 1234\n    the guest must listen on port 1234      ◄─ OK 1073741824\n once it has accepted
//! client ─► LISTEN 1234\n     for one connection of the guest to 1234 ◄─ OK 40000\n     once it comes, with its own port
//! ```
//!
//! CONNECT is Firecracker's and Cloud Hypervisor's. They connect to a path for each port that a guest names; here no path is
//! opened once the sandbox is closed, so whoever serves such a port connects and waits. A line with anything else, and a
//! connection that nobody takes, end the client's connection.

mod connection;
mod counters;
mod device;
#[doc(hidden)]
pub mod fuzz;
mod greeting;
mod packet;
mod worker;

pub use counters::VsockCounters;
pub use device::VsockDevice;
