//! The measured host's own programs, as the binary `fealty-host`: the TPM service and the measuring of layers.
//!
//! | module | what it holds |
//! | --- | --- |
//! | [`cli`] | the command line |
//! | [`service`] | the TPM service: one process a host that owns TPM, logs, PCR 14 and wrap key |
//! | [`measure`] | measures layers through the service |
//! | [`runtime`] | the folder in which the service of one TPM keeps its lock, socket, layer log and state |
//!
//! Nothing here holds a key of a VM: of a bundle the service sees one layer's ECDH value, which opens nothing alone.

pub mod cli;
#[doc(hidden)]
pub mod fuzz;
pub mod measure;
pub mod runtime;
pub mod service;
