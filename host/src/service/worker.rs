//! The thread that owns the [`Engine`], and how others reach it.

use super::engine::Engine;
use super::peers::Registration;
use super::refusal::Refusal;
use super::{Options, ServiceError};
use crate::runtime::State;
use attest::service::{Answer, Status, VmRequest};
use policy::Digest;
use policy::instance::EarlierPeer;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::Mutex;
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};
use std::thread::JoinHandle;
use std::time::Duration;

/// What the engine is asked to do.
pub(super) enum Work {
    /// A VM process's request.
    Vm(Box<VmRequest>, Registration, EarlierPeer),
    /// Measure a layer.
    Extend(String, String, Digest),
    /// Seal the log.
    Reseal,
    /// Say what it is; how many VM processes there are is the asker's knowledge.
    Status(u32),
}

/// The engine's thread.
#[derive(Debug)]
pub(super) struct Worker {
    jobs: Mutex<Option<Sender<Job>>>,
    thread: Mutex<Option<JoinHandle<()>>>,
    ended: UnixStream,
}

struct Job {
    work: Work,
    reply: SyncSender<Answer>,
}

impl Worker {
    /// Starts the thread and waits until TPM and logs are open.
    pub(super) fn start(options: &Options) -> Result<(Self, State), ServiceError> {
        let (jobs, queue) = channel();
        let (opened, ready) = sync_channel(1);
        let (alive, ended) = UnixStream::pair().map_err(|e| ServiceError::Os("a socket pair", e))?;
        let (tcti, ek, dir, logs) = (options.tcti.clone(), options.ek, options.dir.clone(), options.logs.clone());
        let thread = std::thread::Builder::new().name("tpm".into()).spawn(move || {
            // Closed when the thread ends, in whatever way.
            let _alive = alive;
            match Engine::start(&tcti, ek, &dir, &logs) {
                Ok((engine, state)) => {
                    if opened.send(Ok(state)).is_ok() {
                        run(engine, &queue);
                    }
                }
                Err(error) => {
                    let _ = opened.send(Err(error));
                }
            }
        });
        let thread = thread.map_err(|e| ServiceError::Os("a thread", e))?;
        let state = ready.recv_timeout(OPEN_TIME).map_err(|_| ServiceError::Silent(OPEN_TIME.as_secs()))??;
        Ok((Self { jobs: Mutex::new(Some(jobs)), thread: Mutex::new(Some(thread)), ended }, state))
    }

    /// Becomes readable when the thread ends.
    pub(super) fn ended(&self) -> BorrowedFd<'_> {
        self.ended.as_fd()
    }

    /// Has `work` done, in its turn.
    pub(super) fn ask(&self, work: Work) -> Answer {
        let (reply, answer) = sync_channel(1);
        let sender = self.jobs.lock().unwrap_or_else(|e| e.into_inner()).clone();
        let sent = sender.is_some_and(|jobs| jobs.send(Job { work, reply }).is_ok());
        if !sent {
            return Refusal::for_now("the TPM service is ending").answer();
        }
        answer
            .recv_timeout(ANSWER_TIME)
            .unwrap_or_else(|_| Refusal::for_now("the TPM is busy or does not answer: try again").answer())
    }

    /// Ends the thread after the work at hand; TPM2_Shutdown is its last command. A TPM that does not answer is left.
    pub(super) fn stop(&self) {
        self.jobs.lock().unwrap_or_else(|e| e.into_inner()).take();
        let thread = self.thread.lock().unwrap_or_else(|e| e.into_inner()).take();
        let Some(thread) = thread else { return };
        let (ended, wait) = sync_channel(1);
        std::thread::spawn(move || {
            let _ = thread.join();
            let _ = ended.send(());
        });
        if wait.recv_timeout(STOP_TIME).is_err() {
            super::note("the TPM does not answer; it did not get its TPM2_Shutdown");
        }
    }
}

fn run(mut engine: Engine, queue: &Receiver<Job>) {
    while let Ok(Job { work, reply }) = queue.recv() {
        let answer = match work {
            Work::Vm(request, vm, earlier) => engine.serve_vm(&request, &vm, earlier),
            Work::Extend(layer, version, digest) => engine.extend(&layer, &version, &digest),
            Work::Reseal => engine.reseal(),
            Work::Status(vms) => Answer::Status(Status {
                host: engine.host,
                pid: std::process::id(),
                vms,
                layers: engine.layers.names(),
                sealed: engine.layers.sealed(),
            }),
        };
        // Who asked may have gone.
        let _ = reply.send(answer);
        engine.rest();
    }
    engine.shut_down();
}

/// A discrete TPM may take a minute to make an RSA key.
const OPEN_TIME: Duration = Duration::from_secs(120);

/// Shorter than clients wait.
const ANSWER_TIME: Duration = Duration::from_secs(50);

/// How long the end of the service waits for the TPM.
const STOP_TIME: Duration = Duration::from_secs(10);
