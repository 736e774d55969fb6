//! `fealty ctl`: operations on a running VM, through its control socket.

use crate::api::http;
use crate::exit::{Exit, Failure, visible};
use crate::opener::{Access, open_path};
use crate::sandbox::{Filter, close_inherited, close_thread, descriptors};
use clap::Subcommand;
use serde_json::Value;
use std::fs::{File, OpenOptions};
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// The longest answer, in bytes.
const ANSWER_LIMIT: usize = 256 * 1024;

/// How long an answer may take: a core dump of a large guest takes its time.
const PATIENCE: Duration = Duration::from_secs(3600);

/// What to do.
#[derive(Subcommand, Clone, Debug)]
pub enum Action {
    /// Show what the VM is and how it stands
    Info,
    /// Pause the VM
    Pause,
    /// Let the VM go on after a pause
    Resume,
    /// Press the power button
    PowerButton,
    /// End the VM at once, its volumes flushed
    Shutdown,
    /// Tell the guest of an unprotected VM that a disk's file has another size now, or make a protected VM's volume larger; the
    /// latter needs the customer's permission
    ResizeDisk {
        /// The disk's name
        id: String,
        /// Bytes that it is to have: of a protected VM's volume, a multiple of 512
        #[arg(long, value_name = "BYTES")]
        size: Option<u64>,
    },
    /// Add a disk to an unprotected VM: a raw image or a block device
    AddDisk {
        /// The disk's name
        id: String,
        /// The image
        path: PathBuf,
        /// What it is besides
        #[command(flatten)]
        shape: Shape,
    },
    /// Ask the guest of an unprotected VM to let go of a disk that was added; it is gone when `info` does not show it any more
    RemoveDevice {
        /// The disk's name
        id: String,
    },
    /// Ask the guest of an unprotected VM to give memory back through its balloon, or to take it again
    ResizeBalloon {
        /// Bytes that the balloon is to hold: a multiple of 4096
        bytes: u64,
    },
    /// Write a core dump, sealed for the customer; needs the customer's permission
    Coredump {
        /// The file to make
        #[arg(long)]
        out: PathBuf,
    },
}

/// What a disk that is added is besides its image.
#[derive(clap::Args, Clone, Debug)]
pub struct Shape {
    /// The guest may not write
    #[arg(long)]
    readonly: bool,
    /// Queues, each served by a thread of its own: 1 to 16, by default one
    #[arg(long, value_name = "COUNT")]
    queues: Option<u16>,
    /// What the guest reads as its serial number: 1 to 20 printable ASCII characters, by default the disk's name
    #[arg(long, value_name = "TEXT")]
    serial: Option<String>,
    /// Bytes that may go through in a second
    #[arg(long, value_name = "BYTES")]
    bytes_per_second: Option<u64>,
    /// Requests that may go through in a second
    #[arg(long, value_name = "COUNT")]
    requests_per_second: Option<u64>,
}

impl Shape {
    /// The body of `vm.add-disk`.
    fn of_disk(&self, id: &str) -> Value {
        let each_second = |size: &u64| serde_json::json!({ "size": size, "refill_time": 1000 });
        let limits = serde_json::json!({
            "bandwidth": self.bytes_per_second.as_ref().map(each_second),
            "ops": self.requests_per_second.as_ref().map(each_second),
        });
        serde_json::json!({
            "id": id,
            "readonly": self.readonly,
            "num_queues": self.queues,
            "serial": self.serial,
            "rate_limiter_config": limits,
        })
    }
}

/// Does `action` on the VM behind `socket`.
pub fn run(socket: &Path, action: &Action, json: bool) -> Result<Exit, Failure> {
    close_inherited().map_err(|e| Failure::of(Exit::Host, &e))?;
    let stream = connect(socket)?;
    let file = match action {
        Action::Coredump { out } => Some((out, create(out)?)),
        Action::AddDisk { path, shape, .. } => Some((path, image(path, shape.readonly)?)),
        _ => None,
    };
    close_thread(Filter::Ctl).map_err(|e| Failure::of(Exit::Host, &e))?;
    let mut talk = Talk { stream };
    match action {
        Action::Info => {
            let info = talk.ask("GET", "vm.info", None)?;
            let status = talk.ask("GET", "fealty/status", None)?;
            let counters = talk.ask("GET", "vm.counters", None)?;
            let all = serde_json::json!({ "info": info, "status": status, "counters": counters });
            print(if json { all.to_string() } else { for_people(&all) });
        }
        Action::Pause => talk.done("vm.pause", "paused", json)?,
        Action::Resume => talk.done("vm.resume", "running", json)?,
        Action::PowerButton => talk.done("vm.power-button", "power button pressed", json)?,
        Action::Shutdown => talk.done("vm.shutdown", "ending", json)?,
        Action::ResizeDisk { id, size } => {
            let body = serde_json::json!({ "id": id, "desired_size": size }).to_string();
            let done = talk.send("PUT", "vm.resize-disk", &body, None)?;
            print(if json { done.to_string() } else { format!("{id} has {} bytes", done["size"]) });
        }
        Action::AddDisk { id, shape, .. } => {
            let Some((_, file)) = file else { return Ok(Exit::Internal) };
            let body = shape.of_disk(id).to_string();
            let done = talk.send("PUT", "vm.add-disk", &body, Some(&file))?;
            let address = done["bdf"].as_str().unwrap_or_default();
            print(if json { done.to_string() } else { format!("{id} is at {address}; the guest is told") });
        }
        Action::RemoveDevice { id } => {
            let body = serde_json::json!({ "id": id }).to_string();
            talk.send("PUT", "vm.remove-device", &body, None)?;
            let said = format!("the guest is asked to let go of {id}; it is there until it has");
            print(if json { serde_json::json!({ "done": said }).to_string() } else { said });
        }
        Action::ResizeBalloon { bytes } => {
            let body = serde_json::json!({ "desired_balloon": bytes }).to_string();
            talk.send("PUT", "vm.resize", &body, None)?;
            let said = format!("the guest is asked for {bytes} bytes");
            print(if json { serde_json::json!({ "done": said }).to_string() } else { said });
        }
        Action::Coredump { .. } => {
            let Some((path, file)) = file else { return Ok(Exit::Internal) };
            let done = talk.ask("PUT", "fealty/vm.coredump", Some(&file)).inspect_err(|_| {
                // What was not written whole opens nowhere. If it can't be removed, it stays.
                let _ = std::fs::remove_file(path);
            })?;
            let bytes = done["bytes"].as_u64().unwrap_or_default();
            print(if json {
                done.to_string()
            } else {
                format!("{bytes} bytes, sealed: {} (the customer opens it with fealty-keys dump open)", path.display())
            });
        }
    }
    Ok(Exit::Done)
}

fn connect(socket: &Path) -> Result<UnixStream, Failure> {
    let bad = |e: std::io::Error| {
        Failure::new(
            Exit::Host,
            format!("no VM answers at {}: {e}; give the path that --api-socket named", socket.display()),
        )
    };
    let stream = UnixStream::connect(socket).map_err(bad)?;
    stream.set_read_timeout(Some(PATIENCE)).map_err(bad)?;
    Ok(stream)
}

fn create(path: &Path) -> Result<File, Failure> {
    OpenOptions::new().write(true).create_new(true).mode(0o600).open(path).map_err(|e| {
        Failure::new(Exit::Host, format!("cannot make {}: {e}; an existing file is never overwritten", path.display()))
    })
}

fn image(path: &Path, read_only: bool) -> Result<File, Failure> {
    let access = if read_only { Access::ReadStore } else { Access::WriteStore };
    open_path(path, access).map_err(|why| Failure::new(Exit::Host, why))
}

struct Talk {
    stream: UnixStream,
}

impl Talk {
    fn done(&mut self, path: &str, said: &str, json: bool) -> Result<(), Failure> {
        self.ask("PUT", path, None)?;
        print(if json { serde_json::json!({ "done": said }).to_string() } else { said.into() });
        Ok(())
    }

    /// Sends one request without a body; its answer's body, `null` where it has none.
    fn ask(&mut self, method: &str, path: &str, descriptor: Option<&File>) -> Result<Value, Failure> {
        self.send(method, path, "", descriptor)
    }

    fn send(&mut self, method: &str, path: &str, body: &str, descriptor: Option<&File>) -> Result<Value, Failure> {
        let length = body.len();
        let request = format!("{method} /api/v1/{path} HTTP/1.1\r\nHost: vm\r\nContent-Length: {length}\r\n\r\n{body}");
        let gone = |e: std::io::Error| Failure::new(Exit::Host, format!("the VM process does not answer: {e}"));
        let descriptor = descriptor.map(AsFd::as_fd);
        descriptors::send(self.stream.as_fd(), request.as_bytes(), descriptor).map_err(gone)?;
        let mut bytes = Vec::new();
        let mut piece = [0; 4096];
        let (status, body) = loop {
            if let Some(answer) = http::parse_answer(&bytes).map_err(|e| Failure::of(Exit::Host, &e))? {
                break answer;
            }
            let (length, _) = descriptors::receive(self.stream.as_fd(), &mut piece).map_err(gone)?;
            if length == 0 || bytes.len() + length > ANSWER_LIMIT {
                return Err(gone(std::io::ErrorKind::UnexpectedEof.into()));
            }
            bytes.extend_from_slice(&piece[..length]);
        };
        let body: Value = serde_json::from_slice(&body).unwrap_or_default();
        if status < 400 {
            return Ok(body);
        }
        let title = body["title"].as_str().unwrap_or("the VM process refused");
        Err(Failure::new(exit(status), title))
    }
}

/// What an answer's status above 399 means for the exit code.
fn exit(status: u16) -> Exit {
    match status {
        503 => Exit::Unreachable,
        500.. => Exit::Host,
        _ => Exit::Refused,
    }
}

fn for_people(all: &Value) -> String {
    let status = &all["status"];
    let text = |value: &Value| value.as_str().map_or_else(|| value.to_string(), str::to_owned);
    let config = &all["info"]["config"];
    let mut lines = vec![format!("state: {} ({})", text(&all["info"]["state"]), text(&status["state"]))];
    if config.is_object() {
        let memory = config["memory"]["size"].as_u64().unwrap_or_default() >> 20;
        lines.push(format!("machine: {} vCPUs, {memory} MiB", config["cpus"]["boot_vcpus"]));
        for disk in config["disks"].as_array().into_iter().flatten() {
            let readonly = if disk["readonly"] == true { ", read only" } else { "" };
            lines.push(format!("disk: {}{readonly}", text(&disk["id"])));
        }
        for net in config["net"].as_array().into_iter().flatten() {
            lines.push(format!("network: {}, {} queues", text(&net["id"]), net["num_queues"]));
        }
        let others = ["rng", "console", "vsock", "balloon", "pvpanic"].into_iter().filter(|key| !config[key].is_null());
        let others: Vec<_> = others.collect();
        if !others.is_empty() {
            lines.push(format!("devices: {}", others.join(", ")));
        }
    }
    if status["protected"] == true {
        lines.push(format!("instance: {} of {}", status["instance"], text(&status["vm"])));
        lines.push(format!("lease: {} s left", status["lease_left_seconds"]));
        lines.push(format!("reports that wait: {}", status["reports_waiting"]));
    } else if status["protected"] == false {
        lines.push("unprotected: no key provider".into());
    }
    lines.join("\n")
}

fn print(text: String) {
    use std::io::Write;
    // None is cut: half an object is no JSON.
    let lines: String = text.lines().flat_map(|line| visible(line).chain(['\n'])).collect();
    // Whoever closed standard output does not want it.
    let _ = std::io::stdout().write_all(lines.as_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dump::DumpError;
    use crate::operations::OperationError;

    #[test]
    fn scripts_can_tell_a_provider_that_is_away_from_a_dump_that_failed() {
        let refused = |exit| OperationError::Refused(Failure::new(exit, "no"));
        for (error, expected) in [
            (OperationError::State("paused".into()), Exit::Refused),
            (refused(Exit::Refused), Exit::Refused),
            (refused(Exit::Unreachable), Exit::Unreachable),
            (refused(Exit::Tpm), Exit::Host),
            (DumpError::Write(std::io::ErrorKind::StorageFull.into()).into(), Exit::Host),
        ] {
            assert_eq!(exit(error.status()), expected, "{error}");
        }
    }
}
