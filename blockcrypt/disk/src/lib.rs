//! Servers that lend a volume to programs that know nothing of it: over NBD on a unix socket, and as the back end of a
//! virtual machine's disk over vhost-user. The tool, `fealty-disk`, is built on them.
//!
//! They are a package of their own so that the virtual machine monitor, which has a `Volume` in its own process, links neither
//! a server nor the vhost crates.
//!
//! | module | what it holds |
//! | --- | --- |
//! | `disk` | what is lent |
//! | `socket` | a unix socket that only its owner can connect to, and that goes when the server goes |
//! | [`nbd`] | the NBD protocol |
//! | [`vhost_user`] | the vhost-user protocol, and virtio queues |
//! | [`bench`] | what a volume does on this machine |

pub mod bench;
mod disk;
#[doc(hidden)]
pub mod fuzz;
pub mod nbd;
mod socket;
pub mod vhost_user;

pub use disk::{Disk, Fault};
pub use socket::{Socket, SocketError};
