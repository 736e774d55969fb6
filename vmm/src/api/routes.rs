//! Paths and bodies: from a request to an operation, and from its outcome to an answer.

use super::http::{Method, Request};
use crate::operations::{OperationError, Operations};
use policy::Operation;
use policy::config::{DiskShape, FileName, RateLimiterConfig, one_queue, queue_size};
use serde::Deserialize;
use serde_json::{Value, json};
use std::fs::File;
use std::os::fd::OwnedFd;

/// The answer to `request`: status and JSON body.
pub(super) fn route(
    request: &Request,
    descriptor: Option<OwnedFd>,
    operations: Option<&Operations>,
) -> (u16, Option<String>) {
    let path = request.path.strip_prefix("/api/v1/").unwrap_or_default();
    match (request.method, path) {
        (Method::Get, "vmm.ping") => ok(&ping()),
        (Method::Get, "vm.info") => match operations.map(Operations::info) {
            None => ok(&json!({ "state": "Created" })),
            Some(Ok(info)) => ok(&info),
            Some(Err(error)) => failed(&error),
        },
        (Method::Get, "vm.counters") => ok(&operations.map_or_else(|| json!({}), Operations::counters)),
        (Method::Get, "fealty/status") => ok(&operations.map_or_else(starting, Operations::status)),
        (Method::Put, "vm.resize") => resize(&request.body, operations),
        (Method::Put, "vm.resize-disk") => resize_disk(&request.body, operations),
        (Method::Put, "vm.add-disk") => add_disk(&request.body, descriptor, operations),
        (Method::Put, "vm.remove-device") => remove_device(&request.body, operations),
        (Method::Put, path) => match operation(path) {
            None => refused(404, "this VM has no such operation"),
            Some(_) if operations.is_none() => refused(409, "the VM does not run yet"),
            Some(operation) => perform(operation, descriptor, operations),
        },
        _ => refused(404, "there is nothing here; see the control socket's paths in the manual"),
    }
}

/// `vm.resize`, in Cloud Hypervisor's shape; of what it can resize, the balloon alone.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Resize {
    /// Bytes that the guest is to put into its balloon.
    desired_balloon: u64,
}

fn resize(body: &[u8], operations: Option<&Operations>) -> (u16, Option<String>) {
    let Some(operations) = operations else { return refused(409, "the VM does not run yet") };
    match serde_json::from_slice::<Resize>(body) {
        Err(_) => refused(400, "the body is {\"desired_balloon\": BYTES}; vCPUs and memory keep their size"),
        Ok(Resize { desired_balloon }) => match operations.resize_balloon(desired_balloon) {
            Ok(()) => (204, None),
            Err(error) => failed(&error),
        },
    }
}

/// `vm.resize-disk`, in Cloud Hypervisor's shape.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ResizeDisk {
    id: String,
    /// Bytes: of an unprotected VM, that the file has by now; of a protected one, that the volume is to have.
    desired_size: Option<u64>,
}

fn resize_disk(body: &[u8], operations: Option<&Operations>) -> (u16, Option<String>) {
    let Some(operations) = operations else { return refused(409, "the VM does not run yet") };
    match serde_json::from_slice::<ResizeDisk>(body) {
        Err(_) => refused(400, "the body is {\"id\": DISK} and, if you like, \"desired_size\" in bytes"),
        Ok(ResizeDisk { id, desired_size }) => match operations.resize_disk(&id, desired_size) {
            Ok(size) => ok(&json!({ "id": id, "size": size })),
            Err(error) => failed(&error),
        },
    }
}

/// `vm.add-disk`: a disk as a configuration has it, but for the path: the image is the descriptor beside the request.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct AddDisk {
    id: FileName,
    #[serde(default)]
    readonly: bool,
    num_queues: Option<u16>,
    queue_size: Option<u16>,
    serial: Option<String>,
    rate_limiter_config: Option<RateLimiterConfig>,
}

fn add_disk(body: &[u8], descriptor: Option<OwnedFd>, operations: Option<&Operations>) -> (u16, Option<String>) {
    let Some(operations) = operations else { return refused(409, "the VM does not run yet") };
    let Ok(disk) = serde_json::from_slice::<AddDisk>(body) else {
        return refused(
            400,
            "the body is {\"id\": DISK} and, if you like, \"readonly\", \"num_queues\", \"queue_size\", \"serial\" and \
             \"rate_limiter_config\"; the image comes as a descriptor",
        );
    };
    let shape = DiskShape {
        id: &disk.id,
        readonly: disk.readonly,
        num_queues: disk.num_queues.unwrap_or_else(one_queue),
        queue_size: disk.queue_size.unwrap_or_else(queue_size),
        serial: disk.serial.as_deref(),
        rate_limiter: disk.rate_limiter_config,
    };
    if let Err(error) = shape.check() {
        return refused(400, &error.to_string());
    }
    let Some(descriptor) = descriptor else {
        return refused(
            400,
            "this process opens no paths: the image comes as a descriptor beside its request (fealty ctl)",
        );
    };
    match operations.add_disk(&shape, descriptor) {
        Ok(address) => ok(&json!({ "id": disk.id, "bdf": address })),
        Err(error) => failed(&error),
    }
}

/// `vm.remove-device`, in Cloud Hypervisor's shape; of what it can remove, disks that were added.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RemoveDevice {
    id: String,
}

fn remove_device(body: &[u8], operations: Option<&Operations>) -> (u16, Option<String>) {
    let Some(operations) = operations else { return refused(409, "the VM does not run yet") };
    match serde_json::from_slice::<RemoveDevice>(body) {
        Err(_) => refused(400, "the body is {\"id\": DISK}"),
        Ok(RemoveDevice { id }) => match operations.remove_disk(&id) {
            Ok(()) => (204, None),
            Err(error) => failed(&error),
        },
    }
}

fn operation(path: &str) -> Option<Result<Operation, &'static str>> {
    match path {
        "vm.pause" => Some(Ok(Operation::Pause)),
        "vm.resume" => Some(Ok(Operation::Resume)),
        "vm.power-button" => Some(Ok(Operation::PowerButton)),
        "vm.shutdown" | "vmm.shutdown" => Some(Ok(Operation::Shutdown)),
        "fealty/vm.coredump" => Some(Ok(Operation::CoreDump)),
        "vm.coredump" => Some(Err(
            "this process opens no paths: a core dump goes into a descriptor, by PUT /api/v1/fealty/vm.coredump (fealty ctl)",
        )),
        _ => None,
    }
}

fn perform(
    operation: Result<Operation, &'static str>,
    descriptor: Option<OwnedFd>,
    operations: Option<&Operations>,
) -> (u16, Option<String>) {
    let Some(operations) = operations else { return refused(409, "the VM does not run yet") };
    match (operation, descriptor) {
        (Err(why), _) => refused(400, why),
        (Ok(Operation::CoreDump), None) => refused(400, "a core dump needs a descriptor beside its request"),
        (Ok(Operation::CoreDump), Some(to)) => match operations.core_dump(File::from(to)) {
            Ok(done) => ok(&json!({ "attestation": done.attestation, "bytes": done.bytes, "tag": done.tag })),
            Err(error) => failed(&error),
        },
        (Ok(operation), _) => match operations.free(operation) {
            Ok(()) => (204, None),
            Err(error) => failed(&error),
        },
    }
}

fn ping() -> Value {
    json!({
        "build_version": env!("CARGO_PKG_VERSION"),
        "version": env!("CARGO_PKG_VERSION"),
        "pid": std::process::id(),
        "features": ["fealty"],
    })
}

fn starting() -> Value {
    json!({ "state": "starting" })
}

fn ok(body: &Value) -> (u16, Option<String>) {
    (200, Some(body.to_string()))
}

fn refused(status: u16, why: &str) -> (u16, Option<String>) {
    (status, Some(problem(status, why)))
}

fn failed(error: &OperationError) -> (u16, Option<String>) {
    let status = error.status();
    refused(status, &crate::exit::one_line(&crate::exit::chain(error)))
}

/// A problem document.
pub(super) fn problem(status: u16, title: &str) -> String {
    json!({ "type": "about:blank", "title": title, "status": status }).to_string()
}
