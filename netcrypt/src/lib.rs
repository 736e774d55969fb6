//! The encrypted link layer: Ethernet frames between two VMs of one customer, sealed by the sending VM process and opened
//! by the receiving one. What lies between them sees sizes and times.
//!
//! This package turns frames into packets and back under keys that a session gives it; who the peers are, how a session is
//! agreed, and how frames reach the guest are not its business.
//!
//! | module | what it holds |
//! | --- | --- |
//! | [`packet`] | the packet format: header, what the sender's card left undone, limits |
//! | [`key`] | a session's secret into one key for each direction |
//! | [`seal`] | frames into packets; numbers that never repeat, and when a key is used up |
//! | [`open`] | packets into frames, each once |
//! | [`window`] | which packet numbers were seen |
//!
//! ```
//! # use fealty_netcrypt as netcrypt;
//! use netcrypt::{Binding, Offload, Opener, Role, Sealer};
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let session = secretmem::Secret::random()?;
//! let binding = Binding { network: 7, phase: 0, key_id: 0x1234_5678 };
//! let sealer = Sealer::new(&session, Role::Initiator, binding, 0)?;
//! let opener = Opener::new(&session, Role::Initiator, binding)?;
//!
//! let mut packet = vec![0; netcrypt::sealed_len(60)];
//! sealer.seal(3, &Offload::default(), &[1; 60], 1_000, &mut packet)?;
//! let opened = opener.open(&mut packet)?;
//! assert_eq!((opened.queue, &*opened.frame), (3, &[1; 60][..]));
//! # Ok(())
//! # }
//! ```

pub mod fuzz;
pub mod key;
pub mod open;
pub mod packet;
pub mod seal;
pub mod window;

pub use key::{Binding, KeyError, Role};
pub use open::{OpenError, Opened, Opener};
pub use packet::{Header, MAX_FRAME, MIN_FRAME, OVERHEAD, Offload, PacketError, PacketNumber, sealed_len};
pub use seal::{SealError, Sealer};
