//! The customer's key provider and tool: everything behind the binary `fealty-keys`.
//!
//! The provider is the one party that decides whether a VM may run. It keeps the customer's keys wrapped under a master
//! key, knows the TPMs of the hosts, and answers a host that has proved what software it runs with a key bundle that only
//! that VM process on that host opens. It writes down what it does before it does it.
//!
//! | module | what it holds |
//! | --- | --- |
//! | [`provider`] | the provider as one value: database, keys, clock, open challenges |
//! | [`server`] | TLS, connections, the gate before every route, problem documents |
//! | [`attestation`] | the way of a key: challenge, verdict, release |
//! | [`instance`] | what a running VM process may do: report, move its volumes' anchors forward |
//! | [`admin`] | what the customer's people may do |
//! | [`store`] | the database: one writer, durable before anything is answered |
//! | [`keystore`] | the master key and what is wrapped under it |
//! | [`authority`] | the certificate authorities of the provider: one for itself, one for its administrators |
//! | [`clock`], [`bounds`] | the time that leases are counted in; how much one party may write a minute |
//! | [`api`] | bodies of the administrators' HTTP API |
//! | [`client`], [`cli`] | the customer's tool |

pub mod admin;
pub mod api;
pub mod attestation;
pub mod authority;
pub mod bounds;
pub mod cli;
pub mod client;
pub mod clock;
#[doc(hidden)]
pub mod fuzz;
pub mod instance;
pub mod keystore;
pub mod provider;
pub mod server;
pub mod store;
