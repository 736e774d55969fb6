//! The virtual machine monitor that owes its loyalty to the customer, not to the cloud it runs in.
//!
//! `fealty run` reads a VM file once, proves its host to the customer's key provider, gets the VM's keys on a lease, and only
//! then starts a vCPU. One process per VM, synchronous: vCPU and disk threads, one thread that talks to the provider, one
//! that watches. Its sandbox is closed before a byte of a guest or of a network is read.
//!
//! | module | what it holds |
//! | --- | --- |
//! | [`cli`], [`commands`] | the command line; `fealty attest` and `fealty ctl` |
//! | [`run`] | `fealty run`: from a file to a guest that runs, and to its end |
//! | [`machine`] | the virtual machine itself, which knows nothing of providers |
//! | [`permit`], [`lease`], [`guard`] | leave to start vCPUs, and how long it lasts |
//! | [`provider`], [`registrar`] | the thread that talks to the key provider; reports; the way to the TPM service |
//! | [`volumes`], [`opener`], [`images`] | disks: volumes with released keys, files by descriptor, images |
//! | [`attach`] | where the host's side of a VM's networks is |
//! | [`operations`], [`dump`], [`core_file`], [`api`] | what can be done to a running VM, and the socket that asks for it |
//! | [`watch`], [`helm`], [`post`], [`signals`], [`console`] | the thread that watches, and what it watches |
//! | [`sandbox`] | system calls and everything else a process can give up |
//! | [`exit`], [`steps`] | exit codes, and the story as it happens |
//! | [`threads`], [`fuzz`] | how threads are started; parsers as fuzz targets |

pub mod api;
pub mod attach;
pub mod cli;
pub mod commands;
pub mod console;
pub mod core_file;
pub mod dump;
pub mod exit;
pub mod fuzz;
pub mod guard;
pub mod helm;
pub mod images;
pub mod lease;
pub mod machine;
pub mod opener;
pub mod operations;
pub mod permit;
pub mod post;
pub mod provider;
pub mod registrar;
pub mod run;
pub mod sandbox;
pub mod signals;
pub mod steps;
pub mod threads;
pub mod volumes;
pub mod watch;
