//! The provider, driven over TLS as hosts and administrators drive it: real programs, hosts with TPMs of software keys.
//! Tests of attacks bear the numbers of the list of attacks in their names.

mod attacks;
mod durability;
mod gate;
mod ima;
mod limits;
mod operations;
mod power_on;
mod support;
mod volume_operations;
mod volumes;
