//! Clients of the TPM service: a VM process's, and that of whoever measures layers and starts VM processes.

use super::frame::{self, FrameError};
use super::{ANSWER_LIMIT, Answer, ControlRequest, Identity, Quoted, Status, VmRequest, WrapKey};
use crate::protocol::Credential;
use policy::{CustomerId, Digest, VmId};
use rustix::event::{PollFd, PollFlags, Timespec};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

/// Commands of a discrete TPM can take seconds, and other VMs may be served first.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(60);

/// Why the service did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum ServiceError {
    /// It said no.
    #[error("the host's TPM service refuses: {reason}")]
    Refused {
        /// Why, and what to do.
        reason: String,
        /// Whether the same request may succeed later.
        again: bool,
    },
    /// It can't be reached or does not answer.
    #[error("the host's TPM service does not answer")]
    Away(#[from] FrameError),
    /// It is not there.
    #[error("the host's TPM service is not reachable at {0}")]
    Connect(String, #[source] io::Error),
    /// It ended, and no other could be had.
    #[error("the host's TPM service ended, and no other could be had: {0}")]
    Lost(String),
    /// It answered something else.
    #[error("the host's TPM service gave an answer that does not belong to the request")]
    Confused,
}

/// A VM process's client: the five requests of [`VmRequest`].
#[derive(Debug)]
pub struct Client {
    stream: UnixStream,
    /// Whether the host's identity was asked for and its answer not read yet.
    asked: bool,
    /// Whether an answer that may still come would be taken for that of a later request.
    confused: bool,
}

impl Client {
    /// A client over the VM process's end of its registered socket pair.
    pub fn new(stream: UnixStream) -> Self {
        // A socket that can't take a timeout fails at its first use as well.
        let _ = stream.set_read_timeout(Some(ANSWER_TIMEOUT));
        let _ = stream.set_write_timeout(Some(ANSWER_TIMEOUT));
        Self { stream, asked: false, confused: false }
    }

    /// A client over an end on which somebody else has [asked for the identity](Self::ask_identity) ahead.
    pub fn with_asked_identity(stream: UnixStream) -> Self {
        Self { asked: true, ..Self::new(stream) }
    }

    /// Whether the service holds the other end, and its next answer will be that to the next request.
    pub fn is_of_use(&self) -> bool {
        let mut polled = [PollFd::from_borrowed_fd(self.stream.as_fd(), PollFlags::empty())];
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        // Without events asked for, only the other side's end and errors are told (poll(2)).
        !self.confused && rustix::event::poll(&mut polled, Some(&now)) == Ok(0)
    }

    /// Asks for the host's identity ahead, where nobody reads the socket's other end yet: the service finds the request when it
    /// begins to serve, and [`identity`](Self::identity) the answer. To be called once, and first.
    pub fn ask_identity(&mut self) -> Result<(), ServiceError> {
        self.put(&VmRequest::Identity)?;
        self.asked = true;
        Ok(())
    }

    /// The host's identity: EK and AK.
    pub fn identity(&mut self) -> Result<Identity, ServiceError> {
        let answer = if self.asked { self.asked_for() } else { self.ask(&VmRequest::Identity) };
        match answer? {
            Answer::Identity(identity) => Ok(identity),
            _ => Err(self.confused()),
        }
    }

    /// Opens a credential: its secret, at most 32 bytes.
    pub fn activate(&mut self, credential: &Credential) -> Result<Vec<u8>, ServiceError> {
        let request = VmRequest::Activate { blob: credential.blob.clone(), secret: credential.secret.clone() };
        match self.ask(&request)? {
            Answer::Activated { secret } if secret.len() <= 32 => Ok(secret.0),
            _ => Err(self.confused()),
        }
    }

    /// The wrap key of this boot.
    pub fn certify_wrap_key(&mut self) -> Result<WrapKey, ServiceError> {
        match self.ask(&VmRequest::CertifyWrapKey)? {
            Answer::WrapKey(key) => Ok(key),
            _ => Err(self.confused()),
        }
    }

    /// A quote; `request` is a [`VmRequest::Quote`].
    pub fn quote(&mut self, request: &VmRequest) -> Result<Quoted, ServiceError> {
        match self.ask(request)? {
            Answer::Quoted(quoted) => Ok(*quoted),
            _ => Err(self.confused()),
        }
    }

    /// ECDH of the wrap key with `point` (uncompressed, 65 bytes): the shared point, uncompressed. What it returns opens
    /// nothing alone.
    pub fn ecdh(&mut self, point: &[u8; 65]) -> Result<[u8; 65], ServiceError> {
        match self.ask(&VmRequest::Ecdh { point: point[..].into() })? {
            Answer::Shared { point } => point.0.try_into().map_err(|_| self.confused()),
            _ => Err(self.confused()),
        }
    }

    fn ask(&mut self, request: &VmRequest) -> Result<Answer, ServiceError> {
        if self.asked {
            // Answers come in order: nobody wanted the first one.
            let _ = self.asked_for()?;
        }
        self.put(request)?;
        self.answer()
    }

    fn put(&mut self, request: &VmRequest) -> Result<(), ServiceError> {
        frame::write(&mut self.stream, request).map_err(|e| self.away(e))
    }

    /// The answer to what was asked ahead.
    fn asked_for(&mut self) -> Result<Answer, ServiceError> {
        self.asked = false;
        self.answer()
    }

    fn answer(&mut self) -> Result<Answer, ServiceError> {
        accepted(frame::read(&mut self.stream, ANSWER_LIMIT).map_err(|e| self.away(e))?)
    }

    fn away(&mut self, error: FrameError) -> ServiceError {
        self.confused = true;
        ServiceError::Away(error)
    }

    fn confused(&mut self) -> ServiceError {
        self.confused = true;
        ServiceError::Confused
    }
}

impl AsFd for Client {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

/// A client of the control socket.
#[derive(Debug)]
pub struct ControlClient {
    stream: UnixStream,
}

impl ControlClient {
    /// Connects to the control socket at `path`.
    pub fn connect(path: &Path) -> Result<Self, ServiceError> {
        let connect = UnixStream::connect(path).and_then(|stream| {
            stream.set_read_timeout(Some(ANSWER_TIMEOUT))?;
            stream.set_write_timeout(Some(ANSWER_TIMEOUT))?;
            Ok(stream)
        });
        let stream = connect.map_err(|e| ServiceError::Connect(path.display().to_string(), e))?;
        Ok(Self { stream })
    }

    /// Asks the service to serve a VM process: its socket end and a pidfd of it go along. The process is bound to customer,
    /// VM and the SHA-256 of the VM file's bytes, as read once by the caller. It is served once [`Registering::done`] says so.
    pub fn register(
        mut self,
        customer: &CustomerId,
        vm: &VmId,
        vm_file: Digest,
        service_end: BorrowedFd<'_>,
        pidfd: BorrowedFd<'_>,
    ) -> Result<Registering, ServiceError> {
        let request = ControlRequest::Register { customer: customer.clone(), vm: vm.clone(), vm_file };
        frame::write_with_fds(&mut self.stream, &request, &[service_end, pidfd])?;
        Ok(Registering(self))
    }

    /// Measures a layer.
    pub fn extend(&mut self, layer: &str, version: &str, digest: Digest) -> Result<(), ServiceError> {
        frame::write(
            &mut self.stream,
            &ControlRequest::Extend { layer: layer.to_owned(), version: version.to_owned(), digest },
        )?;
        self.done()
    }

    /// Seals the layer log and has a new wrap key made.
    pub fn reseal(&mut self) -> Result<(), ServiceError> {
        frame::write(&mut self.stream, &ControlRequest::Reseal)?;
        self.done()
    }

    /// What the service is and serves.
    pub fn status(&mut self) -> Result<Status, ServiceError> {
        frame::write(&mut self.stream, &ControlRequest::Status)?;
        match accepted(frame::read(&mut self.stream, ANSWER_LIMIT)?)? {
            Answer::Status(status) => Ok(status),
            _ => Err(ServiceError::Confused),
        }
    }

    fn done(&mut self) -> Result<(), ServiceError> {
        match accepted(frame::read(&mut self.stream, ANSWER_LIMIT)?)? {
            Answer::Done => Ok(()),
            _ => Err(ServiceError::Confused),
        }
    }
}

/// A registration that the service works on, while its asker does something else.
#[derive(Debug)]
#[must_use = "nobody is registered before the service has said so"]
pub struct Registering(ControlClient);

impl Registering {
    /// Waits until the service has registered the process.
    pub fn done(mut self) -> Result<(), ServiceError> {
        self.0.done()
    }
}

fn accepted(answer: Answer) -> Result<Answer, ServiceError> {
    match answer {
        Answer::Refused { reason, again } => Err(ServiceError::Refused { reason, again }),
        other => Ok(other),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::service::REQUEST_LIMIT;

    fn serve(answers: Vec<Answer>) -> Client {
        let (ours, mut theirs) = UnixStream::pair().expect("pair");
        std::thread::spawn(move || {
            for answer in answers {
                if frame::read::<VmRequest>(&mut theirs, REQUEST_LIMIT).is_err() {
                    return;
                }
                let _ = frame::write(&mut theirs, &answer);
            }
        });
        Client::new(ours)
    }

    #[test]
    fn an_answer_must_belong_to_its_request() {
        let mut client = serve(vec![Answer::Done, Answer::Shared { point: vec![4; 64].into() }]);
        assert!(matches!(client.identity(), Err(ServiceError::Confused)));
        assert!(matches!(client.ecdh(&[4; 65]), Err(ServiceError::Confused)));
        assert!(matches!(client.identity(), Err(ServiceError::Away(_))));
    }

    #[test]
    fn a_client_whose_service_is_gone_or_answers_something_else_is_of_no_more_use() {
        let refused = Answer::Refused { reason: "no".into(), again: false };
        let mut said_no = serve(vec![refused, Answer::Done]);
        assert!(said_no.is_of_use());
        assert!(said_no.identity().is_err() && said_no.is_of_use(), "a refusal is an answer");
        let mut confused = serve(vec![Answer::Done, Answer::Done]);
        assert!(confused.identity().is_err() && !confused.is_of_use());
        let (ours, theirs) = UnixStream::pair().expect("pair");
        let mut gone = Client::new(ours);
        gone.ask_identity().expect("written");
        assert!(gone.is_of_use());
        drop(theirs);
        assert!(!gone.is_of_use(), "before anything is asked");
    }

    #[test]
    fn an_identity_that_was_asked_for_ahead_is_read_once() {
        let who = || {
            Answer::Identity(Identity {
                host: policy::HostId(Digest::of(b"")),
                ek_certificate: None,
                ek_public: vec![1].into(),
                ak_public: vec![2].into(),
            })
        };
        let point = || Answer::Shared { point: vec![4; 65].into() };
        let mut client = serve(vec![who(), point(), who()]);
        client.ask_identity().expect("written");
        assert!(client.identity().is_ok());
        assert!(client.ecdh(&[4; 65]).is_ok());
        assert!(client.identity().is_ok(), "asked again where it is wanted again");
        // Whoever asks for something else first gets the answer to that.
        let mut client = serve(vec![who(), point()]);
        client.ask_identity().expect("written");
        assert!(client.ecdh(&[4; 65]).is_ok());
    }

    #[test]
    fn a_refusal_says_whether_to_try_again() {
        let mut client = serve(vec![Answer::Refused { reason: "PCR 14 moved".into(), again: true }]);
        assert!(matches!(client.ecdh(&[4; 65]), Err(ServiceError::Refused { again: true, .. })));
    }
}
