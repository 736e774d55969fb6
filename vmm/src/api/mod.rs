//! The control socket: HTTP over a unix socket with Cloud Hypervisor's paths for what it has, so that its clients work;
//! what is ours alone lies under `/api/v1/fealty/`.
//!
//! ```text
//! GET  /api/v1/vmm.ping               PUT  /api/v1/vm.pause          PUT  /api/v1/vm.power-button
//! GET  /api/v1/vm.info                PUT  /api/v1/vm.resume         PUT  /api/v1/vm.shutdown
//! GET  /api/v1/vm.counters            PUT  /api/v1/vm.resize         PUT  /api/v1/vm.resize-disk
//! PUT  /api/v1/vm.add-disk            with a descriptor (SCM_RIGHTS) beside the first byte: the image of an unprotected VM's new disk
//! PUT  /api/v1/vm.remove-device       asks the guest to let go of it
//! GET  /api/v1/fealty/status          lease, holds, reports that wait
//! PUT  /api/v1/fealty/vm.coredump     with a descriptor (SCM_RIGHTS) beside the first byte: the sealed dump goes there
//! ```
//!
//! Only the user who runs the VM, and root, may connect. Errors are problem documents (RFC 9457).

mod connection;
pub mod http;
mod routes;
mod server;

pub(crate) use server::listen;
pub use server::{Api, Socket};
