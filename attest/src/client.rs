//! The blocking client of a key provider: HTTP/1.1 over TLS 1.3, one connection kept alive, no threads of its own.
//!
//! It opens no path and starts no thread after [`HttpsClient::new`], so it runs under a closed sandbox. The system calls it
//! makes from then on: socket, connect, getsockopt, setsockopt, poll, fcntl and ioctl (FIONBIO), read, write, sendto, recvfrom,
//! shutdown, close, getrandom, clock_gettime, and those of the allocator.
//!
//! | module | what it holds |
//! | --- | --- |
//! | [`identity`] | the client's key and certificate |
//! | [`tls`] | whom the client trusts: name and pin |
//! | [`resolve`] | names without NSS |
//! | `transport` | TLS over a socket as `ureq` wants it |

pub mod identity;
pub mod resolve;
pub mod tls;
mod transport;

pub use identity::ClientIdentity;

use crate::protocol::{
    ANSWER_LIMIT, AnchorUpdate, AttestationRequest, Challenge, Evidence, Opinion, Problem, ProblemType, Released,
};
use policy::report::Report;
use policy::{AttestationId, Digest, InstanceNumber, VmHeader, VmId, header::ProviderUrl};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::time::Duration;
use transport::PinnedConnector;

/// How long opening a connection may take.
const CONNECT: Duration = Duration::from_secs(10);

/// How long a whole request may take, answer included, so that a slow or endless body ends.
const REQUEST: Duration = Duration::from_secs(30);

/// Why a request was not answered as it should be.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The provider said no.
    #[error("the key provider refuses: {}{}", .0.title, .0.detail.as_ref().map(|d| format!(" ({d})")).unwrap_or_default())]
    Refused(Box<Problem>),
    /// Nobody answered.
    #[error("the key provider {url} can't be reached: {reason}")]
    Unreachable {
        /// Who was asked.
        url: String,
        /// What went wrong.
        reason: String,
    },
    /// Somebody answered who is not the provider that the VM file names.
    #[error("{url} is not the VM's key provider: {reason}")]
    WrongProvider {
        /// Who was asked.
        url: String,
        /// What gave it away.
        reason: String,
    },
    /// The provider answered with something that is no answer.
    #[error("the key provider {url} answered with something unreadable: {reason}")]
    BadAnswer {
        /// Who was asked.
        url: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The CA certificate that was given has another key than the pinned one.
    #[error("the given CA certificate is not the one that the VM file pins")]
    WrongAuthority,
    /// The client could not be made.
    #[error("the connection to the key provider can't be prepared: {0}")]
    Setup(String),
}

impl ClientError {
    /// The problem's stable type, where the provider refused.
    pub fn problem(&self) -> Option<ProblemType> {
        match self {
            Self::Refused(problem) => ProblemType::from_urn(&problem.kind),
            _ => None,
        }
    }
}

/// A client of one provider, which may have several URLs.
#[derive(Debug)]
pub struct HttpsClient {
    agent: ureq::Agent,
    urls: Vec<ProviderUrl>,
    preferred: usize,
}

impl HttpsClient {
    /// Prepares a client: reads what names need, connects to nothing yet. `authority` is a CA certificate (DER) that the
    /// server may omit; only one that matches `pin` is ever used.
    ///
    /// # Errors
    /// [`ClientError::WrongAuthority`]; [`ClientError::Setup`] where the identity can't be used.
    pub fn new(
        urls: Vec<ProviderUrl>,
        pin: Digest,
        authority: Option<Vec<u8>>,
        identity: &ClientIdentity,
    ) -> Result<Self, ClientError> {
        let config = tls::client_config(pin, authority, identity)?;
        let agent_config = ureq::config::Config::builder()
            .https_only(true)
            .http_status_as_error(false)
            .max_redirects(0)
            .max_redirects_will_error(false)
            .proxy(None)
            .user_agent("fealty")
            .accept_encoding("identity")
            .max_response_header_size(16 * 1024)
            .input_buffer_size(16 * 1024)
            .output_buffer_size(16 * 1024)
            .max_idle_connections(1)
            .max_idle_connections_per_host(1)
            .max_idle_age(Duration::from_secs(50))
            .timeout_connect(Some(CONNECT))
            .timeout_global(Some(REQUEST))
            .build();
        let resolver = resolve::Names::read();
        let agent = ureq::Agent::with_parts(agent_config, PinnedConnector::new(config), resolver);
        Ok(Self { agent, urls, preferred: 0 })
    }

    /// Sends one request and reads the whole answer, at most `limit` bytes of it.
    ///
    /// URLs are tried in order, beginning with the one that answered last, and only while nobody can be reached: a
    /// wrong provider or a refusal ends it.
    ///
    /// # Errors
    /// Every [`ClientError`] but `Setup`.
    pub fn request(
        &mut self,
        method: Method,
        path: &str,
        body: Option<&[u8]>,
        limit: usize,
    ) -> Result<Vec<u8>, ClientError> {
        let mut last = ClientError::Setup("no URL is known".into());
        for step in 0..self.urls.len() {
            let at = (self.preferred + step) % self.urls.len();
            match self.request_one(&self.urls[at], method, path, body, limit) {
                Err(error @ ClientError::Unreachable { .. }) => last = error,
                other => {
                    self.preferred = at;
                    return other;
                }
            }
        }
        Err(last)
    }

    /// Sends `body` as JSON and reads the answer as JSON.
    ///
    /// # Errors
    /// As [`request`](Self::request).
    pub fn json<T: DeserializeOwned>(
        &mut self,
        method: Method,
        path: &str,
        body: Option<&impl Serialize>,
        limit: usize,
    ) -> Result<T, ClientError> {
        let body = body.map(to_json).transpose()?;
        let answer = self.request(method, path, body.as_deref(), limit)?;
        serde_json::from_slice(&answer).map_err(|e| self.bad(&e))
    }

    fn bad(&self, reason: &impl std::fmt::Display) -> ClientError {
        let url = self.urls.get(self.preferred).map(ToString::to_string).unwrap_or_default();
        ClientError::BadAnswer { url, reason: reason.to_string() }
    }

    fn request_one(
        &self,
        url: &ProviderUrl,
        method: Method,
        path: &str,
        body: Option<&[u8]>,
        limit: usize,
    ) -> Result<Vec<u8>, ClientError> {
        let uri = format!("{url}{path}");
        let fault = |e| transport::explain(url, e);
        let response = match body {
            None => ureq::http::Request::builder()
                .method(method.name())
                .uri(&uri)
                .body(())
                .map_err(ureq::Error::from)
                .and_then(|request| self.agent.run(request)),
            Some(body) => ureq::http::Request::builder()
                .method(method.name())
                .uri(&uri)
                .header("content-type", "application/json")
                .body(body)
                .map_err(ureq::Error::from)
                .and_then(|request| self.agent.run(request)),
        };
        let mut response = response.map_err(fault)?;
        let status = response.status().as_u16();
        let is_problem = response
            .headers()
            .get("content-type")
            .and_then(|v| v.to_str().ok())
            .is_some_and(|v| v.starts_with("application/problem+json"));
        let bad = |reason: String| ClientError::BadAnswer { url: url.to_string(), reason };
        if (300..400).contains(&status) {
            let reason = "it answers with a redirect, and a key provider never does".into();
            return Err(ClientError::WrongProvider { url: url.to_string(), reason });
        }
        let cap = if status < 300 { limit } else { 16 * 1024 };
        let answer = response.body_mut().with_config().limit(cap as u64).read_to_vec().map_err(|e| match e {
            ureq::Error::BodyExceedsLimit(_) => bad(format!("the answer is longer than {cap} bytes")),
            other => fault(other),
        })?;
        match status {
            200..=299 => Ok(answer),
            _ if is_problem => {
                let problem = serde_json::from_slice(&answer).map_err(|e| bad(format!("a problem document: {e}")))?;
                Err(ClientError::Refused(Box::new(clean(problem))))
            }
            _ => Err(bad(format!("HTTP status {status}"))),
        }
    }
}

fn to_json(body: &impl Serialize) -> Result<Vec<u8>, ClientError> {
    serde_json::to_vec(body).map_err(|e| ClientError::Setup(e.to_string()))
}

/// A problem whose texts are one short line each, so that nobody writes to the operator's terminal.
fn clean(mut problem: Problem) -> Problem {
    problem.title = one_line(&problem.title);
    problem.detail = problem.detail.as_deref().map(one_line);
    problem
}

fn one_line(text: &str) -> String {
    text.chars().filter(|c| !c.is_control()).take(400).collect()
}

/// The methods that the protocol uses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Method {
    /// Reads.
    Get,
    /// Adds.
    Post,
    /// Sets.
    Put,
    /// Removes.
    Delete,
}

impl Method {
    fn name(self) -> &'static str {
        match self {
            Self::Get => "GET",
            Self::Post => "POST",
            Self::Put => "PUT",
            Self::Delete => "DELETE",
        }
    }
}

/// A VM process's client: the provider that the VM file's header names, and a key made for this process alone.
#[derive(Debug)]
pub struct ProviderClient {
    https: HttpsClient,
    vm: VmId,
    client_key: Digest,
}

impl ProviderClient {
    /// Prepares the client of one VM process; connects to nothing yet. `authority`: see [`HttpsClient::new`].
    ///
    /// # Errors
    /// As [`HttpsClient::new`].
    pub fn new(header: &VmHeader, authority: Option<Vec<u8>>) -> Result<Self, ClientError> {
        let identity = ClientIdentity::generate()?;
        let https = HttpsClient::new(header.providers.clone(), header.pin, authority, &identity)?;
        Ok(Self { https, vm: header.vm.clone(), client_key: identity.key() })
    }

    /// SHA-256 of the client key's SubjectPublicKeyInfo: what the quote binds.
    pub fn client_key(&self) -> Digest {
        self.client_key
    }

    /// Asks for a nonce.
    ///
    /// # Errors
    /// Every [`ClientError`] but `Setup`; so do the other three.
    pub fn challenge(&mut self, request: &AttestationRequest) -> Result<Challenge, ClientError> {
        let path = format!("/v1/vms/{}/attestations", self.vm);
        self.https.json(Method::Post, &path, Some(request), ANSWER_LIMIT)
    }

    /// Sends evidence, gets keys. May be repeated with the same bytes until the nonce's end.
    ///
    /// # Errors
    /// See [`challenge`](Self::challenge).
    pub fn evidence(&mut self, id: &AttestationId, evidence: &Evidence) -> Result<Released, ClientError> {
        let path = format!("/v1/vms/{}/attestations/{id}/evidence", self.vm);
        let body = to_json(evidence)?;
        // A connection that broke in the middle leaves open whether keys were released: the same bytes get the same answer.
        let answer = match self.https.request(Method::Put, &path, Some(&body), ANSWER_LIMIT) {
            Err(ClientError::Unreachable { .. }) => {
                self.https.request(Method::Put, &path, Some(&body), ANSWER_LIMIT)?
            }
            other => other?,
        };
        serde_json::from_slice(&answer).map_err(|e| self.https.bad(&e))
    }

    /// Asks what the provider thinks of evidence, without asking for keys.
    ///
    /// # Errors
    /// See [`challenge`](Self::challenge).
    pub fn opinion(&mut self, id: &AttestationId, evidence: &Evidence) -> Result<Opinion, ClientError> {
        let path = format!("/v1/vms/{}/attestations/{id}/opinion", self.vm);
        self.https.json(Method::Put, &path, Some(evidence), ANSWER_LIMIT)
    }

    /// Sends one report, as the exact bytes that the chain's next digest covers.
    ///
    /// # Errors
    /// See [`challenge`](Self::challenge).
    pub fn report(&mut self, instance: InstanceNumber, report: &[u8]) -> Result<(), ClientError> {
        let path = format!("/v1/vms/{}/instances/{instance}/reports", self.vm);
        self.https.request(Method::Post, &path, Some(report), ANSWER_LIMIT).map(drop)
    }

    /// Keeps a newer anchor of a volume.
    ///
    /// # Errors
    /// See [`challenge`](Self::challenge).
    pub fn anchor(&mut self, instance: InstanceNumber, update: &AnchorUpdate) -> Result<(), ClientError> {
        let path = format!("/v1/vms/{}/instances/{instance}/anchors", self.vm);
        self.https.request(Method::Put, &path, Some(&to_json(update)?), ANSWER_LIMIT).map(drop)
    }
}

/// A report's bytes: what is sent, stored and chained.
///
/// # Errors
/// [`ClientError::Setup`] where it can't be written, which no report can bring about.
pub fn report_bytes(report: &Report) -> Result<Vec<u8>, ClientError> {
    to_json(report)
}

#[cfg(test)]
mod tests;
